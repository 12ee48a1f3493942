"""Writing: stock `generate`, ours, and both models interleaved, in tokens per second.

    python scripts/bench_rollouts.py --student runs/quickstart/student [--write PATH]

Embedded teacher and its 20-layer student after the quickstart, prompts and answers of 64 tokens;
the student samples at temperature 0.5 and top-p 0.5, the teacher at 0.2 and 0.5 (SKD's settings),
top-25 acceptance.  Calls in turn, medians; tokens behind an end are not counted.

With `--random` both models have random weights, in the shapes of SmolLM2-1.7B and 360M (on a GPU)
or smaller ones: nothing is loaded, and a slot is the teacher's with probability 0.1, whatever the
models say.
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
from llmdistill.sampling import Writer
from llmdistill.training.step import Distillation

TEACHER = "smollm2-135m-instruct"
PROMPT, NEW = 64, 64
OWN = {"student": Sampling(0.5, 0.5), "teacher": Sampling(0.2, 0.5)}
BLOCKS = {"per token": 1, "blocks of 2": 2, "blocks of 4": 4, "blocks of 8": 8, "auto": "auto"}


def prompts(tokenizer: Any, size: int) -> Prompts:
    """The seed tasks one behind the other, cut into prompts of one length."""
    text = " ".join(f"{row['instruction']} {row['output']}" for _, row in read("seed_tasks"))
    ids = tokenizer(text)["input_ids"]
    return Prompts.pack(
        [ids[i * PROMPT : (i + 1) * PROMPT] for i in range(size)], range(size), pad_id=0
    )


class Bench:
    """A pair of models, and every way in which they write."""

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
        """Tokens written by plain `generate`."""
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
        ends_BG = (new_BG == self.tokenizer.eos_token_id).long()
        return int((ends_BG.cumsum(1) - ends_BG == 0).sum())

    def written(self, name: str, some: Prompts, number: int) -> Sequences:
        """Another seed each time; the teacher's answers are not to be remembered."""
        rollout = self.rollouts[name]
        if isinstance(rollout, SampledRollout):
            rollout.load_state_dict({"kept": []})
        at = Progress(step=0, epoch=0, seed=number)
        return rollout.write(some, self.student, self.teacher, at)

    def rows(self, size: int, rounds: int) -> list[dict[str, Any]]:
        some = prompts(self.tokenizer, size)
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
        speed = {n: sum(tokens[n][1:]) / len(tokens[n][1:]) / seconds[n] for n in names}
        return [
            {
                "batch": size,
                "who writes": name,
                "tokens/s": f"{speed[name]:.1f}",
                "time a token, against the teacher's generate": speed[names[0]] / speed[name],
            }
            | _shares(seen.get(name, []))
            for name in names
        ]


def _shares(written: list[Sequences]) -> dict[str, Any]:
    """Who wrote, and how much a judgement brought, where there were any."""
    judged = [
        s for s in written if s.teacher_passes_B is not None and int(s.teacher_passes_B.sum())
    ]
    if not judged:
        return {"accepted": "", "teacher's share": "", "tokens a judgement": ""}
    writers_N = torch.cat([s.target_writers_N for s in judged])
    passes = sum(int(s.teacher_passes_B.sum()) for s in judged if s.teacher_passes_B is not None)
    share = float((writers_N == Writer.TEACHER).double().mean())
    return {
        "accepted": 1 - share,
        "teacher's share": share,
        "tokens a judgement": len(writers_N) / passes,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write")
    pair = parser.add_mutually_exclusive_group(required=True)
    pair.add_argument("--student", help="a student of the embedded teacher: its folder")
    pair.add_argument("--random", action="store_true")
    parser.add_argument("--dtype", default="bfloat16" if torch.cuda.is_available() else "float32")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
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
        options.write, "Writing", [f"{about.strip()}\n\n{options.dtype}.", benchmark.table(rows)]
    )


if __name__ == "__main__":
    main()
