"""Who replies to a generator: a teacher on this machine.

Randomness is keyed by the request, so a reply does not depend on those beside it, up to the
rounding of the teacher; requests of a round come in the same batches each time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from llmdistill.batch import Draw, Prompts, Sampling
from llmdistill.data.formats import Example
from llmdistill.data.render import continued, open_user_turn, render
from llmdistill.instruct.pipeline import Asked
from llmdistill.instruct.requests import Reply, Request
from llmdistill.models.vocabulary import end_ids

if TYPE_CHECKING:
    from llmdistill.teachers.local import LocalTeacher


class LocalWriter:
    """Writes `batch_size` replies at a time, those of similar length together."""

    def __init__(self, teacher: LocalTeacher, *, seed: int, batch_size: int = 32) -> None:
        self.teacher, self.seed, self.batch_size = teacher, seed, batch_size
        self._ends = end_ids(teacher.model, teacher.tokenizer)

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
        ended = bool(ids) and ids[-1] in self._ends
        kept = ids[:-1] if ended else ids
        text = self.teacher.tokenizer.decode(kept, skip_special_tokens=True)
        return Reply(text, truncated=not ended)
