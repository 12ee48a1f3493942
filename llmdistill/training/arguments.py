"""What a distillation sets in TrainingArguments, and which of them cannot work with it."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from accelerate.utils import DynamoBackend
from transformers import TrainingArguments

from llmdistill.errors import TrainingError
from llmdistill.models.layers import decoder_layers
from llmdistill.models.taps import STATES, Need, layers_seen_inside
from llmdistill.protocols import Rollout, steps_both_models
from llmdistill.training.step import Distillation

if TYPE_CHECKING:
    from llmdistill.training.trainer import DistillTrainer

logger = logging.getLogger("llmdistill")


def compile_layers(trainer: DistillTrainer) -> None:
    """`torch_compile` compiles the student's decoder layers.

    Accelerate would compile the whole step, and fail on it.  A layer of which something is taken
    from within stays as it is: its hooks would not be seen.
    """
    args, model = trainer.args, trainer.model
    if args.torch_compile:
        trainer.accelerator.state.dynamo_plugin.backend = DynamoBackend.NO
        needs = model.student_needs
        if getattr(model.teacher, "model", None) is model.student:  # its base teaches
            needs = needs | model.teacher_needs
        plain = layers_seen_inside(model.student, needs)
        for layer in decoder_layers(model.student):
            if not any(layer is other for other in plain):
                layer.compile(backend=args.torch_compile_backend, mode=args.torch_compile_mode)


def forced(args: TrainingArguments, distillation: Distillation) -> TrainingArguments:
    """The arguments with what a distillation cannot do without."""
    args.remove_unused_columns = False  # it would look at our module's forward, and raise
    args.logging_nan_inf_filter = False  # it would log NaN as 0.0; the guard stops instead
    args.accelerator_config.dispatch_batches = False  # batches are objects of ours
    if args.n_gpu > 1:  # DataParallel cannot scatter them; several GPUs need a launcher
        logger.warning("using one GPU of %d; `accelerate launch` uses them all", args.n_gpu)
        args._n_gpu = 1
    if args.ddp_find_unused_parameters is None:
        # With a distribution every parameter gets a gradient, be it zero.  Inner states alone leave
        # the layers above them without one.
        # A teacher's own loss sends none to the student.
        needs = [need for one in distillation.objectives for need in one.student_needs]  # type: ignore[union-attr]
        reaches_the_head = Need.DISTRIBUTION in needs
        args.ddp_find_unused_parameters = not reaches_the_head
    return args


def is_sharded(trainer: DistillTrainer) -> bool:
    """Are weights gathered for each forward pass?"""
    plugin = getattr(trainer.accelerator.state, "deepspeed_plugin", None)
    return trainer.is_fsdp_enabled or (plugin is not None and plugin.zero_stage == 3)


def check_sharding(rollout: Rollout, *, sharded: bool, requested: bool) -> None:
    """Raises TrainingError for sharding that was asked for and not made, or that cannot work.

    On a CPU Accelerate takes `fsdp=` and trains with DDP, without a word.
    """
    if sharded and steps_both_models(rollout):
        raise TrainingError(
            "interleaved rollouts do not work with FSDP or ZeRO 3: ranks run different numbers of "
            "forward passes and would wait for each other for ever. Train with DDP or ZeRO 2, or "
            "choose rollout.kind: sampled"
        )
    if requested and not sharded:
        raise TrainingError(
            "training.fsdp is set, but Accelerate did not shard the model (it does so on GPUs "
            "only); remove it or launch on GPUs"
        )


def check_checkpointing(args: TrainingArguments, distillation: Distillation) -> None:
    """Reentrant checkpointing first runs a layer without gradients: what is taken from within it
    has none.
    """
    options = args.activation_checkpointing_kwargs or {}
    inside = {need.kind for need in distillation.student_needs} & (STATES - {Need.HIDDEN})
    if args.activation_checkpointing and options.get("use_reentrant") and inside:
        raise TrainingError(
            f"training.activation_checkpointing_kwargs: with use_reentrant the student's "
            f"{', '.join(sorted(map(str, inside)))} would have no gradient; leave it out"
        )
