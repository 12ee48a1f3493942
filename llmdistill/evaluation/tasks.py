"""Measures models on public benchmarks with lm-evaluation-harness (the extra `lm-eval`)."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from llmdistill.errors import RecipeError
from llmdistill.models.heads import eval_mode

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BATCH_SIZE = 8  # requests that a model reads at once

Results = dict[str, dict[str, float]]


class Benchmarks:
    """Tasks of lm-evaluation-harness.

    Args:
        names: Names of tasks, groups or tags.
        limit: Number of rows of each task that are used, from the first; None is all.
        folder: A folder with more tasks, each a YAML file.

    Raises:
        RecipeError: lm-eval is not installed, or it knows no task with one of the names.
    """

    def __init__(
        self, names: Sequence[str], *, limit: int | None = None, folder: str | None = None
    ) -> None:
        if importlib.util.find_spec("lm_eval") is None:
            raise RecipeError(
                "benchmarks need the package lm-eval, which is not installed. Install it with: pip "
                "install 'llmdistill[lm-eval]'"
            )
        from lm_eval.tasks import TaskManager

        self.names, self.limit = list(names), limit
        self._tasks = TaskManager(include_path=folder)
        known = self._tasks.all_tasks
        if unknown := [name for name in names if name not in known]:
            raise RecipeError(
                f"lm-eval knows no task '{unknown[0]}'. `lm_eval ls tasks` lists the names. Add "
                "the folder of your own tasks if it is one of them."
            )

    def measure(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Results:
        """Return the metrics of each task by its name.

        Raises RecipeError if a task cannot be run, such as without its data set.
        """
        import lm_eval
        from lm_eval.models.huggingface import HFLM

        with eval_mode(model):
            wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=BATCH_SIZE)
            try:
                found = lm_eval.simple_evaluate(
                    model=wrapped,
                    tasks=self.names,
                    limit=self.limit,
                    task_manager=self._tasks,
                    log_samples=False,
                )
            except Exception as error:  # of the data set's loader, of the task's own code, ...
                raise RecipeError(
                    f"lm-eval cannot run {', '.join(self.names)}: {type(error).__name__}: {error}"
                ) from error
        return {name: _metrics(values) for name, values in found["results"].items()}


def _metrics(values: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of a task: `acc,none` is `acc`, and a filter keeps its name."""
    return {
        name.removesuffix(",none"): float(value)
        for name, value in values.items()
        if "," in name and isinstance(value, int | float)
    }
