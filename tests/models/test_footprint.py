"""The estimate of memory: exact for weights, within a quarter for what a step takes."""

from __future__ import annotations

import json
import subprocess
import sys
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
    head_bytes,
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


# A step over a large head, in a fork for each case, so that no case reuses memory of another one.
PEAKS = """
import json, os, sys
import torch
from llmdistill.batch import Sequences
from llmdistill.objectives.response import ResponseObjective
from llmdistill.sampling import Writer
from llmdistill.teachers.local import LocalTeacher
from llmdistill.training.step import Distillation
from scripts import benchmark
from tests import toy

torch.set_num_threads(1)


def peak(tied, half, accumulates, rows):
    options = {"hidden": 512, "layers": 1, "rows": rows, "intermediate_size": 64}
    teacher = toy.model(hidden=16, layers=1, rows=rows)
    local = LocalTeacher(teacher, toy.tokenizer())
    student = toy.model(**options, tie_word_embeddings=tied)
    both = Distillation(student, local, [ResponseObjective()], toy.tokenizer())
    # As with a tokenizer of almost as many ids.
    both.num_tokens = local.num_tokens = rows - 100
    ids = [[5 + i % 200 for i in range(65)]] * 4
    sequences = Sequences.pack([x[:1] for x in ids], [x[1:] for x in ids], range(4),
                               writer=Writer.DATA, pad_id=0)
    for parameter in student.parameters() if accumulates else ():
        parameter.grad = torch.zeros_like(parameter).add_(0)
    benchmark.reset_peak()
    before = benchmark.peak_mib()
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        loss = both(sequences).loss
    loss.backward()
    return benchmark.peak_mib() - before


for case in json.loads(sys.argv[1]):
    if os.fork() == 0:
        try:
            print(json.dumps([case, peak(*case)]), flush=True)
        finally:
            os._exit(0)
    os.wait()
"""
CASES = [
    (tied, half, accumulates, 50_000)
    for tied in (False, True)
    for half in (False, True)
    for accumulates in (False, True)
]


@pytest.fixture(scope="module")
def peaks():
    """The MiB that a step takes above weights and the gradients that there are, by case."""
    command = [sys.executable, "-c", PEAKS, json.dumps(CASES)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = [json.loads(line) for line in done.stdout.splitlines()]
    return {tuple(case): peak for case, peak in found}


@pytest.mark.parametrize("case", CASES)
def test_a_step_over_a_large_head_takes_what_is_estimated(peaks, case):
    tied, half, accumulates, rows = case
    student = toy.model(
        hidden=512, layers=1, rows=rows, intermediate_size=64, tie_word_embeddings=tied
    )
    load = Load(
        tokens=4 * 65, written_tokens=0, product_bytes=2.0 if half else 4.0, accumulates=accumulates
    )
    parts = footprint(student, load)
    names = ["activations", "chunks of logits", "copies of the head"]
    found = sum(parts[name] for name in names)
    # At the peak there are no other gradients yet than the head's, if there are none of before.
    found += 0 if accumulates else 4 * student.lm_head.weight.numel()
    assert found / 2**20 == pytest.approx(peaks[case], rel=0.25)


def test_tied_embeddings_have_a_gradient_where_chunks_are_smaller():
    student = toy.model(hidden=512, layers=1, rows=5000)
    found = head_bytes(student, replace(LOAD, tokens=16))
    assert found == 4 * 5000 * 512 - 3 * 4 * 16 * 5000


def test_a_frozen_head_is_copied_and_several_losses_have_gradients():
    student = toy.model(tie_word_embeddings=False)
    numbers = student.lm_head.weight.numel()
    half = replace(LOAD, product_bytes=2.0)
    assert head_bytes(student, LOAD) == 0
    assert head_bytes(student, half) == 2 * numbers
    assert head_bytes(student, half, num_losses=3) == (2 + 2 * 4) * numbers
    student.requires_grad_(False)
    assert head_bytes(student, replace(half, accumulates=True), num_losses=3) == 2 * numbers
