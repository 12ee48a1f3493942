"""Carving copies layers, renumbers them, and leaves the teacher alone."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import nn
from transformers import SmolLM3ForCausalLM

from llmdistill.errors import ModelError
from llmdistill.models.carve import (
    Plan,
    carve,
    evenly_spaced,
    influence,
    keep_layers,
    most_influential,
)
from llmdistill.models.layers import decoder_layers
from tests.support.models import family

KEPT = [0, 2, 3]


@pytest.fixture
def ids_BT():
    return torch.randint(3, 250, (2, 8), generator=torch.Generator().manual_seed(1))


def logits(model, ids_BT):
    with torch.no_grad():
        return model(input_ids=ids_BT, use_cache=False).logits


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def make_identity(model, layer: int) -> None:
    """Both branches of a block add zero to the residual stream."""
    nn.init.zeros_(model.model.layers[layer].self_attn.o_proj.weight)
    nn.init.zeros_(model.model.layers[layer].mlp.down_proj.weight)


def test_kept_layers_are_bit_equal_copies(teacher_model):
    student = keep_layers(teacher_model, KEPT)
    assert len(decoder_layers(student)) == 3
    for ours, theirs in enumerate(KEPT):
        mine = student.model.layers[ours].state_dict()
        for name, value in teacher_model.model.layers[theirs].state_dict().items():
            assert torch.equal(mine[name], value), (ours, name)
    for name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"):
        assert torch.equal(student.state_dict()[name], teacher_model.state_dict()[name])


def test_a_student_shares_no_memory_with_its_teacher(teacher_model):
    student = keep_layers(teacher_model, KEPT)
    theirs = {value.data_ptr() for value in teacher_model.state_dict().values()}
    assert not theirs & {value.data_ptr() for value in student.state_dict().values()}
    assert student.config is not teacher_model.config


def test_tied_weights_stay_tied(teacher_model):
    student = keep_layers(teacher_model, KEPT)
    assert student.lm_head.weight is student.model.embed_tokens.weight


def test_the_teacher_is_unchanged(teacher_model, ids_BT):
    before, logits_before = state(teacher_model), logits(teacher_model, ids_BT)
    config = copy.deepcopy(teacher_model.config)
    student = keep_layers(teacher_model, [3, 1])
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.zero_()
    assert len(decoder_layers(teacher_model)) == 4
    assert [block.self_attn.layer_idx for block in teacher_model.model.layers] == [0, 1, 2, 3]
    assert teacher_model.config.to_dict() == config.to_dict()
    assert all(torch.equal(value, before[name]) for name, value in state(teacher_model).items())
    assert torch.equal(logits(teacher_model, ids_BT), logits_before)


def test_the_teacher_is_whole_after_a_copy_that_failed(teacher_model, monkeypatch):
    def fail(_model):
        raise MemoryError

    monkeypatch.setattr(copy, "deepcopy", fail)
    with pytest.raises(MemoryError):
        keep_layers(teacher_model, [0])
    assert len(decoder_layers(teacher_model)) == 4


def test_config_and_blocks_count_anew(teacher_model):
    student = keep_layers(teacher_model, KEPT)
    assert student.config.num_hidden_layers == 3
    assert [block.self_attn.layer_idx for block in student.model.layers] == [0, 1, 2]


def test_layer_types_are_those_of_the_kept_layers():
    kinds = ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]
    student = keep_layers(family("Gemma2", num_hidden_layers=4, layer_types=kinds), [1, 3])
    assert student.config.layer_types == ["full_attention", "sliding_attention"]


def test_every_list_of_one_entry_a_layer_is_cut(ids_BT, tmp_path):
    """SmolLM3 says layer by layer where positions are rotated."""
    options = {"vocab_size": 300, "num_hidden_layers": 8, "bos_token_id": 1, "eos_token_id": 2}
    student = keep_layers(family("SmolLM3", **options), [0, 3, 4, 7])
    assert student.config.no_rope_layers == [1, 0, 1, 0]
    student.save_pretrained(tmp_path)
    loaded = SmolLM3ForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(logits(loaded, ids_BT), logits(student, ids_BT), rtol=0, atol=1e-6)


def test_gpt2_can_be_carved():
    student = keep_layers(family("GPT2", n_layer=3), [0, 2])
    assert student.config.n_layer == 2
    ids_BT = torch.tensor([[5, 6, 7, 8]])
    cached = student.generate(ids_BT, max_new_tokens=5, do_sample=False, pad_token_id=0)
    plain = student.generate(
        ids_BT, max_new_tokens=5, do_sample=False, pad_token_id=0, use_cache=False
    )
    assert torch.equal(cached, plain)


def test_a_carved_model_generates_the_same_with_and_without_a_cache(teacher_model, ids_BT):
    student = keep_layers(teacher_model, [1, 3])
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": 2}
    options["attention_mask"] = torch.ones_like(ids_BT)
    cached = student.generate(ids_BT, **options)
    assert torch.equal(cached, student.generate(ids_BT, use_cache=False, **options))
    assert not torch.equal(cached, teacher_model.generate(ids_BT, **options))


def test_a_carved_model_survives_saving(teacher_model, ids_BT, tmp_path):
    student = keep_layers(teacher_model, [1, 3])
    student.save_pretrained(tmp_path)
    loaded = type(student).from_pretrained(tmp_path)
    assert torch.equal(logits(loaded, ids_BT), logits(student, ids_BT))


def test_keeping_all_layers_keeps_the_logits(teacher_model, ids_BT):
    student = keep_layers(teacher_model, range(4))
    assert torch.equal(logits(student, ids_BT), logits(teacher_model, ids_BT))


def test_the_order_of_the_layers_is_the_given_one(teacher_model, ids_BT):
    forth, back = (logits(keep_layers(teacher_model, o), ids_BT) for o in ([0, 1], [1, 0]))
    assert (forth - back).abs().max() > 1e-3


@pytest.mark.parametrize("layers", [[], [4], [-1], [0, 9]])
def test_layers_that_are_not_there_are_refused(teacher_model, layers):
    with pytest.raises(ModelError, match="the model has 4 layers. Use indices from 0 to 3"):
        keep_layers(teacher_model, layers)


def test_a_layer_kept_twice_is_refused_or_copied(teacher_model):
    """Either is fine; one block at two places, tied and under one cache number, is not."""
    try:
        student = keep_layers(teacher_model, [1, 1])
    except ModelError:
        return
    assert student.model.layers[0] is not student.model.layers[1]
    assert [block.self_attn.layer_idx for block in student.model.layers] == [0, 1]


@pytest.mark.parametrize(
    ("kept", "fits"), [(0, False), (1, True), (4, True), (5, False), (-1, False)]
)
def test_the_number_of_layers_is_checked(teacher_model, ids_BT, kept, fits):
    if fits:
        student = carve(teacher_model, Plan(layers=kept), ids_BT, torch.ones_like(ids_BT))
        assert len(decoder_layers(student)) == kept
    else:
        with pytest.raises(ModelError, match=f"got {kept}, but the model has 4 layers"):
            carve(teacher_model, Plan(layers=kept), ids_BT, torch.ones_like(ids_BT))


@pytest.mark.parametrize(
    ("layers", "kept", "expected"),
    [
        (6, 1, [0]),
        (6, 2, [0, 5]),
        (7, 3, [0, 3, 6]),
        (12, 4, [0, 4, 7, 11]),
        (5, 5, [0, 1, 2, 3, 4]),
        (1, 1, [0]),
    ],
)
def test_evenly_spaced(layers, kept, expected):
    assert evenly_spaced(layers, kept) == expected


@pytest.mark.parametrize("layers", range(1, 14))
def test_evenly_spaced_never_takes_a_layer_twice(layers):
    for kept in range(1, layers + 1):
        assert len(set(evenly_spaced(layers, kept))) == kept


def test_most_influential_in_the_models_order():
    assert most_influential(torch.tensor([0.3, 0.1, 0.9, 0.2, 0.8]), 3) == [0, 2, 4]


@pytest.mark.parametrize("layer", [0, 2, 3])
def test_an_identity_block_has_no_influence(teacher_model, ids_BT, layer):
    make_identity(teacher_model, layer)
    found = influence(teacher_model, ids_BT, torch.ones_like(ids_BT))
    assert found.shape == (4,)
    assert found.argmin() == layer
    assert found[layer].abs() < 1e-6
    assert found.sort().values[1] > 1e-3
    assert layer not in most_influential(found, 3)


def test_influence_is_one_minus_the_cosine_of_the_residual_stream(teacher_model, ids_BT):
    with torch.no_grad():
        states = teacher_model.model(ids_BT, output_hidden_states=True).hidden_states
    # The last of these has passed the final norm, so the last layer is left out.
    expected = [
        1 - torch.cosine_similarity(a, b, dim=-1).mean() for a, b in itertools.pairwise(states[:-1])
    ]
    found = influence(teacher_model, ids_BT, torch.ones_like(ids_BT))
    torch.testing.assert_close(found[:-1], torch.stack(expected), atol=1e-6, rtol=1e-5)


def test_padding_does_not_change_influence(teacher_model, ids_BT):
    plain = influence(teacher_model, ids_BT, torch.ones_like(ids_BT))
    padded_BT = torch.cat([ids_BT, torch.full((2, 5), 7)], dim=1)
    mask_BT = torch.cat([torch.ones_like(ids_BT), torch.zeros(2, 5, dtype=torch.long)], dim=1)
    torch.testing.assert_close(influence(teacher_model, padded_BT, mask_BT), plain)
    unmasked = influence(teacher_model, padded_BT, torch.ones_like(padded_BT))
    assert (unmasked - plain).abs().max() > 1e-4


def test_influence_leaves_no_hooks(teacher_model, ids_BT):
    influence(teacher_model, ids_BT, torch.ones_like(ids_BT))
    assert not any(module._forward_hooks for module in teacher_model.modules())


def test_a_sample_of_many_rows_is_read_a_few_at_a_time(teacher_model, ids_BT, monkeypatch):
    """Ragged rows in several batches give what they give in one."""
    many_BT = torch.randint(3, 250, (11, 9), generator=torch.Generator().manual_seed(2))
    mask_BT = (torch.arange(9) < torch.arange(11)[:, None] % 7 + 2).long()
    widths = []
    teacher_model.model.register_forward_pre_hook(
        lambda _m, args, kwargs: widths.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    found = influence(teacher_model, many_BT, mask_BT)
    assert [rows for rows, _ in widths] == [8, 3]
    assert widths[1][1] < 9  # columns that none of its rows needs are left out
    monkeypatch.setattr("llmdistill.models.activations.ROWS", 11)
    torch.testing.assert_close(influence(teacher_model, many_BT, mask_BT), found)
