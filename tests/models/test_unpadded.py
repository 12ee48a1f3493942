"""A batch in one row without padding gives the same states, losses and gradients as a padded one.

The attention is a toy that takes lengths, as flash attention does, in float64.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers.integrations.neftune import activate_neftune, deactivate_neftune

from llmdistill.forward import read
from llmdistill.models.taps import Need
from llmdistill.models.unpadded import reads_without_padding
from llmdistill.objectives.ckd import CkdObjective
from llmdistill.objectives.features import HiddenObjective
from llmdistill.objectives.minilm import MiniLMObjective
from llmdistill.objectives.response import ResponseObjective
from llmdistill.teachers.local import LocalTeacher
from llmdistill.training.step import Distillation
from tests import toy
from tests.support.attention import NAME, by_lengths
from tests.support.models import FAMILIES, family, sliding

WITHOUT_SOFTCAP = [name for name in FAMILIES if name != "Gemma2"]  # the toy has none
SEQUENCES = toy.sequences(5)
NUM_REAL = int(SEQUENCES.attention_mask_BT.sum())
NEEDS = [Need.HIDDEN.after(1), Need.HIDDEN.after(0, "all"), Need.QUERIES.after(2, "all")]


@pytest.fixture
def calls():
    with by_lengths() as calls:
        yield calls


def with_lengths(model):
    """Return the model with the attention that takes lengths."""
    model.base_model.config._attn_implementation = NAME
    return model


def small(sequences):
    """Return the sequences with ids below 61, the vocabulary of the families."""
    return replace(sequences, input_ids_BT=sequences.input_ids_BT % 60 + 1)


def test_the_rows_are_ragged():
    assert len(set(SEQUENCES.attention_mask_BT.sum(1).tolist())) > 2


@pytest.mark.parametrize("name", WITHOUT_SOFTCAP)
@torch.no_grad()
def test_states_are_those_of_the_padded_batch(name, calls):
    # The experts of Mixtral are multiplied by a function without float64.
    options = {"experts_implementation": "eager"} if name == "Mixtral" else {}
    model, batch = family(name, **options).double(), small(SEQUENCES)
    expected = read(model, batch, 61, NEEDS)
    assert calls == []
    found = read(with_lengths(model), batch, 61, NEEDS)
    assert calls[-1] == (1, NUM_REAL)
    torch.testing.assert_close(found.hidden_NH, expected.hidden_NH)
    for need in NEEDS:
        torch.testing.assert_close(found.states[need], expected.states[need])


@torch.no_grad()
def test_windows_end_with_their_sequence(calls):
    model = sliding("Mistral")
    expected = read(model, SEQUENCES, toy.NUM_TOKENS)
    found = read(with_lengths(model), SEQUENCES, toy.NUM_TOKENS)
    assert calls[-1] == (1, NUM_REAL)
    torch.testing.assert_close(found.hidden_NH, expected.hidden_NH)


@torch.no_grad()
def test_padding_on_the_left_is_left_out_too(calls):
    model = toy.model().double()
    batch = SEQUENCES
    for name in ("input_ids_BT", "attention_mask_BT", "response_mask_BT"):
        rows = zip(getattr(SEQUENCES, name), SEQUENCES.attention_mask_BT, strict=True)
        moved = [row.roll(int((mask == 0).sum())) for row, mask in rows]
        batch = replace(batch, **{name: torch.stack(moved)})
    expected = read(model, batch, toy.NUM_TOKENS)
    found = read(with_lengths(model), batch, toy.NUM_TOKENS)
    torch.testing.assert_close(found.hidden_NH, expected.hidden_NH)


def losses(objectives, attention, *, peft=False, dtype=torch.float64):
    """Return the loss of one micro-batch and the gradient of each parameter."""
    torch.manual_seed(0)
    student, taught_by = toy.model().to(dtype), toy.teacher_model().to(dtype)
    if attention == NAME:
        with_lengths(student), with_lengths(taught_by)
    if peft:
        torch.manual_seed(0)
        config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
        student = get_peft_model(student, config, autocast_adapter_dtype=False).to(dtype)
    tokenizer = toy.tokenizer()
    made = Distillation(student, LocalTeacher(taught_by, tokenizer), objectives(), tokenizer)
    made.to(dtype).train()
    loss = made(SEQUENCES).loss
    loss.backward()
    return loss, {n: p.grad for n, p in made.named_parameters() if p.grad is not None}


OBJECTIVES = {
    "response": lambda: [ResponseObjective("forward_kl")],
    "hidden": lambda: [HiddenObjective(layers="uniform", tokens="all"), ResponseObjective("jsd")],
    "minilm": lambda: [MiniLMObjective()],
    "ckd": lambda: [CkdObjective()],
}


@pytest.mark.parametrize("peft", [False, True])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_losses_and_gradients_are_those_of_the_padded_batch(name, peft, calls):
    expected, slopes = losses(OBJECTIVES[name], "sdpa", peft=peft)
    assert calls == []
    found, found_slopes = losses(OBJECTIVES[name], NAME, peft=peft)
    assert calls[-1] == (1, NUM_REAL)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    assert found_slopes.keys() == slopes.keys()
    assert any(slope.abs().max() > 1e-4 for slope in slopes.values())
    for parameter, slope in slopes.items():
        torch.testing.assert_close(found_slopes[parameter], slope, rtol=1e-6, atol=1e-6)


def test_so_are_they_in_float32(calls):
    expected, slopes = losses(OBJECTIVES["response"], "sdpa", dtype=torch.float32)
    found, found_slopes = losses(OBJECTIVES["response"], NAME, dtype=torch.float32)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    for parameter, slope in slopes.items():
        torch.testing.assert_close(found_slopes[parameter], slope, rtol=1e-5, atol=1e-6)


def test_the_trial_leaves_the_pass_that_is_trained_as_it_was(calls):
    """Without gradients within autocast, it could leave casts of weights that have none."""
    model = with_lengths(toy.model()).train()
    with torch.autocast("cpu", torch.bfloat16):
        read(model, SEQUENCES, toy.NUM_TOKENS).hidden_NH.float().square().sum().backward()
    weights = model.base_model.layers.named_parameters()
    assert [name for name, weight in weights if weight.grad is None] == []
    assert all(module.training for module in model.modules())


# ---- what stays padded ----


@torch.no_grad()
def test_changed_embeddings_stay_padded(calls):
    model = toy.model().double()
    shapes = []

    def twice(embed, ids_BT):
        shapes.append(ids_BT.shape)
        return 2 * embed(ids_BT)

    batch = replace(SEQUENCES, embedding_change=twice)
    expected = read(model, batch, toy.NUM_TOKENS)
    found = read(with_lengths(model), batch, toy.NUM_TOKENS)
    assert shapes == [SEQUENCES.input_ids_BT.shape] * 2
    torch.testing.assert_close(found.hidden_NH, expected.hidden_NH)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_other_attention_stays_padded(implementation):
    model = toy.model(attn_implementation=implementation)
    assert not reads_without_padding(model)


@torch.no_grad()
def test_a_convolution_across_sequences_stays_padded(calls):
    model = family(
        "Lfm2", layer_types=["conv", "full_attention"], block_auto_adjust_ff_dim=False
    ).double()
    expected = read(model, small(SEQUENCES), 61)
    found = read(with_lengths(model), small(SEQUENCES), 61)
    assert calls[-1] == tuple(SEQUENCES.input_ids_BT.shape)
    torch.testing.assert_close(found.hidden_NH, expected.hidden_NH)


def test_noise_that_depends_on_the_length_of_a_row_stays_padded(calls):
    model = with_lengths(toy.model())
    assert reads_without_padding(model)
    embeddings = model.get_input_embeddings()
    other = embeddings.register_forward_hook(lambda *_: None)  # such as those of FSDP2
    assert reads_without_padding(model)
    handle = activate_neftune(model, 5.0)
    assert not reads_without_padding(model)
    deactivate_neftune(model, handle)
    assert reads_without_padding(model)
    other.remove()


def test_the_trial_runs_once_for_each_attention(calls, monkeypatch):
    model = with_lengths(toy.model())
    assert reads_without_padding(model)
    before = len(calls)
    assert reads_without_padding(model)
    assert len(calls) == before
