"""What `llmdistill check` looks at: tokenizers, lengths, licences and disk, each in a few lines."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from rich.text import Text

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

    from llmdistill.data.collate import EncodedRows
    from llmdistill.data.table import Row
    from llmdistill.recipe import Recipe

BINS = 8  # of a histogram
BAR = 30  # characters of its longest bar
CONTROL, TRAINED, LOOKS_ALIKE = "cyan", "reverse", "yellow"


def tokenizer_in_words(tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> str:
    """Return the size of a tokenizer, the tokens that end a response, and what its template does.

    A model also ends at the tokens of its generation config, which may be in a file of the model.
    """
    from llmdistill.models.chat import template_ends

    listed = getattr(config, "eos_token_id", None)
    configured = listed if isinstance(listed, list) else [listed]
    ids = dict.fromkeys((*template_ends(tokenizer), tokenizer.eos_token_id, *configured))
    ends = [f"{tokenizer.convert_ids_to_tokens(one)} ({one})" for one in ids if one is not None]
    parts = [
        f"{len(tokenizer):,} tokens",
        f"a response ends at {' or '.join(ends) or 'no token'}",
        _template_in_words(tokenizer),
    ]
    return "; ".join(parts)


def _template_in_words(tokenizer: PreTrainedTokenizerBase) -> str:
    from llmdistill.errors import DataError
    from llmdistill.models.chat import ChatTemplate

    if not tokenizer.chat_template:
        return "no chat template, so prompts are plain text"
    template, question = ChatTemplate(tokenizer), {"role": "user", "content": "?"}

    def rendered(*messages: dict[str, str]) -> str | None:
        try:
            return template.text(messages, opens=False)
        except DataError:
            return None

    told = []
    alone = rendered(question)
    instructed = rendered({"role": "system", "content": "XYZ"}, question)
    if instructed is None or "XYZ" not in instructed:
        told.append("without system messages")
    elif alone is not None and "system" in alone:
        told.append("with a system message if a row has none")
    else:
        told.append("with system messages")
    text = str(tokenizer.chat_template)
    told.append("with tools" if "tools" in text else "without tools")
    if "enable_thinking" in text or "<think>" in text:
        told.append("with thinking")
    return f"chat template {', '.join(told)}"


def lengths(encoded: Sequence[Row], *, answers: bool) -> list[list[str]]:
    """Return a histogram of the tokens of each row, as rows of a table.

    `answers` tells whether the responses of the rows are read, and not only their prompts.
    """
    totals = [len(row.prompt_ids) + answers * len(row.response_ids or ()) for row in encoded]
    least, most = min(totals), max(totals)
    width = max(-(-(most - least + 1) // BINS), 1)
    counts = [0] * (-(-(most - least + 1) // width))
    for total in totals:
        counts[(total - least) // width] += 1
    rows = [["tokens", "rows", ""]]
    for place, count in enumerate(counts):
        start = least + place * width
        bar = ("█" * round(BAR * count / max(counts))).ljust(BAR)
        rows.append([f"{start} to {start + width - 1}", f"{count:,}", bar])
    return rows


def cut_in_words(train: EncodedRows) -> str:
    """Return which share of the rows was cut or dropped because of its length."""
    counts = train.counts
    examples = max(counts.examples, 1)
    shares = {
        "of the responses are cut": counts.responses_truncated,
        "of the rows are dropped: prompt too long": counts.long_prompts_dropped,
        "of the rows are dropped: response too long": counts.long_responses_dropped,
    }
    told = [f"{count / examples:.1%} {what}" for what, count in shares.items() if count]
    return ", ".join(told) or "no row is cut or dropped because of its length"


def licences(recipe: Recipe) -> Iterator[str]:
    """Yield the licence of each part that the student is made of, and what its card will state."""
    from llmdistill.publish.licences import SEVERAL, common, parts_of

    parts = parts_of(recipe)
    for part in parts:
        yield f"{part.what} {part.name}: {part.licence or 'could not be read'}"
    found = common(parts)
    reason = " (they differ, or could not be read)" if found.name == SEVERAL else ""
    yield f"the card will state: {found.id if reason else found}{reason}"


def disk(folder: Path, needed: float) -> tuple[str, bool]:
    """Return what a run writes at most and what is free, in words, and whether it fits."""
    place = folder.absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    free = shutil.disk_usage(place).free
    fits = needed < free
    told = f"{needed / 2**30:.2f} GiB at most, {free / 2**30:.0f} GiB free in {place}"
    return told if fits else f"{told}: too little", fits


def marked(row: Row, tokenizer: PreTrainedTokenizerBase, *, written: bool) -> Text:
    """Return the row as the student reads it, with the trained tokens in brackets and reversed.

    Control tokens have one colour.  A text that looks like a control token but is none has another
    one, and a backslash in front.
    """
    text = _shown(row.prompt_ids, tokenizer, "dim")
    if written or row.response_ids is None:
        return text.append("[written during the run]", style=TRAINED)
    text.append("[", style=TRAINED)
    text.append_text(_shown(row.response_ids, tokenizer, TRAINED))
    return text.append("]", style=TRAINED)


def _shown(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase, style: str) -> Text:
    from llmdistill.models.chat import special_tokens

    added, looks = tokenizer.added_tokens_decoder, special_tokens(tokenizer)
    text = Text()
    for is_added, some in groupby(ids, key=lambda one: one in added):
        part = str(tokenizer.decode(list(some)))
        if is_added:
            text.append(part, style=f"{CONTROL} {style}")
            continue
        end = 0
        for found in looks.finditer(part):
            text.append(part[end : found.start()], style=style)
            text.append(f"\\{found[0]}", style=f"{LOOKS_ALIKE} {style}")
            end = found.end()
        text.append(part[end:], style=style)
    return text
