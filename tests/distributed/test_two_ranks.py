"""D1, D2, D3, D4, D5, D7: two gloo ranks give the same result as one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llmdistill import recipe as recipes
from llmdistill.errors import CheckpointError
from llmdistill.generate import generate
from llmdistill.objectives.features import HiddenObjective
from llmdistill.rollouts.interleaved import InterleavedRollout
from llmdistill.rollouts.sampled import SampledRollout
from llmdistill.run import distill
from llmdistill.training.seal import numbered, require_sealed
from tests import toy
from tests.distributed.launch import after, launched, two_ranks
from tests.distributed.sharded import REFUSED, REFUSED_BY_ZERO3, ROLLOUTS, WHOLE_RUNS, student_of
from tests.distributed.worker import (
    DONE,
    FIVE_STEPS,
    QUEUES,
    SEAMS,
    WRITERS,
    contrasts,
    every_entry,
    going_on,
    measured_run,
    queues_by_prompt,
)
from tests.support.files import read_jsonl, write_jsonl
from tests.support.recipes import build_generation
from tests.support.teachers import Learner, seam_objectives
from tests.training.helpers import INTERLEAVED, dataset, trained, trainer, weights

# One test waits for the launch of all cases.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


def left(folder: Path, name: str = "weights") -> torch.Tensor:
    """Load what a case has saved."""
    return torch.load(folder / f"{name}.pt", weights_only=True)


def one_rank(folder: Path, **options) -> torch.Tensor:
    made = trainer(folder, **options)
    made.train()
    return weights(made.model.student)


@after("fixed")
def test_the_same_global_batch_gives_the_same_weights(folder, tmp_path):
    expected = one_rank(tmp_path / "one", rows=dataset(16), per_device_train_batch_size=16)
    torch.testing.assert_close(left(folder), expected, rtol=0, atol=1e-6)


@after("partitions")
def test_how_a_step_is_divided_changes_nothing(folder, tmp_path):
    """D2: 1 rank x 8 rows, 2 x 4, and 2 x 2 in two micro-batches, for five steps of SGD."""
    for name, rollout in WRITERS.items():
        options = FIVE_STEPS | {"rows": dataset(FIVE_STEPS["rows"]), "rollout": rollout()}
        expected = one_rank(tmp_path / "one", per_device_train_batch_size=8, **options)
        for rows in (4, 2):
            found = left(folder, f"{name}-{rows}")
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-6, msg=f"{name} {rows}")


@after("uneven", "resumed")
def test_rows_that_even_out_the_ranks_weigh_nothing(folder, tmp_path):
    """10 rows on 2 ranks need filler rows; two epochs are trained."""
    expected = one_rank(
        tmp_path / "one",
        rows=dataset(10),
        per_device_train_batch_size=4,
        max_steps=-1,
        num_train_epochs=2,
    )
    torch.testing.assert_close(left(folder), expected, rtol=0, atol=1e-6)


@after("on_policy")
def test_on_policy_writes_the_same_on_two_ranks(folder, tmp_path):
    expected = one_rank(
        tmp_path / "one",
        rows=dataset(16),
        rollout=SampledRollout("student", max_new_tokens=6),
        per_device_train_batch_size=8,
        max_steps=2,
    )
    torch.testing.assert_close(left(folder), expected, rtol=0, atol=1e-6)


@after("interleaved")
def test_two_models_write_the_same_on_two_ranks(folder, tmp_path):
    made = trainer(
        tmp_path / "one",
        rows=dataset(16),
        rollout=InterleavedRollout(**INTERLEAVED),
        per_device_train_batch_size=8,
        max_steps=2,
    )
    made.train()
    torch.testing.assert_close(left(folder), weights(made.model.student), rtol=0, atol=1e-6)
    both = left(folder, "logs")
    assert len(both) == 2
    for ours, alone in zip(both, made.state.log_history, strict=False):
        for name in (
            "predicted_tokens",
            "acceptance",
            "teacher_token_share",
            "replaced_q1",
            "replaced_q4",
        ):
            assert ours[name] == pytest.approx(alone[name]), name
        assert ours["tokens_per_teacher_pass"] == pytest.approx(alone["tokens_per_teacher_pass"])


@pytest.mark.parametrize("where", ["local", "remote"])
def test_two_ranks_make_the_same_data_set(tmp_path, pair, server, where):
    teacher = {"model": pair[0], "dtype": "float32"}
    if where == "remote":
        teacher = {"kind": "remote", "model": "m", "url": server.url}
    rows = write_jsonl(tmp_path / "rows.jsonl", toy.rows(14))
    folders = [tmp_path / name for name in ("one", "two")]
    made = [
        build_generation({
            "output": str(folder), "teacher": teacher, "target": 12,
            "generator": {"kind": "answer", "prompts": str(rows), "answering": {"max_new_tokens": 6}},
            "filters": [], "round_size": 4,
        })
        for folder in folders
    ]  # fmt: skip
    generate(made[0])
    place = tmp_path / "generating"
    place.mkdir()
    (place / "recipe.yaml").write_text(recipes.dump(made[1]))
    two_ranks(place)
    for name in ("rows.jsonl", "calls.jsonl", "train.jsonl"):
        assert (folders[1] / name).read_bytes() == (folders[0] / name).read_bytes()
    assert not list(folders[1].glob("spoken-*"))


@after("evaluation")
def test_the_evaluation_loss_is_the_same_on_two_ranks(folder, tmp_path):
    made = trainer(tmp_path / "one", eval_dataset=dataset(5, seed=4), per_device_eval_batch_size=5)
    expected = torch.tensor([made.evaluate()["eval_loss"]])
    torch.testing.assert_close(left(folder), expected, rtol=1e-5, atol=0)


@after(
    "gradients",
    "bad_rank",
    "zero_bad_rank",
    "streamed",
    "empty_rank",
    "empty_rank_resumed",
    "restored",
    "kept_answers",
)
def test_on_two_ranks(folder):
    """D1, D3, D5, N6, R1, R2, S1: `worker.py` and `failing.py` assert these on both ranks."""
    assert (folder / DONE).is_file()


def test_a_rank_that_ends_ends_both_and_the_run_can_be_resumed(tmp_path):
    """D6, R3."""
    for case, said in {"rank_fails": "rank 1 cannot write", "rank_killed": "SIGKILL"}.items():
        done = launched(tmp_path / case)
        assert done.returncode != 0
        assert said in done.stdout + done.stderr
        saved = [folder.name for folder in numbered(tmp_path / case / "run")]
        assert saved == ["checkpoint-1", "checkpoint-2"], case
    two_ranks(*(tmp_path / case / "after_a_failure" for case in ("rank_fails", "rank_killed")))


def test_sigterm_of_the_launcher_saves_and_ends_all_ranks(tmp_path):
    """R7, D6."""
    done = launched(tmp_path / "asked_to_stop", stop_at="step-3")
    assert done.returncode != 0
    [saved] = numbered(tmp_path / "asked_to_stop" / "run")
    step = require_sealed(saved).step
    assert step >= 4
    assert f"SIGTERM ended the run after step {step}" in done.stderr


@after("one_writes")
def test_one_rank_writes_what_is_of_all(folder):
    """D6."""
    own, other = (
        {file.name for file in (folder / f"of-{rank}").rglob("*") if file.is_file()}
        for rank in (0, 1)
    )
    assert other == {"rng_state_1.pth", "rollout_1.json"}
    assert {"model.safetensors", "optimizer.pt", "manifest.json", "rng_state_0.pth"} <= own


@after("seams")
def test_every_divisor_and_what_trains_along_is_the_same_on_two_ranks(folder, tmp_path):
    options = SEAMS | {"rows": dataset(SEAMS["rows"]), "per_device_train_batch_size": 8}
    made = trainer(tmp_path / "one", teacher=Learner(), objectives=seam_objectives(), **options)
    made.train()
    torch.testing.assert_close(left(folder), trained(made), rtol=0, atol=1e-6)


@after("queues")
def test_queues_and_the_factor_are_the_same_on_two_ranks(folder, tmp_path):
    """D2: ICD, CRD and RRD; the queues hold the samples of all ranks."""
    options = QUEUES | {"rows": dataset(QUEUES["rows"]), "per_device_train_batch_size": 8}
    made = trainer(tmp_path / "one", objectives=contrasts(), **options)
    made.train()
    torch.testing.assert_close(left(folder), trained(made), rtol=0, atol=1e-5)
    both = left(folder, "queues")
    torch.testing.assert_close(both, queues_by_prompt(made), rtol=0, atol=1e-5)


@after("hidden_alone")
def test_hidden_states_alone_on_two_ranks(folder, tmp_path):
    options = {"rows": dataset(16), "per_device_train_batch_size": 8, "max_steps": 2}
    expected = one_rank(tmp_path / "one", objectives=[HiddenObjective(layers=[(1, -1)])], **options)
    torch.testing.assert_close(left(folder), expected, rtol=0, atol=1e-6)


@after("conformance", "sharded_conformance", "zero_conformance", "zero3_conformance")
def test_every_objective_rollout_and_teacher_is_the_same_on_two_ranks(folder, alone):
    """D2, D5, D7: everything that a recipe can have; the eighth row is filler."""
    case = folder.name
    names = {
        "conformance": (),
        "zero_conformance": ("resting",),
        "zero3_conformance": REFUSED_BY_ZERO3,
    }.get(case, REFUSED)
    left_out = {name for name in alone if name.removeprefix("teacher-") in names}
    if case != "conformance":
        left_out |= {name for name in alone if name.startswith("response-")}
    found = {file.stem for file in folder.glob("*.pt")}
    assert found == alone.keys() - left_out
    for name in found:
        torch.testing.assert_close(left(folder, name), alone[name], rtol=0, atol=1e-5, msg=name)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one rank has trained after a step, with each entry of each table."""
    made = {}
    for name, options in every_entry():
        rows = {"rows": dataset(7), "per_device_train_batch_size": 8}
        one = trainer(tmp_path_factory.mktemp("one"), **rows, **options())
        one.train()
        assert name not in made
        made[name] = trained(one)
    return made


@after("sharded_runs", "zero_runs", "zero3_runs")
def test_a_sharded_run_is_the_run_of_one_rank(folder, tmp_path):
    """D7: it measures, clips, saves, is resumed, and exports its student."""
    for name, options in WHOLE_RUNS.items():
        straight, *resumed = (
            load_file(folder / name / f"student-{start}" / "model.safetensors")
            for start in (None, "checkpoint-2", True)
        )
        for one in resumed:
            torch.testing.assert_close(one, straight, rtol=0, atol=0)
        if name == "replay":  # two ranks have two buffers, so they replay other rows than one
            continue
        batch = {"per_device_train_batch_size": 8, "per_device_eval_batch_size": 5}
        made = trainer(tmp_path / name, **options() | batch, student=student_of(name))
        made.train()
        made.export_student(tmp_path / name)
        alone = load_file(tmp_path / name / "model.safetensors")
        # AdamW divides by small numbers: a rounding may change an update by some of the rate, 1e-2.
        torch.testing.assert_close(straight, alone, rtol=0, atol=2e-4)
        losses = [line["eval_loss"] for line in made.state.log_history if "eval_loss" in line]
        both = left(folder, f"{name}-losses")
        torch.testing.assert_close(both, torch.tensor(losses), rtol=1e-5, atol=0)


@after("sharded_bfloat16")
def test_fsdp2_in_bfloat16_rounds_no_loss(folder, tmp_path):
    """D7: losses, counts and sums of gradients stay float32."""
    options = {"rows": dataset(16), "per_device_train_batch_size": 8, "bf16": True}
    made = trainer(tmp_path / "one", **options)
    made.train()
    torch.testing.assert_close(left(folder), weights(made.model.student), rtol=0, atol=1e-3)
    assert float(left(folder, "loss")) == pytest.approx(made.state.log_history[0]["loss"], rel=1e-2)


@after("sharded_alone")
def test_each_objective_on_states_alone_trains_a_sharded_student(folder):
    """D7: `sharded.py` asserts it."""
    assert (folder / DONE).is_file()


@after("three_steps")
def test_another_number_of_ranks_goes_on_with_the_same_steps(folder, tmp_path):
    """F15: an on-policy run, with as many rows in a step; with fewer it is refused."""
    saved = str(folder / "run" / "checkpoint-3")
    with pytest.raises(CheckpointError, match=r"rows in a step \(4 then, 2 now\)"):
        trainer(tmp_path / "fewer", **going_on(), per_device_train_batch_size=2, max_steps=6).train(
            resume_from_checkpoint=saved
        )
    runs = []
    for name, resume in (("resumed", saved), ("straight", None)):
        run = trainer(tmp_path / name, **going_on(), per_device_train_batch_size=4, max_steps=6)
        run.train(resume_from_checkpoint=resume)
        assert run.state.global_step == 6
        runs.append(weights(run.model.student))
    torch.testing.assert_close(*runs, rtol=0, atol=1e-6)


@after("sharded_teacher")
def test_a_sharded_teacher_is_a_whole_one(folder, tmp_path, monkeypatch):
    """D7: it scores, writes ahead, writes with the student, and is measured against.

    Two ranks have unequal work: three batches to write ahead, and 3 held-out prompts.
    """
    monkeypatch.chdir(tmp_path)
    for name, rollout in ROLLOUTS.items():
        alone = measured_run(folder, f"{name}-one") | {"rollout": rollout}
        alone["training"]["max_steps"] = 2
        distill(recipes.build(alone), show_progress=False)
        one, two = (
            load_file(folder / f"{name}-{number}" / "student" / "model.safetensors")
            for number in ("one", "two")
        )
        torch.testing.assert_close(two, one, rtol=0, atol=1e-6)
        one, two = (
            json.loads((folder / f"{name}-{number}" / "evaluation.json").read_text())
            for number in ("one", "two")
        )
        for measured, figures in one.items():
            for figure in ("kl_teacher_text", "kl_own_text", "rouge_l_teacher", "perplexity"):
                known = pytest.approx(figures[figure], rel=1e-4, abs=1e-6)
                assert two[measured][figure] == known, (name, measured, figure)


@after("whole_run")
def test_a_run_that_measures_before_its_first_step(folder):
    """`eval_on_start` needs the held-out rows on all ranks."""
    assert (folder / "run/student/model.safetensors").is_file()
    steps = [line.get("step") for line in read_jsonl(folder / "run/metrics.jsonl")]
    assert max(steps) == 3


@after("zero3_measured")
def test_a_recipe_runs_under_zero3(folder, tmp_path, monkeypatch):
    """D7: models are loaded whole, and the exported student is the one of one rank."""
    monkeypatch.chdir(tmp_path)
    distill(recipes.build(measured_run(folder, "one")), show_progress=False)
    ours, theirs = (
        load_file(folder / name / "student" / "model.safetensors") for name in ("two", "one")
    )
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    ours, theirs = (
        json.loads((folder / name / "evaluation.json").read_text()) for name in ("two", "one")
    )
    assert ours["after"]["perplexity"] == pytest.approx(theirs["after"]["perplexity"], rel=1e-4)


@after("measured")
def test_two_ranks_share_the_held_out_prompts_and_measure_the_same(folder, tmp_path, monkeypatch):
    """Three prompts: one rank has two of them."""
    monkeypatch.chdir(tmp_path)
    distill(recipes.build(measured_run(folder, "one")), show_progress=False)
    ours, theirs = (
        json.loads((folder / name / "before.json").read_text()) for name in ("two", "one")
    )
    assert ours["of"] == theirs["of"]
    assert ours["responses"] == theirs["responses"]
    speed = ours["figures"].pop("tokens_per_second"), theirs["figures"].pop("tokens_per_second")
    assert min(speed) > 0
    for name, value in theirs["figures"].items():
        known = pytest.approx(value, rel=1e-5) if isinstance(value, float) else value
        assert ours["figures"][name] == known, name
    ours, theirs = (
        json.loads((folder / name / "evaluation.json").read_text()) for name in ("two", "one")
    )
    assert ours["teacher"]["kl_own_text"] == pytest.approx(
        theirs["teacher"]["kl_own_text"], abs=1e-6
    )
    assert ours["after"]["perplexity"] == pytest.approx(theirs["after"]["perplexity"], rel=1e-4)
