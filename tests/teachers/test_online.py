"""OKD: a teacher with an adapter that trains along (Rao et al. 2024, algorithm 1)."""

from __future__ import annotations

import hashlib
import itertools

import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import TrainerCallback

from llmdistill import recipe as recipes
from llmdistill.batch import Dense
from llmdistill.errors import ModelError, RecipeError
from llmdistill.evaluation.measure import Evaluation
from llmdistill.forward import read, teacher_signal
from llmdistill.models.taps import Need
from llmdistill.objectives.divergences import forward_kl, log_probs
from llmdistill.objectives.response import ResponseObjective
from llmdistill.rollouts.fixed import FixedRollout
from llmdistill.rollouts.sampled import SampledRollout
from llmdistill.sampling import Writer
from llmdistill.teachers.local import LocalTeacher
from llmdistill.teachers.online import DRIFT, OnlineTeacher
from tests import toy
from tests.conformance import entries
from tests.support.spies import spy
from tests.training.helpers import dataset, trainer, weights

NEEDS = frozenset({Need.DISTRIBUTION})


def online(model=None, **options):
    return OnlineTeacher(model or toy.teacher_model(), toy.tokenizer(), **options)


def adapter(teacher) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in teacher.parameters() if p.requires_grad])


def moved(teacher):
    """Give the adapter an effect, as some steps of training would."""
    with torch.no_grad():
        for name, parameter in teacher.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    return teacher


def logits(teacher, sequences):
    signal = teacher_signal(teacher, sequences, toy.NUM_TOKENS, NEEDS)
    return signal.distribution.serve()[0 : len(signal.distribution)].clone()


def run(folder, teacher, **options):
    """Train three steps and return the student's weights, the logs and the trainer."""
    options = {"max_steps": 3, "optim": "adamw_torch", "learning_rate": 0.01} | options
    made = trainer(folder, teacher=teacher, rows=dataset(8), **options)
    made.train()
    return weights(made.model.student), made.state.log_history, made


def test_a_teacher_whose_adapter_does_not_move_is_offline_distillation_bit_for_bit(tmp_path):
    """N12: OKD with a frozen module equals KD with the model itself."""
    expected, _, _ = run(tmp_path / "local", LocalTeacher(toy.teacher_model(), toy.tokenizer()))
    for options in ({"teacher_learning_rate": 0.0}, {"teacher_every": 10**6}):
        teacher = online(**options)
        if "teacher_every" in options:
            teacher.weight = lambda progress: 0.0  # the first step would be one in which it learns
        before = adapter(teacher)
        found, _, _ = run(tmp_path / str(options), teacher)
        assert torch.equal(found, expected)
        assert torch.equal(adapter(teacher), before)


def test_the_adapter_changes_nothing_at_first_and_switched_off_nothing_ever(tmp_path):
    model, sequences = toy.teacher_model(), toy.sequences()
    expected = logits(LocalTeacher(model, toy.tokenizer()), sequences)
    before = {name: hashlib.sha256(p.numpy()).hexdigest() for name, p in model.state_dict().items()}
    teacher = online(model)
    assert torch.equal(logits(teacher, sequences), expected)
    run(tmp_path, teacher)
    assert (logits(teacher, sequences) - expected).abs().max() > 1e-3
    torch.testing.assert_close(logits(teacher.plain, sequences), expected, rtol=0, atol=0)
    after = {
        name.removeprefix("base_model.model.").replace("base_layer.", ""): p
        for name, p in teacher.model.state_dict().items()
        if "lora" not in name
    }
    assert {n: hashlib.sha256(p.numpy()).hexdigest() for n, p in after.items()} == before


def test_with_alpha_0_it_is_lora_sft_whatever_the_student_is(tmp_path):
    """N12: the same adapter for two students, and the one that PEFT alone would train."""
    found = []
    for seed in (0, 5):
        teacher = online(alpha=0.0)
        run(tmp_path / str(seed), teacher, student=toy.model(seed=seed))
        found.append(adapter(teacher))
    assert torch.equal(*found)
    alone = online()
    optimizer = torch.optim.AdamW(
        [p for p in alone.parameters() if p.requires_grad], lr=0.01, weight_decay=0.0
    )
    rollout = FixedRollout()
    batches = spy(rollout, "write")
    trainer(tmp_path / "rows", rows=dataset(8), rollout=rollout, max_steps=3).train()
    for sequences in batches:
        view = read(alone.model, sequences, toy.NUM_TOKENS)
        loss = nn.functional.cross_entropy(view.head(view.hidden_NH), sequences.targets_N)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    torch.testing.assert_close(found[0], adapter(alone), rtol=1e-4, atol=1e-5)


def test_its_loss_is_the_formula_and_reaches_the_adapter_alone():
    """alpha tau^2 KL(q || p) + (1 - alpha) CE(y, p) + c KL(p0 || p), written out in full."""
    sequences = toy.sequences()
    teacher = moved(online(alpha=0.3, tau=2.0, drift_weight=0.2))
    student = read(toy.model(), sequences, toy.NUM_TOKENS)
    signal = teacher_signal(teacher, sequences, toy.NUM_TOKENS, NEEDS)
    found = teacher(student.detach(), signal, sequences)
    view = read(teacher.model, sequences, toy.NUM_TOKENS)
    own, other = view.head(view.hidden_NH), student.head(student.hidden_NH).detach()
    base = logits(teacher.plain, sequences)
    p, q = log_probs(own / 2), log_probs(other / 2)
    expected = (
        0.3 * 4 * (q.exp() * (q - p)).sum()
        + 0.7 * nn.functional.cross_entropy(own, sequences.targets_N, reduction="sum")
        + 0.2 * forward_kl(own, base).sum()
    )
    assert found.total.item() == pytest.approx(expected.item(), rel=1e-5)
    trained = [parameter for parameter in teacher.parameters() if parameter.requires_grad]
    assert all("lora" in n for n, p in teacher.named_parameters() if p.requires_grad)
    expected_grads = torch.autograd.grad(expected, trained)
    found.total.backward()
    for parameter, gradient in zip(trained, expected_grads, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6)
    assert not any(p.grad is not None for p in teacher.parameters() if not p.requires_grad)


def test_gradients_do_not_cross(tmp_path):
    """N12."""
    teacher = moved(online())
    made = trainer(tmp_path, teacher=teacher, rows=dataset(8))
    sequences = toy.sequences()
    for place, (has, lacks) in enumerate([("student", "teacher"), ("teacher", "student")]):
        made.model.zero_grad()
        scales = torch.zeros(2)
        scales[place] = 1.0
        if place == 0:
            scales[1] = 1e-30  # it takes part, with a loss that is too small to be seen
        made.model(sequences, scales).loss.backward()
        groups = dict(made.model.parameter_groups())
        size = {
            owner: max(float(p.grad.abs().max()) for p in named.values() if p.grad is not None)
            for owner, named in groups.items()
        }
        assert size[has] > 1e-3
        assert size[lacks] < 1e-20


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
def test_a_teacher_that_is_the_student_has_no_divergence(divergence):
    sequences, model = toy.sequences(), toy.model()
    teacher = online(toy.model(), alpha=1.0, teacher_divergence=divergence)
    student = read(model, sequences, toy.NUM_TOKENS)
    signal = teacher_signal(teacher, sequences, toy.NUM_TOKENS, NEEDS)
    assert teacher(student.detach(), signal, sequences).total.item() == pytest.approx(0, abs=1e-4)


def test_nothing_is_ever_generated(tmp_path):
    teacher, student = online(), toy.model()
    calls = spy(student, "generate") + spy(teacher.model, "generate")
    run(tmp_path, teacher, student=student)
    assert not calls


def test_it_learns_every_nth_step_and_rests_in_the_others(tmp_path):
    """In a step of rest neither momentum nor weight decay moves it."""
    teacher = online(teacher_every=3)
    seen = [adapter(teacher)]

    class Look(TrainerCallback):
        def on_step_end(self, *_, **__):
            seen.append(adapter(teacher))

    _, logs, _ = run(
        tmp_path, teacher, max_steps=6, callbacks=[Look()], weight_decay=0.1, max_grad_norm=1.0
    )
    changed = [not torch.equal(a, b) for a, b in itertools.pairwise(seen)]
    assert changed == [True, False, False, True, False, False]
    assert [("teacher" in entry) for entry in logs if "loss" in entry] == changed


def test_the_drift_is_that_of_the_teacher_without_its_adapter():
    sequences, teacher = toy.sequences(2), moved(online())
    student = read(toy.model(), sequences, toy.NUM_TOKENS).detach()
    signal = teacher_signal(teacher, sequences, toy.NUM_TOKENS, NEEDS)
    teacher(student, signal, sequences)
    total, number = teacher.figures[DRIFT]
    expected = forward_kl(logits(teacher, sequences), logits(teacher.plain, sequences))
    assert float(expected.mean()) > 1e-3
    assert int(number) == len(expected)
    assert total.item() == pytest.approx(float(expected.sum()), rel=1e-4)
    # On more rows it is that of the first two, and of all if it is in the loss.
    sequences = toy.sequences(5)
    student = read(toy.model(), sequences, toy.NUM_TOKENS).detach()
    signal = teacher_signal(teacher, sequences, toy.NUM_TOKENS, NEEDS)
    teacher(student, signal, sequences)
    _, some = teacher.figures[DRIFT]
    assert int(some) == int(sequences.num_predicted[:2].sum())
    teacher.drift_weight = 1.0
    teacher(student, signal, sequences)
    _, every = teacher.figures[DRIFT]
    assert int(every) == int(sequences.num_predicted.sum())


def test_the_log_shows_the_drift_and_a_warning_says_that_it_runs_away(tmp_path, caplog):
    _, logs, _ = run(tmp_path, online(), learning_rate=0.3)
    drifts = [entry[DRIFT] for entry in logs if "loss" in entry]
    assert drifts[0] == pytest.approx(0, abs=1e-5)
    assert drifts[-1] > 1.0
    warned = [one for one in caplog.messages if "away from what it was before training" in one]
    assert len(warned) == 1


def test_its_group_has_its_own_clipping_and_learning_rate(tmp_path):
    teacher = online(teacher_learning_rate=0.5)
    _, _, made = run(tmp_path, teacher)
    rates = {group["name"]: group["initial_lr"] for group in made.optimizer.param_groups}
    assert rates == {"student": 0.01, "teacher": 0.5}
    named = dict(made.model.parameter_groups())["teacher"]
    assert named
    assert all("lora_" in name for name in named)


def test_on_the_students_own_responses_its_tokens_are_no_labels(tmp_path):
    """DualOPSD's order: the student writes, both score, and both are updated."""
    sequences = toy.sequences(writer=Writer.STUDENT)
    student = read(toy.model(), sequences, toy.NUM_TOKENS).detach()
    found = []
    for alpha in (0.5, 1.0):
        teacher = moved(online(alpha=alpha))
        torch.manual_seed(0)
        signal = teacher_signal(teacher, sequences, toy.NUM_TOKENS, NEEDS)
        own = signal.distribution
        assert isinstance(own, Dense)
        kl = forward_kl(own.head(own.hidden_NH), student.head(student.hidden_NH)).sum()
        found.append(teacher(student, signal, sequences).total.item() / kl.item())
    assert found == pytest.approx([0.5, 1.0], rel=1e-4)
    teacher = online(alpha=1.0, teacher_divergence="reverse_kl")
    before = adapter(teacher)
    rollout = SampledRollout("student", max_new_tokens=4)
    run(tmp_path, teacher, rollout=rollout, objectives=[ResponseObjective("reverse_kl")])
    assert not torch.equal(adapter(teacher), before)


def test_the_student_is_measured_against_the_teacher_as_it_was():
    from llmdistill.data.collate import collate

    teacher = moved(online())
    found = Evaluation(teacher, collate(dataset(3).rows), max_new_tokens=4, seed=0)
    assert found.teacher is teacher.plain
    sequences = toy.sequences()
    expected = logits(LocalTeacher(toy.teacher_model(), toy.tokenizer()), sequences)
    torch.testing.assert_close(logits(found.teacher, sequences), expected)


def test_peft_loads_the_adapter_after_a_run(tmp_path):
    teacher = moved(online())
    teacher.export(tmp_path)
    loaded = PeftModel.from_pretrained(toy.teacher_model(), tmp_path / "teacher_adapter")
    sequences = toy.sequences()
    found = logits(LocalTeacher(loaded, toy.tokenizer()), sequences)
    torch.testing.assert_close(found, logits(teacher, sequences))


def test_a_resumed_run_is_the_same_run(tmp_path):
    """The adapter and its optimizer are in the checkpoint: the last weights are equal bit for bit."""
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = online()
    expected, _, _ = run(tmp_path / "whole", whole, **options)
    first = online()
    run(tmp_path / "cut", first, **options)
    again = online()
    made = trainer(
        tmp_path / "cut", teacher=again, rows=dataset(8), optim="adamw_torch",
        learning_rate=0.01, **options,
    )  # fmt: skip
    made.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-2"))
    assert torch.equal(weights(made.model.student), expected)
    assert torch.equal(adapter(again), adapter(whole))


def test_quantised_and_offloaded_teachers_and_wrong_layers_are_refused():
    for key, value in (("placement", "offloaded"), ("quantization", "torchao_int8")):
        with pytest.raises(RecipeError, match="kind online is trained, which needs plain weights"):
            entries.recipe(teacher={"kind": "online", "model": "t", key: value})
    model = toy.teacher_model()
    model.model.layers[0].mlp.up_proj.to("meta")
    with pytest.raises(ModelError, match="are not in one place, so a teacher made of it cannot"):
        online(model)
    with pytest.raises(ModelError, match=r"teacher\.targets: .*gate_proj"):
        online(targets=["c_attn"])


def test_labels_that_nobody_writes_are_refused():
    given = {"teacher": {"kind": "online", "model": "t"}}
    for rollout in ({"kind": "sampled"}, {"kind": "replay"}):
        with pytest.raises(RecipeError, match=r"Set 'teacher.alpha: 1'"):
            entries.recipe(**given, rollout=rollout)
    entries.recipe(teacher=given["teacher"] | {"alpha": 1.0}, rollout={"kind": "sampled"})
    entries.recipe(**given, rollout={"kind": "interleaved"})
    with pytest.raises(RecipeError, match=r"teacher.alpha"):
        entries.recipe(teacher=given["teacher"] | {"alpha": 1.5})
    assert recipes.build(
        recipes.parse_yaml(recipes.dump(entries.recipe(**given)), "x")
    ) == entries.recipe(**given)
