"""What a log line says of the steps since the one before: sums on each rank, figures over all.

Q = quarters of an answer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from llmdistill.batch import Sequences
from llmdistill.sampling import Writer

QUARTERS = ("q1", "q2", "q3", "q4")
SUMS = (
    *("tokens", "taught", "seconds", "judged", "stayed", "judgements"),
    *(f"{part}_{quarter}" for quarter in QUARTERS for part in ("all", "replaced")),
)


class Tally:
    """Counts what was written and lost.  Sums are equal in name on all ranks at all times."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = dict.fromkeys(SUMS, 0.0)
        self._terms: dict[str, Tensor | float] = {}

    def add_terms(self, terms: Mapping[str, Tensor]) -> None:
        """Each objective's sum over the predicted tokens of one micro-batch."""
        for name, value in terms.items():
            self._terms[name] = self._terms.get(name, 0.0) + value.detach()

    def add_written(self, sequences: Sequences, seconds: float) -> None:
        """What a rollout gave, and how long it took."""
        count_B = sequences.num_predicted
        writer_N = sequences.target_writers_N
        found: dict[str, Any] = {
            "tokens": count_B.sum(),
            "taught": (writer_N == Writer.TEACHER).sum(),
        }
        if sequences.judgements_B is not None:  # written now by both; others may have been kept
            found["seconds"] = seconds
            found["judged"] = count_B.sum()
            found["stayed"] = (writer_N == Writer.STUDENT).sum()
            found["judgements"] = sequences.judgements_B[count_B > 0].sum()
            for quarter, counts in zip(QUARTERS, _by_quarter(sequences), strict=True):
                found[f"all_{quarter}"], found[f"replaced_{quarter}"] = counts
        for name, value in found.items():
            self._sums[name] += float(value)

    def figures(self, accelerator: Accelerator) -> dict[str, float]:
        """The figures since the last call, over all ranks; the sums start anew."""
        sums, terms = over_ranks(accelerator, self._sums), over_ranks(accelerator, self._terms)
        self._sums, self._terms = dict.fromkeys(SUMS, 0.0), {}
        tokens = sums["tokens"]
        figures = {"predicted_tokens": tokens}
        if len(terms) > 1:
            figures |= {name: value / max(tokens, 1) for name, value in terms.items()}
        if sums["judged"]:
            seconds = sums["seconds"] / accelerator.num_processes
            figures["written_per_second"] = sums["judged"] / seconds
            figures["acceptance"] = sums["stayed"] / sums["judged"]
            figures["teacher_share"] = sums["taught"] / tokens
            figures["tokens_per_judgement"] = sums["judged"] / sums["judgements"]
            for q in QUARTERS:
                figures[f"replaced_{q}"] = sums[f"replaced_{q}"] / max(sums[f"all_{q}"], 1)
        return figures


def _by_quarter(sequences: Sequences) -> list[list[int]]:
    """Tokens in each quarter of the answers, and those that the teacher wrote: Q pairs."""
    count_B = sequences.num_predicted
    slot_N = torch.cat([torch.arange(int(count)) for count in count_B])
    quarter_N = 4 * slot_N // count_B.repeat_interleave(count_B)
    teachers_N = sequences.target_writers_N == Writer.TEACHER
    total_Q = quarter_N.bincount(minlength=4)
    return torch.stack([total_Q, quarter_N[teachers_N].bincount(minlength=4)], 1).tolist()


def over_ranks(accelerator: Accelerator, terms: Mapping[str, float | Tensor]) -> dict[str, float]:
    """Each term summed over all ranks; one rank alone leaves them on the CPU (not each device has
    float64).
    """
    names = sorted(terms)
    sums = torch.tensor([float(terms[name]) for name in names], dtype=torch.float64)
    if accelerator.num_processes > 1:
        sums = accelerator.reduce(sums.to(accelerator.device))
    return dict(zip(names, sums.tolist(), strict=True))
