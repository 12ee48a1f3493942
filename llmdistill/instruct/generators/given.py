"""Generators for given prompts: the teacher answers them, or rewrites their answers."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from llmdistill.errors import DataError
from llmdistill.instruct import prompts
from llmdistill.instruct.filters import SameResult
from llmdistill.instruct.generators.base import Answering, Cost, TaskGenerator, answered
from llmdistill.instruct.judging import Judge
from llmdistill.instruct.parse import Parsed
from llmdistill.instruct.requests import Call, Request, user
from llmdistill.instruct.scorers import preference, rank
from llmdistill.instruct.tasks import Task
from llmdistill.sampling import GREEDY, Sampling

NO_SCORE = "no score of any sample"
NOT_THE_BEST, NO_PREFERENCE = "not the best sample", "no preference"
# Signs of a refusal, or of text about the task instead of an answer to it.
META = re.compile(
    r"\b(?:as an ai|language model|i(?:['\u2019]m| am) sorry|i (?:cannot|can['\u2019]t|am unable)"
    r"|(?:given|reference|provided|original|above) answer|answer above"
    r"|(?:in )?my own words|rewritten|rephrased?)\b",
    re.IGNORECASE,
)


class Answer(TaskGenerator):
    """The teacher answers given prompts, `samples` times each.

    All answers become rows, or, with `best_by` (a key of `SCORERS`), only the best one (best-of-n
    sampling).  With `pairs` the worst one becomes its rejected answer, for preference optimisation
    (Rafailov et al. 2023, DPO).  `judge` scores the answers for the scorer "judge".  Raises
    DataError if `best_by` is "reference" and a prompt has no answer.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        *,
        seed: int = 0,
        samples: int = 1,
        best_by: str | None = None,
        pairs: bool = False,
        answering: Answering = Answering(sampling=Sampling()),
        judge: Judge | None = None,
    ) -> None:
        self.tasks, self.samples, self.num_calls = tasks, samples, len(tasks)
        self.seed, self.best_by, self.pairs = seed, best_by, pairs
        seen: Counter[str] = Counter()
        self._names: list[str] = []  # of each prompt: its text, and which of its copies it is
        for task in tasks:
            seen[task.prompt] += 1
            self._names.append(f"{task.prompt}/{seen[task.prompt]}")
        self.judge = judge
        if best_by == "reference" and any(task.reference is None for task in tasks):
            raise DataError(
                "'generator.best_by: reference' compares replies with the answers in 'prompts', "
                "but some rows have no answer. Use 'likelihood' or 'consensus'."
            )
        self.answering = answering

    @property
    def at_most(self) -> Cost:
        kept = 1 if self.best_by else self.samples
        tokens = self.samples * self.answering.max_new_tokens
        if self.best_by != "judge" or self.judge is None:
            return Cost(kept, self.samples, tokens)
        tokens += self.samples * self.judge.max_new_tokens
        return Cost(kept, 2 * self.samples, tokens)

    def call(self, number: int, machine: Sequence[Task]) -> Call:
        # Equal requests at different places of a stage are drawn with different randomness.
        task = self.tasks[number]
        if not any(message["role"] == "system" for message in task.context):
            context = self.answering.context(self.seed, self._names[number])
            task = replace(task, context=(*context, *task.context))
        made = yield from answered([task] * self.samples, self.answering)
        if self.best_by is None or not made.tasks:
            return made
        tasks = made.tasks
        if self.best_by == "judge":
            judge = self.judge or Judge()
            tasks = yield from judge.scored(tasks, ["quality"])
        ranked = rank(tasks, self.best_by)
        if ranked[0].score == -math.inf:
            return Parsed([], Counter(made.dropped) + Counter({NO_SCORE: len(tasks)}))
        # Counted as dropped, so that the counts of kept and dropped tasks add up to all tasks.
        if not self.pairs:
            others = Counter({NOT_THE_BEST: len(tasks) - 1})
            return Parsed([ranked[0].task], Counter(made.dropped) + others)
        pair = preference(ranked)
        reason = NO_PREFERENCE if pair is None else NOT_THE_BEST
        others = Counter({reason: len(tasks) - (pair is not None)})
        return Parsed([pair] if pair else [], Counter(made.dropped) + others)


class Rewrite(TaskGenerator):
    """The teacher rewrites given answers in its own words (Yang et al. 2024, SDFT).

    The given answer becomes the reference of the row.  It also stays the answer if the new one is
    truncated, empty or unchanged, refuses or talks about the task, or if its result differs, as
    found by the pattern `result`.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        *,
        result: str | None = None,
        sampling: Sampling = GREEDY,
        max_new_tokens: int = 512,
    ) -> None:
        self.tasks, self.num_calls = tasks, len(tasks)
        self.same_result = None if result is None else SameResult(result)
        self.sampling, self.max_new_tokens = sampling, max_new_tokens

    @property
    def at_most(self) -> Cost:
        return Cost(1, 1, self.max_new_tokens)

    def call(self, number: int, machine: Sequence[Task]) -> Call:
        task = self.tasks[number]
        if not task.output:
            return Parsed([], {"no answer to rewrite": 1})
        asked = user(prompts.rewritten(task))
        (reply,) = yield [Request(asked, self.sampling, self.max_new_tokens)]
        made = replace(
            task,
            output=reply.text.strip(),
            reference=task.output,
            log_prob=reply.log_prob,
            thinking=reply.thinking,
            variant="rewritten",
        )
        # Without a usable answer, the row keeps the given one and is not lost.
        if reply.refused or reply.truncated or not self._stands(made, task.output.strip()):
            made = replace(task, reference=task.output, variant="original")
        return Parsed([made])

    def _stands(self, made: Task, given: str) -> bool:
        """Whether a rewritten answer may replace the given one."""
        same = self.same_result is None or self.same_result.reason(made) is None
        return made.output not in ("", given) and same and not META.search(made.output)
