"""Comparative knowledge distillation (CKD): the differences between tokens of several responses.

B = rows, T = tokens of a row, N = predicted tokens of this rank, S = those of all ranks.
K = tokens in a tuple, U = tuples, H = hidden size, V = vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from llmdistill.batch import LossSum, Sequences, StudentView, TeacherSignal
from llmdistill.distributions import Blend, Dense, Distribution
from llmdistill.errors import TrainingError
from llmdistill.models.chunks import CHUNK_ROWS
from llmdistill.models.heads import Head
from llmdistill.models.taps import Need
from llmdistill.objectives.base import Objective
from llmdistill.objectives.chunked import chunked_sum
from llmdistill.objectives.divergences import forward_kl
from llmdistill.objectives.samples import gather, gathered_from
from llmdistill.schedules import Schedule

logger = logging.getLogger("llmdistill")


def differences(states_SH: Tensor, tuples_UK: Tensor) -> Tensor:
    """Return what the first group of each tuple has more than the second one: (U, H).

    The mean over the first ceil(K / 2) members minus the mean over the others.  Wilf et al. 2025
    (CKD).
    """
    first = (tuples_UK.shape[1] + 1) // 2
    return states_SH[tuples_UK[:, :first]].mean(1) - states_SH[tuples_UK[:, first:]].mean(1)


def draw_tuples(prompt_S: Tensor, order_S: Tensor, size: int) -> Tensor:
    """Return one tuple for each token, which begins with it and never repeats a prompt: (S, K).

    The other members are the next tokens in `order_S`, a permutation that is read as a circle,
    whose prompts are not in the tuple yet.  There are no tuples with fewer than K prompts.
    """
    if len(prompt_S.unique()) < size:
        return prompt_S.new_zeros(0, size)
    prompt_S = prompt_S[order_S]
    places_S = torch.arange(len(order_S), device=order_S.device)
    members = [places_S]
    for _ in range(size - 1):
        found_S = torch.full_like(places_S, -1)
        for shift in range(1, len(order_S)):
            next_S = places_S.roll(-shift)
            new_S = torch.stack([prompt_S[next_S] != prompt_S[one] for one in members]).all(0)
            found_S = torch.where((found_S < 0) & new_S, next_S, found_S)
            if (found_S >= 0).all():
                break
        members.append(found_S)
    # From places in the circle back to tokens, with the tuple of each token at its own index.
    return order_S[torch.stack(members, 1)][order_S.argsort()]


def token_keys(sequences: Sequences) -> Tensor:
    """Return the row, the place in its response and the prompt of each predicted token: (N, 3).

    Rows with the same prompt have the same number for it, a hash of their ids.
    """
    counts_B = sequences.num_predicted
    counted_N = counts_B.repeat_interleave(counts_B)
    start_N = (counts_B.cumsum(0) - counts_B).repeat_interleave(counts_B)
    slot_N = torch.arange(len(counted_N), device=counts_B.device) - start_N
    # A prompt is what is before the first predicted token.  Tokens are counted, not columns, so
    # padding changes nothing.  int64 wraps around.
    place_BT = sequences.attention_mask_BT.cumsum(1)
    is_prompt_BT = sequences.attention_mask_BT.bool() & (sequences.response_mask_BT.cumsum(1) == 0)
    factor_BT = place_BT * 6_364_136_223_846_793_005 + 1_442_695_040_888_963_407
    prompt_B = ((sequences.input_ids_BT + 1) * factor_BT * is_prompt_BT).sum(1)
    rows_N2 = torch.stack([sequences.row_ids_B, prompt_B], 1).repeat_interleave(counts_B, 0)
    return torch.stack([rows_N2[:, 0], slot_N, rows_N2[:, 1]], 1)


def shuffled(keys_S3: Tensor) -> Tensor:
    """Return a random order of the tokens that depends on the tokens alone: (S,).

    It does not depend on their order in the batch, and is the same on all ranks.
    """
    by_slot_S = keys_S3[:, 1].argsort(stable=True)
    by_row_S = by_slot_S[keys_S3[by_slot_S, 0].argsort(stable=True)]
    draw = torch.Generator().manual_seed(int(keys_S3.sum()) % 2**32)
    return by_row_S[torch.randperm(len(keys_S3), generator=draw).to(by_row_S.device)]


class CkdObjective(Objective):
    """The difference between the logits of tokens from different responses, as the teacher has it.

    Each predicted token is in a tuple with tokens that follow other prompts.  The loss is T^2
    KL(teacher || student) between the softmax of both models' differences of logits.  The logits
    are those before a softcap, so that a difference of states gives the difference of logits.

    Args:
        group: Tokens in a tuple, 2 or 3.
        temperature: Divides the differences.  The default is that of the paper.
        weight: Factor on the objective's mean over tokens: a number, or a schedule over the run.
        chunk_size: The most tuples whose logits are in memory at a time.
    """

    name = "ckd"
    student_needs = frozenset({Need.DISTRIBUTION})
    teacher_needs = frozenset({Need.DISTRIBUTION})
    compares_samples = True

    def __init__(
        self,
        *,
        group: Literal[2, 3] = 2,
        temperature: float = 4.0,
        weight: float | Schedule = 1.0,
        chunk_size: int = CHUNK_ROWS,
    ) -> None:
        super().__init__(weight=weight)
        self.group, self.temperature = group, temperature
        self.chunk_size = chunk_size
        self.least_rows = group
        self._has_warned = False

    def forward(
        self, student: StudentView, signal: TeacherSignal | None, sequences: Sequences
    ) -> LossSum:
        """Return the sum of the losses of the tuples that begin with this rank's tokens."""
        assert signal is not None
        student_SH = gather(student.hidden_NH)
        teacher = linear_in_states(
            signal.distribution, lambda hidden_NH: gather(hidden_NH.to(student_SH.device))
        )
        keys_S3 = gather(token_keys(sequences))
        tuples_SK = draw_tuples(keys_S3[:, 2], shuffled(keys_S3), self.group)
        first = gathered_from(student.hidden_NH)
        is_own_SK = (tuples_SK >= first) & (tuples_SK < first + len(student.hidden_NH))
        if len(tuples_SK) == 0 and len(student_SH):
            self._warn()

        def loss(tuples_UK: Tensor, head: Head) -> Tensor:
            target = linear_in_states(teacher, lambda states_SH: differences(states_SH, tuples_UK))
            return self._loss(differences(student_SH, tuples_UK), head, target)

        # Some tuples begin on another rank and contain tokens of this one.  The other rank counts
        # their value and the gradient of the head; this rank adds the gradient of its tokens.
        begins_S, head = is_own_SK[:, 0], linear(student.head)
        joined = loss(tuples_SK[is_own_SK.any(1) & ~begins_S], head.detach())
        total = loss(tuples_SK[begins_S], head) + joined - joined.detach()
        return LossSum(total, self.divisor(sequences))

    def _warn(self) -> None:
        if not self._has_warned:
            logger.warning(
                "ckd: the rows of a batch follow fewer than %d different prompts, so it compares "
                "nothing there. Shuffle the rows, raise training.per_device_train_batch_size, or "
                "remove ckd if all rows have the same prompt.",
                self.group,
            )
        self._has_warned = True

    def _loss(self, student_UH: Tensor, head: Head, target: Distribution) -> Tensor:
        """Return the sum of the losses of some tuples, from the differences of states: ()."""
        teacher = target.serve(self.chunk_size)

        def position_loss(student_nV: Tensor, rows: slice) -> Tensor:
            teacher_nV = teacher[rows].to(student_nV.device)
            divergence = forward_kl(student_nV, teacher_nV, temperature=self.temperature)
            return self.temperature**2 * divergence

        ones_U = torch.ones(len(student_UH), device=student_UH.device)
        total, _ = chunked_sum(student_UH, head, position_loss, ones_U, chunk_size=self.chunk_size)
        return total


def linear_in_states(
    distribution: Distribution | None, change: Callable[[Tensor], Tensor]
) -> Distribution:
    """Return a teacher's distribution with changed final states (N, H) and linear heads.

    Raises TrainingError for a distribution that is not made from final states.
    """
    if isinstance(distribution, Dense):
        return Dense(change(distribution.hidden_NH), linear(distribution.head))
    if isinstance(distribution, Blend):  # a difference of blends is the blend of differences
        parts = tuple(linear_in_states(part, change) for part in distribution.parts)
        return Blend(parts, distribution.weights)
    raise TrainingError(
        "ckd needs the final hidden states and the head of the teacher, but its distribution is a "
        f"{type(distribution).__name__}. Use a teacher of kind local."
    )


def linear(head: Head) -> Head:
    """Return the head without its bias, which cancels in differences, and without its softcap."""
    whole = None if head.whole is None else linear(head.whole)
    return Head(head.weight_VH, scale=head.scale, whole=whole)
