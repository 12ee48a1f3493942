"""`distill(recipe)`: load, measure, train, measure, publish.

A run folder holds

    recipe.yaml       the resolved recipe
    metrics.jsonl     what was logged, one line a time
    checkpoints/      to resume from
    student/          the student, its tokenizer and its model card
    evaluation.json   the figures of the student before and after, and of the teacher
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState

from llmdistill import recipe as recipes
from llmdistill.data.collate import EncodedRows, PromptDataset, PromptStream, collate
from llmdistill.data.render import same_template
from llmdistill.data.sources import read
from llmdistill.data.validate import Row, Rules
from llmdistill.errors import CheckpointError, RecipeError, VocabularyError
from llmdistill.evaluation.measure import Evaluation, Figures
from llmdistill.models import carve
from llmdistill.models.adapters import add_adapter
from llmdistill.models.load import default_device, load_model, load_tokenizer, native_bfloat16
from llmdistill.objectives import build_objective
from llmdistill.publish.card import model_card
from llmdistill.recipe import Recipe
from llmdistill.rollouts import build_rollout
from llmdistill.teachers import build_teacher
from llmdistill.teachers.local import LocalTeacher
from llmdistill.training.progress import MetricsFile, ProgressBar
from llmdistill.training.trainer import DistillTrainer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

logger = logging.getLogger("llmdistill")

CARVE_ROWS = 48  # rows of training text on which the layers' influence is measured


@dataclass(frozen=True)
class Answers:
    """One evaluation prompt with what teacher, student before and student after answer."""

    prompt: str
    teacher: str
    before: str
    after: str


@dataclass(frozen=True)
class Result:
    """What a run left behind.
    `evaluation` is empty without evaluation rows, and on other ranks.
    """

    folder: Path
    evaluation: Mapping[str, Figures] = field(default_factory=dict)
    answers: list[Answers] = field(default_factory=list)

    @property
    def student(self) -> Path:
        return self.folder / "student"


def distill(recipe: Recipe, *, resume: bool = False, overwrite: bool = False) -> Result:
    """Runs a recipe to its end.

    A folder that is there already is only used with `resume` (go on from its newest checkpoint) or
    `overwrite` (delete it first); else CheckpointError.
    """
    folder = Path(recipe.output)
    with PartialState().main_process_first():
        if PartialState().is_main_process:
            _prepare_folder(folder, resume=resume, overwrite=overwrite)
            (folder / "recipe.yaml").write_text(recipes.dump(recipe), encoding="utf-8")
    arguments = _training_arguments(recipe, folder)
    teacher = build_teacher(recipe.teacher)
    tokenizer = _student_tokenizer(recipe, teacher)
    train, held = load_data(recipe, tokenizer)
    student = build_student(recipe, teacher, train)
    evaluation = _evaluation(recipe, teacher, held)

    before: tuple[Figures, list[str]] | None = None
    if evaluation is not None:
        logger.info("measuring the student before training")
        before = evaluation.measure(student)
    student = _trainable(recipe, student)
    trainer = DistillTrainer(
        student=student,
        teacher=teacher,
        rollout=build_rollout(recipe.rollout),
        objectives=[build_objective(answer) for answer in recipe.objectives],
        args=arguments,
        train_dataset=train,
        eval_dataset=_teacher_text(evaluation, held) if evaluation is not None else None,
        processing_class=tokenizer,
        callbacks=[MetricsFile(folder / "metrics.jsonl"), ProgressBar()],
        merge_adapter=recipe.student.peft is None or recipe.student.peft.save == "merged",
    )
    _own_progress_only(trainer)
    if isinstance(train, PromptDataset):
        logger.info("training on %d rows (of the data: %s)", len(train), train.counts)
    trainer.train(resume_from_checkpoint=_newest_checkpoint(folder) if resume else None)
    trainer.export_student(folder / "student")
    result = Result(folder)
    if PartialState().is_main_process:
        if evaluation is not None and before is not None:
            result = _measured(folder, evaluation, before, evaluation.measure(student))
        trainer.model_card = model_card(recipe, result.evaluation)
        (result.student / "README.md").write_text(trainer.model_card, encoding="utf-8")
    PartialState().wait_for_everyone()
    if arguments.push_to_hub:
        trainer.push_to_hub()
    return result


def _measured(
    folder: Path,
    evaluation: Evaluation,
    before: tuple[Figures, list[str]],
    after: tuple[Figures, list[str]],
) -> Result:
    """Writes evaluation.json; the result holds its figures and the answers side by side."""
    figures = {"before": before[0], "after": after[0], "teacher": evaluation.measure_teacher()}
    text = json.dumps({name: asdict(value) for name, value in figures.items()}, indent=2)
    (folder / "evaluation.json").write_text(text + "\n", encoding="utf-8")
    tokenizer = evaluation.teacher.tokenizer
    prompts = [tokenizer.decode(ids) for ids in evaluation.prompts.ids()]
    columns = zip(prompts, evaluation.reference.texts, before[1], after[1], strict=True)
    return Result(folder, figures, [Answers(*row) for row in columns])


def load_data(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase
) -> tuple[EncodedRows, PromptDataset | None]:
    """Rows to train on and rows to measure on (None where the recipe asks for none)."""
    data = recipe.data
    rules = _rules(data, needs_response=_trains_on_data(recipe.rollout))
    if data.streaming:
        train: EncodedRows = _stream(data, tokenizer, rules)
    else:
        train = _load(data.train, tokenizer, rules, recipe.seed)
        if data.hold_back >= len(train):
            raise RecipeError(
                f"data.hold_back: {data.hold_back} of {len(train)} rows leaves none to train on"
            )
        if data.hold_back:
            return train.hold_back(data.hold_back)
    if not data.eval:
        return train, None
    return train, _load(data.eval, tokenizer, _rules(data, needs_response=False), recipe.seed)


def _load(
    sources: Sequence[recipes.SourceRecipe],
    tokenizer: PreTrainedTokenizerBase,
    rules: Rules,
    seed: int,
) -> PromptDataset:
    parts = []
    for source in sources:
        rows = read(source.source, columns=source.columns)
        part = PromptDataset.encode(rows, tokenizer, replace(rules, form=source.format))
        parts.append((part, source.weight))
    return PromptDataset.join(parts, seed=seed)


def _stream(
    data: recipes.DataRecipe, tokenizer: PreTrainedTokenizerBase, rules: Rules
) -> PromptStream:
    if len({source.format for source in data.train}) > 1:
        raise RecipeError("data.train: the sources of one stream are read in one format")

    def rows() -> Iterator[tuple[str, Any]]:
        for source in data.train:
            yield from read(source.source, columns=source.columns, streaming=True)

    return PromptStream(rows, tokenizer, replace(rules, form=data.train[0].format))


def _rules(data: recipes.DataRecipe, *, needs_response: bool) -> Rules:
    return Rules(
        every_turn=data.turns == "all",
        template_options=data.chat_template_kwargs,
        needs_response=needs_response,
        max_prompt_tokens=data.max_prompt_tokens,
        max_response_tokens=data.max_response_tokens,
        long_prompts=data.long_prompts,
        long_responses=data.long_responses,
        skip_bad=data.on_bad_row == "skip",
    )


def build_student(recipe: Recipe, teacher: LocalTeacher, train: EncodedRows) -> PreTrainedModel:
    """The student's model, carved where the recipe says so.

    Where it is cut out of the very teacher, the teacher's weights are copied instead of loaded
    again.
    """
    answer = recipe.student
    same = (answer.model, answer.revision) == (recipe.teacher.model, recipe.teacher.revision)
    wanted = getattr(torch, answer.dtype) if answer.dtype != "auto" else None
    if same and answer.carve is not None and teacher.model.dtype == wanted:
        base = teacher.model
    else:
        device = "cpu" if recipe.training.get("use_cpu") else None
        base = load_model(answer.model, revision=answer.revision, dtype=answer.dtype, device=device)
    if answer.carve is None:
        return base
    layers = _layers(answer.carve, base, train)
    logger.info("carving the student: layers %s", layers)
    return carve.keep_layers(base, layers)


def _layers(answer: recipes.CarveRecipe, base: PreTrainedModel, train: EncodedRows) -> list[int]:
    if isinstance(answer.layers, list):
        return answer.layers
    carve.check_num_layers(base, answer.layers)
    if answer.by == "even":
        return carve.evenly_spaced(carve.num_layers(base), answer.layers)
    texts = [[*row.prompt_ids, *(row.response_ids or [])] for row in train.head(CARVE_ROWS)]
    sample = collate([Row(i, ids, None) for i, ids in enumerate(texts)])
    influence = carve.influence(
        base, sample.input_ids_BP.to(base.device), sample.attention_mask_BP.to(base.device)
    )
    return carve.most_influential(influence, answer.layers)


def _trainable(recipe: Recipe, student: PreTrainedModel) -> PreTrainedModel:
    """The student with what is trained of it: all of it, or an adapter."""
    answer = recipe.student.peft
    if answer is None:
        return student.requires_grad_(True)
    return add_adapter(
        student,
        rank=answer.r,
        alpha=answer.alpha,
        targets=answer.targets,
        dropout=answer.dropout,
        seed=recipe.seed,
    )


def _student_tokenizer(recipe: Recipe, teacher: LocalTeacher) -> PreTrainedTokenizerBase:
    """The student's tokenizer; it must render a conversation as the teacher's does."""
    student, base = recipe.student, recipe.teacher
    if (student.model, student.revision) == (base.model, base.revision):
        return teacher.tokenizer
    tokenizer = load_tokenizer(student.model, revision=student.revision)
    if not same_template(teacher.tokenizer, tokenizer):
        raise VocabularyError(
            f"the chat templates of teacher '{base.model}' and student '{student.model}' render a "
            "conversation in different tokens; the teacher would judge text that it does not "
            "expect. Give the student the teacher's template, or choose another pair."
        )
    return tokenizer


def _trains_on_data(rollout: recipes.RolloutRecipe) -> bool:
    other = rollout.other if isinstance(rollout, recipes.MixedRecipe) else rollout
    return isinstance(other, recipes.FixedRecipe)


def _evaluation(
    recipe: Recipe, teacher: LocalTeacher, held: PromptDataset | None
) -> Evaluation | None:
    """On the first rank; on the others only where the held-out loss is followed during training."""
    if held is None or not (PartialState().is_main_process or recipe.evaluate.every_steps):
        return None
    logger.info("the teacher answers the evaluation prompts")
    return Evaluation(
        teacher,
        collate(held.rows),
        max_new_tokens=recipe.evaluate.max_new_tokens,
        seed=recipe.seed,
    )


def _teacher_text(evaluation: Evaluation, held: PromptDataset | None) -> PromptDataset:
    """The evaluation prompts with the teacher's greedy answers: what the held-out loss is taken
    on.
    """
    assert held is not None
    answers = [ids for batch in evaluation.reference.batches for ids in batch.responses()]
    return PromptDataset(
        [Row(row.row_id, row.prompt_ids, ids) for row, ids in zip(held.rows, answers, strict=True)]
    )


def _training_arguments(recipe: Recipe, folder: Path) -> TrainingArguments:
    """TrainingArguments with a run's own folder and seed; bfloat16 where the device has it, if not
    said.
    """
    from transformers import TrainingArguments

    given: dict[str, Any] = {"report_to": "none", "logging_steps": 1, **recipe.training}
    device = torch.device("cpu") if given.get("use_cpu") else default_device()
    if "bf16" not in given and "fp16" not in given:
        given["bf16"] = native_bfloat16(device)
    given.setdefault("use_cpu", device.type == "cpu")
    if recipe.data.streaming:
        given.setdefault("dataloader_drop_last", True)  # its last batch would be filled up
    if recipe.evaluate.every_steps:
        given |= {"eval_strategy": "steps", "eval_steps": recipe.evaluate.every_steps}
    given |= {"output_dir": str(folder / "checkpoints"), "seed": recipe.seed, "disable_tqdm": True}
    try:
        return TrainingArguments(**given)
    except (TypeError, ValueError) as error:
        raise RecipeError(f"training: {error}") from error


def _own_progress_only(trainer: DistillTrainer) -> None:
    from transformers.trainer_callback import PrinterCallback

    trainer.remove_callback(PrinterCallback)


def _prepare_folder(folder: Path, *, resume: bool, overwrite: bool) -> None:
    """Makes the run folder, or raises CheckpointError: no run is overwritten without being asked
    to.
    """
    used = folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
    if resume:
        if not (folder / "recipe.yaml").is_file():
            raise CheckpointError(f"--resume: {folder} holds no run")
    elif used and not overwrite:
        raise CheckpointError(
            f"{folder} is not empty. Go on with it (--resume), replace it (--overwrite), or choose "
            "another folder (output=...)."
        )
    elif used:
        if not (folder / "recipe.yaml").is_file():
            raise CheckpointError(f"--overwrite: {folder} holds no run, and is left alone")
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)


def _newest_checkpoint(folder: Path) -> str:
    from transformers.trainer_utils import get_last_checkpoint

    checkpoints = folder / "checkpoints"
    newest = get_last_checkpoint(str(checkpoints)) if checkpoints.is_dir() else None
    if newest is None:
        raise CheckpointError(
            f"--resume: no checkpoint in {checkpoints}; start anew with --overwrite"
        )
    return newest
