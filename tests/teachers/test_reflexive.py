"""The student as its own teacher: its weights, its context, and what is saved and exported."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import TrainerCallback

from llmdistill.batch import Sequences
from llmdistill.data.collate import PromptDataset, collate
from llmdistill.data.validate import Rules
from llmdistill.errors import DataError, RecipeError
from llmdistill.evaluation.measure import Evaluation
from llmdistill.forward import teacher_signal
from llmdistill.models.adapters import add_adapter
from llmdistill.models.load import load_model
from llmdistill.models.taps import Need
from llmdistill.objectives.divergences import forward_kl
from llmdistill.objectives.features import HiddenObjective
from llmdistill.objectives.response import CrossEntropyObjective, ResponseObjective
from llmdistill.protocols import plain
from llmdistill.rollouts.sampled import SampledRollout
from llmdistill.sampling import GREEDY, Draw, Writer
from llmdistill.teachers.adapter_off import AdapterOffTeacher
from llmdistill.teachers.local import LocalTeacher
from llmdistill.teachers.reflexive import ReflexiveTeacher, reprompted
from tests import toy
from tests.conformance import entries
from tests.training.helpers import dataset, trainer, weights

NEEDS = frozenset({Need.DISTRIBUTION})
CONTEXT = "{prompt} A hint: {hint}"


def reflexive(student, **options):
    return ReflexiveTeacher(student, toy.tokenizer(), **options)


def logits(teacher, sequences):
    found = teacher_signal(teacher, sequences, toy.NUM_TOKENS, NEEDS).distribution
    return found.serve()[0 : len(found)].clone()


def informed(number=8, hint="red birds", **rules):
    """Rows of which the teacher reads a hint."""
    rows = [row | {"hint": hint} for row in toy.rows(number)]
    return PromptDataset.encode(
        ((f"row {i}", row) for i, row in enumerate(rows)),
        toy.tokenizer(),
        Rules(columns=("hint",), context=CONTEXT, **rules),
    )


def prompts_of(data):
    return {row.row_id: row.teacher_prompt_ids for row in data.rows}


def trained_a_little(student):
    with torch.no_grad():
        for parameter in student.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return student


# ---- privileged context ----


def test_the_teacher_reads_the_context_before_the_same_response():
    """Alignment row by row: each row alone, with its long prompt, gives the same numbers."""
    data, student = informed(5), toy.model()
    sequences = Sequences.pack(
        [row.prompt_ids for row in data.rows],
        [row.response_ids for row in data.rows],
        [row.row_id for row in data.rows],
        writer=Writer.DATA,
        pad_id=0,
    )
    found = logits(reflexive(student, prompts=prompts_of(data)), sequences)
    expected = []
    for row in data.rows:
        ids = torch.tensor([[*row.teacher_prompt_ids, *row.response_ids]])
        with torch.no_grad():
            all_logits = student(ids).logits[0, :, : toy.NUM_TOKENS]
        expected.append(all_logits[len(row.teacher_prompt_ids) - 1 : -1])
    torch.testing.assert_close(found, torch.cat(expected), rtol=1e-4, atol=1e-4)


def test_the_context_is_rendered_as_the_last_message():
    (row,) = informed(1).rows
    text = toy.tokenizer().decode(row.teacher_prompt_ids)
    prompt = toy.rows(1)[0]["instruction"]
    assert (
        text == f"<|im_start|>user\n{prompt} A hint: red birds<|im_end|>\n<|im_start|>assistant\n"
    )
    assert toy.tokenizer().decode(row.prompt_ids) == text.replace(" A hint: red birds", "")


def test_braces_and_control_tokens_in_a_column_are_text():
    (row,) = informed(1, hint="{prompt} {x} <|im_end|>").rows
    text = toy.tokenizer().decode(row.teacher_prompt_ids)
    assert "A hint: {prompt} {x} <|im_end|><|im_end|>\n" in text
    assert row.teacher_prompt_ids.count(2) == 1


def test_a_response_that_is_trained_in_part_keeps_its_tokens():
    sequences = toy.sequences()
    mask_BT = sequences.response_mask_BT.clone()
    mask_BT[0] = False  # a filler row
    mask_BT[1, int(mask_BT[1].int().argmax()) :: 2] = False
    from dataclasses import replace

    sequences = replace(sequences, response_mask_BT=mask_BT)
    made = reprompted(sequences, [[7] * n for n in (9, 3, 1, 5, 2)])
    assert made.num_predicted.tolist() == sequences.num_predicted.tolist()
    assert made.targets_N.tolist() == sequences.targets_N.tolist()


def test_an_empty_context_and_the_current_weights_have_no_loss(tmp_path):
    """N13: it is the student itself."""
    data, student = informed(hint=" "), toy.model()
    assert all(row.teacher_prompt_ids == row.prompt_ids for row in data.rows)
    teacher = reflexive(student, weights="live", prompts=prompts_of(data))
    made = trainer(tmp_path, student=student, teacher=teacher, rows=data, max_steps=2)
    made.train()
    losses = [entry["loss"] for entry in made.state.log_history if "loss" in entry]
    assert losses == pytest.approx([0, 0], abs=1e-6)


def test_with_a_context_the_student_learns_to_do_without(tmp_path):
    data, student = informed(), toy.model()
    teacher = reflexive(student, prompts=prompts_of(data))
    made = trainer(
        tmp_path, student=student, teacher=teacher, rows=data, max_steps=30, optim="adamw_torch",
        learning_rate=0.005, per_device_train_batch_size=8,
    )  # fmt: skip
    made.train()
    losses = [entry["loss"] for entry in made.state.log_history if "loss" in entry]
    assert losses[0] > 0.05
    assert losses[-1] < 0.5 * losses[0]


def test_it_writes_and_drafts_with_the_context(tmp_path):
    data, student = informed(4), toy.model()
    teacher = reflexive(student, prompts=prompts_of(data))
    prompts = collate(data.rows)
    options = {"max_new_tokens": 5, "draw": Draw(0)}
    found = teacher.write(prompts, GREEDY, **options)
    other = LocalTeacher(toy.model(), toy.tokenizer())
    long = teacher._seen(prompts)
    assert found.responses() == other.write(long, GREEDY, **options).responses()
    assert [ids[: len(row.prompt_ids)] for ids, row in zip(
        found.input_ids_BT.tolist(), data.rows, strict=True)] == [r.prompt_ids for r in data.rows]  # fmt: skip
    for place, by in enumerate(("student", "teacher")):
        rollout = SampledRollout(by, max_new_tokens=4)
        student = toy.model()
        teacher = reflexive(student, prompts=prompts_of(data))
        made = trainer(
            tmp_path / str(place), student=student, teacher=teacher, rows=data, rollout=rollout
        )
        made.train()
        assert made.state.log_history[0]["loss"] > 1e-3


def test_a_row_without_a_prompt_for_the_teacher_is_named():
    data = informed(2)
    teacher = reflexive(toy.model(), prompts=prompts_of(data))
    with pytest.raises(DataError, match="the teacher has no prompt for row 2"):
        logits(teacher, toy.sequences())


def test_a_missing_column_and_one_that_is_no_text_are_malformed_rows():
    for hint, wrong in ((None, "row 0: the row has no 'hint', which the teacher reads"),
                        (7, "'hint' must be text, because the teacher reads it, got 7")):  # fmt: skip
        with pytest.raises(DataError, match=wrong):
            informed(3, hint=hint)


def test_rows_with_a_context_that_is_too_long_are_dropped_and_counted():
    rows = [row | {"hint": "x" * (400 * (i % 2))} for i, row in enumerate(toy.rows(6))]
    rules = Rules(columns=("hint",), context=CONTEXT, max_context_tokens=200)
    data = PromptDataset.encode(
        ((f"row {i}", row) for i, row in enumerate(rows)), toy.tokenizer(), rules
    )
    assert len(data) == 3
    assert "3 dropped: the teacher's prompt too long" in str(data.counts)


# ---- weights ----


@pytest.mark.parametrize("rows", [toy.NUM_TOKENS, toy.NUM_TOKENS + 5])
def test_base_weights_are_those_at_the_start(rows):
    """The head, too: without padding rows, the signal's head is the student's own parameter."""
    student, sequences = toy.model(rows=rows), toy.sequences()
    expected = logits(LocalTeacher(toy.model(rows=rows), toy.tokenizer()), sequences)
    teacher = reflexive(student)
    trained_a_little(student)
    now = weights(student)
    signal = teacher.judge(sequences, NEEDS).distribution
    trained_a_little(student)
    found = signal.serve()[0 : len(signal)]
    torch.testing.assert_close(found[:, : toy.NUM_TOKENS], expected, rtol=0, atol=0)
    with torch.no_grad():
        for parameter, old in zip(
            student.parameters(), now.split([p.numel() for p in student.parameters()]), strict=True
        ):
            parameter.copy_(old.view_as(parameter))
    torch.testing.assert_close(logits(teacher, sequences), expected, rtol=0, atol=0)
    assert torch.equal(weights(student), now)
    assert all(parameter.requires_grad for parameter in student.parameters())


def test_under_an_adapter_base_weights_are_those_with_the_adapter_off():
    student = add_adapter(toy.model(), rank=4, alpha=8, targets="all-linear", dropout=0.0, seed=0)
    teacher, off = reflexive(student), AdapterOffTeacher(student, toy.tokenizer())
    trained_a_little(student)
    sequences = toy.sequences()
    torch.testing.assert_close(logits(teacher, sequences), logits(off, sequences))
    assert len(teacher._kept) == sum(p.requires_grad for p in student.parameters())


def test_live_weights_are_the_students_and_carry_no_gradient():
    student, sequences = toy.model(), toy.sequences()
    teacher = reflexive(student, weights="live")
    trained_a_little(student)
    expected = logits(LocalTeacher(student, toy.tokenizer()), sequences)
    student.requires_grad_(True)
    signal = teacher.judge(sequences, NEEDS)
    torch.testing.assert_close(logits(teacher, sequences), expected)
    assert not signal.distribution.hidden_NH.requires_grad


def test_the_average_moves_by_its_rate_after_each_step(tmp_path):
    student = toy.model()
    teacher = reflexive(student, weights="ema", ema_rate=0.25)
    seen = [weights(student)]

    class Look(TrainerCallback):
        def on_step_end(self, *_, **__):
            seen.append(weights(student))

    made = trainer(
        tmp_path, student=student, teacher=teacher, rows=dataset(8), max_steps=3,
        objectives=[CrossEntropyObjective()], callbacks=[Look()],
    )  # fmt: skip
    made.train()
    expected = seen[0]
    for new in seen[1:]:
        expected = 0.75 * expected + 0.25 * new
    assert (expected - seen[-1]).abs().max() > 1e-3
    found = torch.cat([teacher._kept[name].flatten() for name, _ in student.named_parameters()])
    torch.testing.assert_close(found, expected)


def test_the_average_moves_in_bfloat16_weights_too():
    """A step of 1/20 of a small change would be lost to rounding in bfloat16."""
    student = toy.model().to(torch.bfloat16)
    teacher = reflexive(student, weights="ema", ema_rate=0.05)
    name, parameter = next(iter(student.named_parameters()))
    start = parameter.detach().float().clone()
    with torch.no_grad():
        parameter.add_(0.01)
    for _ in range(100):
        teacher.after_step()
    torch.testing.assert_close(
        teacher._kept[name] - start, parameter.detach().float() - start, rtol=0.02, atol=1e-4
    )


def test_a_resumed_run_has_the_same_average(tmp_path):
    options = {
        "max_steps": 4, "save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch",
        "learning_rate": 0.01, "rows": dataset(8), "objectives": None,
    }  # fmt: skip

    def made(folder):
        student = toy.model()
        teacher = reflexive(student, weights="ema", ema_rate=0.2)
        options["objectives"] = [ResponseObjective(), CrossEntropyObjective()]
        return trainer(folder, student=student, teacher=teacher, **options), teacher

    whole, expected = made(tmp_path)
    whole.train()
    again, found = made(tmp_path)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert torch.equal(weights(again.model.student), weights(whole.model.student))
    for name, value in expected.state_dict().items():
        assert torch.equal(found.state_dict()[name], value)


def test_the_average_is_exported_if_it_is_asked_for(tmp_path):
    for export in (False, True):
        student = toy.model()
        teacher = reflexive(student, weights="ema", ema_rate=0.1, export_ema=export)
        made = trainer(
            tmp_path / "run", student=student, teacher=teacher, rows=dataset(8), max_steps=2,
            objectives=[CrossEntropyObjective()],
        )  # fmt: skip
        made.train()
        trained = weights(student)
        made.export_student(tmp_path / str(export))
        loaded = load_model(str(tmp_path / str(export)), dtype="float32")
        kept = torch.cat([teacher._kept[n].flatten() for n, _ in student.named_parameters()])
        assert (kept - trained).abs().max() > 1e-3
        torch.testing.assert_close(weights(loaded), kept if export else trained)
        assert torch.equal(weights(student), trained)


@pytest.mark.parametrize("kind", ["live", "ema"])
def test_a_student_is_measured_against_the_weights_that_it_started_with(kind):
    student, sequences = toy.model(), toy.sequences()
    teacher = reflexive(student, weights=kind)
    expected = logits(LocalTeacher(toy.model(), toy.tokenizer()), sequences)
    trained_a_little(student)
    teacher.after_step()
    torch.testing.assert_close(logits(plain(teacher), sequences), expected, rtol=0, atol=0)


def test_the_figures_compare_with_the_teacher_that_reads_the_context():
    data, student = informed(3), toy.model()
    teacher = reflexive(student, prompts=prompts_of(data))
    evaluation = Evaluation(teacher, collate(data.rows), max_new_tokens=4, seed=0)
    assert evaluation.teacher_figures() == {}
    found = evaluation.measure(student).figures.kl_teacher_text
    kls = []
    for batch in evaluation.reference.batches:
        plain_student = LocalTeacher(toy.model(), toy.tokenizer())
        kls.append(forward_kl(logits(plain_student, batch), logits(teacher, batch)))
    assert found == pytest.approx(torch.cat(kls).mean().item(), rel=1e-4)
    assert found > 0.01


def test_inner_states_come_from_the_teachers_weights_and_prompt(tmp_path):
    data, student = informed(), toy.model()
    teacher = reflexive(student, prompts=prompts_of(data))
    made = trainer(
        tmp_path, student=student, teacher=teacher, rows=data, objectives=[HiddenObjective()]
    )
    made.train()
    assert made.state.log_history[0]["loss"] > 1e-4


# ---- what is refused ----


def recipe(teacher, **parts):
    return entries.recipe(teacher={"kind": "reflexive"} | teacher, **parts)


@pytest.mark.parametrize(("teacher", "parts", "wrong"), [
    ({"context": "{prompt}"}, {}, "'context' needs {prompt} and the name of at least one column"),
    ({"context": "Look: {hint}"}, {}, "'context' needs {prompt} and the name"),
    ({"export_ema": True}, {}, "'export_ema' needs 'weights: ema'"),
    ({"weights": "live"}, {}, "there is nothing to learn from it"),
    ({}, {}, "the loss is 0 and stays 0"),
    ({"weights": "ema"}, {}, "the loss is 0 and stays 0"),
    ({"weights": "life"}, {}, "Did you mean 'live'"),
    ({"ema_rate": 0.0}, {}, "ema_rate"),
    ({"context": CONTEXT}, {"rollout": {"kind": "interleaved"}}, "cannot write token by token"),
    ({"context": CONTEXT}, {"data": {"train": "x.jsonl", "streaming": True},
                            "training": {"max_steps": 1}}, "Set 'data.streaming: false'"),
])  # fmt: skip
def test_what_cannot_work_is_refused_when_the_recipe_is_read(teacher, parts, wrong):
    with pytest.raises(RecipeError, match=wrong):
        recipe(teacher, **parts)


def test_a_live_teacher_is_fine_with_objectives_that_need_no_teacher():
    recipe({"weights": "live"}, objectives=[{"kind": "cross_entropy"}])
    assert recipe({"context": CONTEXT}).teacher.reads.columns == ("hint",)
    with pytest.raises(RecipeError, match="unknown weights 'life'"):
        reflexive(toy.model(), weights="life")
    with pytest.raises(RecipeError, match="export_ema needs weights='ema'"):
        reflexive(toy.model(), export_ema=True)
    with pytest.raises(RecipeError, match="cannot take part in an interleaved rollout"):
        reflexive(toy.model()).session(collate(dataset(2).rows))


def test_with_export_ema_the_held_out_loss_is_that_of_the_average(tmp_path):
    student = toy.model()
    teacher = reflexive(student, weights="ema", ema_rate=0.1, export_ema=True)
    made = trainer(
        tmp_path, student=student, teacher=teacher, rows=dataset(8), max_steps=3,
        objectives=[CrossEntropyObjective()], eval_dataset=dataset(4, seed=3),
    )  # fmt: skip
    made.train()
    found = made.evaluate()["eval_loss"]
    with made.model.exported_weights():
        average = copy.deepcopy(student)
    other = trainer(
        tmp_path / "other", student=average, rows=dataset(8), eval_dataset=dataset(4, seed=3),
        objectives=[CrossEntropyObjective()],
    )  # fmt: skip
    assert found == pytest.approx(other.evaluate()["eval_loss"], rel=1e-5)
