"""Families with a trait that carving or measuring could get wrong: right, or refused by name."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from llmdistill.batch import Prompts
from llmdistill.errors import ModelError
from llmdistill.models.carve import Plan, carve, influence, keep_layers
from llmdistill.models.heads import check_split
from llmdistill.models.load import load_model
from llmdistill.models.widths import neuron_activity

SIZES = {
    "vocab_size": 272, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 6,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "initializer_range": 0.15,
}  # fmt: skip
GPT2 = {"n_embd": 64, "n_layer": 6, "n_head": 4, "n_positions": 512}
GPT_NEO = {
    "num_layers": 6, "num_heads": 4, "attention_types": [[["global", "local"], 3]],
    "window_size": 16,
}  # fmt: skip
RWKV = {"attention_hidden_size": 64}
QWEN3_NEXT = {
    "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16,
    "shared_expert_intermediate_size": 32, "linear_num_value_heads": 4, "linear_num_key_heads": 2,
    "linear_key_head_dim": 16, "linear_value_head_dim": 16,
}  # fmt: skip


def made(kind: str, **more):
    """A model whose norms and biases are not at their defaults."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **(SIZES | more)))
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data.add_(0.3 * torch.randn_like(parameter))
    return model.eval().float()


@pytest.fixture
def text():
    ids = torch.randint(3, 259, (5, 24), generator=torch.Generator().manual_seed(0))
    return ids, torch.ones_like(ids)


@pytest.mark.parametrize(
    ("kind", "more"),
    [("diffllama", {}), ("gpt2", GPT2 | {"scale_attn_by_inverse_layer_idx": True})],
)
def test_blocks_that_compute_with_their_number_cannot_be_moved(kind, more, text, tmp_path):
    """Such a student was another model once it was saved and loaded."""
    model = made(kind, **more)
    with pytest.raises(ModelError, match="computes with the number of each layer"):
        carve(model, Plan(layers=[1, 2, 4, 5]), *text)
    first = carve(model, Plan(layers=[0, 1, 2]), *text)  # these keep their numbers
    first.save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path), dtype="float32")
    with torch.no_grad():
        assert torch.equal(first(input_ids=text[0]).logits, loaded(input_ids=text[0]).logits)


@pytest.mark.parametrize(
    ("kind", "more"), [("gpt_neo", GPT_NEO), ("rwkv", RWKV), ("llama", {}), ("gpt2", GPT2)]
)
def test_a_carved_model_writes(kind, more, text):
    """GPT-Neo and RWKV call the number of a layer `layer_id`."""
    student = carve(made(kind, **more), Plan(layers=[0, 1, 5]), *text)
    with torch.no_grad():
        student(input_ids=text[0], use_cache=False)
    assert student.generate(text[0][:1], max_new_tokens=4, do_sample=False).shape == (1, 28)


def test_weights_that_a_carved_model_would_lack_are_named(text):
    """Only the first block of RWKV has a norm before it."""
    with pytest.raises(ModelError, match=r"rwkv\.blocks\.0\.pre_ln\.(weight|bias) has shape None"):
        carve(made("rwkv", **RWKV), Plan(layers=[1, 2, 4]), *text)


def test_a_hybrid_keeps_some_attention(text):
    model = made("qwen3_next", **QWEN3_NEXT)
    with pytest.raises(ModelError, match=r"leaves no attention layer.*with one of \[3\]"):
        carve(model, Plan(layers=[0, 1, 2]), *text)
    student = carve(model, Plan(layers=[0, 3, 5]), *text)
    student.generate(text[0][:1], max_new_tokens=3, do_sample=False)


def test_padding_that_is_read_as_text_is_refused():
    with pytest.raises(ModelError, match="RwkvForCausalLM reads padding as text"):
        check_split(made("rwkv", **RWKV))
    for kind, more in (("mamba", {}), ("gpt2", GPT2), ("bloom", {"n_layer": 2, "n_head": 4})):
        check_split(made(kind, **more))


ROWS = [[7] * 5, list(range(10, 33)), [9], list(range(40, 52)), list(range(60, 90)), [5, 6]]


@pytest.mark.parametrize(
    ("kind", "more"),
    [("gpt2", GPT2), ("gpt_neo", GPT_NEO), ("biogpt", {}), ("llama", {}), ("hunyuan_v1_dense", {"head_dim": 16})],
)  # fmt: skip
def test_layers_are_measured_where_the_text_stands(kind, more):
    """Padding on the left, as rows come, moves no token to another position."""
    model = made(kind, **more)
    packed = Prompts.pack(ROWS, range(len(ROWS)), pad_id=0)
    found = influence(model, packed.input_ids_BP, packed.attention_mask_BP)
    alone = [
        (influence(model, torch.tensor([row]), torch.ones(1, len(row))), len(row)) for row in ROWS
    ]
    expected = sum(one * count for one, count in alone) / sum(map(len, ROWS))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_neurons_are_measured_where_the_text_stands():
    model = made("llama")
    packed = Prompts.pack(ROWS, range(len(ROWS)), pad_id=0)
    found = neuron_activity(model, packed.input_ids_BP, packed.attention_mask_BP).square()
    alone = [
        (neuron_activity(model, torch.tensor([row]), torch.ones(1, len(row))).square(), len(row))
        for row in ROWS
    ]
    expected = sum(one * count for one, count in alone) / sum(map(len, ROWS))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "mask", [torch.zeros(2, 3, dtype=torch.long), torch.zeros(0, 3, dtype=torch.long)]
)
def test_an_empty_sample_is_refused(mask):
    with pytest.raises(ModelError, match="the sample text is empty"):
        influence(made("llama"), torch.zeros_like(mask), mask)


@pytest.mark.parametrize("layers", [True, [True, False]])
def test_a_bool_is_no_layer(layers, text):
    with pytest.raises(ModelError, match=r"carve\.layers: got"):
        carve(made("llama"), Plan(layers=layers), *text)


def test_a_list_of_tokens_is_no_list_of_layers():
    model = made("llama")
    model.config.suppress_tokens = [1, 2, 3, 4, 5, 6]
    model.config.layer_marks = list("abcdef")
    student = keep_layers(model, [1, 4])
    assert student.config.suppress_tokens == [1, 2, 3, 4, 5, 6]
    assert student.config.layer_marks == ["b", "e"]


def test_a_quantised_model_is_not_carved(text):
    model = made("llama")
    model.is_quantized = True
    for plan in (Plan(layers=3), Plan(heads=2), Plan(mlp_width=8)):
        with pytest.raises(ModelError, match="the model is quantised"):
            carve(model, plan, *text)
