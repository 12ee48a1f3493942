"""Deep mutual learning: students that teach each other (Zhang et al. 2018)."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from llmdistill.errors import RecipeError
from llmdistill.forward import read, teacher_signal
from llmdistill.models.load import load_model
from llmdistill.models.taps import Need
from llmdistill.objectives.divergences import forward_kl, log_probs
from llmdistill.objectives.response import CrossEntropyObjective, ResponseObjective
from llmdistill.sampling import Writer
from llmdistill.teachers.mutual import MutualTeacher
from tests import toy
from tests.conformance import entries
from tests.training.helpers import dataset, trainer, weights

NEEDS = frozenset({Need.DISTRIBUTION})


def peer(seed):
    return toy.model(seed=seed, hidden=40, layers=2)


def mutual(*seeds, **options):
    return MutualTeacher([peer(seed) for seed in seeds], toy.tokenizer(), **options)


def logits_of(model, sequences):
    view = read(model, sequences, toy.NUM_TOKENS)
    return view.head(view.hidden_NH)


def both():
    return [ResponseObjective(), CrossEntropyObjective()]


def test_the_student_learns_from_the_mean_of_the_peers():
    sequences, teacher = toy.sequences(), mutual(3, 4)
    found = teacher_signal(teacher, sequences, toy.NUM_TOKENS, NEEDS).distribution
    probs = [log_probs(logits_of(one, sequences)).exp() for one in teacher.peers]
    mean = log_probs(found.serve()[0 : len(found)]).exp()
    torch.testing.assert_close(mean, (sum(probs) / 2).detach())


@pytest.mark.parametrize("seeds", [(3,), (3, 4)])
def test_each_peer_learns_from_the_labels_and_the_mean_of_all_others(seeds):
    sequences = toy.sequences()
    teacher = mutual(*seeds, ce_weight=0.5, temperature=2.0)
    student = read(toy.model(), sequences, toy.NUM_TOKENS)
    signal = teacher_signal(teacher, sequences, toy.NUM_TOKENS, NEEDS)
    found = teacher(student.detach(), signal, sequences).total
    mine = student.head(student.hidden_NH).detach()
    everyone = [logits_of(one, sequences) for one in teacher.peers]
    expected = 0
    for place, own in enumerate(everyone):
        others = [mine, *(z.detach() for i, z in enumerate(everyone) if i != place)]
        # The mean of the probabilities, at temperature 1, is the target whose logits are heated.
        target = (sum(log_probs(z).exp() for z in others) / len(others)).log()
        kl = forward_kl(own, target, temperature=2.0).sum()
        ce = nn.functional.cross_entropy(own, sequences.targets_N, reduction="sum")
        expected = expected + 4 * kl + 0.5 * ce
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    parameters = list(teacher.parameters())
    gradients = torch.autograd.grad(expected, parameters)
    found.backward()
    for parameter, gradient in zip(parameters, gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-4)


def test_equal_peers_do_not_move_each_other():
    sequences, teacher = toy.sequences(), mutual(3, 3, ce_weight=0.0)
    student = read(peer(3), sequences, toy.NUM_TOKENS).detach()
    signal = teacher_signal(teacher, sequences, toy.NUM_TOKENS, NEEDS)
    assert teacher(student, signal, sequences).total.item() == pytest.approx(0, abs=1e-4)


def test_two_students_are_trained_alike(tmp_path):
    """With one peer the roles are equal: swapped, the same two students come out."""
    found = []
    for mine, other in ((5, 6), (6, 5)):
        teacher = mutual(other)
        made = trainer(
            tmp_path / str(mine), student=peer(mine), teacher=teacher, rows=dataset(8),
            objectives=both(), max_steps=3, optim="adamw_torch", learning_rate=0.01,
        )  # fmt: skip
        made.train()
        found.append((weights(made.model.student), weights(teacher.peers[0])))
    torch.testing.assert_close(found[0][0], found[1][1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[0][1], found[1][0], rtol=1e-4, atol=1e-5)


def test_the_students_own_tokens_are_no_labels():
    sequences = toy.sequences(writer=Writer.STUDENT)
    student = read(toy.model(), sequences, toy.NUM_TOKENS).detach()
    found = []
    for ce_weight in (0.0, 5.0):
        teacher = mutual(3, ce_weight=ce_weight)
        signal = teacher_signal(teacher, sequences, toy.NUM_TOKENS, NEEDS)
        found.append(teacher(student, signal, sequences).total.item())
    assert found[0] == found[1]


def test_all_are_exported_and_load_alone(tmp_path):
    teacher = mutual(3, 4)
    teacher.export(tmp_path)
    for number, one in enumerate(teacher.peers, start=1):
        loaded = load_model(str(tmp_path / "peers" / str(number)), dtype="float32")
        torch.testing.assert_close(weights(loaded), weights(one))


def test_a_resumed_run_is_the_same_run(tmp_path):
    options = {
        "max_steps": 4, "save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch",
        "learning_rate": 0.01, "rows": dataset(8),
    }  # fmt: skip
    whole = trainer(tmp_path, teacher=mutual(3, 4), objectives=both(), **options)
    whole.train()
    again = trainer(tmp_path, teacher=mutual(3, 4), objectives=both(), **options)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert torch.equal(weights(again.model), weights(whole.model))


def test_what_cannot_work_is_refused():
    with pytest.raises(RecipeError, match="there are no peers"):
        MutualTeacher([], toy.tokenizer())
    given = {"kind": "mutual", "peers": [{"model": "other"}]}
    with pytest.raises(RecipeError, match="all peers start as the student does"):
        entries.recipe(teacher={"kind": "mutual", "peers": [{"model": "s"}]})
    for peers, wrong in (([], "peers"), ([{"model": "s", "peft": {}}], "Remove 'peft'")):
        with pytest.raises(RecipeError, match=wrong):
            entries.recipe(teacher=given | {"peers": peers})
    with pytest.raises(RecipeError, match="cannot write"):
        entries.recipe(teacher=given, rollout={"kind": "sampled", "by": "teacher"})
    data = {"train": "x.jsonl", "hold_back": 2}
    with pytest.raises(RecipeError, match=r"Set 'evaluate.against' to one"):
        entries.recipe(teacher=given, data=data)
    entries.recipe(teacher=given, data=data, evaluate={"against": "m"})
