"""The teacher's replies on disk, found again by their requests.

    calls.jsonl        the replies of each finished call, one line per call
    spoken-RANK.jsonl  replies of a server as they arrive; deleted at the end of the run

Lines are only added.  If a call has several lines, the last one is the newest.
"""

from __future__ import annotations

import hashlib
import logging
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

from accelerate import PartialState

from llmdistill.errors import DataError
from llmdistill.instruct.generators.base import TaskGenerator
from llmdistill.instruct.records import append_lines, drop_half_line, read_whole_lines
from llmdistill.instruct.requests import Asked, Reply, Request
from llmdistill.instruct.responders import Responder

logger = logging.getLogger("llmdistill")


class Key(NamedTuple):
    """Where a request stood, and a hash of all that was asked."""

    call: int
    stage: int
    place: int
    asked: str


class NotRecorded(Exception):
    """Raised by a replay for a request without a recorded reply."""


class Replies:
    """The recorded replies of a folder.

    `revision` is the teacher's: replies of another revision are refused.
    """

    def __init__(self, folder: Path, revision: str | None = None) -> None:
        self.folder, self.revision = folder, revision
        self._by_key: dict[Key, Reply] = {}
        # The replies whose call now asks something else, by the hash of their request.
        self._loose: dict[str, list[Reply]] = {}
        self._by_request: dict[str, Reply] = {}
        self._hashes: dict[tuple[int, int, int], str] = {}
        self._lines: dict[int, Mapping[str, Any]] = {}
        self._is_endless = True

    # ---- reading ----

    def read(self) -> None:
        """Read all files.  Raises DataError if a line is damaged or of another revision."""
        # Each rank repairs only its own file: the other ranks repair theirs at the same time.
        drop_half_line(self._spoken_file(PartialState().process_index))
        for key, reply in self._stored():
            self._by_key[key] = reply
            if not reply.refused:
                self._by_request[key.asked] = reply
            self._hashes[key[:3]] = key.asked
        for line in read_whole_lines(self.folder / "calls.jsonl"):
            self._lines[line["call"]] = line

    def settle(self, generator: TaskGenerator) -> None:
        """Give the replies of a finite generator to the calls that now make their requests.

        Its prompts may have been added, removed or moved since they were recorded.  Refusals are
        forgotten, because their cause may be fixed by now; an endless generator replaces a refused
        call by another one.
        """
        self._is_endless = generator.num_calls is None
        if generator.num_calls is None or not self._by_key:
            return
        recorded = {key: reply for key, reply in self._by_key.items() if not reply.refused}
        first = [key for number in range(generator.num_calls) for key in _first(generator, number)]
        claimed = {key for key in first if key in recorded}
        kept = {key.call for key in claimed}
        self._by_key = {
            key: reply
            for key, reply in recorded.items()
            if (key in claimed if key.stage == 0 else key.call in kept)
        }
        loose = defaultdict(list)
        for key, reply in recorded.items():
            if key not in self._by_key:
                loose[key.asked].append(reply)
        moved = 0
        for key in first:
            if key not in self._by_key and loose.get(key.asked):
                self._by_key[key] = loose[key.asked].pop(0)
                moved += 1
        self._loose = dict(loose)
        unused = sum(map(len, loose.values()))
        if moved or unused:
            logger.warning(
                "the prompts changed: %d recorded replies are used, %d of them for a prompt at "
                "another place; %d fit no prompt, and stay in %s",
                len(self._by_key), moved, unused, self.folder / "calls.jsonl",
            )  # fmt: skip

    def find(self, asked: Asked) -> Reply | None:
        """Return the recorded reply to a request, or None.

        Raises DataError if an endless generator recorded another request there: its requests depend
        only on the recipe, so the recipe's files or the version of llmdistill must have changed.
        """
        key = _key(asked)
        is_for_teacher = asked.request.who == "teacher"
        if key in self._by_key:
            found = self._by_key[key]
            # A score that was refused is missing from its row, so it is asked for again.
            if is_for_teacher or not found.refused:
                return found
        if not is_for_teacher:  # a judge always says the same of the same answer
            return self._by_request.get(key.asked)
        if self._is_endless and key[:3] in self._hashes:
            raise DataError(
                f"call {asked.call} would now send a different request than the one recorded in "
                f"{self.folder / 'calls.jsonl'}: the seed tasks, your own function or the version "
                "of llmdistill changed. Restore it, or choose another folder."
            )
        if loose := self._loose.get(key.asked):
            self._by_key[key] = loose.pop(0)  # a second look at this request finds it again
        return self._by_key.get(key)

    def respond(self, asked: Sequence[Asked]) -> list[Reply]:
        """Return the recorded replies; raise NotRecorded if one is missing."""
        found = [self.find(one) for one in asked]
        if None in found:
            raise NotRecorded
        return [reply for reply in found if reply is not None]

    def __len__(self) -> int:
        return len(self._by_key)

    # ---- writing ----

    def add_call(self, call: int, lines: Mapping[str, Any]) -> Mapping[str, Any] | None:
        """Return the line of a call if it has to be written: it is new, or has changed."""
        line = {"call": call, "revision": self.revision, **lines}
        if self._lines.get(call) == line:
            return None
        self._lines[call] = line
        return line

    def heard(self, asked: Asked, reply: Reply) -> None:
        """Record a reply of a server as soon as it arrives, if it is not a refusal."""
        if reply.refused:
            return
        line = {**_key(asked)._asdict(), "reply": asdict(reply)}
        append_lines(self._spoken_file(PartialState().process_index), [line])

    def tidy(self) -> None:
        """Delete the files of single replies, except those with a reply that no call has."""
        done = {key for line in self._lines.values() for key, _ in _of_call(line)}
        for file in self._spoken_files():
            if all(key in done for key, _ in _of_spoken(file)):
                file.unlink()

    # ---- files ----

    def _stored(self) -> Iterator[tuple[Key, Reply]]:
        """Yield every reply in the files with its key, the newest one of a key last."""
        path = self.folder / "calls.jsonl"
        for line in read_whole_lines(path):
            if "asked" not in line:
                raise DataError(
                    f"{path} was written by an older version of llmdistill, which did not record "
                    "the requests. Finish the dataset with that version, or choose another folder."
                )
            if line["revision"] != self.revision:
                raise DataError(
                    f"call {line['call']} in {path} was recorded with the teacher's revision "
                    f"'{line['revision']}', but the teacher is now at '{self.revision}'. Set "
                    "teacher.revision to the recorded one, or choose another folder."
                )
            yield from _of_call(line)
        for file in self._spoken_files():
            yield from _of_spoken(file)

    def _spoken_file(self, rank: int | str) -> Path:
        return self.folder / f"spoken-{rank}.jsonl"

    def _spoken_files(self) -> list[Path]:
        return sorted(self.folder.glob(self._spoken_file("*").name))


class Remembering:
    """Responder that takes recorded replies, and asks another responder for the others."""

    def __init__(self, responder: Responder, replies: Replies) -> None:
        self.responder, self.replies = responder, replies

    def respond(self, asked: Sequence[Asked]) -> list[Reply]:
        known = [replace(one, known=self.replies.find(one)) for one in asked]
        if all(one.known for one in known):
            return [one.known for one in known if one.known]
        found = self.responder.respond(known)
        return [one.known or reply for one, reply in zip(known, found, strict=True)]


def hash_of(text: str) -> str:
    """Return 16 hex digits that depend on the whole text."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def request_hash(request: Request) -> str:
    """Return a hash of all that is asked."""
    return hash_of(repr(request))


def _key(asked: Asked) -> Key:
    return Key(asked.call, asked.stage, asked.place, request_hash(asked.request))


def _first(generator: TaskGenerator, number: int) -> Iterable[Key]:
    """Return the keys of the first requests of a call."""
    requests: list[Request] = next(generator.call(number, []), [])
    return [Key(number, 0, place, request_hash(one)) for place, one in enumerate(requests)]


def _of_call(line: Mapping[str, Any]) -> Iterator[tuple[Key, Reply]]:
    stages = zip(line["asked"], line["replies"], strict=True)
    for stage, (hashes, replies) in enumerate(stages):
        for place, (asked, reply) in enumerate(zip(hashes, replies, strict=True)):
            yield Key(line["call"], stage, place, asked), Reply(**reply)


def _of_spoken(file: Path) -> Iterator[tuple[Key, Reply]]:
    for line in read_whole_lines(file):
        reply = Reply(**line.pop("reply"))
        yield Key(**line), reply
