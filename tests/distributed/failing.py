"""Cases of worker.py in which a rank fails, is killed, has nothing to learn from, or is resumed."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import torch
import torch.distributed as dist

from llmdistill.rollouts.fixed import FixedRollout
from llmdistill.rollouts.replay import ReplayRollout
from llmdistill.rollouts.sampled import SampledRollout
from tests.support.spies import spy
from tests.training.helpers import dataset, trainer, weights

SAVED = {"save_strategy": "steps", "save_steps": 1, "optim": "adamw_torch", "learning_rate": 1e-2}
STEPS = 4


class Breaking(FixedRollout):
    """A rollout that fails, or kills its process, in the third step of rank 1."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def write(self, prompts, student, teacher, progress):
        if dist.get_rank() == 1 and progress.step == 2:
            if self.how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise ValueError("rank 1 cannot write")
        return super().write(prompts, student, teacher, progress)


class HalfEmpty(FixedRollout):
    """A rollout that leaves rank 1 nothing to learn from."""

    def write(self, prompts, *others):
        whole = super().write(prompts, *others)
        return whole.without_loss(torch.full((len(whole),), dist.get_rank() == 1))


def a_run(folder: Path, **options):
    options = {"rows": dataset(16), "per_device_train_batch_size": 2, "max_steps": STEPS} | options
    return trainer(folder / "run", **SAVED | options)


def rank_fails(folder: Path) -> None:
    a_run(folder, rollout=Breaking("fails")).train()


def rank_killed(folder: Path) -> None:
    a_run(folder, rollout=Breaking("killed")).train()


def after_a_failure(folder: Path) -> None:
    """The same command again, with a rollout that works, is the run without a failure.

    The run that failed is in the folder above.
    """
    again, straight = a_run(folder.parent), a_run(folder)
    again.train(resume_from_checkpoint=True)
    straight.train()
    assert torch.equal(weights(again.model.student), weights(straight.model.student))


def asked_to_stop(folder: Path) -> None:
    """A run that is far from its end when its launcher gets SIGTERM."""

    class Telling(FixedRollout):
        def write(self, prompts, student, teacher, progress):
            (folder / f"step-{progress.step}").touch()
            return super().write(prompts, student, teacher, progress)

    a_run(folder, max_steps=100_000, rollout=Telling(), save_strategy="no").train()


def empty_rank(folder: Path) -> None:
    """D5, N6: rank 1 has no predicted token; nothing hangs, and rank 0's rows give the gradient."""
    made = trainer(
        folder / "run", rows=dataset(8), rollout=HalfEmpty(), per_device_train_batch_size=4
    )
    before = weights(made.model.student)
    made.train()
    _assert_alike(weights(made.model.student))
    assert not torch.equal(weights(made.model.student), before)


def empty_rank_resumed(folder: Path) -> None:
    """N6, R1."""
    straight, again = (a_run(folder, rollout=HalfEmpty()) for _ in range(2))
    straight.train()
    again.train(resume_from_checkpoint=str(folder / "run" / "checkpoint-2"))
    assert torch.equal(weights(again.model.student), weights(straight.model.student))


def restored(folder: Path) -> None:
    """R2: the next 8 batches of a restored run are those of a straight one, on each rank."""
    seen = []
    for start in (None, str(folder / "run" / "checkpoint-4")):
        rollout = FixedRollout()
        written = spy(rollout, "write")
        made = a_run(folder, rows=dataset(20), max_steps=12, rollout=rollout)  # 5 steps an epoch
        made.train(resume_from_checkpoint=start)
        seen.append([one.row_ids_B.tolist() for one in written])
    straight, resumed = seen
    assert len(straight) == 12
    assert straight[4:] == resumed
    assert straight[0] != straight[5], "the epochs have the same order"
    mine = torch.tensor(straight).flatten()
    both = [torch.empty_like(mine) for _ in range(2)]
    dist.all_gather(both, mine)
    assert not torch.equal(*both), "both ranks train the same rows"


def one_writes(folder: Path) -> None:
    """D6: each rank writes into a different folder here, which shows who writes what."""
    rank = dist.get_rank()
    rollout = ReplayRollout(SampledRollout("student", max_new_tokens=4), capacity=4)
    made = trainer(
        folder / f"of-{rank}", rows=dataset(8), rollout=rollout, max_steps=2, **SAVED,
        per_device_train_batch_size=2,
    )  # fmt: skip
    made.train()
    made.export_student(folder / f"of-{rank}" / "student")
    dist.barrier()


def _assert_alike(mine: torch.Tensor) -> None:
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, mine)
    assert all(torch.equal(mine, other) for other in everyone), "ranks ended with different weights"


CASES = (
    rank_fails,
    rank_killed,
    after_a_failure,
    asked_to_stop,
)
