"""`DistillTrainer`: transformers' Trainer around `Distillation`.

Trainer expects one model that is trained, saved and pushed; here the trained module is more than
the student.  Each override below is one place where that difference shows, and each has a test that
fails without it.  Everything else (arguments, callbacks, trackers, wrapping, resuming) is
Trainer's.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, DynamoBackend
from torch import Tensor
from torch.nn import Module, Parameter
from torch.utils.data import Sampler
from transformers import TrainingArguments
from transformers.trainer_utils import EvalLoopOutput

from llmdistill.batch import Prompts, Sequences
from llmdistill.data.collate import ByLength, EncodedRows, PromptDataset, collate
from llmdistill.errors import TrainingError
from llmdistill.models.layers import decoder_layers
from llmdistill.models.vocabulary import require_same
from llmdistill.objectives.base import Objective
from llmdistill.protocols import Progress, Rollout
from llmdistill.rollouts.fixed import FixedRollout
from llmdistill.rollouts.interleaved import InterleavedRollout
from llmdistill.teachers.local import LocalTeacher
from llmdistill.training.guards import stop_if_not_finite
from llmdistill.training.saving import StudentTrainer
from llmdistill.training.step import Distillation
from llmdistill.training.tally import Tally, over_ranks

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

logger = logging.getLogger("llmdistill")


class DistillTrainer(StudentTrainer):
    """Distils `teacher` into `student`: `rollout` writes, `teacher` judges, `objectives` match.

    `train_dataset` and `eval_dataset` are rows in any of `data/`'s formats, or encoded ones (a
    PromptDataset, a PromptStream).  The evaluation loss is taken on the responses of
    `eval_dataset`.  Raises VocabularyError where teacher and student do not share a vocabulary.
    """

    optimizer: torch.optim.Optimizer | None
    loss_is_scaled_for_ga = True  # our loss is divided by the whole step's count already

    def __init__(
        self,
        *,
        student: PreTrainedModel,
        teacher: LocalTeacher,
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
        require_same(
            teacher.tokenizer,
            processing_class,
            teacher.model.get_output_embeddings().weight.shape[0],
            student.get_output_embeddings().weight.shape[0],
        )
        self.teacher, self.rollout = teacher, rollout
        self.model_card, self.merge_adapter = model_card, merge_adapter
        self._tally = Tally()
        self._step_loss: Tensor | float = 0.0
        use_cache = student.config.use_cache
        super().__init__(
            model=Distillation(student, teacher, objectives, processing_class),
            args=_forced(args),
            data_collator=collate,
            train_dataset=PromptDataset.of(train_dataset, processing_class),
            eval_dataset=PromptDataset.of(eval_dataset, processing_class),
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        student.config.use_cache = use_cache  # Trainer turns it off; it would be saved so
        _check_sharded(self)
        _compile_layers(self)

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
    ) -> tuple[list[dict[str, Sequences]], Tensor | None]:
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
        rest = _remainder(self.train_dataset, self.args)
        sequences = sequences.without_loss(_repeated(self.accelerator, parts, rest))
        self._tally.add_written(sequences, seconds)
        sequences = sequences.to(device)
        order = sequences.attention_mask_BT.sum(1).argsort(descending=True, stable=True)
        rows = order.split([len(part) for part in parts])
        count = self.accelerator.reduce(sequences.num_predicted.sum(), reduction="sum")
        return [{"sequences": sequences.select(some)} for some in rows], count

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
        inputs: dict[str, Sequences],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """This micro-batch's share of the step's mean; DDP averages gradients, hence the factor."""
        output = model(inputs["sequences"])
        assert num_items_in_batch is not None
        divisor = torch.as_tensor(num_items_in_batch, device=output.total.device).clamp_min(1)
        loss = output.total / divisor * self.accelerator.num_processes
        self._step_loss = self._step_loss + loss.detach()
        self._tally.add_terms(output.terms)
        return (loss, output) if return_outputs else loss

    def prediction_step(
        self, model: Module, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor, None, None]:
        """The loss on the evaluation rows' own responses."""
        sequences = FixedRollout().write(inputs, self.model, self.teacher, self._progress())
        rest = self.accelerator.gradient_state.remainder
        repeated_B = _repeated(self.accelerator, [inputs], rest)
        sequences = sequences.without_loss(repeated_B).to(self.args.device)
        with torch.no_grad(), self.compute_loss_context_manager():
            output = model(sequences)
        self._eval_sums["total"] += float(output.total)
        self._eval_sums["count"] += float(output.count)
        return output.total / output.count.clamp_min(1), None, None

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """Trainer averages batch means; the loss reported is the mean over all predicted tokens."""
        self._eval_sums = {"total": 0.0, "count": 0.0}
        result = super().evaluation_loop(*args, **kwargs)
        sums = over_ranks(self.accelerator, self._eval_sums)
        prefix = kwargs.get("metric_key_prefix", "eval")
        result.metrics[f"{prefix}_loss"] = sums["total"] / max(sums["count"], 1)
        return result

    # ---- optimiser groups and clipping, by owner ----

    def create_optimizer(self, model: Module | None = None) -> torch.optim.Optimizer:
        """One pair of groups (with and without weight decay) for each owner, named after it."""
        groups = dict(self.model.parameter_groups())
        if self.optimizer is not None or list(groups) == ["student"]:
            optimizer = super().create_optimizer(model)  # all of Trainer's optimisers
            for group in optimizer.param_groups:
                group.setdefault("name", "student")
            return optimizer
        decayed = set(self.get_decay_parameter_names(self.model))
        optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
        if {"params", "model", "optimizer_dict"} & options.keys():
            raise TrainingError(
                f"training.optim: {self.args.optim} makes its own parameter groups and cannot "
                f"train {' and '.join(groups)} together; choose adamw_torch"
            )
        self.optimizer = optimizer_class(
            _optimizer_groups(groups, decayed, self.args.weight_decay), **options
        )
        return self.optimizer

    def _clip_grad_norm(self, model: Module) -> Tensor | float | None:
        """Each owner's gradient is clipped on its own: one clip would couple them.  Gives the norm
        of all.
        """
        if self.accelerator.distributed_type == DistributedType.DEEPSPEED:
            return super()._clip_grad_norm(model)
        norms = [
            self.accelerator.clip_grad_norm_(list(named.values()), self.args.max_grad_norm)
            for _, named in self.model.parameter_groups()
        ]
        return torch.stack([torch.as_tensor(norm) for norm in norms]).norm()

    def _get_grad_norm(self, model: Module, grad_norm: Any = None) -> Any:
        """Trainer's last call before the update: the place to stop a step that is not finite."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        loss = torch.as_tensor(self._step_loss, device=self.args.device)
        checked = norm if self.accelerator.scaler is None else 0.0  # float16's scaler looks itself
        stop_if_not_finite(self.accelerator, loss, checked, self.state.global_step)
        self._step_loss = 0.0
        return norm

    # ---- what is logged ----

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds what was written and each objective's mean since the last line, over all ranks."""
        if "loss" in logs:
            logs.update(self._tally.figures(self.accelerator))
        super().log(logs, start_time)


def _optimizer_groups(
    groups: Mapping[str, Mapping[str, Parameter]], decayed: set[str], weight_decay: float
) -> list[dict[str, Any]]:
    return [
        {
            "params": [p for name, p in named.items() if (name in decayed) is decays],
            "weight_decay": weight_decay if decays else 0.0,
            "name": group,
        }
        for group, named in groups.items()
        for decays in (True, False)
    ]


def _remainder(rows: Any, args: TrainingArguments) -> int:
    """Rows of the last batch of all ranks together that are not filler; 0 where it has none.

    Accelerate's own count is lost when a run is resumed within an epoch.
    """
    if args.dataloader_drop_last or not isinstance(rows, PromptDataset):
        return 0
    return len(rows) % (args.train_batch_size * args.world_size)


def _repeated(accelerator: Accelerator, parts: list[Prompts], remainder: int) -> Tensor:
    """True for rows that Accelerate repeats in an epoch's last batch to even out the ranks:
    (B,).
    """
    repeated_B = torch.zeros(sum(map(len, parts)), dtype=torch.bool)
    if accelerator.gradient_state.end_of_dataloader and remainder > 0:
        size = len(parts[-1])
        place = accelerator.process_index * size + torch.arange(size)
        repeated_B[-size:] = place >= remainder
    return repeated_B


def _compile_layers(trainer: DistillTrainer) -> None:
    """`torch_compile` compiles the student's decoder layers.

    Accelerate would compile the whole step, and fail on it.
    """
    args = trainer.args
    if args.torch_compile:
        trainer.accelerator.state.dynamo_plugin.backend = DynamoBackend.NO
        for layer in decoder_layers(trainer.model.student):
            layer.compile(backend=args.torch_compile_backend, mode=args.torch_compile_mode)


def _forced(args: TrainingArguments) -> TrainingArguments:
    """The arguments with what a distillation cannot do without."""
    args.remove_unused_columns = False  # it would look at our module's forward, and raise
    args.logging_nan_inf_filter = False  # it would log NaN as 0.0; the guard stops instead
    args.accelerator_config.dispatch_batches = False  # batches are objects of ours
    if args.n_gpu > 1:  # DataParallel cannot scatter them; several GPUs need a launcher
        logger.warning("using one GPU of %d; `accelerate launch` uses them all", args.n_gpu)
        args._n_gpu = 1
    if args.ddp_find_unused_parameters is None:
        args.ddp_find_unused_parameters = False  # every parameter gets a gradient, be it zero
    return args


def _check_sharded(trainer: DistillTrainer) -> None:
    """On a CPU Accelerate takes `fsdp=` and trains with DDP, without a word; and where weights are
    gathered for each pass, ranks that make different numbers of passes wait for ever.
    """
    accelerator = trainer.accelerator
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    sharded = trainer.is_fsdp_enabled or (plugin is not None and plugin.zero_stage == 3)
    writers = (trainer.rollout, getattr(trainer.rollout, "student", None))
    if sharded and any(isinstance(writer, InterleavedRollout) for writer in writers):
        raise TrainingError(
            "an interleaved rollout cannot be written by a sharded student: each rank makes passes "
            "of its own number. Train without FSDP and ZeRO 3 (DDP, ZeRO 2), or choose "
            "rollout.kind: sampled"
        )
    if trainer.args.fsdp and not trainer.is_fsdp_enabled:
        raise TrainingError(
            "training.fsdp is set, but Accelerate did not shard the model (it does so on GPUs "
            "only); remove it or launch on GPUs"
        )
