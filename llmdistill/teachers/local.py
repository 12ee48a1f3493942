"""A teacher on this machine: frozen, in eval mode, in its own dtype and on its own device.

H = hidden size, N = predicted tokens.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import torch

from llmdistill.batch import Prompts, Sequences, TeacherSignal
from llmdistill.decoding.sample import sample
from llmdistill.decoding.session import Session, session
from llmdistill.distributions import Dense
from llmdistill.errors import VocabularyError
from llmdistill.forward import read
from llmdistill.models.heads import check_split, num_rows
from llmdistill.models.taps import Need
from llmdistill.models.vocabulary import end_ids, num_tokens
from llmdistill.sampling import Draw, Sampling, Writer

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


class LocalTeacher:
    """A causal LM of transformers that judges and writes.  Its parameters are frozen here.

    Raises ModelError if the model cannot be split into backbone and head, and VocabularyError if
    the tokenizer has more ids than the head scores.
    """

    provides = frozenset({Need.DISTRIBUTION, Need.HIDDEN, Need.QUERIES, Need.KEYS, Need.VALUES})

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self._take(model, tokenizer)
        model.eval().requires_grad_(False)

    def _take(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        check_split(model)
        self.model, self.tokenizer = model, tokenizer
        self.num_tokens = num_tokens(tokenizer)
        if self.num_tokens > num_rows(model):
            raise VocabularyError(
                f"the teacher's tokenizer '{tokenizer.name_or_path}' has {self.num_tokens} ids, "
                f"but the model's head scores only {num_rows(model)}. Use the tokenizer that "
                "belongs to the model."
            )

    @property
    def config(self) -> PreTrainedConfig:
        """The sizes of the model that hidden states come from."""
        return self.model.config.get_text_config()

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def ends(self) -> frozenset[int]:
        """The ids that end what it writes."""
        return end_ids(self.model, self.tokenizer)

    @contextlib.contextmanager
    def in_use(self) -> Iterator[PreTrainedModel]:
        """The model as it judges and writes: in its own dtype, whatever the student's products
        are in.
        """
        with torch.autocast(self.device.type, enabled=False):
            yield self.model

    @torch.no_grad()
    def judge(self, sequences: Sequences, needs: frozenset[Need]) -> TeacherSignal:
        """One forward pass, which takes just what is needed."""
        with self.in_use() as model:
            seen = read(model, sequences.to(self.device), self.num_tokens, needs)
        dense = Dense(seen.hidden_NH, seen.head) if Need.DISTRIBUTION in needs else None
        return TeacherSignal(dense, seen.states)

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
