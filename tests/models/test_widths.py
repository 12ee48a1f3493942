"""Narrower MLPs and fewer heads: the active ones are kept, and what is left is a whole model."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, StableLmConfig, StableLmForCausalLM

from llmdistill.errors import ModelError
from llmdistill.models.carve import Plan, carve
from llmdistill.models.widths import head_activity, neuron_activity
from tests import toy
from tests.support.models import SIZES, family

IDS = torch.randint(3, 60, (3, 9), generator=torch.Generator().manual_seed(1))
MASK = torch.ones_like(IDS)
# Widths of the toys: 4 heads in 2 groups, MLPs of 48 (families) or 96 (toy teacher) neurons.
CAN = ["Llama", "Qwen2", "Qwen3", "Mistral", "Gemma2", "Gemma3", "Granite", "Cohere"]


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


def cut(model, **plan):
    return carve(model, Plan(**plan), IDS, MASK)


def silence(model, layer: int, *, neurons=(), group: int | None = None) -> None:
    """These neurons, and the heads of this group, hand on nothing."""
    block = model.model.layers[layer]
    with torch.no_grad():
        block.mlp.up_proj.weight[list(neurons)] = 0
        if group is not None:
            size = block.self_attn.v_proj.out_features // 2
            block.self_attn.v_proj.weight[group * size : (group + 1) * size] = 0


@pytest.mark.parametrize("name", CAN)
def test_a_narrow_model_loads_and_writes_as_it_was_saved(name, tmp_path):
    model = family(name)
    student = cut(model, mlp_width=20, heads=2)
    assert student.num_parameters() < model.num_parameters()
    assert student.config.intermediate_size == 20
    assert (student.config.num_attention_heads, student.config.num_key_value_heads) == (2, 1)
    student.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=False).eval()
    torch.testing.assert_close(logits(loaded), logits(student), rtol=0, atol=1e-6)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "attention_mask": MASK}
    cached = student.generate(IDS, **options)
    assert torch.equal(cached, student.generate(IDS, use_cache=False, **options))


@pytest.mark.parametrize("name", CAN)
def test_the_whole_width_is_the_whole_model(name):
    model = family(name)
    torch.testing.assert_close(
        logits(cut(model, mlp_width=48, heads=4)), logits(model), rtol=0, atol=1e-6
    )


def test_what_hands_on_nothing_is_what_goes():
    """Other neurons and another group in every layer; without them nothing changes."""
    model = toy.teacher_model()
    silent = [range(40), range(30, 70), range(50, 90), range(0, 80, 2)]
    for layer, neurons in enumerate(silent):
        silence(model, layer, neurons=neurons, group=layer % 2)
    student = cut(model, mlp_width=56, heads=2)
    torch.testing.assert_close(logits(student), logits(model), rtol=0, atol=1e-5)
    assert (logits(cut(model, mlp_width=55)) - logits(model)).abs().max() > 1e-4


def test_the_model_itself_stays_whole():
    model = toy.teacher_model()
    before = logits(model)
    student = cut(model, layers=[0, 2], mlp_width=8, heads=2)
    for parameter in student.parameters():
        parameter.data.zero_()
    assert torch.equal(logits(model), before)
    assert model.config.intermediate_size == 96


def test_activity_is_the_size_of_what_is_handed_on():
    """By hand, from what the projections of layer 1 are given; padding does not count."""
    model = toy.teacher_model()
    seen = {}
    block = model.model.layers[1]
    for name, layer in (("mlp", block.mlp.down_proj), ("heads", block.self_attn.o_proj)):
        layer.register_forward_pre_hook(lambda _m, args, name=name: seen.update({name: args[0]}))
    mask_BT = MASK.clone()
    mask_BT[0, 6:] = 0
    neurons = neuron_activity(model, IDS, mask_BT)[1]
    real = mask_BT.bool()
    torch.testing.assert_close(neurons, seen["mlp"][real].pow(2).mean(0).sqrt())
    heads = head_activity(model, IDS, mask_BT)[1]
    torch.testing.assert_close(heads, seen["heads"][real].reshape(-1, 4, 12).norm(dim=-1).mean(0))


def test_no_hook_is_left():
    model = toy.teacher_model()
    cut(model, mlp_width=8, heads=2)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({"mlp_width": 97}, "got 97, but an MLP of this model has 96"),
        ({"mlp_width": 0}, "got 0"),
        ({"heads": 3}, "Use a multiple of 2"),
        ({"heads": 8}, "the model has 4 heads"),
    ],
)
def test_widths_that_do_not_fit_are_refused(plan, message):
    with pytest.raises(ModelError, match=message):
        cut(toy.teacher_model(), **plan)


@pytest.mark.parametrize(
    ("name", "plan"),
    [
        ("GPT2", {"mlp_width": 8}),
        ("GPT2", {"heads": 2}),
        ("GPTNeoX", {"heads": 2}),
        ("Phi3", {"mlp_width": 8}),
        ("Mixtral", {"mlp_width": 8}),
    ],
)
def test_families_of_another_form_are_refused_by_name(name, plan):
    with pytest.raises(ModelError, match=f"{name}.* Carve only whole layers"):
        cut(family(name), **plan)


def test_a_family_that_would_load_with_other_shapes_is_refused():
    """StableLM takes the size of a head from their number, whatever the configuration says."""
    config = StableLmConfig(**{k: v for k, v in SIZES.items() if k != "initializer_range"})
    with pytest.raises(ModelError, match="when it is loaded"):
        cut(StableLmForCausalLM(config).eval(), heads=2)


def test_a_norm_over_all_heads_is_refused():
    with pytest.raises(ModelError, match="q_norm"):
        cut(family("Olmo2"), heads=2)
    assert cut(family("Olmo2"), mlp_width=8).config.intermediate_size == 8
