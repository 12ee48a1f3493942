"""TrainingArguments that a distillation forces, and checks of those that cannot work with it."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from accelerate.utils import DynamoBackend
from torch.distributed.fsdp import CPUOffloadPolicy
from transformers import TrainingArguments

from llmdistill.errors import TrainingError
from llmdistill.models.layers import decoder_layers
from llmdistill.models.taps import STATES, Need, layers_seen_inside
from llmdistill.objectives.augment import AugmentedObjective
from llmdistill.objectives.base import Objective
from llmdistill.protocols import Exports
from llmdistill.training.launched import asked_by_launcher, require_all_processes
from llmdistill.training.step import Distillation

if TYPE_CHECKING:
    from llmdistill.training.trainer import DistillTrainer

logger = logging.getLogger("llmdistill")


def settle(trainer: DistillTrainer) -> None:
    """Check what can be checked once Accelerate is set up, and set up the models as `args` asks."""
    require_all_processes()
    requested = bool(trainer.args.fsdp) or asked_by_launcher()
    check_sharding(trainer.model, sharded=is_sharded(trainer), requested=requested)
    _check_offload(trainer)
    if trainer.is_deepspeed_enabled:
        _check_deepspeed(trainer.model, sharded=is_sharded(trainer))
    trained = trainer.model.trained_teacher
    check_arguments(trainer.args, trainer.model)
    if trainer.args.activation_checkpointing and trained is not None:
        trained.enable_checkpointing()  # Trainer does it for the student
    compile_layers(trainer)


def compile_layers(trainer: DistillTrainer) -> None:
    """Compile the student's decoder layers if `torch_compile` is set.

    A layer whose inner states are taken is not compiled, because its hooks would not run.
    """
    args, model = trainer.args, trainer.model
    if args.torch_compile:
        # Accelerate would compile the whole step, and fail on it.
        trainer.accelerator.state.dynamo_plugin.backend = DynamoBackend.NO
        needs = model.student_needs
        # A teacher may run the student's own layers, so its hooks are on them, too.
        if getattr(model.teacher, "model", None) is model.student:
            needs = needs | model.teacher_needs
        plain = layers_seen_inside(model.student, needs)
        for layer in decoder_layers(model.student):
            if not any(layer is other for other in plain):
                layer.compile(backend=args.torch_compile_backend, mode=args.torch_compile_mode)


def forced(args: TrainingArguments, distillation: Distillation) -> TrainingArguments:
    """Return `args`, changed in place, with the values that a distillation cannot do without."""
    # Trainer would compare the rows' fields with the signature of our forward, and raise.
    args.remove_unused_columns = False
    # The filter would hide a NaN loss from the log.  The guard stops the run instead.
    args.logging_nan_inf_filter = False
    # Accelerate would read a stream on one rank and slice its batches for the others.  It slices
    # tensors, not `Prompts`.
    args.accelerator_config.dispatch_batches = False
    if args.device.type == "cpu":  # there is no GPU to copy to, and torch would warn
        args.dataloader_pin_memory = False
    if args.n_gpu > 1:  # without a launcher Trainer would use DataParallel, which cannot scatter
        logger.warning(
            "using one GPU of %d. Start the run with `accelerate launch` to use them all.",
            args.n_gpu,
        )
        args._n_gpu = 1
    if args.ddp_find_unused_parameters is None:
        # DDP waits for a gradient of every parameter.  With a distribution each one gets a
        # gradient, even if it is zero.  Inner states alone leave the layers above them without one.
        # The loss of a trainable teacher sends no gradient to the student, so only the
        # needs of objectives count.
        args.ddp_find_unused_parameters = not any(
            isinstance(one, Objective)
            and one.reaches_the_head
            and Need.DISTRIBUTION in one.student_needs
            for one in distillation.objectives
        )
    return args


def check_batch(args: TrainingArguments, distillation: Distillation) -> None:
    """Raise TrainingError if a batch has fewer rows than an objective compares with each other."""
    sizes = {"train": args.train_batch_size * args.world_size}
    if args.eval_strategy != "no":
        sizes["eval"] = args.eval_batch_size  # an evaluation compares the rows of one rank
    for objective in distillation.objectives:
        assert isinstance(objective, Objective)
        if sizes["train"] < objective.advised_rows:
            logger.warning(
                "objective '%s' contrasts the rows of a batch with each other, and a batch has %d. "
                "It should have %d or more: raise training.per_device_train_batch_size.",
                objective.name,
                sizes["train"],
                objective.advised_rows,
            )
        # A held-out loss on changed inputs is that of the wrapped objective on the unchanged ones.
        held_out = objective.inner if isinstance(objective, AugmentedObjective) else objective
        for phase, rows in sizes.items():
            least = (objective if phase == "train" else held_out).least_rows
            if rows < least:
                raise TrainingError(
                    f"objective '{objective.name}' compares at least {least} rows "
                    f"with each other, but a batch has {rows} (training.per_device_{phase}_"
                    f"batch_size on {args.world_size} processes). Raise it. Gradient accumulation "
                    "does not help, because each micro-batch is compared alone."
                )


def check_arguments(args: TrainingArguments, distillation: Distillation) -> None:
    """Raise TrainingError if batches or activation checkpointing cannot work as set."""
    if args.accelerator_config.split_batches:
        raise TrainingError(
            "training.accelerator_config: split_batches would deal out the rows in another way "
            "than the loss counts them. Remove it, and set per_device_train_batch_size to the rows "
            "of one rank."
        )
    if args.world_size > 1 and not args.accelerator_config.even_batches:
        raise TrainingError(
            "training.accelerator_config: without even_batches a rank that runs out of rows would "
            "leave the others waiting. Remove it; rows that fill up a batch have no loss."
        )
    if args.fp16 and args.device.type == "cpu":
        raise TrainingError("training.fp16 does nothing on a CPU. Use bf16, or remove it.")
    check_checkpointing(args, distillation)
    check_batch(args, distillation)


def is_sharded(trainer: DistillTrainer) -> bool:
    """Whether weights are sharded and gathered for each forward pass (FSDP or ZeRO-3)."""
    plugin = getattr(trainer.accelerator.state, "deepspeed_plugin", None)
    return trainer.is_fsdp_enabled or (plugin is not None and plugin.zero_stage == 3)


def check_sharding(model: Distillation, *, sharded: bool, requested: bool) -> None:
    """Raise TrainingError if sharding was requested but not done, or cannot work.

    `sharded` is whether Accelerate shards the model, `requested` whether `args.fsdp` or the
    launcher asks for it.
    """
    teacher = model.teacher
    if sharded and getattr(teacher, "model", None) is model.student:
        raise TrainingError(
            f"a {type(teacher).__name__} runs the student's own model, which does not work with "
            "FSDP or ZeRO-3, because its weights are sharded. Train with DDP or ZeRO-2."
        )
    if sharded and isinstance(teacher, Exports):
        raise TrainingError(
            f"a {type(teacher).__name__} is written when training ends, which does not work with "
            "FSDP or ZeRO-3, because its weights are sharded. Train with DDP or ZeRO-2."
        )
    if sharded and any(getattr(one, "export", None) is not None for one in model.objectives):
        raise TrainingError(
            "an objective exports a part of the student, which does not work with FSDP or ZeRO-3, "
            "because its weights are sharded. Remove 'export', or train with DDP or ZeRO-2."
        )
    # On a CPU Accelerate accepts `fsdp` and trains with DDP without a warning.
    if requested and not sharded:
        raise TrainingError(
            "FSDP is asked for, but Accelerate did not shard the model, because it shards only on "
            "GPUs. Remove training.fsdp and use_fsdp of the launcher, or launch on GPUs."
        )


def _check_deepspeed(model: Distillation, *, sharded: bool) -> None:
    """Raise TrainingError if a part of the loss does not work with DeepSpeed."""
    trained = model.trained_teacher
    if trained is not None and callable(trained.weight):
        raise TrainingError(
            "with DeepSpeed the teacher must learn in each step with the same weight, because the "
            "optimizer would move it in the others, too. Train with DDP."
        )
    for one in model.objectives:
        if sharded and isinstance(one, AugmentedObjective) and one.differentiates_inputs:
            raise TrainingError(
                f"objective '{one.name}' makes a backward pass within the forward pass, which does "
                "not work with DeepSpeed's ZeRO-3. Train with DDP, ZeRO-2 or FSDP2."
            )


def _check_offload(trainer: DistillTrainer) -> None:
    """Raise TrainingError if FSDP keeps the weights on the CPU, where the student cannot write."""
    plugin: Any = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    if isinstance(getattr(plugin, "cpu_offload", None), CPUOffloadPolicy):
        raise TrainingError(
            "FSDP keeps the student's weights on the CPU (fsdp_offload_params), from where it "
            "cannot write. Set fsdp_offload_params: false."
        )


def check_checkpointing(args: TrainingArguments, distillation: Distillation) -> None:
    """Raise TrainingError if reentrant checkpointing would lose the gradient of a state.

    Reentrant checkpointing first runs a layer without gradients.  A state that a hook takes inside
    the layer in that run has no gradient.  Hidden states between layers keep theirs.
    """
    options = args.activation_checkpointing_kwargs or {}
    reentrant = args.activation_checkpointing and options.get("use_reentrant")
    for one in distillation.objectives:
        if reentrant and isinstance(one, AugmentedObjective) and one.differentiates_inputs:
            raise TrainingError(
                "training.activation_checkpointing_kwargs: with use_reentrant the gradient by the "
                f"inputs, which objective '{one.name}' needs, cannot be computed. Remove "
                "use_reentrant."
            )
    inside = {need.kind for need in distillation.student_needs} & (STATES - {Need.HIDDEN})
    if reentrant and inside:
        raise TrainingError(
            f"training.activation_checkpointing_kwargs: with use_reentrant the student's "
            f"{', '.join(sorted(map(str, inside)))} would have no gradient. Remove use_reentrant."
        )
