"""Several teachers combined: the formulas, the equivalences, and who runs."""

from __future__ import annotations

import pytest
import torch

from llmdistill.distributions import targets
from llmdistill.errors import RecipeError, VocabularyError
from llmdistill.objectives.divergences import forward_kl, log_probs
from llmdistill.objectives.response import ResponseObjective
from llmdistill.teachers.ensemble import MIXES, WEIGH, EnsembleTeacher
from llmdistill.teachers.local import LocalTeacher
from tests import toy
from tests.conformance import entries
from tests.support.spies import spy
from tests.support.teachers import experts, logits, served, signal
from tests.training.helpers import dataset, gradient


def probs(teacher):
    return log_probs(logits(teacher)).exp()


def test_a_mixture_is_the_weighted_mean_of_the_probabilities():
    teachers = experts()
    found = probs(EnsembleTeacher(teachers, weights=[1, 2, 5]))
    expected = sum(w / 8 * probs(t) for w, t in zip([1, 2, 5], teachers, strict=True))
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(
        probs(EnsembleTeacher(teachers)), sum(probs(t) for t in teachers) / 3
    )


def test_a_geometric_mean_is_the_weighted_mean_of_the_logits():
    teachers = experts(2)
    found = logits(EnsembleTeacher(teachers, mix="geometric", weights=[3, 1]))
    expected = 0.75 * logits(teachers[0]) + 0.25 * logits(teachers[1])
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("weigh", WEIGH)
def test_one_teacher_or_the_same_one_twice_is_that_teacher(tmp_path, mix, weigh):
    """N13."""
    if (mix, weigh) == ("sum", "confidence"):
        return  # refused
    (one,) = experts(1)
    expected = gradient(tmp_path / "one", teacher=one, rows=dataset(8))
    for teachers in ([one], [one, one]):
        ensemble = EnsembleTeacher(teachers, mix=mix, weigh=weigh)
        found = gradient(tmp_path / f"{len(teachers)}", teacher=ensemble, rows=dataset(8))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("weigh", WEIGH)
def test_the_order_of_the_teachers_does_not_matter(tmp_path, mix, weigh):
    if (mix, weigh) == ("sum", "confidence"):
        return
    weights = [1.0, 2.0, 3.0] if weigh == "fixed" else None
    teachers = experts()
    found = [
        gradient(
            tmp_path / str(place),
            teacher=EnsembleTeacher(order, mix=mix, weigh=weigh, weights=own),
            rows=dataset(8),
        )
        for place, (order, own) in enumerate(
            [(teachers, weights), (teachers[::-1], weights and weights[::-1])]
        )
    ]
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-6)


def test_a_sum_of_losses_has_the_gradient_of_the_mixture_for_forward_kl_only(tmp_path):
    """sum_k w_k KL(p_k || q) and KL(sum_k w_k p_k || q) differ by a constant."""
    found = {}
    for divergence in ("forward_kl", "reverse_kl"):
        for mix in ("mixture", "sum"):
            found[divergence, mix] = gradient(
                tmp_path / divergence / mix,
                teacher=EnsembleTeacher(experts(), mix=mix, weights=[1, 2, 1]),
                objectives=[ResponseObjective(divergence)],
                rows=dataset(8),
            )
    same, other = (
        (found[one, "mixture"] - found[one, "sum"]).abs().max()
        for one in ("forward_kl", "reverse_kl")
    )
    assert same < 1e-6
    assert other > 1e-3


def test_a_teacher_without_weight_runs_no_forward_pass():
    teachers = experts()
    calls = [spy(teacher.model.model, "forward") for teacher in teachers]
    ensemble = EnsembleTeacher(teachers, weights=[0.5, 0.0, 0.5])
    found = logits(ensemble)
    assert [len(one) for one in calls] == [1, 0, 1]
    expected = logits(EnsembleTeacher([teachers[0], teachers[2]]))
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(
        logits(EnsembleTeacher(teachers, weights=[0, 7, 0])), logits(teachers[1])
    )


def test_confidence_weighs_by_entropy_at_each_token():
    teachers = experts()
    found = probs(EnsembleTeacher(teachers, weigh="confidence", weight_temperature=0.5))
    each = torch.stack([probs(teacher) for teacher in teachers])
    entropy = -(each * each.log()).sum(-1)
    weights = (-entropy / 0.5).softmax(0)
    assert weights.std() > 0.05
    torch.testing.assert_close(found, (weights[..., None] * each).sum(0))


def test_likelihood_weighs_by_the_mean_log_probability_of_each_response():
    teachers, sequences = experts(), toy.sequences()
    found = probs(EnsembleTeacher(teachers, weigh="likelihood", weight_temperature=0.5))
    each = torch.stack([log_probs(logits(teacher)) for teacher in teachers])
    labels = each.gather(-1, sequences.targets_N[None, :, None].expand(3, -1, 1))[..., 0]
    rows = torch.arange(len(sequences)).repeat_interleave(sequences.num_predicted)
    expected = torch.empty_like(each[0])
    for row in range(len(sequences)):
        weights = (labels[:, rows == row].mean(1) / 0.5).softmax(0)
        expected[rows == row] = (weights[:, None, None] * each[:, rows == row].exp()).sum(0)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("options", [
    {}, {"mix": "geometric"}, {"weigh": "confidence"}, {"weigh": "likelihood", "mix": "geometric"},
])  # fmt: skip
def test_a_part_of_the_signal_is_that_part_of_the_distribution(options):
    whole = signal(EnsembleTeacher(experts(), **options))
    places = torch.tensor([5, 0, 7])
    torch.testing.assert_close(served(whole.select(places)), served(whole)[places])
    torch.testing.assert_close(served(whole.detach().to("cpu")), served(whole))
    blocks = whole.serve(4)
    pieces = [blocks[slice(i, min(i + 3, len(whole)))].clone() for i in range(0, len(whole), 3)]
    torch.testing.assert_close(torch.cat(pieces), served(whole))


def test_the_loss_against_several_targets_is_their_weighted_sum():
    teachers = experts()
    found = signal(EnsembleTeacher(teachers, mix="sum", weights=[1, 3, 0]))
    student = logits(LocalTeacher(toy.model(), toy.tokenizer()))
    total = sum(w * forward_kl(student, served(one)) for w, one in targets(found))
    expected = 0.25 * forward_kl(student, logits(teachers[0])) + 0.75 * forward_kl(
        student, logits(teachers[1])
    )
    torch.testing.assert_close(total, expected)


def test_different_vocabularies_are_refused_by_name():
    other = toy.tokenizer("stranger")
    other.add_tokens(["<new>"])
    teachers = [*experts(1), LocalTeacher(toy.teacher_model(), other)]
    with pytest.raises(VocabularyError, match="'expert1' and 'stranger' do not share a vocabulary"):
        EnsembleTeacher(teachers)


TWO = [{"model": "a"}, {"model": "b"}]


@pytest.mark.parametrize(("changes", "wrong"), [
    ({"teachers": []}, "teachers"),
    ({"weights": [1.0]}, "there are 1 'weights' for 2 teachers"),
    ({"weights": [0.0, 0.0]}, "one must be above 0"),
    ({"weights": [2.0, -1.0]}, "They must be 0 or more"),
    ({"weights": [1.0, 1.0], "weigh": "confidence"}, "'weights' are fixed, but 'weigh' is"),
    ({"mix": "sum", "weigh": "confidence"}, "weights that do not depend on the token"),
    ({"mix": "mixtur"}, "Did you mean 'mixture'"),
    ({"weight_temperature": 0.0}, "weight_temperature"),
])  # fmt: skip
def test_options_that_do_not_fit_are_refused(changes, wrong):
    with pytest.raises(RecipeError, match=wrong):
        entries.recipe(teacher={"kind": "ensemble", "teachers": TWO} | changes)
    if changes.get("teachers") is None and "mixtur" not in changes.get("mix", ""):
        options = {k: v for k, v in changes.items() if k != "weight_temperature"}
        if options:
            with pytest.raises(RecipeError, match=wrong):
                EnsembleTeacher(experts(2), **options)


@pytest.mark.parametrize(("teacher", "parts", "wrong"), [
    ({}, {"rollout": {"kind": "sampled", "by": "teacher"}}, "scores responses but cannot write"),
    ({}, {"rollout": {"kind": "interleaved"}}, "cannot write token by token"),
    ({}, {"objectives": [{"kind": "hidden"}]}, "needs hidden from the teacher"),
    ({}, {"objectives": [{"kind": "ckd"}]}, "needs the final states of one model"),
    ({"mix": "sum"}, {"objectives": [{"kind": "dist"}]}, "one distribution without a factor"),
    ({"weigh": "likelihood"}, {"rollout": {"kind": "sampled"}}, "likelihood of the dataset's"),
])  # fmt: skip
def test_what_an_ensemble_cannot_do_is_refused_when_the_recipe_is_read(teacher, parts, wrong):
    with pytest.raises(RecipeError, match=wrong):
        entries.recipe(teacher={"kind": "ensemble", "teachers": TWO} | teacher, **parts)


def test_a_geometric_mean_works_with_differences_of_logits():
    teacher = {"kind": "ensemble", "teachers": TWO, "mix": "geometric"}
    entries.recipe(teacher=teacher, objectives=[{"kind": "ckd"}])
