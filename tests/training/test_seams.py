"""Parts that a user can supply.

These are objectives on hidden states, functions in place of names, weights that change, the user's
own teachers, and teachers that train along.

K = terms of the loss.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from llmdistill.batch import Dense, LossSum, TeacherSignal
from llmdistill.errors import RecipeError, TrainingError, VocabularyError
from llmdistill.forward import read, teacher_signal
from llmdistill.models.taps import Need
from llmdistill.models.vocabulary import num_tokens
from llmdistill.objectives.base import Objective
from llmdistill.objectives.divergences import forward_kl
from llmdistill.objectives.features import HiddenObjective
from llmdistill.objectives.response import CrossEntropyObjective, ResponseObjective
from llmdistill.objectives.weights import sequence_mean
from llmdistill.rollouts.interleaved import InterleavedRollout
from llmdistill.rollouts.sampled import SampledRollout
from llmdistill.schedules import CriticalPeriod, Linear
from llmdistill.teachers.local import LocalTeacher
from llmdistill.training.step import Distillation
from tests import toy
from tests.support.spies import spy
from tests.support.teachers import Learner
from tests.training.helpers import dataset, gradient, trained, trainer, weights

# ---- divisors ----


def first_loss(folder, rows, **options):
    made = trainer(folder, rows=type(dataset())(rows), **options)
    made.train()
    return made.state.log_history[0]["loss"]


def test_a_sequence_mean_counts_every_response_once(tmp_path):
    """It is the mean over responses of their means, whatever their lengths."""
    rows = sorted(dataset(12).rows, key=lambda row: len(row.response_ids))[:6]
    lengths = [len(row.response_ids) for row in rows]
    assert len(set(lengths)) > 3
    options = {"per_device_train_batch_size": 6}
    means = [first_loss(tmp_path / "one", [row], **options) for row in rows]
    mean = [ResponseObjective(token_weight="sequence_mean")]
    found = first_loss(tmp_path / "all", rows, objectives=mean, **options)
    assert found == pytest.approx(sum(means) / 6, rel=1e-5)
    uniform = first_loss(tmp_path / "uniform", rows, **options)
    by_token = sum(m * n for m, n in zip(means, lengths, strict=True)) / sum(lengths)
    assert uniform == pytest.approx(by_token, rel=1e-5)
    assert abs(found - uniform) > 1e-3
    assert first_loss(tmp_path / "alone", [rows[-1]], objectives=mean, **options) == pytest.approx(
        means[-1], rel=1e-6
    )


@pytest.mark.parametrize("accumulation", [2, 8])
def test_every_divisor_is_that_of_the_whole_step(tmp_path, accumulation):
    """N4: three objectives with different divisors give the same gradient however 8 rows are cut."""
    objectives = [
        lambda: ResponseObjective(token_weight="sequence_mean", weight=0.5),
        lambda: ResponseObjective("jsd"),
        lambda: HiddenObjective(tokens="all", weight=0.1),
    ]
    expected, found = (
        gradient(
            tmp_path,
            objectives=[made() for made in objectives],
            per_device_train_batch_size=8 // steps,
            gradient_accumulation_steps=steps,
        )
        for steps in (1, accumulation)
    )
    assert expected.abs().max() > 1e-2
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_each_term_is_logged_as_its_own_mean(tmp_path):
    objectives = [ResponseObjective(token_weight="sequence_mean"), CrossEntropyObjective()]
    made = trainer(tmp_path, objectives=objectives, gradient_accumulation_steps=2)
    made.train()
    logs = made.state.log_history[0]
    assert logs["loss"] == pytest.approx(logs["forward_kl"] + logs["cross_entropy"], rel=1e-5)


# ---- hidden states in a step ----


def test_a_projector_is_trained_along_and_left_out_of_the_export(tmp_path):
    made = trainer(tmp_path, objectives=[HiddenObjective(layers=[(2, 3)])])
    projector = made.model.objectives[0].projectors[0]
    before = projector.weight.detach().clone()
    made.train()
    assert not torch.equal(projector.weight, before)
    made.export_student(tmp_path / "student")
    assert not any(
        "projector" in name for name in load_file(tmp_path / "student/model.safetensors")
    )


def test_the_teacher_runs_once_for_all_that_is_needed(tmp_path):
    teacher, passes = LocalTeacher(toy.teacher_model(), toy.tokenizer()), []
    teacher.model.model.register_forward_hook(lambda *_: passes.append(1))
    objectives = [ResponseObjective(), HiddenObjective(), HiddenObjective(layers=[(-1, 1)])]
    made = trainer(tmp_path, teacher=teacher, objectives=objectives, max_steps=3)
    passes.clear()
    made.train()
    assert len(passes) == 3


def test_what_was_judged_while_writing_is_judged_again_for_hidden_states(tmp_path):
    """The writer kept only the distribution."""
    rollout = InterleavedRollout(top_k=120, block_size=2, max_new_tokens=5)
    judged = []
    teacher = LocalTeacher(toy.teacher_model(), toy.tokenizer())
    judge = teacher.judge
    teacher.judge = lambda *a: judged.append(1) or judge(*a)
    trainer(tmp_path, teacher=teacher, rollout=rollout).train()
    assert judged == []
    trainer(tmp_path, teacher=teacher, rollout=rollout, objectives=[HiddenObjective()]).train()
    assert judged == [1]


@pytest.mark.parametrize("options", [{"activation_checkpointing": True}, {"bf16": True}])
def test_hidden_states_under_checkpointing_and_autocast(tmp_path, options):
    objectives = lambda: [ResponseObjective(), HiddenObjective(layers=[(1, -1)])]  # noqa: E731
    plain = gradient(tmp_path, objectives=objectives())
    found = gradient(tmp_path, objectives=objectives(), **options)
    bound = 0.05 if "bf16" in options else 1e-6
    assert (found - plain).norm() < bound * plain.norm()


def test_reentrant_checkpointing_is_refused_where_it_would_lose_gradients(tmp_path):
    class Keys(HiddenObjective):
        def prepare(self, student, teacher):
            super().prepare(student, teacher)
            self.student_needs = frozenset({Need.KEYS.after(1)})

    options = {
        "activation_checkpointing": True,
        "activation_checkpointing_kwargs": {"use_reentrant": True},
    }
    trainer(tmp_path, objectives=[HiddenObjective()], **options)
    with pytest.raises(TrainingError, match="the student's keys would have no gradient"):
        trainer(tmp_path, objectives=[Keys()], **options)


def test_ddp_looks_for_unused_parameters_only_below_hidden_states(tmp_path):
    both = [ResponseObjective(), HiddenObjective()]
    assert trainer(tmp_path, objectives=both).args.ddp_find_unused_parameters is False
    alone = trainer(tmp_path, objectives=[HiddenObjective(layers=[(1, -1)])])
    assert alone.args.ddp_find_unused_parameters is True


# ---- functions in place of names ----


def scaled_kl(student_NV, teacher_NV, *, factor=1.0):
    return factor * forward_kl(student_NV, teacher_NV)


def later(sequences, *, start=0):
    """Count only tokens from the `start`th on."""
    place = torch.cat([torch.arange(int(n)) for n in sequences.num_predicted])
    return (place >= start).float()


def test_functions_are_taken_for_divergence_target_and_token_weight(tmp_path):
    plain = gradient(tmp_path)
    same = ResponseObjective(
        scaled_kl, target=lambda student_nV, teacher_nV: teacher_nV, token_weight=later, factor=2.0
    )
    assert same.name == "scaled_kl"
    torch.testing.assert_close(gradient(tmp_path, objectives=[same]), 2 * plain)
    later_ones = ResponseObjective(scaled_kl, token_weight=later, start=3)
    assert not torch.allclose(gradient(tmp_path, objectives=[later_ones]), plain, atol=1e-4)


def test_an_option_that_nothing_takes_is_named():
    with pytest.raises(
        RecipeError, match="'scaled_kl' has no option 'beta'. Its options are: factor, start"
    ):
        ResponseObjective(scaled_kl, token_weight=later, beta=0.5)
    with pytest.raises(
        RecipeError, match="unknown target 'mine'. Use one of teacher, or pass a function"
    ):
        ResponseObjective(target="mine")


# ---- weights that change ----


def test_a_scheduled_weight_is_that_of_the_step_and_is_logged(tmp_path):
    def losses(weight, steps=4):
        made = trainer(
            tmp_path, objectives=[ResponseObjective(weight=weight), CrossEntropyObjective(weight=0)],
            learning_rate=0.0, max_steps=steps, rows=dataset(4), per_device_train_batch_size=4,
        )  # fmt: skip
        made.train()
        return made.state.log_history[:steps]

    constant = losses(1.0)
    falling = losses(Linear(2.0, 0.5))
    assert [entry["weight_forward_kl"] for entry in falling] == [2.0, 1.5, 1.0, 0.5]
    assert "weight_cross_entropy" not in falling[0]
    assert "weight_forward_kl" not in constant[0]
    for entry, plain in zip(falling, constant, strict=True):
        expected = entry["weight_forward_kl"] * plain["loss"]
        assert entry["loss"] == pytest.approx(expected, rel=1e-5)


def test_a_resumed_run_has_the_weights_of_a_straight_one(tmp_path):
    """R1: this run has a projector and a schedule."""

    def run(folder, steps, resume=None):
        made = trainer(
            folder, objectives=[ResponseObjective(), HiddenObjective(weight=CriticalPeriod(3.0, periods=4))],
            max_steps=4, save_strategy="steps", save_steps=2, optim="adamw_torch", learning_rate=1e-3,
        )  # fmt: skip
        made.train(resume_from_checkpoint=resume)
        return torch.cat(
            [weights(made.model.student), made.model.objectives[1].projectors[0].weight.flatten()]
        )

    straight = run(tmp_path / "straight", 4)
    resumed = run(tmp_path / "resumed", 4, resume=str(tmp_path / "straight/checkpoint-2"))
    assert torch.equal(straight, resumed)


# ---- a teacher that the user wrote ----


class Uniform:
    """A teacher that gives every token the same probability. It has no model and cannot write."""

    provides = frozenset({Need.DISTRIBUTION})

    def __init__(self):
        self.tokenizer = toy.tokenizer()

    def judge(self, sequences, needs):
        number = len(sequences.targets_N)
        head = read(toy.model(), sequences, toy.NUM_TOKENS).head.detach()
        return TeacherSignal(Dense(torch.zeros(number, 32), head))


def test_a_teacher_needs_three_things_only(tmp_path):
    found = gradient(tmp_path, teacher=Uniform())
    assert found.abs().max() > 1e-3
    made = trainer(tmp_path, teacher=Uniform(), eval_dataset=dataset(4))
    assert made.evaluate()["eval_loss"] > 0
    made.train()


def test_a_teacher_that_scores_more_ids_than_are_shared_is_narrowed(tmp_path):
    """Its padding rows are in no softmax, as with a local teacher."""

    class Wide:
        provides = frozenset({Need.DISTRIBUTION})
        tokenizer = toy.tokenizer()
        model = toy.teacher_model()

        def judge(self, sequences, needs):
            with torch.no_grad():
                rows = self.model.get_output_embeddings().weight.shape[0]
                seen = read(self.model, sequences, rows)
            return TeacherSignal(Dense(seen.hidden_NH, seen.head))

    assert Wide.model.get_output_embeddings().weight.shape[0] > num_tokens(Wide.tokenizer)
    torch.testing.assert_close(gradient(tmp_path, teacher=Wide()), gradient(tmp_path))


def test_needs_that_a_teacher_does_not_provide_are_named(tmp_path):
    with pytest.raises(
        RecipeError,
        match="objective 'hidden' needs hidden states from the teacher, but Uniform provides the dist",
    ):
        trainer(tmp_path, teacher=Uniform(), objectives=[HiddenObjective()])


@pytest.mark.parametrize("rollout", [SampledRollout("teacher"), InterleavedRollout()])
def test_a_rollout_says_if_the_teacher_cannot_write(tmp_path, rollout):
    with pytest.raises(RecipeError, match="a Uniform (cannot write|has no 'session' method)"):
        trainer(tmp_path, teacher=Uniform(), rollout=rollout).train()


def test_a_tokenizer_with_more_ids_than_the_head_is_refused():
    with pytest.raises(VocabularyError, match="has 259 ids, but the model's head scores only 200"):
        LocalTeacher(toy.teacher_model(rows=200), toy.tokenizer())


# ---- a teacher that trains along ----


def test_a_teacher_trains_along_with_its_own_group_and_loss(tmp_path):
    made = trainer(tmp_path, teacher=Learner(), max_steps=3, max_grad_norm=1.0)
    groups = [group["name"] for group in made.create_optimizer().param_groups]
    assert [name for name in groups if name == "teacher"]
    trained = dict(made.model.parameter_groups())["teacher"]
    assert list(trained) == ["trained_teacher.shift"]
    made.train()
    logs = made.state.log_history[:3]
    assert logs[0]["teacher"] > 0
    assert logs[0]["loss"] == pytest.approx(logs[0]["forward_kl"] + logs[0]["teacher"], rel=1e-5)
    assert made.model.trained_teacher.shift.abs().max() > 0


def test_gradients_of_student_and_teacher_never_cross(tmp_path):
    """The student learns as from a frozen teacher.

    The teacher's loss changes neither the teacher's base nor the student.
    """
    frozen = LocalTeacher(toy.teacher_model(), toy.tokenizer())
    torch.testing.assert_close(
        gradient(tmp_path, teacher=Learner()), gradient(tmp_path, teacher=frozen)
    )
    teacher = Learner()
    base = weights(teacher.base)
    made = trainer(tmp_path, teacher=teacher, learning_rate=0.5, max_steps=2)
    made.train()
    assert torch.equal(weights(teacher.base), base)
    silent = Learner()
    silent.weight = 0.0
    made = trainer(tmp_path, teacher=silent, learning_rate=0.5, max_steps=2)
    made.train()
    assert silent.shift.abs().max() == 0  # the student's loss does not reach it


def test_the_teacher_is_clipped_on_its_own(tmp_path):
    """A large gradient of the teacher does not shrink the student's step."""

    class Loud(Learner):
        weight = 1e4

    options = {"max_grad_norm": 0.5, "learning_rate": 1.0}
    quiet = gradient_of(trainer(tmp_path, teacher=Learner(), **options))
    loud = gradient_of(trainer(tmp_path, teacher=Loud(), **options))
    assert quiet.norm() == pytest.approx(0.5, rel=1e-3)
    torch.testing.assert_close(loud, quiet)


def gradient_of(made):
    before = weights(made.model.student)
    made.train()
    return before - weights(made.model.student)


def test_a_trained_teacher_is_saved_and_resumed_and_not_exported(tmp_path):
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "learning_rate": 0.3}
    straight = trainer(tmp_path / "run", teacher=Learner(), **options)
    straight.train()
    saved = load_file(tmp_path / "run/checkpoint-2/teacher.safetensors")
    assert list(saved) == ["shift"]  # the base is not copied
    again = trainer(tmp_path / "again", teacher=Learner(), **options)
    again.train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-2"))
    assert torch.equal(again.model.trained_teacher.shift, straight.model.trained_teacher.shift)
    assert torch.equal(weights(again.model.student), weights(straight.model.student))
    straight.export_student(tmp_path / "student")
    assert not list((tmp_path / "student").glob("teacher*"))
    kept = load_file(tmp_path / "student/model.safetensors")
    assert not any("teacher" in name for name in kept)


def test_a_frozen_teacher_that_is_a_module_is_no_part_of_what_is_trained(tmp_path):
    class Module(nn.Module):
        provides = frozenset({Need.DISTRIBUTION})
        tokenizer = toy.tokenizer()

        def __init__(self):
            super().__init__()
            self.inner = LocalTeacher(toy.teacher_model(), self.tokenizer)
            self.unused = nn.Parameter(torch.ones(3))

        def judge(self, sequences, needs):
            return self.inner.judge(sequences, needs)

    made = trainer(tmp_path, teacher=Module())
    assert not [name for name, _ in made.model.named_parameters() if "unused" in name]


# ---- an objective that the user wrote ----


def test_an_objective_sees_just_what_it_needs(tmp_path):
    seen = []

    class Look(Objective):
        name = "look"
        student_needs = frozenset({Need.HIDDEN.after(1)})

        def forward(self, student, signal, sequences):
            seen.append((set(student.states), signal))
            return LossSum(
                student.states[Need.HIDDEN.after(1)].sum(), sequences.num_predicted.sum()
            )

    trainer(tmp_path, objectives=[Look()]).train()
    assert seen == [({Need.HIDDEN.after(1)}, None)]  # the teacher was not called at all


def first_projector(trainer):
    return trainer.model.objectives[0].projectors[0].weight


def test_projectors_start_alike_and_leave_the_global_randomness_alone(tmp_path):
    state = torch.random.get_rng_state()
    first = first_projector(trainer(tmp_path, objectives=[HiddenObjective()]))
    torch.random.set_rng_state(state)
    torch.rand(7)
    second = first_projector(trainer(tmp_path, objectives=[HiddenObjective()]))
    assert torch.equal(first, second)
    other = first_projector(trainer(tmp_path, objectives=[HiddenObjective()], seed=5))
    assert not torch.equal(first, other)


# ---- mistakes that reviews of these parts found ----


def test_a_trained_teacher_learns_from_text_that_it_judged_while_writing(tmp_path):
    """The writer's signal has no gradients, so the teacher scores the text again."""

    class Writing(Learner):
        def session(self, prompts):
            return LocalTeacher(self.base, self.tokenizer).session(prompts)

    rollout = InterleavedRollout(top_k=120, block_size=2, max_new_tokens=5)
    teacher = Writing()
    trainer(tmp_path, teacher=teacher, rollout=rollout, max_steps=2, learning_rate=0.5).train()
    assert teacher.shift.abs().max() > 1e-4


def test_a_trained_teacher_stays_in_eval_mode(tmp_path):
    teacher = Learner()
    made = trainer(tmp_path, teacher=teacher)
    seen = spy(teacher, "judge")
    made.train()
    assert seen
    assert made.model.student.training
    assert not any(module.training for module in teacher.modules())


def test_tied_weights_of_a_trained_teacher_are_saved_once_and_loaded(tmp_path):
    class Whole(Learner):
        def __init__(self):
            super().__init__()
            self.base.requires_grad_(True)

    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "learning_rate": 0.1}
    straight = trainer(tmp_path / "a", teacher=Whole(), **options)
    straight.train()
    again = trainer(tmp_path / "b", teacher=Whole(), **options)
    again.train(resume_from_checkpoint=str(tmp_path / "a/checkpoint-2"))
    assert torch.equal(trained(again), trained(straight))
    assert not torch.equal(
        weights(straight.model.trained_teacher.base), weights(toy.teacher_model())
    )


class Crossing(Learner):
    """Its hidden state depends on its trained shift, and its loss on the student's states."""

    def judge(self, sequences, needs):
        signal = super().judge(sequences, needs)
        states = {need: state + self.shift for need, state in signal.states.items()}
        return TeacherSignal(signal.distribution, states)

    def forward(self, student, signal, sequences):
        total = (student.hidden_NH.square().mean() * self.shift.square().sum()) + self.shift.sum()
        return LossSum(total * len(student.hidden_NH), sequences.num_predicted.sum())


def test_no_gradient_leads_through_states_from_one_to_the_other(tmp_path):
    """No gradient crosses, even where no objective cuts it.

    These are hidden states, and the student's states in the teacher's loss.
    """

    def parts(weight, teacher_weight):
        teacher = Crossing()
        teacher.weight = teacher_weight
        nn.init.constant_(teacher.shift, 0.5)
        made = trainer(
            tmp_path,
            teacher=teacher,
            objectives=[HiddenObjective(weight=weight)],
            learning_rate=1.0,
        )
        before = weights(made.model.student), teacher.shift.detach().clone()
        made.train()
        return before[0] - weights(made.model.student), before[1] - teacher.shift.detach()

    both = parts(1.0, 1.0)
    assert both[0].norm() > 1e-3
    assert both[1].norm() > 1e-3
    torch.testing.assert_close(parts(1.0, 0.0)[0], both[0])
    torch.testing.assert_close(parts(0.0, 1.0)[1], both[1])
    assert parts(1.0, 0.0)[1].norm() == 0
    assert parts(0.0, 1.0)[0].norm() == 0


def test_changed_embeddings_are_judged_in_a_pass_of_their_own():
    teacher = LocalTeacher(toy.teacher_model(), toy.tokenizer())
    sequences, needs = toy.sequences(), frozenset({Need.DISTRIBUTION})
    written = replace(sequences, signal=teacher.judge(sequences, needs))
    seen = spy(teacher, "judge")
    kept = teacher_signal(teacher, written, toy.NUM_TOKENS, needs)
    assert seen == []
    changed = replace(written, embedding_change=lambda embed, ids_BT: 2 * embed(ids_BT))
    other = teacher_signal(teacher, changed, toy.NUM_TOKENS, needs)
    assert len(seen) == 1
    assert not torch.allclose(other.distribution.hidden_NH, kept.distribution.hidden_NH)


def test_a_judgement_that_lacks_something_names_the_teacher(tmp_path):
    class Forgetful(Uniform):
        def judge(self, sequences, needs):
            return TeacherSignal()

    with pytest.raises(
        TrainingError, match="Forgetful.judge did not return everything .*: the distrib"
    ):
        trainer(tmp_path, teacher=Forgetful()).train()


def test_states_without_a_configuration_are_refused_by_name(tmp_path):
    class Shapeless(Uniform):
        provides = frozenset({Need.HIDDEN})

    with pytest.raises(RecipeError, match="Shapeless has no 'config' that gives their size"):
        trainer(tmp_path, teacher=Shapeless(), objectives=[HiddenObjective()])


def test_what_cannot_be_a_step_is_refused_when_the_trainer_is_built(tmp_path):
    with pytest.raises(RecipeError, match="the list is empty, so there is nothing to train on"):
        Distillation(toy.model(), Uniform(), [], toy.tokenizer())
    nobody = Uniform()
    nobody.tokenizer = None
    with pytest.raises(RecipeError, match="Uniform has no tokenizer"):
        trainer(tmp_path, teacher=nobody)


def test_an_objective_that_is_called_teacher_keeps_its_name_apart(tmp_path):
    class Named(ResponseObjective):
        def __init__(self):
            super().__init__()
            self.name = "teacher"

    made = trainer(tmp_path, teacher=Learner(), objectives=[Named()])
    made.train()
    assert {"teacher_0", "teacher_1"} <= made.state.log_history[0].keys()


def test_an_option_that_two_choices_take_is_refused():
    def of_divergence(student_NV, teacher_NV, *, start=0):
        return forward_kl(student_NV, teacher_NV)

    with pytest.raises(
        RecipeError, match="'start' is a parameter of the divergence and of the token_weight"
    ):
        ResponseObjective(of_divergence, token_weight=later, start=3)


@dataclass
class Ramp:
    """A token weight that is not a function and cannot be a dict key."""

    length: int

    def __call__(self, sequences):
        return later(sequences, start=self.length)


def test_a_token_weight_may_be_any_callable_and_bring_its_own_divisor(tmp_path):
    gradient(tmp_path, objectives=[ResponseObjective(token_weight=Ramp(2))])
    plain = gradient(tmp_path, objectives=[ResponseObjective()])
    twice = ResponseObjective(divisor=lambda sequences: 2 * sequences.num_predicted.sum())
    torch.testing.assert_close(2 * gradient(tmp_path, objectives=[twice]), plain)
    bound = ResponseObjective(token_weight=functools.partial(sequence_mean))
    named = ResponseObjective(token_weight="sequence_mean")
    expected = gradient(tmp_path, objectives=[named])
    torch.testing.assert_close(gradient(tmp_path, objectives=[bound]), expected)


def test_a_divisor_that_is_no_count_is_refused(tmp_path):
    half = ResponseObjective(divisor=lambda sequences: sequences.num_predicted.sum() / 2)
    with pytest.raises(
        TrainingError, match="the divisor of 'forward_kl' is .*, but it must be a count"
    ):
        trainer(tmp_path, objectives=[half]).train()


def test_held_out_losses_that_would_all_be_zero_are_refused(tmp_path):
    fading = [ResponseObjective(weight=Linear(1.0, 0.0))]
    made = trainer(tmp_path, objectives=fading, eval_dataset=dataset(4), max_steps=3)
    with pytest.raises(TrainingError, match="these weights are all 0. Let a schedule end above 0"):
        made.evaluate()


@pytest.mark.parametrize("when", ["before", "after"])
def test_the_held_out_loss_is_that_of_the_end_whenever_it_is_taken(tmp_path, when):
    options = {"eval_dataset": dataset(4, seed=3), "learning_rate": 0.0, "max_steps": 2}
    falling = [ResponseObjective(weight=CriticalPeriod(4.0, decay=0.5, periods=2))]
    made = trainer(tmp_path, objectives=falling, **options)
    if when == "after":
        made.train()
    plain = trainer(tmp_path, objectives=[ResponseObjective(weight=2.0)], **options)
    assert made.evaluate()["eval_loss"] == pytest.approx(plain.evaluate()["eval_loss"])


@pytest.mark.parametrize("owners", ["one", "two"])
def test_a_scaler_unscales_once_whoever_is_clipped(tmp_path, owners):
    """The scaler of float16 refuses to unscale twice in one step."""
    objectives = [ResponseObjective()] if owners == "one" else [HiddenObjective()]
    made = trainer(tmp_path, objectives=objectives, max_grad_norm=1.0)
    made.create_optimizer()
    calls = []
    made.accelerator.unscale_gradients = lambda optimizer=None: calls.append(1)
    for parameter in made.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    made._clip_grad_norm(made.model)
    assert calls == [1]
