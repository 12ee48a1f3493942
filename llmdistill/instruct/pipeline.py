"""Make calls to a generator until enough rows are kept.  A run can be killed at any point.

    calls.jsonl    the teacher's replies, one line per call: all that cannot be computed again
    rows.jsonl     the rows that were kept, one per line
    log.jsonl      times, speed and counts of each round: the only file that depends on the clock

Calls are made in rounds of a fixed size, and the requests of a round depend only on earlier rounds.
The rows are therefore the same however often a run was stopped, and on any number of ranks up to
the rounding of the teacher.  An unfinished round is made again as a whole, so that its batches are
the same as without the interruption.
"""

from __future__ import annotations

import hashlib
import logging
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

logger = logging.getLogger("llmdistill")

ALWAYS = (EmptyAnswer(),)  # a row without an answer is of no use in any dataset
BARREN_ROUNDS = 20  # rounds without a kept row after which an endless generator is stopped


@dataclass(frozen=True)
class Made:
    """A finished call: its tasks, a hash of all its requests, and the replies of each stage."""

    call: int
    parsed: Parsed
    prompt_hash: str
    replies: list[list[Reply]]


@dataclass
class TaskCounts:
    """Number of tasks that were kept, and dropped by reason.

    `variants` counts the kept ones by the variant of the generator that made them, and `thought`
    those with thinking.
    """

    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    variants: Counter[str] = field(default_factory=Counter)
    thought: int = 0

    @property
    def made(self) -> int:
        """Number of tasks so far, kept and dropped."""
        return self.kept + sum(self.dropped.values())


@dataclass(frozen=True)
class Settings:
    """Options of a pipeline.

    A `target` of None means all calls of the generator.  `about` is added to every row: generator,
    teacher, revision, sampling and seed.  `images` is the column with the images that the teacher
    saw; None if it sees none.
    """

    folder: Path
    target: int | None
    round_size: int
    about: Mapping[str, Any]
    images: str | None = None


class Pipeline:
    """Runs a generator against a responder, and filters the tasks in the order of the calls.

    Raises DataError if the generator has no calls.
    """

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
        self._drops = DropWatch()

    def run(
        self, progress: Callable[[TaskCounts, float], None] = lambda counts, seconds: None
    ) -> None:
        """Make rounds until the target is reached or the generator has no more calls.

        `progress` is called after each round with its seconds, and once before, with 0 seconds, for
        the rows of an earlier run.  Raises DataError if recorded calls do not fit this run or if
        an endless generator keeps no more rows, and TeacherError if the teacher answers nothing.
        """
        self._take_up()
        progress(self.counts, 0.0)
        barren = 0
        while not self._is_done():
            start, before = time.perf_counter(), self.counts.kept
            made = self._round(self._numbers())
            self._check_answered(made)
            # Replies are recorded before rows: rows can be derived from replies, not vice versa.
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
        """Raise TeacherError if the teacher has refused every request of this run so far.

        The round is not recorded, so that a resumed run asks again after the cause was fixed.
        """
        replies = [reply for one in made for stage in one.replies for reply in stage]
        refused = Counter(reply.refused for reply in replies)
        # A call may make no request at all (a row without an answer to rewrite): no refusal.
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
        """Make these calls, divided among the ranks.  Every rank gets the results of all calls."""
        state = PartialState()
        # Contiguous shares, so that the gathered list is in the order of the calls.
        share = -(-len(numbers) // state.num_processes)
        own = numbers[state.process_index * share : (state.process_index + 1) * share]
        made = exchange(self.generator, self.responder, own, self._kept)
        return gather_object(made) if state.num_processes > 1 else made

    def _keep(self, made: Sequence[Made]) -> None:
        """Filter the tasks of a round, and append the kept ones to rows.jsonl."""
        rows, before = [], list(self._kept)
        for call in made:
            self._is_answered |= any(not r.refused for stage in call.replies for r in stage)
            # Tasks beyond the target are neither kept nor counted, so the counts add up.
            if self._is_met():
                continue
            self.counts.dropped.update(call.parsed.dropped)
            for place, task in enumerate(call.parsed.tasks):
                if not self._is_met() and self._passes(task):
                    rows.append(_row(self.settings, call, place, task))
                    before.append(task)
        self._kept = before
        self._next_call = made[-1].call + 1 if made else self._next_call
        self._append("rows.jsonl", rows)
        self._drops.end_round(sum(len(call.parsed.tasks) for call in made))

    def _passes(self, task: Task) -> bool:
        """Whether all filters keep the task; counts it either way."""
        # Evaluated lazily: the first reason ends the search, so cheap filters should come first.
        reasons = ((one.reason(task), one.kind) for one in (*ALWAYS, *self.filters))
        reason, kind = next((found for found in reasons if found[0]), (None, ""))
        if reason is not None:
            self.counts.dropped[reason] += 1
            self._drops.count(kind)
            return False
        for one in self.filters:
            one.kept(task)
        self.counts.kept += 1
        self.counts.thought += bool(task.thinking)
        self.counts.variants.update([task.variant] if task.variant else [])
        return True

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
        # All ranks know all calls of a round; only the first one writes.
        if PartialState().is_main_process:
            append_lines(self.settings.folder / name, lines)

    def _take_up(self) -> None:
        """Replay the rounds that an earlier run recorded, and delete an incomplete last round.

        Rows are filtered again, so that `target` may change between runs.  Raises DataError if the
        recorded calls do not fit the settings of this run.
        """
        PartialState().wait_for_everyone()
        recorded = list(read_whole_lines(self.settings.folder / "calls.jsonl"))
        whole: list[Any] = []
        numbers = self._numbers()
        # `_next_call` only counts here; it starts again from 0 for the replay below.
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
        PartialState().wait_for_everyone()  # every rank has read before the first one writes
        if PartialState().is_main_process:
            drop_half_line(self.settings.folder / "calls.jsonl")
            drop_half_line(self.settings.folder / "log.jsonl")
            replace_lines(self.settings.folder / "calls.jsonl", whole)
            # The replay below writes all rows again, so rows.jsonl may be damaged or missing.
            replace_lines(self.settings.folder / "rows.jsonl", [])
        said = {line["call"]: line["replies"] for line in whole}
        while self._next_call < len(said) and not self._is_done():
            made = exchange(self.generator, Recorded(said), self._numbers(), self._kept)
            for one in made:
                _check_same(self.settings, whole[one.call], one)
            self._keep(made)


def _row(settings: Settings, made: Made, place: int, task: Task) -> dict[str, Any]:
    """Return the row of a task; fields that few rows have are left out where they are empty."""
    return {
        "id": f"{made.call}-{place}",
        "instruction": task.instruction,
        "input": task.input,
        "output": task.output,
        **({} if settings.images is None else {settings.images: list(task.images)}),
        **({"thinking": task.thinking} if task.thinking else {}),
        **({"context": list(task.context)} if task.context else {}),
        "variant": task.variant,
        **settings.about,
        "prompt_hash": made.prompt_hash,
    }


class DropWatch:
    """Warns once about each filter that drops more than half of the tasks of a round."""

    def __init__(self) -> None:
        self.dropped: Counter[str] = Counter()
        self.warned: set[str] = set()

    def count(self, kind: str) -> None:
        """Count a task that the filter of this name dropped; "" is no filter of the recipe."""
        self.dropped[kind] += bool(kind)

    def end_round(self, tasks: int) -> None:
        """Look at the drops of a round with this many tasks."""
        for kind, dropped in self.dropped.items():
            if dropped > tasks / 2 and kind not in self.warned:
                self.warned.add(kind)
                logger.warning(
                    "the filter '%s' dropped %d of %d tasks of a round. Change its options in "
                    "'filters', or leave it out there.", kind, dropped, tasks,
                )  # fmt: skip
        self.dropped.clear()


def _check_same(settings: Settings, recorded: Mapping[str, Any], made: Made) -> None:
    """Raise DataError unless a recorded call has the same requests and teacher revision now."""
    where = settings.folder / "calls.jsonl"
    if recorded["prompt_hash"] != made.prompt_hash:
        raise DataError(
            f"call {made.call} would now send a different request than the one recorded in "
            f"{where}: the prompts, the seed or the version of llmdistill changed. Restore "
            "them, or choose another folder."
        )
    revision = settings.about.get("revision")
    if recorded["revision"] != revision:
        raise DataError(
            f"call {made.call} in {where} was recorded with the teacher's revision "
            f"'{recorded['revision']}', but the teacher is now at '{revision}'. Set "
            "teacher.revision to the recorded one, or choose another folder."
        )


class Recorded:
    """Responder that returns recorded replies: `said[call][stage][place]`."""

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
    """Run the calls with these numbers in parallel, and return them in order.

    All calls advance one stage at a time, so that the requests of a stage are written as batches.
    `machine` are the tasks that were kept before.
    """
    calls = {number: generator.call(number, machine) for number in numbers}
    asking: dict[int, list[Request]] = {}
    said: dict[int, list[list[Reply]]] = {number: [] for number in numbers}
    asked_text: dict[int, list[str]] = {number: [] for number in numbers}
    done: dict[int, Parsed] = {}

    def go_on(number: int, replies: list[Reply] | None) -> None:
        # A call is a Python generator: it yields requests, and returns its tasks at the end.
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
        for number, requests in list(asking.items()):  # a copy: `go_on` changes `asking`
            asked_text[number] += map(repr, requests)
            said[number].append([next(replies) for _ in requests])
            go_on(number, said[number][-1])
    return [
        Made(number, done[number], _hash("\n".join(asked_text[number])), said[number])
        for number in numbers
    ]


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
