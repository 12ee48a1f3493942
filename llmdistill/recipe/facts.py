"""Facts about other code that recipes need, read from its source without importing it.

Importing TrainingArguments takes seconds.  Reading its fields with `ast` takes milliseconds.
"""

from __future__ import annotations

import ast
import difflib
import functools
import importlib.util
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic_core import PydanticCustomError

# Names from older versions of transformers and from TRL that people still write, each with a hint.
RENAMED = {
    "warmup_ratio": "use warmup_steps, where a value below 1 is a fraction of all steps",
    "evaluation_strategy": "use evaluate.every_steps",
    "save_safetensors": "remove it: weights are always saved as safetensors",
    "gradient_checkpointing": "it is now called activation_checkpointing",
    "gradient_checkpointing_kwargs": "it is now called activation_checkpointing_kwargs",
    "no_cuda": "it is now called use_cpu",
    "max_length": "use data.max_prompt_tokens and data.max_response_tokens",
}
# Fields of TrainingArguments that llmdistill sets itself, so that a recipe has one place for each.
OWNED = {
    "output_dir": "Set 'output' instead.",
    "seed": "Set the recipe's 'seed' instead.",
    "data_seed": "Set the recipe's 'seed' instead.",
    "remove_unused_columns": "It is always false; remove the key.",
    "eval_strategy": "Set 'evaluate.every_steps' instead.",
    "eval_steps": "Set 'evaluate.every_steps' instead.",
    "resume_from_checkpoint": "Use the option 'resume' of `distill` or `llmdistill train`.",
    "hub_token": "Run `hf auth login` or set HF_TOKEN; keys do not belong in a recipe.",
}
# Fields that transformers would accept, and that would silently do nothing in our loss.
REFUSED = {
    "label_smoothing_factor": "`objectives` defines the loss, and no objective smooths labels",
    "include_num_input_tokens_seen": "rows have no input ids before they are written, so it would "
    "count 0; the log has predicted_tokens",
    "include_for_metrics": "metrics are those of `llmdistill evaluate`, not a function of inputs",
    "use_liger_kernel": "it speeds up a loss on full logits, which llmdistill never computes",
}
STRATEGIES = ("end", "every_save")  # values of `training.hub_strategy` that llmdistill takes
MORE_THAN_ZERO = ("learning_rate", "num_train_epochs")


def wrong_pattern(pattern: str) -> str | None:
    """Return what is wrong with a pattern that finds the result in an answer, or None.

    `evaluation.text.result_of` reads the result from the group if there is one, so a second group
    would be ignored.
    """
    try:
        groups = re.compile(pattern).groups
    except re.error as error:
        return f"{pattern!r} is not a valid regular expression: {error}"
    if groups > 1:
        return f"{pattern!r} has {groups} groups, but may have one at most. Use (?:...) instead."
    return None


def check_training_argument(key: str, value: Any) -> None:
    """Check one key of `training` by name and type.  Raises PydanticCustomError with a hint."""
    fields = training_fields()
    if key not in fields and key not in {**OWNED, **REFUSED, **RENAMED}:
        raise PydanticCustomError("unknown_key", "", {"key": key, "known": list(fields)})
    if wrong := _wrong_argument(key, value, fields.get(key, ())):
        raise PydanticCustomError("option", "{wrong}", {"wrong": wrong, "key": key})


def _wrong_argument(key: str, value: Any, expected: tuple[type, ...]) -> str | None:
    """Return what is wrong with a key of `training` of these plain types, or None."""
    if key in OWNED:
        return f"llmdistill sets it. {OWNED[key]}"
    if key in REFUSED:
        return f"it would have no effect: {REFUSED[key]}. Remove it."
    if key in RENAMED:
        return RENAMED[key]
    # bool is a subclass of int, so `max_steps: true` would pass as 1.
    a_bool_for_a_number = isinstance(value, bool) and bool not in expected
    if expected and (a_bool_for_a_number or not isinstance(value, expected)):
        names = " or ".join(kind.__name__ for kind in expected if kind is not type(None))
        return f"should be {names}, got {value!r} ({type(value).__name__})"
    # transformers takes any negative number for "not set", and 0 for no steps at all.
    if key == "max_steps" and isinstance(value, int) and value < 1 and value != -1:
        return f"should be 1 or more, or -1 to train for num_train_epochs, got {value}"
    if key == "hub_strategy":
        return wrong_strategy(value)
    if key in MORE_THAN_ZERO and isinstance(value, int | float) and value <= 0:
        return f"should be more than 0, because nothing would be learned, got {value}"
    return None


def wrong_strategy(value: Any) -> str | None:
    """Return what is wrong with a value of `training.hub_strategy`, or None."""
    if value in STRATEGIES:
        return None
    shown = getattr(value, "value", value)
    return (
        f"should be {' or '.join(STRATEGIES)}, got {shown!r}: what a run resumes from is not "
        "uploaded"
    )


def close_to(name: str, known: Sequence[str], *, start: str = "") -> str:
    """Return `start` and " Did you mean '...'?", or '' if no known name is close."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"{start} Did you mean '{close[0]}'?" if close else ""


@functools.cache
def training_fields() -> dict[str, tuple[type, ...]]:
    """Return the fields of transformers.TrainingArguments with their plain types, from its source.

    The tuple of types is empty for a field whose annotation is not made of plain types.
    """
    # find_spec locates a package without importing it.
    spec = importlib.util.find_spec("transformers")
    assert spec is not None
    assert spec.origin is not None
    source = (Path(spec.origin).parent / "training_args.py").read_text(encoding="utf-8")
    body = next(
        node.body
        for node in ast.parse(source).body
        if isinstance(node, ast.ClassDef) and node.name == "TrainingArguments"
    )
    return {
        node.target.id: _plain_types(ast.unparse(node.annotation))
        for node in body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }


def _plain_types(annotation: str) -> tuple[type, ...]:
    """Return the types of an annotation: (float, int) for 'float', () if it is more than plain."""
    plain: dict[str, tuple[type, ...]] = {
        "bool": (bool,),
        "int": (int,),
        "float": (float, int),
        "str": (str,),
        "None": (type(None),),
    }
    parts = [part.strip() for part in annotation.split("|")]
    if not all(part in plain for part in parts):
        return ()
    return tuple(kind for part in parts for kind in plain[part])
