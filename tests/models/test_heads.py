"""head(backbone(x)) gives the model's own logits, in every family, with adapters and narrowed."""

from __future__ import annotations

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn

from llmdistill.errors import ModelError
from llmdistill.models.heads import Head, check_split, split, unwrap_adapters
from tests import toy
from tests.support.models import FAMILIES, family

pytestmark = pytest.mark.upgrade
LORA_TARGETS = {"GPT2": ["c_attn"], "Phi3": ["qkv_proj"], "GPTNeoX": ["query_key_value"]}
LORA_TARGETS["Mixtral"] = ["q_proj", "o_proj"]


def through_head(model, ids_BT, mask_BT):
    backbone, head = split(model)
    hidden = backbone(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False).last_hidden_state
    return head(hidden)


@pytest.fixture
def batch():
    ids_BT = torch.randint(1, 61, (3, 7), generator=torch.Generator().manual_seed(1))
    mask_BT = torch.ones_like(ids_BT)
    mask_BT[1, 5:] = 0
    return ids_BT, mask_BT


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_head_of_backbone_is_the_model(name, batch):
    model = family(name)
    expected = model(batch[0], attention_mask=batch[1]).logits
    assert expected.std() > 0.1  # flat logits would agree with anything
    torch.testing.assert_close(through_head(model, *batch), expected, atol=1e-5, rtol=1e-5)
    check_split(model)


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_head_of_backbone_is_the_model_with_adapters(name, batch):
    plain = family(name)
    before = plain(batch[0], attention_mask=batch[1]).logits
    targets = LORA_TARGETS.get(name, ["q_proj", "down_proj"])
    adapted = get_peft_model(
        plain,
        LoraConfig(
            r=4, target_modules=targets, init_lora_weights=False, fan_in_fan_out=name == "GPT2"
        ),
    ).eval()
    expected = adapted(input_ids=batch[0], attention_mask=batch[1]).logits
    assert (expected - before).abs().max() > 1e-2  # the adapters do something
    torch.testing.assert_close(through_head(adapted, *batch), expected, atol=1e-5, rtol=1e-5)
    check_split(adapted)


@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("Gemma2", "final_logit_softcapping"),
        ("Cohere", "logit_scale"),
        ("Granite", "logits_scaling"),
    ],
)
@torch.no_grad()
def test_what_a_family_does_to_its_logits_matters_here(name, option, batch):
    """Guards the tests above: without this step, the logits would be others."""
    model = family(name)
    backbone, head = split(model)
    bare = Head(head.weight_VH)(backbone(input_ids=batch[0]).last_hidden_state)
    assert (bare - model(batch[0]).logits).abs().max() > 0.1


@torch.no_grad()
def test_bias_scale_and_cap_come_in_this_order():
    head = Head(torch.tensor([[2.0]]), torch.tensor([1.0]), scale=0.5, softcap=3.0)
    expected = 3.0 * torch.tanh(torch.tensor(0.5 * (2.0 * 4.0 + 1.0) / 3.0))
    torch.testing.assert_close(head(torch.tensor([[4.0]])), expected.reshape(1, 1))


def test_narrow_keeps_the_first_tokens():
    head = Head(torch.randn(7, 3), torch.randn(7), scale=0.5, softcap=2.0)
    hidden_NH = torch.randn(4, 3)
    narrow = head.narrow(5)
    assert narrow.num_tokens == 5
    torch.testing.assert_close(narrow(hidden_NH), head(hidden_NH)[:, :5])


def test_narrow_to_all_is_the_head_itself_and_more_is_refused():
    head = Head(torch.randn(7, 3))
    assert head.narrow(7) is head
    with pytest.raises(ModelError, match="a head over 7 tokens to 8 tokens"):
        head.narrow(8)


def test_narrow_shares_the_weight():
    """Gradients must reach the student's own matrix."""
    weight_VH = torch.randn(7, 3, requires_grad=True)
    Head(weight_VH).narrow(5)(torch.ones(1, 3)).sum().backward()
    assert weight_VH.grad[:5].eq(1).all()
    assert weight_VH.grad[5:].eq(0).all()


def test_unwrap_adapters_leaves_other_models_as_they_are():
    model = family("Llama")
    assert unwrap_adapters(model) is model
    assert unwrap_adapters(get_peft_model(model, LoraConfig(target_modules=["q_proj"]))) is model


@pytest.mark.parametrize(
    "make", [lambda: nn.Linear(2, 2), lambda: toy.model().model], ids=["module", "backbone"]
)
def test_a_model_without_backbone_and_head_is_refused(make):
    with pytest.raises(ModelError, match="cannot be split into a base model and an output layer"):
        split(make())


def test_a_head_with_an_adapter_on_it_is_refused():
    config = LoraConfig(target_modules=["lm_head"])
    model = get_peft_model(toy.model(tie_word_embeddings=False), config)
    with pytest.raises(ModelError, match="not a plain linear layer"):
        split(model)


class Doubled(transformers.LlamaForCausalLM):
    """A family whose head does something that nobody told us of."""

    def forward(self, *args, **options):
        output = super().forward(*args, **options)
        output.logits = output.logits * 2.0
        return output


def test_check_split_finds_a_head_that_it_does_not_know():
    model = Doubled(family("Llama").config)
    with pytest.raises(ModelError, match="Doubled: head.*differs from the model's own logits"):
        check_split(model)


@pytest.mark.parametrize("training", [False, True])
def test_check_split_leaves_the_mode_as_it_was(training):
    model = family("Llama").train(training)
    model.model.layers[0].eval()  # a part that somebody froze by hand
    check_split(model)
    assert model.training is training
    assert model.lm_head.training is training
    assert not model.model.layers[0].training
