"""A teacher that is the student's base model, with the adapter switched off."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from llmdistill.errors import ModelError
from llmdistill.models.heads import eval_mode
from llmdistill.teachers.local import LocalTeacher

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class AdapterOffTeacher(LocalTeacher):
    """The frozen base model under a PEFT student's adapter, so that one model is in memory.

    `student` is the PEFT model that is trained, and `tokenizer` is its tokenizer.  Raises
    ModelError if the student has no adapter.
    """

    def __init__(self, student: PeftModel, tokenizer: PreTrainedTokenizerBase) -> None:
        if not hasattr(student, "disable_adapter"):
            raise ModelError(
                f"{type(student).__name__} has no adapter that could be switched off, so its base "
                "cannot be the teacher. Set student.peft, or use a teacher of kind local."
            )
        # Not `super().__init__`, which would freeze the student's adapter too.
        self._take(student, tokenizer)

    @contextlib.contextmanager
    def in_use(self) -> Iterator[PreTrainedModel]:
        """Give the student's model in eval mode, with its adapter switched off."""
        with super().in_use() as model, eval_mode(model), model.disable_adapter():
            yield model
