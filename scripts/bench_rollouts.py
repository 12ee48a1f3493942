"""Writing: tokens per second of ours beside stock `generate`, real models, float32 or bfloat16.

    python scripts/bench_rollouts.py [--write docs/results/rollouts.md] [--student FOLDER]

The embedded teacher, and a student where a folder is given (the quickstart's, say), sample 64
tokens behind prompts of 64, at temperature 1.  Calls in turn; tokens behind an end are not counted.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import benchmark
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from llmdistill.batch import Draw, Prompts, Sampling, Writer
from llmdistill.data.sources import read
from llmdistill.decoding.sample import sample
from llmdistill.models.load import load_model, load_tokenizer

TEACHER = "smollm2-135m-instruct"
PROMPT, NEW = 64, 64
BATCHES = (1, 8, 32)


def prompts(tokenizer: Any, size: int) -> Prompts:
    """The seed tasks one behind the other, cut into prompts of one length."""
    text = " ".join(f"{row['instruction']} {row['output']}" for _, row in read("seed_tasks"))
    ids = tokenizer(text)["input_ids"]
    return Prompts.pack(
        [ids[i * PROMPT : (i + 1) * PROMPT] for i in range(size)], range(size), pad_id=0
    )


def stock(model: Any, tokenizer: Any, some: Prompts, number: int) -> int:
    torch.manual_seed(number)
    with torch.no_grad():
        output = model.generate(
            input_ids=some.input_ids_BP.to(model.device),
            attention_mask=some.attention_mask_BP.to(model.device),
            do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=NEW,
            pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
    new_BG = output[:, PROMPT:]
    ended_BG = (new_BG == tokenizer.eos_token_id).cumsum(1)
    return int(((ended_BG - (new_BG == tokenizer.eos_token_id).long()) == 0).sum())


def ours(model: Any, tokenizer: Any, some: Prompts, number: int) -> int:
    options = {"max_new_tokens": NEW, "draw": Draw(number), "writer": Writer.STUDENT}
    return int(sample(model, tokenizer, some, Sampling(), **options).num_predicted.sum())


def speeds(model: Any, tokenizer: Any, size: int, rounds: int) -> dict[str, float]:
    """Tokens per second by who writes."""
    some = prompts(tokenizer, size)
    counts: dict[str, list[int]] = {"stock generate": [], "ours": []}

    def call(name: str, write: Any) -> None:
        counts[name].append(write(model, tokenizer, some, len(counts[name])))

    seconds = benchmark.in_turn(
        {
            name: lambda name=name, write=write: call(name, write)
            for name, write in (("stock generate", stock), ("ours", ours))
        },
        rounds,
    )
    return {n: sum(c[1:]) / len(c[1:]) / seconds[n] for n, c in counts.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write")
    parser.add_argument("--student", help="a folder, to be measured too")
    parser.add_argument("--dtype", default="bfloat16" if torch.cuda.is_available() else "float32")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = []
    for name in filter(None, (TEACHER, options.student)):
        model, tokenizer = load_model(name, dtype=options.dtype), load_tokenizer(name)
        for size in BATCHES:
            found = speeds(model, tokenizer, size, options.rounds)
            for who, speed in found.items():
                rows.append(
                    {
                        "model": name,
                        "batch": size,
                        "who": who,
                        "tokens/s": round(speed),
                        "time against stock": found["stock generate"] / speed,
                    }
                )
    about = (__doc__ or "").split("\n\n")[2]
    benchmark.report(
        options.write, "Writing", [f"{about.strip()} {options.dtype}.", benchmark.table(rows)]
    )


if __name__ == "__main__":
    main()
