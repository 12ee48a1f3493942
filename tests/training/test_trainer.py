"""Tests that fail without each override of DistillTrainer, and invariances of the gradient."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from transformers import AutoModelForCausalLM, TrainerCallback

from llmdistill.batch import LossSum, Sequences
from llmdistill.data.collate import collate
from llmdistill.errors import NonFiniteLossError, TrainingError, VocabularyError
from llmdistill.evaluation.agreement import agreement, judge
from llmdistill.objectives.exits import ExitsObjective
from llmdistill.objectives.features import HiddenObjective
from llmdistill.objectives.response import CrossEntropyObjective, ResponseObjective
from llmdistill.rollouts.fixed import FixedRollout
from llmdistill.rollouts.interleaved import InterleavedRollout
from llmdistill.rollouts.replay import ReplayRollout
from llmdistill.rollouts.sampled import SampledRollout
from llmdistill.sampling import Writer
from llmdistill.teachers.local import LocalTeacher
from llmdistill.training.arguments import check_sharding
from tests import toy
from tests.support.objectives import Projected
from tests.support.rollouts import Repadded
from tests.support.spies import spy
from tests.training.helpers import INTERLEAVED, arguments, dataset, gradient, trainer, weights

pytestmark = pytest.mark.upgrade

# ---- the divisor, and what must not change the gradient ----


@pytest.mark.parametrize(("batch", "accumulation"), [(4, 2), (2, 4), (1, 8)])
def test_accumulation_changes_nothing(tmp_path, batch, accumulation):
    """N4: 1x8 = 2x4 = 8x1 with ragged masks under SGD."""
    expected = gradient(tmp_path, per_device_train_batch_size=8)
    found = gradient(
        tmp_path, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation
    )
    assert expected.abs().max() > 1e-2
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_the_gradient_is_that_of_the_mean_over_predicted_tokens(tmp_path):
    """It equals that of a dense loss written here, and not that of a mean of means."""
    data = dataset()
    found = gradient(
        tmp_path, rows=data, per_device_train_batch_size=4, gradient_accumulation_steps=2
    )
    dense = dense_gradient(data.rows, lambda total, count: total / count)
    torch.testing.assert_close(found, dense, rtol=0, atol=1e-6)
    halves = [
        dense_gradient(rows, lambda total, count: total / count)
        for rows in (data.rows[:4], data.rows[4:])
    ]
    assert not torch.allclose(found, sum(halves) / 2, rtol=0, atol=1e-4)


def dense_gradient(rows, reduce):
    student, teacher = toy.model(), toy.teacher_model()
    sequences = FixedRollout().write(collate(rows), None, None, None)
    inputs = {"input_ids": sequences.input_ids_BT, "attention_mask": sequences.attention_mask_BT}
    student_log, teacher_log = (
        model(**inputs).logits[:, :-1, : toy.NUM_TOKENS].log_softmax(-1)
        for model in (student, teacher)
    )
    mask = sequences.response_mask_BT[:, 1:]
    kl = (teacher_log.exp() * (teacher_log - student_log)).sum(-1)
    reduce((kl * mask).sum(), mask.sum()).backward()
    return torch.cat([p.grad.flatten() for p in student.parameters()])


@pytest.mark.parametrize(("left", "right"), [(7, 0), (0, 7), (3, 11)])
def test_padding_changes_nothing(tmp_path, monkeypatch, left, right):
    expected = gradient(tmp_path, per_device_train_batch_size=8)
    # Keep the padding: `select` would cut the columns that no row needs.
    monkeypatch.setattr(Sequences, "select", lambda self, rows: self)
    found = gradient(tmp_path, per_device_train_batch_size=8, rollout=Repadded(left, right))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("chunk_size", [1, 7])
def test_the_chunk_size_changes_nothing(tmp_path, chunk_size):
    expected = gradient(tmp_path)
    found = gradient(tmp_path, objectives=[ResponseObjective(chunk_size=chunk_size)])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_extra_vocabulary_rows_change_nothing(tmp_path):
    """Both heads have padding rows whose weights would matter if they were in the softmax."""
    expected = gradient(tmp_path, student=untied(0), teacher=padded_teacher(0))
    found = gradient(tmp_path, student=untied(9), teacher=padded_teacher(30))
    real = [p.numel() for p in untied(0).parameters()]
    padded = untied(9)
    pieces = found.split([p.numel() for p in padded.parameters()])
    cut = [
        piece.view(p.shape)[: toy.NUM_TOKENS].flatten()
        if p.shape[0] == toy.NUM_TOKENS + 9
        else piece
        for piece, p in zip(pieces, padded.parameters(), strict=True)
    ]
    assert [len(piece) for piece in cut] == real
    torch.testing.assert_close(torch.cat(cut), expected, rtol=0, atol=1e-6)


def untied(extra: int):
    made = toy.model(rows=toy.NUM_TOKENS, tie_word_embeddings=False)
    return _grown(made, extra)


def padded_teacher(extra: int) -> LocalTeacher:
    made = toy.teacher_model(rows=toy.NUM_TOKENS, tie_word_embeddings=False)
    return LocalTeacher(_grown(made, extra), toy.tokenizer())


def _grown(model, extra: int):
    if not extra:
        return model
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        rows = torch.full((extra, layer.weight.shape[1]), 3.0)
        layer.weight = nn.Parameter(torch.cat([layer.weight.detach(), rows]))
    model.config.vocab_size += extra
    return model


def test_a_micro_batch_without_predicted_tokens_is_harmless(tmp_path):
    """N6: rows with an empty answer add nothing, not even to the divisor."""
    data = dataset()
    expected = gradient(
        tmp_path, rows=data.rows and type(data)(data.rows[:4]), per_device_train_batch_size=4
    )
    emptied = [type(row)(row.row_id, row.prompt_ids, []) for row in data.rows[4:]]
    mixed = type(data)(data.rows[:4] + emptied)
    found = gradient(
        tmp_path, rows=mixed, per_device_train_batch_size=1, gradient_accumulation_steps=8
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_a_step_without_any_predicted_token_is_zero(tmp_path):
    data = dataset()
    empty = type(data)([type(row)(row.row_id, row.prompt_ids, []) for row in data.rows])
    assert gradient(tmp_path, rows=empty).abs().max() == 0


def test_the_rollout_is_written_once_for_the_whole_window(tmp_path):
    rollout = FixedRollout()
    written = spy(rollout, "write")
    trainer(tmp_path, rollout=rollout, gradient_accumulation_steps=2, max_steps=2).train()
    assert [len(sequences) for sequences in written] == [8, 8]


def test_rows_can_be_grouped_by_length(tmp_path):
    """Every row comes once per epoch, in a new order each time, with much less padding."""
    rows = dataset(64)

    def padding(strategy):
        rollout = FixedRollout()
        steps = spy(rollout, "write")
        trainer(
            tmp_path, rows=rows, rollout=rollout, train_sampling_strategy=strategy, num_train_epochs=2,
            max_steps=-1,
        ).train()  # fmt: skip
        epochs = [
            torch.cat([s.row_ids_B for s in some]).tolist() for some in (steps[:16], steps[16:])
        ]
        assert all(sorted(epoch) == list(range(64)) for epoch in epochs)
        assert epochs[0] != epochs[1]
        return sum(int((step.attention_mask_BT == 0).sum()) for step in steps)

    assert padding("group_by_length") < padding("random") / 2


def test_every_row_is_trained_once_an_epoch(tmp_path):
    rollout = FixedRollout()
    written = spy(rollout, "write")
    trainer(
        tmp_path,
        rollout=rollout,
        rows=toy.rows(10),
        max_steps=-1,
        num_train_epochs=1,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
    ).train()
    seen = torch.cat([sequences.row_ids_B for sequences in written])
    assert sorted(seen.tolist()) == list(range(10))


def test_epochs_are_counted_for_the_rollout(tmp_path):
    seen = []

    class Seen(FixedRollout):
        def write(self, prompts, student, teacher, progress):
            seen.append((progress.step, progress.epoch))
            return super().write(prompts, student, teacher, progress)

    trainer(tmp_path, rollout=Seen(), max_steps=5).train()
    assert seen == [(0, 0), (1, 0), (2, 1), (3, 1), (4, 2)]


# ---- the teacher ----


def test_the_teacher_is_never_changed(tmp_path):
    """N8: it gets no gradient, stays in eval mode and bit-equal, and is not in the trained module."""
    teacher = LocalTeacher(toy.teacher_model(attention_dropout=0.5), toy.tokenizer())
    before = weights(teacher.model)
    made = trainer(tmp_path, teacher=teacher, max_steps=3)
    made.train()
    assert torch.equal(weights(teacher.model), before)
    assert all(p.grad is None and not p.requires_grad for p in teacher.model.parameters())
    assert not any(module.training for module in teacher.model.modules())
    ours = {id(p) for p in made.model.parameters()}
    assert not ours & {id(p) for p in teacher.model.parameters()}


def test_another_vocabulary_is_refused_before_any_step(tmp_path):
    """N11: the error names both tokenizers and their sizes."""
    other = toy.tokenizer("other")
    other.add_tokens(["<extra>"])
    with pytest.raises(VocabularyError, match=r"teacher 'other' \(260 tokens.*student 'toy' \(259"):
        trainer(tmp_path, teacher=LocalTeacher(toy.teacher_model(), other))


# ---- rollouts through the trainer ----


def test_on_policy_steps_train_on_what_the_student_wrote(tmp_path):
    rollout = SampledRollout("student", max_new_tokens=5)
    written = spy(rollout, "write")
    made = trainer(
        tmp_path,
        rollout=rollout,
        rows=toy.rows(8, answers=False),
        max_steps=2,
    )
    before = weights(made.model.student)
    made.train()
    assert not torch.equal(weights(made.model.student), before)
    assert len(written) == 2
    for sequences in written:
        assert (sequences.writer_BT[sequences.response_mask_BT] == Writer.STUDENT).all()


def test_what_was_judged_while_it_was_written_is_not_judged_again(tmp_path):
    class Silent(LocalTeacher):
        def judge(self, *arguments):
            pytest.fail("the teacher has read these tokens")

    teacher = Silent(toy.teacher_model(), toy.tokenizer())
    trainer(tmp_path, rollout=InterleavedRollout(**INTERLEAVED), teacher=teacher).train()


def test_a_judgement_made_while_writing_gives_the_same_gradient(tmp_path):
    class Forgetful(InterleavedRollout):
        def write(self, *arguments):
            return replace(super().write(*arguments), signal=None)

    found, expected = (
        gradient(tmp_path, rollout=kind(**INTERLEAVED), gradient_accumulation_steps=2)
        for kind in (InterleavedRollout, Forgetful)
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert expected.norm() > 0.01


def test_writing_draws_nothing_from_the_global_generator(tmp_path):
    made = trainer(tmp_path, rollout=SampledRollout("student", max_new_tokens=5))
    made.create_optimizer_and_scheduler(1)
    state = torch.get_rng_state()
    made.get_batch_samples(iter([collate(dataset().rows)]), 1, torch.device("cpu"))
    assert torch.equal(torch.get_rng_state(), state)


def test_the_student_writes_in_eval_mode_and_trains_in_train_mode(tmp_path):
    modes = []
    made = trainer(tmp_path, rollout=SampledRollout("student", max_new_tokens=3))
    made.model.student.model.register_forward_pre_hook(
        lambda module, args: modes.append((module.training, torch.is_grad_enabled()))
    )
    made.train()
    assert modes[0] == (False, False)
    assert modes[-1] == (True, True)


# ---- optimizer groups, clipping, guard ----


def test_groups_are_named_after_their_owners(tmp_path):
    made = trainer(tmp_path, objectives=[ResponseObjective(), Projected()], weight_decay=0.1)
    groups = made.create_optimizer().param_groups
    assert [(g["name"], g["weight_decay"]) for g in groups] == [
        ("student", 0.1),
        ("student", 0.0),
        ("projectors", 0.1),
        ("projectors", 0.0),
    ]
    grouped = [id(p) for g in groups for p in g["params"]]
    assert sorted(grouped) == sorted(id(p) for p in made.model.parameters())


def test_projectors_train_with_their_own_learning_rate(tmp_path):
    """A rate of 0.5 is used for its projectors alone, and the schedule ends every rate at 0."""
    objectives = [
        ResponseObjective(),
        HiddenObjective(projector_learning_rate=0.5),
        HiddenObjective("cosine"),
        HiddenObjective(projector_learning_rate=0.5),
    ]
    options = {"learning_rate": 0.1, "lr_scheduler_type": "linear", "max_steps": 2}
    made = trainer(tmp_path, objectives=objectives, **options)
    groups = made.create_optimizer().param_groups
    filled = [(g["name"], g["lr"], len(g["params"])) for g in groups if g["params"]]
    assert filled[-2:] == [("projectors", 0.5, 2), ("projectors", 0.1, 1)]
    assert {rate for name, rate, _ in filled if name == "student"} == {0.1}
    made.train()
    assert {group["lr"] for group in made.optimizer.param_groups} == {0.0}
    once = trainer(tmp_path, objectives=objectives[:3], learning_rate=1e-12)
    before = [one.projectors[0].weight.detach().clone() for one in objectives[1:3]]
    once.train()
    moved = [
        (one.projectors[0].weight - old).abs().max()
        for one, old in zip(objectives[1:3], before, strict=True)
    ]
    assert moved[0] > 1e-3 > moved[1]


def test_a_projector_alone_does_not_change_how_the_student_is_clipped(tmp_path):
    """One norm for both would shrink the student's gradient a thousandfold."""
    options = {"max_grad_norm": 0.5, "learning_rate": 1.0}
    plain = trainer(tmp_path, objectives=[Projected(0.0), ResponseObjective()], **options)
    loud = trainer(tmp_path, objectives=[DetachedProjector(1e4), ResponseObjective()], **options)
    steps = []
    for made in (plain, loud):
        before = weights(made.model.student)
        made.train()
        steps.append(before - weights(made.model.student))
    assert steps[0].norm() == pytest.approx(0.5, rel=1e-3)
    torch.testing.assert_close(steps[1], steps[0])


class DetachedProjector(Projected):
    def forward(self, student, signal, sequences):
        return super().forward(student.detach(), signal, sequences)


def test_optimisers_that_group_for_themselves_are_refused_with_projectors(tmp_path, monkeypatch):
    made = trainer(tmp_path, objectives=[ResponseObjective(), Projected()])
    monkeypatch.setattr(
        type(made),
        "get_optimizer_cls_and_kwargs",
        staticmethod(lambda *a: (torch.optim.SGD, {"params": []})),
    )
    with pytest.raises(TrainingError, match="makes its own parameter groups"):
        made.create_optimizer()


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_step_that_is_not_finite_stops_before_the_update(tmp_path, what):
    """S1: the error names step and rank, and the weights are those of the last good step."""

    class Bad(ResponseObjective):
        calls = 0

        def forward(self, student, signal, sequences):
            total, count = super().forward(student, signal, sequences)
            self.calls += 1
            if self.calls < 3:
                return LossSum(total, count)
            bad = total * torch.inf if what == "loss" else (total - total.detach()).sqrt() + total
            return LossSum(bad, count)

    made = trainer(tmp_path, objectives=[Bad()], max_steps=5)
    kept = []
    made.add_callback(Recorder(lambda: kept.append(weights(made.model.student))))
    with pytest.raises(
        NonFiniteLossError, match="step 2, rank 0: the loss or its gradient is not finite"
    ):
        made.train()
    assert torch.equal(weights(made.model.student), kept[-1])
    assert len(kept) == 2


class Recorder(TrainerCallback):
    def __init__(self, record):
        self.record = record

    def on_step_end(self, *args, **kwargs):
        self.record()


# ---- logging and evaluation ----


def test_logs_the_loss_and_each_term_per_predicted_token(tmp_path):
    objectives = [ResponseObjective("forward_kl"), CrossEntropyObjective(weight=0.5)]
    made = trainer(tmp_path, objectives=objectives, gradient_accumulation_steps=2)
    made.train()
    logs = made.state.log_history[0]
    assert logs["loss"] == pytest.approx(logs["forward_kl"] + 0.5 * logs["cross_entropy"], rel=1e-5)
    assert logs["predicted_tokens"] == sum(len(row.response_ids) for row in dataset().rows)


def test_logs_who_wrote_what(tmp_path):
    """The figures equal those counted from the sequences of an accumulation window."""
    rollout = InterleavedRollout(**INTERLEAVED)
    seen = spy(rollout, "write")
    made = trainer(tmp_path, rollout=rollout, gradient_accumulation_steps=2)
    judged = spy(made.teacher, "judge")
    made.train()
    logs, (written,) = made.state.log_history[0], seen
    assert judged == []  # the rollout has the signal of the kept tokens
    writers = [
        w[m].tolist() for w, m in zip(written.writer_BT, written.response_mask_BT, strict=True)
    ]
    taught = [[writer == Writer.TEACHER for writer in row] for row in writers]
    number = sum(map(len, taught))
    assert 0 < sum(map(sum, taught)) < number
    assert logs["predicted_tokens"] == number
    assert logs["teacher_token_share"] == pytest.approx(sum(map(sum, taught)) / number)
    assert logs["acceptance"] == pytest.approx(1 - logs["teacher_token_share"])
    passes = int(written.teacher_passes_B.sum())
    assert logs["tokens_per_teacher_pass"] == pytest.approx(number / passes)
    assert 1 < logs["tokens_per_teacher_pass"] <= 3
    assert logs["written_per_second"] > 0
    for quarter in range(4):
        part = [t for row in taught for i, t in enumerate(row) if 4 * i // len(row) == quarter]
        assert logs[f"replaced_q{quarter + 1}"] == pytest.approx(sum(part) / max(len(part), 1))


def test_logs_no_acceptance_where_no_model_drafts(tmp_path):
    made = trainer(tmp_path)
    made.train()
    logs = made.state.log_history[0]
    assert not {"acceptance", "written_per_second"} & logs.keys()
    assert logs["teacher_token_share"] == logs["student_token_share"] == 0  # all of the dataset


def test_logs_the_share_of_tokens_that_the_student_wrote(tmp_path):
    made = trainer(tmp_path, rollout=SampledRollout("student", max_new_tokens=4))
    made.train()
    logs = made.state.log_history[0]
    assert (logs["student_token_share"], logs["teacher_token_share"]) == (1, 0)


def test_logs_no_speed_of_what_was_kept(tmp_path):
    """A replay buffer returns tokens that no model writes now."""
    rollout = ReplayRollout(SampledRollout(max_new_tokens=4), capacity=4)
    made = trainer(tmp_path, rollout=rollout, max_steps=3)
    made.train()
    assert not any("written_per_second" in entry for entry in made.state.log_history)


def test_what_was_logged_is_not_logged_again(tmp_path):
    made = trainer(tmp_path, rollout=InterleavedRollout(**INTERLEAVED), max_steps=2)
    made.train()
    first, second, *_ = made.state.log_history
    assert abs(first["predicted_tokens"] - second["predicted_tokens"]) <= 10


def test_an_evaluation_measures_kl_agreement_and_acceptance(tmp_path):
    """Over all rows, in batches of unequal size, whatever the objective is."""
    rows = dataset(5, seed=3)
    made = trainer(
        tmp_path, eval_dataset=rows, per_device_eval_batch_size=2,
        objectives=[ResponseObjective(divergence="tvd")],
    )  # fmt: skip
    found = made.evaluate()
    batch = FixedRollout().write(collate(rows.rows), None, None, None)
    judged = judge(made.teacher, [batch])
    known = agreement(made.model.student, judged, toy.NUM_TOKENS)
    assert found["eval_kl"] == pytest.approx(known.forward_kl, rel=1e-5)
    assert found["eval_top1_agreement"] == pytest.approx(known.top1)
    assert found["eval_draft_acceptance"] == pytest.approx(known.acceptance, rel=1e-5)
    assert found["eval_kl"] != pytest.approx(found["eval_loss"], rel=1e-2)


def test_an_evaluation_without_the_teachers_distributions_measures_none(tmp_path):
    made = trainer(
        tmp_path, eval_dataset=dataset(3), objectives=[HiddenObjective(layers=[(1, -1)])]
    )
    assert not [name for name in made.evaluate() if name in ("eval_kl", "eval_draft_acceptance")]


def test_the_evaluation_loss_is_the_mean_over_tokens_not_over_batches(tmp_path):
    rows = dataset(7, seed=3)
    made = trainer(tmp_path, eval_dataset=rows, per_device_eval_batch_size=2)
    found = made.evaluate()["eval_loss"]
    whole = trainer(tmp_path, eval_dataset=rows, per_device_eval_batch_size=7).evaluate()[
        "eval_loss"
    ]
    single = [
        trainer(tmp_path, eval_dataset=type(rows)([row]), per_device_eval_batch_size=1).evaluate()[
            "eval_loss"
        ]
        for row in rows.rows
    ]
    lengths = [len(row.response_ids) for row in rows.rows]
    by_hand = sum(n * loss for n, loss in zip(lengths, single, strict=True)) / sum(lengths)
    assert found == pytest.approx(whole, rel=1e-5)
    assert found == pytest.approx(by_hand, rel=1e-5)
    assert found != pytest.approx(sum(single) / len(single), rel=1e-3)


# ---- saving, loading, publishing ----


def test_saves_the_student_alone_and_no_pickled_arguments(tmp_path):
    """R12: plain from_pretrained gives the same logits; other parts are in other files."""
    made = trainer(
        tmp_path, objectives=[ResponseObjective(), Projected()], save_strategy="steps", save_steps=1
    )
    made.train()
    folder = tmp_path / "checkpoint-1"
    names = {path.name for path in folder.iterdir()}
    assert "training_args.bin" not in names
    assert {
        "model.safetensors",
        "objectives.safetensors",
        "tokenizer.json",
        "chat_template.jinja",
    } <= names
    loaded = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = torch.arange(3, 12)[None]
    torch.testing.assert_close(loaded(ids).logits, made.model.student.eval()(ids).logits)
    assert loaded.config.use_cache
    assert loaded.generation_config.eos_token_id == 2
    made.export_student(tmp_path / "student")
    exported = {path.name for path in (tmp_path / "student").iterdir()}
    assert not exported & {"objectives.safetensors", "rollout.json", "optimizer.pt"}


def test_the_best_model_is_loaded_at_the_end(tmp_path):
    options = {
        "eval_dataset": dataset(4, seed=5), "max_steps": 3, "learning_rate": 30.0,
        "save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1,
        "load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": False,
    }  # fmt: skip
    made = trainer(tmp_path, **options)
    made.train()
    losses = [entry["eval_loss"] for entry in made.state.log_history if "eval_loss" in entry]
    assert losses[-1] > min(losses) * 1.01  # the last one is not the best
    assert made.evaluate()["eval_loss"] == pytest.approx(min(losses), rel=1e-5)


def test_a_token_is_in_no_file(tmp_path):
    """S9: this test covers checkpoints."""
    made = trainer(tmp_path, save_strategy="steps", save_steps=1, hub_token="hf_" + "x" * 30)
    made.train()
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or b"hf_xxxx" not in path.read_bytes(), path


# ---- arguments ----


def test_several_gpus_without_a_launcher_are_not_data_parallel(tmp_path, caplog):
    args = arguments(tmp_path)
    assert args.n_gpu <= 1
    args._n_gpu = 2
    made = trainer(tmp_path, args=args)
    assert made.args.n_gpu == 1
    assert made.args.train_batch_size == made.args.per_device_train_batch_size
    assert "using one GPU of 2" in caplog.text


def test_an_overflow_is_left_to_the_scaler_of_float16(tmp_path):
    """The scaler skips the step and lowers its scale; without one, the step stops the run."""
    made = trainer(tmp_path, max_grad_norm=1.0)
    made.args.max_steps = 1
    for parameter in made.model.student.parameters():
        parameter.grad = torch.full_like(parameter, torch.inf)
    with pytest.raises(NonFiniteLossError):
        made._get_grad_norm(made.model)
    made.accelerator.scaler = object()
    assert not torch.isfinite(torch.as_tensor(made._get_grad_norm(made.model)))


def test_fsdp_that_would_silently_train_ddp_is_refused(tmp_path):
    model = trainer(tmp_path).model
    check_sharding(model, sharded=True, requested=True)
    with pytest.raises(TrainingError, match="did not shard"):
        check_sharding(model, sharded=False, requested=True)


def test_what_needs_a_whole_student_is_refused_if_it_is_sharded(tmp_path):
    student = toy.model()
    itself = trainer(tmp_path, student=student, teacher=LocalTeacher(student, toy.tokenizer()))
    with pytest.raises(TrainingError, match="runs the student's own model"):
        check_sharding(itself.model, sharded=True, requested=False)
    exits = ExitsObjective(layers=[2], adaptor="norm", export=2)
    with pytest.raises(TrainingError, match="exports a part of the student"):
        check_sharding(trainer(tmp_path, objectives=[exits]).model, sharded=True, requested=False)


def test_the_forced_arguments(tmp_path):
    args = trainer(tmp_path, remove_unused_columns=True, logging_nan_inf_filter=True).args
    assert args.remove_unused_columns is False
    assert args.logging_nan_inf_filter is False
    assert args.accelerator_config.dispatch_batches is False
    assert args.ddp_find_unused_parameters is False


def test_passes_on_what_trainer_asks_of_a_model(tmp_path):
    made = trainer(tmp_path, activation_checkpointing=True)
    model, student = made.model, made.model.student
    assert model.config is student.config
    assert model.get_input_embeddings() is student.get_input_embeddings()
    assert model.get_output_embeddings() is student.get_output_embeddings()
    assert model._no_split_modules == student._no_split_modules
    made.train()
    assert student.is_activation_checkpointing
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = model.no_such_thing


def test_activation_checkpointing_changes_no_gradient(tmp_path):
    plain, checkpointed = (gradient(tmp_path, activation_checkpointing=on) for on in (False, True))
    torch.testing.assert_close(checkpointed, plain, rtol=0, atol=1e-6)


@pytest.fixture
def _environment(monkeypatch):
    """TrainingArguments writes its compile options into the environment for good."""
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "no")
    monkeypatch.setenv("ACCELERATE_DYNAMO_MODE", "default")


@pytest.mark.slow
@pytest.mark.usefixtures("_environment")
@pytest.mark.filterwarnings("ignore")  # the compiler warns about its internals
def test_a_compiled_step_has_the_same_gradient(tmp_path):
    """Decoder layers are compiled, and only for training: the student writes uncompiled."""
    write = SampledRollout("student", max_new_tokens=4)
    plain = gradient(tmp_path, rollout=write)
    frames = CompileCounter()
    torch.compiler.reset()
    made = trainer(
        tmp_path, rollout=write, learning_rate=1.0, torch_compile=True, torch_compile_backend="eager"
    )  # fmt: skip
    for block in made.model.student.model.layers:
        block.compile(backend=frames)
    before = weights(made.model.student)
    made.train()
    assert 0 < frames.frame_count <= 3 * 2  # one frame per layer, and one more when lengths vary
    torch.testing.assert_close(before - weights(made.model.student), plain, rtol=0, atol=1e-6)


@pytest.mark.slow
@pytest.mark.usefixtures("_environment")
@pytest.mark.filterwarnings("ignore")  # the compiler warns about its internals
def test_torch_compile_on_this_machine(tmp_path):
    plain, compiled = (gradient(tmp_path, torch_compile=on) for on in (False, True))
    torch.testing.assert_close(compiled, plain, rtol=0, atol=1e-5)


def test_bf16_autocast_is_close_to_float32(tmp_path):
    plain, half = gradient(tmp_path), gradient(tmp_path, bf16=True)
    cosine = torch.cosine_similarity(plain, half, dim=0)
    assert cosine > 0.99
    assert not torch.equal(plain, half)


def test_a_trainer_state_is_plain_json(tmp_path):
    made = trainer(tmp_path, save_strategy="steps", save_steps=1)
    made.train()
    json.loads((tmp_path / "checkpoint-1" / "trainer_state.json").read_text())
    assert arguments(tmp_path).output_dir == str(tmp_path)


@pytest.mark.parametrize("by", ["student", "teacher"])
def test_writes_under_bf16_autocast(tmp_path, by):
    """A run does this on a machine whose CPU multiplies bfloat16."""
    teacher = LocalTeacher(toy.teacher_model().bfloat16(), toy.tokenizer())
    rollout = SampledRollout(by, max_new_tokens=5)
    made = trainer(tmp_path, rollout=rollout, teacher=teacher, bf16=True, max_steps=2)
    made.train()
    assert all(entry["loss"] > 0 for entry in made.state.log_history if "loss" in entry)
    assert made.model.student.dtype == torch.float32
    assert teacher.model.dtype == torch.bfloat16


def test_batches_that_accelerate_would_split_are_refused(tmp_path):
    options = {"accelerator_config": {"split_batches": True}}
    with pytest.raises(TrainingError, match="split_batches would deal out the rows in another way"):
        trainer(tmp_path, **options)
