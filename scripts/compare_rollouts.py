"""Compare three rollouts for one student: interleaved (SKD), on-policy, and dataset answers.

    python scripts/compare_rollouts.py --train gsm8k_train.jsonl --eval gsm8k_test.jsonl \
        [--write docs/results/skd.md]

All runs use `recipes/skd_cpu.yaml` with the same student, prompts, order, number of new tokens and
seed.  Only the rollout differs.  The held-out loss is the forward KL per token on the teacher's
greedy answers to held-out prompts.  A finished run with the same recipe is reused.
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

RECIPE = Path(__file__).parents[1] / "recipes" / "skd_cpu.yaml"
OWN = "{kind: sampled, by: student, sampling: {temperature: 0.5, top_p: 0.5}, max_new_tokens: %d}"
EVERY = 20  # steps
FIGURES = (
    "kl_teacher_text", "kl_own_text", "top1_agreement", "draft_acceptance", "rouge_l_teacher",
    "repeated_4grams",
)  # fmt: skip


def overrides(name: str, options: argparse.Namespace) -> list[str]:
    """Return the overrides of the recipe for one variant."""
    written = {
        "interleaved": [f"rollout.max_new_tokens={options.new_tokens}"],
        "on_policy": ["rollout=" + OWN % options.new_tokens],
        "supervised_kd": ["rollout={kind: fixed}"],
    }
    return [
        f"output={Path(options.runs) / name}", *written[name],
        f"data.train={options.train}", f"data.eval={options.eval}", "data.hold_back=0",
        f"data.max_response_tokens={options.new_tokens}", "data.max_prompt_tokens=80",
        f"training.max_steps={options.steps}", "training.eval_on_start=true",
        f"evaluate.max_new_tokens={options.new_tokens}", f"evaluate.every_steps={EVERY}",
    ]  # fmt: skip


def head(source: str, rows: int, folder: Path) -> Path:
    """Write the first rows of a file to a new file, so that only these are measured on."""
    lines = Path(source).read_text(encoding="utf-8").splitlines()[:rows]
    path = folder / f"first_{rows}.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def curve(folder: Path) -> list[dict[str, Any]]:
    """Return one entry per `EVERY` steps: the held-out loss, and means since the entry before."""
    logged = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    lines = []
    for entry in (entry for entry in logged if "eval_loss" in entry):
        since = [e for e in logged if entry["step"] - EVERY < e["step"] <= entry["step"]]
        lines.append({"step": entry["step"], "held-out KL": entry["eval_loss"]} | _means(since))
    return lines


def _means(entries: list[dict[str, Any]]) -> dict[str, float]:
    keys = ("loss", "acceptance", "tokens_per_teacher_pass", "replaced_q1", "replaced_q4")
    found = {key: [e[key] for e in entries if key in e] for key in keys}
    return {key: sum(values) / len(values) for key, values in found.items() if values}


def plot(curves: dict[str, list[dict[str, Any]]], path: Path) -> None:
    import matplotlib.pyplot as plt  # only needed with --write

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2))
    for name, lines in curves.items():
        left.plot([e["step"] for e in lines], [e["held-out KL"] for e in lines], "o-", label=name)
    skd = [e for e in curves["interleaved"] if "acceptance" in e]
    right.plot([e["step"] for e in skd], [e["acceptance"] for e in skd], "o-", label="accepted")
    for part, title in (("replaced_q1", "first"), ("replaced_q4", "last")):
        steps, shares = [e["step"] for e in skd], [e[part] for e in skd]
        right.plot(steps, shares, "--", label=f"replaced, {title} quarter")
    left.set(xlabel="step", ylabel="nats per token", title="held-out KL, teacher's answers")
    right.set(xlabel="step", ylim=(0, 1), title="interleaved: drafted tokens")
    for axes in (left, right):
        axes.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})  # a date would change the file in every run


def report(options: argparse.Namespace, runs: Path, names: list[str]) -> None:
    curves = {name: curve(runs / name) for name in names}
    wide = {name: {e["step"]: e for e in lines} for name, lines in curves.items()}
    steps = [e["step"] for e in curves["interleaved"]]
    table = [
        {"step": step}
        | {f"{name}: held-out KL": wide[name][step]["held-out KL"] for name in names}
        | {f"{name}: loss": wide[name][step].get("loss", "") for name in names}
        | {
            key: wide["interleaved"][step].get(key, "")
            for key in ("acceptance", "tokens_per_teacher_pass", "replaced_q1", "replaced_q4")
        }
        for step in steps
    ]
    figures = {name: json.loads((runs / name / "evaluation.json").read_text()) for name in names}
    ends = [{"student": "before"} | _chosen(figures[names[0]]["before"])]
    ends += [{"student": f"after {name}"} | _chosen(figures[name]["after"]) for name in names]
    parts = [
        "Three rollouts after the same number of steps: `recipes/skd_cpu.yaml` on GSM8K's "
        f"questions, with {options.steps} steps of 8 prompts and at most {options.new_tokens} "
        f"tokens per answer.  Figures are measured on those of the first {options.eval_rows} test "
        "questions that have at most 80 tokens.  Each loss is on the rollout's own text, so losses "
        "cannot be compared between columns.  The held-out KL can, within the noise of one seed.  "
        "Losses and shares are means since the line before.  `replaced_q1` and `replaced_q4` are "
        "the shares of tokens in the first and last quarter of an answer that the teacher wrote.",
        benchmark.table(table),
        benchmark.table(ends),
    ]
    if options.write:
        picture = Path(options.write).with_suffix(".svg")
        plot(curves, picture)
        parts.append(f"![held-out KL and acceptance]({picture.name})")
    benchmark.report(
        options.write, "SKD compared with on-policy and supervised distillation", parts
    )


def _is_done(folder: Path, wanted: recipes.Recipe) -> bool:
    """Whether the folder contains a finished run of exactly this recipe."""
    made = folder / "recipe.yaml"
    return (folder / "evaluation.json").is_file() and recipes.load(made) == wanted


def _chosen(figures: dict[str, Any]) -> dict[str, float]:
    return {name: figures[name] for name in FIGURES}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--train", required=True, help="JSON lines to train on")
    parser.add_argument("--eval", required=True, help="JSON lines to evaluate on")
    parser.add_argument(
        "--eval-rows", type=int, default=16, help="rows of the evaluation file that are used"
    )
    parser.add_argument("--new-tokens", type=int, default=48, help="longest answer, in tokens")
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps of each run")
    parser.add_argument("--runs", default="runs/compare_rollouts", help="folder of the runs")
    parser.add_argument("--write", help="also write the page to this Markdown file")
    options = parser.parse_args()
    torch.set_num_threads(2)
    runs = Path(options.runs)
    runs.mkdir(parents=True, exist_ok=True)
    options.eval = head(options.eval, options.eval_rows, runs)
    names = ["interleaved", "on_policy", "supervised_kd"]
    for name in names:
        wanted = recipes.load(RECIPE, overrides(name, options))
        if not _is_done(runs / name, wanted):
            distill(wanted, overwrite=True)
    report(options, runs, names)


if __name__ == "__main__":
    main()
