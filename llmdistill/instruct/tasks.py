"""The tasks that generators make."""

from __future__ import annotations

from dataclasses import dataclass

from llmdistill.data.formats import Message


@dataclass(frozen=True)
class Task:
    """An instruction, perhaps with an input, and its answer.

    - `truncated`: the limit of new tokens cut the answer off.
    - `reference`: the answer in the dataset that the task comes from, if it has one.
    - `classifies`: whether the answers are a few fixed labels; None if nobody knows.
    - `variant`: how its generator made the task, for example "harder".
    - `images`: paths of the images that the teacher sees with the prompt, as the row has them.
    - `log_prob`: the teacher's mean log-probability of the text that it wrote, in nats per token;
      None if it was not scored.
    - `thinking`: what the teacher thought before the answer.
    - `context`: the messages before the user's turn, such as a system message.
    """

    instruction: str
    input: str = ""
    output: str = ""
    truncated: bool = False
    reference: str | None = None
    classifies: bool | None = None
    variant: str = ""
    log_prob: float | None = None
    images: tuple[str, ...] = ()
    thinking: str = ""
    context: tuple[Message, ...] = ()

    @property
    def prompt(self) -> str:
        """The user's turn: the instruction, and the input below it if there is one."""
        return f"{self.instruction}\n\n{self.input}" if self.input else self.instruction
