"""Hidden states are matched as a plain computation says, between any two layers and widths.

N = predicted tokens, M = tokens that are not padding, H = hidden size.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from llmdistill.errors import ModelError, RecipeError
from llmdistill.models.heads import split
from llmdistill.objectives import features
from llmdistill.objectives.embed_distill import EmbedDistillObjective
from llmdistill.objectives.features import (
    CkaObjective,
    HiddenObjective,
    cka,
    cosine,
    l2,
    mse,
    normalized_mse,
)
from llmdistill.objectives.rtk import RtkObjective
from llmdistill.teachers.local import LocalTeacher
from tests import toy
from tests.support.objectives import loss, prepared


def units(x_NH):
    return x_NH / x_NH.norm(dim=-1, keepdim=True)


DISTANCES = {
    "mse": lambda a_NH, b_NH: ((a_NH - b_NH) ** 2).mean(-1),
    "normalized_mse": lambda a_NH, b_NH: ((units(a_NH) - units(b_NH)) ** 2).sum(-1),
    "l2": lambda a_NH, b_NH: (a_NH - b_NH).norm(dim=-1),
    "cosine": lambda a_NH, b_NH: 1 - (a_NH * b_NH).sum(-1) / a_NH.norm(dim=-1) / b_NH.norm(dim=-1),
}


@torch.no_grad()
def layer_states(model, sequences, layer, tokens):
    """Row by row without padding: the states before each response token, or all of them."""
    found = []
    for row, response in enumerate(sequences.responses()):
        length = int(sequences.attention_mask_BT[row].sum())
        ids = sequences.input_ids_BT[row : row + 1, :length]
        states = split(model)[0](input_ids=ids, output_hidden_states=True).hidden_states[layer][0]
        found.append(states[length - len(response) - 1 : -1] if tokens == "predicted" else states)
    return torch.cat(found)


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("tokens", ["predicted", "all"])
@pytest.mark.parametrize("layers", [(1, 2), (0, 3), (2, 0)])
def test_is_a_plain_computation_through_the_projector(distance, tokens, layers):
    student, teacher = toy.model(), LocalTeacher(toy.teacher_model(), toy.tokenizer())
    sequences = toy.sequences()
    objective = prepared(
        HiddenObjective(distance, layers=[layers], tokens=tokens),
        student,
        teacher,
    )
    found = loss(objective, student, teacher, sequences)
    mine = layer_states(student, sequences, layers[0], tokens) @ objective.projectors[0].weight.T
    other = layer_states(teacher.model, sequences, layers[1], tokens)
    torch.testing.assert_close(found.total, DISTANCES[distance](mine, other).sum())
    assert found.num_tokens == len(mine) == objective.divisor(sequences)


def test_a_model_matches_itself_without_a_projector():
    teacher = LocalTeacher(toy.model(), toy.tokenizer())
    for distance in DISTANCES:
        objective = prepared(HiddenObjective(distance), toy.model(), teacher)
        assert isinstance(objective.projectors[0], nn.Identity)
        assert not list(objective.parameters())
        found = loss(objective, toy.model(), teacher, toy.sequences())
        assert found.total.detach().abs() < 1e-4


def test_gradients_reach_student_and_projector_and_not_the_teacher():
    student, teacher = toy.model(), LocalTeacher(toy.teacher_model(), toy.tokenizer())
    objective = prepared(HiddenObjective(layers=[(2, 2)]), student, teacher)
    loss(objective, student, teacher, toy.sequences()).total.backward()
    reached = {name for name, p in student.named_parameters() if p.grad is not None}
    assert "model.layers.1.mlp.down_proj.weight" in reached
    assert not any("layers.2" in name for name in reached)  # above what is matched
    assert objective.projectors[0].weight.grad.abs().max() > 0
    assert all(p.grad is None for p in teacher.model.parameters())


def test_distances_have_known_values():
    a_NH, b_NH = torch.tensor([[3.0, 4.0], [1.0, 0.0]]), torch.tensor([[3.0, 0.0], [-2.0, 0.0]])
    assert mse(a_NH, b_NH).tolist() == [8.0, 4.5]
    torch.testing.assert_close(cosine(a_NH, b_NH), torch.tensor([0.4, 2.0]))
    torch.testing.assert_close(normalized_mse(a_NH, b_NH), torch.tensor([0.8, 4.0]))
    torch.testing.assert_close(l2(a_NH, b_NH), torch.tensor([4.0, 3.0]))


@pytest.mark.parametrize("name", features.DISTANCES)
def test_the_gradient_of_a_distance_is_right(name):
    draw = torch.Generator().manual_seed(0)
    a_NH, b_NH = (torch.randn(3, 4, generator=draw, dtype=torch.float64) for _ in range(2))
    assert set(features.DISTANCES) == set(DISTANCES)
    distance = features.DISTANCES[name]
    assert torch.autograd.gradcheck(lambda x: distance(x, b_NH).sum(), a_NH.requires_grad_())
    same = a_NH.detach().clone().requires_grad_()  # a distance of 0 has a finite gradient
    distance(same, same.detach()).sum().backward()
    assert torch.isfinite(same.grad).all()


def test_normalized_distances_ignore_the_length_of_either_side():
    draw = torch.Generator().manual_seed(0)
    a_NH, b_NH = (torch.randn(3, 4, generator=draw) for _ in range(2))
    for distance in (normalized_mse, cosine):
        torch.testing.assert_close(distance(9 * a_NH, b_NH), distance(a_NH, 0.1 * b_NH))


@pytest.mark.parametrize("pool", ["mean", "last"])
def test_pooled_states_count_each_response_once(pool):
    student, teacher = toy.model(), LocalTeacher(toy.teacher_model(hidden=32), toy.tokenizer())
    sequences = toy.sequences()
    made = HiddenObjective(tokens=pool, layers=[(1, 1)])
    found = loss(prepared(made, student, teacher), student, teacher, sequences)
    assert found.num_tokens == len(sequences) == made.divisor(sequences)
    by_row = []
    for row in range(len(sequences)):
        one = sequences.select(torch.tensor([row]))
        mine, other = (layer_states(m, one, 1, "predicted") for m in (student, teacher.model))
        mine, other = (s.mean(0) if pool == "mean" else s[-1] for s in (mine, other))
        by_row.append((mine - other).square().mean())
    torch.testing.assert_close(found.total, torch.stack(by_row).sum())


def test_several_pairs_are_a_mean_with_a_projector_each():
    student, teacher = toy.model(), LocalTeacher(toy.teacher_model(), toy.tokenizer())
    torch.manual_seed(0)
    both = prepared(HiddenObjective(layers=[(1, 2), (3, 4)]), student, teacher)
    assert len(both.projectors) == 2
    totals = []
    for place, pair in enumerate([(1, 2), (3, 4)]):
        one = prepared(HiddenObjective(layers=[pair]), student, teacher)
        one.projectors = both.projectors[place : place + 1]
        totals.append(loss(one, student, teacher, toy.sequences()).total)
    found = loss(both, student, teacher, toy.sequences()).total
    torch.testing.assert_close(found, sum(totals) / 2)


@pytest.mark.parametrize("made", [HiddenObjective, EmbedDistillObjective, RtkObjective])
def test_projectors_in_bfloat16_take_wider_states(made):
    """FSDP gathers weights in bfloat16, and `bf16_full_eval` casts them."""
    student, teacher = toy.model(), LocalTeacher(toy.teacher_model(), toy.tokenizer())
    objective = prepared(made(), student, teacher)
    wanted = loss(objective, student, teacher, toy.sequences()).total
    found = loss(objective.bfloat16(), student, teacher, toy.sequences()).total
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, wanted, rtol=0.05, atol=0.05)


def test_a_student_in_half_precision_is_compared_in_float32():
    student, teacher = toy.model().bfloat16(), LocalTeacher(toy.teacher_model(), toy.tokenizer())
    objective = prepared(HiddenObjective(), student, teacher)
    with torch.autocast("cpu", torch.bfloat16):
        found = loss(objective, student, teacher, toy.sequences())
    assert found.total.dtype == torch.float32
    found.total.backward()


# ---- CKA ----


def features_of(seed, width, number=40):
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(number, width, generator=draw, dtype=torch.float64)


def slow_hsic(x_NH, y_NH):
    """Song et al. 2012, eq. 5, with Gram matrices."""
    n = len(x_NH)
    k_NN, l_NN = (s @ s.T for s in (x_NH, y_NH))
    for gram in (k_NN, l_NN):
        gram.fill_diagonal_(0)
    ones_N = torch.ones(n, dtype=x_NH.dtype)
    first = (k_NN * l_NN).sum()
    second = k_NN.sum() * l_NN.sum() / ((n - 1) * (n - 2))
    return first + second - 2 / (n - 2) * (ones_N @ k_NN @ l_NN @ ones_N)


def test_cka_is_the_unbiased_estimate_from_gram_matrices():
    x_NH, y_NH = features_of(0, 6) + 2, features_of(1, 4) + features_of(0, 6)[:, :4]
    expected = slow_hsic(x_NH, y_NH) / (slow_hsic(x_NH, x_NH) * slow_hsic(y_NH, y_NH)).sqrt()
    torch.testing.assert_close(cka(x_NH, y_NH), expected)


def test_cka_is_one_for_a_rotation_a_factor_and_a_shift():
    x_NH = features_of(0, 6)
    turn = torch.linalg.qr(features_of(5, 6, 6))[0]
    torch.testing.assert_close(cka(3 * x_NH @ turn + 1, x_NH), torch.ones((), dtype=torch.float64))


def test_cka_of_unrelated_states_is_about_zero():
    """The biased estimate would be far above 0, because there are few states for the width."""
    found = torch.stack(
        [cka(features_of(2 * s, 16, 64), features_of(2 * s + 1, 16, 64)) for s in range(30)]
    )
    assert abs(found.mean()) < 0.03


def test_the_gradient_of_cka_is_right():
    y_NH = features_of(1, 3, 6)
    x_NH = features_of(0, 4, 6).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: cka(x, y_NH), x_NH)


def test_cka_of_fewer_than_four_tokens_is_a_zero_with_a_graph():
    student, teacher = toy.model(), LocalTeacher(toy.teacher_model(), toy.tokenizer())
    few = toy.sequences(1, longest=3)
    assert 0 < few.num_predicted.sum() < 4
    objective = prepared(CkaObjective(), student, teacher)
    found = loss(objective, student, teacher, few)
    found.total.backward()
    assert found.total == 0


def test_a_function_goes_where_a_distance_goes():
    def largest(student_NH, teacher_NH):
        return (student_NH - teacher_NH).abs().amax(-1)

    student, teacher = toy.model(), LocalTeacher(toy.teacher_model(hidden=32), toy.tokenizer())
    objective = prepared(HiddenObjective(largest, layers=[(1, 1)]), student, teacher)
    sequences = toy.sequences()
    found = loss(objective, student, teacher, sequences)
    mine, other = (layer_states(m, sequences, 1, "predicted") for m in (student, teacher.model))
    torch.testing.assert_close(found.total, largest(mine, other).sum())


def test_a_batch_without_predicted_tokens_is_zero():
    student, teacher = toy.model(), LocalTeacher(toy.teacher_model(), toy.tokenizer())
    empty = toy.sequences().without_loss(torch.ones(5, dtype=torch.bool))
    objective = prepared(HiddenObjective("cosine"), student, teacher)
    found = loss(objective, student, teacher, empty)
    assert found.total == 0
    assert found.total.requires_grad


def test_rows_that_only_fill_a_batch_count_in_nothing():
    """Accelerate repeats rows to make the last batch even; their prompts weigh nothing, either."""
    student, teacher = toy.model(), LocalTeacher(toy.teacher_model(), toy.tokenizer())
    objective = prepared(HiddenObjective(tokens="all"), student, teacher)
    sequences = toy.sequences()
    filler_B = torch.tensor([False, True, False, False, True])
    silenced = sequences.without_loss(filler_B)
    real = sequences.select((~filler_B).nonzero()[:, 0])
    found, expected = (loss(objective, student, teacher, some) for some in (silenced, real))
    torch.testing.assert_close(found.total, expected.total)
    assert found.num_tokens == expected.num_tokens < sequences.attention_mask_BT.sum()


def test_an_unknown_distance_and_a_layer_that_is_not_there_are_named():
    with pytest.raises(
        RecipeError, match="unknown distance 'l1'. Use one of mse, normalized_mse, cosine, l2"
    ):
        HiddenObjective("l1")
    teacher = LocalTeacher(toy.teacher_model(), toy.tokenizer())
    objective = prepared(HiddenObjective(layers=[(-1, 9)]), toy.model(), teacher)
    with pytest.raises(
        ModelError, match="layer 9 does not exist: LlamaForCausalLM has 4 decoder layers"
    ):
        loss(objective, toy.model(), teacher, toy.sequences())
