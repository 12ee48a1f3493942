"""Recipes of several runs: a chain of assistants (TAKD), and born-again generations."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from llmdistill import recipe as recipes
from llmdistill.errors import CheckpointError, RecipeError
from llmdistill.models.load import load_model
from llmdistill.run import distill
from tests import toy
from tests.conformance import entries
from tests.training.helpers import weights


@pytest.fixture
def parts(pair, tmp_path):
    """The parts of a recipe on toys that all runs share."""
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in toy.rows(8)))
    return {
        "student": {"model": pair[1]},
        "data": {"train": str(tmp_path / "train.jsonl")},
        "training": {
            "use_cpu": True, "max_steps": 2, "learning_rate": 0.01, "bf16": False,
            "save_strategy": "steps", "save_steps": 1,
        },
    }  # fmt: skip


def run(folder, parts, name, **changes):
    recipe = recipes.build({"output": str(folder / name)} | parts | changes)
    distill(recipe, show_progress=False)
    return exported(folder / name)


def exported(folder):
    return weights(load_model(str(folder / "student"), dtype="float32"))


def chain(pair, *assistants):
    teacher = {"model": pair[0], "dtype": "float32"}
    return {"kind": "chain", "teacher": teacher, "assistants": list(assistants)}


def test_a_chain_of_length_one_is_distillation(parts, pair, tmp_path):
    """N13: without an assistant the teacher teaches the student."""
    expected = run(tmp_path, parts, "kd", teacher={"model": pair[0], "dtype": "float32"})
    assert torch.equal(run(tmp_path, parts, "chain", teacher=chain(pair)), expected)


def test_each_student_teaches_the_next(parts, pair, tmp_path):
    """The same as two runs by hand."""
    assistant = {"model": pair[0], "carve": {"layers": [0, 1, 3]}}
    teacher = {"model": pair[0], "dtype": "float32"}
    run(tmp_path, parts | {"student": assistant}, "first", teacher=teacher)
    second = {"model": str(tmp_path / "first" / "student"), "dtype": "float32"}
    expected = run(tmp_path, parts, "second", teacher=second)
    found = run(tmp_path, parts, "chain", teacher=chain(pair, assistant))
    assert torch.equal(found, expected)
    assert torch.equal(exported(tmp_path / "chain.assistant1"), exported(tmp_path / "first"))
    assert "assistants" in (tmp_path / "chain" / "recipe.yaml").read_text()
    card = (tmp_path / "chain" / "student" / "README.md").read_text()
    assert "through 1 assistant (TAKD)" in card


def test_all_are_measured_against_the_first_teacher(parts, pair, tmp_path):
    data = parts["data"] | {"hold_back": 2}
    changes = {"data": data, "evaluate": {"max_new_tokens": 4}}
    recipe = recipes.build(
        {"output": str(tmp_path / "chain")} | parts | changes
        | {"teacher": chain(pair, {"model": pair[1]})}
    )  # fmt: skip
    assert [stage.evaluate.against.model for stage in recipe.stages] == [pair[0]] * 2
    result = distill(recipe, show_progress=False)
    assert result.evaluation["teacher"].num_parameters == toy.teacher_model().num_parameters()


def test_generation_0_is_fine_tuning_and_the_next_starts_from_the_base_again(parts, pair, tmp_path):
    labels = [{"kind": "cross_entropy"}]
    both = [{"kind": "response"}, *labels]
    sft = run(tmp_path, parts, "sft", teacher={"model": pair[0]}, objectives=labels)
    found = run(
        tmp_path, parts, "ban", teacher={"kind": "born_again", "generations": 2}, objectives=both
    )
    assert torch.equal(exported(tmp_path / "ban.generation0"), sft)
    before = {"model": str(tmp_path / "ban.generation0" / "student")}
    first = run(tmp_path, parts, "first", teacher=before, objectives=both)
    assert torch.equal(exported(tmp_path / "ban.generation1"), first)
    before = {"model": str(tmp_path / "ban.generation1" / "student")}
    assert torch.equal(found, run(tmp_path, parts, "second", teacher=before, objectives=both))


def test_a_resumed_chain_repeats_no_run_that_is_finished(parts, pair, tmp_path):
    teacher = chain(pair, {"model": pair[1]}, {"model": pair[1]})
    expected = run(tmp_path, parts, "chain", teacher=teacher)
    recipe = recipes.build({"output": str(tmp_path / "chain")} | parts | {"teacher": teacher})
    first = tmp_path / "chain.assistant1" / "student" / "model.safetensors"
    stamp = first.stat().st_mtime_ns
    # Killed in the second run, after its first step.
    shutil.rmtree(tmp_path / "chain")
    shutil.rmtree(tmp_path / "chain.assistant2" / "student")
    shutil.rmtree(tmp_path / "chain.assistant2" / "checkpoints" / "checkpoint-2")
    distill(recipe, show_progress=False)
    assert first.stat().st_mtime_ns == stamp
    assert torch.equal(exported(tmp_path / "chain"), expected)


def test_what_an_older_start_left_is_not_taken_for_a_finished_run(parts, pair, tmp_path):
    """Overwritten with another learning rate and killed in the first run, then resumed."""
    teacher = chain(pair, {"model": pair[1]})
    run(tmp_path, parts, "chain", teacher=teacher)
    faster = parts | {"training": parts["training"] | {"learning_rate": 0.03}}
    expected = run(tmp_path, faster, "other", teacher=teacher)
    first = tmp_path / "chain.assistant1"
    shutil.rmtree(first)
    shutil.copytree(tmp_path / "other.assistant1", first)
    shutil.rmtree(first / "student")
    shutil.rmtree(first / "checkpoints" / "checkpoint-2")
    recipe = recipes.build({"output": str(tmp_path / "chain")} | faster | {"teacher": teacher})
    distill(recipe, show_progress=False)
    assert torch.equal(exported(tmp_path / "chain"), expected)


def test_earlier_runs_are_not_pushed_and_generation_0_follows_no_loss(parts, pair):
    training = parts["training"] | {"push_to_hub": True, "hub_model_id": "me/small"}
    changes = {"training": training, "data": parts["data"] | {"hold_back": 2}}
    changes |= {"evaluate": {"every_steps": 1, "patience": 1}}
    for teacher in (chain(pair, {"model": pair[1]}), {"kind": "born_again"}):
        recipe = recipes.build({"output": "run"} | parts | changes | {"teacher": teacher})
        first, last = recipe.stages
        assert not {"push_to_hub", "hub_model_id"} & first.training.keys()
        assert last.training == recipe.training
        assert last.evaluate.patience == 1
        assert first.evaluate.patience == (None if teacher["kind"] == "born_again" else 1)


def test_inner_states_are_measured_against_the_runs_own_teacher(parts, pair, tmp_path):
    """The first teacher, of another width, gives the figures, but no states for the held-out loss."""
    run(
        tmp_path, parts, "chain",
        teacher=chain(pair, {"model": pair[1]}),
        objectives=[{"kind": "response"}, {"kind": "hidden", "layers": [[2, 2]]}],
        data=parts["data"] | {"hold_back": 2},
        evaluate={"max_new_tokens": 4, "every_steps": 1},
    )  # fmt: skip


def test_a_folder_of_any_run_that_is_in_use_stops_all_of_them(parts, pair, tmp_path):
    teacher = chain(pair, {"model": pair[1]})
    run(tmp_path, parts, "chain", teacher=teacher)
    shutil.rmtree(tmp_path / "chain.assistant1")
    recipe = recipes.build({"output": str(tmp_path / "chain")} | parts | {"teacher": teacher})
    with pytest.raises(CheckpointError, match="chain is not empty"):
        distill(recipe, show_progress=False)
    assert not (tmp_path / "chain.assistant1").exists()
    distill(recipe, overwrite=True, show_progress=False)
    assert (tmp_path / "chain.assistant1" / "student").is_dir()


def test_what_cannot_teach_the_next_is_refused():
    peft = {"model": "s", "peft": {"save": "adapter"}}
    with pytest.raises(RecipeError, match="an assistant teaches the next model"):
        entries.recipe(teacher=chain("ts", peft))
    with pytest.raises(RecipeError, match="a generation teaches the next one"):
        entries.recipe(teacher={"kind": "born_again"}, student=peft)
    with pytest.raises(RecipeError, match="generation 0 learns from the labels"):
        entries.recipe(teacher={"kind": "born_again"}, rollout={"kind": "sampled"})
