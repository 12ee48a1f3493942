"""A Trainer that saves, loads and publishes the student alone, although it trains more than that.

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
    """Trainer of a `Distillation` whose checkpoints, exports and pushes hold the student.

    `model_card` is the text of the README.md that is pushed with the student.
    """

    model: Distillation
    rollout: Rollout
    model_card: str | None
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

    # ---- the Hub: the student alone ----

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write `model_card` next to the student; without one, write nothing."""
        if self.is_world_process_zero() and self.model_card is not None:
            folder = _export_folder(self)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "README.md").write_text(self.model_card, encoding="utf-8")

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Export the student and upload its folder; Trainer would upload the whole output folder.

        Call it on every rank.  The arguments are those of Trainer.  Returns the commit, or a future
        of it if not `blocking`.  Returns None on all ranks but the first.
        """
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        folder = _export_folder(self)
        self.export_student(folder)
        self.create_model_card()
        if not self.is_world_process_zero():
            return None
        return self._upload(
            folder, commit_message, token or self.args.hub_token, revision, blocking
        )

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Upload a checkpoint's student, if `hub_strategy` asks for more than the end.

        Trainer would copy weights into the output folder and push that, pickled arguments included.
        """
        if self.is_world_process_zero() and self.args.hub_strategy != "end":
            message = f"Training in progress, step {self.state.global_step}"
            folder = Path(checkpoint_folder)
            # Blocking: with `save_total_limit` Trainer may delete this folder at a later save.
            self._upload(folder, message, self.args.hub_token, None, blocking=True)

    def _upload(
        self,
        folder: Path,
        message: str | None,
        token: str | None,
        revision: str | None,
        blocking: bool,
    ) -> Any:
        """Upload `folder` without the files that only resuming needs."""
        from huggingface_hub import HfApi

        options: dict[str, Any] = {"run_as_future": not blocking}
        return HfApi().upload_folder(
            repo_id=str(self.hub_model_id),
            folder_path=folder,
            commit_message=message,
            token=token,
            revision=revision or self.args.hub_revision,
            ignore_patterns=checkpoint.TRAINING_ONLY,
            **options,
        )


def _export_folder(trainer: StudentTrainer) -> Path:
    return Path(trainer.args.output_dir) / "student"
