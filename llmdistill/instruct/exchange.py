"""Run the calls of a generator: ask what they ask, and collect their tasks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llmdistill.instruct.generators.base import TaskGenerator
from llmdistill.instruct.parse import Parsed
from llmdistill.instruct.replies import hash_of, request_hash
from llmdistill.instruct.requests import Asked, Reply, Request
from llmdistill.instruct.responders import Responder
from llmdistill.instruct.tasks import Task
from llmdistill.teachers.spoken import BY_SERVER


@dataclass(frozen=True)
class Made:
    """A finished call: its tasks, a hash of all its requests, and the replies of each stage.

    `asked` has the hash of each request, stage by stage.
    """

    call: int
    parsed: Parsed
    prompt_hash: str
    asked: list[list[str]]
    replies: list[list[Reply]]

    @property
    def is_refused(self) -> bool:
        """Whether all requests of its last stage were refused."""
        return bool(self.replies) and all(reply.refused for reply in self.replies[-1])

    @property
    def is_refused_by_server(self) -> bool:
        """Whether a server, and not llmdistill, refused one of its last requests."""
        return any(reply.refused in BY_SERVER for reply in self.replies[-1])


def exchange(
    generator: TaskGenerator,
    responder: Responder,
    numbers: Sequence[int],
    machine: Sequence[Task],
) -> list[Made]:
    """Run the calls with these numbers in parallel, and return them in order.

    All calls advance one stage at a time, so that the requests of a stage are written as batches.
    `machine` are the tasks that were kept before.
    """
    calls = {number: generator.call(number, machine) for number in numbers}
    asking: dict[int, list[Request]] = {}
    said: dict[int, list[list[Reply]]] = {number: [] for number in numbers}
    hashes: dict[int, list[list[str]]] = {number: [] for number in numbers}
    done: dict[int, Parsed] = {}

    def go_on(number: int, replies: list[Reply] | None) -> None:
        # A call is a Python generator: it yields requests, and returns its tasks at the end.
        try:
            asking[number] = calls[number].send(replies)  # type: ignore[arg-type]
        except StopIteration as stop:
            done[number] = stop.value
            asking.pop(number, None)

    for number in numbers:
        go_on(number, None)
    while asking:
        asked = [
            Asked(number, len(said[number]), place, request)
            for number, requests in asking.items()
            for place, request in enumerate(requests)
        ]
        replies = iter(responder.respond(asked))
        for number, requests in list(asking.items()):  # a copy: `go_on` changes `asking`
            hashes[number].append([request_hash(one) for one in requests])
            said[number].append([next(replies) for _ in requests])
            go_on(number, said[number][-1])
    return [
        Made(number, done[number], hash_of(repr(hashes[number])), hashes[number], said[number])
        for number in numbers
    ]
