"""`DistillTrainer`: transformers' Trainer around `Distillation`.

B = sequences, K = terms of the loss, T = tokens.

Trainer expects one model that is trained, saved and pushed; here the trained module is more than
the student.  Each override below is one place where that difference shows, and each has a test that
fails without it.  Everything else (arguments, callbacks, trackers, wrapping, resuming) is
Trainer's.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn import Module
from torch.utils.data import Sampler
from transformers import TrainingArguments
from transformers.trainer_utils import EvalLoopOutput

from llmdistill.batch import Prompts
from llmdistill.data.collate import ByLength, EncodedRows, PromptDataset, collate
from llmdistill.errors import RecipeError, TrainingError
from llmdistill.models.heads import num_rows, unwrap_adapters
from llmdistill.models.vocabulary import list_end_ids, require_same
from llmdistill.objectives.base import Objective
from llmdistill.protocols import Progress, Rollout, Teacher
from llmdistill.rollouts.fixed import FixedRollout
from llmdistill.training.arguments import (
    check_checkpointing,
    check_sharding,
    compile_layers,
    forced,
    is_sharded,
)
from llmdistill.training.groups import GroupedTrainer
from llmdistill.training.guards import stop_if_not_finite
from llmdistill.training.step import Distillation
from llmdistill.training.tally import Tally

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback


class DistillTrainer(GroupedTrainer):
    """Distils `teacher` into `student`: `rollout` writes, `teacher` judges, `objectives` match.

    `train_dataset` and `eval_dataset` are rows in any of `data/`'s formats, or encoded ones (a
    PromptDataset, a PromptStream).  The evaluation loss is taken on the responses of
    `eval_dataset`.  Raises VocabularyError where teacher and student do not share a vocabulary.
    """

    loss_is_scaled_for_ga = True  # our loss is divided by the whole step's count already

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
    ) -> None:
        if teacher.tokenizer is None:
            raise RecipeError(
                f"{type(teacher).__name__} has no tokenizer, so its vocabulary cannot be compared "
                "with the student's; give it one"
            )
        require_same(teacher.tokenizer, processing_class, None, num_rows(student))
        self.teacher, self.rollout = teacher, rollout
        self.model_card, self.merge_adapter = model_card, merge_adapter
        self._tally = Tally()
        self._step_loss: Tensor | float = 0.0
        ends = getattr(teacher, "ends", ())
        list_end_ids(unwrap_adapters(student), processing_class, ends)
        use_cache = student.config.use_cache
        with torch.random.fork_rng(devices=[]):  # projectors are made on the CPU
            torch.manual_seed(args.seed)  # and start alike on all ranks
            distillation = Distillation(student, teacher, objectives, processing_class)
        super().__init__(
            model=distillation,
            args=forced(args, distillation),
            data_collator=collate,
            train_dataset=PromptDataset.of(train_dataset, processing_class),
            eval_dataset=PromptDataset.of(eval_dataset, processing_class),
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        student.config.use_cache = use_cache  # Trainer turns it off; it would be saved so
        check_sharding(rollout, sharded=is_sharded(self), requested=bool(self.args.fsdp))
        check_checkpointing(self.args, distillation)
        compile_layers(self)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int] | None:
        """Trainer does not see how long our rows are."""
        rows = self.train_dataset if train_dataset is None else train_dataset
        by_length = self.args.train_sampling_strategy == "group_by_length"
        if not by_length or not isinstance(rows, PromptDataset):
            return super()._get_train_sampler(train_dataset)
        window = self.args.train_batch_size * self.args.gradient_accumulation_steps
        return ByLength(rows, window, seed=self.args.seed)

    # ---- who writes: the rollouts of a whole accumulation window, and the exact divisor ----

    def get_batch_samples(
        self, epoch_iterator: Iterator[Prompts], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], Tensor | None]:
        """The window's micro-batches, written in one large batch, and its predicted tokens on all
        ranks.

        Rows of similar length share a micro-batch: the sum is the same, the padding less.
        """
        parts = list(itertools.islice(epoch_iterator, num_batches))
        if not parts:
            return [], None
        prompts = Prompts.join(parts, pad_id=0)
        start = time.perf_counter()
        with self.accelerator.autocast():
            sequences = self.rollout.write(prompts, self.model, self.teacher, self._progress())
        seconds = time.perf_counter() - start
        rest = _real_rows_in_last_batch(self.train_dataset, self.args)
        sequences = sequences.without_loss(_filler_rows(self.accelerator, parts, rest))
        self._tally.add_written(sequences, seconds)
        sequences = sequences.to(device)
        order = sequences.attention_mask_BT.sum(1).argsort(descending=True, stable=True)
        rows = order.split([len(part) for part in parts])
        divisors_K = self.accelerator.reduce(self.model.divisors(sequences), reduction="sum")
        scales_K = self.model.scales(divisors_K, self._progress()) * self.accelerator.num_processes
        inputs = [{"sequences": sequences.select(some), "scales": scales_K} for some in rows]
        return inputs, sequences.num_predicted.sum()

    def _progress(self) -> Progress:
        # After an epoch's last step state.epoch is a whole number: that of the epoch that begins.
        epoch = int((self.state.epoch or 0.0) + 1e-6)
        return Progress(
            step=self.state.global_step,
            epoch=epoch,
            seed=self.args.seed,
            num_steps=self.state.max_steps,
            eval_losses=tuple(
                entry["eval_loss"] for entry in self.state.log_history if "eval_loss" in entry
            ),
        )

    # ---- what is matched ----

    def compute_loss(
        self,
        model: Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """This micro-batch's share of the step's loss.

        The scales hold each term's divisor of the whole step, and the number of ranks: DDP averages
        gradients, and the loss is a sum over ranks.
        """
        output = model(inputs["sequences"], inputs["scales"])
        self._step_loss = self._step_loss + output.loss.detach()
        self._tally.add_terms(output.terms)
        return (output.loss, output) if return_outputs else output.loss

    def prediction_step(
        self, model: Module, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor, None, None]:
        """The loss on the evaluation rows' own responses."""
        sequences = FixedRollout().write(inputs, self.model, self.teacher, self._progress())
        rest = self.accelerator.gradient_state.remainder
        filler_B = _filler_rows(self.accelerator, [inputs], rest)
        sequences = sequences.without_loss(filler_B).to(self.args.device)
        with torch.no_grad(), self.compute_loss_context_manager():
            output = model(sequences)
        self._eval_tally.add_terms(output.terms)
        return output.loss, None, None

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """Trainer averages batch means; the loss reported is that of all rows as one step.

        Objectives count with the weights that they end with, so that losses can be compared.
        Raises TrainingError if these are all 0.
        """
        weights = self.model.weights(self._end())
        if not any(weights[name] for name in self.model.objective_names):
            raise TrainingError(
                "the held-out loss counts each objective with the weight that it ends with, and "
                "these are all 0; let a schedule end above 0, or measure no held-out loss"
            )
        self._eval_tally = Tally()
        self._eval_tally.add_terms(
            dict.fromkeys(self.model.objective_names, (0.0, 0.0))
        )  # on all ranks
        result = super().evaluation_loop(*args, **kwargs)
        means = self._eval_tally.term_means(self.accelerator)
        prefix = kwargs.get("metric_key_prefix", "eval")
        loss = sum(weights[name] * means[name] for name in self.model.objective_names)
        result.metrics[f"{prefix}_loss"] = loss
        return result

    def _end(self) -> Progress:
        """The last step of the run, also before it has begun."""
        steps = self.state.max_steps or self.args.max_steps
        if steps <= 0 and self.train_dataset is not None:
            loader = self.get_train_dataloader()
            *_, steps = self.set_initial_training_values(self.args, loader)
        return replace(self._progress(), step=max(steps - 1, 0), num_steps=max(steps, 1))

    # ---- what stops a step, and what is logged ----

    def _get_grad_norm(self, model: Module, grad_norm: Any = None) -> Any:
        """Trainer's last call before the update: the place to stop a step that is not finite."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        loss = torch.as_tensor(self._step_loss, device=self.args.device)
        checked = norm if self.accelerator.scaler is None else 0.0  # float16's scaler looks itself
        stop_if_not_finite(self.accelerator, loss, checked, self.state.global_step)
        self._step_loss = 0.0
        return norm

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds what was written and each objective's mean since the last line, over all ranks."""
        if "loss" in logs:
            logs.update(self._tally.figures(self.accelerator))
            logs.update(self._scheduled_weights())
        super().log(logs, start_time)

    def _scheduled_weights(self) -> dict[str, float]:
        """The weights that the step just made had, of objectives with a schedule."""
        progress = replace(self._progress(), step=max(self.state.global_step - 1, 0))
        weights = self.model.weights(progress)
        return {f"weight_{name}": weights[name] for name in self.model.scheduled}


def _real_rows_in_last_batch(rows: Any, args: TrainingArguments) -> int:
    """Rows of the last batch of all ranks together that are not filler; 0 if it has no filler.

    Accelerate's own count is lost when a run is resumed within an epoch.
    """
    if args.dataloader_drop_last or not isinstance(rows, PromptDataset):
        return 0
    return len(rows) % (args.train_batch_size * args.world_size)


def _filler_rows(accelerator: Accelerator, parts: list[Prompts], num_real: int) -> Tensor:
    """True for rows that Accelerate repeats to make an epoch's last batch even: (B,)."""
    filler_B = torch.zeros(sum(map(len, parts)), dtype=torch.bool)
    if accelerator.gradient_state.end_of_dataloader and num_real > 0:
        size = len(parts[-1])
        place = accelerator.process_index * size + torch.arange(size)
        filler_B[-size:] = place >= num_real
    return filler_B
