"""Speed of writing: stock `generate`, ours, and both models interleaved, in tokens per second.

    python scripts/bench_rollouts.py --student runs/quickstart/student [--write PATH]

The embedded teacher and its 20-layer student after the quickstart, with prompts and answers of 64
tokens.  The student samples at temperature 0.5 and top-p 0.5, the teacher at 0.2 and 0.5 (SKD's
settings), and acceptance is top-25.  Writers are called in turn, and times are medians.  Tokens
after an end token are not counted.

With `--random` both models have random weights, in the shapes of SmolLM2-1.7B and 360M (on a GPU)
or smaller ones, and nothing is loaded.  The teacher then writes each token with probability 0.1,
whatever the models predict.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import benchmark
import torch
from bench_step import model, tokenizer

sys.path.insert(0, str(Path(__file__).parents[1]))

from llmdistill import InterleavedRollout, LocalTeacher, ResponseObjective, SampledRollout, Sampling
from llmdistill.batch import Prompts, Sequences
from llmdistill.data.sources import read
from llmdistill.models.load import load_model, load_tokenizer
from llmdistill.protocols import Progress
from llmdistill.rollouts.acceptance import Mixture, TopK
from llmdistill.rollouts.kept import KeptResponses
from llmdistill.sampling import Writer
from llmdistill.training.step import Distillation

TEACHER = "smollm2-135m-instruct"
PROMPT, NEW = 64, 64
OWN = {"student": Sampling(0.5, 0.5), "teacher": Sampling(0.2, 0.5)}
BLOCKS = {"per token": 1, "blocks of 2": 2, "blocks of 4": 4, "blocks of 8": 8, "auto": "auto"}


def prompts(tokenizer: Any, size: int) -> Prompts:
    """Return the joined texts of the seed tasks, cut into prompts of equal length."""
    text = " ".join(f"{row['instruction']} {row['output']}" for _, row in read("seed_tasks"))
    ids = tokenizer(text)["input_ids"]
    return Prompts.pack(
        [ids[i * PROMPT : (i + 1) * PROMPT] for i in range(size)], range(size), pad_id=0
    )


class Bench:
    """A pair of models, with every rollout that is measured."""

    def __init__(self, teacher: Any, student: Any, tokenizer: Any, accept: Any) -> None:
        self.tokenizer = tokenizer
        self.models = {"teacher": teacher, "student": student}
        self.teacher = LocalTeacher(teacher, tokenizer)
        self.student = Distillation(student, self.teacher, [ResponseObjective()], tokenizer)
        rollouts: dict[str, Any] = {
            f"ours, {who} alone": SampledRollout(who, sampling=sampling, max_new_tokens=NEW)
            for who, sampling in OWN.items()
        }
        for name, size in BLOCKS.items():
            rollouts[f"interleaved, {name}"] = InterleavedRollout(
                accept=accept, block_size=size, max_new_tokens=NEW,
                student_sampling=OWN["student"], teacher_sampling=OWN["teacher"],
            )  # fmt: skip
        self.rollouts = rollouts

    def stock(self, who: str, some: Prompts, number: int) -> int:
        """Write with plain `generate`; return the number of tokens up to each end token."""
        made, sampling = self.models[who], OWN[who]
        torch.manual_seed(number)
        with torch.no_grad():
            output = made.generate(
                input_ids=some.input_ids_BP.to(made.device),
                attention_mask=some.attention_mask_BP.to(made.device),
                do_sample=True, temperature=sampling.temperature, top_p=sampling.top_p, top_k=0,
                max_new_tokens=NEW, pad_token_id=self.tokenizer.pad_token_id,
            )  # fmt: skip
        new_BG = output[:, PROMPT:]
        # A token counts if no end token comes before it; the end token itself counts.
        ends_BG = (new_BG == self.tokenizer.eos_token_id).long()
        return int((ends_BG.cumsum(1) - ends_BG == 0).sum())

    def written(self, name: str, some: Prompts, number: int) -> Sequences:
        """Write with one of our rollouts, with `number` as the seed."""
        rollout = self.rollouts[name]
        # The teacher's answers are kept for later epochs, which would cost no time here.
        if isinstance(rollout, SampledRollout):
            rollout.kept = KeptResponses()
        at = Progress(step=0, epoch=0, seed=number)
        return rollout.write(some, self.student, self.teacher, at)

    def rows(self, size: int, rounds: int) -> list[dict[str, Any]]:
        """Measure every writer with batches of `size` prompts: one table row for each."""
        some = prompts(self.tokenizer, size)
        # Writers end their answers at different tokens, so speed is tokens over time, not rows.
        tokens: dict[str, list[int]] = {}
        seen: dict[str, list[Sequences]] = {}

        def call(name: str) -> None:
            number = len(tokens.setdefault(name, []))
            if name.startswith("generate"):
                tokens[name].append(self.stock(name.rpartition(" ")[2], some, number))
            else:
                seen.setdefault(name, []).append(self.written(name, some, number))
                tokens[name].append(int(seen[name][-1].num_predicted.sum()))

        names = ["generate, teacher", "generate, student", *self.rollouts]
        variants: dict[str, Callable[[], None]] = {n: (lambda n=n: call(n)) for n in names}
        seconds = benchmark.in_turn(variants, rounds)
        # The first round is a warm-up, and `in_turn` leaves out its time.
        speed = {n: sum(tokens[n][1:]) / len(tokens[n][1:]) / seconds[n] for n in names}
        return [
            {
                "batch": size,
                "who writes": name,
                "tokens/s": f"{speed[name]:.1f}",
                "time per token / teacher's generate": speed[names[0]] / speed[name],
            }
            | _shares(seen.get(name, []))
            for name in names
        ]


def _shares(written: list[Sequences]) -> dict[str, Any]:
    """Return the teacher's share and its tokens per pass; empty cells if one model wrote."""
    # Only an interleaved rollout sets `teacher_passes_B`.
    judged = [
        s for s in written if s.teacher_passes_B is not None and int(s.teacher_passes_B.sum())
    ]
    if not judged:
        return {"accepted": "", "teacher's share": "", "tokens per teacher pass": ""}
    writers_N = torch.cat([s.target_writers_N for s in judged])
    passes = sum(int(s.teacher_passes_B.sum()) for s in judged if s.teacher_passes_B is not None)
    share = float((writers_N == Writer.TEACHER).double().mean())
    return {
        "accepted": 1 - share,
        "teacher's share": share,
        "tokens per teacher pass": len(writers_N) / passes,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", help="also write the page to this Markdown file")
    pair = parser.add_mutually_exclusive_group(required=True)
    pair.add_argument("--student", help="folder of a student of the embedded teacher")
    pair.add_argument("--random", action="store_true", help="use models with random weights")
    parser.add_argument(
        "--dtype",
        default="bfloat16" if torch.cuda.is_available() else "float32",
        help="dtype of both models",
    )
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32], help="batch sizes")
    parser.add_argument("--rounds", type=int, default=3, help="number of measured rounds")
    parser.add_argument("--threads", type=int, default=2, help="number of CPU threads")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.random:
        dtype = getattr(torch, options.dtype)
        models = [model(name).to(dtype) for name in ("teacher", "student")]
        bench = Bench(*models, tokenizer(), Mixture(0.1))
    else:
        models = [load_model(name, dtype=options.dtype) for name in (TEACHER, options.student)]
        bench = Bench(*models, load_tokenizer(TEACHER), TopK(25))
    rows = [row for size in options.batches for row in bench.rows(size, options.rounds)]
    about = "\n\n".join((__doc__ or "").split("\n\n")[2:])
    benchmark.report(
        options.write,
        "Speed of writing",
        [f"{about.strip()}\n\n{options.dtype}.", benchmark.table(rows)],
    )


if __name__ == "__main__":
    main()
