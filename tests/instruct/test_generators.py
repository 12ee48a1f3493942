"""What each generator asks, and what it makes of the replies."""

from __future__ import annotations

import pytest

from llmdistill.batch import Sampling
from llmdistill.instruct.generators import Alpaca, Answer, Evolve, Magpie, Rewrite, SelfInstruct
from llmdistill.instruct.parse import write_task
from llmdistill.instruct.requests import Reply
from llmdistill.instruct.tasks import Task

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
    assert made == ([first, *new], 0)
    (message,) = request.messages
    assert sum(seed.instruction in message["content"] for seed in SEEDS) == 3
    assert "5 more tasks" in message["content"]
    assert request.start == "###\n4. Instruction:"
    assert (request.max_new_tokens, request.sampling) == (77, Sampling())


def test_alpaca_drops_the_last_of_a_list_that_was_cut_off_and_what_is_too_many():
    text = " a\n4. Input:\n<noinput>\n4. Output:\nb\n" + "".join(
        write_task(i, Task("c", "", "d")) for i in range(5, 9)
    )
    _, made = exchange(Alpaca(SEEDS, tasks_per_call=2).call(0, []), [Reply(text)])
    assert len(made.tasks) == 2
    _, made = exchange(Alpaca(SEEDS).call(0, []), [Reply(text, truncated=True)])
    assert len(made.tasks) == 4


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


@pytest.mark.parametrize("reply", ["Output: x", "no fields", "Input: a\nInput: b\nOutput: c"])
def test_an_instance_without_its_fields_is_counted(reply):
    call = SelfInstruct(SEEDS, LABELS).call(0, [])
    _, made = exchange(call, [Reply(" Sort the mail.")], [Reply("no")], [Reply(reply)])
    assert made == ([], 1)


def test_magpie_lets_the_teacher_speak_for_the_user():
    asked, made = exchange(
        Magpie().call(0, []), [Reply(" Why is the sea blue?\n")], [Reply("Because.", True)]
    )
    assert (asked[0][0].turn, asked[0][0].messages) == ("user", ())
    assert asked[1][0].messages == ({"role": "user", "content": "Why is the sea blue?"},)
    assert made == ([Task("Why is the sea blue?", "", "Because.", truncated=True)], 0)


@pytest.mark.parametrize("reply", [Reply("half a", truncated=True), Reply(" \n")])
@pytest.mark.parametrize("generator", [Magpie(), Evolve(SEEDS)])
def test_no_instruction_is_no_task(generator, reply):
    assert exchange(generator.call(0, []), [reply])[1] == ([], 1)


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


def test_evolving_asks_for_harder_and_rarer_in_turn():
    texts = []
    for number in range(2):
        asked, made = exchange(
            Evolve(SEEDS).call(number, []), [Reply("Do two things.")], [Reply("Both done.")]
        )
        texts.append(asked[0][0].messages[0]["content"])
        assert made == ([Task("Do two things.", "", "Both done.")], 0)
    assert "less common" in texts[0]
    assert "harder" in texts[1]
