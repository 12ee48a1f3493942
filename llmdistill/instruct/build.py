"""Build the generator, the filters and the responder that the sections of a recipe describe."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from accelerate import PartialState

from llmdistill import recipe as recipes
from llmdistill.instruct import filters, model_filters
from llmdistill.instruct.filters import Filter
from llmdistill.instruct.generators import given, lists, variants
from llmdistill.instruct.generators.base import Answering, SystemPrompt, TaskGenerator
from llmdistill.instruct.judging import Judge, Judged
from llmdistill.instruct.lion import Pools
from llmdistill.instruct.own import own_filter, own_generator
from llmdistill.instruct.responders import (
    LocalResponder,
    MultimodalResponder,
    RemoteResponder,
    Responder,
    Several,
)
from llmdistill.instruct.task_sources import read_tasks
from llmdistill.instruct.tasks import Task
from llmdistill.models.load import load_tokenizer
from llmdistill.recipe import filters as filter_sections
from llmdistill.recipe import generators as generator_sections
from llmdistill.recipe.answering import AnsweringRecipe
from llmdistill.recipe.generators import GeneratorSection
from llmdistill.recipe.remote import RemoteTeacherRecipe
from llmdistill.recipe.sampling import WritingRecipe
from llmdistill.recipe.sources import SourceRecipe
from llmdistill.recipe.teachers import LocalTeacherRecipe, MultimodalTeacherRecipe
from llmdistill.sampling import PenalisedSampling, Sampling
from llmdistill.teachers.build import Parts, image_folder, load_multimodal, load_teacher
from llmdistill.teachers.multimodal import images_in
from llmdistill.teachers.remote import RemoteTeacher

logger = logging.getLogger("llmdistill")

Split = Callable[[generator_sections.LionRecipe], Pools]


@dataclass(frozen=True)
class Inputs:
    """Inputs of a generator in addition to the options of its section.

    `split` sorts the tasks of Lion's pool into hard and easy ones.  `images` is the column with the
    images of a prompt, if the teacher sees them, and `image_folder` is where relative paths start.
    `on_bad_row` is what happens to malformed prompts.  `judge` chooses among several answers.
    """

    seed: int
    seed_tasks: Sequence[Task]
    split: Split
    images: str | None = None
    image_folder: Path | None = None
    on_bad_row: str = "stop"
    is_remote: bool = False
    judge: Judge | None = None


def build_generator(
    recipe: recipes.GenerationRecipe, seed_tasks: Sequence[Task], split: Split
) -> TaskGenerator:
    """Return the generator of a recipe.

    Only Lion calls `split`, which sorts the tasks of its pool into hard and easy ones.  Raises
    DataError if there are too few tasks.
    """
    section = recipe.generator
    teacher = recipe.teacher
    inputs = Inputs(
        recipe.seed, seed_tasks, split, on_bad_row=recipe.on_bad_row, is_remote=teacher.is_remote
    )
    if isinstance(teacher, MultimodalTeacherRecipe):
        inputs = replace(inputs, images=teacher.images, image_folder=image_folder(teacher))
    judge = None
    if recipe.judge is not None:
        other = recipe.judge.teacher
        name = f"{other.kind} {other.model} {other.revision or ''}" if other else ""
        judge = Judge(tuple(recipe.judge.aspects), recipe.judge.max_new_tokens, name)
    made: TaskGenerator = _builder(_GENERATORS, section)(section, replace(inputs, judge=judge))
    return made if judge is None else Judged(made, judge)


def build_filters(recipe: recipes.GenerationRecipe, seed_tasks: Sequence[Task]) -> list[Filter]:
    """Return the filters of a recipe in the order in which they run.

    Generators with balanced variants (Lion) get a `Balanced` filter at the end.
    """
    # New rows must differ from everything that the teacher was shown, so Lion's pool counts too.
    compared = read_tasks(recipe.generator.compared_sources, on_bad_row=recipe.on_bad_row)
    known = [*seed_tasks, *compared]
    built = [_builder(_FILTERS, section)(section, known) for section in recipe.filters]
    for one, section in zip(built, recipe.filters, strict=True):
        one.kind = section.kind
    if variants := recipe.generator.num_balanced_variants:
        assert recipe.target is not None  # such a recipe is refused without one
        # Rounded up, so that the variants together reach a target that does not divide evenly.
        built.append(filters.Balanced(-(-recipe.target // variants)))
    return built


def build_responder(
    recipe: recipes.GenerationRecipe,
) -> LocalResponder | RemoteResponder:
    """Return the responder for the teacher of a recipe."""
    common: dict[str, Any] = {
        "scored": recipe.needs_log_probs,
        "chat_template_kwargs": recipe.chat_template_kwargs,
    }
    return _builder(_RESPONDERS, recipe.teacher)(recipe, recipe.teacher, common)


def with_judge(
    recipe: recipes.GenerationRecipe, teacher: LocalResponder | RemoteResponder
) -> Responder:
    """Return a responder that also asks the judge of a recipe, if that is another model."""
    section = recipe.judge.teacher if recipe.judge else None
    if section is None:
        return teacher
    logger.info("loading the judge %s", section.model)
    common: dict[str, Any] = {"scored": False, "chat_template_kwargs": {}}
    return Several(teacher, _builder(_RESPONDERS, section)(recipe, section, common))


def _builder(table: Mapping[type, Callable[..., Any]], section: Any) -> Callable[..., Any]:
    # By exact type: a new section that nobody registered must fail here, and not be built as the
    # section that it derives from.
    if type(section) not in table:
        raise TypeError(
            f"{type(section).__name__} has no builder. Add one to the tables of {__name__}."
        )
    return table[type(section)]


def _options(section: GeneratorSection, *inputs: str) -> dict[str, Any]:
    """Return the fields of a section as keyword arguments, except `kind` and `inputs`."""
    names = [name for name in type(section).model_fields if name not in ("kind", *inputs)]
    options = {name: getattr(section, name) for name in names}
    if "sampling" in options:
        options["sampling"] = _sampling(options["sampling"])
    if options.get("answering") is not None:
        options["answering"] = _answering(options["answering"])
    return options


def _sampling(section: WritingRecipe) -> Sampling:
    if section.is_penalised:
        return PenalisedSampling(**section.model_dump())
    return Sampling(**section.model_dump(exclude={"presence_penalty", "frequency_penalty"}))


def _answering(section: AnsweringRecipe) -> Answering:
    schema = section.json_schema
    return Answering(
        _sampling(section.sampling),
        section.max_new_tokens,
        section.hint,
        tuple(SystemPrompt(one.text, one.weight) for one in section.system),
        json.dumps(schema, sort_keys=True) if schema is not None else "",
    )


def _alpaca(section: generator_sections.AlpacaRecipe, inputs: Inputs) -> TaskGenerator:
    return lists.Alpaca(inputs.seed_tasks, seed=inputs.seed, **_options(section))


def _self_instruct(section: generator_sections.SelfInstructRecipe, inputs: Inputs) -> TaskGenerator:
    # The seeds' own labels are the examples for the question whether a task is a classification.
    classifies = [task.classifies for task in inputs.seed_tasks]
    labelled: Sequence[Task] = ()
    if all(label is None for label in classifies):
        logger.info(
            "the seed tasks have no field 'is_classification', so the included seed tasks show the "
            "teacher which tasks are classifications"
        )
        labelled = read_tasks([SourceRecipe(source="seed_tasks")])
    options: dict[str, Any] = {"labelled": labelled, "seed": inputs.seed, **_options(section)}
    return lists.SelfInstruct(inputs.seed_tasks, classifies, **options)


def _magpie(section: generator_sections.MagpieRecipe, inputs: Inputs) -> TaskGenerator:
    return variants.Magpie(seed=inputs.seed, **_options(section))


def _answer(section: generator_sections.AnswerRecipe, inputs: Inputs) -> TaskGenerator:
    tasks = read_tasks(
        section.prompts,
        images=inputs.images,
        on_bad_row=inputs.on_bad_row,
        takes_context=True,
        is_sent=inputs.is_remote,
    )
    for number, task in enumerate(tasks):  # before the teacher is loaded
        images_in(inputs.image_folder, task.images, f"prompt {number}")
    tasks = [_with_relative_images(task, inputs.image_folder) for task in tasks]
    options = {"seed": inputs.seed, "judge": inputs.judge, **_options(section, "prompts")}
    return given.Answer(tasks, **options)


def _with_relative_images(task: Task, folder: Path | None) -> Task:
    """Return a task whose images are relative to their folder, so that rows name no other one."""
    if folder is None or not task.images:
        return task
    whole = [Path(file) for file in task.images]
    inside = [file.is_relative_to(folder.absolute()) for file in whole]
    files = [
        str(file.relative_to(folder.absolute())) if is_inside else str(file)
        for file, is_inside in zip(whole, inside, strict=True)
    ]
    return replace(task, images=tuple(files))


def _rewrite(section: generator_sections.RewriteRecipe, inputs: Inputs) -> TaskGenerator:
    tasks = read_tasks(section.prompts, on_bad_row=inputs.on_bad_row, is_sent=inputs.is_remote)
    return given.Rewrite(tasks, **_options(section, "prompts"))


def _evolve(section: generator_sections.EvolveRecipe, inputs: Inputs) -> TaskGenerator:
    return variants.Evolve(inputs.seed_tasks, seed=inputs.seed, **_options(section))


def _lion(section: generator_sections.LionRecipe, inputs: Inputs) -> TaskGenerator:
    pools = inputs.split(section)
    # `inputs.split` has read these fields; the generator only gets the two pools.
    used = ("student", "pool", "compare_by", "hard_share", "max_compared_tokens")
    return variants.Lion(pools.hard, pools.easy, seed=inputs.seed, **_options(section, *used))


def _python(section: generator_sections.PythonGeneratorRecipe, inputs: Inputs) -> TaskGenerator:
    return own_generator(section.function, section.options, section.calls)


def _local(
    recipe: recipes.GenerationRecipe,
    section: LocalTeacherRecipe,
    common: Mapping[str, Any],
) -> LocalResponder:
    teacher = load_teacher(section)
    return LocalResponder(teacher, seed=recipe.seed, batch_size=recipe.batch_size, **common)


def _multimodal(
    recipe: recipes.GenerationRecipe,
    section: MultimodalTeacherRecipe,
    common: Mapping[str, Any],
) -> MultimodalResponder:
    teacher = load_multimodal(section, Parts(template_options=common["chat_template_kwargs"]))
    options = {"seed": recipe.seed, "batch_size": recipe.batch_size, **common}
    return MultimodalResponder(teacher, folder=image_folder(section), **options)


def _remote(
    recipe: recipes.GenerationRecipe,
    section: RemoteTeacherRecipe,
    common: Mapping[str, Any],
) -> RemoteResponder:
    # `revision` and `license` are only stated in rows and on the card, never sent to the server.
    options = section.model_dump(exclude={"kind", "revision", "tokenizer", "license"})
    # Each rank paces its own requests, so the limits are divided among the ranks.
    rank, ranks = PartialState().process_index, PartialState().num_processes
    whole, rest = divmod(section.concurrency, ranks)
    options["concurrency"] = max(whole + (rank < rest), 1)
    if section.per_minute is not None:
        options["per_minute"] = section.per_minute / ranks
    known = load_tokenizer(section.tokenizer) if section.tokenizer else None
    teacher = RemoteTeacher(tokenizer=known, **common, **options)
    return RemoteResponder(teacher, seed=recipe.seed)


def _plain(filter_class: Callable[..., Filter]) -> Callable[[Any, Sequence[Task]], Filter]:
    """Return a builder for a filter whose options are the fields of its section."""
    return lambda section, known: filter_class(**section.model_dump(exclude={"kind"}))


def _rouge(section: filter_sections.RougeRecipe, known: Sequence[Task]) -> Filter:
    texts = (task.instruction for task in known)
    return filters.Rouge(section.at_most, texts, most_similar=section.most_similar)


def _own(section: filter_sections.PythonFilterRecipe, known: Sequence[Task]) -> Filter:
    return own_filter(section.function, section.options)


def _contamination(section: filter_sections.ContaminationRecipe, known: Sequence[Task]) -> Filter:
    # Question and answer count as two texts: a copied question is found with any answer.
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
    generator_sections.PythonGeneratorRecipe: _python,
}
_RESPONDERS: dict[type, Callable[..., LocalResponder | RemoteResponder]] = {
    LocalTeacherRecipe: _local,
    MultimodalTeacherRecipe: _multimodal,
    RemoteTeacherRecipe: _remote,
}
_FILTERS: dict[type, Callable[[Any, Sequence[Task]], Filter]] = {
    filter_sections.LengthRecipe: _plain(filters.Length),
    filter_sections.TruncatedRecipe: _plain(filters.Truncated),
    filter_sections.DuplicatesRecipe: _plain(filters.Duplicates),
    filter_sections.BlacklistRecipe: _plain(filters.Blacklist),
    filter_sections.OddStartRecipe: _plain(filters.OddStart),
    filter_sections.RepeatedLinesRecipe: _plain(filters.RepeatedLines),
    filter_sections.EmptyOrEchoRecipe: _plain(filters.EmptyOrEcho),
    filter_sections.OpenEndRecipe: _plain(filters.OpenEnd),
    filter_sections.RougeRecipe: _rouge,
    filter_sections.NearDuplicatesRecipe: _plain(filters.NearDuplicates),
    filter_sections.EmbeddingsRecipe: _plain(model_filters.Embeddings),
    filter_sections.ScoreRecipe: _plain(model_filters.Score),
    filter_sections.PythonFilterRecipe: _own,
    filter_sections.ContaminationRecipe: _contamination,
    filter_sections.LanguageRecipe: _plain(filters.Language),
    filter_sections.SameResultRecipe: _plain(filters.SameResult),
    filter_sections.PerplexityRecipe: _plain(filters.Perplexity),
}
