"""Rows are the same however often a run was stopped, and wherever."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import random
import signal
import time

import pytest

from llmdistill.errors import DataError
from llmdistill.instruct.filters import Length, Rouge
from llmdistill.instruct.generators.base import Cost, TaskGenerator
from llmdistill.instruct.generators.given import Answer
from llmdistill.instruct.parse import Parsed
from llmdistill.instruct.pipeline import Pipeline, Settings, TaskCounts, exchange
from llmdistill.instruct.records import read_whole_lines
from llmdistill.instruct.requests import Reply, Request, user
from llmdistill.instruct.tasks import Task
from llmdistill.sampling import Sampling
from tests import toy

pytestmark = pytest.mark.slow

FILES = ("rows.jsonl", "calls.jsonl")


class Chatter:
    """Replies that depend on what is asked alone; stops after so many."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.stop_after, self.asked = stop_after, []

    def respond(self, asked):
        replies = []
        for one in asked:
            if one.known:
                replies.append(one.known)
                continue
            if self.stop_after is not None and len(self.asked) >= self.stop_after:
                raise KeyboardInterrupt
            self.asked.append((one.call, one.stage, one.place))
            text = one.request.messages[0]["content"]
            draw = random.Random(hashlib.sha256(f"{text}/{one.place}".encode()).hexdigest())
            replies.append(
                Reply(" ".join(draw.choices(toy.WORDS, k=draw.randint(1, 8))), draw.random() < 0.1)
            )
        return replies


class Chain(TaskGenerator):
    """Two stages; what it asks depends on what was kept before."""

    at_most = Cost(2, 3, 27)

    def call(self, number, machine):
        last = machine[-1].instruction if machine else "nothing"
        sampling = Sampling()
        (first,) = yield [Request(user(f"{number} after {last}"), sampling, 9)]
        if number % 5 == 4:
            return Parsed([], {"unparsable": 1})
        both = yield [Request(user(first.text), sampling, 9)] * 2
        return Parsed([Task(first.text, "", reply.text, reply.truncated) for reply in both])


def made(folder, *, responder=None, target=20, generator=None, rounds=4, filters=None):
    folder.mkdir(exist_ok=True)
    settings = Settings(folder, target, rounds, {"generator": "chain", "seed": 0})
    kept_by = [Length(2, 9), Rouge(0.8)] if filters is None else filters
    return Pipeline(generator or Chain(), responder or Chatter(), kept_by, settings)


def contents(folder):
    return [(folder / name).read_bytes() for name in FILES]


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    folder = tmp_path_factory.mktemp("straight")
    pipeline = made(folder)
    pipeline.run()
    return folder, pipeline


def test_a_run_ends_with_the_target_and_says_what_it_dropped(straight):
    folder, pipeline = straight
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    assert len(rows) == pipeline.counts.kept == 20
    assert set(pipeline.counts.dropped) == {"unparsable", "instruction too short", "too similar"}
    assert pipeline.counts.made == 20 + sum(pipeline.counts.dropped.values())
    assert len({row["id"] for row in rows}) == 20
    assert set(rows[0]) == {
        "id",
        "instruction",
        "input",
        "output",
        "variant",
        "generator",
        "seed",
        "prompt_hash",
    }
    calls = list(read_whole_lines(folder / "calls.jsonl"))
    assert [call["call"] for call in calls] == list(range(len(calls)))
    assert len(calls) % 4 == 0


def test_a_run_that_was_stopped_anywhere_ends_the_same(straight, tmp_path):
    folder, _ = straight
    total = 60
    for stop in range(0, total, 3):
        here = tmp_path / str(stop)
        with pytest.raises(KeyboardInterrupt):
            made(here, responder=Chatter(stop)).run()
        made(here).run()
        assert contents(here) == contents(folder)


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_was_cut_off_anywhere_is_mended(straight, tmp_path, name):
    folder, _ = straight
    whole = (folder / name).read_bytes()
    draw = random.Random(0)
    for number in range(12):
        here = tmp_path / str(number)
        here.mkdir()
        for other in FILES:
            (here / other).write_bytes((folder / other).read_bytes())
        (here / name).write_bytes(whole[: draw.randrange(len(whole))])
        made(here).run()
        assert contents(here) == contents(folder)


def test_what_is_done_is_not_asked_again(straight, tmp_path):
    folder, _ = straight
    for name in FILES:
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    responder = Chatter()
    made(tmp_path, responder=responder).run()
    assert responder.asked == []
    assert contents(tmp_path) == contents(folder)


def test_a_run_can_be_taken_up_with_a_smaller_target(straight, tmp_path):
    """What it asks depends on what was kept: rounds beyond the target are not made again."""
    folder, _ = straight
    for name in FILES:
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    pipeline = made(tmp_path, target=7)
    pipeline.run()
    rows = (tmp_path / "rows.jsonl").read_bytes().splitlines()
    assert rows == (folder / "rows.jsonl").read_bytes().splitlines()[:7]
    assert pipeline.counts.kept == 7


def test_a_run_can_go_on_to_a_larger_target(straight, tmp_path):
    made(tmp_path / "small", target=7).run()
    made(tmp_path / "small").run()
    assert contents(tmp_path / "small") == contents(straight[0])


def test_a_record_that_lost_a_line_is_mended(straight, tmp_path):
    made(tmp_path, target=7).run()
    rows = list(read_whole_lines(tmp_path / "calls.jsonl"))
    (tmp_path / "calls.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[1:]))
    responder = Chatter()
    made(tmp_path, responder=responder, target=7).run()
    assert {call for call, _, _ in responder.asked} == {0}
    first = (tmp_path / "rows.jsonl").read_bytes().splitlines()
    assert first == (straight[0] / "rows.jsonl").read_bytes().splitlines()[:7]


def test_another_request_in_the_place_of_a_recorded_one_is_refused(tmp_path):
    """The requests of an endless generator depend on its recipe alone."""
    made(tmp_path, target=7).run()
    lines = list(read_whole_lines(tmp_path / "calls.jsonl"))
    lines[0]["asked"][0][0] = "another"
    (tmp_path / "calls.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(DataError, match="call 0 would now send a different request"):
        made(tmp_path).run()


def test_a_record_of_an_older_version_is_refused(tmp_path):
    (tmp_path / "calls.jsonl").write_text('{"call": 0, "revision": null, "replies": []}\n')
    with pytest.raises(DataError, match="written by an older version"):
        made(tmp_path).run()


def test_a_run_that_keeps_nothing_stops(tmp_path):
    with pytest.raises(
        DataError, match=r"no row was kept in the last 20 rounds of 4 calls.*too short"
    ):
        made(tmp_path, filters=[Length(99, 100)]).run()


def test_a_damaged_line_is_named(tmp_path):
    (tmp_path / "calls.jsonl").write_text('{"call": 0}\n{"cal\n{"call": 2}\n')
    with pytest.raises(DataError, match=r"calls.jsonl:2 is damaged"):
        list(read_whole_lines(tmp_path / "calls.jsonl"))


def test_a_finite_generator_ends_by_itself(tmp_path):
    tasks = [Task(f"Say {word} twice.") for word in toy.WORDS]
    pipeline = made(tmp_path, generator=Answer(tasks), target=None, filters=[], rounds=4)
    seen: list[int] = []
    pipeline.run(lambda counts, seconds: seen.append(counts.kept))
    assert pipeline.counts == TaskCounts(kept=len(toy.WORDS))
    assert seen == [0, 4, 8, 12, 16, 19]


def test_calls_at_the_same_stage_are_written_together():
    batches = []

    class Counting(Chatter):
        def respond(self, asked):
            batches.append([(one.call, one.stage, one.place) for one in asked])
            return super().respond(asked)

    exchange(Chain(), Counting(), [3, 4, 5], [])
    assert batches == [
        [(3, 0, 0), (4, 0, 0), (5, 0, 0)],
        [(3, 1, 0), (3, 1, 1), (5, 1, 0), (5, 1, 1)],
    ]


class Slow(Chatter):
    """Takes its time, so that a kill meets it anywhere."""

    def respond(self, asked):
        time.sleep(0.004)
        return super().respond(asked)


@pytest.mark.slow
def test_a_run_that_is_killed_anywhere_ends_the_same(straight, tmp_path):
    """SIGKILL at 20 random moments, one after the other until the run gets through."""
    folder, draw, kills = straight[0], random.Random(0), 0
    fork = multiprocessing.get_context("fork")
    while kills < 20:
        here = tmp_path / str(kills)
        while True:
            child = fork.Process(target=lambda here=here: made(here, responder=Slow()).run())
            child.start()
            child.join(draw.uniform(0.005, 0.12))
            if child.exitcode is not None:
                assert child.exitcode == 0
                break
            os.kill(child.pid, signal.SIGKILL)
            child.join()
            kills += 1
        assert contents(here) == contents(folder)
