"""Hidden states are matched as a plain computation says, between any two layers and widths.

N = predicted tokens, M = tokens that are not padding, H = hidden size.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from llmdistill.errors import ModelError, RecipeError
from llmdistill.forward import read, teacher_signal
from llmdistill.models.heads import split
from llmdistill.objectives.features import HiddenObjective, cosine, mse
from llmdistill.teachers.local import LocalTeacher
from tests import toy

DISTANCES = {
    "mse": lambda a_NH, b_NH: ((a_NH - b_NH) ** 2).mean(-1),
    "cosine": lambda a_NH, b_NH: 1 - (a_NH * b_NH).sum(-1) / a_NH.norm(dim=-1) / b_NH.norm(dim=-1),
}


def prepared(objective, student, teacher):
    objective.prepare(student.config, teacher.config)
    return objective


def loss(objective, student, teacher, sequences):
    signal = teacher_signal(teacher, sequences, toy.NUM_TOKENS, objective.teacher_needs)
    view = read(student, sequences, toy.NUM_TOKENS, objective.student_needs)
    return objective(view, signal, sequences)


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
        HiddenObjective(distance, student_layer=layers[0], teacher_layer=layers[1], tokens=tokens),
        student,
        teacher,
    )
    found = loss(objective, student, teacher, sequences)
    mine = layer_states(student, sequences, layers[0], tokens) @ objective.projector.weight.T
    other = layer_states(teacher.model, sequences, layers[1], tokens)
    torch.testing.assert_close(found.total, DISTANCES[distance](mine, other).sum())
    assert found.num_tokens == len(mine) == objective.divisor(sequences)


def test_a_model_matches_itself_without_a_projector():
    teacher = LocalTeacher(toy.model(), toy.tokenizer())
    for distance in DISTANCES:
        objective = prepared(HiddenObjective(distance), toy.model(), teacher)
        assert isinstance(objective.projector, nn.Identity)
        assert not list(objective.parameters())
        found = loss(objective, toy.model(), teacher, toy.sequences())
        assert found.total.detach().abs() < 1e-4


def test_gradients_reach_student_and_projector_and_not_the_teacher():
    student, teacher = toy.model(), LocalTeacher(toy.teacher_model(), toy.tokenizer())
    objective = prepared(HiddenObjective(student_layer=2, teacher_layer=2), student, teacher)
    loss(objective, student, teacher, toy.sequences()).total.backward()
    reached = {name for name, p in student.named_parameters() if p.grad is not None}
    assert "model.layers.1.mlp.down_proj.weight" in reached
    assert not any("layers.2" in name for name in reached)  # above what is matched
    assert objective.projector.weight.grad.abs().max() > 0
    assert all(p.grad is None for p in teacher.model.parameters())


def test_distances_have_known_values():
    a_NH, b_NH = torch.tensor([[3.0, 4.0], [1.0, 0.0]]), torch.tensor([[3.0, 0.0], [-2.0, 0.0]])
    assert mse(a_NH, b_NH).tolist() == [8.0, 4.5]
    torch.testing.assert_close(cosine(a_NH, b_NH), torch.tensor([0.4, 2.0]))


def test_a_function_goes_where_a_distance_goes():
    def largest(student_NH, teacher_NH):
        return (student_NH - teacher_NH).abs().amax(-1)

    student, teacher = toy.model(), LocalTeacher(toy.teacher_model(hidden=32), toy.tokenizer())
    objective = prepared(
        HiddenObjective(largest, student_layer=1, teacher_layer=1), student, teacher
    )
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
    with pytest.raises(RecipeError, match="unknown distance 'l1'. Use one of mse, cosine"):
        HiddenObjective("l1")
    teacher = LocalTeacher(toy.teacher_model(), toy.tokenizer())
    objective = prepared(HiddenObjective(teacher_layer=9), toy.model(), teacher)
    with pytest.raises(
        ModelError, match="layer 9 does not exist: LlamaForCausalLM has 4 decoder layers"
    ):
        loss(objective, toy.model(), teacher, toy.sequences())
