"""What each generator asks, and what it makes of the replies."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest

from llmdistill.errors import DataError
from llmdistill.instruct.generators.base import Answering
from llmdistill.instruct.generators.given import Answer, Rewrite
from llmdistill.instruct.generators.lists import Alpaca, SelfInstruct
from llmdistill.instruct.generators.variants import Evolve, Lion, Magpie
from llmdistill.instruct.parse import write_task
from llmdistill.instruct.pipeline import exchange as run_calls
from llmdistill.instruct.requests import Reply
from llmdistill.instruct.tasks import Task
from llmdistill.sampling import Sampling

SEEDS = [Task(f"Do thing {i} well.", "", f"Thing {i} is done.") for i in range(40)]
LABELS = [i < 15 for i in range(40)]


def exchange(call, *stages):
    """Plays the teacher: the requests of each stage, and what the call ends with."""
    asked = [next(call)]
    for replies in stages:
        try:
            asked.append(call.send(replies))
        except StopIteration as stop:
            return asked, stop.value
    pytest.fail("the call asks on")


def test_alpaca_shows_three_seeds_and_reads_the_rest_of_the_list():
    alpaca = Alpaca(SEEDS, tasks_per_call=5, max_new_tokens=77)
    first = Task("Name a bird.", "", "A wren.")
    new = [Task(f"Say word {i}.", "in", "out") for i in range(2)]
    text = write_task(4, first).split("Instruction:", 1)[1]
    text += write_task(5, new[0]) + write_task(6, new[1])
    ((request,),), made = exchange(alpaca.call(3, []), [Reply(text)])
    assert made == ([first, *new], {})
    (message,) = request.messages
    assert sum(seed.instruction in message["content"] for seed in SEEDS) == 3
    assert "5 more tasks" in message["content"]
    assert (request.start, request.stop) == ("###\n4. Instruction:", "###\n9.")
    assert (request.max_new_tokens, request.sampling) == (77, Sampling())


def test_alpaca_drops_the_last_of_a_list_that_was_cut_off_and_what_is_too_many():
    text = " a\n4. Input:\n<noinput>\n4. Output:\nb\n" + "".join(
        write_task(i, Task("c", "", "d")) for i in range(5, 9)
    )
    _, made = exchange(Alpaca(SEEDS, tasks_per_call=2).call(0, []), [Reply(text)])
    assert (len(made.tasks), made.dropped) == (2, {"more than asked for": 3})
    _, made = exchange(Alpaca(SEEDS).call(0, []), [Reply(text, truncated=True)])
    assert (len(made.tasks), made.dropped) == (4, {"truncated": 1})


@pytest.mark.parametrize(
    ("said", "question"),
    [
        (" Name a bird.\n4. Input:\n<noinput>\n", Task("Name a bird.")),
        (" Name a bird.", Task("Name a bird.")),
        (" Add them.\n4. Input: 2, 3\n", Task("Add them.", "2, 3")),
        (" Add them.\n4. Input: 2, 3\n4. Input: 5", Task("Add them.", "2, 3")),
        ("\n1. Instruction: Add them.\n1. Input: 2, 3", Task("Add them.", "2, 3")),
    ],
)
def test_a_small_teacher_is_asked_for_the_answer_as_a_user_would(said, question):
    alpaca = Alpaca(
        SEEDS, tasks_per_call=1, answering=Answering(max_new_tokens=9, hint="Be brief.")
    )
    asked, made = exchange(alpaca.call(0, []), [Reply(said)], [Reply("A wren.")])
    assert asked[0][0].stop == "4. Output:"
    assert asked[1][0].messages[0]["content"] == f"{question.prompt}\n\nBe brief."
    assert made == ([replace(question, output="A wren.")], {})


@pytest.mark.parametrize(
    ("reply", "reason"),
    [(Reply(" Name a", truncated=True), "truncated"), (Reply("\n4. Input: x\n"), "unparsable")],
)
def test_half_a_question_is_not_answered(reply, reason):
    alpaca = Alpaca(SEEDS, tasks_per_call=1, answering=Answering())
    assert exchange(alpaca.call(0, []), [reply])[1] == ([], {reason: 1})


def test_a_call_is_drawn_from_the_seed_and_its_number():
    def content(seed, number):
        (request,) = next(Alpaca(SEEDS, seed=seed).call(number, []))
        return request.messages[0]["content"]

    assert content(0, 1) == content(0, 1)
    assert len({content(0, 1), content(0, 2), content(1, 1)}) == 3


def test_self_instruct_asks_for_instructions_kinds_and_instances():
    machine = [Task(f"Machine {i}.") for i in range(5)]
    call = SelfInstruct(SEEDS, LABELS).call(0, machine)
    replies = [
        [Reply(" Sort the mail.\n10. Say which is red.\n11) Half a ta", truncated=True)],
        [Reply(" No"), Reply("Yes, ")],
        [Reply("Input: a letter\nOutput: to Ann"), Reply("Output: red\nInput: a rose")],
    ]
    asked, made = exchange(call, *replies)
    assert made.tasks == [
        Task("Sort the mail.", "a letter", "to Ann"),
        Task("Say which is red.", "a rose", "red"),
    ]
    assert made.dropped == {"truncated": 1}
    content = asked[0][0].messages[0]["content"]
    assert sum(task.instruction in content for task in machine) == 2
    assert sum(f"{task.instruction}\n" in f"{content}\n" for task in SEEDS) == 6
    assert asked[0][0].start == "9."
    kinds = asked[1][0].messages[0]["content"]
    assert (
        kinds.count("choices: yes") + kinds.count("answers: yes"),
        kinds.count("answers: no"),
    ) == (12, 19)
    plain, label = (request.messages[0]["content"] for request in asked[2])
    assert plain.index("Input: ...") < plain.index("Output: ...")
    assert label.index("Output: ...") < label.index("Input: ...")


def test_self_instruct_without_machine_tasks_shows_eight_seeds():
    (request,) = next(SelfInstruct(SEEDS, LABELS).call(0, []))
    content = request.messages[0]["content"] + "\n"
    assert sum(f"{task.instruction}\n" in content for task in SEEDS) == 8


@pytest.mark.parametrize("reply", ["Input: x", "no fields", "Input: a\nInput: b\nOutput: c"])
def test_an_instance_without_its_fields_is_counted(reply):
    call = SelfInstruct(SEEDS, LABELS).call(0, [])
    _, made = exchange(call, [Reply(" Sort the mail.")], [Reply("no")], [Reply(reply)])
    assert made == ([], {"unparsable": 1})


def test_magpie_lets_the_teacher_speak_for_the_user():
    asked, made = exchange(
        Magpie().call(0, []), [Reply(" Why is the sea blue?\n")], [Reply("Because.", True)]
    )
    assert (asked[0][0].turn, asked[0][0].messages) == ("user", ())
    assert asked[1][0].messages == ({"role": "user", "content": "Why is the sea blue?"},)
    assert made == ([Task("Why is the sea blue?", "", "Because.", truncated=True)], {})


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (Reply("half a", truncated=True), "endless instruction"),
        (Reply(" \n"), "empty instruction"),
        (Reply("", refused="no"), "no"),
    ],
)
@pytest.mark.parametrize("generator", [Magpie(), Evolve(SEEDS)])
def test_no_instruction_is_no_task(generator, reply, reason):
    assert exchange(generator.call(0, []), [reply])[1] == ([], {reason: 1})


def test_what_is_refused_is_counted_and_nothing_else_is_lost():
    no = Reply("", refused="no")
    assert exchange(Alpaca(SEEDS).call(0, []), [no])[1] == ([], {"no": 1})
    assert exchange(SelfInstruct(SEEDS, LABELS).call(0, []), [no])[1] == ([], {"no": 1})
    stages = (
        [Reply(" Sort the mail.\n10. Say which is red.")],
        [no, no],
        [no, Reply("Input: a\nOutput: b")],
    )
    _, made = exchange(SelfInstruct(SEEDS, LABELS).call(0, []), *stages)
    assert made == ([Task("Say which is red.", "a", "b")], {"no": 1})
    _, made = exchange(Answer(SEEDS, samples=3).call(0, []), [Reply("one"), no, Reply("two")])
    assert ([task.output for task in made.tasks], made.dropped) == (["one", "two"], {"no": 1})
    _, made = exchange(Magpie().call(0, []), [Reply("Why?")], [no])
    assert made == ([], {"no": 1})


@pytest.mark.parametrize("made", [Alpaca, lambda seeds: SelfInstruct(seeds, LABELS[:2])])
def test_too_few_seeds_are_named(made):
    with pytest.raises(DataError, match="'seed_tasks' has 2 tasks, but each prompt needs"):
        made(SEEDS[:2])


@pytest.mark.parametrize(
    ("by", "expected"),
    [("likelihood", "b b b"), ("consensus", "a a x"), ("reference", "Thing 7"), (None, None)],
)
def test_the_best_sample_is_kept(by, expected):
    """The likeliest, the one most like the others, or most like the dataset's; never a cut one."""
    replies = [
        Reply("a a y", log_prob=-2.0),
        Reply("a a x", log_prob=-1.5),
        Reply("b b b", log_prob=-0.5),
        Reply("a z x", log_prob=-3.0),
        Reply("Thing 7", log_prob=-4.0),
        Reply("Thing 7 is done. a a x", truncated=True, log_prob=0.0),
    ]
    given = [replace(task, reference=task.output) for task in SEEDS]
    _, made = exchange(Answer(given, samples=6, best_by=by).call(7, []), replies)
    if by is None:
        assert (len(made.tasks), made.dropped) == (6, {})
    else:
        assert [task.output for task in made.tasks] == [expected]
        assert made.dropped == {"not the best sample": 5}


@pytest.mark.parametrize("kind", ["magpie", "answer", "evolve", "lion"])
def test_a_hint_is_for_the_teacher_alone(kind):
    made = {
        "magpie": Magpie, "answer": partial(Answer, SEEDS), "evolve": partial(Evolve, SEEDS),
        "lion": partial(Lion, SEEDS, SEEDS),
    }[kind](answering=Answering(hint="Be brief."))  # fmt: skip
    stages = [[Reply("Because.")]] if kind == "answer" else [[Reply("Why?")], [Reply("Because.")]]
    asked, (tasks, _) = exchange(made.call(0, []), *stages)
    last = asked[-1][0].messages[-1]["content"]
    assert last == f"{tasks[0].instruction}\n\nBe brief."
    assert "Be brief" not in tasks[0].prompt + tasks[0].output


def test_answers_are_as_many_as_asked_for():
    generator = Answer(SEEDS, samples=2)
    assert generator.num_calls == 40
    asked, made = exchange(generator.call(7, []), [Reply("one"), Reply("two")])
    assert [request.messages[0]["content"] for request in asked[0]] == ["Do thing 7 well."] * 2
    assert [task.output for task in made.tasks] == ["one", "two"]


def test_a_rewrite_keeps_what_was_there_as_its_reference():
    asked, made = exchange(Rewrite(SEEDS).call(2, []), [Reply("It is done, thing 2.")])
    content = asked[0][0].messages[0]["content"]
    assert "Do thing 2 well." in content
    assert "Thing 2 is done." in content
    (task,) = made.tasks
    assert (task.output, task.reference) == ("It is done, thing 2.", "Thing 2 is done.")
    assert task.variant == "rewritten"


@pytest.mark.parametrize(
    "reply",
    [
        Reply("It is half do", truncated=True),
        Reply("  "),
        Reply("", refused="no"),
        Reply("I'm sorry, thing 2 is beyond me."),
        Reply("I\u2019m sorry, thing 2 is beyond me."),
        Reply("As an AI I see that thing 2 is done."),
        Reply("In my own words: thing 2 is done."),
        Reply("The given answer says that thing 2 is done."),
        Reply("Thing 3 is done."),
        Reply("Thing 2 is done. "),
    ],
)
def test_a_rewrite_of_no_use_leaves_the_given_answer(reply):
    _, made = exchange(Rewrite(SEEDS, result=r"\d+").call(2, []), [reply])
    (task,) = made.tasks
    assert (task.output, task.variant) == ("Thing 2 is done.", "original")
    assert not task.truncated


def test_nothing_is_rewritten_where_there_is_no_answer():
    made = run_calls(Rewrite([Task("Name a bird."), *SEEDS[:2]]), Once("Well done."), [0, 1, 2], [])
    assert made[0].parsed == ([], {"no answer to rewrite": 1})
    assert [len(one.parsed.tasks) for one in made] == [0, 1, 1]


class Once:
    """Replies the same to all."""

    def __init__(self, text):
        self.text = text

    def respond(self, asked):
        return [Reply(self.text) for _ in asked]


def test_the_best_by_reference_needs_references():
    with pytest.raises(DataError, match="some rows have no answer. Use 'likelihood' or"):
        Answer(SEEDS, samples=2, best_by="reference")


def test_evolving_asks_for_harder_and_rarer_in_turn():
    texts = []
    for number in range(2):
        asked, made = exchange(
            Evolve(SEEDS).call(number, []), [Reply("Do two things.")], [Reply("Both done.")]
        )
        texts.append(asked[0][0].messages[0]["content"])
        variant = ("rarer", "harder")[number]
        assert made == ([Task("Do two things.", "", "Both done.", variant=variant)], {})
    assert "less common" in texts[0]
    assert "harder" in texts[1]
