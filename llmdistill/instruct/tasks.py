"""What a generator makes: an instruction, perhaps with an input, and its answer."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Task:
    """`truncated`: the teacher was cut off by the limit of new tokens.  `reference` is the answer
    that a data set already had, where the task comes from one; `classifies`: its answers are a few
    fixed labels; `variant`: which way of its generator made it; `log_prob`: the teacher's mean
    log-probability of what it wrote, in nats per token, where it was asked for.
    """

    instruction: str
    input: str = ""
    output: str = ""
    truncated: bool = False
    reference: str | None = None
    classifies: bool = False
    variant: str = ""
    log_prob: float | None = None

    @property
    def prompt(self) -> str:
        """What a user would say: the instruction, its input below."""
        return f"{self.instruction}\n\n{self.input}" if self.input else self.instruction
