"""Rollouts for tests."""

from __future__ import annotations

from torch import nn

from llmdistill.batch import Prompts, Sequences
from llmdistill.rollouts.fixed import FixedRollout


class Repadded:
    """A fixed rollout whose sequences have extra padding columns."""

    def __init__(self, left: int, right: int) -> None:
        self.left, self.right = left, right

    def write(self, prompts: Prompts, *others) -> Sequences:
        plain = FixedRollout().write(prompts, *others)
        pad = (self.left, self.right)
        columns = {
            name: nn.functional.pad(getattr(plain, name), pad)
            for name in ("input_ids_BT", "attention_mask_BT", "response_mask_BT", "writer_BT")
        }
        return Sequences(**columns, row_ids_B=plain.row_ids_B)
