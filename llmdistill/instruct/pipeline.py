"""Make calls to a generator until enough rows are kept.  A run can be killed at any point.

    calls.jsonl    the teacher's replies, one line per call: all that cannot be computed again
    rows.jsonl     the rows that were kept, one per line
    log.jsonl      times, speed and counts of each round: the only file that depends on the clock

Calls are made in rounds of a fixed size, and the requests of a round depend only on earlier rounds.
The rows are therefore the same however often a run was stopped, and on any number of ranks up to
the rounding of the teacher.  No recorded reply is asked for again (`replies.py`).
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object

from llmdistill.errors import DataError, TeacherError
from llmdistill.instruct.exchange import Made, exchange
from llmdistill.instruct.filters import Filter
from llmdistill.instruct.generators.base import TaskGenerator
from llmdistill.instruct.parse import UNPARSABLE
from llmdistill.instruct.records import append_lines, drop_half_line, replace_lines
from llmdistill.instruct.replies import NotRecorded, Remembering, Replies
from llmdistill.instruct.responders import RemoteResponder, Responder, Several
from llmdistill.instruct.sieve import Sieve, TaskCounts
from llmdistill.instruct.tasks import Task

logger = logging.getLogger("llmdistill")

SHOWN_CHARACTERS = 500  # of a reply that cannot be read
BARREN_ROUNDS = 20  # rounds without a kept row after which an endless generator is stopped


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
                "source with at least one row. (A generator of your own must make a call.)"
            )
        self.generator, self.settings = generator, settings
        self.replies = Replies(settings.folder, settings.about.get("revision"))
        self.responder = Remembering(responder, self.replies)
        if isinstance(responder, RemoteResponder | Several):
            responder.heard = self.replies.heard
        self._sieve = Sieve(filters)
        self.counts = self._sieve.counts
        self._kept: list[Task] = []
        self._next_call = 0
        self._is_answered = self._is_read = False

    def run(
        self, progress: Callable[[TaskCounts, float], None] = lambda counts, seconds: None
    ) -> None:
        """Make rounds until the target is reached or the generator has no more calls.

        `progress` is called after each round with its seconds, and with 0 seconds for the rows of
        an earlier run.  Raises DataError if recorded calls do not fit this run, if no reply of the
        first round can be read, or if an endless generator keeps no more rows; TeacherError if the
        teacher refuses everything.
        """
        self._take_up()
        barren, has_replayed = 0, True
        while not self._is_done():
            if self._replay():
                has_replayed = True
                continue
            if has_replayed:
                progress(self.counts, 0.0)
                has_replayed = False
            start, before = time.perf_counter(), self.counts.kept
            made = self._round(self._numbers())
            self._check_answered(made)
            # Replies are recorded before rows: rows can be derived from replies, not vice versa.
            self._record(made)
            if not self._is_read:
                _require_tasks(made)
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
        if has_replayed:
            progress(self.counts, 0.0)

    def _check_answered(self, made: Sequence[Made]) -> None:
        """Raise TeacherError if the teacher has refused everything: in this run, or in a round.

        The round is not recorded, so that a resumed run asks again after the cause was fixed.
        """
        replies = [reply for one in made for stage in one.replies for reply in stage]
        refused = Counter(reply.refused for reply in replies)
        # A call may make no request at all (a row without an answer to rewrite): no refusal.
        self._is_answered |= refused[""] > 0 or not replies
        asking = [one for one in made if one.replies]
        is_down = (
            asking
            and all(one.is_refused for one in asking)
            and any(one.is_refused_by_server for one in asking)
        )
        # The last rows of a file are fewer than a round, and may well be refused for their content.
        if self._is_answered and not (is_down and len(asking) >= self.settings.round_size):
            return
        reasons = {reason: number for reason, number in refused.items() if reason}
        raise TeacherError(
            f"the teacher answered none of {sum(reasons.values())} requests: {reasons}. Fix the "
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

    def _replay(self) -> bool:
        """Make the next round from recorded replies alone, and return whether that was possible."""
        try:
            made = exchange(self.generator, self.replies, self._numbers(), self._kept)
        except NotRecorded:
            made = []
        # Either all ranks replay the round, or all make it.
        if not all(gather_object([bool(made)]) if PartialState().num_processes > 1 else [made]):
            return False
        self._record(made)
        self._keep(made)
        return True

    def _keep(self, made: Sequence[Made]) -> None:
        """Filter the tasks of a round, and append the kept ones to rows.jsonl."""
        rows, before = [], list(self._kept)
        for call in made:
            self._is_answered |= any(not r.refused for stage in call.replies for r in stage)
            self._is_read |= bool(call.parsed.tasks)
            # Tasks beyond the target are neither kept nor counted, so the counts add up.
            if self._is_met():
                continue
            self.counts.dropped.update(call.parsed.dropped)
            for place, task in enumerate(call.parsed.tasks):
                if not self._is_met() and self._sieve.passes(task):
                    rows.append(_row(self.settings, call, place, task) | self._sieve.keep(task))
                    before.append(task)
        self._kept = before
        self._next_call = made[-1].call + 1 if made else self._next_call
        self._append("rows.jsonl", rows)
        self._sieve.end_round(sum(len(call.parsed.tasks) for call in made))

    # ---- files ----

    def _record(self, made: Sequence[Made]) -> None:
        """Append the calls of a round to calls.jsonl, except those that it has already."""
        found = [
            self.replies.add_call(
                m.call,
                {
                    "prompt_hash": m.prompt_hash,
                    "asked": m.asked,
                    "replies": [[asdict(r) for r in stage] for stage in m.replies],
                },
            )
            for m in made
        ]
        self._append("calls.jsonl", [line for line in found if line is not None])

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
        """Read what an earlier run recorded.  Its rounds are replayed, and its rows made again.

        Rows are filtered again, so that `target` and the filters may change between runs.
        """
        PartialState().wait_for_everyone()
        self.replies.read()
        self.replies.settle(self.generator)
        if self.replies:
            logger.info("%d replies are recorded, and are not asked for again", len(self.replies))
        PartialState().wait_for_everyone()  # every rank has read before the first one writes
        if PartialState().is_main_process:
            drop_half_line(self.settings.folder / "calls.jsonl")
            drop_half_line(self.settings.folder / "log.jsonl")
            replace_lines(self.settings.folder / "rows.jsonl", [])


def _require_tasks(made: Sequence[Made]) -> None:
    """Raise DataError if no task could be read from the replies of a round."""
    dropped = sum((Counter(one.parsed.dropped) for one in made), Counter[str]())
    if any(one.parsed.tasks for one in made) or not dropped[UNPARSABLE]:
        return
    shown = next(one.replies for one in made if one.parsed.dropped.get(UNPARSABLE))[0][0].text
    raise DataError(
        f"no task could be read from {len(made)} calls: {dict(dropped)}. A reply begins with "
        f"{shown[:SHOWN_CHARACTERS]!r}. Try a larger teacher, a smaller "
        "'generator.tasks_per_call' or the generator 'magpie'; to make another round, pass "
        "resume."
    )


def _row(settings: Settings, made: Made, place: int, task: Task) -> dict[str, Any]:
    """Return the row of a task; fields that few rows have are left out where they are empty."""
    return {
        "id": f"{made.call}-{place}",
        "instruction": task.instruction,
        "input": task.input,
        "output": task.output,
        **({} if settings.images is None else {settings.images: list(task.images)}),
        **({"thinking": task.thinking} if task.thinking else {}),
        **({"context": list(before)} if (before := task.messages_before) else {}),
        **({} if task.rejected is None else {"rejected": task.rejected}),
        **{f"score_{aspect}": score for aspect, score in task.scores.items()},
        "variant": task.variant,
        **settings.about,
        "prompt_hash": made.prompt_hash,
    }
