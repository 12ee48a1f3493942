"""N0, N5, N6 and the weights: objectives on a real (tiny) pair."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from llmdistill.batch import StudentView
from llmdistill.errors import RecipeError
from llmdistill.forward import read, teacher_signal
from llmdistill.models.heads import Head
from llmdistill.objectives.response import CrossEntropyObjective, ResponseObjective
from llmdistill.protocols import Need
from llmdistill.sampling import Writer
from llmdistill.teachers.local import LocalTeacher
from tests import toy
from tests.support.objectives import LargestTensor

OBJECTIVES = {
    "forward_kl": lambda: ResponseObjective("forward_kl"),
    "reverse_kl": lambda: ResponseObjective("reverse_kl"),
    "jsd": lambda: ResponseObjective("jsd", beta=0.3, temperature=2.0),
    "scaled": lambda: ResponseObjective("jsd", beta=0.3, temperature=2.0, scale_by_t2=True),
    "sequence_mean": lambda: ResponseObjective(token_weight="sequence_mean"),
    "cross_entropy": CrossEntropyObjective,
}
each_objective = pytest.mark.parametrize("name", OBJECTIVES)


def views(sequences, student, teacher):
    needs = frozenset({Need.DISTRIBUTION})
    signal = teacher_signal(teacher, sequences, toy.NUM_TOKENS, needs)
    return read(student, sequences, toy.NUM_TOKENS), signal


@each_objective
def test_equals_a_dense_loss_with_its_own_shift(name, student, teacher_model, tokenizer):
    """The reference shifts logits and labels by hand, from the whole model's output."""
    sequences = toy.sequences()
    loss = OBJECTIVES[name]()(
        *views(sequences, student, LocalTeacher(teacher_model, tokenizer)), sequences
    )
    with torch.no_grad():
        inputs = {
            "input_ids": sequences.input_ids_BT,
            "attention_mask": sequences.attention_mask_BT,
        }
        student_log = student(**inputs).logits[:, :-1, : toy.NUM_TOKENS].log_softmax(-1)
        teacher_log = teacher_model(**inputs).logits[:, :-1, : toy.NUM_TOKENS].log_softmax(-1)
    labels, mask = sequences.input_ids_BT[:, 1:], sequences.response_mask_BT[:, 1:]
    if name == "cross_entropy":
        dense = -student_log.gather(-1, labels[..., None])[..., 0]
    elif name == "reverse_kl":
        dense = (student_log.exp() * (student_log - teacher_log)).sum(-1)
    elif name in ("jsd", "scaled"):
        s, t = (student_log / 2).log_softmax(-1), (teacher_log / 2).log_softmax(-1)
        m = (0.3 * t.exp() + 0.7 * s.exp()).log()
        dense = 0.3 * (t.exp() * (t - m)).sum(-1) + 0.7 * (s.exp() * (s - m)).sum(-1)
        dense = dense * (4 if name == "scaled" else 1)
    else:
        dense = (teacher_log.exp() * (teacher_log - student_log)).sum(-1)
    if name == "sequence_mean":
        dense = dense / mask.sum(1, keepdim=True)
    torch.testing.assert_close(loss.total, (dense * mask).sum(), rtol=1e-4, atol=1e-4)
    assert loss.num_tokens == mask.sum()


@each_objective
def test_gradient_reaches_exactly_the_states_that_predict(name, student, teacher_model, tokenizer):
    """N5: zero at prompt (but its last token), padding and last positions, and nowhere else."""
    sequences = toy.sequences()
    hidden = torch.randn(*sequences.input_ids_BT.shape, 32, requires_grad=True)
    _, signal = views(sequences, student, LocalTeacher(teacher_model, tokenizer))
    head = Head(torch.randn(toy.NUM_TOKENS, 32))
    view = StudentView(hidden[sequences.predictor_mask_BT], head)
    OBJECTIVES[name]()(view, signal, sequences).total.backward()
    touched = hidden.grad.abs().sum(-1) > 0
    expected = torch.zeros_like(touched)
    for row, (prompt_end, end) in enumerate(spans(sequences)):
        expected[row, prompt_end - 1 : end - 1] = True
    assert torch.equal(touched, expected)
    assert not torch.equal(expected, sequences.response_mask_BT)  # the fixture tells the two apart


def spans(sequences):
    """(first response column, column after the last) of each row, read off the masks."""
    for mask in sequences.response_mask_BT:
        columns = mask.nonzero()[:, 0]
        yield int(columns[0]), int(columns[-1]) + 1


@each_objective
def test_makes_no_tensor_of_n_x_v(name, student, teacher_model, tokenizer):
    sequences = toy.sequences(40, longest=30)
    teacher = LocalTeacher(teacher_model, tokenizer)
    objective = OBJECTIVES[name]()
    objective.chunk_size = 16
    num_predicted = int(sequences.num_predicted.sum())
    assert num_predicted * toy.NUM_TOKENS > 2 * student.get_output_embeddings().weight.numel()
    view, signal = views(sequences, student, teacher)
    with LargestTensor() as watch:
        objective(view, signal, sequences).total.backward()
    assert watch.largest < num_predicted * toy.NUM_TOKENS


@each_objective
def test_changes_some_gradient_by_its_weight(name, student, teacher_model, tokenizer):
    sequences = toy.sequences()
    objective = OBJECTIVES[name]()
    objective(
        *views(sequences, student, LocalTeacher(teacher_model, tokenizer)), sequences
    ).total.backward()
    assert max(p.grad.abs().max() for p in student.parameters()) > 1e-3


@each_objective
def test_no_predicted_token_is_a_finite_zero(name, student, teacher_model, tokenizer):
    sequences = toy.sequences().without_loss(torch.ones(5, dtype=torch.bool))
    loss = OBJECTIVES[name]()(
        *views(sequences, student, LocalTeacher(teacher_model, tokenizer)), sequences
    )
    loss.total.backward()
    assert loss.total.item() == 0
    assert loss.num_tokens.item() == 0
    assert all(torch.isfinite(p.grad).all() for p in student.parameters() if p.grad is not None)


def test_cross_entropy_leaves_out_what_the_student_wrote(student, teacher_model, tokenizer):
    sequences = toy.sequences()
    teacher = LocalTeacher(teacher_model, tokenizer)
    whole = CrossEntropyObjective()(*views(sequences, student, teacher), sequences).total
    writers = sequences.writer_BT.clone()
    writers[1:] = int(Writer.STUDENT)
    mixed = replace(sequences, writer_BT=writers)
    first = sequences.without_loss(torch.tensor([False, True, True, True, True]))
    kept = CrossEntropyObjective()(*views(mixed, student, teacher), mixed)
    alone = CrossEntropyObjective()(*views(first, student, teacher), first)
    torch.testing.assert_close(kept.total, alone.total)
    assert kept.num_tokens == sequences.num_predicted.sum()  # weights are never renormalised
    assert not torch.isclose(kept.total, whole)


def test_the_chunk_size_changes_nothing(student, teacher_model, tokenizer):
    sequences = toy.sequences()
    teacher = LocalTeacher(teacher_model, tokenizer)
    totals = [
        ResponseObjective(chunk_size=size)(*views(sequences, student, teacher), sequences).total
        for size in (1, 7, 256)
    ]
    torch.testing.assert_close(totals[0], totals[1])
    torch.testing.assert_close(totals[0], totals[2])


def test_unknown_names_and_options_are_refused():
    with pytest.raises(RecipeError, match="unknown divergence 'kl'. Use one of forward_kl"):
        ResponseObjective("kl")
    with pytest.raises(RecipeError, match="'forward_kl' has no option 'beta'"):
        ResponseObjective("forward_kl", beta=0.5)
    with pytest.raises(RecipeError, match="unknown target"):
        ResponseObjective(target="nobody")
    with pytest.raises(RecipeError, match="unknown token_weight"):
        ResponseObjective(token_weight="none")
