"""The second job: a teacher turns seed tasks into a clean instruction data set."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from llmdistill.batch import Sampling
from llmdistill.data.formats import to_examples
from llmdistill.data.sources import read
from llmdistill.errors import DataError
from llmdistill.instruct import filters, generators
from llmdistill.instruct.filters import Filter
from llmdistill.instruct.generators import TaskGenerator
from llmdistill.instruct.lion import Pools
from llmdistill.instruct.tasks import Task
from llmdistill.recipe import SourceRecipe, generation


def build_generator(
    recipe: generation.GenerationRecipe, seeds: Sequence[Task], pools: Pools | None = None
) -> TaskGenerator:
    """The generator that a recipe asks for; `pools` are Lion's."""
    answer = recipe.generator
    known = {"kind", "prompts", "student", "pool", "by", "hard_share", "max_compared_tokens"}
    options: dict[str, Any] = answer.model_dump(exclude=known)
    for name in ("sampling", "answer_sampling"):
        if name in options:
            options[name] = Sampling(**options[name])
    if isinstance(answer, generation.AnswerRecipe | generation.RewriteRecipe):
        return _GIVEN[type(answer)](read_tasks(answer.prompts), **options)
    if isinstance(answer, generation.LionRecipe):
        assert pools is not None
        return generators.Lion(pools.hard, pools.easy, seed=recipe.seed, **options)
    if isinstance(answer, generation.MagpieRecipe):
        return generators.Magpie(**options)
    if isinstance(answer, generation.SelfInstructRecipe):
        classifies = [task.classifies for task in seeds]
        return generators.SelfInstruct(seeds, classifies, seed=recipe.seed, **options)
    made = generators.Alpaca if isinstance(answer, generation.AlpacaRecipe) else generators.Evolve
    return made(seeds, seed=recipe.seed, **options)


def build_filters(recipe: generation.GenerationRecipe, seeds: Sequence[Task]) -> list[Filter]:
    """The filters that a recipe asks for, in its order."""
    return [_FILTERS[type(answer)](answer, seeds) for answer in recipe.filters]


def read_tasks(sources: Iterable[SourceRecipe]) -> list[Task]:
    """The rows of sources as tasks: the last user turn, and the answer there is."""
    return [
        _task(row, place, source.format)
        for source in sources
        for place, row in read(source.source, columns=source.columns)
    ]


def _task(row: Any, place: str, form: str) -> Task:
    if isinstance(row, DataError):
        raise row
    example = to_examples(row, place, form=form)[0]
    if len(example.prompt) != 1:
        raise DataError(f"{place}: a task is one user turn, got {len(example.prompt)} messages")
    classifies = bool(row.get("is_classification", False))
    if "instruction" in row:
        instruction, given, output = (
            str(row.get(key) or "") for key in ("instruction", "input", "output")
        )
        reference = example.response
        return Task(instruction, given, output, reference=reference, classifies=classifies)
    text = example.prompt[0]["content"]
    return Task(text, "", example.response or "", reference=example.response)


def _plain(made: Callable[..., Filter]) -> Callable[[Any, Sequence[Task]], Filter]:
    """A filter whose options are the recipe's own."""
    return lambda answer, seeds: made(**answer.model_dump(exclude={"kind"}, exclude_none=True))


def _rouge(answer: generation.RougeRecipe, seeds: Sequence[Task]) -> Filter:
    return filters.Rouge(answer.at_most, (task.instruction for task in seeds))


def _contamination(answer: generation.ContaminationRecipe, seeds: Sequence[Task]) -> Filter:
    texts = (text for task in read_tasks(answer.sources) for text in (task.prompt, task.output))
    return filters.Contamination(texts, answer.ngram)


_GIVEN: dict[type, Callable[..., TaskGenerator]] = {
    generation.AnswerRecipe: generators.Answer,
    generation.RewriteRecipe: generators.Rewrite,
}
_FILTERS: dict[type, Callable[[Any, Sequence[Task]], Filter]] = {
    generation.LengthRecipe: _plain(filters.Length),
    generation.TruncatedRecipe: _plain(filters.Truncated),
    generation.BlacklistRecipe: _plain(filters.Blacklist),
    generation.OddStartRecipe: _plain(filters.OddStart),
    generation.RepeatedLinesRecipe: _plain(filters.RepeatedLines),
    generation.EmptyOrEchoRecipe: _plain(filters.EmptyOrEcho),
    generation.OpenEndRecipe: _plain(filters.OpenEnd),
    generation.RougeRecipe: _rouge,
    generation.NearDuplicatesRecipe: _plain(filters.NearDuplicates),
    generation.ContaminationRecipe: _contamination,
    generation.LanguageRecipe: _plain(filters.Language),
    generation.SameResultRecipe: _plain(filters.SameResult),
}
