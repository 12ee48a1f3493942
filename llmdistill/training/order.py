"""The order in which training rows are drawn, if it is not Trainer's random one."""

from __future__ import annotations

from typing import Any

from torch.utils.data import Sampler
from transformers import TrainingArguments

from llmdistill.data.collate import ByLength, PromptDataset
from llmdistill.errors import TrainingError
from llmdistill.protocols import Orders, Teacher


def order(rows: Any, args: TrainingArguments, teacher: Teacher) -> Sampler[int] | None:
    """Return the teacher's order, or one by length if `args` asks for it; None for neither.

    Raises TrainingError if both are asked for.
    """
    if not isinstance(rows, PromptDataset):
        return None
    by_length = args.train_sampling_strategy == "group_by_length"
    window = args.train_batch_size * args.gradient_accumulation_steps
    epochs = args.num_train_epochs
    if args.max_steps > 0:
        epochs = args.max_steps * window * args.world_size / len(rows)
    chosen = None
    if isinstance(teacher, Orders):
        chosen = teacher.train_sampler(rows, epochs=epochs, seed=args.seed)
    if chosen is not None and by_length:
        raise TrainingError(
            "training.train_sampling_strategy: the teacher chooses the order of the rows, so they "
            "cannot be grouped by length. Remove it."
        )
    if chosen is not None:
        return chosen
    return ByLength(rows, window, seed=args.seed) if by_length else None
