"""A Trainer that saves, loads and exports the student alone, although it trains more than that.

`checkpoint.py` defines the files.  This module overrides the methods in which Trainer reads and
writes them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from transformers import Trainer

from llmdistill.models.sharding import has_sharded_weights, register_head, settle_precision
from llmdistill.protocols import Rollout
from llmdistill.training import checkpoint
from llmdistill.training.step import Distillation


class StudentTrainer(Trainer):
    """Trainer of a `Distillation` whose checkpoints and exports hold the student."""

    model: Distillation
    rollout: Rollout
    merge_adapter: bool
    export_dtype: torch.dtype | None

    # ---- sharding ----

    def _prepare_for_training(self, *args: Any) -> Any:
        """Let FSDP2 gather weights for the student's writing, as it does for a forward pass."""
        settle_precision(self.accelerator)
        prepared = super()._prepare_for_training(*args)
        register_head(self.model)
        if isinstance(self.model, FSDPModule):
            register_fsdp_forward_method(self.model, "with_whole_weights")
        return prepared

    # ---- checkpoints: the student apart from the rest ----

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the student and the other trained parts; every rank calls it.

        Under FSDP2 Trainer would write them only with FULL_STATE_DICT.
        """
        if not self.is_fsdp_enabled:
            return super().save_model(output_dir, _internal_call)
        self._save(output_dir, self.accelerator.get_state_dict(self.model))

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Write the student and the other trained parts as separate files.

        Trainer would save the whole module, which raises for tied weights, and pickle its
        arguments with the Hub token in them.
        """
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        checkpoint.save_student(self.model, folder, state_dict)
        checkpoint.save_parts(self.model, folder, state_dict)

    def _save_rng_state(self, output_dir: str) -> None:
        """Write this rank's random state and the state of its rollout."""
        # Trainer calls this method on every rank, unlike `_save`.
        super()._save_rng_state(output_dir)
        checkpoint.save_rollout(self.rollout, Path(output_dir), self._rank())

    def _is_sharded(self) -> bool:
        """Whether FSDP or DeepSpeed has wrapped the model, so that it reads their files."""
        wrapped = has_sharded_weights(self.model) or self.model_wrapped is not self.model
        return wrapped and (self.is_fsdp_enabled or self.is_deepspeed_enabled)

    def _rank(self) -> int | None:
        """Rank for file names; None if there is one process, as in Trainer's own names."""
        return self.args.process_index if self.args.world_size > 1 else None

    def _init_training_state(
        self, max_steps: Any, per_epoch: Any, epochs: Any, folder: str | None, trial: Any
    ) -> tuple[int, int]:
        """Load what is no weight of the module: this rank's rollout, and a teacher that follows.

        Trainer calls this method with and without sharding, unlike `_load_from_checkpoint`.
        """
        if folder is not None:
            checkpoint.load_rollout(self.rollout, Path(folder), self._rank())
            checkpoint.load_follower(self.model.teacher, Path(folder))
        return super()._init_training_state(max_steps, per_epoch, epochs, folder, trial)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: torch.nn.Module | None = None
    ) -> None:
        """Load a checkpoint's weights.

        Trainer would load with strict=False, and nothing: no name in the file has a prefix.
        """
        if self._is_sharded():
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        checkpoint.load(self.model, Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        """Load the best checkpoint's weights, for the reason given in `_load_from_checkpoint`."""
        if self._is_sharded():
            return super()._load_best_model()
        assert self.state.best_model_checkpoint is not None
        checkpoint.load(self.model, Path(self.state.best_model_checkpoint))

    def export_student(self, folder: str | Path) -> None:
        """Write the student to `folder` in the format that `from_pretrained` loads.

        Every rank calls it; the first one writes.  The files are `model.safetensors` (or shards
        with an index), `config.json`, `generation_config.json`, and the tokenizer with its chat
        template.  Weights are in `export_dtype`.  A LoRA adapter is merged into its base model, or
        with `merge_adapter=False` saved alone, as `adapter_model.safetensors`.  Projectors, a
        trained teacher and the state of training are not exported.

        Args:
            folder: Folder to write to.  It is created, and files of the same names are replaced.

        Raises:
            ModelError: `merge_adapter` is True, but the adapter is not plain LoRA.
        """
        with self.model.exported_weights():
            # Gathering sharded weights is a collective call, so every rank has to make it.
            wrapped, sharded = self.model_wrapped, self._is_sharded()
            state = self.accelerator.get_state_dict(wrapped) if sharded else self.model.state_dict()
            if self.args.should_save:
                merged, dtype = self.merge_adapter, self.export_dtype
                checkpoint.export(self.model, Path(folder), state, merged=merged, dtype=dtype)
