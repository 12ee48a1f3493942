"""Writing with transformers' `generate`, with keyed randomness in its last logits processor.

N = predicted tokens, T = tokens, B = sequences, P = prompt tokens, G = new tokens, H = hidden size,
V = vocabulary.  `generate` runs greedily over scores that already contain the noise, so it never
reaches its own warpers.  The model's own `generation_config` is hidden during the call, because
`generate` takes every field from it that the call does not set.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llmdistill.batch import Prompts, Sequences, TeacherSignal
from llmdistill.decoding.continuous import sample_continuously
from llmdistill.decoding.keyed import perturb, row_keys
from llmdistill.decoding.session import ready_to_write
from llmdistill.decoding.transfer import send
from llmdistill.distributions import Dense
from llmdistill.models.heads import split, unwrap_adapters
from llmdistill.models.sharding import has_sharded_weights
from llmdistill.models.vocabulary import end_ids, num_tokens
from llmdistill.sampling import Draw, PenalisedSampling, Sampling, Writer

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase


class KeyedSampler:
    """A logits processor that makes the drawn token the argmax of the scores.

    `prompt_length` is the width of the padded prompts, and `keys_B` has one key for each row.  Ids
    from `num_tokens` on, which the tokenizer does not use, are never drawn.
    """

    def __init__(
        self, prompt_length: int, sampling: Sampling, keys_B: Tensor, num_tokens: int
    ) -> None:
        self.prompt_length, self.sampling = prompt_length, sampling
        self.keys_B, self.num_tokens = keys_B, num_tokens

    def __call__(self, input_ids_BT: Tensor, scores_BV: Tensor) -> Tensor:
        slot = input_ids_BT.shape[1] - self.prompt_length
        # Padding rows of the head have no meaning; they are masked before top-k and top-p.
        scores_BV[:, self.num_tokens :] = -torch.inf
        if isinstance(self.sampling, PenalisedSampling):
            written_BG = input_ids_BT[:, self.prompt_length :]
            scores_BV = penalised(scores_BV, written_BG, self.sampling)
        return perturb(scores_BV, self.sampling, self.keys_B, slot)


def penalised(scores_BV: Tensor, written_BG: Tensor, sampling: PenalisedSampling) -> Tensor:
    """Return the scores less the penalties for the tokens that are already written: (B, V)."""
    count_BV = torch.zeros_like(scores_BV, dtype=torch.float32)
    count_BV.scatter_add_(1, written_BG, torch.ones_like(written_BG, dtype=torch.float32))
    once_BV = (count_BV > 0) * sampling.presence_penalty
    return scores_BV.float() - once_BV - count_BV * sampling.frequency_penalty


class HoldsText:
    """A stopping criterion that ends a row when its newest tokens contain a text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt_length: int, text: str) -> None:
        self.tokenizer, self.prompt_length, self.text = tokenizer, prompt_length, text
        # The text has at most as many tokens as bytes.
        self.window = len(text.encode()) + 1

    def __call__(self, input_ids_BT: Tensor, scores: object, **options: object) -> Tensor:
        start = max(self.prompt_length, input_ids_BT.shape[1] - self.window)
        tails = self.tokenizer.batch_decode(input_ids_BT[:, start:])
        return torch.tensor([self.text in tail for tail in tails], device=input_ids_BT.device)


@torch.no_grad()
def sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Prompts,
    sampling: Sampling,
    *,
    max_new_tokens: int,
    draw: Draw,
    writer: Writer,
    keep_states: bool = False,
    stops: bool = True,
    stop: str = "",
    inputs: Mapping[str, Tensor] | None = None,
) -> Sequences:
    """Return the prompts with the model's responses, which include their end tokens.

    The model writes in eval mode and is left as it was.  `keep_states` also returns its final
    hidden states as `signal`, so that a teacher need not run again (not with continuous batching).
    `stops=False` lets no token end a response, for timing.  A response that contains the text
    `stop` ends soon after it; the tokens after the text have no meaning.  `inputs` are more
    inputs of the model, such as the pixels of images.
    """
    if sampling.continuous:
        options: Any = {"max_new_tokens": max_new_tokens, "draw": draw, "writer": writer}
        return sample_continuously(model, tokenizer, prompts, sampling, **options)
    device = next(model.parameters()).device
    ids_BP = prompts.input_ids_BP.to(device)
    keys_B = send(row_keys(draw, prompts.row_ids_B, writer), device)
    ends = end_ids(model, tokenizer) if stops else frozenset()
    pad_id = tokenizer.pad_token_id
    sampler = KeyedSampler(ids_BP.shape[1], sampling, keys_B, num_tokens(tokenizer))
    with (
        ready_to_write(model, len(prompts)),
        blank_generation_config(model),
        _head_inputs(model) as states_BH,
    ):
        output_BT = model.generate(
            input_ids=ids_BP,
            attention_mask=prompts.attention_mask_BP.to(device),
            **(inputs or {}),
            generation_config=_greedy(max_new_tokens, ends, pad_id),
            logits_processor=[sampler],
            # A rank that is done makes passes until the last one is done.
            synced_gpus=has_sharded_weights(model),
            stopping_criteria=[HoldsText(tokenizer, ids_BP.shape[1], stop)] if stop else None,
        )
    responses = [_until_end(row, ends) for row in output_BT[:, ids_BP.shape[1] :].tolist()]
    rows = prompts.row_ids_B.tolist()
    written = Sequences.pack(prompts.ids(), responses, rows, writer=writer, pad_id=pad_id)
    return replace(written, signal=_judged(model, states_BH, responses)) if keep_states else written


def _judged(
    model: PreTrainedModel, states_BH: list[Tensor], responses: list[list[int]]
) -> TeacherSignal:
    """Return the states that the kept tokens were drawn from, row by row, with the head."""
    # `generate` pads a row after its end; the states of that padding are cut off here.
    states_GBH = torch.stack(states_BH)
    kept_NH = torch.cat([states_GBH[: len(ids), row] for row, ids in enumerate(responses)])
    return TeacherSignal(Dense(kept_NH, split(model)[1]))


def _greedy(max_new_tokens: int, ends: frozenset[int], pad_id: int) -> GenerationConfig:
    from transformers import GenerationConfig

    return GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=sorted(ends) or None,
        pad_token_id=pad_id,
        use_cache=True,
    )


@contextlib.contextmanager
def _head_inputs(model: PreTrainedModel) -> Iterator[list[Tensor]]:
    """Collect the final hidden states at the last position of each forward pass: (B, H) each."""
    states_BH: list[Tensor] = []
    hook = (
        unwrap_adapters(model)
        .get_output_embeddings()
        .register_forward_pre_hook(lambda _module, inputs: states_BH.append(inputs[0][:, -1]))
    )
    try:
        yield states_BH
    finally:
        hook.remove()


@contextlib.contextmanager
def blank_generation_config(model: PreTrainedModel, **fields: Any) -> Iterator[None]:
    """Hide the model's own generation config, which sets every field that a call leaves open.

    A config with `fields` takes its place.
    """
    from transformers import GenerationConfig

    inner = unwrap_adapters(model)
    own, inner.generation_config = inner.generation_config, GenerationConfig(**fields)
    try:
        yield
    finally:
        inner.generation_config = own


def _until_end(ids: list[int], eos_ids: frozenset[int]) -> list[int]:
    """Return the tokens up to the first end token, which is included."""
    for place, token in enumerate(ids):
        if token in eos_ids:
            return ids[: place + 1]
    return ids
