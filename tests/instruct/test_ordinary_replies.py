"""Replies as chat models write them: every layout of a list is read, and nothing else gets in."""

from __future__ import annotations

import json
import time

import pytest

from llmdistill.errors import DataError
from llmdistill.generate import generate
from llmdistill.instruct.generators.lists import SelfInstruct
from llmdistill.instruct.parse import (
    after_start,
    asked_text,
    is_no_input,
    one_line,
    parse_instances,
    parse_list,
    parse_question,
    parse_tasks,
)
from llmdistill.instruct.requests import Reply
from llmdistill.instruct.tasks import Task
from tests import toy
from tests.support.files import read_jsonl, write_jsonl
from tests.support.recipes import build_generation
from tests.support.servers import chat, last, scripted

slow = pytest.mark.slow

LIST = (
    "###\n4. Instruction: Write a poem.\n4. Input:\n<noinput>\n4. Output:\nRed.\n"
    "###\n5. Instruction: Say hi to me.\n5. Input:\n<noinput>\n5. Output:\nHi.\n"
)
TASKS = [Task("Write a poem.", "", "Red."), Task("Say hi to me.", "", "Hi.")]
LAYOUTS = {
    "blank lines after marks": lambda t: t.replace("###\n", "###\n\n"),
    "blank lines everywhere": lambda t: t.replace("\n", "\n\n"),
    "no marks": lambda t: t.replace("###\n", ""),
    "CRLF": lambda t: t.replace("\n", "\r\n"),
    "CR": lambda t: t.replace("\n", "\r"),
    "a rule before a mark": lambda t: t.replace("Red.\n", "Red.\n---\n\n"),
    "rules as marks": lambda t: t.replace("###\n", "---\n"),
    "a fence at the end": lambda t: t + "```",
    "a fence around": lambda t: f"```\n{t}```\n",
    "a fence with a name around": lambda t: f"```text\n{t}```",
    "bold numbers and names": lambda t: _each_field(t, "**{number}. {name}:**"),
    "bold names": lambda t: _each_field(t, "{number}. **{name}:**"),
    "bold names before colons": lambda t: _each_field(t, "{number}. **{name}**:"),
    "code names": lambda t: _each_field(t, "{number}. `{name}:`"),
    "brackets": lambda t: _each_field(t, "{number}) {name}:"),
    "numbers in headings": lambda t: _each_field(t, "**{name}:**").replace("###\n", "### 4\n"),
    "named headings": lambda t: _each_field(t, "{name}:").replace("###\n", "**Task 4**\n"),
    "headings as names": lambda t: _each_field(t, "#### {name}:"),
    "bullets": lambda t: _each_field(t, "- {number}. {name}:"),
    "numbers above": lambda t: _each_field(t, "{name}:").replace("###\n", "{}.\n").format(4, 5),
    "bold numbers above": lambda t: (
        _each_field(t, "{name}:").replace("###", "**{}.**").format(4, 5)
    ),
    "titles": lambda t: _each_field(t, "{name}:").replace("###", "### Task {}: Birds").format(4, 5),
    "lower case": lambda t: (
        t.replace("Instr", "instr").replace("Inp", "inp").replace("Outp", "outp")
    ),
    "headings without colons": lambda t: _each_field(t, "### {name}\n"),
    "bold names alone": lambda t: _each_field(t, "**{name}**\n"),
    "full-width colons": lambda t: _each_field(t, "{number}. {name}："),
    "a remark": lambda t: f"{t}\nThese 2 tasks are all different.",
    "a remark after a mark": lambda t: f"{t}###\n\nThat is all. Have fun!",
    "a remark after a rule": lambda t: f"{t}---\nLet me know if you need more!",
    "remarks": lambda t: f"{t}\n---\n\nI hope these tasks help!\n\nWould you like some more?",
    "a full stop after <noinput>": lambda t: t.replace("<noinput>", "<noinput>."),
    "code for <noinput>": lambda t: t.replace("<noinput>", "`<noinput>`"),
    "No input": lambda t: t.replace("<noinput>", "No input"),
}


def _each_field(text, form):
    for number in "45":
        for name in ("Instruction", "Input", "Output"):
            text = text.replace(f"{number}. {name}:", form.format(number=number, name=name))
    return text


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_of_a_list_is_read(layout):
    assert parse_tasks(LAYOUTS[layout](LIST)) == (TASKS, {})


@pytest.mark.parametrize(
    "answer",
    [
        "# Poem\n### Red\nroses\n---\nand more",
        "```python\nprint(1)\n```",
        "Input: 4\nOutput: 5",
        "1. Input: a number\n2. Output: its square",
        "Dear Ann,\n\nLet me know if you have time.\n\nBest, Bob",
        "Dear Bob,\n\nI hope this email finds you well. The meeting is at 5 pm.",
        "Dear team,\n\nHere are the tasks for Monday: sweep, mop.",
        "Hello!\n\nPlease let me know if you need any further details.",
        "These birds sing:\n\nThese examples show it: wren, robin.",
        "a ** 2",
        "**Bold**",
    ],
)
def test_an_answer_keeps_what_belongs_to_it(answer):
    tasks = [Task("Write a poem.", "", answer), TASKS[1]]
    assert parse_tasks(LIST.replace("Red.", answer)) == (tasks, {})
    last_one = [TASKS[0], Task("Say hi to me.", "", answer)]
    assert parse_tasks(LIST.replace("Hi.", answer)) == (last_one, {})
    assert parse_instances(f"Input: x\nOutput: {answer}") in ([("x", answer)], None)


@pytest.mark.parametrize(
    "said",
    ["<noinput>", "<NoInput>", "<noinput>.", "`<noinput>`", "No input", "no input needed.", "None",
     "N/A", "(none)", "[No Input]", "**None**", "not applicable", "-", "Keine Eingabe",
     "Not required", "none needed", "nothing", "No additional input", "—", "Kein Input", "Sin entrada",
     "Pas d'entrée", "无输入", "入力なし", "_" * 40, "无", "なし", ""],
)  # fmt: skip
def test_no_input_is_understood_in_its_spellings(said):
    assert is_no_input(said)


@pytest.mark.parametrize(
    "said", ["None of them came.", "No input device", "0", "Naïve", "a-b", "not", "_" * 90]
)
def test_an_input_is_no_lack_of_one(said):
    assert not is_no_input(said)


@pytest.mark.parametrize(
    ("text", "items"),
    [
        (
            "9. Sort these words by length:\n   pear, fig, apple\n10. Do the following with a text:"
            "\n1) read it\n2) sum it up\n11. Name a river.",
            [
                "Sort these words by length:\npear, fig, apple",
                "Do the following with a text:\n1) read it\n2) sum it up",
                "Name a river.",
            ],
        ),
        ("9. Sing.\n\n10. Run.\n\n11. Jump.", ["Sing.", "Run.", "Jump."]),
        ("9. Sing.\n2. Run.\n3. Jump.", ["Sing.", "Run.", "Jump."]),
        ("9. **Sing.**\n**10.** Run.\n11) Jump.", ["Sing.", "Run.", "Jump."]),
        ("9. Sing.\r\n10. Run.\r\n", ["Sing.", "Run."]),
        ("9. Sing.\n10. Run.\n\nLet me know if you need more!", ["Sing.", "Run."]),
        ("9. Sing.\n10. Run.\n---\n", ["Sing.", "Run."]),
        ("9. Sing.\n10. Run.\n```", ["Sing.", "Run."]),
        ("9. Here are some:\n- Sing.\n- Run.", ["Sing.", "Run."]),
        ("9. Add:\n- 2\n- 3\n10. Run.", ["Add:\n- 2\n- 3", "Run."]),
        ("9. Sing.\n12. Run.", ["Sing.", "Run."]),
        ("9、唱歌。\n10、跑步。", ["唱歌。", "跑步。"]),
        ("9.Name a river.\n10. Name a lake.", ["Name a river.", "Name a lake."]),
        (
            "1. Plan:\n1) a\n2) b\n3) c\n2. River\n3. Lake",
            ["Plan:\n1) a\n2) b\n3) c", "River", "Lake"],
        ),
        ("### 9. Sing.\n### 10. Run.", ["Sing.", "Run."]),
        ("Task 9: Sing.\nTask 10: Run.", ["Sing.", "Run."]),
        ("9 - Sing.\n10 - Run.", ["Sing.", "Run."]),
        (
            "9. Count to 3.5 with 12 monkeys.\n12 monkeys sang.",
            ["Count to 3.5 with 12 monkeys.\n12 monkeys sang."],
        ),
        ("no list", []),
    ],
)
def test_the_items_of_a_numbered_list(text, items):
    assert parse_list(text) == items


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Output: Paris", [("", "Paris")]),
        ("**Input:** a b\n**Output:** c", [("a b", "c")]),
        ("Input: None\nOutput: x\n\nLet me know if you need more.", [("", "x")]),
        ("Input: <noinput>.\r\nOutput: x", [("", "x")]),
        ("Output: red\nInput: a rose", [("a rose", "red")]),
        ("Sure!\n\nInput: a\nOutput:\nb\nc", [("a", "b\nc")]),
        ("Example 1\nInput: a\nOutput: b\n\nExample 2:\nInput: c\nOutput: d", [("a", "b"), ("c", "d")]),
        ("Input: a\nInput: b\nOutput: c", None),
        ("Input: a", None),
        ("no fields", None),
    ],
)  # fmt: skip
def test_the_instances_of_a_reply(text, found):
    assert parse_instances(text) == found


def instances(reply, **options):
    seeds = [Task(f"Do thing {i}.") for i in range(9)]
    call = SelfInstruct(seeds, [i < 3 for i in range(9)], **options).call(0, [])
    next(call)
    call.send([Reply(" Sort the mail.")])
    call.send([Reply("no")])
    with pytest.raises(StopIteration) as stop:
        call.send([reply])
    return stop.value.value


def test_several_instances_of_an_instruction_without_contradictions():
    text = (
        "Input: a\nOutput: 1\nInput: b\nOutput: 2\nInput: a\nOutput: 3\n"
        "Input: b\nOutput: 2\nInput: c\nOutput: c\nInput: d\nOutput: 4"
    )
    made = instances(Reply(text), instances=5)
    assert [(task.input, task.output) for task in made.tasks] == [("b", "2")]
    assert made.dropped == {
        "contradicting instance": 2, "repeated instance": 1, "output repeats the input": 1,
        "more than asked for": 1,
    }  # fmt: skip
    made = instances(Reply(text, truncated=True), instances=9)
    assert made.dropped["truncated"] == 1
    assert [task.input for task in instances(Reply(text)).tasks] == ["a"]


def test_classification_seeds_alone_can_be_the_examples():
    seeds = [Task(f"Do thing {i}.") for i in range(40)]
    generator = SelfInstruct(seeds, [i % 3 == 0 for i in range(40)], only_classification=True)
    (request,) = next(generator.call(0, []))
    shown = request.messages[0]["content"]
    assert sum(f"thing {i}.\n" in f"{shown}\n" for i in range(0, 40, 3)) == 8
    assert not any(f"thing {i}.\n" in f"{shown}\n" for i in range(1, 40, 3))


@pytest.mark.parametrize("said", ["Yes", "ja", "Oui.", "Sí", "да", "是", "はい", "네"])
def test_yes_is_understood_in_the_language_of_the_seeds(said):
    seeds = [Task(f"Do thing {i}.") for i in range(9)]
    call = SelfInstruct(seeds, [False] * 9).call(0, [])
    next(call)
    call.send([Reply(" Sort the mail.")])
    (request,) = call.send([Reply(said)])
    content = request.messages[0]["content"]
    assert content.index("Output: ...") < content.index("Input: ...")


def test_examples_stand_on_one_line_without_a_colon_at_the_end():
    assert one_line("Sort these\n  words: ") == "Sort these words"
    seeds = [Task(f"Sort\nthese {i}:") for i in range(9)]
    (request,) = next(SelfInstruct(seeds, [None] * 9).call(0, []))
    listed = request.messages[0]["content"].split("\n\n")[1].split("\n")
    assert len(listed) == 8
    assert not any(line.endswith(":") for line in listed)


@pytest.mark.parametrize(
    ("text", "task"),
    [
        ("Sure! Here is a harder task:\n\nWrite a poem.", "Write a poem."),
        ("**New task:** Write a poem.", "Write a poem."),
        ("### Rewritten Prompt:\nWrite a poem.", "Write a poem."),
        ('"Write a poem."', "Write a poem."),
        ("“Write a poem.”", "Write a poem."),
        ("**Write a poem.**", "Write a poem."),
        ("Klar! Hier ist eine:\n\nWrite a poem.", "Write a poem."),
        ("Write a poem.\n\nLet me know if you would like another!", "Write a poem."),
        ("Translate this:\n\nThe cat.", "Translate this:\n\nThe cat."),
        ("Sure! Here is a new task: Write a poem.", "Write a poem."),
        ("**New Task**\n\nWrite a poem.", "Write a poem."),
        ("**Rewritten Prompt**\nWrite a poem.", "Write a poem."),
        ("```\nWrite a poem.\n```", "Write a poem."),
        ("The new task is: Write a poem.", "Write a poem."),
        ("1. Write a poem.", "Write a poem."),
        ("Aufgabe: Write a poem.", "Write a poem."),
        ("Write a poem.\n\n(This version adds one more constraint.)", "Write a poem."),
        ("Write a poem.\n\n**Explanation:** It is harder.", "Write a poem."),
        ("Write a poem.\n\nThis task is harder because it rhymes.", "Write a poem."),
        (
            "Plan my day.\n\nHere are my tasks: cook, clean.",
            "Plan my day.\n\nHere are my tasks: cook, clean.",
        ),
        (
            "Surely You're Joking!\nSummarise this book.",
            "Surely You're Joking!\nSummarise this book.",
        ),
        ("OKLAHOMA!\nWho wrote this musical?", "OKLAHOMA!\nWho wrote this musical?"),
        (
            "Great Expectations is a novel:\nWho wrote it?",
            "Great Expectations is a novel:\nWho wrote it?",
        ),
        ("Here are the numbers 1, 2, 3:\nSort them.", "Here are the numbers 1, 2, 3:\nSort them."),
        ("1. Read it.\n2. Sum it up.", "1. Read it.\n2. Sum it up."),
        ('Say "a" and "b"', 'Say "a" and "b"'),
    ],
)
def test_a_task_comes_without_what_is_said_about_it(text, task):
    assert asked_text(text) == task


@pytest.mark.parametrize(
    "text",
    [
        "4. Instruction: Write it with Instruction: in it",
        "Sure, here is a poem about Input: <noinput>",
        "4. Instruction: Write <noinput>",
        "",
    ],
)
def test_a_question_that_holds_a_field_is_not_read(text):
    assert parse_question(text) is None


@pytest.mark.parametrize(
    ("start", "text"),
    [
        ("9.", "Steps:\n1. a\n2. b\n10. Name a lake."),
        ("###\n4. Instruction:", " Write.\nInput: <noinput>\nOutput: x\n\nInstruction: b"),
    ],
)
def test_what_continues_an_item_is_not_cut(start, text):
    assert after_start(start, text) == text


@pytest.mark.timeout(20)
@pytest.mark.parametrize("sign", [" ", "#", "_", "*", "\n", "1. ", "-", "`", "###\n", "Input: "])
def test_a_teacher_that_loops_is_read_in_no_time(sign):
    start, text = time.perf_counter(), sign * 20_000 + "x"
    for read in (parse_tasks, parse_question, parse_instances, asked_text, is_no_input):
        read(text)
    assert time.perf_counter() - start < 10


# ---- whole runs ----


def recipe(server, folder, generator, **changes):
    teacher = {"kind": "remote", "model": "m", "url": server.url, "retries": 1}
    given = {
        "output": str(folder / "set"), "teacher": teacher, "generator": generator, "test_share": 0,
    }  # fmt: skip
    return build_generation(given | changes)


def outputs(folder):
    return read_jsonl(folder / "set" / "rows.jsonl")


def a_list(number, gap="\n"):
    items = (
        f"###{gap}\n{i}. Instruction: Tell thing {number * i} of the {number * 7} towns near "
        f"{i * 31}.\n{i}. Input:\n<noinput>\n{i}. Output:\nIt is the number {number}.\n"
        for i in range(4, 21)
    )
    return "".join(items)


@slow
def test_lists_of_a_chat_server_are_read(tmp_path):
    with scripted(lambda body, number: chat(a_list(number))) as server:
        given = recipe(server, tmp_path, {"kind": "alpaca"}, target=50, round_size=4, filters=[])
        assert generate(given).counts.kept == 50
        assert server.asked <= 16


@slow
def test_no_closing_remark_gets_into_a_row(tmp_path):
    remark = "###\n\nThese 17 tasks are all different. Let me know if you need more!"
    with scripted(lambda body, number: chat(a_list(number, "") + remark)) as server:
        generate(recipe(server, tmp_path, {"kind": "alpaca"}, target=50, filters=[], round_size=4))
    assert not [row for row in outputs(tmp_path) if "Let me know" in row["output"]]


@slow
@pytest.mark.parametrize(
    "form",
    [
        "Sure! Here is one more task:\n\n**4. Instruction:** {}\n**4. Input:** <noinput>",
        "Instruction: {}\nInput: <noinput>",
        "### 4\n**Instruction**: {}\n**Input**: None",
        "{}\n4. Input: <noinput>",
    ],
)
def test_the_preface_of_a_question_is_no_instruction(tmp_path, form):
    def answer(body, number):
        if "list of tasks" in last(body):
            return chat(form.format(f"Write a poem about the sea number {number * 13}."))
        return chat("Here is a fine answer about the sea.")

    generator = {"kind": "alpaca", "tasks_per_call": 1, "answering": {}}
    with scripted(answer) as server:
        generate(recipe(server, tmp_path, generator, target=1, round_size=1))
    (row,) = outputs(tmp_path)
    assert row["instruction"] == "Write a poem about the sea number 13."
    assert row["input"] == ""


@slow
@pytest.mark.parametrize("kind", ["alpaca", "self_instruct"])
def test_a_round_that_cannot_be_read_stops_the_run_and_shows_a_reply(tmp_path, kind):
    with scripted(lambda body, number: chat("I would rather talk of birds.")) as server:
        given = recipe(server, tmp_path, {"kind": kind}, target=50, round_size=4, filters=[])
        if (
            kind == "self_instruct"
        ):  # all of it is one instruction, and then no instance can be read
            given = given.model_copy(update={"round_size": 2})
        with pytest.raises(DataError, match=r"no task could be read from \d calls.*talk of birds"):
            generate(given)
        # What was paid for is recorded, and a resumed run makes another round.
        before = server.asked
        assert len(read_jsonl(tmp_path / "set" / "calls.jsonl")) == given.round_size
        with pytest.raises(DataError, match="no task could be read"):
            generate(given, resume=True)
        assert server.asked == 2 * before


@slow
def test_seeds_without_labels_borrow_those_of_the_included_tasks(tmp_path, caplog):
    seeds = [{"instruction": f"Explain rule {i} to a child.", "output": "So."} for i in range(20)]
    write_jsonl(tmp_path / "seeds.jsonl", seeds)
    kinds = []

    def answer(body, number):
        if "list of tasks" in last(body):
            return chat(
                f"1. Sort the {number * 7} mails of {number * 11} people by colour {number}."
            )
        if "Fixed answers" in last(body):
            kinds.append(last(body))
            return chat("Yes")
        return chat("Output: red\nInput: a rose")

    caplog.set_level("INFO", "llmdistill")
    with scripted(answer) as server:
        seeded = {"seed_tasks": str(tmp_path / "seeds.jsonl"), "filters": [], "round_size": 4}
        generate(recipe(server, tmp_path, {"kind": "self_instruct"}, target=3, **seeded))
    assert kinds[0].count("Fixed answers: yes") == 12
    assert "no field 'is_classification'" in caplog.text
    assert {row["input"] for row in outputs(tmp_path)} == {"a rose"}


LANGUAGES = {
    "German": ("Erkläre die Regel Nummer {} des Hauses einem Kind.", "Weil es so ist.", "Ja"),
    "Chinese": ("请向孩子解释房子里的第{}条规则是什么。", "因为这样更好。", "是"),
    "Russian": ("Объясни ребёнку правило номер {} нашего дома.", "Потому что так надо.", "да"),
    "Hindi": ("घर का नियम संख्या {} एक बच्चे को समझाओ।", "क्योंकि ऐसा ही है।", "हाँ"),
}


@slow
@pytest.mark.parametrize("kind", ["alpaca", "self_instruct", "magpie"])
@pytest.mark.parametrize("language", LANGUAGES)
def test_seeds_and_teacher_in_another_language(tmp_path, language, kind):
    """With the default filters, but for `rouge`: the toy teacher says much the same each time."""
    question, because, yes = LANGUAGES[language]
    seeds = [
        {"instruction": question.format(f"{i}{i}"), "output": because, "is_classification": i < 4}
        for i in range(1, 12)
    ]
    write_jsonl(tmp_path / "seeds.jsonl", seeds)
    toy.tokenizer().save_pretrained(tmp_path / "tokenizer")

    def answer(body, number):
        if "prompt" in body:
            choice = {"index": 0, "finish_reason": "stop", "text": question.format(number)}
            return chat("") | {"choices": [choice]}
        if kind == "alpaca" and "exactly this form" in last(body):
            items = (
                f"###\n\n**{i}. Instruction:** {question.format(100 * number + i)}\n**{i}. Input:**\n"
                f"<noinput>\n**{i}. Output:**\n{because}\n\n"
                for i in range(4, 8)
            )
            return chat("".join(items))
        if "list of tasks" in last(body):
            return chat(f"1. {question.format(number)}\n2. {question.format(number * 1000)}")
        if "Fixed answers" in last(body):
            return chat(yes)
        return chat(
            f"Output: {because}\nInput: {question}" if "Use this form" in last(body) else because
        )

    filters = ["truncated", "empty_or_echo", "repeated_lines", "length", "odd_start", "blacklist"]
    with scripted(answer) as server:
        teacher = {"kind": "remote", "model": "m", "url": server.url}
        teacher |= {"tokenizer": str(tmp_path / "tokenizer")} if kind == "magpie" else {}
        changes = {
            "teacher": teacher, "seed_tasks": str(tmp_path / "seeds.jsonl"), "target": 6, "round_size": 4,
            "filters": [{"kind": name} for name in filters],
        }  # fmt: skip
        generate(recipe(server, tmp_path, {"kind": kind}, **changes))
    rows = outputs(tmp_path)
    assert len(rows) == 6
    head = question.partition("{")[0]
    assert all(row["instruction"].startswith(head) for row in rows)
    assert {row["output"] for row in rows} == {because}
    saved = (tmp_path / "set" / "train.jsonl").read_text(encoding="utf-8")
    assert head in saved  # as text, not as escapes
    assert json.loads(saved.split("\n")[0])
