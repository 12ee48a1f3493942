"""Measures encoded rows: how fast they are made, and what a million of them takes.

    python scripts/bench_rows.py [--rows 1000000] [--encoded 20000] [--write docs/results/rows.md]

`--encoded` rows of about 500 tokens are written as JSON lines, encoded by all cores into an empty
cache, and read from it again.  Their table is then copied until it has `--rows` rows, because the
encoder takes the same time for each row.  A new process opens that table, hashes it as a run does,
makes a trainer of toys with it, and makes one step.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import benchmark

sys.path.insert(0, str(Path(__file__).parents[1]))

WORDS = [
    *("the", "of", "and", "to", "in", "a", "is", "that", "for", "it", "as", "was", "with", "be"),
    *("by", "on", "not", "he", "this", "are", "or", "his", "from", "at", "which", "but", "have"),
    *("an", "had", "they", "you", "were", "their", "one", "all", "we", "can", "her", "has"),
    *("there", "been", "if", "more", "when", "will", "would", "who", "so", "no", "she", "other"),
]
PROMPT_WORDS, RESPONSE_WORDS = 120, 350  # about 500 tokens with the template


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--encoded", type=int, default=20_000)
    parser.add_argument("--write", metavar="FILE")
    parser.add_argument("--one-step", metavar="TABLE", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one_step:
        print(json.dumps(one_step(Path(options.one_step))))
        return
    with tempfile.TemporaryDirectory() as folder:
        os.environ["HF_DATASETS_CACHE"] = folder
        figures = encoding(Path(folder), options.encoded)
        sizes = [options.encoded, *[options.rows] * (options.rows > options.encoded)]
        tables = [starting(Path(folder), rows) for rows in sizes]
    parts = [
        __doc__.split("\n\n", 2)[2].strip(),
        f"The cores: {len(os.sched_getaffinity(0))}.",
        benchmark.table([{"what": what, "measured": value} for what, value in figures.items()]),
        "A start with rows that are in the cache:",
        benchmark.table(tables),
    ]
    benchmark.report(options.write, "Rows in files", parts)


def make_rows(path: Path, number: int) -> None:
    draw = random.Random(0)
    with path.open("w") as file:
        for _ in range(number):
            prompt, response = (
                " ".join(draw.choices(WORDS, k=words)) for words in (PROMPT_WORDS, RESPONSE_WORDS)
            )
            file.write(json.dumps({"prompt": prompt, "completion": response}) + "\n")


def encoding(folder: Path, number: int) -> dict[str, Any]:
    """Encode rows, read them again, and return what was measured."""
    from llmdistill.data.collate import PromptDataset
    from llmdistill.data.content import content_of
    from llmdistill.data.encoding import cache_folder
    from llmdistill.data.sources import read
    from llmdistill.models.load import load_tokenizer

    make_rows(folder / "rows.jsonl", number)
    tokenizer, path = load_tokenizer("smollm2-135m-instruct"), str(folder / "rows.jsonl")

    def load() -> tuple[PromptDataset, float]:
        start = time.perf_counter()
        rows = PromptDataset.encode(read(path), tokenizer, content=content_of(path))
        return rows, time.perf_counter() - start

    rows, seconds = load()
    _, again = load()
    tokens = int(sum(rows.rows.lengths(name).sum() for name in ("prompt_ids", "response_ids")))
    (file,) = cache_folder().glob("*/rows.arrow")
    return {
        "rows": len(rows),
        "tokens per row": tokens / len(rows),
        "rows per second, first start": number / seconds,
        "seconds, second start": again,
        "bytes per row on disk": file.stat().st_size / len(rows),
        "bytes per token on disk": file.stat().st_size / tokens,
    }


def starting(folder: Path, number: int) -> dict[str, Any]:
    """Copy the table to `number` rows and start a process with it."""
    import pyarrow as pa

    (source,) = folder.glob("llmdistill/*/rows.arrow")
    table = pa.ipc.open_file(pa.memory_map(str(source))).read_all()
    path = folder / f"{number}.arrow"
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as file:
        for start in range(0, number, len(table)):
            file.write_table(table.slice(0, number - start))
    command = [sys.executable, __file__, "--one-step", str(path)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return {
        "rows": f"{number:,}",
        "bytes on disk": f"{path.stat().st_size:,}",
        **json.loads(done.stdout.splitlines()[-1]),
    }


def one_step(path: Path) -> dict[str, float]:
    """Open a table, make a trainer with it, and make one step; return seconds and memory."""
    import numpy as np
    import pyarrow as pa
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from llmdistill import DistillTrainer, FixedRollout, ResponseObjective
    from llmdistill.data.collate import PromptDataset, fingerprint
    from llmdistill.data.table import Rows
    from llmdistill.models.load import load_tokenizer
    from llmdistill.teachers.local import LocalTeacher
    from tests.training.helpers import arguments

    torch.set_num_threads(1)
    tokenizer = load_tokenizer("smollm2-135m-instruct")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    config = LlamaConfig(vocab_size=len(tokenizer), **sizes, **heads)
    student, teacher = LlamaForCausalLM(config), LlamaForCausalLM(config)
    before, start = own_mib(), time.perf_counter()
    table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
    rows = PromptDataset(Rows(table, row_ids_N=np.arange(len(table))))
    fingerprint(rows)  # a run compares it with that of its first start
    args = arguments(path.parent / "run", per_device_train_batch_size=2)
    trainer = DistillTrainer(
        student=student, teacher=LocalTeacher(teacher, tokenizer), rollout=FixedRollout(),
        objectives=[ResponseObjective()], args=args, train_dataset=rows,
        processing_class=tokenizer,
    )  # fmt: skip
    held = own_mib() - before
    trainer.train()
    return {"seconds to the end of the first step": time.perf_counter() - start, "MiB held": held}


def own_mib() -> float:
    """Return the memory of this process that is not a file: in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon"))


if __name__ == "__main__":
    main()
