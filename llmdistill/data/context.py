"""Whether the rows of a run, and what is written after them, fit the context of its models.

N = rows.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from llmdistill import recipe
from llmdistill.data.collate import FIRST_ROWS, EncodedRows, PromptDataset
from llmdistill.data.table import Rows
from llmdistill.errors import ModelError, RecipeError
from llmdistill.models.load import load_config

logger = logging.getLogger("llmdistill")


class Longest(NamedTuple):
    """The longest text of a kind in tokens, and the keys that make it shorter."""

    what: str
    tokens: int
    keys: str


def require_context(
    whole: recipe.Recipe, train: EncodedRows, held: PromptDataset | None = None
) -> None:
    """Raise RecipeError if a text is longer than the positions that a model has learned.

    Models with rotary positions can read on, but were not trained to: a warning says so.
    """
    student = (whole.student.model, whole.student.revision)
    models = [("student", *student), *(("teacher", *one) for one in whole.teacher_sources)]
    longest = list(_longest(whole, train, held))
    for who, name, revision in dict.fromkeys(models):
        try:
            config = load_config(name, revision=revision).get_text_config()
        except ModelError:  # a run before this one makes it, or loading it gives the better error
            continue
        limit = getattr(config, "max_position_embeddings", None)
        too_long = [one for one in longest if limit and one.tokens > limit]
        if not too_long:
            continue
        one = max(too_long, key=lambda found: found.tokens)
        message = (
            f"{who} '{name}' reads {limit} tokens (max_position_embeddings), but {one.what} can "
            f"have {one.tokens}. Lower {one.keys}."
        )
        if not can_read_on(config):
            raise RecipeError(message)
        logger.warning("%s It was not trained on longer texts.", message)


def can_read_on(config: Any) -> bool:
    """Whether a model computes its positions as it reads, so that a longer text is no error."""
    # GPT-J and CodeGen also rotate, but look their angles up in a table of that length.
    rotates = any(getattr(config, name, None) for name in ("rope_parameters", "rope_theta"))
    return rotates or config.model_type in ("rwkv", "xglm")


def room(config: Any, new_tokens: int) -> float:
    """Return how many tokens a prompt may have before this many new ones; inf without a limit.

    `config` is that of the text model.  A model that can read on gets no prompt beyond its context.
    """
    limit = getattr(config, "max_position_embeddings", None)
    return limit - (1 if can_read_on(config) else new_tokens) if limit else math.inf


def _longest(
    whole: recipe.Recipe, train: EncodedRows, held: PromptDataset | None
) -> Iterator[Longest]:
    """Yield the longest text of each kind that a model of the run reads."""
    rows = train.rows if isinstance(train, PromptDataset) else Rows.of(train.head(FIRST_ROWS))
    prompts_N = np.maximum(rows.lengths("prompt_ids"), rows.lengths("teacher_prompt_ids"))
    if whole.rollout.takes_data:
        both = int((prompts_N + rows.lengths("response_ids")).max(initial=0))
        keys = "data.max_prompt_tokens or data.max_response_tokens"
        yield Longest("a prompt with its response", both, keys)
    if new := whole.rollout.new_tokens:
        keys = "data.max_prompt_tokens or rollout.max_new_tokens"
        what = "a prompt with what is written after it"
        yield Longest(what, int(prompts_N.max(initial=0)) + new, keys)
    if held is not None and len(held):
        asked = int(held.rows.lengths("prompt_ids").max())
        keys = "data.max_prompt_tokens or evaluate.max_new_tokens"
        what = "a held-out prompt with its answer"
        yield Longest(what, asked + whole.evaluate.max_new_tokens, keys)
