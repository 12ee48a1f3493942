"""R11: `llmdistill generate` under SIGKILL: the files that it leaves are those of a run left alone."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import time

import pytest
import torch

from llmdistill import recipe as recipes
from llmdistill.generate import generate
from tests import toy
from tests.support.servers import chat, last, scripted

KILLS = 20
RECIPE = {
    "output": "set",
    "teacher": {"model": "teacher"},
    "generator": {
        "kind": "answer",
        "prompts": "seeds.jsonl",
        "samples": 2,
        "answering": {"max_new_tokens": 8},
    },
    "seed_tasks": "seeds.jsonl",
    "filters": [{"kind": "empty_or_echo"}, {"kind": "near_duplicates"}],
    "round_size": 4,
    "batch_size": 8,
    "test_share": 0.2,
}


def in_child(folder, *, kill_after=None, changes=None) -> bool:
    """One run in a process of its own, resumed where there is something; did it get to its end?"""

    def run() -> None:
        os.chdir(folder)
        # The thread pool of the parent is of no use after a fork: do without one, and say so before
        # the threads that load a model race to replace it.
        torch.set_num_threads(1)
        given = recipes.build_part(recipes.GenerationRecipe, RECIPE | (changes or {}), "recipe")
        generate(given, resume=(folder / "set").exists())

    child = multiprocessing.get_context("fork").Process(target=run)
    child.start()
    child.join(kill_after)
    if child.exitcode is None:
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        return False
    assert child.exitcode == 0
    return True


def prepared(folder, rows=40):
    folder.mkdir()
    model = toy.teacher_model()
    model.lm_head.weight.data[2] *= 2.5  # turns end now and then
    model.save_pretrained(folder / "teacher")
    toy.tokenizer("teacher").save_pretrained(folder / "teacher")
    (folder / "seeds.jsonl").write_text("\n".join(json.dumps(row) for row in toy.rows(rows)))
    return folder


def contents(folder):
    """All that a run leaves but the log, which holds the times."""
    files = {file.name: file.read_bytes() for file in (folder / "set").iterdir()}
    assert files.pop("log.jsonl").endswith(b"\n")
    return files


@pytest.mark.slow
@pytest.mark.timeout(280)
def test_a_data_set_is_the_same_after_twenty_kills(tmp_path):
    whole = prepared(tmp_path / "whole")
    start = time.perf_counter()
    assert in_child(whole)
    seconds = time.perf_counter() - start
    expected = contents(whole)
    assert {"README.md", "recipe.yaml", "train.jsonl", "train.parquet", "test.parquet"} <= set(
        expected
    )
    draw, kills, runs = random.Random(0), 0, 0
    while kills < KILLS:
        here = prepared(tmp_path / str(runs))
        while not in_child(here, kill_after=draw.uniform(0.05, 1.0) * seconds):
            kills += 1
        assert contents(here) == expected
        runs += 1


def answer(body, number):
    """A server that answers a prompt always in the same way, is busy now and then, and refuses one."""
    text = last(body)
    draw = random.Random(f"{text}/{body['seed']}")
    time.sleep(0.005)
    if number % 23 == 3:
        return 429, {"retry-after": "0.02"}, {"error": {"message": "slow down"}}
    if "red" in text.split()[-2:]:
        return 400, {}, {"error": {"message": "no"}}
    if "How good" in text:
        return chat(str(draw.randint(1, 10)))
    return chat(" ".join(draw.choices(toy.WORDS, k=draw.randint(0, 8))))


@pytest.mark.slow
@pytest.mark.timeout(280)
def test_a_data_set_of_a_server_is_the_same_after_twenty_kills(tmp_path):
    """With several stages in each call: the answers, the judge, and the best of them."""
    generator = RECIPE["generator"] | {"best_by": "judge", "samples": 3}
    with scripted(answer) as server:
        teacher = {"kind": "remote", "model": "m", "url": server.url}
        changes = {"teacher": teacher, "generator": generator, "judge": {"aspects": ["difficulty"]}}
        whole = prepared(tmp_path / "whole", rows=16)
        start = time.perf_counter()
        assert in_child(whole, changes=changes)
        seconds, expected = time.perf_counter() - start, contents(whole)
        draw, kills, runs = random.Random(0), 0, 0
        while kills < KILLS:
            here = prepared(tmp_path / str(runs), rows=16)
            while not in_child(here, kill_after=draw.uniform(0.1, 1.0) * seconds, changes=changes):
                kills += 1
            assert contents(here) == expected
            runs += 1
