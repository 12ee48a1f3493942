"""The estimate of memory: exact for weights, within a quarter for what autograd keeps."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from llmdistill.errors import ModelError
from llmdistill.models.adapters import add_adapter
from llmdistill.models.carve import Plan, carve
from llmdistill.models.footprint import (
    Load,
    activation_bytes,
    footprint,
    num_bytes,
    skeleton,
    weight_bytes,
)
from llmdistill.models.load import load_model
from tests import toy
from tests.support.models import family

SHAPE = {
    "vocab_size": 300, "hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 6,
    "num_attention_heads": 6, "num_key_value_heads": 2,
}  # fmt: skip
LOAD = Load(tokens=4 * 64, written_tokens=512, product_bytes=4.0)


def test_a_skeleton_has_the_size_of_the_model_and_no_weights():
    model = toy.teacher_model()
    bones = skeleton(model.config)
    assert bones.num_parameters() == model.num_parameters()
    assert all(p.is_meta for p in bones.parameters())


def test_a_carved_skeleton_has_the_size_of_the_carved_model():
    plan = Plan(layers=2, mlp_width=40, heads=2)
    ids = torch.tensor([[5, 6, 7]])
    model = carve(toy.teacher_model(), plan, ids, torch.ones_like(ids))
    assert skeleton(toy.teacher_model().config, plan).num_parameters() == model.num_parameters()


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["Llama", "Qwen2"])
def test_activations_are_what_autograd_keeps(name, checkpointing):
    student = family(name, **SHAPE).train()
    if checkpointing:
        student.activation_checkpointing_enable()
    kept = {}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    weights = {p.untyped_storage().data_ptr() for p in student.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden = student.model(torch.randint(3, 250, (4, 64)), use_cache=False).last_hidden_state
    expected = sum(kept.values())
    found = activation_bytes(student, replace(LOAD, checkpointing=checkpointing))
    if checkpointing:  # the hooks do not see what is made again, one block, in the backward pass
        found -= (activation_bytes(student, LOAD) - LOAD.tokens * 4.0 * 2 * 96) / 6
    assert hidden.requires_grad
    assert found == pytest.approx(expected, rel=0.25)


def test_the_parts():
    student, teacher = toy.model(), toy.teacher_model()
    parts = footprint(student, LOAD)
    assert weight_bytes(teacher, 2.0) == 2 * teacher.num_parameters()
    assert parts["gradients"] == 4 * student.num_parameters()
    assert parts["optimizer"] == 8 * student.num_parameters()
    # Three layers, keys and values, two heads of eight.
    assert parts["cache while writing"] == 512 * 4.0 * 3 * 2 * 2 * 8


def test_an_adapter_alone_has_gradients():
    student = add_adapter(
        skeleton(toy.model().config), rank=2, alpha=4.0, targets="all-linear", dropout=0.0, seed=0
    )
    assert footprint(student, LOAD)["gradients"] < weight_bytes(student, 4.0) / 4


def test_blocks_are_quantised_or_away_and_the_rest_is_whole():
    model = toy.teacher_model()
    one = sum(p.numel() for p in model.model.layers[0].parameters())
    rest = model.num_parameters() - 4 * one
    assert weight_bytes(model, 4.0, resident_layers=1) == 4 * (rest + one)
    assert weight_bytes(model, 4.0, "bnb_4bit") == pytest.approx(4 * rest + 0.55 * 4 * one)


def test_the_bytes_of_quantised_weights_are_those_held(tmp_path):
    model = toy.model(hidden=256, layers=2)
    assert num_bytes(model) == 4 * model.num_parameters()
    model.save_pretrained(tmp_path)
    small = load_model(str(tmp_path), dtype="float32", device="cpu", quantization="torchao_int8")
    assert num_bytes(small) == pytest.approx(weight_bytes(model, 4.0, "torchao_int8"), rel=0.02)
    assert small.num_parameters() == model.num_parameters()


@pytest.mark.parametrize("layers", [0, 9])
def test_a_number_of_layers_that_cannot_be_kept_is_named(layers):
    """`check` sees it as carving would, and before anything is loaded."""
    with pytest.raises(
        ModelError, match=rf"carve.layers: got {layers}, but the model has 4 layers"
    ):
        skeleton(toy.teacher_model().config, Plan(layers=layers))
