"""`distill(recipe)`: load, measure, train, measure, publish.

B = sequences, P = prompt tokens.

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
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState
from transformers import EarlyStoppingCallback, TrainerCallback
from transformers.trainer_callback import PrinterCallback

from llmdistill import recipe as recipes
from llmdistill import run_folder
from llmdistill.data.build import build_rows
from llmdistill.data.collate import EncodedRows, PromptDataset, collate, sample_text
from llmdistill.data.render import same_template
from llmdistill.errors import CheckpointError, RecipeError, VocabularyError
from llmdistill.evaluation.measure import Evaluation, Figures, Measurement
from llmdistill.generate import RANKS_WAIT, generate
from llmdistill.models.build import build_student
from llmdistill.models.load import default_device, load_tokenizer, native_bfloat16
from llmdistill.objectives.build import build_objective
from llmdistill.protocols import Teacher
from llmdistill.publish.card import model_card
from llmdistill.recipe import Recipe
from llmdistill.rollouts.build import build_rollout
from llmdistill.teachers.build import build_teacher
from llmdistill.teachers.local import LocalTeacher
from llmdistill.training.progress import MetricsFile, ProgressBar
from llmdistill.training.trainer import DistillTrainer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

logger = logging.getLogger("llmdistill")

RESULTS = ("student", "checkpoints/checkpoint-*")  # what makes a run worth keeping
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

    A folder that is there already is only used with `resume` (continue from its newest checkpoint)
    or `overwrite` (replace it); else CheckpointError.  What the recipe names is loaded before the
    folder is touched, and an old run is deleted when the new one has a checkpoint or a student.
    """
    folder = Path(recipe.output)
    arguments = training_arguments(recipe, folder, resume=resume)
    with PartialState().main_process_first():
        if PartialState().is_main_process:
            run_folder.check(folder, resume=resume, overwrite=overwrite)
    checkpoint = _newest_checkpoint(folder) if resume else None
    tokenizer = load_student_tokenizer(recipe)
    if recipe.generate is not None:
        logger.info("making the data set %s", recipe.generate.output)
        generate(recipe.generate, resume=True)
    train, held = load_data(recipe, tokenizer)
    teacher, student = load_pair(recipe, tokenizer, train)
    evaluation = _evaluation(recipe, teacher, held)
    before: Measurement | None = None
    reference: PromptDataset | None = None
    if evaluation is not None:
        logger.info("measuring the student before training")
        before, reference = evaluation.measure(student), evaluation.teacher_text()
    trainer = build_trainer(recipe, arguments, teacher, student, tokenizer, train, reference)
    _begin(recipe, folder, overwrite=overwrite)
    for callback in _callbacks(recipe, folder):
        trainer.add_callback(callback)
    if isinstance(train, PromptDataset):
        logger.info("training on %d rows (of the data: %s)", len(train), train.counts)
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.export_student(folder / "student")
    result = Result(folder)
    if PartialState().is_main_process:
        if evaluation is not None and before is not None:
            result = _write_evaluation(folder, evaluation, before, evaluation.measure(student))
        run_folder.discard_old(folder)
        trainer.model_card = model_card(recipe, result.evaluation)
        (result.student / "README.md").write_text(trainer.model_card, encoding="utf-8")
    PartialState().wait_for_everyone()
    if arguments.push_to_hub:
        trainer.push_to_hub()
    return result


def _begin(recipe: Recipe, folder: Path, *, overwrite: bool) -> None:
    """Makes the run folder, on the first rank while the others wait."""
    with PartialState().main_process_first():
        if PartialState().is_main_process:
            run_folder.claim(folder, overwrite=overwrite, results=RESULTS)
            record = folder / run_folder.RECORD
            record.write_text(recipes.dump(recipe), encoding="utf-8")


def _write_evaluation(
    folder: Path, evaluation: Evaluation, before: Measurement, after: Measurement
) -> Result:
    """Writes evaluation.json; the result holds its figures and the responses side by side."""
    figures = {"before": before.figures, "after": after.figures, **evaluation.teacher_figures()}
    text = json.dumps({name: asdict(value) for name, value in figures.items()}, indent=2)
    (folder / "evaluation.json").write_text(text + "\n", encoding="utf-8")
    tokenizer = evaluation.teacher.tokenizer
    prompts = [tokenizer.decode(ids) for ids in evaluation.prompts.ids()]
    columns = (prompts, evaluation.reference.texts, before.responses, after.responses)
    return Result(folder, figures, [Answers(*row) for row in zip(*columns, strict=True)])


def load_data(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase
) -> tuple[EncodedRows, PromptDataset | None]:
    """Rows to train on and rows to measure on (None where the recipe asks for none)."""
    needed = recipe.rollout.takes_data
    return build_rows(recipe.data, tokenizer, needs_response=needed, seed=recipe.seed)


def load_pair(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, train: EncodedRows
) -> tuple[Teacher, PreTrainedModel]:
    """Teacher and student, the student as it is trained."""
    if recipe.teacher.weights is None:  # it teaches with the student's own
        student = _student(recipe, None, train)
        return build_teacher(recipe.teacher, student, tokenizer), student
    teacher = build_teacher(recipe.teacher)
    return teacher, _student(recipe, teacher, train)


def _student(recipe: Recipe, teacher: Teacher | None, train: EncodedRows) -> Any:
    """The student.  If it is cut out of the very teacher, the teacher's weights are copied instead
    of loaded again.
    """
    section, base = recipe.student, None
    same = (section.model, section.revision) == recipe.teacher_source
    if isinstance(teacher, LocalTeacher) and same:
        model = teacher.model
        wanted = getattr(torch, section.dtype) if section.dtype != "auto" else None
        whole = not any(parameter.is_meta for parameter in model.parameters())  # not offloaded
        if whole and model.dtype == wanted and not getattr(model, "is_quantized", False):
            base = model
    sample = sample_text(train, CARVE_ROWS)
    return build_student(
        section,
        base=base,
        sample=(sample.input_ids_BP, sample.attention_mask_BP),
        device="cpu" if recipe.training.get("use_cpu") else None,
        seed=recipe.seed,
    )


def load_student_tokenizer(recipe: Recipe) -> PreTrainedTokenizerBase:
    """The student's tokenizer; it must render a conversation as the teacher's does."""
    student = (recipe.student.model, recipe.student.revision)
    tokenizer = load_tokenizer(student[0], revision=student[1])
    if student == recipe.teacher_source:
        return tokenizer
    base, revision = recipe.teacher_source
    if not same_template(load_tokenizer(base, revision=revision), tokenizer):
        raise VocabularyError(
            f"the chat templates of teacher '{base}' and student '{student[0]}' render a "
            "conversation in different tokens; the teacher would judge text that it does not "
            "expect. Give the student the teacher's template, or choose another pair."
        )
    return tokenizer


def _evaluation(recipe: Recipe, teacher: Teacher, held: PromptDataset | None) -> Evaluation | None:
    """On the first rank; on the others only if the held-out loss is followed during training."""
    if held is None or not (PartialState().is_main_process or recipe.evaluate.every_steps):
        return None
    logger.info("the teacher answers the evaluation prompts")
    return Evaluation(
        teacher,
        collate(held.rows),
        max_new_tokens=recipe.evaluate.max_new_tokens,
        seed=recipe.seed,
        answer_pattern=recipe.evaluate.answer_pattern,
    )


def training_arguments(recipe: Recipe, folder: Path, *, resume: bool = False) -> TrainingArguments:
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
    if recipe.evaluate.patience is not None:
        given |= {"load_best_model_at_end": True, "save_steps": recipe.evaluate.every_steps}
        given["restore_callback_states_from_checkpoint"] = True
    if resume:
        given["eval_on_start"] = False  # it was measured when it started
    given.setdefault("ddp_timeout", int(RANKS_WAIT.total_seconds()))
    given |= {"output_dir": str(folder / "checkpoints"), "seed": recipe.seed, "disable_tqdm": True}
    try:
        return TrainingArguments(**given)
    except (TypeError, ValueError) as error:
        raise RecipeError(f"training: {error}") from error


def build_trainer(
    recipe: Recipe,
    arguments: TrainingArguments,
    teacher: Teacher,
    student: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    train: EncodedRows,
    reference: PromptDataset | None = None,
) -> DistillTrainer:
    trainer = DistillTrainer(
        student=student,
        teacher=teacher,
        rollout=build_rollout(recipe.rollout),
        objectives=[build_objective(section) for section in recipe.objectives],
        args=arguments,
        train_dataset=train,
        eval_dataset=reference,
        processing_class=tokenizer,
        merge_adapter=recipe.student.peft is None or recipe.student.peft.save == "merged",
    )
    trainer.remove_callback(PrinterCallback)  # a run shows one bar of its own
    return trainer


def _callbacks(recipe: Recipe, folder: Path) -> list[TrainerCallback]:
    callbacks = [MetricsFile(folder / "metrics.jsonl"), ProgressBar(), OldRun(folder)]
    if recipe.evaluate.patience is not None:
        callbacks.append(EarlyStoppingCallback(recipe.evaluate.patience))
    return callbacks


class OldRun(TrainerCallback):
    """Deletes the run that was overwritten once there is a checkpoint of the new one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            run_folder.discard_old(self.folder)


def _newest_checkpoint(folder: Path) -> str:
    from transformers.trainer_utils import get_last_checkpoint

    checkpoints = folder / "checkpoints"
    newest = get_last_checkpoint(str(checkpoints)) if checkpoints.is_dir() else None
    if newest is None:
        raise CheckpointError(
            f"there is no checkpoint in {checkpoints} to resume from; pass overwrite to start again"
            f"{run_folder.hint(folder)}"
        )
    return newest
