"""Generators and filters from a user's own Python file.

generator: {kind: python, function: riddles.py:riddles}
filters: [{kind: python, function: riddles.py:short}]
"""

from __future__ import annotations

import functools
import importlib.util
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import GeneratorType
from typing import Any

from llmdistill.errors import DataError, LlmDistillError, RecipeError
from llmdistill.instruct.filters import Filter
from llmdistill.instruct.generators.base import Cost, TaskGenerator
from llmdistill.instruct.parse import Parsed
from llmdistill.instruct.requests import Call, Reply, Request, user
from llmdistill.instruct.tasks import Task
from llmdistill.sampling import Sampling

__all__ = ["Filter", "Parsed", "Request", "Sampling", "Task", "TaskGenerator", "ask"]


def ask(
    text: str,
    *,
    system: str = "",
    sampling: Sampling = Sampling(),
    max_new_tokens: int = 512,
) -> Request:
    """Return the request that asks the teacher a question, as a user would."""
    messages = ({"role": "system", "content": system},) if system else ()
    return Request((*messages, *user(text)), sampling, max_new_tokens)


class OwnGenerator(TaskGenerator):
    """Makes tasks with a Python generator function: `function(number, kept, **options)`.

    It yields lists of requests, is sent their replies, and returns its tasks.  It must depend on
    nothing but its arguments and the replies, because a resumed run calls it again.
    """

    at_most: Cost | None = None

    def __init__(
        self, function: Callable[..., Any], options: Mapping[str, Any], calls: int | None
    ) -> None:
        self.function, self.options, self.num_calls = function, options, calls

    def call(self, number: int, machine: Sequence[Task]) -> Call:
        refused: Counter[str] = Counter()
        exchange = self._run(number, lambda: self.function(number, machine, **self.options))
        if not isinstance(exchange, GeneratorType):
            raise self._error(number, f"it must yield lists of requests, got {_kind(exchange)}")
        replies: list[Reply] | None = None
        while True:
            try:
                asked = self._run(number, functools.partial(exchange.send, replies))
            except StopIteration as stop:
                return self._made(number, stop.value, refused)
            if not isinstance(asked, list) or not all(isinstance(one, Request) for one in asked):
                raise self._error(number, f"it must yield lists of requests, got {_kind(asked)}")
            replies = (yield asked) if asked else []
            refused.update(reply.refused for reply in replies if reply.refused)

    def _made(self, number: int, made: Any, refused: Counter[str]) -> Parsed:
        if isinstance(made, Parsed):
            return made
        tasks = [] if made is None else made
        if not isinstance(tasks, list) or not all(isinstance(one, Task) for one in tasks):
            raise self._error(number, f"it must return a list of tasks, got {_kind(made)}")
        return Parsed(tasks, {} if tasks else refused)

    def _run(self, number: int, step: Callable[[], Any]) -> Any:
        """Run a part of the user's function, and say in which call it failed."""
        try:
            return step()
        except (StopIteration, LlmDistillError):
            raise
        except Exception as error:
            raise self._error(number, f"{type(error).__name__}: {error}") from error

    def _error(self, number: int, wrong: str) -> DataError:
        return DataError(f"call {number} of the generator '{self.function.__name__}': {wrong}")


class OwnFilter(Filter):
    """Drops the tasks for which `function(task, **options)` returns a reason."""

    def __init__(self, function: Callable[..., str | None], options: Mapping[str, Any]) -> None:
        self.function, self.options = function, options

    def reason(self, task: Task) -> str | None:
        found = self.function(task, **self.options)
        if found is not None and not isinstance(found, str):
            raise DataError(
                f"the filter '{self.function.__name__}' must return why a task is dropped, as "
                f"text, or None to keep it, got {found!r:.50}"
            )
        return found


def own_generator(function: str, options: Mapping[str, Any], calls: int | None) -> TaskGenerator:
    """Return a user's generator: a function, or a subclass of TaskGenerator.

    Raises RecipeError if it cannot be found.
    """
    found = load_function(function)
    if not (isinstance(found, type) and issubclass(found, TaskGenerator)):
        return OwnGenerator(found, options, calls)
    made: TaskGenerator = found(**options)
    if calls is not None:
        made.num_calls = calls
    return made


def own_filter(function: str, options: Mapping[str, Any]) -> Filter:
    """Return a user's filter: a function, or a subclass of Filter.

    Raises RecipeError if it cannot be found.
    """
    found = load_function(function)
    is_class = isinstance(found, type) and issubclass(found, Filter)
    made: Filter = found(**options) if is_class else OwnFilter(found, options)
    return made


def _kind(value: Any) -> str:
    if isinstance(value, list):
        return f"a list of {', '.join(sorted({type(one).__name__ for one in value}))}"
    return type(value).__name__


def load_function(function: str) -> Any:
    """Return what `file.py:name` names.  Raises RecipeError if there is no such file or name."""
    file, _, name = function.rpartition(":")
    path = Path(file).expanduser()
    if not path.is_file():
        raise RecipeError(f"'{function}' names no file. Write it as path/to/file.py:name.")
    # This name hides no installed module.
    spec = importlib.util.spec_from_file_location(f"llmdistill_own_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise RecipeError(f"'{file}' is not a Python file (.py)")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise RecipeError(f"{file} cannot be run: {type(error).__name__}: {error}") from error
    found = getattr(module, name, None)
    if not callable(found):
        raise RecipeError(
            f"{file} has no function or class '{name}'. Check 'function: {function}'."
        )
    return found
