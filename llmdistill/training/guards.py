"""Guards against runs that learn nothing, that spoil their weights, or that never learn to stop.

R = ranks.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llmdistill.data.collate import EncodedRows, PromptDataset
from llmdistill.errors import NonFiniteLossError, RecipeError, TrainingError

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import TrainingArguments

    from llmdistill.training.trainer import DistillTrainer

logger = logging.getLogger("llmdistill")

MANY = 0.5  # share of unfinished responses from which a run warns


def require_a_batch(rows: EncodedRows, args: TrainingArguments) -> None:
    """Raise RecipeError if incomplete batches are dropped and the rows do not make one batch."""
    size = args.train_batch_size * args.world_size
    if not args.dataloader_drop_last:
        return
    found = len(rows) if isinstance(rows, PromptDataset) else len(rows.head(size))
    if found < size:
        raise RecipeError(
            f"{found} rows make no batch of {size}, and training.dataloader_drop_last drops "
            "incomplete batches, so nothing would be learned. Set it to false, or lower "
            "training.per_device_train_batch_size."
        )


def require_steps(trainer: DistillTrainer) -> None:
    """Raise TrainingError if training ended without a step."""
    if trainer.state.global_step == 0:
        raise TrainingError(
            "training ended after 0 steps, so nothing was learned and no student is exported. "
            "Check the number of rows, training.max_steps and training.num_train_epochs."
        )


class EndWatch:
    """Warns once if many of the written responses have no end token."""

    def __init__(self) -> None:
        self.has_warned = False

    def __call__(self, logs: Mapping[str, float]) -> None:
        """Look at the figure `unfinished` of a line of the log."""
        share = logs.get("unfinished", 0.0)
        if share > MANY and not self.has_warned:
            self.has_warned = True
            logger.warning(
                "%.0f%% of the written responses have no end token, because the limit of new "
                "tokens cut them off. A student learns from them not to stop. Raise "
                "max_new_tokens of the rollout, if the models do end their responses.",
                100 * share,
            )


def stop_if_not_finite(
    accelerator: Accelerator, loss: Tensor, grad_norm: Tensor | float, step: int
) -> None:
    """Raise NonFiniteLossError on all ranks if the loss or gradient norm of one is not finite.

    Call it on every rank before the optimizer's update, so that the weights stay those of the last
    good step.
    """
    # The flags are gathered because a rank that stopped alone would leave the others waiting.
    norm = torch.as_tensor(grad_norm, device=loss.device)
    finite_R2 = accelerator.gather(torch.stack([torch.isfinite(loss), torch.isfinite(norm)])[None])
    if bool(finite_R2.all()):
        return
    # The ranks have averaged their gradients by now, so a bad gradient shows on all of them.  A bad
    # loss still shows which rank it came from.
    bad_R = ~finite_R2[:, 0] if not finite_R2[:, 0].all() else ~finite_R2[:, 1]
    ranks = bad_R.nonzero()[:, 0].tolist()
    here = f"loss {float(loss):.4g}, gradient norm {float(grad_norm):.4g}"
    raise NonFiniteLossError(
        f"step {step}, rank {', '.join(map(str, ranks))}: the loss or its gradient is not finite "
        f"({here} on rank {accelerator.process_index}). The weights were not updated. Lower "
        "training.learning_rate, check the rows of this step, or resume from the last checkpoint."
    )
