"""What a resumed run may change: nothing that its next steps depend on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmdistill.recipe.schema import Recipe

# Keys by their dotted names.  A name that ends with * stands for all keys that start with it.
MAY_CHANGE = (
    *("output", "evaluate.max_new_tokens", "evaluate.answer_pattern", "generate*"),
    *("training.max_steps", "training.num_train_epochs", "training.save_*", "training.logging_*"),
    *("training.report_to", "training.run_name", "training.push_to_hub*", "training.hub_*"),
    *("training.dataloader_num_workers", "training.dataloader_pin_memory", "training.use_cpu"),
    *("training.dataloader_prefetch_factor", "training.dataloader_persistent_workers"),
    *("training.ddp_*", "training.disable_tqdm", "training.log_*", "training.eval_on_start"),
    *("training.gradient_checkpointing*", "training.torch_compile*", "training.project"),
    *("training.trackio_*", "training.skip_memory_metrics"),
)
BATCH = ("per_device_train_batch_size", "gradient_accumulation_steps")
DEFAULT_BATCH = (8, 1)  # of TrainingArguments


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
        if ours.get(key) != theirs.get(key) and not (is_batch or _may_change(key)):
            found.append(f"'{key}' was {ours.get(key)!r} and is {theirs.get(key)!r} now")
    return found


def _rows_in_a_step(training: Mapping[str, Any]) -> int:
    rows, windows = (
        training.get(name, size) for name, size in zip(BATCH, DEFAULT_BATCH, strict=True)
    )
    return int(rows) * int(windows)


def _may_change(key: str) -> bool:
    return any(
        key.startswith(name[:-1]) if name.endswith("*") else key == name for name in MAY_CHANGE
    )


def _flat(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Yield the dotted keys of nested mappings and lists of mappings, with their values."""
    if isinstance(value, Mapping) and value:
        for name, part in value.items():
            yield from _flat(part, f"{path}.{name}" if path else str(name))
    elif isinstance(value, list) and any(isinstance(part, Mapping) for part in value):
        for place, part in enumerate(value):
            yield from _flat(part, f"{path}[{place}]")
    else:
        yield path, value
