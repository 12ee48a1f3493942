"""What a checkpoint holds: the student as any library loads it, and apart from it the rest.

    model.safetensors, config.json, tokenizer ...   the student
    objectives.safetensors                          parameters of objectives (projectors), if any
    teacher.safetensors                             what trains of a teacher that trains along
    rollout.json, or rollout_0.json ...             what each rank's rollout remembers, if anything

Optimiser, scheduler, random state and Trainer's own state are written beside them by Trainer.  No
file is a pickle of ours, and no file holds a token or a key.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import safetensors.torch
from torch import Tensor

from llmdistill.errors import CheckpointError
from llmdistill.models.adapters import merged_state
from llmdistill.protocols import Rollout, Stateful
from llmdistill.training.step import Distillation

if TYPE_CHECKING:
    from transformers import PreTrainedModel

STUDENT_PREFIX = "student."
# What is trained besides the student: a part of `Distillation`, and its file.
PARTS = {"objectives": "objectives.safetensors", "trained_teacher": "teacher.safetensors"}

# Files of a checkpoint that serve to go on training; the Hub gets the student alone.
TRAINING_ONLY = [
    "optimizer*",
    "scheduler*",
    "scaler*",
    "rng_state*",
    "trainer_state*",
    *PARTS.values(),
    "rollout*.json",
]


def save_student(
    distillation: Distillation, folder: Path, state: dict[str, Tensor] | None = None
) -> None:
    """The student with its tokenizer.  `state` is the whole module's state where a wrapper gathered
    it.
    """
    students = None if state is None else _under(state, STUDENT_PREFIX)
    distillation.student.save_pretrained(folder, state_dict=students)
    distillation.tokenizer.save_pretrained(folder)


def save_merged(
    distillation: Distillation, folder: Path, state: dict[str, Tensor] | None = None
) -> None:
    """The student as a plain model, an adapter merged into its weights, with its tokenizer."""
    student = distillation.student
    if not hasattr(student, "peft_config"):
        return save_student(distillation, folder, state)
    whole = student.state_dict() if state is None else _under(state, STUDENT_PREFIX)
    student.get_base_model().save_pretrained(folder, state_dict=merged_state(student, whole))
    distillation.tokenizer.save_pretrained(folder)


def save_parts(
    distillation: Distillation, folder: Path, state: dict[str, Tensor] | None = None
) -> None:
    """What is trained besides the student, a file for each part that holds anything."""
    state = distillation.state_dict() if state is None else state
    frozen = _frozen_teacher(distillation)
    for part, file in PARTS.items():
        tensors = _under({k: v for k, v in state.items() if k not in frozen}, f"{part}.")
        if tensors:
            safetensors.torch.save_file(_once(tensors), folder / file)


def _once(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tied weights under one of their names: a file of safetensors holds no tensor twice."""
    by_place = {(t.data_ptr(), t.shape, t.stride()): name for name, t in tensors.items()}
    return {name: tensors[name] for name in by_place.values()}


def _frozen_teacher(distillation: Distillation) -> set[str]:
    """Parameters of the teacher's that do not train: they come from its own model."""
    named = distillation.named_parameters(remove_duplicate=False)  # tied weights by every name
    return {
        name
        for name, parameter in named
        if name.startswith("trained_teacher.") and not parameter.requires_grad
    }


def save_rollout(rollout: Rollout, folder: Path, rank: int | None) -> None:
    """What this rank's rollout remembers, if anything; `rank` None where there is but one."""
    if isinstance(rollout, Stateful):
        text = json.dumps(rollout.state_dict())
        (folder / _rollout_name(rank)).write_text(text, encoding="utf-8")


def load(distillation: Distillation, folder: Path) -> None:
    """Puts a checkpoint's student, objectives and teacher back; every weight must be there."""
    _load_student(distillation.student, folder)
    frozen = _frozen_teacher(distillation)
    for part, file in PARTS.items():
        wanted = [k for k in distillation.state_dict() if k.startswith(f"{part}.")]
        if not (wanted := [name for name in wanted if name not in frozen]):
            continue
        if not (folder / file).is_file():
            raise CheckpointError(f"{folder} holds no {file}, but there are weights in it to load")
        found = _read(folder, file)
        module = getattr(distillation, part)
        live = module.state_dict(keep_vars=True)
        loaded = {id(tensor) for name, tensor in live.items() if name in found}
        names = [name.removeprefix(f"{part}.") for name in wanted]
        missing = [name for name in names if id(live[name]) not in loaded]  # or tied to one that is
        unexpected = module.load_state_dict(found, strict=False).unexpected_keys
        _refuse_unfit(folder / file, missing, unexpected)


def load_rollout(rollout: Rollout, folder: Path, rank: int | None) -> None:
    if not isinstance(rollout, Stateful):
        return
    path = folder / _rollout_name(rank)
    if not path.is_file():
        raise CheckpointError(
            f"{folder} holds no {path.name}: it was written by another kind of rollout, or by "
            "another number of processes"
        )
    rollout.load_state_dict(json.loads(path.read_text(encoding="utf-8")))


def _rollout_name(rank: int | None) -> str:
    return "rollout.json" if rank is None else f"rollout_{rank}.json"


def _load_student(student: PreTrainedModel, folder: Path) -> None:
    if hasattr(student, "peft_config"):
        from peft import set_peft_model_state_dict

        loaded = _read(folder, "adapter_model.safetensors")
        missing = set_peft_model_state_dict(student, loaded).missing_keys
        missing = [name for name in missing if "lora_" in name]
        unexpected: list[str] = []
    else:
        result = student.load_state_dict(_read(folder, "model.safetensors"), strict=False)
        tied = set(student.all_tied_weights_keys)
        missing = [name for name in result.missing_keys if name not in tied]
        unexpected = result.unexpected_keys
        student.tie_weights()
    _refuse_unfit(folder, missing, unexpected)


def _refuse_unfit(place: Path, missing: list[str], unexpected: list[str]) -> None:
    if missing or unexpected:
        raise CheckpointError(
            f"{place} does not fit this run: missing {missing[:3]}, unexpected {unexpected[:3]}. "
            "It belongs to another model; give the recipe that it was made with."
        )


def _read(folder: Path, name: str) -> dict[str, Tensor]:
    """The tensors of one safetensors file, or of the shards that its index lists."""
    index = folder / f"{name}.index.json"
    names = [name]
    if index.is_file():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    tensors: dict[str, Tensor] = {}
    for part in names:
        try:
            tensors.update(safetensors.torch.load_file(folder / part))
        except Exception as error:
            raise CheckpointError(f"cannot read {folder / part}: {error}") from error
    return tensors


def _under(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in state.items()
        if name.startswith(prefix)
    }
