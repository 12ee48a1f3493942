"""Held-out figures of the same student after training with each kind of teacher.

    python scripts/compare_teachers.py DATA [--write docs/results/teachers.md] [--work FOLDER]

DATA is a folder with instructions_seed.jsonl and gsm8k_train.jsonl (rows to train on), and
instructions_eval.jsonl and gsm8k_test.jsonl (held-out rows).  Each run is a recipe for `llmdistill
train`.  All students start from the embedded teacher with 20 or 10 of its 30 layers, and all are
measured against the untouched teacher.  Runs that are finished are kept in --work, and are not made
again.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import benchmark
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from llmdistill import recipe as recipes
from llmdistill.run import distill

NAME = "smollm2-135m-instruct"
STEPS, BATCH, HELD_OUT, NEW_TOKENS = 100, 4, 16, 32
LONGEST_PROMPT, LONGEST_RESPONSE, LEARNING_RATE = 56, 32, 2e-4
LOCAL: dict[str, Any] = {"model": NAME}
LABELS: list[dict[str, Any]] = [{"kind": "cross_entropy"}]
BOTH: list[dict[str, Any]] = [{"kind": "response"}, *LABELS]
LIVE: dict[str, Any] = {"kind": "reflexive", "weights": "live"}
ON_POLICY: dict[str, Any] = {"kind": "sampled", "max_new_tokens": LONGEST_RESPONSE}
CONTEXT = "{prompt}\n\nHere is a correct solution:\n{solution}"
FIGURES = ("kl_teacher_text", "kl_own_text", "top1_agreement", "rouge_l_teacher")
MATHS_FIGURES = ("kl_teacher_text", "kl_own_text", "perplexity", "exact_match")


def carved(layers: int, by: str = "influence") -> dict[str, Any]:
    return {"model": NAME, "carve": {"layers": layers, "by": by}}


def runs(work: Path) -> dict[str, dict[str, Any]]:
    """Return the parts of each recipe that are not shared, by the name of the run."""
    exits = {"kind": "exits", "weight": 0.3}
    shallow = exits | {"layers": [10], "adaptor": "norm", "export": 10}
    experts = [{"model": str(work / name / "student")} for name in ("kd_10", "kd_20")]
    curriculum = {"kind": "curriculum", "teachers": [*experts, LOCAL], "pace_from": 0.4}
    chain = {"kind": "chain", "teacher": LOCAL, "assistants": [carved(20)]}
    from_assistant = carved(10) | {"model": f"{work / 'chain_10'}.assistant1/student"}
    return {
        "kd_20": {"teacher": LOCAL},
        "okd_20": {"teacher": LOCAL | {"kind": "online"}},
        "on_policy_20": {"teacher": LOCAL, "rollout": ON_POLICY},
        "kd_10": {"teacher": LOCAL, "student": carved(10)},
        "okd_10": {"teacher": LOCAL | {"kind": "online"}, "student": carved(10)},
        "curriculum_10": {"teacher": curriculum, "student": carved(10)},
        "chain_10": {"teacher": chain, "student": from_assistant},
        "sft_20": {"teacher": LIVE, "objectives": LABELS},
        "mutual_20": {
            "teacher": {"kind": "mutual", "peers": [carved(20, by="even")]},
            "objectives": BOTH,
        },
        "byot_20": {"teacher": LIVE, "objectives": [*LABELS, exits]},
        "opsd": {
            "teacher": {"kind": "reflexive", "context": CONTEXT},
            "rollout": ON_POLICY,
            "student": {"model": NAME},
        },
        "on_policy_20_shorter": {"teacher": LOCAL, "rollout": ON_POLICY, "steps": 51},
        "sft_maths": {"teacher": LIVE, "objectives": LABELS, "student": {"model": NAME}},
        "kd_20_longer": {"teacher": LOCAL, "steps": 181},
        "on_policy_10": {"teacher": LOCAL, "rollout": ON_POLICY, "student": carved(10)},
        "kd_10_longer": {"teacher": LOCAL, "student": carved(10), "steps": 181},
        "byot_exit_10": {"teacher": LIVE, "objectives": [*LABELS, shallow]},
        "born_again_20": {"teacher": {"kind": "born_again"}, "objectives": BOTH},
    }


MATHS = ("opsd", "sft_maths")


def prepare(data: Path, work: Path) -> None:
    """Write the rows of the study: the first held-out ones, and problems with their solutions."""
    work.mkdir(parents=True, exist_ok=True)
    held = (data / "instructions_eval.jsonl").read_text().splitlines()
    (work / "eval.jsonl").write_text("\n".join(held[:HELD_OUT]) + "\n")
    for name, number in (("train", 600), ("test", HELD_OUT)):
        lines = (data / f"gsm8k_{name}.jsonl").read_text().splitlines()[:number]
        rows = [json.loads(line) for line in lines]
        rows = [row | {"solution": row["completion"]} for row in rows]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (work / f"maths_{name}.jsonl").write_text(text)


def recipe_of(name: str, given: dict[str, Any], data: Path, work: Path) -> recipes.Recipe:
    parts = dict(given)
    steps = parts.pop("steps", STEPS)
    maths = name in MATHS
    limits = {"max_prompt_tokens": LONGEST_PROMPT, "max_response_tokens": LONGEST_RESPONSE}
    rows = {"train": str(data / "instructions_seed.jsonl"), "eval": str(work / "eval.jsonl")}
    if maths:
        rows = {"train": str(work / "maths_train.jsonl"), "eval": str(work / "maths_test.jsonl")}
        limits = {"max_prompt_tokens": 160, "max_response_tokens": 112, "long_responses": "drop"}
        if "rollout" in parts:
            parts["rollout"] = parts["rollout"] | {"max_new_tokens": 48}
    shared = {
        "output": str(work / name),
        "student": carved(20),
        "data": rows | limits,
        "training": {
            "max_steps": steps, "learning_rate": 1e-5 if maths else LEARNING_RATE,
            "warmup_steps": 0.1, "lr_scheduler_type": "cosine",
            "per_device_train_batch_size": BATCH, "save_strategy": "no", "logging_steps": 10,
        },
        "evaluate": {"max_new_tokens": 96 if maths else NEW_TOKENS},
    }  # fmt: skip
    if maths:
        shared["evaluate"]["answer_pattern"] = r"#### *(-?[\d,.]+)"
    else:
        shared["evaluate"]["against"] = LOCAL
    return recipes.build(shared | parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--write", help="also write the page to this Markdown file")
    parser.add_argument("--work", type=Path, default=Path("runs/compare_teachers"))
    parser.add_argument("--threads", type=int, default=2, help="number of CPU threads")
    parser.add_argument("--finished", action="store_true", help="show finished runs, make none")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    prepare(options.data, options.work)
    found = {}
    for name, given in runs(options.work).items():
        if not (options.work / name / "student" / "README.md").is_file():
            if options.finished:
                continue
            recipe = recipe_of(name, given, options.data, options.work)
            print(f"running {name}", file=sys.stderr, flush=True)
            distill(recipe, overwrite=True, show_progress=False)
        found[name] = given | {"work": options.work / name}
    report(options.write, found)


def figures(folder: Path) -> dict[str, dict[str, Any]]:
    return json.loads((folder / "evaluation.json").read_text())


def rows_of(found: dict[str, Any], names: list[str], shown: tuple[str, ...]) -> str:
    """Return a table of the figures before and after each run."""
    lines = []
    for name in names:
        measured = figures(found[name]["work"])
        for moment in ("before", "after"):
            label = {"run": name, "steps": found[name].get("steps", STEPS)}
            if moment == "before":
                label = {"run": f"{name}, before", "steps": 0}
                if any(line["run"].endswith("before") for line in lines):
                    continue  # the same student
            values = {figure: measured[moment][figure] for figure in shown}
            lines.append(label | {k: "-" if v is None else f"{v:.3f}" for k, v in values.items()})
    return benchmark.table(lines)


def report(path: str | None, found: dict[str, Any]) -> None:
    groups = {
        "A student of 20 of the teacher's 30 layers:": ("_20", FIGURES),
        "A student of 10 layers:": ("_10", FIGURES),
    }
    parts = [
        f"The embedded teacher and students carved out of it: {STEPS} steps of {BATCH} rows with "
        "the responses of the dataset unless the student writes, the same seed and rows in each "
        f"run. Figures are those of `llmdistill evaluate` against the untouched teacher on "
        f"at most {HELD_OUT} held-out prompts, with {NEW_TOKENS} new tokens.",
    ]
    for title, (suffix, shown) in groups.items():
        names = [n for n in found if suffix in n and n not in MATHS]
        if names:
            parts += [title, rows_of(found, names, shown)]
    maths = [name for name in found if name in MATHS]
    for name in maths:
        title = f"GSM8K, {name}: the teacher of the figures is the run's own."
        parts += [title, rows_of(found, [name], MATHS_FIGURES)]
    benchmark.report(path, "What each kind of teacher gives", parts)


if __name__ == "__main__":
    main()
