"""How a teacher answers a question: part of most generators."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from llmdistill.recipe.base import Strict
from llmdistill.recipe.sampling import WritingRecipe
from llmdistill.recipe.sources import one_or_several
from llmdistill.recipe.tables import defaults

_system = defaults("instruct/generators/base.py", "SystemPrompt")
_answering = defaults("instruct/generators/base.py", "Answering")
_answer = defaults("instruct/generators/given.py", "Answer")


class SystemPromptRecipe(Strict):
    """A system prompt.  A text alone is short for `{text: ...}`."""

    text: str = Field(min_length=1)
    """The system prompt.  It stays in the rows."""
    weight: float = Field(_system.weight, gt=0)
    """How often this prompt is drawn in comparison with the others."""


def _by_text(given: Any) -> Any:
    return [{"text": one} if isinstance(one, str) else one for one in one_or_several(given)]


SystemPrompts = Annotated[list[SystemPromptRecipe], BeforeValidator(_by_text)]


class AnsweringRecipe(Strict):
    """How the teacher answers a question."""

    sampling: WritingRecipe = WritingRecipe(**_answering.sampling)
    """How the answer is sampled."""
    max_new_tokens: int = Field(_answering.max_new_tokens, gt=0)
    """Length at which an answer is cut off, in tokens."""
    hint: str = _answering.hint
    """Text that is appended to the prompt for the teacher only and not saved in the row, such as
    `Answer in two sentences.`
    """
    system: SystemPrompts = []
    """System prompts: one text, or a list of texts or `{text: ..., weight: ...}`.  One is drawn for
    each call and saved in the row.  `magpie` writes its questions under it, too.  A given prompt
    with a system message keeps its own.
    """
    json_schema: dict[str, Any] | None = None
    """JSON schema that a server makes the answer follow (structured output).  Other answers are
    dropped.  Only a teacher of kind `remote` can do it.
    """


class DrawnAnsweringRecipe(AnsweringRecipe):
    """How the teacher answers a given prompt.  Answers are sampled by default, and not greedy."""

    sampling: WritingRecipe = WritingRecipe(**_answer.answering["sampling"])
    """How each answer is sampled.  Several samples need a temperature above 0."""
