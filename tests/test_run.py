"""`distill` with an old run in its folder: nothing is lost before the new one has something."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmdistill import recipe as recipes
from llmdistill.data.build import load_data
from llmdistill.data.collate import collate
from llmdistill.errors import CheckpointError, DataError, LlmDistillError
from llmdistill.evaluation.measure import Evaluation
from llmdistill.models.load import load_model
from llmdistill.run import distill
from llmdistill.teachers.local import LocalTeacher
from llmdistill.training.trainer import DistillTrainer
from tests import toy
from tests.support.files import read_jsonl, write_jsonl
from tests.support.spies import spy

pytestmark = pytest.mark.slow


@pytest.fixture
def given(pair, tmp_path):
    """A recipe as plain data, on the toy pair."""
    write_jsonl(tmp_path / "rows.jsonl", toy.rows(10))
    return {
        "output": str(tmp_path / "run"),
        "teacher": {"model": pair[0], "dtype": "float32"},
        "student": {"model": pair[1]},
        "data": {"train": str(tmp_path / "rows.jsonl")},
        "training": {
            "use_cpu": True, "max_steps": 5, "save_steps": 2, "per_device_train_batch_size": 4,
            "learning_rate": 1e-2, "dataloader_pin_memory": False,
        },
    }  # fmt: skip


def run(given, **options):
    return distill(recipes.build(given), **options)


def files(folder):
    """Every file with its bytes."""
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize(
    "change",
    [
        {"data": {"train": "rwos.jsonl"}},
        {"teacher": {"model": "./no_such_model"}},
        {"training": {"use_cpu": True, "max_steps": 1, "optim": "no_such_optimiser"}},
        {"objectives": [{"kind": "hidden", "layers": [[-1, 99]]}]},
    ],
    ids=["data", "teacher", "arguments", "objective"],
)
def test_a_recipe_that_cannot_start_leaves_the_old_run_as_it_was(given, tmp_path, change):
    """F5: a typo in a path costs nothing."""
    run(given)
    before = files(tmp_path / "run")
    assert any(path.name == "model.safetensors" for path in before)
    with pytest.raises(LlmDistillError):
        run(given | change, overwrite=True)
    assert files(tmp_path / "run") == before
    assert not (tmp_path / "run.old").exists()


def test_a_run_that_dies_in_its_first_step_leaves_the_old_one_aside(given, tmp_path, monkeypatch):
    run(given)
    before = files(tmp_path / "run" / "student")

    def dies(self, *args, **kwargs):
        raise RuntimeError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(DistillTrainer, "compute_loss", dies)
        for _ in range(2):  # and again: what is kept is the run with a student
            with pytest.raises(RuntimeError, match="killed"):
                run(given, overwrite=True)
            assert files(tmp_path / "run.old" / "student") == before
    run(given, overwrite=True)
    assert not (tmp_path / "run.old").exists()
    assert (tmp_path / "run" / "student" / "model.safetensors").is_file()


def test_the_old_run_is_deleted_at_the_first_checkpoint(given, tmp_path, monkeypatch):
    run(given)
    seen = []
    compute_loss = DistillTrainer.compute_loss

    def look(self, *args, **kwargs):
        seen.append((tmp_path / "run.old").exists())
        return compute_loss(self, *args, **kwargs)

    monkeypatch.setattr(DistillTrainer, "compute_loss", look)
    run(given, overwrite=True)
    assert seen == [True, True, False, False, False]  # it is saved after step 2


def test_after_a_killed_overwrite_the_run_starts_again_and_keeps_the_old_one(
    given, tmp_path, monkeypatch
):
    run(given)

    def dies(self, *args, **kwargs):
        raise RuntimeError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(DistillTrainer, "compute_loss", dies)
        with pytest.raises(RuntimeError, match="killed"):
            run(given, overwrite=True)
    assert (tmp_path / "run.old" / "student").is_dir()
    run(given)
    assert (tmp_path / "run" / "student").is_dir()
    assert not (tmp_path / "run.old").exists()


def test_a_start_that_failed_is_no_run_in_the_way(given, tmp_path):
    with pytest.raises(LlmDistillError):
        run(given | {"objectives": [{"kind": "hidden", "layers": [[-1, 99]]}]})
    run(given)


def test_a_used_folder_is_refused_before_anything_is_loaded(given, tmp_path):
    run(given)
    wrong = given | {"data": {"train": "rwos.jsonl"}}
    with pytest.raises(CheckpointError, match="is not empty. To continue it, set resume=auto"):
        run(wrong, resume="never")
    given["training"]["max_steps"] = 6  # or it would be finished
    with pytest.raises(DataError, match="rwos.jsonl"):
        run(given | {"data": {"train": "rwos.jsonl"}})


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"training": {"learning_rate": 3e-3}}, "training.learning_rate"),
        ({"training": {"per_device_train_batch_size": 2}}, "training.per_device_train_batch_size"),
        ({"student": {"model": "other"}}, "student.model"),
        ({"teacher": {"dtype": "bfloat16"}}, "teacher.dtype"),
        ({"seed": 3}, "seed"),
        ({"objectives": [{"kind": "response", "divergence": "jsd"}]}, "objectives[0].divergence"),
        ({"rollout": {"kind": "sampled", "by": "student"}}, "rollout.kind"),
    ],
)
def test_a_resume_with_another_recipe_names_the_difference(given, tmp_path, change, key):
    """R9: before anything on disk changes."""
    run(given)
    before = files(tmp_path / "run")
    wrong = {
        k: v | change[k] if k in change and isinstance(v, dict) else v for k, v in given.items()
    }
    with pytest.raises(CheckpointError) as caught:
        run({**change, **wrong})
    assert f"'{key}' was " in str(caught.value)
    assert files(tmp_path / "run") == before


def test_a_resume_may_change_how_long_it_runs_and_what_it_logs(given, tmp_path):
    run(given)
    given["training"] |= {
        "max_steps": 7, "logging_steps": 2, "save_total_limit": 2,
        "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2,
    }  # fmt: skip
    given["data"]["chat_template_kwargs"] = {"date_string": "1 Jan 2026"}  # it changes no row here
    given["data"]["train"] = str(tmp_path / "more/../rows.jsonl")
    (tmp_path / "more").mkdir()
    run(given)
    assert read_jsonl(tmp_path / "run/metrics.jsonl")[-1]["step"] == 7


def test_a_section_that_was_empty_may_get_what_may_change(given, tmp_path):
    before = recipes.build({**given, "training": {}})
    record = tmp_path / "record.yaml"
    record.write_text(recipes.dump(before))
    recipes.require_same(record, recipes.build({**given, "training": {"max_steps": 3}}))
    record.write_text(recipes.dump(before).replace("student:", "student:\n  oldkey: 1"))
    with pytest.raises(CheckpointError, match="made by another version.*oldkey"):
        recipes.require_same(record, before)


def test_the_metrics_hold_each_step_once(given, tmp_path):
    """A run that died after its last checkpoint makes some steps once more."""
    run(given)
    shutil.rmtree(tmp_path / "run/checkpoints/checkpoint-5")
    given["training"]["max_steps"] = 6
    run(given)
    steps = [line["step"] for line in read_jsonl(tmp_path / "run/metrics.jsonl") if "loss" in line]
    assert steps == [1, 2, 3, 4, 5, 6]


def test_a_resume_with_other_rows_is_refused(given, tmp_path):
    """R9: also if it is the chat template that writes them differently, on another day."""
    run(given)
    rows = read_jsonl(tmp_path / "rows.jsonl")
    write_jsonl(
        tmp_path / "rows.jsonl", [*rows[:-1], {"instruction": "another"} | {"output": "one"}]
    )
    before = files(tmp_path / "run")
    given["training"]["max_steps"] = 7
    with pytest.raises(CheckpointError, match=r"rendered as other tokens .*date_string"):
        run(given)
    assert files(tmp_path / "run") == before


def test_a_finished_run_is_exported_again_and_not_trained(given, tmp_path):
    """F6: the student, the checkpoints and the metrics stay what they are."""
    run(given)
    student = (tmp_path / "run/student/model.safetensors").read_bytes()
    metrics = read_jsonl(tmp_path / "run/metrics.jsonl")
    names = sorted(p.name for p in (tmp_path / "run/checkpoints").iterdir())
    (tmp_path / "run/student/model.safetensors").unlink()  # as after a disk that was full
    run(given)
    assert (tmp_path / "run/student/model.safetensors").read_bytes() == student
    assert read_jsonl(tmp_path / "run/metrics.jsonl") == metrics
    assert sorted(p.name for p in (tmp_path / "run/checkpoints").iterdir()) == names


def test_a_longer_run_that_was_killed_is_not_taken_for_a_finished_one(given, tmp_path, monkeypatch):
    run(given)
    given["training"]["max_steps"] = 8

    def dies(self, *args, **kwargs):
        raise RuntimeError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(DistillTrainer, "compute_loss", dies)
        with pytest.raises(RuntimeError, match="killed"):
            run(given)
    run(given)
    assert read_jsonl(tmp_path / "run/metrics.jsonl")[-1]["step"] == 8


def test_a_finished_run_with_other_data_is_another_run(given, tmp_path):
    run(given)
    write_jsonl(tmp_path / "others.jsonl", toy.rows(12, seed=9))
    given["data"] = given["data"] | {"train": str(tmp_path / "others.jsonl")}
    with pytest.raises(CheckpointError, match="rendered as other tokens"):
        run(given)


def test_a_finished_run_without_checkpoints_is_not_started_again(given, tmp_path):
    given["training"]["save_strategy"] = "no"
    run(given)
    student = (tmp_path / "run/student/model.safetensors").read_bytes()
    assert run(given).student == tmp_path / "run" / "student"
    given["training"]["max_steps"] = 8
    with pytest.raises(
        CheckpointError, match="is finished, and it has no checkpoint to go on from"
    ):
        run(given)
    assert (tmp_path / "run/student/model.safetensors").read_bytes() == student


def measuring(given):
    return given | {
        "data": given["data"] | {"hold_back": 2}, "evaluate": {"max_new_tokens": 4},
    }  # fmt: skip


def test_a_resumed_run_keeps_what_was_measured_before_training(given, tmp_path, monkeypatch):
    given = measuring(given)
    run(given)
    before = json.loads((tmp_path / "run" / "evaluation.json").read_text())["before"]
    monkeypatch.setattr(Evaluation, "measure", Evaluation.measure)  # restored afterwards
    measured = spy(Evaluation, "measure")
    longer = given | {"training": given["training"] | {"max_steps": 6}}
    result = run(longer)
    assert len(measured) == 1  # after training
    assert json.loads((tmp_path / "run" / "evaluation.json").read_text())["before"] == before
    assert [one.before for one in result.answers]
    # Other figures are asked for, so the first student is measured again.
    run(longer | {"evaluate": {"max_new_tokens": 5}})
    assert len(measured) == 3


@pytest.mark.parametrize(
    ("asked", "bf16", "found"),
    [
        ("auto", True, torch.bfloat16),
        ("auto", False, torch.float16),  # that of the files
        ("float32", True, torch.float32),
        ("bfloat16", False, torch.bfloat16),
    ],
)
def test_the_student_is_exported_in_the_dtype_it_should_be_used_in(
    given, tmp_path, asked, bf16, found
):
    folder = tmp_path / "half"
    AutoModelForCausalLM.from_pretrained(given["student"]["model"]).half().save_pretrained(folder)
    AutoTokenizer.from_pretrained(given["student"]["model"]).save_pretrained(folder)
    given = measuring(given)
    given["student"] = {"model": str(folder), "export_dtype": asked}
    given["training"] |= {"bf16": bf16, "max_steps": 1}
    result = run(given)
    student = AutoModelForCausalLM.from_pretrained(result.student)
    assert {one.dtype for one in student.parameters()} == {found}
    size = student.num_parameters() * found.itemsize
    assert result.evaluation["after"].num_bytes == size
    file = (result.student / "model.safetensors").stat().st_size
    assert size <= file < 1.2 * size + 20_000  # tied weights are saved once
    # Student and teacher are measured in one dtype, which is stated.
    assert {one.dtype for one in result.evaluation.values()} == {"float32"}


def test_the_figures_are_those_of_the_exported_weights(given, tmp_path):
    """float16 rounds the weights, so other weights would give other figures."""
    given = measuring(given)
    given["student"] |= {"export_dtype": "float16"}
    result = run(given)
    teacher = LocalTeacher.load(given["teacher"]["model"], dtype="float32")
    _, held = load_data(recipes.build(given), teacher.tokenizer)
    again = Evaluation(teacher, collate(held.rows), max_new_tokens=4, seed=0)
    figures = again.measure(load_model(str(result.student), dtype="float32")).figures
    assert figures.kl_teacher_text == result.evaluation["after"].kl_teacher_text


@pytest.mark.parametrize("merged", [True, False])
def test_an_adapter_is_exported_and_measured(given, tmp_path, merged):
    given = measuring(given)
    save = "merged" if merged else "adapter"
    given["student"] |= {"peft": {"r": 2, "save": save}, "export_dtype": "bfloat16"}
    result = run(given)
    assert result.evaluation["after"].kl_teacher_text > 0
    assert (result.student / "model.safetensors").is_file() == merged


def test_the_figures_before_training_are_those_of_an_exported_student(given, tmp_path):
    """Rounding leaves the frequencies of rotary positions alone, as loading does."""
    given = measuring(given)
    given["student"] |= {"export_dtype": "bfloat16"}
    given["training"] |= {"max_steps": 1, "learning_rate": 1e-12}
    result = run(given)
    before, after = (result.evaluation[name] for name in ("before", "after"))
    assert before.kl_teacher_text == after.kl_teacher_text
    assert before.num_bytes == after.num_bytes


def test_a_run_killed_before_its_first_step_is_measured_at_its_start(given, tmp_path, monkeypatch):
    given = measuring(given) | {
        "rollout": {"kind": "sampled", "by": "teacher", "max_new_tokens": 3}
    }
    given["training"] |= {"eval_on_start": True, "max_steps": 1}

    def killed(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("transformers.Trainer.train", killed)
        with pytest.raises(KeyboardInterrupt):
            run(given)
    run(given | {"rollout": given["rollout"] | {"batch_size": 2}})
    losses = [line for line in read_jsonl(tmp_path / "run/metrics.jsonl") if "eval_loss" in line]
    assert losses[0]["step"] == 0
