"""Files of a checkpoint: the student in the format that any library loads, and the rest.

    model.safetensors, config.json, tokenizer ...   the student
    objectives.safetensors                          parameters of objectives (projectors), if any
    teacher.safetensors                             weights of a teacher that changes, if any
    rollout.json, or rollout_0.json ...             state of each rank's rollout, if it has any
    stream.json                                     place in a stream, if the rows are one
    manifest.json                                   the seal (`seal.py`)

Trainer adds the optimizer, the scheduler, the random state and its own state.  This package writes
no pickle, and no file contains a token or a key.
"""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch
from torch import Tensor

from llmdistill.errors import CheckpointError
from llmdistill.models.adapters import merged_state
from llmdistill.models.heads import unwrap_adapters
from llmdistill.models.load import OWN_PADDING
from llmdistill.protocols import Follows, Rollout, Stateful, Teacher
from llmdistill.training.step import Distillation

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

STUDENT_PREFIX = "student."
# Trained parts of `Distillation` other than the student, and the file of each.
TEACHER_FILE = "teacher.safetensors"
PARTS = {"objectives": "objectives.safetensors", "trained_teacher": TEACHER_FILE}


def save_student(
    distillation: Distillation, folder: Path, state: dict[str, Tensor] | None = None
) -> None:
    """Write the student and its tokenizer into `folder`.

    `state` is the state of the whole module if a wrapper has gathered it; None reads the student.
    """
    student = distillation.student
    weights = None if state is None else _once_each(student, _under(state, STUDENT_PREFIX))
    # Nothing changes the number of tokens, so an adapter needs no copy of the embeddings.  PEFT
    # would ask the Hub for the base model to find that out.
    is_adapter = hasattr(student, "peft_config")
    options: dict[str, Any] = {"save_embedding_layers": False} if is_adapter else {}
    with _own_card(folder):
        student.save_pretrained(folder, state_dict=weights, **options)
    if is_adapter:  # PEFT saves none, and the base model's may list other end tokens
        unwrap_adapters(student).generation_config.save_pretrained(folder)
    save_tokenizer(distillation.tokenizer, folder)


def export(
    distillation: Distillation,
    folder: Path,
    state: dict[str, Tensor],
    *,
    merged: bool,
    dtype: torch.dtype | None,
) -> None:
    """Write the model that is the result of the run, and its tokenizer.

    `state` is that of the whole module.  The weights are written in `dtype`, or in their own if it
    is None; an adapter that is saved alone keeps its own.  Raises ModelError if an adapter to merge
    is not plain LoRA.
    """
    model = distillation.exported
    is_adapter = hasattr(model, "peft_config")
    if is_adapter and not merged:
        return save_student(distillation, folder, state)
    weights = _under(state, STUDENT_PREFIX)
    if model is not distillation.student:
        weights = model.state_dict()
    elif is_adapter:
        # `merged_state` leaves the student as it is, so training can continue after an export.
        weights, model = merged_state(model, weights), model.get_base_model()
    weights = _once_each(model, weights)
    if dtype is not None:
        weights = _cast(weights, dtype)
    model.save_pretrained(folder, state_dict=weights)
    if dtype is not None:  # transformers writes the dtype of the model in memory
        config = copy.deepcopy(model.config)
        config.dtype = dtype
        config.save_pretrained(folder)
    save_tokenizer(distillation.tokenizer, folder)


def save_parts(
    distillation: Distillation, folder: Path, state: dict[str, Tensor] | None = None
) -> None:
    """Write one file for each trained part other than the student, if it has any tensors."""
    if isinstance(distillation.teacher, Follows) and (kept := distillation.teacher.state_dict()):
        safetensors.torch.save_file(kept, folder / TEACHER_FILE)
    state = distillation.state_dict() if state is None else state
    frozen = _frozen_teacher(distillation)
    for part, file in PARTS.items():
        tensors = _under({k: v for k, v in state.items() if k not in frozen}, f"{part}.")
        if tensors:
            safetensors.torch.save_file(_once(tensors), folder / file)


@contextlib.contextmanager
def _own_card(folder: Path) -> Iterator[None]:
    """Leave the card of a folder as it was: PEFT writes one with the path of the base model."""
    card = folder / "README.md"
    before = card.read_bytes() if card.is_file() else None
    try:
        yield
    finally:
        card.unlink(missing_ok=True)
        if before is not None:
            card.write_bytes(before)


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a tokenizer with the padding token that its files had.

    Whoever masks padding by its id would otherwise mask the end token, too.
    """
    ours = tokenizer.pad_token
    tokenizer.pad_token = getattr(tokenizer, OWN_PADDING, ours)
    try:
        tokenizer.save_pretrained(folder)
    finally:
        tokenizer.pad_token = ours


def _once_each(model: PreTrainedModel, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of a model, each tied one under one name.

    What DeepSpeed and FSDP2 gather are copies, which `save_pretrained` would not know to be tied.
    """
    tied = getattr(model, "all_tied_weights_keys", {})
    return {name: one for name, one in weights.items() if tied.get(name) not in weights}


def _cast(weights: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Return weights in another dtype.  Tied weights stay tied, or each would be saved."""
    made: dict[Any, Tensor] = {}
    for one in weights.values():
        key = (one.data_ptr(), one.shape, one.stride())
        if key not in made:
            made[key] = one.to(dtype) if one.is_floating_point() else one
    return {k: made[v.data_ptr(), v.shape, v.stride()] for k, v in weights.items()}


def _once(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Keep one name of each tied weight, because safetensors refuses shared memory."""
    # The shape and stride are compared, too: a view can start at the same address.
    by_place = {(t.data_ptr(), t.shape, t.stride()): name for name, t in tensors.items()}
    return {name: tensors[name] for name in by_place.values()}


def _frozen_teacher(distillation: Distillation) -> set[str]:
    """Return the names of the teacher's frozen parameters, which its own model provides."""
    named = distillation.named_parameters(remove_duplicate=False)  # tied weights by every name
    return {
        name
        for name, parameter in named
        if name.startswith("trained_teacher.") and not parameter.requires_grad
    }


def save_rollout(rollout: Rollout, folder: Path, rank: int | None) -> None:
    """Write the state of this rank's rollout, if it has any; `rank` is None for one process."""
    if isinstance(rollout, Stateful):
        text = json.dumps(rollout.state_dict())
        (folder / _rollout_name(rank)).write_text(text, encoding="utf-8")


def load(distillation: Distillation, folder: Path) -> None:
    """Load a checkpoint's student, objectives and teacher in place.

    Raises CheckpointError if a file or a weight is missing, damaged or unexpected.
    """
    _load_student(distillation.student, folder)
    load_follower(distillation.teacher, folder)
    frozen = _frozen_teacher(distillation)
    for part, file in PARTS.items():
        wanted = [k for k in distillation.state_dict() if k.startswith(f"{part}.")]
        if not (wanted := [name for name in wanted if name not in frozen]):
            continue
        found = _read_part(folder, file)
        module = getattr(distillation, part)
        live = module.state_dict(keep_vars=True)
        loaded = {id(tensor) for name, tensor in live.items() if name in found}
        names = [name.removeprefix(f"{part}.") for name in wanted]
        # Of tied weights only one name is saved, so tensors are compared and not names.
        missing = [name for name in names if id(live[name]) not in loaded]
        unexpected = module.load_state_dict(found, strict=False).unexpected_keys
        _refuse_unfit(folder / file, missing, unexpected)


def load_follower(teacher: Teacher, folder: Path) -> None:
    """Load the weights of a teacher that follows the student, if it has any.

    Raises CheckpointError if they are missing or do not fit.
    """
    if isinstance(teacher, Follows) and (wanted := teacher.state_dict()):
        found = _read_part(folder, TEACHER_FILE)
        missing, unexpected = sorted(wanted.keys() - found), sorted(found.keys() - wanted)
        _refuse_unfit(folder / TEACHER_FILE, missing, unexpected)
        teacher.load_state_dict(found)


def _read_part(folder: Path, file: str) -> dict[str, Tensor]:
    """Return the tensors of a part's file.  Raises CheckpointError if it is missing or damaged."""
    if not (folder / file).is_file():
        raise CheckpointError(
            f"{folder} has no {file}, but this run has weights to load from it. Resume from "
            "another checkpoint, or use the recipe that this one was made with."
        )
    return _read(folder, file)


def load_rollout(rollout: Rollout, folder: Path, rank: int | None) -> None:
    """Load the state of this rank's rollout, if it keeps any.

    Raises CheckpointError if the file of this rank is missing.
    """
    if not isinstance(rollout, Stateful):
        return
    path = folder / _rollout_name(rank)
    if not path.is_file():
        raise CheckpointError(
            f"{folder} has no {path.name}: it was written with another kind of rollout or another "
            "number of processes. Resume with the same rollout and number of processes."
        )
    rollout.load_state_dict(json.loads(path.read_text(encoding="utf-8")))


def _rollout_name(rank: int | None) -> str:
    # Trainer names the files of random states in the same way.
    return "rollout.json" if rank is None else f"rollout_{rank}.json"


def _load_student(student: PreTrainedModel, folder: Path) -> None:
    """Load the student's weights, or its adapter's if it has one.

    Raises CheckpointError if they do not fit.
    """
    if hasattr(student, "peft_config"):  # only the adapter was saved
        from peft import set_peft_model_state_dict

        loaded = _read(folder, "adapter_model.safetensors")
        missing = set_peft_model_state_dict(student, loaded).missing_keys
        missing = [name for name in missing if "lora_" in name]  # base weights are not saved
        unexpected: list[str] = []
    else:
        result = student.load_state_dict(_read(folder, "model.safetensors"), strict=False)
        tied = set(student.all_tied_weights_keys)  # saved under another name
        missing = [name for name in result.missing_keys if name not in tied]
        unexpected = result.unexpected_keys
        student.tie_weights()
    _refuse_unfit(folder, missing, unexpected)


def _refuse_unfit(place: Path, missing: list[str], unexpected: list[str]) -> None:
    """Raise CheckpointError if there are missing or unexpected weights."""
    if missing or unexpected:
        raise CheckpointError(
            f"{place} does not fit this run: missing {missing[:3]}, unexpected {unexpected[:3]}. "
            "It belongs to another model. Use the recipe that it was made with."
        )


def _read(folder: Path, name: str) -> dict[str, Tensor]:
    """Return the tensors of one safetensors file, or of the shards that its index lists.

    Raises CheckpointError if a file is missing or damaged.
    """
    index = folder / f"{name}.index.json"
    names = [name]
    if index.is_file():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    tensors: dict[str, Tensor] = {}
    for part in names:
        try:
            tensors.update(safetensors.torch.load_file(folder / part))
        except Exception as error:
            raise CheckpointError(
                f"cannot read {folder / part}: {error}. Resume from another checkpoint."
            ) from error
    return tensors


def _under(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors whose names start with `prefix`, without it in their names."""
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in state.items()
        if name.startswith(prefix)
    }
