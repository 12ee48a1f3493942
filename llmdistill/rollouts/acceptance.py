"""Which drafted tokens stay: the rules by which a teacher takes or replaces what a student drafts.

B = sequences, N = predicted tokens, A = active rows, G = drafted tokens, V = vocabulary, S = slots
of a response.  A rule is asked once for each block and decides about every drafted token by itself;
the writer cuts the block at the first refusal.  To add one: a class (or a function of a Block) here
and its name in ACCEPT; a recipe then takes its fields as options.
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
    """A draft and what both models say of it.

    `rows_A` are places in the batch, `slots_AG` places in the answer, `keys_A` key the rule's own
    randomness.  Logits are raw, not yet warped by a sampler; the student's are there for rules that
    see them.
    """

    draft_AG: Tensor
    rows_A: Tensor
    slots_AG: Tensor
    keys_A: Tensor
    teacher_AGV: Tensor
    student_AGV: Tensor | None


class Accept(ABC):
    """A rule.  Called, it says of each drafted token whether it stays: (A, G), bool."""

    sees_student: ClassVar[bool] = False

    @abstractmethod
    def __call__(self, block: Block) -> Tensor: ...

    def start(self, num_rows: int, num_slots: int, device: torch.device) -> Accept:
        """The rule for one batch, with what it has to remember of its rows."""
        return self

    def log_prob(
        self, block: Block, tokens_AG: Tensor, teacher: Sampling, student: Sampling
    ) -> Tensor | None:
        """The log-probability with which each token was written: (A, G), where it is kept."""
        return None


@dataclass(frozen=True)
class TopK(Accept):
    """Stays if it is among the teacher's `top_k` likeliest tokens.

    Xu et al. 2025 (SKD), algorithm 1.  The rank is that of the raw logits: a sampler's temperature
    does not move it, and nothing is cut away before.  0 refuses everything, the size of the
    vocabulary nothing.
    """

    top_k: int = 25

    def __call__(self, block: Block) -> Tensor:
        return likelier(block.teacher_AGV, block.draft_AG).sum(-1) < self.top_k


@dataclass(frozen=True)
class TopP(Accept):
    """Stays if it is in the teacher's nucleus of mass `top_p` at temperature 1."""

    top_p: float = 0.95

    def __call__(self, block: Block) -> Tensor:
        before_AGV = likelier(block.teacher_AGV, block.draft_AG)
        return (block.teacher_AGV.softmax(-1) * before_AGV).sum(-1) < self.top_p


@dataclass(frozen=True)
class Mixture(Accept):
    """A slot is the teacher's with probability `teacher_share`, whatever the draft is.

    Its token then follows alpha * p + (1 - alpha) * q, with p and q as their samplers warp them: Gu
    et al. 2024 (MiniLLM), teacher-mixed sampling, alpha = 0.2.  That probability is kept, for
    importance weights.
    """

    teacher_share: float = 0.2
    sees_student: ClassVar[bool] = True

    def __call__(self, block: Block) -> Tensor:
        keys_N = block.keys_A.repeat_interleave(block.slots_AG.shape[1])
        coins_AG = coin(keys_N, block.slots_AG.flatten()).reshape(block.slots_AG.shape)
        return coins_AG >= self.teacher_share

    def log_prob(
        self, block: Block, tokens_AG: Tensor, teacher: Sampling, student: Sampling
    ) -> Tensor:
        assert block.student_AGV is not None
        token_N = tokens_AG.flatten()
        share = torch.tensor(self.teacher_share, device=token_N.device)
        mixed_N = torch.logaddexp(
            share.log() + log_prob(block.teacher_AGV.flatten(0, 1), teacher, token_N),
            (1 - share).log() + log_prob(block.student_AGV.flatten(0, 1), student, token_N),
        )
        return mixed_N.reshape(tokens_AG.shape)


@dataclass(frozen=True)
class Switch(Accept):
    """The student writes until its divergence jumps; from there on the teacher does.

    The jump: KL(teacher || student) at a slot above `factor` times the mean of the `window` slots
    before it.  Peng et al. 2025 (AdaSwitch), section 3; 3 and 10 are our readings.
    """

    factor: float = 3.0
    window: int = 10
    sees_student: ClassVar[bool] = True

    def __call__(self, block: Block) -> Tensor:
        raise TypeError("Switch keeps state for each row. Call the rule that `start` returns.")

    def start(self, num_rows: int, num_slots: int, device: torch.device) -> Accept:
        return _Switching(self, num_rows, num_slots, device)


class _Switching(Accept):
    """`Switch` in one batch: the divergences so far, and the rows that have switched."""

    sees_student = True

    def __init__(self, switch: Switch, num_rows: int, num_slots: int, device: torch.device) -> None:
        self.factor, self.window = switch.factor, switch.window
        self.divergence_BS = torch.zeros(num_rows, num_slots, dtype=torch.float64, device=device)
        self.switched_B = torch.zeros(num_rows, dtype=torch.bool, device=device)

    def __call__(self, block: Block) -> Tensor:
        assert block.student_AGV is not None
        found_AG = forward_kl(block.student_AGV, block.teacher_AGV).double()
        slots_AG = block.slots_AG.clamp_max(self.divergence_BS.shape[1] - 1)  # beyond: not kept
        known_AS = self.divergence_BS[block.rows_A].scatter(1, slots_AG, found_AG)
        self.divergence_BS[block.rows_A] = known_AS
        before_AS = known_AS.cumsum(1) - known_AS
        start_AG = (slots_AG - self.window).clamp_min(0)
        mean_AG = (before_AS.gather(1, slots_AG) - before_AS.gather(1, start_AG)) / self.window
        jumps_AG = (found_AG > self.factor * mean_AG) & (slots_AG >= self.window)
        accept_AG = ~(self.switched_B[block.rows_A, None] | jumps_AG)
        self.switched_B[block.rows_A] |= jumps_AG.any(1)
        return accept_AG


def likelier(logits_AGV: Tensor, tokens_AG: Tensor) -> Tensor:
    """True for the ids that rank before each token; of equal ones the lower id does: (A, G, V)."""
    own_AG1 = logits_AGV.gather(-1, tokens_AG[..., None])
    ids_V = torch.arange(logits_AGV.shape[-1], device=logits_AGV.device)
    ties_AGV = (logits_AGV == own_AG1) & (ids_V < tokens_AG[..., None])
    return (logits_AGV > own_AG1) | ties_AGV


@dataclass(frozen=True)
class Rule(Accept):
    """A plain function of a Block as a rule; it sees both models' logits."""

    function: Callable[[Block], Tensor]
    sees_student: ClassVar[bool] = True

    def __call__(self, block: Block) -> Tensor:
        return self.function(block)


ACCEPT: dict[str, type[Accept]] = {
    "top_k": TopK,
    "top_p": TopP,
    "mixture": Mixture,
    "switch": Switch,
}
BOUNDS: dict[tuple[str, str], tuple[float | None, float | None]] = {
    ("top_k", "top_k"): (0, None),
    ("top_p", "top_p"): (0.0, 1.0),
    ("mixture", "teacher_share"): (0.0, 1.0),
    ("switch", "factor"): (0.0, None),
    ("switch", "window"): (1, None),
}


def acceptance(given: str | Accept | Callable[[Block], Tensor], **options: float) -> Accept:
    """The rule that a name, a rule or a plain function of a Block stands for.

    `options` are the fields of a named rule.  RecipeError for a name, an option or a value that
    there is not.
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
