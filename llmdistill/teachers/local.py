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
from llmdistill.models.kernels import AUTO
from llmdistill.models.load import load_model, load_tokenizer
from llmdistill.models.placement import at_hand
from llmdistill.models.taps import Need
from llmdistill.models.vocabulary import end_ids, num_tokens
from llmdistill.sampling import Draw, Sampling, Writer

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


class LocalTeacher:
    """A frozen causal LM of transformers on this machine, which scores tokens and can write.

    The model is put in eval mode and its parameters are frozen.  It keeps its own dtype and device.

    Args:
        model: A causal LM of transformers.
        tokenizer: The tokenizer of the model, with the student's vocabulary.

    Raises:
        ModelError: If the model cannot be split into backbone and head.
        VocabularyError: If the tokenizer has more ids than the model's head scores.
    """

    provides = frozenset({Need.DISTRIBUTION, Need.HIDDEN, Need.QUERIES, Need.KEYS, Need.VALUES})
    reads_changes = True

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self._take(model, tokenizer)
        model.eval().requires_grad_(False)

    @classmethod
    def load(
        cls,
        name: str,
        *,
        revision: str | None = None,
        dtype: str = "auto",
        device: str | torch.device | None = None,
        quantization: str | None = None,
        placement: str = "whole",
        attn_implementation: str = AUTO,
    ) -> LocalTeacher:
        """Load a model and its tokenizer as a teacher.

        The arguments are those of `load_model`.  Raises ModelError if the model cannot be loaded.
        """
        model = load_model(
            name,
            revision=revision,
            dtype=dtype,
            device=device,
            quantization=quantization,
            placement=placement,
            attn_implementation=attn_implementation,
        )
        return cls(model, load_tokenizer(name, revision=revision))

    def _take(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model, self.tokenizer = model, tokenizer
        with at_hand(model):
            # A family whose head works differently is found here, not by a wrong loss.
            check_split(model)
        self.num_tokens = num_tokens(tokenizer)
        if self.num_tokens > num_rows(model):
            raise VocabularyError(
                f"the teacher's tokenizer '{tokenizer.name_or_path}' has {self.num_tokens} ids, "
                f"but the model's head scores only {num_rows(model)}. Use the tokenizer that "
                "belongs to the model."
            )

    @property
    def config(self) -> PreTrainedConfig:
        """The text configuration of the model, with the sizes of its hidden states."""
        return self.model.config.get_text_config()

    @property
    def device(self) -> torch.device:
        """The device of the model's first parameter."""
        return next(self.model.parameters()).device

    @property
    def ends(self) -> frozenset[int]:
        """The token ids that end a response of this teacher."""
        return end_ids(self.model, self.tokenizer)

    @contextlib.contextmanager
    def in_use(self) -> Iterator[PreTrainedModel]:
        """Give the model with all of its layers at hand, in its own dtype.

        Autocast is for the student and is off here.
        """
        with at_hand(self.model), torch.autocast(self.device.type, enabled=False):
            yield self.model

    @torch.no_grad()
    def judge(self, sequences: Sequences, needs: frozenset[Need]) -> TeacherSignal:
        """Score the predicted tokens with one forward pass, which keeps only what is needed."""
        return self.score(sequences, needs)

    def score(self, sequences: Sequences, needs: frozenset[Need]) -> TeacherSignal:
        """Do the same as `judge`, with gradients if they are on."""
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
        """Write one response to each prompt, and return its states as `signal`.

        Args:
            prompts: The prompts of B rows.
            sampling: How tokens are drawn.
            max_new_tokens: The longest response, in tokens.
            draw: The key of all randomness.
            stop: A text that ends a response soon after it appears; "" for none.

        Returns:
            Prompts and responses on the CPU.  With continuous sampling there is no signal.
        """
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
        """Open a session of the teacher on these prompts, for interleaved rollouts."""
        return session(self.model, self.tokenizer, prompts, within=self.in_use)
