"""What each rank of a distributed test runs: `torchrun ... -m tests.distributed.worker CASE
FOLDER`.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from llmdistill import recipe as recipes
from llmdistill.errors import NonFiniteLossError
from llmdistill.generate import generate
from llmdistill.instruct.responders import LocalResponder, RemoteResponder
from llmdistill.objectives.response import ResponseObjective
from llmdistill.rollouts.fixed import FixedRollout
from llmdistill.rollouts.interleaved import InterleavedRollout
from llmdistill.rollouts.sampled import SampledRollout
from tests import toy
from tests.training.helpers import INTERLEAVED, dataset, trainer, weights


def same_weights(folder: Path, **options) -> list[dict]:
    """Trains and leaves the weights of rank 0, after a check that all ranks hold the same; gives
    what was logged.
    """
    made = trainer(folder / "run", **options)
    made.train()
    mine = weights(made.model.student)
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, mine)
    assert all(torch.equal(mine, other) for other in everyone), "ranks ended with different weights"
    if dist.get_rank() == 0:
        torch.save(mine, folder / "weights.pt")
    return made.state.log_history


def fixed(folder: Path) -> None:
    same_weights(
        folder, rows=dataset(16), per_device_train_batch_size=4, gradient_accumulation_steps=2
    )


def uneven(folder: Path) -> None:
    """10 rows, 2 ranks, batches of 2: Accelerate repeats two rows in the third step."""
    same_weights(
        folder, rows=dataset(10), per_device_train_batch_size=2, max_steps=-1, num_train_epochs=2
    )


def resumed(folder: Path) -> None:
    """10 rows, stopped in the middle of the second epoch: its filler rows weigh nothing either."""
    options = {"rows": dataset(10), "per_device_train_batch_size": 2, "num_train_epochs": 2}
    options |= {"max_steps": -1, "save_strategy": "steps", "save_steps": 1}
    trainer(folder / "run", **options).train()
    again = trainer(folder / "again", **options)
    again.train(resume_from_checkpoint=str(folder / "run" / "checkpoint-4"))
    if dist.get_rank() == 0:
        torch.save(weights(again.model.student), folder / "weights.pt")


def kept_answers(folder: Path) -> None:
    """The teacher answers each of 8 prompts once, whichever rank they come to in which epoch."""
    rollout = SampledRollout("teacher", max_new_tokens=4)
    made = trainer(
        folder / "run", rows=dataset(8), rollout=rollout, per_device_train_batch_size=2,
        max_steps=-1, num_train_epochs=3,
    )  # fmt: skip
    asked = []
    write = made.teacher.write
    made.teacher.write = lambda prompts, *a, **k: (
        asked.append(len(prompts)) or write(prompts, *a, **k)
    )
    made.train()
    counts = [torch.zeros(1) for _ in range(2)]
    dist.all_gather(counts, torch.tensor([float(sum(asked))]))
    assert sum(counts) == 8, counts


def on_policy(folder: Path) -> None:
    rollout = SampledRollout("student", max_new_tokens=6)
    same_weights(
        folder, rows=dataset(16), rollout=rollout, per_device_train_batch_size=4, max_steps=2
    )


def interleaved(folder: Path) -> None:
    """Both models write; the log is over both ranks."""
    options = {"rows": dataset(16), "per_device_train_batch_size": 4, "max_steps": 2}
    logs = same_weights(folder, rollout=InterleavedRollout(**INTERLEAVED), **options)
    if dist.get_rank() == 0:
        torch.save([entry for entry in logs if "acceptance" in entry], folder / "logs.pt")


def generating(folder: Path) -> None:
    """Calls are shared out; one rank writes."""
    loaded = recipes.load_generation(folder / "recipe.yaml")
    asked = []
    responder = RemoteResponder if loaded.teacher.is_remote else LocalResponder
    answer = responder.respond
    responder.respond = lambda self, some: asked.extend(some) or answer(self, some)
    made = generate(loaded)
    assert made.counts.kept == 12
    assert {one.call % 4 // 2 for one in asked} == {dist.get_rank()}  # rounds of 4, two each


def gradients(folder: Path) -> None:
    """D3: after backward all ranks hold the same gradient, though their rows differ."""
    made = trainer(folder / "run", rows=dataset(16), per_device_train_batch_size=4)
    seen: list[torch.Tensor] = []
    original = made._get_grad_norm

    def record(model, grad_norm=None):
        seen.append(torch.cat([p.grad.flatten() for p in made.model.parameters()]).clone())
        return original(model, grad_norm)

    made._get_grad_norm = record
    made.train()
    everyone = [torch.empty_like(seen[0]) for _ in range(2)]
    dist.all_gather(everyone, seen[0])
    assert torch.equal(everyone[0], everyone[1])
    assert everyone[0].abs().max() > 1e-3


def empty_rank(folder: Path) -> None:
    """D5, N6: rank 1 has no predicted token at all; no hang, and the gradient is rank 0's rows'."""

    class HalfEmpty(FixedRollout):
        def write(self, prompts, *others):
            whole = super().write(prompts, *others)
            return whole.without_loss(torch.full((len(whole),), dist.get_rank() == 1))

    same_weights(folder, rows=dataset(8), rollout=HalfEmpty(), per_device_train_batch_size=4)


def evaluation(folder: Path) -> None:
    made = trainer(
        folder / "run",
        rows=dataset(8),
        eval_dataset=dataset(5, seed=4),
        per_device_eval_batch_size=2,
    )
    loss = made.evaluate()["eval_loss"]
    if dist.get_rank() == 0:
        torch.save(torch.tensor([loss]), folder / "weights.pt")


def bad_rank(folder: Path) -> None:
    """S1: a NaN on rank 1 stops both ranks, and both name rank 1."""

    class Bad(ResponseObjective):
        def forward(self, student, signal, sequences):
            total, count = super().forward(student, signal, sequences)
            return type(super().forward(student, signal, sequences))(
                total * (torch.nan if dist.get_rank() == 1 else 1.0), count
            )

    made = trainer(folder / "run", rows=dataset(16), objectives=[Bad()])
    before = weights(made.model.student)
    with pytest.raises(NonFiniteLossError, match="step 0, rank 1: "):
        made.train()
    assert torch.equal(weights(made.model.student), before)


CASES = {
    case.__name__: case
    for case in (
        fixed,
        uneven,
        resumed,
        kept_answers,
        on_policy,
        interleaved,
        generating,
        gradients,
        empty_rank,
        evaluation,
        bad_rank,
    )
}

if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.manual_seed(0)
    case, folder = CASES[sys.argv[1]], Path(sys.argv[2])
    dist.init_process_group("gloo")
    assert dist.get_world_size() == 2, "the launcher started one process only"  # D1
    assert toy.NUM_TOKENS == 259
    case(folder)
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # the case is decided; tearing down native threads aborts now and then
