"""What to do if the memory does not suffice, in numbers.

B = sequences, T = tokens.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from accelerate.utils.memory import should_reduce_batch_size
from transformers import TrainingArguments

from llmdistill.batch import Sequences
from llmdistill.errors import OutOfMemoryError


@contextlib.contextmanager
def advice_on_training(sequences: Sequences, args: TrainingArguments) -> Iterator[None]:
    """Raise OutOfMemoryError with advice if the memory does not suffice for a micro-batch."""
    try:
        yield
    except RuntimeError as error:
        if not should_reduce_batch_size(error):
            raise
        rows, width = sequences.input_ids_BT.shape
        size, windows = args.train_batch_size, args.gradient_accumulation_steps
        parts = next((n for n in range(2, size + 1) if size % n == 0), 1)
        smaller = (
            f"training.per_device_train_batch_size to {size // parts} and "
            f"gradient_accumulation_steps to {parts * windows}, which leaves the step as it is"
            if parts > 1
            else "data.max_prompt_tokens or max_new_tokens lower"
        )
        raise OutOfMemoryError(
            f"{error} This was in a micro-batch of {rows} rows of up to {width} tokens. Set "
            f"{smaller}; or set training.activation_checkpointing to true."
        ) from error
