"""Who makes tasks, who replies, and what is kept: builds what the sections of a recipe ask for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState

from llmdistill import recipe as recipes
from llmdistill.instruct import filters
from llmdistill.instruct.filters import Filter
from llmdistill.instruct.generators import given, lists, variants
from llmdistill.instruct.generators.base import Answering, TaskGenerator
from llmdistill.instruct.lion import Pools
from llmdistill.instruct.responders import LocalResponder, RemoteResponder
from llmdistill.instruct.task_sources import read_tasks
from llmdistill.instruct.tasks import Task
from llmdistill.models.load import load_tokenizer
from llmdistill.recipe import filters as filter_sections
from llmdistill.recipe import generators as generator_sections
from llmdistill.recipe.generators import AnsweringRecipe, GeneratorSection
from llmdistill.recipe.remote import RemoteTeacherRecipe
from llmdistill.recipe.sampling import SamplingRecipe
from llmdistill.recipe.teachers import LocalTeacherRecipe
from llmdistill.sampling import Sampling
from llmdistill.teachers.build import load_teacher
from llmdistill.teachers.remote import RemoteTeacher

Split = Callable[[generator_sections.LionRecipe], Pools]


@dataclass(frozen=True)
class Inputs:
    """What generators are made of apart from their own options; `split` gives Lion's pools."""

    seed: int
    seed_tasks: Sequence[Task]
    split: Split


def build_generator(
    recipe: recipes.GenerationRecipe, seed_tasks: Sequence[Task], split: Split
) -> TaskGenerator:
    """The generator that a recipe asks for; `split` tells the tasks of a pool apart."""
    section = recipe.generator
    return _builder(_GENERATORS, section)(section, Inputs(recipe.seed, seed_tasks, split))


def build_filters(recipe: recipes.GenerationRecipe, seed_tasks: Sequence[Task]) -> list[Filter]:
    """The filters that a recipe asks for, in its order."""
    known = [*seed_tasks, *read_tasks(recipe.generator.compared_sources)]
    built = [_builder(_FILTERS, section)(section, known) for section in recipe.filters]
    if variants := recipe.generator.num_balanced_variants:
        assert recipe.target is not None  # such a recipe is refused without one
        built.append(filters.Balanced(-(-recipe.target // variants)))
    return built


def build_responder(
    recipe: recipes.GenerationRecipe, folder: Path
) -> LocalResponder | RemoteResponder:
    """Who replies; what a server said is recorded in `folder` as it comes."""
    common: dict[str, Any] = {
        "scored": recipe.needs_log_probs,
        "chat_template_kwargs": recipe.chat_template_kwargs,
    }
    return _builder(_RESPONDERS, recipe.teacher)(recipe, recipe.teacher, folder, common)


def _builder(table: Mapping[type, Callable[..., Any]], section: Any) -> Callable[..., Any]:
    if type(section) not in table:
        raise NotImplementedError(
            f"{type(section).__name__} has no builder. Add one to the tables of {__name__}."
        )
    return table[type(section)]


def _options(section: GeneratorSection, *inputs: str) -> dict[str, Any]:
    """The fields of a section as keyword arguments, without those that the builder itself uses."""
    names = [name for name in type(section).model_fields if name not in ("kind", *inputs)]
    options = {name: getattr(section, name) for name in names}
    if "sampling" in options:
        options["sampling"] = _sampling(options["sampling"])
    if options.get("answering") is not None:
        options["answering"] = _answering(options["answering"])
    return options


def _sampling(section: SamplingRecipe) -> Sampling:
    return Sampling(**section.model_dump())


def _answering(section: AnsweringRecipe) -> Answering:
    return Answering(**section.model_dump() | {"sampling": _sampling(section.sampling)})


def _alpaca(section: generator_sections.AlpacaRecipe, inputs: Inputs) -> TaskGenerator:
    return lists.Alpaca(inputs.seed_tasks, seed=inputs.seed, **_options(section))


def _self_instruct(section: generator_sections.SelfInstructRecipe, inputs: Inputs) -> TaskGenerator:
    classifies = [task.classifies for task in inputs.seed_tasks]
    options = _options(section)
    return lists.SelfInstruct(inputs.seed_tasks, classifies, seed=inputs.seed, **options)


def _magpie(section: generator_sections.MagpieRecipe, inputs: Inputs) -> TaskGenerator:
    return variants.Magpie(**_options(section))


def _answer(section: generator_sections.AnswerRecipe, inputs: Inputs) -> TaskGenerator:
    return given.Answer(read_tasks(section.prompts), **_options(section, "prompts"))


def _rewrite(section: generator_sections.RewriteRecipe, inputs: Inputs) -> TaskGenerator:
    return given.Rewrite(read_tasks(section.prompts), **_options(section, "prompts"))


def _evolve(section: generator_sections.EvolveRecipe, inputs: Inputs) -> TaskGenerator:
    return variants.Evolve(inputs.seed_tasks, seed=inputs.seed, **_options(section))


def _lion(section: generator_sections.LionRecipe, inputs: Inputs) -> TaskGenerator:
    pools = inputs.split(section)
    used = ("student", "pool", "compare_by", "hard_share", "max_compared_tokens")
    return variants.Lion(pools.hard, pools.easy, seed=inputs.seed, **_options(section, *used))


def _local(
    recipe: recipes.GenerationRecipe,
    section: LocalTeacherRecipe,
    folder: Path,
    common: Mapping[str, Any],
) -> LocalResponder:
    teacher = load_teacher(section)
    return LocalResponder(teacher, seed=recipe.seed, batch_size=recipe.batch_size, **common)


def _remote(
    recipe: recipes.GenerationRecipe,
    section: RemoteTeacherRecipe,
    folder: Path,
    common: Mapping[str, Any],
) -> RemoteResponder:
    options = section.model_dump(exclude={"kind", "revision", "tokenizer", "license"})
    if section.per_minute is not None:
        options["per_minute"] = section.per_minute / PartialState().num_processes
    known = load_tokenizer(section.tokenizer) if section.tokenizer else None
    teacher = RemoteTeacher(tokenizer=known, **common, **options)
    return RemoteResponder(teacher, seed=recipe.seed, record=folder)


def _plain(filter_class: Callable[..., Filter]) -> Callable[[Any, Sequence[Task]], Filter]:
    """Builds a filter whose options are all fields of its section."""
    return lambda section, known: filter_class(**section.model_dump(exclude={"kind"}))


def _rouge(section: filter_sections.RougeRecipe, known: Sequence[Task]) -> Filter:
    return filters.Rouge(section.at_most, (task.instruction for task in known))


def _contamination(section: filter_sections.ContaminationRecipe, known: Sequence[Task]) -> Filter:
    texts = (text for task in read_tasks(section.sources) for text in (task.prompt, task.output))
    return filters.Contamination(texts, section.ngram)


_GENERATORS: dict[type, Callable[[Any, Inputs], TaskGenerator]] = {
    generator_sections.AlpacaRecipe: _alpaca,
    generator_sections.SelfInstructRecipe: _self_instruct,
    generator_sections.MagpieRecipe: _magpie,
    generator_sections.AnswerRecipe: _answer,
    generator_sections.RewriteRecipe: _rewrite,
    generator_sections.EvolveRecipe: _evolve,
    generator_sections.LionRecipe: _lion,
}
_RESPONDERS: dict[type, Callable[..., LocalResponder | RemoteResponder]] = {
    LocalTeacherRecipe: _local,
    RemoteTeacherRecipe: _remote,
}
_FILTERS: dict[type, Callable[[Any, Sequence[Task]], Filter]] = {
    filter_sections.LengthRecipe: _plain(filters.Length),
    filter_sections.TruncatedRecipe: _plain(filters.Truncated),
    filter_sections.BlacklistRecipe: _plain(filters.Blacklist),
    filter_sections.OddStartRecipe: _plain(filters.OddStart),
    filter_sections.RepeatedLinesRecipe: _plain(filters.RepeatedLines),
    filter_sections.EmptyOrEchoRecipe: _plain(filters.EmptyOrEcho),
    filter_sections.OpenEndRecipe: _plain(filters.OpenEnd),
    filter_sections.RougeRecipe: _rouge,
    filter_sections.NearDuplicatesRecipe: _plain(filters.NearDuplicates),
    filter_sections.ContaminationRecipe: _contamination,
    filter_sections.LanguageRecipe: _plain(filters.Language),
    filter_sections.SameResultRecipe: _plain(filters.SameResult),
    filter_sections.PerplexityRecipe: _plain(filters.Perplexity),
}
