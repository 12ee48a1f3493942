"""Acceptance rules: which drafted tokens stay, and which ones the teacher replaces.

B = sequences, N = predicted tokens, A = active rows, G = drafted tokens, V = vocabulary, S = slots
of a response.  A rule is called once for each block and decides about each drafted token
separately.  The rollout then cuts each row at its first refusal.  To add a rule, write a dataclass
that inherits from `Accept` here and put its name into ACCEPT.  Recipes then accept its fields as
options, within the limits that BOUNDS gives.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import ClassVar

import torch
from torch import Tensor

from llmdistill.decoding.keyed import coin, log_prob
from llmdistill.errors import RecipeError
from llmdistill.objectives.divergences import forward_kl
from llmdistill.recipe.options import wrong_option
from llmdistill.sampling import Sampling


@dataclass(frozen=True)
class Block:
    """A block of drafted tokens with the logits of both models."""

    draft_AG: Tensor
    """Ids of the drafted tokens."""
    rows_A: Tensor
    """Indices of the rows in the batch."""
    slots_AG: Tensor
    """Positions of the tokens in their responses, counted from 0."""
    keys_A: Tensor
    """Keys of the rule's own randomness, one for each row."""
    teacher_AGV: Tensor
    """The teacher's raw logits, without temperature, top-k or top-p."""
    student_AGV: Tensor | None
    """The student's raw logits; None unless the rule sets `sees_student`."""


class Accept(ABC):
    """An acceptance rule."""

    sees_student: ClassVar[bool] = False
    """Whether the rule needs the student's logits."""

    @abstractmethod
    def __call__(self, block: Block) -> Tensor:
        """Return a mask that is True at drafted tokens that may stay: (A, G), bool."""

    def start(self, num_rows: int, num_slots: int, device: torch.device) -> Accept:
        """Return the rule for one batch of `num_rows` responses of at most `num_slots` tokens.

        A rule without state returns itself.
        """
        return self

    def log_prob(
        self, block: Block, tokens_AG: Tensor, teacher: Sampling, student: Sampling
    ) -> Tensor | None:
        """Return the log-probability with which each token was written: (A, G), in nats.

        `tokens_AG` are the drafted tokens after the replacement; `teacher` and `student` are the
        sampling settings of the two models.  The default is None: the rule does not know it.
        """
        return None


@dataclass(frozen=True)
class TopK(Accept):
    """Keep a drafted token if it is among the teacher's `top_k` likeliest tokens.

    Xu et al. 2025 (SKD), algorithm 1.  The rank is that of the raw logits, before temperature,
    top-k or top-p of a sampler.

    `top_k`, 0 or more, is the number of tokens.  0 refuses every draft, so the teacher writes
    everything.  The size of the vocabulary refuses none, so the student writes everything.
    """

    top_k: int = 25

    def __call__(self, block: Block) -> Tensor:
        return likelier(block.teacher_AGV, block.draft_AG).sum(-1) < self.top_k


@dataclass(frozen=True)
class TopP(Accept):
    """Keep a drafted token if it is in the teacher's nucleus of mass `top_p` at temperature 1.

    A token stays if the tokens that the teacher finds likelier have a total probability below
    `top_p`.

    `top_p`, 0 to 1, is the mass of the nucleus.  0 refuses every draft.
    """

    top_p: float = 0.95

    def __call__(self, block: Block) -> Tensor:
        before_AGV = likelier(block.teacher_AGV, block.draft_AG)
        return (block.teacher_AGV.softmax(-1) * before_AGV).sum(-1) < self.top_p


@dataclass(frozen=True)
class Mixture(Accept):
    """Give each position to the teacher with probability `teacher_share`, whatever the draft is.

    A token is then a sample of alpha p + (1 - alpha) q, with alpha = `teacher_share` and the
    probabilities p of the teacher and q of the student after their samplers' temperature, top-k and
    top-p.  The probability is kept in `Sequences.writer_logprob_BT`, for importance weights.  Gu et
    al. 2024 (MiniLLM), teacher-mixed sampling, where alpha = 0.2.

    `teacher_share`, 0 to 1, is that probability.
    """

    teacher_share: float = 0.2
    sees_student: ClassVar[bool] = True

    def __call__(self, block: Block) -> Tensor:
        # A coin depends on row and position alone, so it is the same for every block size.
        keys_N = block.keys_A.repeat_interleave(block.slots_AG.shape[1])
        coins_AG = coin(keys_N, block.slots_AG.flatten()).reshape(block.slots_AG.shape)
        return coins_AG >= self.teacher_share

    def log_prob(
        self, block: Block, tokens_AG: Tensor, teacher: Sampling, student: Sampling
    ) -> Tensor:
        """Return the log-probability of each token under the mixture: (A, G), in nats."""
        assert block.student_AGV is not None
        token_N = tokens_AG.flatten()
        share = torch.full((), self.teacher_share, device=token_N.device)
        # Every token has the mixture's probability, whichever of the two models drew it.
        mixed_N = torch.logaddexp(
            share.log() + log_prob(block.teacher_AGV.flatten(0, 1), teacher, token_N),
            (1 - share).log() + log_prob(block.student_AGV.flatten(0, 1), student, token_N),
        )
        return mixed_N.reshape(tokens_AG.shape)


@dataclass(frozen=True)
class Switch(Accept):
    """Let the student write until its divergence from the teacher jumps, then only the teacher.

    The jump is the first position at which KL(teacher || student) is above `factor` times its mean
    over the `window` positions before it.  Peng et al. 2025 (AdaSwitch), section 3.  The defaults,
    3 and 10, are our reading of the paper.

    `factor`, 0 or more, is the size of a jump.  `window`, 1 or more, is the number of positions of
    the mean.  No jump is found in the first `window` positions.
    """

    factor: float = 3.0
    window: int = 10
    sees_student: ClassVar[bool] = True

    def __call__(self, block: Block) -> Tensor:
        raise TypeError("Switch keeps state for each row. Call the rule that `start` returns.")

    def start(self, num_rows: int, num_slots: int, device: torch.device) -> Accept:
        """Return a rule that remembers the divergences and switches of this batch."""
        return _Switching(self, num_rows, num_slots, device)


class _Switching(Accept):
    """`Switch` for one batch, with the divergences so far and the rows that have switched."""

    sees_student = True

    def __init__(self, switch: Switch, num_rows: int, num_slots: int, device: torch.device) -> None:
        self.factor, self.window = switch.factor, switch.window
        self.divergence_BS = torch.zeros(num_rows, num_slots, dtype=torch.float64, device=device)
        self.switched_B = torch.zeros(num_rows, dtype=torch.bool, device=device)

    def __call__(self, block: Block) -> Tensor:
        assert block.student_AGV is not None
        found_AG = forward_kl(block.student_AGV, block.teacher_AGV).double()
        # A block can be longer than the room of a row.  Tokens beyond it are never kept, so they
        # may share the last slot.
        slots_AG = block.slots_AG.clamp_max(self.divergence_BS.shape[1] - 1)
        known_AS = self.divergence_BS[block.rows_A].scatter(1, slots_AG, found_AG)
        self.divergence_BS[block.rows_A] = known_AS
        # A window's sum is the difference of two cumulative sums, so they are kept in float64.
        before_AS = known_AS.cumsum(1) - known_AS
        start_AG = (slots_AG - self.window).clamp_min(0)
        mean_AG = (before_AS.gather(1, slots_AG) - before_AS.gather(1, start_AG)) / self.window
        jumps_AG = (found_AG > self.factor * mean_AG) & (slots_AG >= self.window)
        accept_AG = ~(self.switched_B[block.rows_A, None] | jumps_AG)
        # The first refusal of a row is its first jump, so a row has switched even if the tokens
        # after that are dropped.
        self.switched_B[block.rows_A] |= jumps_AG.any(1)
        return accept_AG


def likelier(logits_AGV: Tensor, tokens_AG: Tensor) -> Tensor:
    """Return a mask, True at the ids that rank before each token: (A, G, V).

    Ids with equal logits rank in ascending order.
    """
    own_AG1 = logits_AGV.gather(-1, tokens_AG[..., None])
    ids_V = torch.arange(logits_AGV.shape[-1], device=logits_AGV.device)
    ties_AGV = (logits_AGV == own_AG1) & (ids_V < tokens_AG[..., None])
    return (logits_AGV > own_AG1) | ties_AGV


@dataclass(frozen=True)
class Rule(Accept):
    """A plain function of a Block as a rule, with the logits of both models."""

    function: Callable[[Block], Tensor]
    sees_student: ClassVar[bool] = True

    def __call__(self, block: Block) -> Tensor:
        return self.function(block)


# Recipes read the names with `ast`, so the table must stay a dict literal.
ACCEPT: dict[str, type[Accept]] = {
    "top_k": TopK,
    "top_p": TopP,
    "mixture": Mixture,
    "switch": Switch,
}
# (lowest, highest) value of an option, None for no bound.
BOUNDS: dict[tuple[str, str], tuple[float | None, float | None]] = {
    ("top_k", "top_k"): (0, None),
    ("top_p", "top_p"): (0.0, 1.0),
    ("mixture", "teacher_share"): (0.0, 1.0),
    ("switch", "factor"): (0.0, None),
    ("switch", "window"): (1, None),
}


def acceptance(given: str | Accept | Callable[[Block], Tensor], **options: float) -> Accept:
    """Return a rule, given as a name in ACCEPT, a rule, or a plain function of a Block.

    `options` are the fields of a named rule.  Raises RecipeError if a name or an option is unknown,
    or if a value is out of bounds.
    """
    if not isinstance(given, str):
        return given if isinstance(given, Accept) else Rule(given)
    if given not in ACCEPT:
        raise RecipeError(
            f"unknown accept '{given}'. Use one of {', '.join(ACCEPT)}, or pass a function."
        )
    known = [field.name for field in fields(ACCEPT[given])]  # type: ignore[arg-type]
    if wrong := wrong_option("accept", given, options, known, BOUNDS):
        raise RecipeError(f"rollout: {wrong}")
    return ACCEPT[given](**options)
