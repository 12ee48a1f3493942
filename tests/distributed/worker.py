"""The cases that ranks run: `torchrun ... -m tests.distributed.worker FOLDER...`.

Each folder has the name of its case.  The cases run one after the other in the same process, so a
case undoes what it replaces in classes and modules.
"""

from __future__ import annotations

import gc
import os
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from llmdistill import recipe as recipes
from llmdistill.data import validate
from llmdistill.data.collate import PromptStream
from llmdistill.data.validate import Rules
from llmdistill.decoding import batches
from llmdistill.errors import NonFiniteLossError
from llmdistill.generate import generate
from llmdistill.instruct.responders import LocalResponder, RemoteResponder
from llmdistill.objectives.augment import AdversarialObjective, MixObjective
from llmdistill.objectives.build import build_objectives
from llmdistill.objectives.contrastive import CrdObjective, IcdObjective, RrdObjective
from llmdistill.objectives.features import HiddenObjective
from llmdistill.objectives.response import ResponseObjective
from llmdistill.rollouts.build import build_rollout
from llmdistill.rollouts.fixed import FixedRollout
from llmdistill.rollouts.interleaved import InterleavedRollout
from llmdistill.rollouts.sampled import SampledRollout
from llmdistill.run import distill
from llmdistill.teachers.local import LocalTeacher
from tests import toy
from tests.conformance import entries
from tests.distributed import failing, sharded
from tests.support.spies import spy
from tests.support.teachers import Learner, every_teacher, seam_objectives
from tests.training.helpers import INTERLEAVED, dataset, trained, trainer, weights


def same_weights(folder: Path, **options) -> list[dict]:
    """Train, check that all ranks have the same weights, and save those of rank 0; return the log."""
    made = trainer(folder / "run", **options)
    made.train()
    mine = weights(made.model.student)
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, mine)
    assert all(torch.equal(mine, other) for other in everyone), "ranks ended with different weights"
    if dist.get_rank() == 0:
        torch.save(mine, folder / "weights.pt")
    return made.state.log_history


WRITERS = {
    "fixed": FixedRollout,
    "sampled": lambda: SampledRollout("student", max_new_tokens=6),
    "interleaved": lambda: InterleavedRollout(**INTERLEAVED),
}
FIVE_STEPS = {"rows": 40, "max_steps": 5}


def partitions(folder: Path) -> None:
    """Five steps of 8 rows: 2 ranks with 4 rows, and with two micro-batches of 2 rows."""
    for name, rollout in WRITERS.items():
        for rows, windows in ((4, 1), (2, 2)):
            made = trainer(
                folder / "run",
                rollout=rollout(),
                per_device_train_batch_size=rows,
                gradient_accumulation_steps=windows,
                **FIVE_STEPS | {"rows": dataset(FIVE_STEPS["rows"])},
            )
            made.train()
            if dist.get_rank() == 0:
                torch.save(weights(made.model.student), folder / f"{name}-{rows}.pt")


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
    """10 rows, stopped in the second epoch: filler rows add nothing after a resume either."""
    options = {"rows": dataset(10), "per_device_train_batch_size": 2, "num_train_epochs": 2}
    options |= {"max_steps": -1, "save_strategy": "steps", "save_steps": 1}
    trainer(folder / "run", **options).train()
    again = trainer(folder / "again", **options)
    again.train(resume_from_checkpoint=str(folder / "run" / "checkpoint-4"))
    if dist.get_rank() == 0:
        torch.save(weights(again.model.student), folder / "weights.pt")


def kept_answers(folder: Path) -> None:
    """The teacher answers each of 8 prompts once; the ranks share the work and read all of it."""
    rollout = SampledRollout("teacher", max_new_tokens=4, batch_size=2)
    made = trainer(
        folder / "run", rows=dataset(8), rollout=rollout, per_device_train_batch_size=2,
        max_steps=-1, num_train_epochs=3,
    )  # fmt: skip
    written = spy(made.teacher, "write")
    with pytest.MonkeyPatch.context() as patch:
        # The ranks see different free memory, and share the work all the same.
        patch.setattr(batches, "_free_bytes", lambda _: 10.0**6 / (1 + dist.get_rank()))
        made.train()
    counts = [torch.zeros(1) for _ in range(2)]
    dist.all_gather(counts, torch.tensor([float(sum(map(len, written)))]))
    assert [int(count) for count in counts] == [4, 4], counts
    assert len(rollout.kept) == 8


def on_policy(folder: Path) -> None:
    rollout = SampledRollout("student", max_new_tokens=6)
    same_weights(
        folder, rows=dataset(16), rollout=rollout, per_device_train_batch_size=4, max_steps=2
    )


def interleaved(folder: Path) -> None:
    """Both models write, and the log covers both ranks."""
    options = {"rows": dataset(16), "per_device_train_batch_size": 4, "max_steps": 2}
    logs = same_weights(folder, rollout=InterleavedRollout(**INTERLEAVED), **options)
    if dist.get_rank() == 0:
        torch.save([entry for entry in logs if "acceptance" in entry], folder / "logs.pt")


def generating(folder: Path) -> None:
    """The calls are divided between the ranks, and one rank writes."""
    loaded = recipes.load_generation(folder / "recipe.yaml")
    asked = []
    responder = RemoteResponder if loaded.teacher.is_remote else LocalResponder
    answer = responder.respond
    responder.respond = lambda self, some: asked.extend(some) or answer(self, some)
    made = generate(loaded)
    assert made.counts.kept == 12
    assert {one.call % 4 // 2 for one in asked} == {
        dist.get_rank()
    }  # rounds of 4 calls, two per rank


def gradients(folder: Path) -> None:
    """D3: all ranks have the same gradient after the backward pass, although their rows differ."""
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


def zero_bad_rank(folder: Path) -> None:
    bad_rank(folder, **sharded.ZERO2)


def bad_rank(folder: Path, **scaling) -> None:
    """S1: a NaN on rank 1 stops both ranks before the update, and both name rank 1."""

    class Bad(ResponseObjective):
        def forward(self, student, signal, sequences):
            total, count = super().forward(student, signal, sequences)
            return type(super().forward(student, signal, sequences))(
                total * (torch.nan if dist.get_rank() == 1 else 1.0), count
            )

    made = trainer(folder / "run", rows=dataset(16), objectives=[Bad()], **scaling)
    before = weights(made.model.student)
    with pytest.raises(NonFiniteLossError, match="step 0, rank 1: .*not updated"):
        made.train()
    assert torch.equal(weights(made.model.student), before)


SEAMS = {"rows": 16, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}


def seams(folder: Path) -> None:
    """Every kind of divisor, hidden states with a projector, and a teacher that trains along."""
    made = trainer(
        folder / "run",
        teacher=Learner(),
        objectives=seam_objectives(),
        **SEAMS | {"rows": dataset(SEAMS["rows"])},
    )
    made.train()
    if dist.get_rank() == 0:
        torch.save(trained(made), folder / "weights.pt")


QUEUES = {"rows": 24, "max_steps": 3}


def contrasts() -> list:
    # Two batches of 8: the third one replaces the first.
    return [IcdObjective(), CrdObjective(queue_size=16), RrdObjective(queue_size=16)]


def queues(folder: Path) -> None:
    """Three steps, so that the queues fill and wrap."""
    options = QUEUES | {"rows": dataset(QUEUES["rows"]), "per_device_train_batch_size": 4}
    made = trainer(folder / "run", objectives=contrasts(), **options)
    made.train()
    for name, value in made.model.named_buffers():
        if "queue" in name:
            both = [torch.empty_like(value) for _ in range(2)]
            dist.all_gather(both, value)
            assert torch.equal(*both), name
    if dist.get_rank() == 0:
        torch.save(trained(made), folder / "weights.pt")
        torch.save(queues_by_prompt(made), folder / "queues.pt")


def queues_by_prompt(made) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return each queue in the order of its keys: ranks sort their own rows by length."""
    found = [one.queue for one in made.model.objectives if hasattr(one, "queue")]
    orders = [queue.prompt_K.argsort() for queue in found]
    return [
        (queue.prompt_K[order], queue.vectors_PKE[:, order])
        for queue, order in zip(found, orders, strict=True)
    ]


def hidden_alone(folder: Path) -> None:
    """Layers above the matched one get no gradient, and no rank waits for it."""
    options = {"rows": dataset(16), "per_device_train_batch_size": 4, "max_steps": 2}
    same_weights(folder, objectives=[HiddenObjective(layers=[(1, -1)])], **options)


def conformance(folder: Path) -> None:
    """Every objective, rollout and teacher that a recipe can have."""
    for name, options in every_entry():
        rows = {"rows": dataset(7), "per_device_train_batch_size": 4}
        made = trainer(folder / "run", **rows, **options())
        made.train()
        if dist.get_rank() == 0:
            torch.save(trained(made), folder / f"{name}.pt")


def whole_run(folder: Path) -> None:
    """A recipe that measures on all ranks before the first step, is stopped and resumed."""
    pair = folder / "pair"
    given = {
        "output": str(folder / "run"),
        "teacher": {"model": str(pair / "teacher"), "dtype": "float32"},
        "student": {"model": str(pair / "student")},
        "data": {"train": str(folder / "rows.jsonl"), "hold_back": 2},
        "evaluate": {"max_new_tokens": 3},
        "training": {
            "use_cpu": True, "max_steps": 2, "per_device_train_batch_size": 2, "save_steps": 1,
            "eval_on_start": True, "dataloader_pin_memory": False,
        },
    }  # fmt: skip
    distill(recipes.build(given), show_progress=False)
    assert dist.get_world_size() == 2
    given["training"]["max_steps"] = 3
    distill(recipes.build(given), show_progress=False)


def three_steps(folder: Path) -> None:
    """A run on two ranks, to be continued by another number of ranks."""
    trainer(folder / "run", **going_on(), per_device_train_batch_size=2, max_steps=3).train()


def going_on() -> dict:
    rollout = SampledRollout("student", max_new_tokens=4)
    return {"rows": dataset(16), "rollout": rollout, "save_strategy": "steps", "save_steps": 1}


def streamed(folder: Path) -> None:
    """Each rank encodes its own rows of a stream; a pass ends when one of them has no batch left."""
    rows = toy.rows(13)
    rows[3] = rows[5] = {"prompt": 3}  # malformed, both of rank 1
    stream = PromptStream(
        lambda: ((f"x:{i}", row) for i, row in enumerate(rows)), toy.tokenizer(),
        Rules(skip_bad=True),
    )  # fmt: skip
    rollout = FixedRollout()
    written = spy(rollout, "write")
    with pytest.MonkeyPatch.context() as patch:
        encoded = spy(validate, "_encode", patch)
        made = trainer(
            folder / "run", rows=stream, rollout=rollout, per_device_train_batch_size=2, max_steps=4,
            dataloader_drop_last=True,
        )  # fmt: skip
        made.train()
    rank = dist.get_rank()
    trained = [row for one in written for row in one.row_ids_B.tolist()]
    # Rank 1 has the rows 1, 7, 9 and 11, so that a pass has two steps.
    assert trained == [[0, 2, 4, 6, 0, 2, 4, 6], [1, 7, 9, 11, 1, 7, 9, 11]][rank], trained
    # All rows once for the fingerprint of the run, which reads the first rows of a stream.
    assert len(encoded) <= len(rows) + 2 * [7, 4][rank], "a row of the other rank was encoded"
    assert made.state.global_step == 4


def measured_run(folder: Path, name: str) -> dict:
    return {
        "output": str(folder / name),
        "teacher": {"model": str(folder / "pair" / "teacher"), "dtype": "float32"},
        "student": {"model": str(folder / "pair" / "student"), "export_dtype": "float32"},
        "data": {"train": str(folder / "rows.jsonl"), "hold_back": 3},
        "evaluate": {"max_new_tokens": 5},
        "training": {
            "use_cpu": True, "max_steps": 1, "dataloader_pin_memory": False, "bf16": False,
            "per_device_train_batch_size": 4 // int(os.environ.get("WORLD_SIZE", 1)),
        },
    }  # fmt: skip


def measured(folder: Path) -> None:
    """Each rank writes with its own prompts only, and has the figures of all."""
    with pytest.MonkeyPatch.context() as patch:
        writes = spy(LocalTeacher, "write", patch)
        result = distill(recipes.build(measured_run(folder, "two")), show_progress=False)
    assert sum(map(len, writes)) == 2 - dist.get_rank()
    assert len(result.answers) == 3
    assert set(result.evaluation) == {"before", "after", "teacher"}


def every_entry():
    """Yield (name, function that makes the trainer's arguments) of each part of a recipe."""
    yield from every_teacher().items()
    for name, one in entries.main_objectives().items():
        section = entries.recipe(objectives=[one]).objectives[0]
        yield name, lambda section=section: {"objectives": build_objectives([section])}
    changes = [ResponseObjective, partial(AdversarialObjective, steps=2), MixObjective]
    yield "changes-together", lambda: {"objectives": [one() for one in changes]}
    for name, one in entries.rollouts().items():
        section = entries.recipe(rollout=one).rollout
        yield name, lambda section=section: {"rollout": build_rollout(section)}


_TOGETHER = (
    fixed, uneven, resumed, gradients, bad_rank, streamed, failing.empty_rank,
    failing.empty_rank_resumed, failing.restored, kept_answers, on_policy, interleaved, evaluation,
    seams, queues, hidden_alone, partitions, failing.one_writes, conformance, whole_run,
    three_steps, measured, sharded.sharded_teacher,
)  # fmt: skip
TOGETHER = tuple(case.__name__ for case in _TOGETHER)  # these share a launch
CASES = {
    case.__name__: case
    for case in (*_TOGETHER, generating, zero_bad_rank, *failing.CASES, *sharded.CASES)
}
DONE = "done"  # the file that a case leaves when it has ended well on both ranks


def run(folder: Path) -> None:
    """Run the case that has the name of a folder."""
    if dist.get_rank() == 0:
        print(f"case {folder.name}", file=sys.stderr, flush=True)
    torch.manual_seed(0)
    CASES[folder.name](folder)
    dist.barrier()
    if dist.get_rank() == 0:
        (folder / DONE).touch()


if __name__ == "__main__":
    gc.freeze()  # Trainer collects garbage in each run: not among all that is imported
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    assert dist.get_world_size() == 2, "the launcher started one process only"  # D1
    assert toy.NUM_TOKENS == 259
    for folder in map(Path, sys.argv[1:]):
        run(folder)
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # the cases are decided, and tearing down native threads sometimes aborts
