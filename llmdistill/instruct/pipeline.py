"""Call after call until enough rows are kept, in a folder that survives being killed anywhere.

    calls.jsonl    what the teacher said, one line per call: all that cannot be made again
    rows.jsonl     the rows that were kept, one per line
    log.jsonl      when, how fast and why not: the only file with times

Calls are made in rounds of a fixed size.  What a round asks depends on the rounds before it alone,
so rows are the same however often a run was stopped, and on any number of ranks up to the rounding
of the teacher.  A round that was not finished is made again whole: its batches are then the same.
"""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object

from llmdistill.errors import DataError, TeacherError
from llmdistill.instruct.filters import EmptyAnswer, Filter
from llmdistill.instruct.generators.base import TaskGenerator
from llmdistill.instruct.parse import Parsed
from llmdistill.instruct.records import (
    append_lines,
    drop_half_line,
    read_whole_lines,
    replace_lines,
)
from llmdistill.instruct.requests import Asked, Reply, Request
from llmdistill.instruct.responders import Responder
from llmdistill.instruct.tasks import Task

ALWAYS = (EmptyAnswer(),)  # no data set takes such a row
BARREN_ROUNDS = 20  # after so many without a row a run without an end stops


@dataclass(frozen=True)
class Made:
    """One call that is done: what it made, a hash of what was asked, and what was said."""

    call: int
    parsed: Parsed
    prompt_hash: str
    replies: list[list[Reply]]


@dataclass
class TaskCounts:
    """What became of the tasks so far; `variants` counts the kept ones by how they were made."""

    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    variants: Counter[str] = field(default_factory=Counter)

    @property
    def made(self) -> int:
        return self.kept + sum(self.dropped.values())


@dataclass(frozen=True)
class Settings:
    """`about` stands in every row: generator, teacher, sampling, seed."""

    folder: Path
    target: int | None
    round_size: int
    about: Mapping[str, Any]


class Pipeline:
    """Runs a generator against a responder; filters decide in the order of the calls."""

    def __init__(
        self,
        generator: TaskGenerator,
        responder: Responder,
        filters: Sequence[Filter],
        settings: Settings,
    ) -> None:
        if generator.num_calls == 0:
            raise DataError(
                "'generator.prompts' has no rows, so there is nothing to ask the teacher. Give a "
                "source with at least one row."
            )
        self.generator, self.responder, self.filters = generator, responder, filters
        self.settings = settings
        self.counts = TaskCounts()
        self._kept: list[Task] = []
        self._next_call = 0
        self._is_answered = False

    def run(
        self, progress: Callable[[TaskCounts, float], None] = lambda counts, seconds: None
    ) -> None:
        """Until the target is met or the generator is done.

        `progress` hears of each round and its seconds, and first of what was there already.
        """
        self._take_up()
        progress(self.counts, 0.0)
        barren = 0
        while not self._is_done():
            start, before = time.perf_counter(), self.counts.kept
            made = self._round(self._numbers())
            self._check_answered(made)
            self._record(made)
            self._keep(made)
            seconds = time.perf_counter() - start
            self._log(seconds)
            progress(self.counts, seconds)
            barren = 0 if self.counts.kept > before else barren + 1
            if barren == BARREN_ROUNDS and self.generator.num_calls is None:
                raise DataError(
                    f"no row was kept in the last {barren} rounds of {self.settings.round_size} "
                    f"calls. Dropped so far: {dict(self.counts.dropped)}. Change the filters or "
                    "the generator; if most texts were cut off, raise its token limits."
                )

    def _check_answered(self, made: Sequence[Made]) -> None:
        """A teacher that has refused all so far is not asked on, and none of it is recorded."""
        replies = [reply for one in made for stage in one.replies for reply in stage]
        refused = Counter(reply.refused for reply in replies)
        self._is_answered |= refused[""] > 0 or not replies
        if not self._is_answered:
            raise TeacherError(
                f"the teacher answered none of {len(replies)} requests: {dict(refused)}. Fix the "
                "cause (see any warnings above), then pass resume to continue."
            )

    def _is_done(self) -> bool:
        calls = self.generator.num_calls
        return self._is_met() or (calls is not None and self._next_call >= calls)

    def _is_met(self) -> bool:
        return self.settings.target is not None and self.counts.kept >= self.settings.target

    def _numbers(self) -> list[int]:
        end = self._next_call + self.settings.round_size
        if self.generator.num_calls is not None:
            end = min(end, self.generator.num_calls)
        return list(range(self._next_call, end))

    def _round(self, numbers: Sequence[int]) -> list[Made]:
        """The calls of these numbers, shared out over the ranks."""
        state = PartialState()
        share = -(-len(numbers) // state.num_processes)
        own = numbers[state.process_index * share : (state.process_index + 1) * share]
        made = exchange(self.generator, self.responder, own, self._kept)
        return gather_object(made) if state.num_processes > 1 else made

    def _keep(self, made: Sequence[Made]) -> None:
        """Filters what was made; what passes goes into rows.jsonl."""
        rows, before = [], list(self._kept)
        for call in made:
            self._is_answered |= any(not r.refused for stage in call.replies for r in stage)
            if self._is_met():
                continue
            self.counts.dropped.update(call.parsed.dropped)
            for place, task in enumerate(call.parsed.tasks):
                if not self._is_met() and self._passes(task):
                    rows.append(self._row(call, place, task))
                    before.append(task)
        self._kept = before
        self._next_call = made[-1].call + 1 if made else self._next_call
        self._append("rows.jsonl", rows)

    def _passes(self, task: Task) -> bool:
        reasons = (one.reason(task) for one in (*ALWAYS, *self.filters))
        if reason := next(filter(None, reasons), None):
            self.counts.dropped[reason] += 1
            return False
        for one in self.filters:
            one.kept(task)
        self.counts.kept += 1
        self.counts.variants.update([task.variant] if task.variant else [])
        return True

    def _row(self, made: Made, place: int, task: Task) -> dict[str, Any]:
        return {
            "id": f"{made.call}-{place}",
            "instruction": task.instruction,
            "input": task.input,
            "output": task.output,
            "variant": task.variant,
            **self.settings.about,
            "prompt_hash": made.prompt_hash,
        }

    # ---- files ----

    def _record(self, made: Sequence[Made]) -> None:
        lines = [
            {
                "call": m.call,
                "revision": self.settings.about.get("revision"),
                "prompt_hash": m.prompt_hash,
                "replies": [[asdict(r) for r in stage] for stage in m.replies],
            }
            for m in made
        ]
        self._append("calls.jsonl", lines)

    def _log(self, seconds: float) -> None:
        counts = self.counts
        entry = {
            "time": time.time(),
            "seconds": seconds,
            "calls": self._next_call,
            "kept": counts.kept,
            "dropped": dict(sorted(counts.dropped.items())),
            "variants": dict(sorted(counts.variants.items())),
        }
        self._append("log.jsonl", [entry])

    def _append(self, name: str, lines: Sequence[Mapping[str, Any]]) -> None:
        if PartialState().is_main_process:
            append_lines(self.settings.folder / name, lines)

    def _take_up(self) -> None:
        """What an earlier run recorded, as if it had just been said; half a round is forgotten."""
        PartialState().wait_for_everyone()
        recorded = list(read_whole_lines(self.settings.folder / "calls.jsonl"))
        whole: list[Any] = []
        numbers = self._numbers()
        while numbers and len(recorded) >= len(whole) + len(numbers):
            lines = recorded[len(whole) : len(whole) + len(numbers)]
            if [line["call"] for line in lines] != numbers:
                raise DataError(
                    f"{self.settings.folder / 'calls.jsonl'} was recorded with a different round "
                    "size. Resume with the original settings, or choose another folder."
                )
            whole += lines
            self._next_call = numbers[-1] + 1
            numbers = self._numbers()
        self._next_call = 0
        PartialState().wait_for_everyone()  # all have read before one writes
        if PartialState().is_main_process:
            drop_half_line(self.settings.folder / "calls.jsonl")
            drop_half_line(self.settings.folder / "log.jsonl")
            replace_lines(self.settings.folder / "calls.jsonl", whole)
            replace_lines(self.settings.folder / "rows.jsonl", [])
        said = {line["call"]: line["replies"] for line in whole}
        while self._next_call < len(said) and not self._is_done():
            made = exchange(self.generator, Recorded(said), self._numbers(), self._kept)
            for one in made:
                self._check_same(whole[one.call], one)
            self._keep(made)

    def _check_same(self, recorded: Mapping[str, Any], made: Made) -> None:
        """A recorded call is only taken up if it was asked of this teacher in these words."""
        where = self.settings.folder / "calls.jsonl"
        if recorded["prompt_hash"] != made.prompt_hash:
            raise DataError(
                f"call {made.call} would now send a different request than the one recorded in "
                f"{where}: the prompts, the seed or the version of llmdistill changed. Restore "
                "them, or choose another folder."
            )
        revision = self.settings.about.get("revision")
        if recorded["revision"] != revision:
            raise DataError(
                f"call {made.call} in {where} was recorded with the teacher's revision "
                f"'{recorded['revision']}', but the teacher is now at '{revision}'. Set "
                "teacher.revision to the recorded one, or choose another folder."
            )


class Recorded:
    """Replies that were given before."""

    def __init__(self, said: Mapping[int, Sequence[Sequence[Mapping[str, Any]]]]) -> None:
        self.said = said

    def respond(self, asked: Sequence[Asked]) -> list[Reply]:
        return [Reply(**self.said[one.call][one.stage][one.place]) for one in asked]


def exchange(
    generator: TaskGenerator,
    responder: Responder,
    numbers: Sequence[int],
    machine: Sequence[Task],
) -> list[Made]:
    """Makes these calls side by side: what they ask at the same stage is written together."""
    calls = {number: generator.call(number, machine) for number in numbers}
    asking: dict[int, list[Request]] = {}
    said: dict[int, list[list[Reply]]] = {number: [] for number in numbers}
    asked_text: dict[int, list[str]] = {number: [] for number in numbers}
    done: dict[int, Parsed] = {}

    def go_on(number: int, replies: list[Reply] | None) -> None:
        try:
            asking[number] = calls[number].send(replies)  # type: ignore[arg-type]
        except StopIteration as stop:
            done[number] = stop.value
            asking.pop(number, None)

    for number in numbers:
        go_on(number, None)
    while asking:
        asked = [
            Asked(number, len(said[number]), place, request)
            for number, requests in asking.items()
            for place, request in enumerate(requests)
        ]
        replies = iter(responder.respond(asked))
        for number, requests in list(asking.items()):
            asked_text[number] += map(repr, requests)
            said[number].append([next(replies) for _ in requests])
            go_on(number, said[number][-1])
    return [
        Made(number, done[number], _hash("\n".join(asked_text[number])), said[number])
        for number in numbers
    ]


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
