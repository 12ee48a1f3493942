"""Taps take what a forward pass makes, in every family, and under all that may surround it.

B = sequences, T = tokens, H = hidden size, D = width of all heads together.
"""

from __future__ import annotations

import sys

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from llmdistill.errors import ModelError
from llmdistill.models.heads import split
from llmdistill.models.layers import decoder_layers
from llmdistill.models.taps import Need, check_taps, taps
from tests import toy
from tests.support.models import FAMILIES, family

IDS_BT = torch.randint(1, 61, (3, 4), generator=torch.Generator().manual_seed(1))
PARTS = (Need.QUERIES, Need.KEYS, Need.VALUES)


def run(model, needs, ids_BT=IDS_BT):
    with taps(model, needs) as found:
        output = split(model)[0](input_ids=ids_BT, use_cache=False)
    return found, output


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_hidden_states_are_those_between_the_layers(name):
    """Against transformers' own record: the embeddings, and the states after each layer but the
    last, which it gives after the final norm.
    """
    model = family(name)
    needs = [Need.HIDDEN.after(layer) for layer in (0, 1, 2, -1)]
    found, _ = run(model, needs)
    expected = split(model)[0](input_ids=IDS_BT, output_hidden_states=True, use_cache=False)
    torch.testing.assert_close(found[needs[0]], expected.hidden_states[0])
    torch.testing.assert_close(found[needs[1]], expected.hidden_states[1])
    assert torch.equal(found[needs[2]], found[needs[3]])
    assert not torch.allclose(found[needs[1]], found[needs[2]])


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_queries_keys_and_values_are_those_before_the_rotation(name, monkeypatch):
    """Against what the family's own rotation and attention are handed.  T = heads = 4, so a layout
    that is mixed up does not show in the shape.
    """
    model = family(name, attn_implementation="eager")
    seen: dict[str, list[torch.Tensor]] = {"q": [], "k": [], "v": []}
    module = sys.modules[type(model).__module__]
    rotate = getattr(module, "apply_rotary_pos_emb", None)

    def spy_rotation(q, k, *args, **kwargs):
        seen["q"].append(q.clone())
        seen["k"].append(k.clone())
        return rotate(q, k, *args, **kwargs)

    attend = module.eager_attention_forward

    def spy_attention(layer, query, key, value, *args, **kwargs):
        if rotate is None:  # GPT-2 adds positions to its embeddings
            seen["q"].append(query.clone())
            seen["k"].append(key.clone())
        seen["v"].append(value.clone())
        return attend(layer, query, key, value, *args, **kwargs)

    if rotate is not None:
        monkeypatch.setattr(module, "apply_rotary_pos_emb", spy_rotation)
    monkeypatch.setattr(module, "eager_attention_forward", spy_attention)
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "eager", spy_attention)
    needs = [part.after(2) for part in PARTS]
    found, _ = run(model, needs)
    for need, name_of_part in zip(needs, "qkv", strict=True):
        heads_BNTD = seen[name_of_part][-1]
        expected_BTD = heads_BNTD.transpose(1, 2).flatten(2)
        torch.testing.assert_close(found[need], expected_BTD)
        assert found[need].shape[:2] == IDS_BT.shape


def test_nothing_needed_costs_nothing():
    model = toy.model()
    with taps(model, [Need.DISTRIBUTION]) as found:
        assert not any(module._forward_hooks for module in model.modules())
    assert found == {}


def test_hooks_are_gone_after_the_pass_and_after_an_error():
    model = toy.model()
    run(model, [Need.HIDDEN.after(1), Need.KEYS.after(2)], torch.tensor([[1, 2]]))
    with pytest.raises(RuntimeError, match="boom"), taps(model, [Need.HIDDEN.after(1)]):
        raise RuntimeError("boom")
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("need", "said"),
    [
        (
            Need.HIDDEN.after(4),
            "layer 4 does not exist: LlamaForCausalLM has 3 decoder layers. Use 0",
        ),
        (Need.HIDDEN.after(-4), "layer -4 does not exist: LlamaForCausalLM has 3 decoder layers"),
        (Need.QUERIES.after(0), "Use 1 to 3"),
    ],
)
def test_a_layer_that_is_not_there_is_named(need, said):
    with pytest.raises(ModelError, match=said):
        check_taps(toy.model(), [need])


def test_an_attention_of_another_form_is_named():
    model = toy.model()
    del decoder_layers(model)[1].self_attn.k_proj
    check_taps(model, [Need.HIDDEN.after(2), Need.QUERIES.after(2)])
    with pytest.raises(ModelError, match="does not know how LlamaDecoderLayer computes its keys"):
        check_taps(model, [Need.KEYS.after(2)])


@pytest.mark.parametrize("name", ["CodeGen", "GPTBigCode", "Bloom"])
def test_families_that_cut_one_layer_in_another_way_are_refused(name):
    """Their queries would be taken for keys."""
    options = {"n_embd": 32, "n_head": 4, "n_layer": 2, "vocab_size": 61, "rotary_dim": 4}
    config = getattr(transformers, f"{name}Config")(**options, hidden_size=32)
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    check_taps(model, [Need.HIDDEN.after(1)])
    for part in PARTS:
        with pytest.raises(
            ModelError, match=rf"llmdistill does not know how {name}\w+ computes its {part.what}"
        ):
            check_taps(model, [part.after(1)])


# ---- gradients, and what surrounds a pass ----

STATES = [Need.HIDDEN.after(0), Need.HIDDEN.after(1), *(part.after(2) for part in PARTS)]


def loss_of(found) -> torch.Tensor:
    return sum((i + 1) * state.float().square().mean() for i, state in enumerate(found.values()))


def gradients(model, needs=STATES):
    model.zero_grad()
    found, output = run(model, needs, IDS_BT)
    (loss_of(found) + output.last_hidden_state.square().mean()).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.filterwarnings("ignore")  # the compiler warns of its own insides
@pytest.mark.parametrize("surrounding", ["checkpointing", "compiled", "both"])
def test_gradients_are_the_same_under(surrounding):
    """Checkpointing runs each layer again in the backward pass, when nothing may be taken."""
    plain, other = toy.model().train(), toy.model().train()
    if surrounding != "compiled":
        other.activation_checkpointing_enable()
    if surrounding != "checkpointing":
        for layer in (decoder_layers(other)[0], decoder_layers(other)[2]):  # 1 is seen from within
            layer.compile(backend="aot_eager")
    expected, found = gradients(plain), gradients(other)
    assert expected.keys() == found.keys()
    assert expected["model.layers.1.self_attn.k_proj.weight"].abs().max() > 1e-4
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.filterwarnings("ignore")  # the compiler warns of its own insides
def test_a_compiled_layer_shows_its_output_though_it_was_run_before():
    """Hooks that come later are not seen by a compiled layer, so its call is wrapped."""
    model = toy.model()
    layer = decoder_layers(model)[0]
    layer.compile(backend="aot_eager")
    split(model)[0](input_ids=IDS_BT, use_cache=False)
    compiled = layer._compiled_call_impl
    need = Need.HIDDEN.after(1)
    first, _ = run(model, [need])
    expected, _ = run(toy.model(), [need])
    torch.testing.assert_close(first[need], expected[need], rtol=1e-4, atol=1e-5)
    assert layer._compiled_call_impl is compiled


def test_under_an_adapter_the_adapted_states_are_taken():
    torch.manual_seed(0)
    adapted = get_peft_model(
        toy.model(), LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    )
    need = Need.QUERIES.after(1)
    with torch.no_grad():
        found, _ = run(adapted, [need])
        plain, _ = run(toy.model(), [need])
    assert (found[need] - plain[need]).abs().max() > 1e-3
    layer = decoder_layers(adapted)[0]
    with torch.no_grad():
        embedded = adapted.get_input_embeddings()(IDS_BT)
        expected = layer.self_attn.q_proj(layer.input_layernorm(embedded))
    torch.testing.assert_close(found[need], expected)


def test_under_autocast_states_have_its_dtype():
    need = Need.HIDDEN.after(1)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found, _ = run(toy.model(), [Need.QUERIES.after(1), need])
    assert found[Need.QUERIES.after(1)].dtype == torch.bfloat16


def test_the_kind_of_a_need_is_what_a_teacher_provides():
    need = Need.HIDDEN.after(3, "all")
    assert need.kind == Need.HIDDEN
    assert str(need) == "hidden states of layer 3"
    assert len({need, Need.HIDDEN.after(3, "all"), Need.HIDDEN.after(3)}) == 2
