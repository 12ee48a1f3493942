"""Checks trackers, optimizers and the Hub before anything is measured."""

from __future__ import annotations

import os

from accelerate import PartialState
from transformers import TrainingArguments
from transformers.integrations import get_available_reporting_integrations

from llmdistill.errors import RecipeError
from llmdistill.training.launched import asked_by_launcher
from llmdistill.training.pushing import prepare
from llmdistill.training.trainer import DistillTrainer


def require_available(args: TrainingArguments) -> None:
    """Raise RecipeError if a tracker, an optimizer or a way of sharding cannot be used.

    The repository on the Hub is created, as Trainer would do after the measurements.  Raises
    HubError if it cannot be used.
    """
    known = {*get_available_reporting_integrations(), "none", "all"}
    for tracker in args.report_to:
        if tracker not in known:
            raise RecipeError(
                f"training.report_to: {tracker} is not installed. Install it with pip, or remove "
                "the key."
            )
    _require_optimizer(args)
    _require_sharding(args)
    if args.push_to_hub and PartialState().is_main_process:
        prepare(args)


def _require_optimizer(args: TrainingArguments) -> None:
    try:
        DistillTrainer.get_optimizer_cls_and_kwargs(args, None)
    except Exception as error:
        name = getattr(args.optim, "value", args.optim)
        # Some optimizers need the model, which Trainer gives them later.
        needs_model = args.optim_target_modules is not None or "lomo" in name
        if not needs_model or isinstance(error, ImportError) or "install" in str(error):
            raise RecipeError(f"training.optim: {name} cannot be used: {error}") from error


def _require_sharding(args: TrainingArguments) -> None:
    """Refuse the ways of sharding in which models cannot be loaded, written with or saved."""
    plugin = args.deepspeed_plugin
    if getattr(plugin, "zero_stage", None) == 3:
        options = plugin.deepspeed_config["zero_optimization"]
        if not options.get("stage3_gather_16bit_weights_on_model_save"):
            raise RecipeError(
                "ZeRO-3 would save no student. Set zero3_save_16bit_model: true in the "
                "configuration of accelerate, or stage3_gather_16bit_weights_on_model_save: true "
                "in that of DeepSpeed."
            )
    version = (args.fsdp_plugin_args or {}).get("fsdp_version")
    if asked_by_launcher() and not args.fsdp:
        version = int(os.environ.get("FSDP_VERSION", "1"))
    if version == 1:
        raise RecipeError(
            "FSDP1 gathers weights only in `forward`, so the student could not write. Set "
            "fsdp_version: 2 in the configuration of accelerate, or version: 2 in "
            "training.fsdp_config."
        )
