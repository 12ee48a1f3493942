"""The tasks that generators make."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

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
    - `context`: the given messages before the user's turn, such as a system message.
    - `turns`: earlier questions that the teacher wrote in this conversation, with its answers.
    - `is_answered`: False for a question alone, which nobody was asked to answer.
    - `scores`: what a judge says, by aspect; None if its reply could not be read.
    - `rejected`: a worse answer to the same question, for a pair of preferences.
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
    turns: tuple[tuple[str, str], ...] = ()
    is_answered: bool = True
    scores: Mapping[str, float | None] = field(default_factory=dict)
    rejected: str | None = None

    @property
    def prompt(self) -> str:
        """The user's turn: the instruction, and the input below it if there is one."""
        return f"{self.instruction}\n\n{self.input}" if self.input else self.instruction

    @property
    def messages_before(self) -> tuple[Message, ...]:
        """All messages before the user's last turn."""
        said = (
            {"role": role, "content": text}
            for turn in self.turns
            for role, text in zip(("user", "assistant"), turn, strict=True)
        )
        return (*self.context, *said)

    def messages_after(self) -> tuple[Message, ...]:
        """The whole conversation, with the answer."""
        return replace(self, turns=(*self.turns, (self.prompt, self.output))).messages_before

    def each_turn(self) -> Iterator[Task]:
        """Yield each turn that the teacher wrote as a task, the last one last."""
        for question, answer in self.turns:
            yield replace(self, instruction=question, input="", output=answer, turns=())
        yield self
