"""One model writes by continuous batching: transformers' `generate_batch`.

B = sequences, P = prompt tokens.

Rows join and leave the batch as they end, so that none waits for the longest: made for GPUs.  It
takes no logits processor of ours, hence its draws are its own: the same seed gives the same answers
on the same machine in the same batch, and nothing more.
"""

from __future__ import annotations

import copy
import itertools
import math
from typing import TYPE_CHECKING

import torch

from llmdistill.batch import Prompts, Sequences
from llmdistill.decoding.keyed import row_keys
from llmdistill.errors import TrainingError
from llmdistill.models.heads import eval_mode, unwrap_adapters
from llmdistill.models.vocabulary import end_ids, num_tokens
from llmdistill.sampling import Draw, Sampling, Writer

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
    from transformers.generation.configuration_utils import ContinuousBatchingConfig

PAGE_SIZE = 256  # tokens that the cache hands out at a time
MAX_BATCH_TOKENS = 8192  # of one forward pass, prompts included


@torch.no_grad()
def sample_continuously(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Prompts,
    sampling: Sampling,
    *,
    max_new_tokens: int,
    draw: Draw,
    writer: Writer,
) -> Sequences:
    """The prompts with the model's answers, which end before a token without a meaning.

    Raises TrainingError where rows were not finished.
    """
    longest = prompts.input_ids_BP.shape[1] + max_new_tokens
    seed = int(row_keys(draw, prompts.row_ids_B[:1], writer)[0]) % 2**31
    with eval_mode(model), torch.random.fork_rng():  # it seeds the global generator
        outputs = _in_product_dtype(unwrap_adapters(model)).generate_batch(
            prompts.ids(),
            generation_config=_generation_config(model, tokenizer, sampling, max_new_tokens),
            continuous_batching_config=_batching_config(prompts, longest, seed),
        )
    known = num_tokens(tokenizer)
    responses = [
        list(itertools.takewhile(lambda token: token < known, output.generated_tokens))
        for output in outputs.values()
        if output.error is None
    ]
    if len(responses) < len(prompts):
        raise TrainingError(
            f"continuous batching finished {len(responses)} of {len(prompts)} responses. Its log "
            "has the reason, most often a lack of memory. Write fewer rows at once, or set "
            "sampling.continuous: false."
        )
    row_ids = prompts.row_ids_B.tolist()
    return Sequences.pack(
        prompts.ids(), responses, row_ids, writer=writer, pad_id=tokenizer.pad_token_id
    )


def _in_product_dtype(model: PreTrainedModel) -> PreTrainedModel:
    """The model, or a copy in autocast's dtype, which does not reach the thread that
    `generate_batch` writes in.
    """
    device = model.device.type
    if not torch.is_autocast_enabled(device) or model.dtype == torch.get_autocast_dtype(device):
        return model
    return copy.deepcopy(model).to(torch.get_autocast_dtype(device))


def _generation_config(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sampling: Sampling,
    max_new_tokens: int,
) -> GenerationConfig:
    from transformers import GenerationConfig

    greedy = sampling.temperature == 0
    return GenerationConfig(
        do_sample=not greedy,
        temperature=1.0 if greedy else sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k or None,
        max_new_tokens=max_new_tokens,
        eos_token_id=sorted(end_ids(model, tokenizer)),
        pad_token_id=tokenizer.pad_token_id,
    )


def _batching_config(prompts: Prompts, longest: int, seed: int) -> ContinuousBatchingConfig:
    """A cache for these rows: left to itself it would take most of the free memory."""
    from transformers.generation.configuration_utils import ContinuousBatchingConfig

    return ContinuousBatchingConfig(
        seed=seed,
        page_size=PAGE_SIZE,
        num_blocks=len(prompts) * (math.ceil(longest / PAGE_SIZE) + 1),
        max_batch_tokens=min(int(prompts.attention_mask_BP.sum()), MAX_BATCH_TOKENS),
    )
