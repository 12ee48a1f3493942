"""What `llmdistill evaluate` measures: each student against each teacher.

First come the figures, one teacher after the other.  What does not depend on a teacher, such as
forgetting and benchmarks, is measured once and shown in the table of each teacher.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from llmdistill.data.collate import PromptDataset, collate
from llmdistill.data.context import room
from llmdistill.data.formats import to_examples
from llmdistill.data.pairing import Pairing
from llmdistill.data.sources import read
from llmdistill.data.validate import RowCounts, Rules
from llmdistill.errors import DataError, VocabularyError
from llmdistill.evaluation.forgetting import StartingStudent
from llmdistill.evaluation.measure import Evaluation, Figures
from llmdistill.evaluation.speculative import measure_drafts
from llmdistill.evaluation.tasks import Benchmarks
from llmdistill.models.heads import num_rows
from llmdistill.models.load import load_config, load_model, load_tokenizer
from llmdistill.models.vocabulary import require_same
from llmdistill.teachers.local import LocalTeacher

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from llmdistill.cli.evaluate import Asked

logger = logging.getLogger("llmdistill")


@dataclass(frozen=True)
class Measured:
    """The figures of the students and of one teacher, by their names.

    `more` has what is measured only if it is asked for.  `counts` are the rows used and dropped.
    """

    figures: dict[str, Figures]
    counts: RowCounts
    more: dict[str, dict[str, Any]] = field(default_factory=dict)

    def add(self, name: str, what: str, values: dict[str, Any]) -> None:
        """Add more figures of a model."""
        self.more.setdefault(name, {})[what] = values

    def records(self) -> dict[str, dict[str, Any]]:
        """Return all figures of each model as plain data."""
        return {
            name: asdict(figures) | self.more.get(name, {})
            for name, figures in self.figures.items()
        }


def measured(asked: Asked) -> dict[str, Measured]:
    """Return what was measured against each teacher."""
    # What can be wrong is read before the first model writes.
    benchmarks = None
    if asked.tasks:
        benchmarks = Benchmarks(asked.tasks, limit=asked.task_limit, folder=asked.task_path)
    start_rows = None if asked.start is None else _start_rows(asked, asked.start)
    found = {teacher: _against(asked, teacher) for teacher in asked.teachers}
    if asked.start is not None and start_rows is not None:
        _add_forgetting(asked.start, start_rows, asked, found)
    if benchmarks is not None:
        _add_benchmarks(benchmarks, asked, found)
    return found


def _against(asked: Asked, teacher: str) -> Measured:
    """Measure the students against one teacher, which is loaded as long as that takes."""
    logger.info("loading the teacher %s", teacher)
    judge = LocalTeacher.load(teacher)
    _require_same(judge.tokenizer, num_rows(judge.model), asked.students)
    dataset = _rows(judge.tokenizer, [teacher, *asked.students], asked.data, asked)
    for name in asked.students:
        _compare(load_tokenizer(name), judge.tokenizer, asked)
    logger.info("the teacher answers %d prompts", len(dataset))
    evaluation = Evaluation(
        judge,
        collate(dataset.rows),
        max_new_tokens=asked.max_new_tokens,
        seed=asked.seed,
        answer_pattern=asked.answer_pattern,
    )
    found = Measured({}, dataset.counts)
    for name in asked.students:
        logger.info("measuring %s", name)
        model = load_model(name)
        found.figures[name] = evaluation.measure(model).figures
        if asked.speculative:
            logger.info("measuring %s as a draft model", name)
            options: Any = {"max_new_tokens": asked.max_new_tokens, "seed": asked.seed}
            drafts = measure_drafts(judge, model, evaluation.prompts, **options)
            found.add(name, "speculative", asdict(drafts))
    found.figures.update(evaluation.teacher_figures())
    return found


def _start_rows(asked: Asked, start: str) -> PromptDataset:
    """Return the rows on which forgetting is measured.  Raises an error for a wrong pair."""
    tokenizer = load_tokenizer(start)
    _require_same(tokenizer, load_config(start).get_text_config().vocab_size, asked.students)
    return _rows(tokenizer, [start, *asked.students], asked.forget_data or asked.data, asked)


def _add_forgetting(
    start: str, rows: PromptDataset, asked: Asked, found: dict[str, Measured]
) -> None:
    logger.info("the starting student %s answers %d prompts", start, len(rows))
    options: Any = {"max_new_tokens": asked.max_new_tokens}
    before = StartingStudent(LocalTeacher.load(start), collate(rows.rows), **options)
    for name in asked.students:
        logger.info("measuring what %s forgot", name)
        lost = asdict(before.compare(load_model(name)))
        for one in found.values():
            one.add(name, "forgetting", lost)


def _add_benchmarks(benchmarks: Benchmarks, asked: Asked, found: dict[str, Measured]) -> None:
    for name in dict.fromkeys([*asked.students, *asked.teachers]):
        logger.info("running %s with %s", ", ".join(asked.tasks), name)
        results = benchmarks.measure(load_model(name), load_tokenizer(name))
        for teacher, one in found.items():
            if name in asked.students:
                one.add(name, "tasks", results)
            if name == teacher:
                one.add("teacher", "tasks", results)


def _require_same(tokenizer: PreTrainedTokenizerBase, num_rows: int, students: list[str]) -> None:
    """Refuse a wrong pair before the first model is measured."""
    for name in students:
        vocab_size = load_config(name).get_text_config().vocab_size
        require_same(tokenizer, load_tokenizer(name), num_rows, vocab_size)


def _compare(
    student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase, asked: Asked
) -> None:
    """Warn if a student is used with another rendering than that on which it is measured."""
    pairing = Pairing(student, [teacher], asked.template_options)
    try:
        for place, row in itertools.islice(read(asked.data), 8):
            for example in to_examples(row, place):
                pairing.check(example)
    except VocabularyError as error:
        logger.warning("the student is measured on the teacher's rendering: %s", error)
    except DataError:  # a malformed row, which was reported before
        return


def _rows(
    tokenizer: PreTrainedTokenizerBase, models: Sequence[str], data: str, asked: Asked
) -> PromptDataset:
    """Return the encoded rows; prompts that leave no room for an answer are dropped and counted."""
    configs = [load_config(name).get_text_config() for name in models]
    fits = min(room(config, asked.max_new_tokens) for config in configs)
    limit = None if fits == math.inf else int(fits)
    rules = Rules(max_prompt_tokens=limit, template_options=asked.template_options)
    dataset = PromptDataset.encode(itertools.islice(read(data), asked.max_rows), tokenizer, rules)
    for note in dataset.counts.notes():
        logger.warning("data: %s", note)
    return dataset
