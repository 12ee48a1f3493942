"""Rows in every form become one; what is malformed is named by place and field (S7)."""

from __future__ import annotations

import json

import pytest

from llmdistill.data.formats import Example, form_of, to_examples, unread
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
        ({"messages": [USER | {"name": "x"}, ANSWER]}, [USER | {"name": "x"}], "yo"),
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


# ---- fields with a meaning ----

SYSTEM = {"role": "system", "content": "Answer in French."}


@pytest.mark.parametrize(
    ("row", "prompt", "response"),
    [
        (
            {
                "instruction": "And then?",
                "input": "",
                "output": "Then b.",
                "system": "Answer in French.",
                "history": [["a?", "a."]],
            },
            [
                SYSTEM,
                {"role": "user", "content": "a?"},
                {"role": "assistant", "content": "a."},
                {"role": "user", "content": "And then?"},
            ],
            "Then b.",
        ),
        (
            {"instruction": "hi", "context": "there", "response": "yo"},
            [{"role": "user", "content": "hi\n\nthere"}],
            "yo",
        ),
        (
            {
                "system": "Answer in French.",
                "conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}],
            },
            [SYSTEM, USER],
            "yo",
        ),
        ({"system": "Answer in French.", "prompt": "hi"}, [SYSTEM, USER], None),
        ({"system": "Answer in French.", "messages": [USER, ANSWER]}, [SYSTEM, USER], "yo"),
        ({"system": "ignored", "messages": [SYSTEM, USER]}, [SYSTEM, USER], None),
        ({"system": " ", "prompt": "hi"}, [USER], None),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "text", "text": "h"}, {"text": "i"}]}
                ]
            },
            [USER],
            None,
        ),
        ({"instruction": "hi", "history": [], "output": "yo"}, [USER], "yo"),
    ],
)
def test_fields_that_others_know_are_used(row, prompt, response):
    assert to_examples(row, PLACE) == [Example(tuple(prompt), response, PLACE)]


@pytest.mark.parametrize(
    ("row", "names"),
    [
        ({"instruction": "hi", "output": "yo", "topic": "x", "lang": None}, ["topic"]),
        ({"prompt": "hi", "rejected": "no"}, ["rejected"]),
        ({"text": "hi", "system": "x"}, ["system"]),
        ({"system": "x", "messages": [SYSTEM, USER]}, ["system"]),
        (
            {"messages": [USER | {"emotion": "glad"}, ANSWER | {"audio": None}]},
            ["messages[].emotion"],
        ),
        ({"conversations": [{"from": "human", "value": "hi", "id": 3}]}, ["conversations[].id"]),
        ({"instruction": "hi", "input": "a", "context": "b"}, ["context"]),
        ({"instruction": "hi", "input": "", "context": "b"}, ["context"]),
        ({"instruction": "hi", "response": "yo", "id": "1", "teacher": "m"}, []),
        ({"prompt": "hi", "instruction": "other"}, ["instruction"]),
        ({"prompt": "hi", "completion": "yo", "input": "x"}, ["input"]),
    ],
)
def test_fields_that_nothing_reads_are_named(row, names):
    assert unread(row, form_of(row, PLACE)) == names


@pytest.mark.parametrize("mark", [{"weight": 0}, {"train": False}])
def test_an_excluded_answer_is_context_alone(mark):
    messages = [
        {"role": "user", "content": "2+2?"},
        {"role": "assistant", "content": "5", **mark},
        {"role": "user", "content": "Sure?"},
        {"role": "assistant", "content": "4", "weight": 1},
    ]
    (only,) = to_examples({"messages": messages}, PLACE, every_turn=True)
    assert only.response == "4"
    assert only.prompt[1] == {"role": "assistant", "content": "5"}
    assert to_examples({"messages": messages[:2]}, PLACE) == []
    sharegpt = [
        {"from": "human", "value": "2+2?"},
        {"from": "gpt", "value": "5"} | mark,
        {"from": "human", "value": "Sure?"},
        {"from": "gpt", "value": "4"},
    ]
    assert len(to_examples({"conversations": sharegpt}, PLACE, every_turn=True)) == 1


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"messages": [USER, ANSWER | {"weight": 0.5}]}, "'messages[1].weight' must be 0 or 1"),
        ({"messages": [USER, ANSWER | {"content": ""}, USER]}, "'messages[1].content' is empty"),
        (
            {"messages": [USER, ANSWER | {"content": "  "}, USER, ANSWER]},
            "'messages[1].content' is empty",
        ),
        ({"messages": [USER | {"content": ""}, ANSWER]}, "'messages[0].content' is empty"),
        ({"messages": [USER, ANSWER, USER | {"content": "\n"}]}, "'messages[2].content' is empty"),
        (
            {"instruction": "hi", "history": [["a"]]},
            "'history' must be a list of [question, answer]",
        ),
        ({"instruction": "hi", "history": [["a", ""]]}, "'history[0].content' is empty"),
        ({"instruction": "hi", "history": "a"}, "'history' must be a list"),
        ({"instruction": "hi", "history": float("nan")}, "'history' must be a list"),
        ({"instruction": "hi", "history": True}, "'history' must be a list"),
        ({"prompt": "hi", "system": 3}, "'system' must be text"),
        ({"prompt": "hi", "tools": "[{"}, "'tools' is not valid JSON"),
        ({"prompt": "hi", "tools": ["w"]}, "'tools' must be a list of objects"),
        (
            {"messages": [USER, ANSWER | {"tool_calls": "w"}]},
            "'messages[1].tool_calls' must be a list",
        ),
        ({"messages": [USER, ANSWER | {"tool_calls": [{}]}]}, "a call without a name"),
        ({"messages": [USER, ANSWER | {"thinking": 3}]}, "'messages[1].thinking' must be text"),
        (
            {"messages": [USER | {"content": [{"type": "image_url", "image_url": {}}]}]},
            "must be text or a list of text parts, got a part of type 'image_url'",
        ),
    ],
)
def test_what_cannot_be_used_is_refused_by_name(row, said):
    assert said in refused(row)
    with pytest.raises(DataError):
        to_examples(row, PLACE, every_turn=True)


W = {"type": "function", "function": {"name": "w", "arguments": {"a": 1}}}


@pytest.mark.parametrize(
    ("row", "prompt", "response"),
    [
        ({"messages": json.dumps([USER, ANSWER])}, [USER], "yo"),
        ({"conversations": json.dumps([{"from": "human", "value": "hi"}])}, [USER], None),
        (
            {"messages": [{"role": "developer", "content": "x"}, USER]},
            [{"role": "system", "content": "x"}, USER],
            None,
        ),
        ({"prompt": "hi", "response": "yo"}, [USER], "yo"),
        ({"prompt": "hi", "tools": "None"}, [USER], None),
    ],
)
def test_what_tables_and_others_write_is_read(row, prompt, response):
    assert to_examples(row, PLACE) == [Example(tuple(prompt), response, PLACE)]


@pytest.mark.parametrize(
    "spoken",
    [
        {"tool_calls": [W]},
        {"tool_calls": json.dumps([W])},
        {"tool_calls": [{"type": "function", "function": {"name": "w", "arguments": '{"a": 1}'}}]},
        {"function_call": {"name": "w", "arguments": '{"a": 1}'}},
    ],
)
def test_a_call_is_the_same_in_every_spelling(spoken):
    (found,) = to_examples(
        {"messages": [USER, {"role": "assistant", "content": None, **spoken}]}, PLACE
    )
    assert found.more["tool_calls"] == [W]
    tools = {"tools": [json.dumps(W)], "messages": [USER]}
    assert to_examples(tools, PLACE)[0].tools == (W,)
