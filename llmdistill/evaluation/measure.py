"""How close, how good, how fast: the figures of `evaluation.json`.

A reference is made once: the teacher's greedy answers to the evaluation prompts.  Each model is
then measured against it with the same prompts, lengths and random draws.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from llmdistill.batch import Draw, Prompts, Sampling, Sequences, Writer
from llmdistill.decoding.sample import sample
from llmdistill.evaluation.agreement import Judged, agreement, judge
from llmdistill.evaluation.text import repeated_ngrams, rouge_l
from llmdistill.models.heads import eval_mode
from llmdistill.models.vocabulary import num_tokens
from llmdistill.teachers.local import LocalTeacher

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TIMED_ROWS = 8  # tokens per second are those of this many rows in one batch
BATCH_SIZE = 32  # of the rest
GREEDY = Sampling(temperature=0)


@dataclass(frozen=True)
class Figures:
    """One model's figures; README.md says what each one means."""

    kl_teacher_text: float
    kl_own_text: float
    top1_agreement: float
    draft_acceptance: float
    rouge_l_teacher: float
    repeated_4grams: float
    num_parameters: int
    tokens_per_second: float


@dataclass(frozen=True)
class Written:
    """Greedy answers of one model, as sequences and as text, and how fast they came."""

    batches: list[Sequences]
    texts: list[str]
    tokens_per_second: float


class Evaluation:
    """Measures models against one teacher on one set of prompts."""

    def __init__(
        self, teacher: LocalTeacher, prompts: Prompts, *, max_new_tokens: int, seed: int
    ) -> None:
        self.teacher = teacher
        self.prompts = prompts
        self.max_new_tokens = max_new_tokens
        self.seed = seed
        self.reference = self.greedy(teacher.model)
        self._judged = judge(teacher, self.reference.batches)

    def measure_teacher(self) -> Figures:
        """The teacher against itself: what its own text looks like, and its speed."""
        return self._figures(self.teacher.model, self.reference, self._judged)

    def measure(self, model: PreTrainedModel) -> tuple[Figures, list[str]]:
        """A model's figures and its greedy answers."""
        written = self.greedy(model)
        own = self._write(model, Sampling(), range(len(self.prompts)))
        return self._figures(model, written, judge(self.teacher, own)), written.texts

    def greedy(self, model: PreTrainedModel) -> Written:
        start = time.perf_counter()
        timed = self._write(model, GREEDY, range(min(TIMED_ROWS, len(self.prompts))))
        seconds = time.perf_counter() - start
        count = sum(int(batch.num_predicted.sum()) for batch in timed)
        batches = timed + self._write(model, GREEDY, range(TIMED_ROWS, len(self.prompts)))
        texts = [
            self.teacher.tokenizer.decode(ids, skip_special_tokens=True)
            for batch in batches
            for ids in batch.responses()
        ]
        return Written(batches, texts, count / seconds)

    def _figures(self, model: PreTrainedModel, written: Written, own: list[Judged]) -> Figures:
        shared = num_tokens(self.teacher.tokenizer)
        with eval_mode(model):
            on_teacher = agreement(model, self._judged, shared)
            on_own = agreement(model, own, shared)
        return Figures(
            kl_teacher_text=on_teacher.forward_kl,
            kl_own_text=on_own.forward_kl,
            top1_agreement=on_teacher.top1,
            draft_acceptance=on_teacher.acceptance,
            rouge_l_teacher=rouge_l(written.texts, self.reference.texts),
            repeated_4grams=repeated_ngrams(written.texts, 4),
            num_parameters=sum(p.numel() for p in model.parameters()),
            tokens_per_second=written.tokens_per_second,
        )

    def _write(self, model: PreTrainedModel, sampling: Sampling, rows: range) -> list[Sequences]:
        """The model's answers to these prompts, in batches."""
        device = next(model.parameters()).device
        with torch.autocast(device.type, enabled=False):
            return [
                sample(
                    model,
                    self.teacher.tokenizer,
                    self.prompts.select(rows[start : start + BATCH_SIZE], pad_id=0),
                    sampling,
                    max_new_tokens=self.max_new_tokens,
                    draw=Draw(self.seed),
                    writer=Writer.TEACHER if model is self.teacher.model else Writer.STUDENT,
                )
                for start in range(0, len(rows), BATCH_SIZE)
            ]
