"""Who replies to a generator: a teacher on this machine, or one behind a server.

N = predicted tokens.

Randomness is keyed by the request.  On this machine a reply does not depend on the rest of its
batch, up to the rounding of the teacher, and requests of a round come in the same batches each
time.  A server is sent a seed that is made in the same way, and may or may not use it.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from accelerate import PartialState
from torch import Tensor

from llmdistill.batch import Prompts, Sequences
from llmdistill.data.formats import Example
from llmdistill.data.render import close_user_turn, continued, open_user_turn, render
from llmdistill.decoding.keyed import row_keys
from llmdistill.evaluation.agreement import judge, token_log_probs
from llmdistill.instruct.parse import BETWEEN
from llmdistill.instruct.records import append_lines, drop_half_line, read_whole_lines
from llmdistill.instruct.requests import Asked, Reply, Request
from llmdistill.models.vocabulary import end_ids
from llmdistill.sampling import Draw, Sampling, Writer
from llmdistill.teachers.remote import Question, RemoteTeacher, Spoken

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from llmdistill.teachers.local import LocalTeacher

CONTROL_TOKEN, NO_UNICODE = "control token in the text", "text that is not Unicode"
# What servers of the common families read as a control token wherever it stands.
_CONTROL = re.compile(
    r"<\|[^|<>\s]{1,40}\|>|<\uff5c[^\uff5c\s]{1,40}\uff5c>|</?s>|\[/?INST\]|<</?SYS>>"
    r"|<(?:start|end)_of_turn>|<\|?turn\|?>|<(?:bos|eos|pad|unk)>|</?tool_(?:call|response)>"
    r"|\[/?(?:TOOL_CALLS|AVAILABLE_TOOLS|TOOL_RESULTS|SYSTEM_PROMPT|IMG|gMASK)\]"
)


class Responder(Protocol):
    def respond(self, asked: Sequence[Asked]) -> list[Reply]:
        """A reply to each request, in their order."""
        ...


class LocalResponder:
    """Writes `batch_size` replies at a time, those of similar length together.

    With `scored` replies come with their log-probability.
    """

    def __init__(
        self,
        teacher: LocalTeacher,
        *,
        seed: int,
        batch_size: int = 32,
        scored: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        self.teacher, self.seed, self.batch_size = teacher, seed, batch_size
        self.scored, self.template_options = scored, dict(chat_template_kwargs or {})
        known = teacher.tokenizer.added_tokens_decoder.items()
        special = {number for number, token in known if token.special}
        self._ends = end_ids(teacher.model, teacher.tokenizer) | special

    def respond(self, asked: Sequence[Asked]) -> list[Reply]:
        prompts = [self._prompt(one.request) for one in asked]
        replies: dict[int, Reply] = {}
        groups: dict[tuple[Sampling, int, int, str], list[int]] = {}
        for place, one in enumerate(asked):
            request = one.request
            stop = _stop(request, self.teacher.tokenizer, self.template_options)
            key = (request.sampling, request.max_new_tokens, one.stage, stop)
            groups.setdefault(key, []).append(place)
        for (sampling, max_new_tokens, stage, stop), places in groups.items():
            places.sort(key=lambda place: len(prompts[place]))
            size = len(places) if sampling.continuous else self.batch_size
            for start in range(0, len(places), size):
                some = places[start : start + size]
                batch = Prompts.pack(
                    [prompts[place] for place in some], [asked[place].call for place in some],
                    pad_id=self.teacher.tokenizer.pad_token_id,
                )  # fmt: skip
                sample = tuple(asked[place].place for place in some)
                written = self.teacher.write(
                    batch, sampling, max_new_tokens=max_new_tokens,
                    draw=Draw(self.seed, epoch=stage, sample=sample), stop=stop,
                )  # fmt: skip
                replies |= zip(some, self._replies(written, stop), strict=True)
        return [replies[place] for place in range(len(asked))]

    def _prompt(self, request: Request) -> list[int]:
        tokenizer, options = self.teacher.tokenizer, self.template_options
        if request.turn == "user":
            ids = open_user_turn(tokenizer, options)
        else:
            ids, _ = render(tokenizer, Example(request.messages, None, "a request"), options)
        return ids + continued(tokenizer, request.start, "a request")

    def _replies(self, written: Sequences, stop: str) -> list[Reply]:
        """Each text up to the first token that only a template writes (an end, another turn), or to
        `stop`.
        """
        tokenizer, replies = self.teacher.tokenizer, []
        each = written_log_probs(self.teacher, written) if self.scored else None
        for row, ids in enumerate(written.responses()):
            end = next((place for place, token in enumerate(ids) if token in self._ends), len(ids))
            text = tokenizer.decode(ids[:end])
            cut = text.find(stop) if stop else -1
            mean = None
            if each is not None:  # of the text, and of the token that ends it
                count = end + 1 if cut < 0 else _tokens_of(tokenizer, ids, cut)
                mean = float(each[row][:count].mean())
            is_whole = end < len(ids) or cut >= 0
            replies.append(Reply(text if cut < 0 else text[:cut], not is_whole, log_prob=mean))
        return replies


class RemoteResponder:
    """Asks a server: conversations as chats, what a user would say as plain text.

    What was said is recorded reply by reply in `record`, a folder, so that a run that stops within
    a round asks nothing twice.  A server reads control tokens wherever they stand, so a request
    whose text holds one is not made.
    """

    def __init__(self, teacher: RemoteTeacher, *, seed: int, record: Path | None = None) -> None:
        self.teacher, self.seed, self.record = teacher, seed, record

    def respond(self, asked: Sequence[Asked]) -> list[Reply]:
        replies = [self._recorded.get(_key(one)) or self._withheld(one.request) for one in asked]
        missing = [place for place, reply in enumerate(replies) if reply is None]

        def heard(number: int, spoken: Spoken) -> None:
            place = missing[number]
            text = _after(asked[place].request.start, spoken.text)
            reply = Reply(text, spoken.truncated, spoken.refused, spoken.log_prob)
            replies[place] = reply
            if self.record and not spoken.refused:  # what is refused may be mended
                line = {"key": _key(asked[place]), "reply": asdict(reply)}
                append_lines(self._file(PartialState().process_index), [line])

        if missing:
            self.teacher.answer([self._question(asked[place]) for place in missing], heard)
        return [reply for reply in replies if reply is not None]

    def _withheld(self, request: Request) -> Reply | None:
        """A reply in place of the server's, where the request is not to be sent."""
        known = self.teacher.tokenizer.all_special_tokens if self.teacher.tokenizer else ()
        for text in (message["content"] for message in request.messages):
            if _CONTROL.search(text) or any(token in text for token in known):
                return Reply("", refused=CONTROL_TOKEN)
            if any("\ud800" <= character <= "\udfff" for character in text):
                return Reply("", refused=NO_UNICODE)
        return None

    def forget(self) -> None:
        """The run is over, and all that was said is recorded with its calls."""
        for file in self._files():
            file.unlink()

    @cached_property
    def _recorded(self) -> dict[str, Reply]:
        """What an earlier run was told, by the key of what was asked."""
        if self.record:
            drop_half_line(self._file(PartialState().process_index))
        lines = (line for file in self._files() for line in read_whole_lines(file))
        return {line["key"]: Reply(**line["reply"]) for line in lines}

    def _file(self, rank: int | str) -> Path:
        assert self.record is not None
        return self.record / f"spoken-{rank}.jsonl"

    def _files(self) -> list[Path]:
        return sorted(self.record.glob(self._file("*").name)) if self.record else []

    def _question(self, asked: Asked) -> Question:
        request = asked.request
        draw = Draw(self.seed, epoch=asked.stage, sample=asked.place)
        seed = int(row_keys(draw, torch.tensor([asked.call]), Writer.TEACHER)) % 2**31
        prompt: str | tuple[dict[str, str], ...] = request.messages
        stop = request.stop
        if request.turn == "user":
            tokenizer, options = self.teacher.tokenizer, self.teacher.chat_template_kwargs
            assert tokenizer is not None  # the recipe was refused without one
            stop = _stop(request, tokenizer, options)
            prompt = _opening(tokenizer, options)
        return Question(prompt, request.sampling, request.max_new_tokens, seed, stop)


def written_log_probs(teacher: LocalTeacher, written: Sequences) -> list[Tensor]:
    """The teacher's log-probability of each token that it wrote, in nats: one (G,) per row.

    At temperature 1, whatever it was drawn with.
    """
    responses = written.responses()
    (judged,) = judge(teacher, [written])
    tokens = torch.tensor([token for ids in responses for token in ids])
    each_N = token_log_probs(judged.distribution, tokens)
    return list(each_N.split([len(ids) for ids in responses]))


def _stop(request: Request, tokenizer: PreTrainedTokenizerBase, options: Mapping[str, Any]) -> str:
    """What the text of a turn ends before."""
    return request.stop or (close_user_turn(tokenizer, options) if request.turn == "user" else "")


def _opening(tokenizer: PreTrainedTokenizerBase, options: Mapping[str, Any]) -> str:
    """What opens a user's turn, without the first token that a server writes itself."""
    text = str(tokenizer.decode(open_user_turn(tokenizer, options)))
    writes_it = tokenizer.bos_token and tokenizer("")["input_ids"] == [tokenizer.bos_token_id]
    return text.removeprefix(tokenizer.bos_token) if writes_it else text


def _tokens_of(tokenizer: PreTrainedTokenizerBase, ids: list[int], length: int) -> int:
    """How many tokens it takes to write so many characters; one or more."""
    return next(n for n in range(1, len(ids) + 1) if len(tokenizer.decode(ids[:n])) >= length)


def _key(asked: Asked) -> str:
    return hashlib.sha256(repr(asked).encode()).hexdigest()[:16]


def _after(start: str, text: str) -> str:
    """The reply behind what it was to begin with.

    A chat goes on from there (then its first item has a later number), or says it again, perhaps
    after a greeting, or starts counting again.
    """
    last = re.match(r"(\d+)[.)]? ?(.*)", start.rpartition("\n")[2])
    if last is None:
        return text
    number, field = last.groups()
    mark = rf"[.)]?\s*{re.escape(field)}" if field else r"[.)]"
    item = rf"^(?:{BETWEEN}[ \t]*\n?)?[ \t]*(\d+){mark}"
    first = re.search(item, text, re.MULTILINE)
    return text[first.end() :] if first and int(first[1]) <= int(number) else text
