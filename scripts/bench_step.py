"""Time and memory of a training step: our trainer and TRL's, on dataset answers and on-policy.

    python scripts/bench_step.py [--write docs/results/step.md] [--steps 4] [--rounds 2]

The teacher has 30 layers and the student 10, in SmolLM2-135M's shape with random weights.  Prompts
and responses have 128 tokens each, batches 4 rows.  The loss is JSD with beta 0.5, the optimizer
AdamW, the dtype float32.  Each trainer runs in a separate process, and they take turns in each
round.  The median leaves out the first step of each process.  On a GPU the shapes are those of
SmolLM2-1.7B and 360M, in bfloat16.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import benchmark
import datasets
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast, TrainingArguments

sys.path.insert(0, str(Path(__file__).parents[1]))

from llmdistill import (
    DistillTrainer,
    FixedRollout,
    LocalTeacher,
    ResponseObjective,
    SampledRollout,
)
from llmdistill.training.progress import StepClock
from tests.toy import SPECIAL, TEMPLATE

CUDA = torch.cuda.is_available()
VOCABULARY = 49_152
SHAPES = {  # layers, hidden size, MLP neurons, heads, heads of keys and values
    "cpu teacher": (30, 576, 1536, 9, 3),
    "cpu student": (10, 576, 1536, 9, 3),
    "gpu teacher": (24, 2048, 8192, 32, 32),
    "gpu student": (32, 960, 2560, 15, 5),
}
# `compare_trees.py` passes these names to other checkouts, so they keep their spelling.
KINDS = {
    "data set answers": ["TRL GKD", "ours"],
    "on-policy": ["TRL DistillationTrainer", "TRL GKD", "ours"],
}
ROWS, BATCH, NEW_TOKENS, BETA = 64, 4, 128, 0.5


def model(name: str) -> LlamaForCausalLM:
    """Build "teacher" or "student" with random weights, in the shape for this device."""
    shape = SHAPES[f"{'gpu' if CUDA else 'cpu'} {name}"]
    torch.manual_seed(shape[0])  # differs between teacher and student
    made = LlamaForCausalLM(benchmark.llama_config(shape, VOCABULARY))
    # `generate` needs both ids, which a checkpoint would provide.
    made.generation_config.eos_token_id, made.generation_config.pad_token_id = 2, 0
    return made.to("cuda", torch.bfloat16 if name == "teacher" else torch.float32) if CUDA else made


def tokenizer() -> PreTrainedTokenizerFast:
    """Build a tokenizer with one token per byte, filled up to the size of the head."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*SPECIAL, *alphabet]
    words += [f"<unused {i}>" for i in range(VOCABULARY - len(words))]
    backend = Tokenizer(BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    pad, bos, eos = SPECIAL
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=pad, bos_token=bos, eos_token=eos, padding_side="left",
        chat_template=TEMPLATE,
    )  # fmt: skip


def rows() -> list[list[dict[str, str]]]:
    """Build conversations with 128 prompt tokens and 128 answer tokens, end token included."""
    draw = random.Random(0)
    made = tokenizer()
    empty = [{"role": "user", "content": ""}]
    # The template adds this many tokens to the text of a question.
    around = len(made.apply_chat_template(empty, add_generation_prompt=True)["input_ids"])

    def text(length: int) -> str:
        return "".join(draw.choices("abcdefgh ", k=length - 1)) + "."

    return [
        [
            {"role": "user", "content": text(128 - around)},
            {"role": "assistant", "content": text(127)},
        ]
        for _ in range(ROWS)
    ]


def trainer(who: str, kind: str, steps: int, folder: str) -> Any:
    """Build one of the trainers of KINDS, all with the same models, rows and optimizer."""
    # Nothing is saved or logged, so the times are those of the steps alone.
    common: dict[str, Any] = {
        "output_dir": folder, "use_cpu": not CUDA, "bf16": CUDA, "report_to": "none",
        "save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True,
        "learning_rate": 1e-4, "per_device_train_batch_size": BATCH, "max_steps": steps,
        "dataloader_pin_memory": False,
    }  # fmt: skip
    student, teacher, made = model("student"), model("teacher"), tokenizer()
    on_policy = kind == "on-policy"
    chats = [{"messages": row} for row in rows()]
    if who == "ours":
        write = (
            SampledRollout("student", max_new_tokens=NEW_TOKENS) if on_policy else FixedRollout()
        )
        return DistillTrainer(
            student=student, teacher=LocalTeacher(teacher, made), rollout=write,
            objectives=[ResponseObjective("jsd", beta=BETA)], args=TrainingArguments(**common),
            train_dataset=chats, processing_class=made,
        )  # fmt: skip
    parts = {"model": student, "teacher_model": teacher, "processing_class": made}
    common["gradient_checkpointing"] = False  # TRL turns it on, which would cost time
    if who == "TRL GKD":
        from trl.experimental.gkd import GKDConfig, GKDTrainer

        options = {"lmbda": float(on_policy), "beta": BETA, "max_length": 512}
        config = GKDConfig(**common, **options, max_new_tokens=NEW_TOKENS)
        return GKDTrainer(args=config, train_dataset=datasets.Dataset.from_list(chats), **parts)
    from trl import DistillationConfig, DistillationTrainer

    config = DistillationConfig(**common, beta=BETA, max_completion_length=NEW_TOKENS)
    prompts = datasets.Dataset.from_list([{"prompt": row[:1]} for row in rows()])
    return DistillationTrainer(args=config, train_dataset=prompts, **parts)


def one(who: str, kind: str, steps: int) -> None:
    """Run one trainer; print the seconds of each step but the first and the peak in MiB."""
    with tempfile.TemporaryDirectory() as folder:
        made = trainer(who, kind, steps, folder)
        clock = StepClock()
        made.add_callback(clock)
        benchmark.reset_peak()
        made.train()
    print(json.dumps({"seconds": clock.seconds[1:], "peak": benchmark.peak_mib()}))


def measured(who: str, kind: str, options: argparse.Namespace) -> dict[str, Any]:
    """Run `one` in a new process and return what it prints: seconds and peak."""
    arguments = json.dumps([who, kind, options.steps])
    command = [sys.executable, __file__, "--threads", str(options.threads), "--one", arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", help="also write the page to this Markdown file")
    parser.add_argument("--steps", type=int, default=4, help="optimizer steps of each run")
    parser.add_argument("--rounds", type=int, default=2, help="number of measured rounds")
    parser.add_argument("--threads", type=int, default=1, help="number of CPU threads")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.one:
        return one(*json.loads(options.one))
    runs: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for _ in range(options.rounds):
        for kind, names in KINDS.items():
            for who in names:
                runs.setdefault((kind, who), []).append(measured(who, kind, options))
    seconds = {
        place: statistics.median(s for run in some for s in run["seconds"])
        for place, some in runs.items()
    }
    peaks = {place: max(run["peak"] for run in some) for place, some in runs.items()}
    table = []
    for kind, who in runs:
        first = (kind, KINDS[kind][0])  # the trainer that the others are compared with
        table.append(
            {
                "answers": kind,
                "trainer": who,
                "seconds per step": seconds[kind, who],
                "peak MiB": round(peaks[kind, who]),
                "time / first trainer": seconds[kind, who] / seconds[first],
                "memory / first trainer": peaks[kind, who] / peaks[first],
            }
        )
    about = (__doc__ or "").split("\n\n")[2]
    benchmark.report(options.write, "A training step", [about, benchmark.table(table)])


if __name__ == "__main__":
    main()
