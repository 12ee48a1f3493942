"""Lion's pools of hard and easy tasks: compared once, then read from gaps.json."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from llmdistill import recipe as recipes
from llmdistill.errors import DataError
from llmdistill.instruct.lion import Pools, by_divergence, by_referee, divergences, referee_gaps
from llmdistill.instruct.records import replace_lines
from llmdistill.instruct.requests import Asked, Request, user
from llmdistill.instruct.responders import LocalResponder, RemoteResponder
from llmdistill.instruct.task_sources import read_tasks
from llmdistill.instruct.tasks import Task
from llmdistill.models.heads import num_rows
from llmdistill.models.load import load_model, load_tokenizer
from llmdistill.models.vocabulary import require_same
from llmdistill.recipe.generators import LionRecipe
from llmdistill.sampling import GREEDY
from llmdistill.teachers.local import LocalTeacher

logger = logging.getLogger("llmdistill")


def tell_apart(
    recipe: recipes.GenerationRecipe,
    responder: LocalResponder | RemoteResponder,
    section: LionRecipe,
    *,
    folder: Path,
    begin: Callable[[], None] = lambda: None,
    is_new: bool = False,
) -> Pools:
    """Return the hard and easy tasks of a section's pool.

    The gaps between teacher and student are read from gaps.json in `folder`.  If that file does not
    exist, or with `is_new`, they are measured: this calls `begin` before it sends or writes
    anything.  Raises DataError if gaps.json was made from another pool.
    """
    record = folder / "gaps.json"
    tasks = read_tasks(section.pool)
    pool = hashlib.sha256(repr(tasks).encode()).hexdigest()[:16]
    if record.is_file() and not is_new:
        found = json.loads(record.read_text(encoding="utf-8"))
        if found["pool"] != pool:
            raise DataError(
                f"generator.pool differs from the pool that {record} was made from. Restore the "
                "original pool, or choose another folder."
            )
        gaps = found["gaps"]
    else:
        logger.info("sorting the tasks of the pool into hard and easy ones")
        # Only the first rank compares: the student is a second model in memory, and all ranks need
        # the same gaps.
        is_main = PartialState().is_main_process
        found = [_gaps(recipe, section, responder, tasks, begin) if is_main else None]
        gaps = broadcast_object_list(found)[0]
        if is_main:
            replace_lines(record, [{"pool": pool, "gaps": gaps}])
        PartialState().wait_for_everyone()  # no rank continues before the file exists
    if section.compare_by == "referee":
        return by_referee(gaps, tasks)
    return by_divergence(gaps, tasks, section.hard_share)


def _gaps(
    recipe: recipes.GenerationRecipe,
    section: LionRecipe,
    responder: LocalResponder | RemoteResponder,
    tasks: list[Task],
    begin: Callable[[], None],
) -> list[float] | list[float | None]:
    """Return the gap of each task: KL in nats per token, or the referee's difference in points."""
    # The student is wrapped as a LocalTeacher because it writes answers in the same way.
    student = LocalTeacher(
        load_model(section.student, dtype="auto"), load_tokenizer(section.student)
    )
    size = section.max_compared_tokens
    if section.compare_by == "divergence":
        assert isinstance(responder, LocalResponder)  # such a recipe is refused with a remote one
        teacher = responder.teacher
        require_same(
            teacher.tokenizer,
            student.tokenizer,
            num_rows(teacher.model),
            num_rows(student.model),
        )
        # Both models are loaded and fit together, so an old dataset in the folder may go now.
        begin()
        return divergences(
            teacher, student.model, tasks, max_new_tokens=size, batch_size=recipe.batch_size,
            chat_template_kwargs=recipe.chat_template_kwargs,
        )  # fmt: skip
    other = LocalResponder(
        student, seed=recipe.seed, batch_size=recipe.batch_size,
        chat_template_kwargs=recipe.chat_template_kwargs,
    )  # fmt: skip
    begin()
    asked = [
        Asked(number, 0, 0, Request(user(task.prompt), GREEDY, size))
        for number, task in enumerate(tasks)
    ]
    return referee_gaps(responder, tasks, responder.respond(asked), other.respond(asked))
