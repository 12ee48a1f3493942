"""What a run will cost, before it is made: memory from the configurations, time from two steps."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path

import torch

from llmdistill import recipe as recipes
from llmdistill.data.collate import EncodedRows, PromptDataset
from llmdistill.models.adapters import add_adapter
from llmdistill.models.carve import Plan
from llmdistill.models.footprint import QUANTIZED_BYTES, Load, footprint, skeleton
from llmdistill.models.load import DTYPES, default_device, load_config, preferred_dtype
from llmdistill.recipe import Recipe
from llmdistill.run import (
    build_trainer,
    load_data,
    load_pair,
    load_student_tokenizer,
    training_arguments,
)
from llmdistill.training.progress import StepClock

LOOKED_AT = 10_000  # rows whose lengths are taken


def memory(recipe: Recipe, train: EncodedRows) -> dict[str, float]:
    """Bytes by part, on one device without sharding, when the longest rows come together."""
    answer, training = recipe.student, recipe.training
    plan = Plan(**answer.carve.model_dump()) if answer.carve is not None else None
    student = skeleton(load_config(answer.model, revision=answer.revision), plan)
    if answer.peft is not None:
        options = answer.peft.model_dump(exclude={"save", "r"})
        student = add_adapter(student, rank=answer.peft.r, seed=recipe.seed, **options)
    teacher = None
    if isinstance(recipe.teacher, recipes.LocalTeacherRecipe):
        name, revision = recipe.teacher_source
        teacher = skeleton(load_config(name, revision=revision))
    rows = int(training.get("per_device_train_batch_size", 8))
    window = rows * int(training.get("gradient_accumulation_steps", 1))
    longest = _longest(recipe, train)
    in_half = training.get("bf16", preferred_dtype(default_device()) is torch.bfloat16)
    load = Load(
        tokens=rows * longest,
        written_tokens=window * longest if recipe.rollout.new_tokens else 0,
        product_bytes=2.0 if in_half or training.get("fp16") else 4.0,
        checkpointing=bool(training.get("activation_checkpointing")),
        optimizer=str(training.get("optim", "adamw_torch")),
    )
    return footprint(
        teacher,
        student,
        load,
        teacher_bytes=_weight_bytes(recipe.teacher) if teacher is not None else 0.0,
        student_bytes=_weight_bytes(answer),
    )


def seconds_per_step(recipe: Recipe) -> float:
    """How long a step takes on this machine: the second of two that are made and forgotten."""
    short = {
        "max_steps": 2,
        "save_strategy": "no",
        "push_to_hub": False,
        "load_best_model_at_end": False,
    }
    with tempfile.TemporaryDirectory() as folder:
        changes = {"training": recipe.training | short, "evaluate": recipes.EvaluateRecipe()}
        trial = recipe.model_copy(update=changes)
        tokenizer = load_student_tokenizer(trial)
        train, _ = load_data(trial, tokenizer)
        teacher, student = load_pair(trial, tokenizer, train)
        arguments = training_arguments(trial, Path(folder))
        trainer = build_trainer(trial, arguments, teacher, student, tokenizer, train)
        clock = StepClock()
        trainer.add_callback(clock)
        trainer.train()
        return clock.seconds[-1]


def num_steps(recipe: Recipe, train: EncodedRows) -> int:
    """Steps of the whole run on one device."""
    training = recipe.training
    if training.get("max_steps", -1) > 0 or not isinstance(train, PromptDataset):
        return int(training["max_steps"])
    rows = int(training.get("per_device_train_batch_size", 8))
    window = rows * int(training.get("gradient_accumulation_steps", 1))
    return math.ceil(training.get("num_train_epochs", 3.0) * math.ceil(len(train) / window))


def _longest(recipe: Recipe, train: EncodedRows) -> int:
    """Tokens of the longest prompt and the longest answer, whoever writes it."""
    rows = train.head(LOOKED_AT)
    prompt = max(len(row.prompt_ids) for row in rows)
    answer = max(len(row.response_ids or ()) for row in rows)
    return prompt + max(recipe.rollout.new_tokens, answer * recipe.rollout.takes_data)


def _weight_bytes(side: recipes.TeacherRecipe | recipes.StudentRecipe) -> float:
    assert not isinstance(side, recipes.AdapterOffTeacherRecipe)
    if side.quantization is not None:
        return QUANTIZED_BYTES[side.quantization]
    return float((DTYPES[side.dtype] or preferred_dtype(default_device())).itemsize)
