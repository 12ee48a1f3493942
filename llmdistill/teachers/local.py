"""A teacher on this machine: frozen, in eval mode, in its own dtype and on its own device."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import torch

from llmdistill.batch import Prompts, Sequences, TeacherSignal
from llmdistill.decoding.sample import sample
from llmdistill.decoding.session import Session, session
from llmdistill.forward import final_hidden
from llmdistill.models.heads import check_split, split
from llmdistill.protocols import Need
from llmdistill.sampling import Draw, Sampling, Writer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class LocalTeacher:
    """A causal LM of transformers that judges and writes.  Its parameters are frozen here.

    Raises ModelError if the model cannot be split into backbone and head.
    """

    provides = frozenset({Need.DISTRIBUTION})

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        check_split(model)
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @contextlib.contextmanager
    def in_use(self) -> Iterator[PreTrainedModel]:
        """The model as it judges and writes: in its own dtype, whatever the student's products
        are in.
        """
        with torch.autocast(self.device.type, enabled=False):
            yield self.model

    @torch.no_grad()
    def judge(self, sequences: Sequences, needs: frozenset[Need]) -> TeacherSignal:
        """One forward pass: the final hidden states at the places that predict, and the head."""
        with self.in_use() as model:
            backbone, head = split(model)
            return TeacherSignal(final_hidden(backbone, sequences.to(self.device)), head)

    def write(
        self,
        prompts: Prompts,
        sampling: Sampling,
        *,
        max_new_tokens: int,
        draw: Draw,
        stop: str = "",
    ) -> Sequences:
        """The teacher's own answers, judged while they are written; one that holds `stop` ends."""
        with self.in_use() as model:
            return sample(
                model,
                self.tokenizer,
                prompts,
                sampling,
                max_new_tokens=max_new_tokens,
                draw=draw,
                writer=Writer.TEACHER,
                keep_states=True,
                stop=stop,
            )

    def session(self, prompts: Prompts) -> AbstractContextManager[Session]:
        """The teacher as something that can be stepped: for interleaved writing."""
        return session(self.model, self.tokenizer, prompts, within=self.in_use)
