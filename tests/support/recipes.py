"""Recipes built from plain dicts, and recipes on toys: the same parts, with less of everything."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llmdistill import recipe as recipes
from tests import toy
from tests.support import vision
from tests.support.files import write_jsonl


def build_generation(values: dict[str, Any]) -> recipes.GenerationRecipe:
    """Return the result of `recipes.load_generation` for a file with `values`."""
    return recipes.build_part(recipes.GenerationRecipe, values, "recipe")


TRAINING = {"use_cpu": True, "dataloader_pin_memory": False, "save_strategy": "steps"}

LESS = {
    "max_new_tokens": 6,
    "max_compared_tokens": 4,
    "max_instruction_tokens": 120,  # a third of the toys end one within them
    "layers": 2,
    "mlp_width": 32,
    "heads": 2,
    "capacity": 4,
    "hold_back": 4,
    "max_prompt_tokens": 110,
    "dtype": "float32",
}
LEFT_OUT = ("answer_pattern", "bf16", "adam_beta2", "result")  # toys write no results


def less(part: Any) -> Any:
    """A part of a recipe with small numbers where the real one has large ones."""
    if isinstance(part, list):
        return [less(one) for one in part]
    if not isinstance(part, dict):
        return part
    cut = {key: LESS.get(key, less(value)) for key, value in part.items() if key not in LEFT_OUT}
    if "kind" in part and "layers" in part:  # an objective; the toys have other layers
        if isinstance(part["layers"], str):
            # The toy student is not carved out of the toy teacher.
            cut["layers"] = "uniform" if part["layers"] == "carved" else part["layers"]
        else:
            cut["layers"] = [[min(pair[0], 1), 1] for pair in part["layers"]]
    if cut.get("kind") == "adaptive":
        cut["start"] = 1.0  # so that the student writes
    return cut


def on_toys(given: dict[str, Any], pair, data: Path) -> dict[str, Any]:
    """A training recipe with toy models, and toy rows unless it brings its own."""
    cut = less(given) | {"output": str(data / "run")}
    cut["teacher"] = teacher_on_toys(cut["teacher"], pair, data)
    if "peers" in cut["teacher"]:  # a peer must differ from the student
        one = (
            {"model": pair[1]}
            if "carve" in cut["student"]
            else {"model": pair[1], "carve": {"layers": 2}}
        )
        cut["teacher"]["peers"] = [one for _ in cut["teacher"]["peers"]]
    cut["student"] |= {"model": pair[1]}
    if "generate" in cut:
        cut["generate"] = generation_on_toys(cut["generate"], pair, data)
        cut["data"] |= {"train": f"{data}/set/train.jsonl"}
    elif cut["data"]["train"] != "seed_tasks":
        cut["data"] |= {"train": rows_on_toys(cut["data"]["train"], cut["teacher"], data)}
    if "eval" in cut["data"]:
        cut["data"] |= {"eval": f"{data}/heldout.jsonl"}
    training = TRAINING | {"max_steps": 2, "save_steps": 1, "num_train_epochs": 1}
    evaluate = cut.get("evaluate", {}) | {"max_new_tokens": 6}
    if "against" in evaluate:
        evaluate["against"] = {"model": pair[0], "dtype": "float32"}
    return cut | {"training": cut["training"] | training, "evaluate": evaluate}


def teacher_on_toys(teacher: dict[str, Any], pair, data: Path) -> dict[str, Any]:
    """The section of a teacher with toy models in place of all that it names."""
    local, student = {"model": pair[0], "dtype": "float32"}, {"model": pair[1]}
    if "peers" in teacher:
        return dict(teacher)
    if "teachers" in teacher:
        return teacher | {"teachers": [one | local for one in teacher["teachers"]]}
    if "assistants" in teacher:
        assistants = [one | student for one in teacher["assistants"]]
        return teacher | {"teacher": local, "assistants": assistants}
    if teacher.get("kind") == "multimodal":
        seer = {"model": vision.save(data / "seer"), "image_folder": str(data / "pictures")}
        return teacher | seer | {"dtype": "float32"}
    return teacher | local if "model" in teacher else teacher


def rows_on_toys(train: Any, teacher: dict[str, Any], data: Path) -> Any:
    """The toy rows, with the columns that the teacher reads."""
    file = f"{data}/train.jsonl"
    if "column" in teacher:  # a source for each teacher
        return [
            {"source": file, "add": {teacher["column"]: t["name"]}} for t in teacher["teachers"]
        ]
    if teacher.get("kind") == "multimodal":
        vision.pictures(data / "pictures")
        rows = [row | {teacher["images"]: "1.png"} for row in toy.rows(9)]
        file = f"{data}/pictures.jsonl"
        write_jsonl(Path(file), rows)
    return file


def generation_on_toys(given: dict[str, Any], pair, data: Path) -> dict[str, Any]:
    """A recipe that generates, with a toy on this machine.  It writes no lists and no words: what
    would ask for a list answers prompts instead, and nothing is filtered out.
    """
    cut = less(given)
    generator = cut["generator"]
    if generator["kind"] in ("alpaca", "self_instruct"):
        generator = {"kind": "answer", "prompts": "", "answering": {"max_new_tokens": 6}}
    if generator.get("best_by") == "judge":  # toys write no numbers, and never end an answer
        generator = generator | {"best_by": "consensus", "pairs": False}
    rows = {key: f"{data}/train.jsonl" for key in ("prompts", "pool") if key in generator}
    if cut.get("judge"):  # the toy judges itself
        cut["judge"] = {key: value for key, value in cut["judge"].items() if key != "teacher"}
    student = {"student": pair[1]} if "student" in generator else {}
    answering = {"answering": generator.get("answering", {}) | {"max_new_tokens": 6}}
    if generator["kind"] == "rewrite":  # its reply is the answer
        answering = {}
    return cut | {
        "output": f"{data}/set",
        "teacher": {"model": pair[0], "dtype": "float32"},
        "generator": generator | rows | student | answering,
        "filters": [],
        "target": 8,
        "test_share": 0.0,
    }
