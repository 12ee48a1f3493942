"""Guards against runs that learn nothing, that spoil their weights, or that never learn to stop.

B = sequences, R = ranks, T = tokens.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

import torch
from accelerate.utils import gather_object
from torch import Tensor
from torch.nn import Module

from llmdistill.data.collate import EncodedRows, PromptDataset
from llmdistill.errors import NonFiniteLossError, RecipeError, TrainingError
from llmdistill.models.heads import not_finite_weights

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from llmdistill.batch import Sequences
    from llmdistill.training.trainer import DistillTrainer

logger = logging.getLogger("llmdistill")

MANY = 0.5  # share of useless responses from which a run warns


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


class RolloutWatch:
    """Warns once about each way in which most of the written responses are of no use."""

    MESSAGES: ClassVar[dict[str, str]] = {
        "unfinished": "of the written responses have no end token, because the limit of new tokens "
        "cut them off. A student learns from them not to stop. Raise max_new_tokens of the "
        "rollout, if the models do end their responses.",
        "empty": "of the written responses are empty. Look at the chat template and the end tokens "
        "with `llmdistill check`.",
        "repeated_4grams": "of the 4-grams in written responses are repeated, so the student "
        "learns on loops. Raise the temperature of the rollout's sampling, or let the teacher "
        "write more of the steps.",
    }

    def __init__(self) -> None:
        self._left = dict(self.MESSAGES)

    def __call__(self, logs: Mapping[str, float]) -> None:
        """Look at the figures of a line of the log."""
        for name, message in list(self._left.items()):
            if (share := logs.get(name, 0.0)) > MANY:
                del self._left[name]
                logger.warning("%.0f%% %s", 100 * share, message)


def check_step(trainer: DistillTrainer, loss: Tensor, grad_norm: Tensor | float) -> bool:
    """Return whether a rank was asked to stop after this step.

    Raises NonFiniteLossError on all ranks if the loss or gradient norm of one is not finite.  Call
    it on every rank before the optimizer's update, so that the weights stay those of the last good
    step.
    """
    accelerator = trainer.accelerator
    # The flags are gathered because a rank that stopped alone would leave the others waiting.
    norm = torch.as_tensor(0.0 if grad_norm is None else grad_norm, device=loss.device)
    asked = torch.tensor(trainer.stop_on_signal.asked, device=loss.device)
    flags = torch.stack([torch.isfinite(loss), torch.isfinite(norm), asked])
    flags_R3 = accelerator.gather(flags[None]).cpu()
    if not bool(flags_R3[:, :2].all()):
        raise _not_finite(trainer, flags_R3, f"loss {float(loss):.4g}, gradient norm {norm:.4g}")
    return bool(flags_R3[:, 2].any())


def _not_finite(trainer: DistillTrainer, flags_R3: Tensor, here: str) -> NonFiniteLossError:
    """Return the error, with the ranks, the objectives and the models that it came from."""
    # The ranks have averaged their gradients by now, so a bad gradient shows on all of them.  A bad
    # loss still shows which rank it came from.
    bad_R = ~flags_R3[:, 0] if not flags_R3[:, 0].all() else ~flags_R3[:, 1]
    ranks = ", ".join(map(str, bad_R.nonzero()[:, 0].tolist()))
    terms = [f"the objective '{name}'" for name in trainer._tally.not_finite()]
    found = gather_object([[*terms, *_spoilt(trainer)]])
    names = ", ".join(dict.fromkeys(name for names in found for name in names))
    # DeepSpeed has made the update when the norm is known.
    updated = bool(flags_R3[:, 0].all()) and trainer.is_deepspeed_enabled
    return NonFiniteLossError(
        f"step {trainer.state.global_step}, rank {ranks}: the loss or its gradient is not finite "
        f"({here} on rank {trainer.accelerator.process_index}). "
        f"{f'It comes from {names}. ' if names else ''}The weights were "
        f"{'updated with it' if updated else 'not updated'}. "
        "Lower training.learning_rate, check the rows of this step, or resume from the last "
        "checkpoint."
    )


def _spoilt(trainer: DistillTrainer) -> list[str]:
    """Return which of the two models has a weight that is NaN or infinite."""
    models = {"student": trainer.model.student, "teacher": getattr(trainer.teacher, "model", None)}
    return [
        f"weights of the {name} that are not finite"
        for name, model in models.items()
        if isinstance(model, Module) and not_finite_weights(model)
    ]


def smaller_batch(sequences: Sequences, args: TrainingArguments) -> str:
    """Return what to do if the memory does not suffice for a micro-batch."""
    rows, width = sequences.input_ids_BT.shape
    size, windows = args.train_batch_size, args.gradient_accumulation_steps
    parts = next((n for n in range(2, size + 1) if size % n == 0), 1)
    smaller = (
        f"training.per_device_train_batch_size to {size // parts} and "
        f"gradient_accumulation_steps to {parts * windows}, which leaves the step as it is"
        if parts > 1
        else "data.max_prompt_tokens or max_new_tokens lower"
    )
    return (
        f"This was in a micro-batch of {rows} rows of up to {width} tokens. Set {smaller}; or set "
        "training.activation_checkpointing to true."
    )
