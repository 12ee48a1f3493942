"""What a resumed run may change: nothing that its next steps depend on."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from llmdistill.errors import CheckpointError, RecipeError
from llmdistill.recipe.reading import load_recipe
from llmdistill.recipe.schema import Recipe

# Keys by their dotted names.  A name that ends with * stands for all keys that start with it.
MAY_CHANGE = (
    *("output", "evaluate.max_new_tokens", "evaluate.answer_pattern", "generate*"),
    "evaluate.samples_every",
    # They change what is computed through rounding alone.
    *("rollout.batch_size", "rollout.rollout.batch_size", "rollout.other.batch_size"),
    *("rollout.student.batch_size", "rollout.student.rollout.batch_size"),
    *("teacher.attn_implementation", "student.attn_implementation", "student.export_dtype"),
    # A hash of the rows tells whether these lead to the same tokens.
    *("data.train*", "data.chat_template_kwargs*", "data.format", "data.on_bad_row"),
    *("training.max_steps", "training.num_train_epochs", "training.save_*", "training.logging_*"),
    *("training.report_to", "training.run_name", "training.push_to_hub*", "training.hub_*"),
    *("training.dataloader_num_workers", "training.dataloader_pin_memory", "training.use_cpu"),
    *("training.dataloader_prefetch_factor", "training.dataloader_persistent_workers"),
    *("training.ddp_*", "training.disable_tqdm", "training.log_*", "training.eval_on_start"),
    *("training.gradient_checkpointing*", "training.torch_compile*", "training.project"),
    *("training.trackio_*", "training.skip_memory_metrics"),
)
# What may change and leads to other results of a run.
RESULTS = (
    *("training.max_steps", "training.num_train_epochs", "evaluate.max_new_tokens", "generate*"),
    *("evaluate.answer_pattern", "student.export_dtype", "data.train*", "data.format"),
    *("data.chat_template_kwargs*", "data.on_bad_row"),
)
BATCH = ("per_device_train_batch_size", "gradient_accumulation_steps")
DEFAULT_BATCH = (8, 1)  # of TrainingArguments


def require_same(record: Path, now: Recipe) -> None:
    """Raise CheckpointError if the run to resume was started with another recipe, `record`."""
    try:
        before = load_recipe(record)
    except RecipeError as error:
        raise CheckpointError(
            f"the recipe of the run to resume was made by another version: {error}"
        ) from error
    if changed := changed_keys(before, now):
        raise CheckpointError(
            f"{record.parent} was started with another recipe: {'; '.join(changed)}. Restore it to "
            "resume, or choose another output. Only how long the run is, what it logs, saves and "
            "pushes, and what it takes in memory can change."
        )


def same_results(record: Path, now: Recipe) -> bool:
    """Whether a finished run has what a recipe asks for that differs in nothing that is refused."""
    ours, theirs = (dict(_flat(one.model_dump(), "")) for one in (load_recipe(record), now))
    asked = [key for key in {*ours, *theirs} if _is_among(key, RESULTS)]
    return all(_same(ours.get(key), theirs.get(key)) for key in asked)


def changed_keys(before: Recipe, now: Recipe) -> list[str]:
    """Return what a resumed run must not change but does: 'key was A and is B now'.

    The batch size may change if the number of rows in a step stays the same.
    """
    ours, theirs = (dict(_flat(one.model_dump(), "")) for one in (before, now))
    sizes = [_rows_in_a_step(one.training) for one in (before, now)]
    for one in (ours, theirs):
        for name, size in zip(BATCH, DEFAULT_BATCH, strict=True):
            one.setdefault(f"training.{name}", size)
    found = []
    for key in dict.fromkeys([*ours, *theirs]):
        is_batch = key.removeprefix("training.") in BATCH and sizes[0] == sizes[1]
        if not (_same(ours.get(key), theirs.get(key)) or is_batch or _is_among(key, MAY_CHANGE)):
            found.append(f"'{key}' was {ours.get(key)!r} and is {theirs.get(key)!r} now")
    return found


def _rows_in_a_step(training: Mapping[str, Any]) -> int:
    rows, windows = (
        training.get(name, size) for name, size in zip(BATCH, DEFAULT_BATCH, strict=True)
    )
    return int(rows) * int(windows)


def _same(one: Any, other: Any) -> bool:
    """Whether two values are equal, as paths if both are text: ./a is a."""
    if isinstance(one, str) and isinstance(other, str):
        return os.path.normpath(one) == os.path.normpath(other)
    return bool(one == other)


def _is_among(key: str, names: Sequence[str]) -> bool:
    return any(key.startswith(name[:-1]) if name.endswith("*") else key == name for name in names)


def _flat(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Yield the dotted keys of nested mappings and lists of mappings, with their values."""
    if isinstance(value, Mapping):
        for name, part in value.items():
            yield from _flat(part, f"{path}.{name}" if path else str(name))
    elif isinstance(value, list) and any(isinstance(part, Mapping) for part in value):
        for place, part in enumerate(value):
            yield from _flat(part, f"{path}[{place}]")
    else:
        yield path, value
