"""Compares what teacher and student read: the rows of a run, rendered with both tokenizers.

Templates are not compared themselves.  Different templates are fine for a run whose rows they
render alike, and equal ones can differ in what their tokenizers add.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from llmdistill.data.formats import Example
from llmdistill.data.render import render
from llmdistill.errors import DataError, VocabularyError
from llmdistill.models.thinking import THINKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

EACH = 8  # rows of one shape that are compared if both sides have one template
SHOWN = 24  # tokens around the first difference that an error shows
A_DATE = "26 Jul 2024"  # tried as `date_string`, which Llama's and others' templates read


class Pairing:
    """Checks that teachers render the rows of a run as the student does.

    Every row is compared, or the first few of each shape (roles, tools and thinking) if the
    template and the special tokens are the same on both sides.
    """

    def __init__(
        self,
        student: PreTrainedTokenizerBase,
        teachers: Sequence[PreTrainedTokenizerBase],
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self.student, self.teachers, self.options = student, list(teachers), dict(options or {})
        self.compared: Counter[Any] = Counter()
        self.samples = all(_alike(student, teacher) for teacher in self.teachers)

    def check(self, example: Example) -> None:
        """Raise VocabularyError if a teacher renders the example as other tokens."""
        shape = _shape(example)
        if not self.teachers or (self.samples and self.compared[shape] >= EACH):
            return
        self.compared[shape] += 1
        for teacher in self.teachers:
            found = difference(teacher, self.student, example, self.options)
            if found is not None:
                raise VocabularyError(
                    f"{example.place}: teacher '{teacher.name_or_path}' and student "
                    f"'{self.student.name_or_path}' render this row as different tokens, so the "
                    f"teacher would score text that it does not expect. {found} "
                    f"{_advice(teacher, self.student, example, self.options)}"
                )


def _alike(one: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> bool:
    """Whether two tokenizers have the same template and special tokens."""
    same = one.chat_template == other.chat_template
    return same and one.special_tokens_map == other.special_tokens_map


def difference(
    teacher: PreTrainedTokenizerBase,
    student: PreTrainedTokenizerBase,
    example: Example,
    options: Mapping[str, Any],
) -> str | None:
    """Return where two tokenizers render an example differently, or None if they do not."""
    ours, theirs = (_whole(one, example, options) for one in (teacher, student))
    if ours == theirs:
        return None
    if isinstance(ours, str) or isinstance(theirs, str):
        who, why = ("teacher", ours) if isinstance(ours, str) else ("student", theirs)
        return f"The {who}'s tokenizer cannot render it: {str(why).partition('. ')[0]}."
    pairs = enumerate(zip(ours, theirs, strict=False))
    first = next((i for i, (a, b) in pairs if a != b), min(len(ours), len(theirs)))
    before = teacher.decode(ours[max(first - SHOWN // 2, 0) : first])
    here = [
        f"the {who} {one.decode(ids[first : first + SHOWN])!r}"
        for who, one, ids in (("teacher", teacher, ours), ("student", student, theirs))
    ]
    return f"After {before!r}, {here[0]} and {here[1]}."


def _whole(
    tokenizer: PreTrainedTokenizerBase, example: Example, options: Mapping[str, Any]
) -> list[int] | str:
    """Return all ids of an example, or the reason why it cannot be rendered."""
    try:
        prompt, response = render(tokenizer, example, options)
    except DataError as error:
        return str(error).removeprefix(f"{example.place}: ").rstrip(".")
    return [*prompt, *(response or [])]


def _advice(
    teacher: PreTrainedTokenizerBase,
    student: PreTrainedTokenizerBase,
    example: Example,
    options: Mapping[str, Any],
) -> str:
    """Return the recipe key that makes both render an example alike."""
    dated = {**options, "date_string": A_DATE}
    if difference(teacher, student, example, dated) is None:
        return (
            "They write different dates. Give both the same one: data.chat_template_kwargs: "
            f"{{date_string: {A_DATE}}}."
        )
    return (
        "Set student.tokenizer: teacher to train, measure and export the student with the "
        "teacher's tokenizer and template, or choose another pair."
    )


def _shape(example: Example) -> Any:
    """Return what decides how a template writes an example, except its texts."""
    messages = [*example.prompt, example.answer] if example.response is not None else example.prompt
    fields = ("tool_calls", *THINKING)
    return (
        bool(example.tools),
        *((one["role"], *(name for name in fields if one.get(name))) for one in messages),
    )
