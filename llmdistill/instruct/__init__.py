"""The second job: a teacher turns seed tasks into a clean instruction data set."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from llmdistill.data.formats import form_of, to_examples
from llmdistill.data.sources import read
from llmdistill.errors import DataError, RecipeError
from llmdistill.instruct import filters, generators
from llmdistill.instruct.filters import Filter
from llmdistill.instruct.generators import Answering, TaskGenerator
from llmdistill.instruct.lion import Pools
from llmdistill.instruct.tasks import Task
from llmdistill.recipe import SourceRecipe, generation
from llmdistill.recipe import filters as asked
from llmdistill.sampling import Sampling

# Keys of a generator's recipe that say where its tasks come from.
NOT_THE_GENERATORS = {
    *("kind", "prompts", "student", "pool", "by", "hard_share", "max_compared_tokens")
}


def build_generator(
    recipe: generation.GenerationRecipe, seeds: Sequence[Task], pools: Pools | None = None
) -> TaskGenerator:
    """The generator that a recipe asks for; `pools` are Lion's."""
    answer = recipe.generator
    options: dict[str, Any] = answer.model_dump(exclude=NOT_THE_GENERATORS)
    if "sampling" in options:
        options["sampling"] = Sampling(**options["sampling"])
    if how := options.get("answer"):
        options["answer"] = Answering(**how | {"sampling": Sampling(**how["sampling"])})
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
    known = list(seeds)
    balance: list[Filter] = []
    if isinstance(recipe.generator, generation.LionRecipe):
        known += read_tasks(recipe.generator.pool)
        assert recipe.target is not None  # such a recipe is refused without one
        balance = [filters.Balanced(-(-recipe.target // 2))]
    return [_FILTERS[type(answer)](answer, known) for answer in recipe.filters] + balance


def read_tasks(sources: Iterable[SourceRecipe]) -> list[Task]:
    """The rows of sources as tasks: the user's turn, and the answer there is."""
    sources = list(sources)
    if weighted := [source for source in sources if source.weight != 1]:
        raise RecipeError(
            f"'{weighted[0].source}' has weight {weighted[0].weight}: weights are for training; "
            "here each row is read once"
        )
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
    classifies = str(row.get("is_classification", False)).strip().lower() in ("true", "yes", "1")
    if form_of(row, place, form) == "alpaca":
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


def _rouge(answer: asked.RougeRecipe, seeds: Sequence[Task]) -> Filter:
    return filters.Rouge(answer.at_most, (task.instruction for task in seeds))


def _contamination(answer: asked.ContaminationRecipe, seeds: Sequence[Task]) -> Filter:
    texts = (text for task in read_tasks(answer.sources) for text in (task.prompt, task.output))
    return filters.Contamination(texts, answer.ngram)


_GIVEN: dict[type, Callable[..., TaskGenerator]] = {
    generation.AnswerRecipe: generators.Answer,
    generation.RewriteRecipe: generators.Rewrite,
}
_FILTERS: dict[type, Callable[[Any, Sequence[Task]], Filter]] = {
    asked.LengthRecipe: _plain(filters.Length),
    asked.TruncatedRecipe: _plain(filters.Truncated),
    asked.BlacklistRecipe: _plain(filters.Blacklist),
    asked.OddStartRecipe: _plain(filters.OddStart),
    asked.RepeatedLinesRecipe: _plain(filters.RepeatedLines),
    asked.EmptyOrEchoRecipe: _plain(filters.EmptyOrEcho),
    asked.OpenEndRecipe: _plain(filters.OpenEnd),
    asked.RougeRecipe: _rouge,
    asked.NearDuplicatesRecipe: _plain(filters.NearDuplicates),
    asked.ContaminationRecipe: _contamination,
    asked.LanguageRecipe: _plain(filters.Language),
    asked.SameResultRecipe: _plain(filters.SameResult),
    asked.PerplexityRecipe: _plain(filters.Perplexity),
}
