"""Writing with continuous batching, by transformers' `generate_batch`.

B = sequences, P = prompt tokens.

Rows join and leave the batch as they end, so no row waits for the longest one.  This is meant for
GPUs.  `generate_batch` does not accept our logits processor, so it draws tokens itself.  The same
seed gives the same responses on the same machine in the same batch, and nothing more is guaranteed.
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
from llmdistill.models.sharding import has_sharded_weights
from llmdistill.models.vocabulary import end_ids, num_tokens
from llmdistill.sampling import Draw, Sampling, Writer

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
    from transformers.generation.configuration_utils import ContinuousBatchingConfig

PAGE_SIZE = 256  # tokens in one block of the cache
MAX_BATCH_TOKENS = 8192  # tokens of one forward pass, prompts included


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
    """Return the prompts with the model's responses.

    A response ends before the first id that the tokenizer does not use.  Raises TrainingError if
    some rows were not finished, or the weights are sharded.
    """
    if has_sharded_weights(model):
        raise TrainingError(
            "sampling.continuous does not work with sharded weights, because ranks would make "
            "different numbers of forward passes. Remove it."
        )
    longest = prompts.input_ids_BP.shape[1] + max_new_tokens
    seed = int(row_keys(draw, prompts.row_ids_B[:1], writer)[0]) % 2**31
    # `fork_rng`, because `generate_batch` seeds the global generator.
    with eval_mode(model), torch.random.fork_rng():
        outputs = _in_product_dtype(unwrap_adapters(model)).generate_batch(
            prompts.ids(),
            generation_config=_generation_config(model, tokenizer, sampling, max_new_tokens),
            continuous_batching_config=_batching_config(prompts, longest, seed),
        )
    # A head may score more ids than the tokenizer has, and nothing masks them here.
    known = num_tokens(tokenizer)
    responses = [
        list(itertools.takewhile(lambda token: token < known, output.generated_tokens))
        for output in outputs.values()
        if output.error is None
    ]
    if len(responses) < len(prompts):
        raise TrainingError(
            f"continuous batching finished {len(responses)} of {len(prompts)} responses. Its log "
            "has the reason, most often a lack of memory. Lower the batch size, or set "
            "sampling.continuous: false."
        )
    row_ids = prompts.row_ids_B.tolist()
    return Sequences.pack(
        prompts.ids(), responses, row_ids, writer=writer, pad_id=tokenizer.pad_token_id
    )


def _in_product_dtype(model: PreTrainedModel) -> PreTrainedModel:
    """Return the model, or a copy of it in autocast's dtype.

    `generate_batch` writes in another thread, which autocast does not reach.
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
    """Return a configuration with a cache of the size that these rows need.

    By default the cache would take most of the free memory.
    """
    from transformers.generation.configuration_utils import ContinuousBatchingConfig

    return ContinuousBatchingConfig(
        seed=seed,
        page_size=PAGE_SIZE,
        num_blocks=len(prompts) * (math.ceil(longest / PAGE_SIZE) + 1),
        max_batch_tokens=min(int(prompts.attention_mask_BP.sum()), MAX_BATCH_TOKENS),
    )
