"""Rows in every form become one; what is malformed is named by place and field (S7)."""

from __future__ import annotations

import pytest

from llmdistill.data.formats import Example, to_examples
from llmdistill.errors import DataError

USER = {"role": "user", "content": "hi"}
ANSWER = {"role": "assistant", "content": "yo"}
PLACE = "train.jsonl:214"


def refused(row, form="auto") -> str:
    with pytest.raises(DataError) as caught:
        to_examples(row, PLACE, form=form)
    said = str(caught.value)
    assert said.startswith(f"{PLACE}: ")
    return said


# ---- the forms ----


@pytest.mark.parametrize(
    ("row", "prompt", "response"),
    [
        ({"messages": [USER, ANSWER]}, [USER], "yo"),
        ({"messages": [USER]}, [USER], None),
        ({"messages": [USER, ANSWER, USER]}, [USER, ANSWER, USER], None),
        (
            {"messages": [{"role": "system", "content": ""}, USER, ANSWER, USER, ANSWER]},
            [{"role": "system", "content": ""}, USER, ANSWER, USER],
            "yo",
        ),
        (
            {"messages": [USER, {"role": "tool", "content": "3"}]},
            [USER, {"role": "tool", "content": "3"}],
            None,
        ),
        ({"messages": [USER | {"name": "x"}, ANSWER]}, [USER], "yo"),
        ({"prompt": "hi", "completion": "yo"}, [USER], "yo"),
        ({"prompt": "hi"}, [USER], None),
        ({"prompt": "hi", "completion": None}, [USER], None),
        ({"prompt": "hi", "completion": " \n"}, [USER], None),
        ({"instruction": "hi", "input": "", "output": "yo"}, [USER], "yo"),
        ({"instruction": "hi", "output": " yo "}, [USER], " yo "),
        ({"instruction": "a", "input": "b"}, [{"role": "user", "content": "a\n\nb"}], None),
        ({"instruction": "hi", "other": 3}, [USER], None),
        (
            {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]},
            [USER],
            "yo",
        ),
        ({"conversations": [USER, ANSWER]}, [USER], "yo"),
        ({"prompt": [USER], "completion": [ANSWER]}, [USER], "yo"),
        ({"prompt": [USER], "completion": None}, [USER], None),
        ({"text": "hi you"}, [], "hi you"),
    ],
)
def test_every_form_becomes_a_conversation_and_its_answer(row, prompt, response):
    assert to_examples(row, PLACE) == [Example(tuple(prompt), response, PLACE)]


@pytest.mark.parametrize(
    ("form", "content"),
    [("messages", "m"), ("prompt_completion", "p"), ("alpaca", "i"), ("auto", "m")],
)
def test_a_row_that_fits_many_forms_is_read_in_the_one_asked_for(form, content):
    row = {
        "instruction": "i",
        "prompt": "p",
        "messages": [{"role": "user", "content": "m"}],
    }
    assert to_examples(row, PLACE, form=form)[0].prompt[0]["content"] == content


# ---- what is malformed ----


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ([1], "must be an object with fields, got list"),
        ("hi", "got str"),
        (None, "got NoneType"),
        (
            {"body": "hi", "b": 1},
            "the row has none of the fields 'messages', 'conversations', 'prompt',",
        ),
        ({"body": "hi"}, "Map its fields with 'columns'"),
        ({"conversations": 3}, "'conversations' must be a list of messages, got 3"),
        ({"conversations": [{"from": "bot", "value": "x"}]}, "'conversations[0].role'"),
        ({"conversations": [{"from": "human"}]}, "'conversations[0].content' must be text"),
        ({"prompt": [USER, ANSWER]}, "'prompt' ends with role 'assistant'"),
        ({"prompt": [USER], "completion": [USER]}, "one message with role 'assistant'"),
        ({"prompt": [USER], "completion": "yo"}, "'completion' must be a list of messages"),
        ({"text": " "}, "'text' must be non-empty text"),
        ({}, "it has []"),
        ({"messages": []}, "'messages' must be a list"),
        ({"messages": "hi"}, "'messages' must be a list of messages, got 'hi'"),
        ({"messages": None}, "got None"),
        ({"messages": ["hi"]}, "'messages[0]' must be an object"),
        (
            {"messages": [USER, {"role": "bot", "content": "x"}]},
            "'messages[1].role' must be one of",
        ),
        ({"messages": [{"content": "x"}]}, "'messages[0].role'"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, "'messages[0].role'"),
        (
            {"messages": [USER, {"role": "assistant"}]},
            "'messages[1].content' must be text, got None",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "'messages[0].content'"),
        ({"messages": [USER, ANSWER | {"content": " "}]}, "'messages[1].content' is empty"),
        ({"messages": [USER, {"role": "system", "content": "x"}]}, "ends with role 'system'"),
        ({"messages": [ANSWER]}, "no message with role 'user'"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "no message with role 'user'"),
        ({"prompt": ""}, "'prompt' must be non-empty text"),
        ({"prompt": 3}, "'prompt' must be non-empty text, got 3"),
        ({"prompt": []}, "'prompt' must be a list of messages, got []"),
        ({"prompt": "hi", "completion": 3}, "'completion' must be text, got 3"),
        ({"instruction": " "}, "'instruction' must be non-empty text"),
        ({"instruction": None}, "'instruction'"),
        ({"instruction": "hi", "input": {}}, "'input' must be text, got {}"),
        ({"instruction": "hi", "output": ["yo"]}, "'output' must be text"),
        ({"body": "hi", 3: 1}, "the row has none of the fields"),
    ],
)
def test_a_malformed_row_is_named_with_its_field(row, said):
    assert said in refused(row)


@pytest.mark.parametrize(
    ("form", "field"),
    [
        ("messages", "messages"),
        ("prompt_completion", "prompt"),
        ("alpaca", "instruction"),
        ("text", "text"),
    ],
)
def test_a_row_of_another_form_than_asked_for_is_named(form, field):
    assert f"'{field}'" in refused({"body": "hi"}, form)


def test_a_long_value_is_shown_short():
    assert len(refused({"messages": "x" * 9999})) < 150


# ---- every turn ----


def test_every_answer_of_a_conversation_is_an_example():
    row = {"messages": [USER, ANSWER, USER | {"content": "b"}, ANSWER | {"content": "c"}]}
    first, last = to_examples(row, PLACE, every_turn=True)
    assert first == Example((USER,), "yo", PLACE)
    assert last == to_examples(row, PLACE)[0]
    assert (len(last.prompt), last.response) == (3, "c")


def test_an_answer_to_nobody_is_no_example():
    """A greeting before the user has said anything."""
    row = {"messages": [ANSWER, USER, ANSWER]}
    assert len(to_examples(row, PLACE, every_turn=True)) == 1
