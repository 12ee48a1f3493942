"""The student's own base as its teacher: one model in memory, judged with its adapter switched
off.
"""

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
    """Judges and writes with the frozen weights that a PEFT student's adapter stands on.

    Raises ModelError for a student without an adapter.
    """

    def __init__(self, student: PeftModel, tokenizer: PreTrainedTokenizerBase) -> None:
        if not hasattr(student, "disable_adapter"):
            raise ModelError(
                f"{type(student).__name__} has no adapter that could be switched off, so its base "
                "cannot be the teacher. Set student.peft, or use a teacher of kind local."
            )
        self._take(student, tokenizer)

    @contextlib.contextmanager
    def in_use(self) -> Iterator[PreTrainedModel]:
        with super().in_use() as model, eval_mode(model), model.disable_adapter():
            yield model
