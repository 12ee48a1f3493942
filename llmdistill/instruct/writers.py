"""Who replies to a generator: a teacher on this machine, or one behind a server.

Randomness is keyed by the request.  On this machine a reply does not depend on those beside it, up
to the rounding of the teacher, and requests of a round come in the same batches each time; a server
is asked with a seed of the same making, and does with it what it does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from llmdistill.batch import Draw, Prompts, Sampling, Writer
from llmdistill.data.formats import Example
from llmdistill.data.render import continued, open_user_turn, render
from llmdistill.decoding.keyed import row_keys
from llmdistill.instruct.pipeline import Asked
from llmdistill.instruct.requests import Reply, Request
from llmdistill.models.vocabulary import end_ids
from llmdistill.teachers.remote import Question, RemoteTeacher, Spoken

if TYPE_CHECKING:
    from llmdistill.teachers.local import LocalTeacher


class LocalWriter:
    """Writes `batch_size` replies at a time, those of similar length together."""

    def __init__(self, teacher: LocalTeacher, *, seed: int, batch_size: int = 32) -> None:
        self.teacher, self.seed, self.batch_size = teacher, seed, batch_size
        known = teacher.tokenizer.added_tokens_decoder.items()
        special = {number for number, token in known if token.special}
        self._ends = end_ids(teacher.model, teacher.tokenizer) | special

    def write(self, asked: Sequence[Asked]) -> list[Reply]:
        prompts = [self._prompt(one.request) for one in asked]
        replies: dict[int, Reply] = {}
        groups: dict[tuple[Sampling, int, int], list[int]] = {}
        for place, one in enumerate(asked):
            key = (one.request.sampling, one.request.max_new_tokens, one.stage)
            groups.setdefault(key, []).append(place)
        for (sampling, max_new_tokens, stage), places in groups.items():
            places.sort(key=lambda place: len(prompts[place]))
            for start in range(0, len(places), self.batch_size):
                some = places[start : start + self.batch_size]
                batch = Prompts.pack(
                    [prompts[place] for place in some], [asked[place].call for place in some],
                    pad_id=self.teacher.tokenizer.pad_token_id,
                )  # fmt: skip
                sample = tuple(asked[place].place for place in some)
                written = self.teacher.write(
                    batch, sampling, max_new_tokens=max_new_tokens,
                    draw=Draw(self.seed, epoch=stage, sample=sample),
                )  # fmt: skip
                replies |= zip(some, map(self._reply, written.responses()), strict=True)
        return [replies[place] for place in range(len(asked))]

    def _prompt(self, request: Request) -> list[int]:
        tokenizer = self.teacher.tokenizer
        if request.turn == "user":
            ids = open_user_turn(tokenizer)
        else:
            ids, _ = render(tokenizer, Example(request.messages, None, "a request"))
        return ids + continued(tokenizer, request.start, "a request")

    def _reply(self, ids: list[int]) -> Reply:
        """The text up to the first token that only a template writes: an end, or another turn."""
        end = next((place for place, token in enumerate(ids) if token in self._ends), len(ids))
        return Reply(self.teacher.tokenizer.decode(ids[:end]), truncated=end == len(ids))


class RemoteWriter:
    """Asks a server: conversations as chats, what a user would say as plain text."""

    def __init__(self, teacher: RemoteTeacher, *, seed: int) -> None:
        self.teacher, self.seed = teacher, seed

    def write(self, asked: Sequence[Asked]) -> list[Reply]:
        spoken = self.teacher.answer([self._question(one) for one in asked])
        pairs = zip(asked, spoken, strict=True)
        return [Reply(_after(one.request.start, said), said.truncated) for one, said in pairs]

    def _question(self, asked: Asked) -> Question:
        request = asked.request
        draw = Draw(self.seed, epoch=asked.stage, sample=asked.place)
        seed = int(row_keys(draw, torch.tensor([asked.call]), Writer.TEACHER)) % 2**31
        prompt: str | tuple[dict[str, str], ...] = request.messages
        if request.turn == "user":
            assert self.teacher.tokenizer is not None  # the recipe was refused without one
            prompt = self.teacher.tokenizer.decode(open_user_turn(self.teacher.tokenizer))
        return Question(prompt, request.sampling, request.max_new_tokens, seed)


def _after(start: str, said: Spoken) -> str:
    """The reply behind what it was to begin with: a chat says that again, or its last line."""
    text = said.text.lstrip()
    for opening in (start, start.rpartition("\n")[2]):
        if opening and text.startswith(opening):
            return text.removeprefix(opening)
    return said.text
