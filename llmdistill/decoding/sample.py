"""One model writes: `transformers`' own `generate`, with our randomness in its last logits
processor.

B = sequences, P = prompt tokens, V = vocabulary.  `generate` runs greedily over scores that already
hold the noise, so its own warpers are never reached; every sampling field is set by hand, because
an unset one would be taken from the model's own `generation_config`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from llmdistill.batch import Draw, Prompts, Sampling, Sequences, Writer
from llmdistill.decoding.keyed import perturb, row_keys
from llmdistill.decoding.packed import packed
from llmdistill.models.vocabulary import end_ids, num_tokens

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase


class KeyedSampler:
    """A logits processor that leaves the drawn token as the argmax; never a token without a
    meaning.
    """

    def __init__(
        self, prompt_length: int, sampling: Sampling, keys_B: Tensor, num_tokens: int
    ) -> None:
        self.prompt_length, self.sampling = prompt_length, sampling
        self.keys_B, self.num_tokens = keys_B, num_tokens

    def __call__(self, input_ids_BT: Tensor, scores_BV: Tensor) -> Tensor:
        slot = input_ids_BT.shape[1] - self.prompt_length
        scores_BV[:, self.num_tokens :] = -torch.inf
        return perturb(scores_BV, self.sampling, self.keys_B, slot)


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
) -> Sequences:
    """The prompts with the model's answers, their end tokens included where they came.

    The model writes in eval mode and is left as it was.
    """
    device = next(model.parameters()).device
    ids_BP = prompts.input_ids_BP.to(device)
    keys_B = row_keys(draw, prompts.row_ids_B.to(device), writer)
    ends, pad_id = end_ids(model, tokenizer), tokenizer.pad_token_id
    with eval_mode(model), packed(model, len(prompts)):
        output_BT = model.generate(
            input_ids=ids_BP,
            attention_mask=prompts.attention_mask_BP.to(device),
            generation_config=_greedy(max_new_tokens, sorted(ends), pad_id),
            logits_processor=[
                KeyedSampler(ids_BP.shape[1], sampling, keys_B, num_tokens(tokenizer))
            ],
        )
    responses = [_until_end(row, ends) for row in output_BT[:, ids_BP.shape[1] :].tolist()]
    row_ids = prompts.row_ids_B.tolist()
    return Sequences.pack(prompts.ids(), responses, row_ids, writer=writer, pad_id=pad_id)


class eval_mode:
    """Puts a model in eval mode for a while, and each of its modules back as it was."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __enter__(self) -> None:
        self.training = [module for module in self.model.modules() if module.training]
        self.model.eval()

    def __exit__(self, *_error: object) -> None:
        for module in self.training:
            module.training = True


def _greedy(max_new_tokens: int, eos_ids: list[int], pad_id: int) -> GenerationConfig:
    """Greedy search with every field that could change a score set to 'leave it alone'."""
    from transformers import GenerationConfig

    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        eos_token_id=eos_ids,
        pad_token_id=pad_id,
        do_sample=False,
        num_beams=1,
        temperature=1.0,
        top_k=50,
        top_p=1.0,
        min_p=None,
        typical_p=1.0,
        epsilon_cutoff=0.0,
        eta_cutoff=0.0,
        repetition_penalty=1.0,
        encoder_repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        min_new_tokens=0,
        bad_words_ids=None,
        sequence_bias=None,
        suppress_tokens=None,
        begin_suppress_tokens=None,
        forced_bos_token_id=None,
        forced_eos_token_id=None,
        exponential_decay_length_penalty=None,
        renormalize_logits=False,
        guidance_scale=None,
        use_cache=True,
        return_dict_in_generate=False,
    )


def _until_end(ids: list[int], eos_ids: frozenset[int]) -> list[int]:
    """The tokens up to the first end token, that one included."""
    for place, token in enumerate(ids):
        if token in eos_ids:
            return ids[: place + 1]
    return ids
