"""The memory that `llmdistill check` estimates, and the peak of two real steps on a CPU.

    python scripts/bench_memory.py [RECIPE ...] [--write docs/results/memory.md]

Each recipe runs alone in a new process, on its longest rows, because the estimate is for these.
The peak is that of the resident memory during the steps, without what the process had before models
were loaded: the interpreter and the libraries.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import benchmark
import psutil

RECIPES = ("quickstart", "skd_cpu", "hidden", "minilm", "mixkd")
FOLDER = Path(__file__).parents[1] / "recipes"
GIB = 2**30
TITLE = "Memory: estimated and measured"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipes", nargs="*", default=RECIPES)
    parser.add_argument("--write", help="also write the page to this Markdown file")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measured(options.recipes[0])))
        return
    rows = []
    for name in options.recipes:
        command = [sys.executable, __file__, "--child", name]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{name}: {done.stderr[-2000:]}")
        found = json.loads(done.stdout.splitlines()[-1])
        estimate, peak = sum(found["parts"].values()), found["peak"]
        largest = sorted(found["parts"].items(), key=lambda part: -part[1])[:3]
        rows.append({
            "recipe": name,
            "estimate, GiB": f"{estimate / GIB:.2f}",
            "peak, GiB": f"{peak / GIB:.2f}",
            "estimate / peak": f"{estimate / peak:.2f}",
            "largest parts": ", ".join(f"{part} {size / GIB:.2f}" for part, size in largest),
        })  # fmt: skip
        print(rows[-1], flush=True)
    said = (__doc__ or "").strip().rpartition("\n\n")[2]
    benchmark.report(options.write, TITLE, [said, benchmark.table(rows)])


def measured(name: str) -> dict:
    """Return the estimated bytes by part, and the peak of two steps."""
    from llmdistill import recipe as recipes
    from llmdistill.cost import NUM_STEPS, TWO_STEPS, memory
    from llmdistill.data.build import load_data, load_student_tokenizer
    from llmdistill.data.collate import PromptDataset
    from llmdistill.run import build_trainer, load_pair, training_arguments

    recipe = recipes.load(FOLDER / f"{name}.yaml", [])
    tokenizer = load_student_tokenizer(recipe)
    train, _ = load_data(recipe, tokenizer)
    parts = memory(recipe, train)
    longest = sorted(train.rows, key=lambda row: -len(row.prompt_ids) - len(row.response_ids or ()))
    training = recipe.training | TWO_STEPS
    rows = training.get("per_device_train_batch_size", 8)
    steps = NUM_STEPS * training.get("gradient_accumulation_steps", 1)
    train = PromptDataset(longest[: rows * steps])
    before = psutil.Process().memory_info().rss
    teacher, student = load_pair(recipe, tokenizer, train)
    with tempfile.TemporaryDirectory() as folder:
        changed = recipe.model_copy(
            update={"training": training, "evaluate": recipes.EvaluateRecipe(), "output": folder}
        )
        arguments = training_arguments(changed, Path(folder))
        trainer = build_trainer(changed, arguments, teacher, student, tokenizer, train)
        benchmark.reset_peak()
        trainer.train()
    return {"parts": parts, "peak": benchmark.peak_mib() * 2**20 - before}


if __name__ == "__main__":
    main()
