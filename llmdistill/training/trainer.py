"""`DistillTrainer`: transformers' Trainer around `Distillation`.

B = sequences, K = terms of the loss, T = tokens.

Trainer expects a single model that it trains, saves and pushes.  Here the trained module holds more
than the student.  Each override below handles one consequence of that difference, and each has a
test that fails without it.  Everything else (arguments, callbacks, trackers, wrapping, resuming) is
Trainer's.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn import Module
from torch.utils.data import Sampler
from transformers import TrainingArguments
from transformers.trainer_utils import EvalLoopOutput

from llmdistill.batch import Prompts, Sequences
from llmdistill.data.collate import EncodedRows, PromptDataset, collate
from llmdistill.errors import RecipeError, TrainingError
from llmdistill.evaluation.agreement import MEASURES
from llmdistill.models.heads import num_rows, unwrap_adapters
from llmdistill.models.limits import advice_on_memory
from llmdistill.models.sharding import whole
from llmdistill.models.vocabulary import list_end_ids, require_same
from llmdistill.objectives.base import Objective
from llmdistill.protocols import Follows, Progress, Rollout, Teacher
from llmdistill.rollouts.fixed import FixedRollout
from llmdistill.training.ahead import AheadTrainer
from llmdistill.training.arguments import forced, settle
from llmdistill.training.guards import RolloutWatch, check_step, smaller_batch
from llmdistill.training.order import order
from llmdistill.training.progress import AfterStep
from llmdistill.training.step import Distillation, StepOutput
from llmdistill.training.tally import Tally

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback


class DistillTrainer(AheadTrainer):
    """Trainer that distils `teacher` into `student`.

    The rollout writes responses, the teacher scores them, and the objectives compare both models.

    Args:
        student: Causal LM to train, plain or wrapped by PEFT.  Its generation config is updated to
            list every end token of the run.
        teacher: Source of the target distributions and states, such as a `LocalTeacher`.
        rollout: Writer of the responses that the student learns on, such as a `FixedRollout`.
        objectives: Losses that are summed with their weights.  At least one is needed.
        args: Training arguments.  `remove_unused_columns`, `logging_nan_inf_filter` and
            `dispatch_batches` are turned off.
        train_dataset: Rows as dicts in any format of `data/formats.py`, or encoded rows (a
            `PromptDataset` or a `PromptStream`).
        eval_dataset: Held-out rows in the same forms.  The evaluation loss uses their responses.
        processing_class: The student's tokenizer.  It renders the rows and is exported too.
        callbacks: Callbacks that are added to Trainer's own.
        optimizers: Optimizer and scheduler; each None is built from `args`.
        model_card: Text of the README.md that a push to the Hub uploads.  None is a short one.
        merge_adapter: Whether `export_student` merges a LoRA adapter into its base model.
        export_dtype: Dtype in which `export_student` writes weights; None is that of the student.
        measured_against: Teacher of the held-out loss.  None is `teacher`, or its `plain` one.
        responses_folder: Folder of the teacher's responses; None is one in `args.output_dir`.

    Raises:
        RecipeError: There are no objectives, the teacher has no tokenizer, or the teacher does not
            provide what an objective needs.
        VocabularyError: Teacher and student do not share a vocabulary.
        ModelError: A model cannot be split into backbone and head, or lacks a requested layer.
        DataError: A row cannot be used.
        TrainingError: Sharding, activation checkpointing or the batch size cannot work as set.
    """

    # Trainer would divide by the accumulation steps, but the loss is divided by the counts of the
    # whole step already.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        *,
        student: PreTrainedModel,
        teacher: Teacher,
        rollout: Rollout,
        objectives: Sequence[Objective],
        args: TrainingArguments,
        train_dataset: EncodedRows | Sequence[dict[str, Any]] | None = None,
        eval_dataset: EncodedRows | Sequence[dict[str, Any]] | None = None,
        processing_class: PreTrainedTokenizerBase,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        model_card: str | None = None,
        merge_adapter: bool = True,
        export_dtype: torch.dtype | None = None,
        measured_against: Teacher | None = None,
        responses_folder: Path | None = None,
    ) -> None:
        _require_one_vocabulary(teacher, student, processing_class)
        self.teacher, self.rollout, self.model_card = teacher, rollout, model_card
        self.merge_adapter, self.export_dtype = merge_adapter, export_dtype
        self.responses_folder = responses_folder or Path(args.output_dir) / "responses"
        self._step_loss: Tensor | float = 0.0
        known = (unwrap_adapters(student), processing_class, getattr(teacher, "ends", ()))
        self._tally, self._watch = Tally(list_end_ids(*known)), RolloutWatch()
        use_cache = student.config.use_cache
        # The seed gives projectors the same weights on all ranks; the caller's generator stays.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(args.seed)
            parts = (student, teacher, objectives, processing_class, measured_against)
            distillation = Distillation(*parts)
        super().__init__(
            model=distillation,
            args=forced(args, distillation),
            data_collator=collate,
            train_dataset=PromptDataset.of(train_dataset, processing_class, teacher.tokenizer),
            eval_dataset=PromptDataset.of(eval_dataset, processing_class, teacher.tokenizer),
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        # Trainer overwrites use_cache with args.use_cache, and the export would save that value.
        student.config.use_cache = use_cache
        if isinstance(teacher, Follows):
            self.add_callback(AfterStep(teacher))
        settle(self)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int] | None:
        """Let a curriculum choose the order of rows, or group them by length if `args` asks."""
        rows = self.train_dataset if train_dataset is None else train_dataset
        chosen = order(rows, self.args, self.teacher)
        return super()._get_train_sampler(train_dataset) if chosen is None else chosen

    # ---- who writes: the responses of an accumulation window, and the divisors of its step ----

    def get_batch_samples(
        self, epoch_iterator: Iterator[Prompts], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], Tensor | None]:
        """Return the window's micro-batches and this rank's number of predicted tokens.

        The responses of the whole window are written together.  Rows of similar length then share
        a micro-batch, which leaves the sum of the loss as it is and saves padding.
        """
        parts, progress = self._next_batches(epoch_iterator, num_batches, _progress(self))
        if not parts:
            return [], None
        prompts, start = Prompts.join(parts, pad_id=0), time.perf_counter()
        sequences = _written(self, prompts, progress)
        seconds, rest = time.perf_counter() - start, _real_rows(self.train_dataset, self.args)
        # Filler rows lose their loss before they are counted, so they are in no divisor or figure.
        sequences = sequences.without_loss(_filler_rows(self.accelerator, parts, rest))
        self._tally.add_written(sequences, seconds)
        sequences = sequences.to(device)
        order = sequences.attention_mask_BT.sum(1).argsort(descending=True, stable=True)
        rows = order.split([len(part) for part in parts])
        divisors_K = self.accelerator.reduce(self.model.divisors(sequences), reduction="sum")
        # DDP averages the ranks' gradients; the factor turns that average into the sum.
        scales_K = self.model.scales(divisors_K, progress) * self.accelerator.num_processes
        shared = {"scales": scales_K, "progress": progress}
        inputs = [{"sequences": sequences.select(some)} | shared for some in rows]
        return inputs, sequences.num_predicted.sum()

    def training_step(self, model: Module, inputs: dict[str, Any], *args: Any) -> Tensor:
        """Make one micro-batch's forward and backward pass, with advice if memory runs out."""
        with advice_on_memory(partial(smaller_batch, inputs["sequences"], self.args)):
            return super().training_step(model, inputs, *args)

    def compute_loss(
        self,
        model: Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return this micro-batch's share of the step's loss, a scalar.

        The scales already contain each term's weight, its divisor of the whole step and the number
        of ranks, so `num_items_in_batch` is not used.
        """
        with self.accelerator.autocast():  # DDP has it in its forward pass, but FSDP2 has not
            output = model(inputs["sequences"], inputs["scales"], inputs["progress"])
        _count(self, output)
        return (output.loss, output) if return_outputs else output.loss

    def prediction_step(
        self, model: Module, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor, None, None]:
        """Return the loss on the evaluation rows' own responses; logits and labels are None."""
        sequences = FixedRollout().write(inputs, self.model, self.teacher, _progress(self))
        rest = self.accelerator.gradient_state.remainder
        filler_B = _filler_rows(self.accelerator, [inputs], rest)
        sequences = sequences.without_loss(filler_B).to(self.args.device)
        with torch.no_grad(), self.accelerator.autocast():
            output = model(sequences)
        self._eval_tally.add_terms(output.terms)
        return output.loss, None, None

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """Evaluate, and report the loss over all rows together, not Trainer's mean of batch means.

        Each objective counts with the weight that it has at the end of the run, so that losses
        from different steps can be compared.  MEASURES are reported, too, if an objective needs the
        teacher's distributions.  Raises TrainingError if the weights are all 0.
        """
        weights = _held_out_weights(self)
        self._eval_tally = Tally(terms=self.model.measured_names)
        with self.model.exported_weights():
            result = super().evaluation_loop(*args, **kwargs)
        means = self._eval_tally.term_means(self.accelerator)
        found = {name: means[name] for name in MEASURES if name in means}
        found["loss"] = sum(weight * means[name] for name, weight in weights.items())
        prefix = kwargs.get("metric_key_prefix", "eval")
        result.metrics.update({f"{prefix}_{name}": value for name, value in found.items()})
        return result

    # ---- what stops a step, and what is logged ----

    def _get_grad_norm(self, model: Module, grad_norm: Any = None) -> Any:
        """Return the gradient norm; raises NonFiniteLossError if it or the loss is not finite.

        This is Trainer's last call before the update.
        """
        for parameter in self.model.idle_parameters():
            parameter.grad = None  # a zero would still move it, by the optimizer's momentum
        norm = whole(super()._get_grad_norm(model, grad_norm=grad_norm))
        loss = torch.as_tensor(self._step_loss, device=self.args.device)
        # The scaler of float16 expects overflows: it skips such a step and lowers its scale.
        checked = norm if self.accelerator.scaler is None else 0.0
        self.stop_on_signal.agreed = check_step(self, loss, checked)
        self._step_loss = 0.0
        return norm

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log `logs` with who wrote and each term's mean since the last line, over all ranks."""
        _add_figures(self, logs)
        super().log(logs, start_time)


def _require_one_vocabulary(
    teacher: Teacher, student: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    if teacher.tokenizer is None:
        raise RecipeError(
            f"{type(teacher).__name__} has no tokenizer, so its vocabulary cannot be compared with "
            "the student's. Set its tokenizer."
        )
    require_same(teacher.tokenizer, tokenizer, None, num_rows(student))


def _written(trainer: DistillTrainer, prompts: Prompts, progress: Progress) -> Sequences:
    """Let the rollout write, under autocast and with weights that FSDP2 has gathered."""
    write = partial(trainer.rollout.write, prompts, trainer.model, trainer.teacher, progress)
    with trainer.accelerator.autocast():
        return trainer.model.with_whole_weights(write)


def _count(trainer: DistillTrainer, output: StepOutput) -> None:
    """Add a micro-batch to the log and to the loss of the step, which is checked before the update.

    DeepSpeed makes the update within the backward pass, so with it each loss is checked before.
    """
    loss = output.loss.detach()
    trainer._step_loss = trainer._step_loss + loss
    trainer._tally.add_terms(output.terms)
    if trainer.is_deepspeed_enabled:
        check_step(trainer, loss, 0.0)


def _progress(trainer: DistillTrainer) -> Progress:
    """Return the current progress of training."""
    state = trainer.state
    return Progress(
        step=state.global_step,
        # After an epoch's last step, state.epoch is the number of the epoch that begins.  It is a
        # float, and 1e-6 keeps one just below a whole number from falling into the epoch before.
        epoch=int((state.epoch or 0.0) + 1e-6),
        seed=trainer.args.seed,
        num_steps=state.max_steps,
        eval_losses=tuple(
            entry["eval_loss"] for entry in state.log_history if "eval_loss" in entry
        ),
    )


def _end(trainer: DistillTrainer) -> Progress:
    """Return the progress at the last step of the run, even if training has not begun."""
    steps = trainer.state.max_steps or trainer.args.max_steps
    if steps <= 0 and trainer.train_dataset is not None:
        loader = trainer.get_train_dataloader()
        *_, steps = trainer.set_initial_training_values(trainer.args, loader)
    return replace(_progress(trainer), step=max(steps - 1, 0), num_steps=max(steps, 1))


def _add_figures(trainer: DistillTrainer, logs: dict[str, float]) -> None:
    """Add what the tally has to a line about training, and to the line at its end."""
    if "loss" in logs:
        logs.update(trainer._tally.figures(trainer.accelerator))
        logs.update(_scheduled_weights(trainer))
        trainer._watch(logs)
        if trainer.model.trained_teacher is not None:
            trainer.model.trained_teacher.watch(logs)
    elif "train_loss" in logs:  # the end: the steps after the last line
        rest = trainer._tally.figures(trainer.accelerator)
        logs.update(rest if rest["predicted_tokens"] else {})


def _held_out_weights(trainer: DistillTrainer) -> dict[str, float]:
    """Return each objective's weight at the end of the run."""
    weights = trainer.model.weights(_end(trainer))
    found = {name: weights[name] for name in trainer.model.objective_names}
    if not any(found.values()):
        raise TrainingError(
            "the held-out loss uses each objective's weight at the end of the run, and these "
            "weights are all 0. Let a schedule end above 0, or turn off the held-out loss."
        )
    return found


def _scheduled_weights(trainer: DistillTrainer) -> dict[str, float]:
    """Return the weights with a schedule, as they were in the step that was just made."""
    # Trainer has already counted that step when it logs.
    progress = replace(_progress(trainer), step=max(trainer.state.global_step - 1, 0))
    terms = zip(trainer.model.weights(progress).items(), trainer.model.terms, strict=True)
    return {f"weight_{name}": weight for (name, weight), term in terms if callable(term.weight)}


def _real_rows(rows: Any, args: TrainingArguments) -> int:
    """Count the real rows in the last batch of all ranks together; 0 if it has no filler rows.

    Accelerate has this number too, but loses it when a run resumes within an epoch.
    """
    if args.dataloader_drop_last or not isinstance(rows, PromptDataset):
        return 0
    return len(rows) % (args.train_batch_size * args.world_size)


def _filler_rows(accelerator: Accelerator, parts: list[Prompts], num_real: int) -> Tensor:
    """Mark the rows that Accelerate repeats to fill up an epoch's last batch: (B,), bool."""
    filler_B = torch.zeros(sum(map(len, parts)), dtype=torch.bool)
    if accelerator.gradient_state.end_of_dataloader and num_real > 0:
        # Only the last micro-batch is filled up.  Rank r holds its rows r * size to (r + 1) * size
        # of all ranks together, and the filler rows come last.
        size = len(parts[-1])
        place = accelerator.process_index * size + torch.arange(size)
        filler_B[-size:] = place >= num_real
    return filler_B
