"""`distill(recipe)`: load, measure, train, measure, export.

B = sequences, P = prompt tokens.

A run folder holds

    recipe.yaml       the recipe with all defaults written out
    rows.json         a hash of the rows, by which a resumed run knows that they are the same
    metrics.jsonl     the logged figures, one line per log
    samples.jsonl     what the student answered during training, if the recipe asks for it
    responses/        what the teacher wrote before the first step, if it never changes
    checkpoints/      the states that a run can resume from
    student/          the student, its tokenizer and its model card
    before.json       what was measured before training
    evaluation.json   the figures of the student before and after training, and of the teacher
    answers.jsonl     the responses of all three to the held-out prompts
    positions.jsonl   where student and teacher differ within a few of the teacher's responses
    run.json          the machine, the time and the number of rows and tokens
    report.html       all of this to look at; plots/ has its charts as PNG
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState
from transformers import EarlyStoppingCallback, TrainerCallback
from transformers.trainer_callback import PrinterCallback

from llmdistill import recipe as recipes
from llmdistill import run_folder
from llmdistill.data.build import load_data, load_student_tokenizer
from llmdistill.data.collate import (
    EncodedRows,
    PromptDataset,
    collate,
    fingerprint,
    sample_text,
)
from llmdistill.data.context import require_context
from llmdistill.data.render import last_messages
from llmdistill.errors import RecipeError
from llmdistill.generate import generate
from llmdistill.measuring import Result, measuring_of
from llmdistill.models.build import build_student, export_dtype
from llmdistill.models.heads import num_rows, unwrap_adapters
from llmdistill.models.load import default_device, native_bfloat16
from llmdistill.models.placement import is_whole
from llmdistill.models.vocabulary import list_end_ids, require_same
from llmdistill.objectives.build import build_objectives
from llmdistill.protocols import Exports, Teacher
from llmdistill.publish.card import model_card
from llmdistill.publish.facts import FACTS, Facts, facts_of
from llmdistill.publish.hub import push_result
from llmdistill.publish.report import PLOTS, write_report
from llmdistill.recipe import Recipe
from llmdistill.rollouts.build import build_rollout
from llmdistill.starts import AUTO, Start, starts_of
from llmdistill.teachers.build import Parts, build_teacher, load_teacher
from llmdistill.teachers.local import LocalTeacher
from llmdistill.training.available import require_available
from llmdistill.training.guards import require_a_batch, require_steps
from llmdistill.training.progress import MetricsFile, OldRun, ProgressBar, Samples
from llmdistill.training.pushing import repository_name
from llmdistill.training.seal import MANIFEST
from llmdistill.training.trainer import DistillTrainer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

logger = logging.getLogger("llmdistill")

RESPONSES = "responses"
RESULTS = ("student", *run_folder.GOES_ON)  # a folder with one of these is worth keeping
SAMPLED_ROWS = 3  # held-out prompts that the student answers during training
CARVE_ROWS = 48  # rows of training text on which the influence of layers is measured


def distill(
    recipe: Recipe,
    *,
    resume: str | Path = AUTO,
    overwrite: bool = False,
    show_progress: bool = True,
) -> Result:
    """Run a recipe: load, measure, train, measure, export.

    A recipe may consist of several runs in their own folders, such as a chain of assistants.

    Args:
        recipe: A recipe from `load_recipe`.
        resume: "auto" continues the run in the run folder, if there is one, from its newest
            whole checkpoint.  A path names another checkpoint of it.  "never" refuses a folder
            that has a run.
        overwrite: Replace the run in the run folder.  Data and models are loaded first.  The old
            run is deleted when the new one has a checkpoint or a student.
        show_progress: Show a progress bar of the training steps on stderr.

    Raises:
        CheckpointError: A run folder has something else than this run, the run was started with
            another recipe, or its checkpoints are damaged.
        StoppedError: SIGTERM ended the run, and a checkpoint was saved.
        HubError: `training.push_to_hub` asks for an upload, and the Hub cannot be used; or the last
            upload failed after the run was finished, with all its results in the run folder.
    """
    stages = recipe.stages
    told = [*stages[:-1], recipe]  # the record and the card of the last run are of the whole
    starts = starts_of(told, resume=resume, overwrite=overwrite)
    PartialState().wait_for_everyone()  # no rank may write before all have looked
    result = None
    for number, (stage, start) in enumerate(zip(stages, starts, strict=True), start=1):
        if not start.runs:
            logger.info("this run is finished: %s", stage.output)
            _push(stage)
            continue
        if len(stages) > 1:
            logger.info("run %d of %d: %s", number, len(stages), stage.output)
        result = _run(stage, told[number - 1], start, show_progress=show_progress)
    return result or Result.read(Path(recipe.output))


def _run(stage: Recipe, told: Recipe, start: Start, *, show_progress: bool) -> Result:
    """Do one run of a recipe.  `told` is the recipe that its record and its card show."""
    recipe, folder = stage, Path(stage.output)
    has_checkpoint = start.resume and any(folder.glob(f"checkpoints/*/{MANIFEST}"))
    arguments = training_arguments(recipe, folder, resume=has_checkpoint)
    require_available(arguments)
    tokenizer = load_student_tokenizer(recipe)
    if recipe.generate is not None:
        logger.info("generating the dataset %s", recipe.generate.output)
        generate(recipe.generate, resume=True)
    train, held = load_data(recipe, tokenizer)
    require_a_batch(train, arguments)
    require_context(recipe, train, held)
    rows = fingerprint(train)
    if start.resume:
        run_folder.require_same_rows(folder, rows)
    teacher, student = load_pair(recipe, tokenizer, train, held)
    against = None
    if recipe.evaluate.against not in (None, recipe.teacher):
        against = load_teacher(recipe.evaluate.against)
        require_same(against.tokenizer, tokenizer, None, num_rows(student))
    exported = export_dtype(recipe.student, trained_in_bfloat16=arguments.bf16)
    measuring = measuring_of(recipe, against or teacher, held, folder, exported)
    measuring.before(student, resumed=start.resume)
    # Inner states are those of the run's own teacher, whose layers the objectives have chosen.
    states = any(one.teacher_needs - {"distribution"} for one in recipe.objectives)
    held_out = (measuring.teacher_text(), None if states else against)
    trainer = build_trainer(recipe, arguments, teacher, student, tokenizer, train, *held_out)
    # Before anything is written: if the checkpoint is of another run, the folder stays as it is.
    checkpoint = trainer.find_checkpoint(start.checkpoint or True) if start.resume else None
    _begin(told, folder, rows, overwrite=start.overwrite)
    measuring.keep()
    for callback in _callbacks(recipe, folder, held, tokenizer, show_progress=show_progress):
        trainer.add_callback(callback)
    logger.info("training on responses of %s", recipe.rollout.who_writes)
    if arguments.push_to_hub:
        trainer.model_card = model_card(told, None, in_progress=True)
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    require_steps(trainer)
    trainer.export_student(folder / "student")
    if PartialState().is_main_process and isinstance(teacher, Exports):
        teacher.export(folder)
    PartialState().wait_for_everyone()  # the student has been written
    result = measuring.after()
    if PartialState().is_main_process:
        names = trainer.model.term_names
        _publish(told, result, partial(facts_of, told, folder, train, held, names))
    PartialState().wait_for_everyone()
    _push(stage)
    return result


def _push(recipe: Recipe) -> None:
    """Upload a finished run on the first rank, if its recipe asks for it."""
    training, folder = recipe.training, Path(recipe.output)
    if not training.get("push_to_hub") or not PartialState().is_main_process:
        return
    address = push_result(
        folder,
        repository_name(training.get("hub_model_id"), folder),
        private=training.get("hub_private_repo") is not False,
        revision=training.get("hub_revision"),
    )
    logger.info("uploaded to %s", address)


def _publish(recipe: Recipe, result: Result, facts: Callable[[], Facts]) -> None:
    """Write the facts, the report and the card, and delete the run that this one replaces."""
    run_folder.discard_old(result.folder)
    try:
        facts().write(result.folder)
        plots = write_report([result.folder]).plots
    except Exception as error:  # a finished run is worth more than its charts
        plots = {}
        logger.warning(
            "the report could not be written: %s: %s. 'llmdistill report %s' tries it again.",
            type(error).__name__, error, result.folder,
        )  # fmt: skip
    shown = result.student / PLOTS
    for plot in plots:
        shown.mkdir(exist_ok=True)
        shutil.copyfile(plot, shown / plot.name)
    titles = {plot.name: title for plot, title in plots.items()}
    card = model_card(recipe, result.evaluation, Facts.read(result.folder), titles)
    (result.student / "README.md").write_text(card, encoding="utf-8")


def _begin(recipe: Recipe, folder: Path, rows: str, *, overwrite: bool) -> None:
    """Make the run folder on the first rank, while the other ranks wait."""
    with PartialState().main_process_first():
        if PartialState().is_main_process:
            run_folder.claim(folder, overwrite=overwrite, results=RESULTS)
            # Until the run has ended again, its student counts as one that is not finished.
            for name in ("student/README.md", FACTS, *run_folder.MEASURED):
                (folder / name).unlink(missing_ok=True)
            record = folder / run_folder.RECORD
            record.write_text(recipes.dump(recipe), encoding="utf-8")
            run_folder.record_rows(folder, rows)


def load_pair(
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    train: EncodedRows,
    held: PromptDataset | None = None,
) -> tuple[Teacher, PreTrainedModel]:
    """Load the teacher and the student, carved or with its adapter as the recipe asks."""
    parts = parts_of(recipe, tokenizer, train, held)
    if recipe.teacher.uses_student:
        student = _student(recipe, None, parts)
        teacher = build_teacher(recipe.teacher, replace(parts, student=student))
    else:
        logger.info("loading the teacher %s", ", ".join(n for n, _ in recipe.teacher_sources))
        teacher = build_teacher(recipe.teacher, parts)
        student = _student(recipe, teacher, parts)
    # Before anything is measured: a student without a row for each token could not read a response,
    # and responses must end at the same tokens before and after training.
    if teacher.tokenizer is not None:
        require_same(teacher.tokenizer, tokenizer, None, num_rows(student))
    list_end_ids(unwrap_adapters(student), tokenizer, getattr(teacher, "ends", ()))
    return teacher, student


def parts_of(
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    train: EncodedRows,
    held: PromptDataset | None,
) -> Parts:
    """Return what a teacher may be made of before the student is loaded."""
    sample = sample_text(train, CARVE_ROWS)
    return Parts(
        tokenizer=tokenizer,
        train=train.rows if isinstance(train, PromptDataset) else (),
        held=held.rows if held is not None else (),
        sample=(sample.input_ids_BP, sample.attention_mask_BP),
        device="cpu" if recipe.training.get("use_cpu") else None,
        seed=recipe.seed,
        takes_data=recipe.rollout.takes_data,
        template_options=recipe.data.chat_template_kwargs,
    )


def _student(recipe: Recipe, teacher: Teacher | None, parts: Parts) -> Any:
    """Build the student.  If it is carved out of the loaded teacher, copy the teacher's weights
    instead of loading them again.
    """
    section, base = recipe.student, None
    logger.info("loading the student %s%s", section.model, ", to be carved" * bool(section.carve))
    same = (section.model, section.revision) == recipe.teacher_source
    # A carved student attends in the way of the model that it is copied from.
    wants = section.attn_implementation
    same = same and getattr(recipe.teacher, "attn_implementation", wants) == wants
    if isinstance(teacher, LocalTeacher) and same:
        model = teacher.model
        wanted = getattr(torch, section.dtype) if section.dtype != "auto" else None
        if is_whole(model) and model.dtype == wanted and not getattr(model, "is_quantized", False):
            base = model
    assert parts.sample is not None
    return build_student(
        section, base=base, sample=parts.sample, device=parts.device, seed=parts.seed
    )


def training_arguments(recipe: Recipe, folder: Path, *, resume: bool = False) -> TrainingArguments:
    """Make TrainingArguments from a recipe.  Without `bf16` or `fp16`, bf16 is on if the device
    multiplies bfloat16 natively.

    Raises RecipeError if transformers refuses an argument.
    """
    from transformers import TrainingArguments

    given: dict[str, Any] = {"report_to": "none", "logging_steps": 1, **recipe.training}
    device = torch.device("cpu") if given.get("use_cpu") else default_device()
    if "bf16" not in given and "fp16" not in given:
        given["bf16"] = native_bfloat16(device)
    given.setdefault("use_cpu", device.type == "cpu")
    if recipe.data.streaming:
        given.setdefault(
            "dataloader_drop_last", True
        )  # Accelerate would repeat rows in the last batch
    if recipe.evaluate.every_steps:
        given |= {"eval_strategy": "steps", "eval_steps": recipe.evaluate.every_steps}
    if recipe.evaluate.patience is not None:
        given |= {"load_best_model_at_end": True, "save_steps": recipe.evaluate.every_steps}
        given["restore_callback_states_from_checkpoint"] = True
    if resume:
        given["eval_on_start"] = False  # the first start measured it
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
    against: Teacher | None = None,
) -> DistillTrainer:
    """Make the trainer of a recipe.

    `reference` are the rows for the held-out loss, and `against` is the teacher of that loss if it
    is another one.
    """
    trainer = DistillTrainer(
        student=student,
        teacher=teacher,
        rollout=build_rollout(recipe.rollout),
        objectives=build_objectives(recipe.objectives),
        args=arguments,
        train_dataset=train,
        eval_dataset=reference,
        measured_against=against,
        processing_class=tokenizer,
        merge_adapter=recipe.student.peft is None or recipe.student.peft.save == "merged",
        export_dtype=export_dtype(recipe.student, trained_in_bfloat16=arguments.bf16),
        responses_folder=Path(arguments.output_dir).parent / RESPONSES,
    )
    trainer.remove_callback(PrinterCallback)  # it would print each log as a dict under the bar
    return trainer


def _callbacks(
    recipe: Recipe,
    folder: Path,
    held: PromptDataset | None,
    tokenizer: PreTrainedTokenizerBase,
    *,
    show_progress: bool,
) -> list[TrainerCallback]:
    callbacks = [MetricsFile(folder / run_folder.METRICS), OldRun(folder)]
    if show_progress:
        callbacks.append(ProgressBar())
    if recipe.evaluate.samples_every and held is not None:
        prompts = collate(held.rows[:SAMPLED_ROWS])
        sampled = Samples(
            folder / run_folder.SAMPLES, prompts, last_messages(tokenizer, prompts.ids()),
            every=recipe.evaluate.samples_every, max_new_tokens=recipe.evaluate.max_new_tokens,
        )  # fmt: skip
        callbacks.append(sampled)
    if recipe.evaluate.patience is not None:
        callbacks.append(EarlyStoppingCallback(recipe.evaluate.patience))
    return callbacks
