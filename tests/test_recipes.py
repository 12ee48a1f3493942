"""P1: every recipe is found, loads strictly, and runs two steps on a toy pair."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmdistill import recipe as recipes
from llmdistill.data.collate import PromptDataset, collate
from llmdistill.data.sources import read
from llmdistill.evaluation.measure import Evaluation
from llmdistill.generate import filled, generate, planned
from llmdistill.models.load import load_model, load_tokenizer
from llmdistill.run import distill
from llmdistill.teachers.local import LocalTeacher
from scripts import estimate_memory
from tests import toy
from tests.support.files import read_jsonl, write_jsonl
from tests.support.recipes import TRAINING, build_generation, generation_on_toys, on_toys

ROOT = Path(__file__).parents[1]
RECIPES = sorted(ROOT.glob("recipes/*.yaml"))
GENERATING = sorted(ROOT.glob("recipes/generate/*.yaml"))
ALL = RECIPES + GENERATING
LAUNCHING = sorted(ROOT.glob("recipes/accelerate/*.yaml"))
FIGURES = {
    "kl_teacher_text", "kl_own_text", "top1_agreement", "draft_acceptance", "rouge_l_teacher",
    "rouge_l_references", "exact_match", "perplexity", "repeated_4grams", "num_parameters", "num_bytes",
    "tokens_per_second", "dtype",
}  # fmt: skip


@pytest.fixture
def data(tmp_path):
    for name, number in (("train", 9), ("heldout", 3)):
        write_jsonl(tmp_path / f"{name}.jsonl", toy.rows(number, seed=number))
    return tmp_path


def test_recipes_of_both_kinds_are_found_and_listed_for_readers():
    readme = (ROOT / "README.md").read_text()
    assert RECIPES
    assert GENERATING
    assert [path.stem for path in ALL if f"`{path.stem}`" not in readme] == []
    assert sorted(ROOT.glob("recipes/**/*.yaml")) == sorted(ALL + LAUNCHING)


@pytest.mark.parametrize("path", LAUNCHING, ids=lambda path: path.stem)
def test_accelerate_reads_its_configurations(path):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(path))
    assert config.num_processes == 8
    assert f"`recipes/accelerate/{path.name}`" in (ROOT / "docs/several_gpus.md").read_text()


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.stem)
def test_a_recipe_is_in_the_folder_of_its_command(path):
    expected = "generate" if path in GENERATING else "train"
    assert recipes.command_of(plain(path)) == expected


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.stem)
def test_the_header_says_pair_hardware_data_and_time(path):
    header = [line for line in path.read_text().splitlines() if line.startswith("#")]
    for word in ("Pair", "Hardware", "Data", "Time"):
        assert any(line.startswith(f"# {word:9} ") for line in header), word
    assert not any(line.endswith(" TIME") for line in header)


@pytest.mark.slow
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_header_has_the_estimated_memory(path):
    parts = estimate_memory.estimate(path)
    stated = re.search(r"estimates at most ([\d.]+) GiB", path.read_text())
    assert (stated is None) == (parts is None)  # CPU recipes have a measured figure
    if stated is not None:
        assert float(stated.group(1)) == round(sum(parts.values()) / 2**30, 1)


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.stem)
def test_a_recipe_reads_no_file_that_a_user_does_not_have(path):
    """Rows of the package, a public dataset (org/name:split), or what the recipe itself writes."""
    made = plain(path).get("generate", {}).get("output", "nothing")
    sources = [source for source in sources_in(plain(path)) if source != "seed_tasks"]
    own = [source for source in sources if source.startswith(f"{made}/")]
    public = [source for source in sources if re.match(r"[\w-]+/[\w-]+:[\w:\[\]-]+$", source)]
    assert sorted(own + public) == sorted(sources)
    if "cpu" in path.stem or "smollm2-135m-instruct" in str(plain(path)["teacher"]):
        assert sources == []


def plain(path: Path) -> dict[str, Any]:
    return recipes.parse_yaml(path.read_text(), path.stem)


def sources_in(part: Any, key: str = "") -> list[str]:
    """The names of all sources of rows in a recipe."""
    if isinstance(part, dict):
        return [name for key, value in part.items() for name in sources_in(value, key)]
    if isinstance(part, list):
        return [name for one in part for name in sources_in(one, key)]
    is_source = key in ("train", "eval", "source", "sources", "prompts", "pool", "seed_tasks")
    return [part] if is_source and isinstance(part, str) else []


@pytest.mark.slow
@pytest.mark.parametrize("path", GENERATING, ids=lambda path: path.stem)
def test_makes_two_rows_with_a_toy_teacher(path, pair, data):
    assert recipes.load_generation(path).filters
    given = generation_on_toys(plain(path), pair, data)
    made = generate(build_generation(given | {"target": 2, "round_size": 4}))
    assert made.counts.kept == 2
    assert (made.folder / "README.md").is_file()


@pytest.mark.parametrize(
    ("name", "asked"), [("alpaca", "17 more tasks"), ("alpaca_cpu", "one more task")]
)
def test_what_a_list_of_tasks_is_asked_for(name, asked):
    """Toys write no lists, so the recipes' own prompts are looked at instead."""
    recipe = recipes.load_generation(next(path for path in GENERATING if path.stem == name))
    assert asked in filled(recipe, planned(recipe))[0]


@pytest.mark.slow
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_runs_two_steps_on_a_toy_pair(path, pair, data):
    """S10: with `HF_HUB_OFFLINE=1` (conftest.py), from local files alone."""
    recipes.load(path)
    folder = data / "run"
    recipe = recipes.build(on_toys(plain(path), pair, data))
    result = distill(recipe)
    assert recipes.load(folder / "recipe.yaml") == recipe
    evaluation = json.loads((folder / "evaluation.json").read_text())
    # A teacher that reads more than the student is no model that could be measured like it.
    reads_more = recipe.teacher.reads is not None and not recipe.evaluate.against
    reads_more = reads_more and recipe.teacher.kind in ("reflexive", "multimodal")
    measured = {"before", "after"} | (set() if reads_more else {"teacher"})
    if recipe.teacher.kind == "route":  # several teachers, none of which is the teacher
        measured -= {"teacher"}
    assert set(evaluation) == measured
    assert all(set(figures) == FIGURES for figures in evaluation.values())
    # What it writes is judged while it is written: in bfloat16 the digits differ a little.
    if "teacher" in evaluation:
        assert evaluation["teacher"]["kl_teacher_text"] == pytest.approx(0, abs=1e-4)
    assert evaluation["before"]["kl_teacher_text"] != evaluation["after"]["kl_teacher_text"]
    assert result.answers[0].teacher != ""
    assert {1, 2} <= {entry["step"] for entry in read_jsonl(folder / "metrics.jsonl")}
    assert (folder / "student" / "README.md").is_file()
    assert (folder / "student" / "model.safetensors").is_file()


@pytest.mark.slow
def test_an_adapter_is_exported_alone_where_asked_for(pair, data):
    """It measures, loaded onto its base, as the student did at the end of its run."""
    teacher, student = pair
    overrides = [
        f"output={data}/run", f"teacher.model={teacher}", f"student.model={student}",
        f"data.train={data}/train.jsonl", "data.hold_back=0", f"data.eval={data}/heldout.jsonl", "training.max_steps=3",
        "training.use_cpu=true", "training.dataloader_pin_memory=false", "evaluate.max_new_tokens=4",
        "rollout.max_new_tokens=6", "student.peft.save=adapter", "student.dtype=float32",
        "teacher.dtype=float32", "training.learning_rate=0.01",
    ]  # fmt: skip
    path = next(path for path in RECIPES if path.stem == "peft")
    result = distill(recipes.load(path, overrides))
    names = {path.name for path in result.student.iterdir()}
    assert "adapter_model.safetensors" in names
    assert "model.safetensors" not in names
    judge = LocalTeacher(load_model(teacher, dtype="float32"), load_tokenizer(teacher))
    rows = PromptDataset.encode(read(f"{data}/heldout.jsonl"), judge.tokenizer).rows
    evaluation = Evaluation(judge, collate(rows), max_new_tokens=4, seed=0)
    found, _ = evaluation.measure(load_model(str(result.student), dtype="float32"))
    after = result.evaluation["after"]
    assert found.kl_teacher_text == pytest.approx(after.kl_teacher_text, rel=1e-4)
    assert after.kl_teacher_text != pytest.approx(result.evaluation["before"].kl_teacher_text)


@pytest.mark.slow
def test_the_base_under_an_adapter_teaches(pair, data):
    """From a recipe, labels and the base's distribution together; it measures like a copy of it."""
    _, student = pair
    recipe = {
        "output": f"{data}/run",
        "teacher": {"kind": "adapter_off"},
        "student": {"model": student, "peft": {"r": 4}, "export_dtype": "float32"},
        "data": {"train": f"{data}/train.jsonl", "eval": f"{data}/heldout.jsonl"},
        "objectives": [{"kind": "response"}, {"kind": "cross_entropy"}],
        "training": TRAINING | {"max_steps": 3, "learning_rate": 0.01},
        "evaluate": {"max_new_tokens": 4},
    }
    result = distill(recipes.build(recipe))
    figures = result.evaluation
    assert figures["before"].kl_teacher_text == pytest.approx(0, abs=1e-6)  # it starts as the base
    assert figures["after"].kl_teacher_text > 1e-4
    judge = LocalTeacher(load_model(student, dtype="float32"), load_tokenizer(student))
    rows = PromptDataset.encode(read(f"{data}/heldout.jsonl"), judge.tokenizer).rows
    evaluation = Evaluation(judge, collate(rows), max_new_tokens=4, seed=0)
    found, _ = evaluation.measure(load_model(str(result.student), dtype="float32"))
    assert found.kl_teacher_text == pytest.approx(figures["after"].kl_teacher_text, rel=1e-3)
    assert f"`{Path(student).name}`" in (result.student / "README.md").read_text()


@pytest.mark.slow
def test_a_run_stops_when_the_held_out_loss_rises_and_keeps_the_best(pair, data):
    teacher, student = pair
    recipe = {
        "output": f"{data}/run",
        "teacher": {"model": teacher, "dtype": "float32"},
        "student": {"model": student, "dtype": "float32"},
        "data": {"train": f"{data}/train.jsonl", "eval": f"{data}/heldout.jsonl"},
        "training": TRAINING
        | {"max_steps": 20, "learning_rate": 20.0, "optim": "sgd", "bf16": False},
        "evaluate": {"max_new_tokens": 4, "every_steps": 1, "patience": 2},
    }
    result = distill(recipes.build(recipe))
    logged = read_jsonl(data / "run" / "metrics.jsonl")
    losses = [entry["eval_loss"] for entry in logged if "eval_loss" in entry]
    best = losses.index(min(losses))
    assert len(losses) == best + 3 < 20
    after = result.evaluation["after"].kl_teacher_text  # forward KL is the loss here
    assert after == pytest.approx(losses[best], rel=1e-4)


def test_the_student_loads_in_plain_transformers(pair, data):
    """R12: same logits in plain AutoModelForCausalLM, its template and generation config, no other
    keys.
    """
    teacher, student = pair
    folder = data / "run"
    distill(
        recipes.build(
            {
                "output": str(folder),
                "teacher": {"model": teacher},
                "student": {"model": student, "export_dtype": "float32"},
                "data": {"train": f"{data}/train.jsonl"},
                "training": {"max_steps": 1, "save_strategy": "steps", "save_steps": 1, "use_cpu": True,
                             "dataloader_pin_memory": False},
            }
        )
    )  # fmt: skip
    loaded, info = AutoModelForCausalLM.from_pretrained(
        folder / "student", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    checkpoint = AutoModelForCausalLM.from_pretrained(folder / "checkpoints" / "checkpoint-1")
    ids = torch.arange(3, 15)[None]
    torch.testing.assert_close(loaded(ids).logits, checkpoint(ids).logits, rtol=0, atol=0)
    untrained = AutoModelForCausalLM.from_pretrained(student)
    assert not torch.equal(loaded(ids).logits, untrained(ids).logits)
    assert AutoTokenizer.from_pretrained(folder / "student").chat_template == toy.TEMPLATE
    assert loaded.generation_config.eos_token_id == 2


@pytest.mark.slow
def test_trains_on_several_sources_and_on_a_stream_of_them(pair, data):
    teacher, student = pair
    lines = ["question,reply", *(f"{r['instruction']},{r['output']}" for r in toy.rows(5, seed=5))]
    (data / "more.csv").write_text("\n".join(lines))
    base = {
        "teacher": {"model": teacher},
        "student": {"model": student},
        "objectives": [{"kind": "response"}],
        "training": {"max_steps": 3, "use_cpu": True, "per_device_train_batch_size": 4},
    }
    for name, streaming, weight in (("loaded", False, 2.0), ("stream", True, 1.0)):
        columns = {"instruction": "question", "output": "reply"}
        table = {"source": str(data / "more.csv"), "columns": columns, "weight": weight}
        train = [str(data / "train.jsonl"), table]
        recipe = recipes.build(
            base | {"output": str(data / name), "data": {"train": train, "streaming": streaming}}
        )
        result = distill(recipe)
        AutoModelForCausalLM.from_pretrained(result.student)
        losses = (data / name / "metrics.jsonl").read_text().count('"loss"')
        assert losses == 3
