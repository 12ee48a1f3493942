"""Settings of sampling, the writers of tokens, and the key of their randomness."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Writer(enum.IntEnum):
    """Who wrote a token: the dataset, the teacher or the student."""

    DATA = 0
    TEACHER = 1
    STUDENT = 2


@dataclass(frozen=True)
class Sampling:
    """Settings of sampling: how a model draws each token.

    Logits are divided by the temperature first, then cut by top-k, then by top-p.

    Args:
        temperature: 0 or more.  0 is greedy, 1 is the model's own distribution, higher values
            flatten it.
        top_p: Above 0, at most 1.  The smallest set of likeliest tokens that has this probability
            is kept.  1 keeps every token.
        top_k: 0 or more.  This many of the likeliest tokens are kept.  0 keeps every token.
        continuous: Write with transformers' `generate_batch`, where rows join and leave the batch
            as they end.  It is meant for GPUs.  A response then also depends on the other rows of
            its batch.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    continuous: bool = False


@dataclass(frozen=True)
class PenalisedSampling(Sampling):
    """Sampling that avoids tokens which the response already contains.

    The penalties are subtracted from the logits before everything else.  Only whole responses are
    written in this way (`llmdistill generate`): training needs the model's own distribution.

    Args:
        presence_penalty: Subtracted once from the logit of each token that occurred.
        frequency_penalty: Subtracted for each time that a token occurred.
    """

    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0


GREEDY = Sampling(temperature=0.0)


@dataclass(frozen=True)
class Draw:
    """The key of a random draw: equal keys give equal responses.

    Together with the row id, the position in the response and the writer it determines the noise
    of every sampled token (`decoding/keyed.py`).

    Args:
        seed: The seed of the run.
        epoch: Complete passes over the data, so that each epoch draws new responses.
        sample: Which of several responses to the same prompt this is: one number for the whole
            batch, or one for each row.
    """

    seed: int
    epoch: int = 0
    sample: int | tuple[int, ...] = 0
