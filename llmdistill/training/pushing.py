"""A Trainer that uploads the student while it trains, and that no upload can stop.

While it trains, an upload runs in the background, from a folder of links that stay whole if Trainer
deletes the checkpoint.  A failed one is a warning.  The last one is for the caller, who can repeat
it.
"""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path
from typing import Any

from transformers import TrainingArguments
from transformers.utils import PushInProgress

from llmdistill import uploads
from llmdistill.errors import HubError, RecipeError
from llmdistill.recipe.facts import wrong_strategy
from llmdistill.training.saving import StudentTrainer
from llmdistill.uploads import CARD, Repository

logger = logging.getLogger("llmdistill")

ALLOW = "set training.hub_private_repo: false"
CHECKPOINTS = "checkpoints"  # of every run, so it names none
NO_CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags:
- distillation
- llmdistill
---

This is a causal language model that was distilled with [llmdistill](https://pypi.org/project/llmdistill/).
It has no model card yet.
"""


class PushingTrainer(StudentTrainer):
    """StudentTrainer that pushes the student and its card, and nothing else.

    `model_card` is the text of the README.md that is pushed with the student.
    """

    model_card: str | None
    push_in_progress: PushInProgress | None = None

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Make sure that the repository exists: private, unless the arguments say otherwise.

        Trainer would make a public one, named after the folder of the checkpoints.  Raises HubError
        and RecipeError as `prepare` does.
        """
        if self.is_world_process_zero():
            self.hub_model_id = prepare(self.args, token=token, private=private).name

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write `model_card` next to the student, or a short one that says that there is none."""
        if self.is_world_process_zero():
            folder = _export_folder(self)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / CARD).write_text(self.model_card or NO_CARD, encoding="utf-8")

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

        Call it on every rank.  The arguments are those of Trainer.  Returns the address, or a
        future of it if not `blocking`.  Returns None on all ranks but the first.  Raises HubError
        if the upload fails.
        """
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        self._finish_current_push()
        self.export_student(_export_folder(self))
        self.create_model_card()
        if not self.is_world_process_zero():
            return None
        return self._upload(_export_folder(self), commit_message, token, revision, blocking)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Upload a checkpoint's student in the background, if `hub_strategy` asks for it.

        Trainer would copy weights into the output folder and push that, pickled arguments included.
        """
        if not self.is_world_process_zero() or self.args.hub_strategy == "end":
            return
        step = self.state.global_step
        if self.push_in_progress is not None and not self.push_in_progress.is_done():
            if not self.args.hub_always_push:
                logger.warning(
                    "the checkpoint of step %d is not uploaded, because another upload is still "
                    "under way (training.hub_always_push waits for it)", step,
                )  # fmt: skip
                return
            self._finish_current_push()
        message = f"Training in progress, step {step}"
        try:
            job = self._upload(Path(checkpoint_folder), message, None, None, blocking=False)
        except OSError as error:  # no room for a copy, where links are not possible
            logger.warning("an upload failed, and training goes on: %s", error)
            return
        self.push_in_progress = PushInProgress([job])

    def _upload(
        self,
        folder: Path,
        message: str | None,
        token: str | None,
        revision: str | None,
        blocking: bool,
    ) -> Any:
        """Upload the model in `folder` with our card, from links to its files."""
        from huggingface_hub import HfApi

        files: dict[str, Path | str] = {**uploads.belonging(folder, uploads.MODEL_FILES)}
        files[CARD] = self.model_card or NO_CARD  # PEFT's own card has local paths
        place = Path(self.args.output_dir) / "uploading"
        shutil.rmtree(place, ignore_errors=True)  # of a killed start
        uploads.stage(files, place, link=os.link)
        repository = Repository(str(self.hub_model_id), token=token or self.args.hub_token)

        def upload() -> str:
            try:
                return repository.upload(
                    place,
                    message=message or "Upload a student of llmdistill",
                    revision=revision or self.args.hub_revision,
                    replaces=uploads.WEIGHTS,
                )
            except HubError as error:
                if not blocking:
                    logger.warning("an upload failed, and training goes on: %s", error)
                raise
            finally:
                shutil.rmtree(place, ignore_errors=True)

        return upload() if blocking else HfApi().run_as_future(upload)


def prepare(
    args: TrainingArguments, *, token: str | None = None, private: bool | None = None
) -> Repository:
    """Create the repository of a run, if it does not exist, and return it with its full name.

    Raises HubError if it cannot be used, and RecipeError if `args` ask for what is not uploaded.
    """
    if wrong := wrong_strategy(args.hub_strategy):
        raise RecipeError(f"training.hub_strategy: {wrong}")
    name = repository_name(args.hub_model_id, Path(args.output_dir))
    asked = private if private is not None else args.hub_private_repo
    return Repository(name, token=token or args.hub_token).prepare(
        private=asked is not False, allow=ALLOW
    )


def repository_name(asked: str | None, output: Path) -> str:
    """Return the name that is asked for, or the one of the run that writes to a folder."""
    folder = output.resolve()
    return asked or (folder.parent if folder.name == CHECKPOINTS else folder).name


def _export_folder(trainer: StudentTrainer) -> Path:
    return Path(trainer.args.output_dir) / "student"
