"""Measures a student as the draft model of its teacher.

This is speculative decoding (Leviathan et al. 2023), which transformers calls assisted generation.
In each round the student drafts up to DRAFTED tokens, and the teacher judges them in one pass.  It
accepts the drafts up to the first one that it rejects, and writes the next token itself.  A draft
behind a rejected one is thrown away without a judgement.

The rounds are counted from outside.  A hook on the teacher sees the drafts of each pass, and they
are compared with the finished text: a rejected draft is always replaced by another token, so the
accepted drafts are those with which the text goes on.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from llmdistill.batch import Prompts
from llmdistill.decoding.sample import blank_generation_config
from llmdistill.errors import ModelError
from llmdistill.models.heads import eval_mode
from llmdistill.models.vocabulary import num_tokens
from llmdistill.teachers.local import LocalTeacher

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DRAFTED = 5  # tokens that the student drafts before each pass of the teacher
ROWS = 16  # prompts that are used, from the first: each is written four times, one at a time
WARM_UP_TOKENS = 8  # the warm-up is not counted

# The student always drafts DRAFTED tokens.  By default transformers changes their number as it
# goes, from how sure the draft model is.
DRAFTING = {
    "num_assistant_tokens": DRAFTED,
    "num_assistant_tokens_schedule": "constant",
    "assistant_confidence_threshold": 0.0,
}
# All fields that change the distribution are set, because `generate` has other defaults.
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampled": {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0},
}


@dataclass(frozen=True)
class Speculation:
    """What drafts are worth when the teacher writes in one way.

    `acceptance` is the share of the judged drafts that the teacher accepted.  `drafts_used` is the
    share of all drafts, with those behind a rejected one.  `tokens_per_pass` is the number of new
    tokens per pass of the teacher; without drafts it is 1.  `tokens_per_second_alone` is the speed
    of the teacher without drafts, and `speed_ratio` what drafts multiply it by.
    """

    acceptance: float
    drafts_used: float
    tokens_per_pass: float
    tokens_per_second: float
    tokens_per_second_alone: float
    speed_ratio: float


@dataclass(frozen=True)
class Speculative:
    """What a student is worth as a draft model: for greedy text and for text at temperature 1."""

    greedy: Speculation
    sampled: Speculation


class Counts(NamedTuple):
    """Numbers of drafted tokens, and of those that were judged and accepted."""

    drafted: int
    judged: int
    accepted: int


class Text(NamedTuple):
    """A response of the teacher, how long it took, and the ids that each pass has read."""

    ids: list[int]
    seconds: float
    passes: list[list[int]]


def measure_drafts(
    teacher: LocalTeacher,
    student: PreTrainedModel,
    prompts: Prompts,
    *,
    max_new_tokens: int,
    seed: int,
) -> Speculative:
    """Let the teacher write the first ROWS prompts with and without drafts of the student.

    Raises ModelError if transformers cannot use the pair for assisted generation.
    """
    shared = num_tokens(teacher.tokenizer)
    some = prompts.ids()[:ROWS]
    options = {
        "eos_token_id": sorted(teacher.ends),
        "pad_token_id": teacher.tokenizer.pad_token_id,
    }
    with (
        teacher.in_use() as model,
        _alike(model, shared),
        _alike(student, shared),
        eval_mode(student),
        blank_generation_config(model),
        blank_generation_config(student, **DRAFTING),
        torch.random.fork_rng(),
    ):
        torch.manual_seed(seed)  # assisted generation draws from the global generator
        found = {
            way: _measured(model, student, some, max_new_tokens, options | fields)
            for way, fields in WAYS.items()
        }
    return Speculative(**found)


def _measured(
    model: PreTrainedModel,
    student: PreTrainedModel,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    options: dict[str, Any],
) -> Speculation:
    for draft in (None, student):
        _write(model, draft, prompts[0], options | {"max_new_tokens": WARM_UP_TOKENS})
    options = options | {"max_new_tokens": max_new_tokens}
    alone, drafted = [], []
    for prompt in prompts:  # in turn, so that whatever else the machine does slows both
        alone.append(_write(model, None, prompt, options))
        drafted.append(_write(model, student, prompt, options))
    counts = [
        count(text.passes, len(prompt), text.ids)
        for prompt, text in zip(prompts, drafted, strict=True)
    ]
    all_drafts, judged, accepted = map(sum, zip(*counts, strict=True))
    passes = sum(len(text.passes) for text in drafted)
    speed, speed_alone = _speed(drafted), _speed(alone)
    return Speculation(
        acceptance=accepted / max(judged, 1),
        drafts_used=accepted / max(all_drafts, 1),
        tokens_per_pass=sum(len(text.ids) for text in drafted) / passes,
        tokens_per_second=speed,
        tokens_per_second_alone=speed_alone,
        speed_ratio=speed / speed_alone,
    )


def count(passes: Sequence[list[int]], prompt_length: int, text: list[int]) -> Counts:
    """Count the drafts of one response.

    `passes` are the ids that the teacher read in each pass: first the prompt and the drafts, then
    the newest token and the drafts.  `text` is the response.
    """
    drafted = judged = accepted = place = 0
    for number, ids in enumerate(passes):
        drafts = ids[1:] if number else ids[prompt_length:]
        pairs = zip(drafts, text[place:], strict=False)
        taken = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
        drafted += len(drafts)
        judged += min(taken + 1, len(drafts))  # the first that is rejected was judged, too
        accepted += taken
        place += taken + 1  # the teacher writes the next token itself
    return Counts(drafted, judged, accepted)


def _write(
    model: PreTrainedModel,
    draft: PreTrainedModel | None,
    prompt: list[int],
    options: dict[str, Any],
) -> Text:
    from transformers import GenerationConfig

    ids = torch.tensor([prompt], device=model.device)
    passes: list[torch.Tensor] = []

    def read(_module: object, _inputs: object, named: dict[str, Any]) -> None:
        passes.append(named["input_ids"][0])  # copied after the clock has stopped

    hook = model.register_forward_pre_hook(read, with_kwargs=True)
    start = time.perf_counter()
    try:
        written = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            generation_config=GenerationConfig(use_cache=True, **options),
            assistant_model=draft,
        )
        text = written[0, len(prompt) :].tolist()  # waits for the device
        seconds = time.perf_counter() - start
    except ValueError as error:
        raise ModelError(
            f"cannot draft for '{model.config.name_or_path}' with this student: {error} Measure "
            "them without speculative decoding."
        ) from error
    finally:
        hook.remove()
    return Text(text, seconds, [one.tolist() for one in passes])


def _speed(texts: Sequence[Text]) -> float:
    return sum(len(text.ids) for text in texts) / sum(text.seconds for text in texts)


@contextlib.contextmanager
def _alike(model: PreTrainedModel, shared: int) -> Iterator[None]:
    """Let a model score only the first `shared` ids.

    Heads may have different numbers of padding rows, which transformers takes for different
    vocabularies.
    """

    def narrow(_module: object, _inputs: object, output: Any) -> Any:
        output.logits = output.logits[..., :shared]
        return output

    config = model.config.get_text_config()
    own, config.vocab_size = config.vocab_size, shared
    hook = model.register_forward_hook(narrow)
    try:
        yield
    finally:
        hook.remove()
        config.vocab_size = own
