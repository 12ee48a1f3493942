"""Figures of a log line about the steps since the line before: sums on each rank, then over all.

B = sequences, N = predicted tokens, M = runs of four predicted tokens, Q = quarters of a response.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from llmdistill.batch import Sequences
from llmdistill.sampling import Writer

HASH = 6_364_136_223_846_793_005  # the multiplier of Knuth's MMIX generator
QUARTERS = ("q1", "q2", "q3", "q4")
SUMS = (
    *("tokens", "by_teacher", "by_student", "seconds", "written", "accepted", "teacher_passes"),
    *("responses", "unfinished", "empty", "grams", "repeated"),
    *(f"{part}_{quarter}" for quarter in QUARTERS for part in ("all", "replaced")),
)


class Tally:
    """Sums of who wrote what, and of the terms of the loss, on one rank.

    `ends` are the ids that end a response.  All ranks must have the same names of sums, because
    `over_ranks` adds them up in one tensor.  A rank that may have no batch needs the names of the
    `terms` from the start.
    """

    def __init__(self, ends: Collection[int] = (), terms: Sequence[str] = ()) -> None:
        self._ends = torch.tensor(sorted(ends), dtype=torch.long)
        self._sums: dict[str, float] = dict.fromkeys(SUMS, 0.0)
        self._terms: dict[str, tuple[Tensor | float, Tensor | float]]
        self._terms = dict.fromkeys(terms, (0.0, 0.0))

    def add_terms(self, terms: Mapping[str, tuple[Tensor | float, Tensor | float]]) -> None:
        """Add each term's (sum over one micro-batch, addition to the term's divisor)."""
        for name, (total, divisor) in terms.items():
            totals, divisors = self._terms.get(name, (0.0, 0.0))
            self._terms[name] = (totals + total, divisors + divisor)

    def not_finite(self) -> list[str]:
        """Return the terms whose sum on this rank is NaN or infinite."""
        totals = {name: torch.as_tensor(total) for name, (total, _) in self._terms.items()}
        return [name for name, total in totals.items() if not total.isfinite()]

    def term_means(self, accelerator: Accelerator) -> dict[str, float]:
        """Return each term's mean since the last call, over all ranks; then forget the sums."""
        totals = over_ranks(accelerator, {name: total for name, (total, _) in self._terms.items()})
        counts = over_ranks(accelerator, {name: count for name, (_, count) in self._terms.items()})
        self._terms = {}
        return {name: total / max(counts[name], 1) for name, total in totals.items()}

    def add_written(self, sequences: Sequences, seconds: float) -> None:
        """Add what a rollout wrote in `seconds`."""
        count_B = sequences.num_predicted
        writer_N = sequences.target_writers_N
        found: dict[str, Any] = {
            "tokens": count_B.sum(),
            "by_teacher": (writer_N == Writer.TEACHER).sum(),
            "by_student": (writer_N == Writer.STUDENT).sum(),
        }
        last_B = (count_B.cumsum(0) - 1)[count_B > 0]
        written_B = writer_N[last_B] != Writer.DATA
        found["responses"] = written_B.sum()
        ends_B = torch.isin(sequences.targets_N[last_B], self._ends)
        found["unfinished"] = (written_B & ~ends_B).sum()
        found["empty"] = (written_B & ends_B & (count_B[count_B > 0] == 1)).sum()
        if bool(written_B.any()):
            found["grams"], found["repeated"] = _repeated(sequences)
        # Both models have written these now.  Other rollouts may return responses that they kept,
        # so a speed would be meaningless.
        if sequences.teacher_passes_B is not None:
            found["seconds"] = seconds
            found["written"] = count_B.sum()
            found["accepted"] = found["by_student"]
            found["teacher_passes"] = sequences.teacher_passes_B[count_B > 0].sum()
            for quarter, counts in zip(QUARTERS, _by_quarter(sequences), strict=True):
                found[f"all_{quarter}"], found[f"replaced_{quarter}"] = counts
        for name, value in found.items():
            self._sums[name] += float(value)

    def figures(self, accelerator: Accelerator) -> dict[str, float]:
        """Return the figures since the last call, over all ranks; then forget the sums.

        `teacher_token_share` and `student_token_share` are shares of the predicted tokens; the rest
        comes from the dataset.  `acceptance` and `replaced_q1` to `replaced_q4` are shares, too.
        `unfinished` and `empty` are shares of the responses that a model wrote: those without an
        end token, and those with nothing else.  `repeated_4grams` is the share of their 4-grams
        that came earlier in the same response.
        `written_per_second` is in tokens per second of all ranks together.
        """
        sums, means = over_ranks(accelerator, self._sums), self.term_means(accelerator)
        self._sums = dict.fromkeys(SUMS, 0.0)
        tokens = sums["tokens"]
        figures = {"predicted_tokens": tokens}
        for writer in ("teacher", "student"):
            figures[f"{writer}_token_share"] = sums[f"by_{writer}"] / max(tokens, 1)
        if len(means) > 1:  # the loss already shows a single term
            figures |= means
        if sums["responses"]:
            figures["unfinished"] = sums["unfinished"] / sums["responses"]
            figures["empty"] = sums["empty"] / sums["responses"]
            figures["repeated_4grams"] = sums["repeated"] / max(sums["grams"], 1)
        if sums["written"]:
            # Ranks write at the same time, so the time that has passed is their mean.
            seconds = sums["seconds"] / accelerator.num_processes
            figures["written_per_second"] = sums["written"] / seconds
            figures["acceptance"] = sums["accepted"] / sums["written"]
            figures["tokens_per_teacher_pass"] = sums["written"] / sums["teacher_passes"]
            for q in QUARTERS:
                figures[f"replaced_{q}"] = sums[f"replaced_{q}"] / max(sums[f"all_{q}"], 1)
        return figures


def _repeated(sequences: Sequences) -> tuple[int, int]:
    """Count the 4-grams of tokens in all responses, and those that came earlier in their own."""
    count_B = sequences.num_predicted
    row_N = torch.arange(len(count_B)).repeat_interleave(count_B)
    if len(row_N) < 4:
        return 0, 0
    within_M = row_N[:-3] == row_N[3:]
    key_M = row_N[:-3]
    for token_M in sequences.targets_N.unfold(0, 4, 1).T:
        key_M = key_M * HASH + token_M  # int64 wraps around; equal keys of others are very rare
    key_M = key_M[within_M]
    return len(key_M), len(key_M) - len(key_M.unique())


def _by_quarter(sequences: Sequences) -> list[list[int]]:
    """Count the tokens in each quarter of the responses, and the teacher's: Q pairs."""
    count_B = sequences.num_predicted
    slot_N = torch.cat([torch.arange(int(count)) for count in count_B])
    quarter_N = 4 * slot_N // count_B.repeat_interleave(count_B)
    teachers_N = sequences.target_writers_N == Writer.TEACHER
    total_Q = quarter_N.bincount(minlength=4)
    return torch.stack([total_Q, quarter_N[teachers_N].bincount(minlength=4)], 1).tolist()


def over_ranks(accelerator: Accelerator, terms: Mapping[str, float | Tensor]) -> dict[str, float]:
    """Return each term summed over all ranks, in float64.

    All ranks must call it with the same names.
    """
    names = sorted(terms)  # the ranks must agree on the order
    sums = torch.tensor([float(terms[name]) for name in names], dtype=torch.float64)
    # A single process stays on the CPU, because some devices have no float64.
    if accelerator.num_processes > 1:
        sums = accelerator.reduce(sums.to(accelerator.device))
    return dict(zip(names, sums.tolist(), strict=True))
