"""Tasks out of free text."""

from __future__ import annotations

import random

import pytest

from llmdistill.instruct.parse import parse_tasks, write_task
from llmdistill.instruct.tasks import Task
from tests import toy


def tasks(number: int, seed: int = 0) -> list[Task]:
    draw = random.Random(seed)

    def text(most: int) -> str:
        return "\n".join(
            " ".join(draw.choices(toy.WORDS, k=4)) for _ in range(draw.randint(1, most))
        )

    return [Task(text(1), text(2) if i % 3 else "", text(3)) for i in range(number)]


def written(some, start: int = 1) -> str:
    return "".join(write_task(start + i, task) for i, task in enumerate(some))


def test_reads_what_it_writes():
    assert parse_tasks(written(tasks(12), start=4)) == (tasks(12), {})


def test_headings_in_an_answer_stay_in_it():
    """A mark begins an item only where one follows."""
    task = Task("Plan my week.", "", "Here is a plan.\n### Monday\nRun.\n#### Evening\n###\nRest.")
    assert parse_tasks(written([task, *tasks(2)])) == ([task, *tasks(2)], {})
    inline = "### 4. Instruction: Name a bird\n4. Input:\n<noinput>\n4. Output: A wren\n###\n"
    assert parse_tasks(inline) == ([Task("Name a bird", "", "A wren")], {})


def test_what_stands_before_the_first_item_is_no_task():
    assert parse_tasks("Here they are:\n" + written(tasks(2))) == (tasks(2), {"unparsable": 1})


def test_the_last_item_of_a_text_that_was_cut_off_is_dropped():
    assert parse_tasks(written(tasks(5)), truncated=True) == (tasks(5)[:-1], {"truncated": 1})
    assert parse_tasks("", truncated=True) == ([], {})


@pytest.mark.parametrize(
    ("item", "task"),
    [
        ("4. Instruction: Name a bird\n4. Input:\n<NoInput>\n4. Output: A wren", Task("Name a bird", "", "A wren")),
        ("4) Instruction: Add them\n4) Input: 2, 3\n4) Output:\n5", Task("Add them", "2, 3", "5")),
        ("12 Instruction: Say it\n12 Input:\n\n12 Output:\nIt.\n\nTwice.", Task("Say it", "", "It.\n\nTwice.")),
        ("1. Instruction: Explain\n1. Input: <noinput>\n1. Output:\nThe steps are 1. Input: more", Task("Explain", "", "The steps are 1. Input: more")),
    ],
)  # fmt: skip
def test_forms_that_teachers_write(item, task):
    assert parse_tasks(item) == ([task], {})


@pytest.mark.parametrize(
    "item",
    [
        "4. Instruction: Name a bird\n4. Output: A wren",
        "4. Instruction:\n4. Input: <noinput>\n4. Output: A wren",
        "4. Input: x\n4. Instruction: Name a bird\n4. Output: A wren",
        "4. Instruction: a\n4. Input: b\n4. Output: c\n4. Output: d",
    ],
)
def test_what_is_no_task_is_counted(item):
    good = tasks(1)
    assert parse_tasks(f"{written(good)}###\n{item}\n") == (good, {"unparsable": 1})
