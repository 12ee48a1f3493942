"""Estimates of what a run will cost: memory from the configurations, time from two steps."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from llmdistill import recipe as recipes
from llmdistill.data.build import load_data, load_student_tokenizer
from llmdistill.data.collate import EncodedRows, PromptDataset
from llmdistill.decoding.batches import rows_at_once
from llmdistill.models.adapters import add_adapter
from llmdistill.models.carve import Plan
from llmdistill.models.footprint import (
    Load,
    activation_bytes,
    cached_numbers,
    footprint,
    head_bytes,
    optimizer_bytes,
    skeleton,
    weight_bytes,
)
from llmdistill.models.load import DTYPES, default_device, load_config, preferred_dtype
from llmdistill.models.taps import Need, check_taps
from llmdistill.objectives.augment import AugmentedObjective
from llmdistill.objectives.build import build_objectives
from llmdistill.recipe import Recipe
from llmdistill.rollouts.interleaved import LOGITS
from llmdistill.run import build_trainer, load_pair, training_arguments
from llmdistill.training.progress import StepClock

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NUM_STEPS = 2
TWO_STEPS = {  # arguments for two steps that write and report nothing
    "max_steps": NUM_STEPS,
    "save_strategy": "no",
    "push_to_hub": False,
    "load_best_model_at_end": False,
    "eval_on_start": False,
    "report_to": "none",
}
SAVE_STEPS = 500  # the default of TrainingArguments
LOOKED_AT = 10_000  # rows in which the longest prompt and response are searched


def memory(recipe: Recipe, train: EncodedRows) -> dict[str, float]:
    """Estimate the memory of a run: bytes by part, on one device without sharding.

    A batch is taken to consist of the longest rows.  No weights are loaded.
    """
    student, student_bytes = _student(recipe.student, recipe.seed)
    load = _load(recipe, train)
    teacher, parts = _teacher(recipe, student, load)
    parts |= {"student's weights": student_bytes} | footprint(student, load)
    _add_objectives(parts, recipe, student, teacher, load)
    if recipe.rollout.steps_both_models:  # the teacher has a cache, too, and scores drafts
        size = next(teacher.parameters()).element_size()
        parts["cache while writing"] += load.written_tokens * size * cached_numbers(teacher)
        parts["chunks of logits"] += 4.0 * LOGITS
    return parts


def disk(recipe: Recipe, train: EncodedRows, parts: Mapping[str, float]) -> float:
    """Return the bytes that a run writes at most: its student, and the checkpoints that it keeps.

    `parts` is its memory.  Responses of a teacher, which take a few bytes per token, are left out.
    Of a recipe of several runs, each is taken to write as much as this one.
    """
    training, student = recipe.training, parts["student's weights"]
    strategy, kept = training.get("save_strategy", "steps"), training.get("save_total_limit")
    if strategy == "no":
        return student * len(recipe.stages)
    every = training.get("save_steps", SAVE_STEPS)
    if recipe.evaluate.patience is not None:  # each measurement has its checkpoint
        every = recipe.evaluate.every_steps
    number = 1.0 / every if 0 < every < 1 else num_steps(recipe, train) / max(every, 1)
    if strategy == "epoch":
        number = training.get("num_train_epochs", 3.0)
    written = max(math.ceil(number), 1)
    # A new checkpoint is written before an old one is deleted.
    number = written if kept is None else min(written, kept + 1)
    one = student + sum(size for name, size in parts.items() if "optimizer" in name)
    return (student + number * one) * len(recipe.stages)


def _load(recipe: Recipe, train: EncodedRows) -> Load:
    """Return what a step works on.  Defaults are those of TrainingArguments, which is not built."""
    training = recipe.training
    rows = int(training.get("per_device_train_batch_size", 8))
    # A rollout writes the rows of an accumulation window, as many at once as it may; a forward pass
    # reads one micro-batch.
    most = recipe.rollout.most_rows or rows_at_once(default_device())
    window = min(rows * int(training.get("gradient_accumulation_steps", 1)), most)
    longest = _longest(recipe, train)
    in_half = training.get("bf16", preferred_dtype(default_device()) is torch.bfloat16)
    return Load(
        tokens=rows * longest,
        written_tokens=window * longest if recipe.rollout.new_tokens else 0,
        product_bytes=2.0 if in_half or training.get("fp16") else 4.0,
        checkpointing=bool(training.get("activation_checkpointing")),
        optimizer=str(training.get("optim", "adamw_torch")),
        accumulates=int(training.get("gradient_accumulation_steps", 1)) > 1,
    )


def _student(section: recipes.StudentRecipe, seed: int) -> tuple[PreTrainedModel, float]:
    """Return a student without weights, with its adapter if it has one, and the bytes it takes."""
    plan = Plan(**section.carve.model_dump()) if section.carve is not None else None
    student = skeleton(load_config(section.model, revision=section.revision), plan)
    size = weight_bytes(student, _dtype_bytes(section.dtype), section.quantization)
    if section.peft is not None:
        options = section.peft.model_dump(exclude={"save", "r"})
        student = add_adapter(student, rank=section.peft.r, seed=seed, **options)
    return student, size


def _teacher(
    recipe: Recipe, student: PreTrainedModel, load: Load
) -> tuple[PreTrainedModel, dict[str, float]]:
    """Return a model without weights whose states are the teacher's, and the bytes by part."""
    section, parts = recipe.teacher, {}
    teacher = student  # if the teacher loads no weights
    for place, weights in enumerate(section.models, start=1):
        config = load_config(weights.model, revision=weights.revision)
        teacher = skeleton(config, sees_images=weights.sees_images)
        teacher = teacher.to(DTYPES[weights.dtype] or preferred_dtype(default_device()))
        # Decoder layers on the device at a time.  The shares of processes are not known here.
        resident = {"offloaded": 1, "spread": 0}.get(weights.placement)
        name = "teacher's weights" if len(section.models) == 1 else f"weights of teacher {place}"
        size = _dtype_bytes(weights.dtype)
        parts[name] = weight_bytes(teacher, size, weights.quantization, resident)
    if section.adapter is not None:
        rank, targets = section.adapter
        adapted = add_adapter(
            teacher, rank=rank, alpha=rank, targets=targets, dropout=0.0, seed=0,
            key="teacher.targets",
        )  # fmt: skip
        parts |= _trained("teacher's adapter", adapted, load)
    for place, peer in enumerate(section.students, start=1):
        model, size = _student(peer, recipe.seed)
        parts |= {f"peer {place}: weights": size} | _trained(f"peer {place}", model, load)
    if section.copies:
        trained = sum(p.numel() for p in student.parameters() if p.requires_grad)
        parts["teacher's copies of weights"] = 4.0 * section.copies * trained
    return teacher, parts


def _trained(name: str, model: PreTrainedModel, load: Load) -> dict[str, float]:
    """Return the bytes by part with which a model trains along, without its weights."""
    wanted = ("gradients", "optimizer", "activations")
    return {f"{name}: {part}": footprint(model, load)[part] for part in wanted}


def _add_objectives(
    parts: dict[str, float],
    recipe: Recipe,
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    load: Load,
) -> None:
    """Add the bytes of inner states, projectors and several losses over the vocabulary.

    Raises ModelError for a layer that a model does not have, or a layer map that does not fit.
    """
    configs = [model.config.get_text_config() for model in (student, teacher)]
    states, projectors = 0.0, 0
    objectives = build_objectives(recipe.objectives)
    # The activations of each pass are kept until the backward pass.
    augmented = [one for one in objectives if isinstance(one, AugmentedObjective)]
    parts["activations"] *= 1 + len(augmented)
    if any(one.needs_teacher_gradients for one in augmented):
        parts["teacher's activations"] = activation_bytes(teacher, load)
    num_losses = sum(Need.DISTRIBUTION in one.student_needs for one in objectives)
    parts["copies of the head"] = head_bytes(student, load, num_losses) if num_losses else 0.0
    for objective in objectives:
        objective.prepare(*configs)
        sides = (objective.student_needs, objective.teacher_needs)
        for model, config, needs in zip((student, teacher), configs, sides, strict=True):
            check_taps(model, needs)
            states += sum(config.hidden_size for need in needs if need.layer is not None)
        projectors += sum(parameter.numel() for parameter in objective.parameters())
    if states:
        parts["inner states"] = 4.0 * load.tokens * states
    if projectors:
        parts["projectors"] = (8.0 + optimizer_bytes(load.optimizer)) * projectors


def seconds_per_step(recipe: Recipe) -> dict[str, tuple[float, float | None]]:
    """Measure the seconds of a step on this machine, for each way in which it can be written.

    Each value is (seconds, share of the steps); the share is None if it adapts during training.
    Two steps are made for each way, without saving anything, and the second one is timed.
    """
    recipe = recipe.model_copy(update={"teacher": recipe.teacher.busiest()})
    tokenizer = load_student_tokenizer(recipe)
    train, _ = load_data(recipe, tokenizer)
    teacher, student = load_pair(recipe, tokenizer, train)
    found = {}
    for rollout, share in recipe.rollout.branches:
        changes = {"rollout": rollout, "training": recipe.training | TWO_STEPS}
        trial = recipe.model_copy(update=changes | {"evaluate": recipes.EvaluateRecipe()})
        with tempfile.TemporaryDirectory() as folder:
            arguments = training_arguments(trial, Path(folder))
            trainer = build_trainer(trial, arguments, teacher, student, tokenizer, train)
            clock = StepClock()
            trainer.add_callback(clock)
            trainer.train()
        # The first step also allocates memory and tries out block sizes.  What the teacher wrote
        # ahead is for both steps.
        seconds = clock.seconds[-1] + trainer.seconds_ahead / NUM_STEPS
        found[rollout.who_writes] = (seconds, share)
    return found


def num_steps(recipe: Recipe, train: EncodedRows) -> int:
    """Return the number of optimizer steps of the whole run on one device."""
    training = recipe.training
    # The length of a stream is not known, so its recipe sets max_steps.
    if training.get("max_steps", -1) > 0 or not isinstance(train, PromptDataset):
        return int(training["max_steps"])
    rows = int(training.get("per_device_train_batch_size", 8))
    window = rows * int(training.get("gradient_accumulation_steps", 1))
    return math.ceil(training.get("num_train_epochs", 3.0) * math.ceil(len(train) / window))


def _longest(recipe: Recipe, train: EncodedRows) -> int:
    """Return the tokens of the longest prompt and the longest response together."""
    rows = train.head(LOOKED_AT)
    prompt = max(len(row.prompt_ids) for row in rows)
    # The dataset's responses matter only if the rollout uses them.
    answer = max(len(row.response_ids or ()) for row in rows)
    return prompt + max(recipe.rollout.new_tokens, answer * recipe.rollout.takes_data)


def _dtype_bytes(dtype: str) -> float:
    """Return the bytes of one number in a recipe's dtype, where `auto` depends on the device."""
    return float((DTYPES[dtype] or preferred_dtype(default_device())).itemsize)
