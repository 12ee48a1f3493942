"""What to do if the memory does not suffice, in numbers.

B = sequences, P = prompt tokens, T = tokens.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from accelerate.utils.memory import should_reduce_batch_size
from transformers import TrainingArguments

from llmdistill.batch import Prompts, Sequences
from llmdistill.errors import OutOfMemoryError


@contextlib.contextmanager
def advice_on_writing(prompts: Prompts) -> Iterator[None]:
    """Raise OutOfMemoryError with advice if the memory does not suffice to write responses."""
    try:
        yield
    except RuntimeError as error:
        if not should_reduce_batch_size(error):
            raise
        rows, width = prompts.input_ids_BP.shape
        raise OutOfMemoryError(
            f"{error} This was while responses to {rows} prompts of up to {width} tokens were "
            f"written. Set rollout.batch_size to {max(rows // 2, 1)} or less, which changes "
            "nothing else, or lower rollout.max_new_tokens."
        ) from error


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
        smaller = (
            f"training.per_device_train_batch_size to {size // 2} and "
            f"gradient_accumulation_steps to {2 * windows}, which leaves the step as it is"
            if size > 1
            else "data.max_prompt_tokens or max_new_tokens lower"
        )
        raise OutOfMemoryError(
            f"{error} This was in a micro-batch of {rows} rows of up to {width} tokens. Set "
            f"{smaller}; or set training.activation_checkpointing to true."
        ) from error
