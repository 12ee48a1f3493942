"""What users of Alpaca, Self-Instruct, Magpie, WizardLM and distilabel expect of a generator."""

from __future__ import annotations

import json
import sys
from collections import Counter

import pytest
import torch
from datasets import load_dataset
from pyarrow.parquet import read_table

from llmdistill.cli import main
from llmdistill.data.collate import PromptDataset
from llmdistill.data.render import open_user_turn
from llmdistill.decoding.sample import penalised
from llmdistill.errors import DataError, RecipeError
from llmdistill.generate import generate
from llmdistill.instruct import filters, model_filters
from llmdistill.instruct.exchange import exchange
from llmdistill.instruct.generators.base import Answering, SystemPrompt
from llmdistill.instruct.generators.given import Answer
from llmdistill.instruct.generators.variants import EVOLUTIONS, Evolve, Magpie
from llmdistill.instruct.judging import ASPECTS, score_of
from llmdistill.instruct.requests import Reply
from llmdistill.instruct.tasks import Task
from llmdistill.sampling import PenalisedSampling, Sampling
from tests import toy
from tests.support.files import read_jsonl, write_jsonl
from tests.support.recipes import build_generation
from tests.support.servers import chat, last, scripted

slow = pytest.mark.slow
SEEDS = [Task(f"Do thing {i} well.", "", f"Thing {i} is done.") for i in range(40)]


class Says:
    """Replies with what a function makes of a request."""

    def __init__(self, reply):
        self.reply, self.asked = reply, []

    def respond(self, asked):
        self.asked += asked
        found = [self.reply(one.request) for one in asked]
        return [one if isinstance(one, Reply) else Reply(one) for one in found]


def tasks_of(generator, reply, calls=1):
    """The tasks of the first calls, and all requests."""
    responder = Says(reply)
    made = exchange(generator, responder, list(range(calls)), [])
    return made, [one.request for one in responder.asked]


def recipe(server, folder, generator, teacher=None, **changes):
    given = {
        "output": str(folder / "set"), "filters": [], "test_share": 0.0, "generator": generator,
        "teacher": {"kind": "remote", "model": "m", "url": server.url} | (teacher or {}),
    }  # fmt: skip
    return build_generation(given | changes)


def prompts(folder, number=8):
    path = folder / "prompts.jsonl"
    write_jsonl(path, [{"prompt": f"What is {i} plus {i}?"} for i in range(number)])
    return str(path)


# ---- system prompts ----


SYSTEM = (SystemPrompt("You teach maths.", 3.0), SystemPrompt("You are a pirate.", 1.0))


def test_a_system_prompt_is_drawn_by_its_weight_and_stays_in_the_row():
    generator = Answer(SEEDS, answering=Answering(system=SYSTEM))
    made, requests = tasks_of(generator, lambda request: "Done.", 40)
    drawn = Counter(request.messages[0]["content"] for request in requests)
    assert set(drawn) == {one.text for one in SYSTEM}
    assert drawn["You teach maths."] > drawn["You are a pirate."]
    for one, request in zip(made, requests, strict=True):
        assert one.parsed.tasks[0].messages_before == request.messages[:1]
    again, _ = tasks_of(generator, lambda request: "Done.", 40)
    assert again == made
    other = Answer(SEEDS, seed=1, answering=Answering(system=SYSTEM))
    assert tasks_of(other, lambda request: "Done.", 40)[1] != requests


def test_a_given_system_message_stays():
    context = ({"role": "system", "content": "You are kind."},)
    given = [Task("Why?", context=context)]
    (made,), (request,) = tasks_of(
        Answer(given, answering=Answering(system=SYSTEM)), lambda request: "So."
    )
    assert [m["content"] for m in request.messages] == ["You are kind.", "Why?"]
    assert made.parsed.tasks[0].context == context


def test_magpie_writes_questions_under_the_system_prompt():
    _, (question, answer) = tasks_of(
        Magpie(answering=Answering(system=SYSTEM[:1])),
        lambda request: "What is 2 + 2?" if request.turn == "user" else "4",
    )
    assert (
        question.messages
        == answer.messages[:1]
        == ({"role": "system", "content": "You teach maths."},)
    )


def test_a_users_turn_is_opened_after_other_messages():
    tokenizer = toy.tokenizer()
    before = (
        {"role": "system", "content": "the sea"}, {"role": "user", "content": "what a user says"},
        {"role": "assistant", "content": "blue <|im_end|>"},
    )  # fmt: skip
    ids = open_user_turn(tokenizer, None, before)
    text = tokenizer.decode(ids)
    assert text.endswith("<|im_start|>user\n")
    assert text.count("<|im_start|>") == 4
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert ids.count(end) == 3  # the one in the answer is text


# ---- several turns, questions alone ----


def speaks(questions, answers):
    """A teacher that says these questions and answers, one after the other."""
    said = {"user": iter(questions), "assistant": iter(answers)}
    return lambda request: next(said[request.turn])


def test_a_conversation_has_several_turns():
    (made,), requests = tasks_of(Magpie(turns=3), speaks("abc", "xyz"))
    (task,) = made.parsed.tasks
    assert [m["content"] for m in task.messages_after()] == list("axbycz")
    assert task.variant == "3 turns"
    assert [m["content"] for m in requests[4].messages] == list("axby")
    assert [one.instruction + one.output for one in task.each_turn()] == ["ax", "by", "cz"]


@pytest.mark.parametrize(
    ("questions", "answers", "kept", "dropped"),
    [
        (["a", Reply("half", truncated=True)], "x", "ax", {}),
        (["a", " "], "x", "ax", {}),
        (["a", "b"], ["x", Reply("", refused="no")], "ax", {}),
        (["a", "b"], ["x", Reply("half", truncated=True)], "ax", {}),
        (["a", "b"], ["x", " "], "ax", {}),
        ([" "], [], "", {"empty instruction": 1}),
        (["a"], [Reply("", refused="no")], "", {"no": 1}),
    ],
)
def test_a_turn_that_fails_ends_the_conversation_before_it(questions, answers, kept, dropped):
    (made,), _ = tasks_of(Magpie(turns=3), speaks(questions, answers))
    found = [m["content"] for task in made.parsed.tasks for m in task.messages_after()]
    assert ("".join(found), made.parsed.dropped) == (kept, dropped)


@slow
def test_all_turns_are_filtered_and_saved(tmp_path):
    toy.tokenizer().save_pretrained(tmp_path / "tokenizer")

    def answer(body, number):
        if "prompt" in body:
            text = f"What is question {number} about?"
            return chat("") | {"choices": [{"index": 0, "finish_reason": "stop", "text": text}]}
        return chat("no no no no no no no no" if len(body["messages"]) == 3 else f"It is {number}.")

    teacher = {"tokenizer": str(tmp_path / "tokenizer"), "concurrency": 1}
    generator = {"kind": "magpie", "turns": 2}
    with scripted(answer) as server:
        made = generate(recipe(server, tmp_path, generator, teacher, target=3, round_size=3))
        (row, *_) = read_jsonl(made.folder / "train.jsonl")
        assert [m["role"] for m in row["messages"]] == ["user", "assistant"] * 2
        assert row["variant"] == "2 turns"
        assert len(PromptDataset.of([row], toy.tokenizer())) == 1
        changes = {"filters": [{"kind": "repeated_lines"}], "target": 3, "round_size": 3}
        with pytest.raises(DataError, match="repeats itself"):
            generate(recipe(server, tmp_path, generator, teacher, **changes), overwrite=True)


@slow
@pytest.mark.parametrize("format", ["messages", "alpaca"])
def test_questions_alone_can_be_written(tmp_path, format):
    write_jsonl(tmp_path / "seeds.jsonl", [{"instruction": f"Tell of {i}."} for i in range(9)])
    with scripted(lambda body, number: chat(f"Tell of the thing {number * 7} here.")) as server:
        generator = {"kind": "evolve", "answering": None}
        changes = {
            "seed_tasks": str(tmp_path / "seeds.jsonl"), "target": 5, "format": format,
            "filters": [{"kind": name} for name in ("truncated", "empty_or_echo", "repeated_lines")],
        }  # fmt: skip
        made = generate(recipe(server, tmp_path, generator, **changes))
        assert server.asked <= 64
    rows = read_jsonl(made.folder / "train.jsonl")
    assert len(rows) == 5
    if format == "messages":
        assert [m["role"] for m in rows[0]["messages"]] == ["user"]
    taken = PromptDataset.of(rows, toy.tokenizer())
    assert len(taken) == 5


def test_a_question_can_end_at_its_first_line():
    _, (request, _) = tasks_of(Magpie(one_line=True), lambda request: "What?")
    assert request.stop == "\n"


# ---- penalties ----


def test_penalties_lower_what_was_written():
    scores_BV = torch.zeros(2, 5)
    written_BG = torch.tensor([[1, 1, 2], [4, 4, 4]])
    sampling = PenalisedSampling(presence_penalty=0.5, frequency_penalty=0.25)
    found_BV = penalised(scores_BV, written_BG, sampling)
    assert found_BV.tolist() == [[0, -1.0, -0.75, 0, 0], [0, 0, 0, 0, -1.25]]
    assert penalised(scores_BV, written_BG[:, :0], sampling).tolist() == scores_BV.tolist()


@slow
def test_a_teacher_here_avoids_what_it_wrote():
    from llmdistill.instruct.requests import Asked, Request, user
    from llmdistill.instruct.responders import LocalResponder
    from llmdistill.teachers.local import LocalTeacher

    teacher = LocalTeacher(toy.teacher_model(), toy.tokenizer("teacher"))
    responder = LocalResponder(teacher, seed=0)

    def written(sampling):
        request = Request(user("tell of birds"), sampling, 40)
        (reply,) = responder.respond([Asked(0, 0, 0, request)])
        return reply.text

    plain = written(Sampling(temperature=0.0))
    varied = written(
        PenalisedSampling(temperature=0.0, presence_penalty=2.0, frequency_penalty=2.0)
    )
    assert len(set(varied)) / len(varied) > len(set(plain)) / len(plain)
    assert written(PenalisedSampling(temperature=0.0)) == plain


@slow
def test_penalties_reach_a_server(tmp_path):
    sampling = {"presence_penalty": 2.0, "frequency_penalty": 0.5}
    generator = {
        "kind": "answer", "prompts": prompts(tmp_path), "answering": {"sampling": sampling},
    }  # fmt: skip
    with scripted(lambda body, number: chat(f"It is {number}.")) as server:
        made = generate(recipe(server, tmp_path, generator))
        assert all(sampling.items() <= body.items() for _, _, body in server.seen)
    (row, *_) = read_jsonl(made.folder / "train.jsonl")
    assert json.loads(row["sampling"])["answering.sampling"]["presence_penalty"] == 2.0


# ---- judge ----


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("7", 7), ("Score: 8", 8), ("8/10", 8), ("I'd say 7 out of 10.", 7), ("7.5", 7.5), ("7,5", 7.5),
        ("On a scale of 1 to 10: 6", 6), ("It has 3 errors. Score: 6", 6), ("-5", None), ("3 or 4", None),
        ("From 1 (useless) to 10, I say 6", 6), ("**9**", 9), ("11", None), ("0", None), ("good", None), ("", None),
    ],
)  # fmt: skip
def test_the_score_in_a_reply(text, score):
    assert score_of(text) == score


def test_every_aspect_has_a_prompt_that_shows_the_question():
    for ask_for in ASPECTS.values():
        assert "Do thing 3 well." in ask_for(SEEDS[3])


def judged(body, number):
    """Scores an answer by its number, and a question by its own."""
    text = last(body)
    if "How good" in text:
        return chat(f"{int(text.split('It is ')[1].split('.')[0]) % 10 + 1}/10")
    if "How difficult" in text:
        return chat("3" if "1 plus 1" in text else "no idea")
    return chat(f"It is {number}.")


@slow
def test_a_judge_scores_rows_and_filters_drop_by_it(tmp_path):
    judge = {"aspects": ["quality", "difficulty"]}
    generator = {"kind": "answer", "prompts": prompts(tmp_path, 20)}
    with scripted(judged) as server:
        made = generate(recipe(server, tmp_path, generator, judge=judge))
        assert server.asked == 60
        rows = read_jsonl(made.folder / "train.jsonl")
        by_question = {row["messages"][0]["content"]: row for row in rows}
        one, other = (by_question[f"What is {i} plus {i}?"] for i in (1, 2))
        assert (one["score_difficulty"], other.get("score_difficulty")) == (3.0, None)
        assert all(1 <= row["score_quality"] <= 10 for row in rows)
        # The filter may be added later: nothing is asked again.
        good = [{"kind": "score", "aspect": "quality", "at_least": 6}]
        again = generate(
            recipe(server, tmp_path, generator, judge=judge, filters=good), resume=True
        )
        assert server.asked == 60
        assert again.counts.dropped["quality too low"] == sum(r["score_quality"] < 6 for r in rows)
        hard = [{"kind": "score", "aspect": "difficulty", "at_most": 9}]
        again = generate(
            recipe(server, tmp_path, generator, judge=judge, filters=hard), resume=True
        )
        assert again.counts.dropped["no score of difficulty"] >= 17
        # So may the judge.
        generate(recipe(server, tmp_path, generator), resume=True)
        assert server.asked == 60


@slow
def test_a_score_that_was_refused_is_asked_for_again(tmp_path):
    is_bad = True

    def answer(body, number):
        if "How difficult" in last(body):
            return (400, {}, {"error": {"message": "no"}}) if is_bad and number % 3 else chat("5")
        return chat(f"Tell the {number} children of town {number * 7} about {number * 11} birds.")

    write_jsonl(tmp_path / "seeds.jsonl", [{"instruction": f"Tell of {i}."} for i in range(9)])
    changes = {"seed_tasks": str(tmp_path / "seeds.jsonl"), "target": 8, "round_size": 8}
    changes |= {"judge": {"aspects": ["difficulty"]}}
    with scripted(answer) as server:
        given = recipe(server, tmp_path, {"kind": "evolve", "answering": None}, **changes)
        generate(given)
        is_bad = False
        asked = server.asked
        made = generate(given, resume=True)
        assert 0 < server.asked - asked < 8
    rows = read_jsonl(made.folder / "train.jsonl")
    assert {row["score_difficulty"] for row in rows} == {5.0}


@slow
def test_samples_without_any_score_are_no_best_ones(tmp_path):
    def answer(body, number):
        return (400, {}, {"error": {}}) if "How good" in last(body) else chat(f"It is {number}.")

    generator = {
        "kind": "answer", "prompts": prompts(tmp_path), "samples": 2, "best_by": "judge",
    }  # fmt: skip
    error = pytest.raises(DataError, match="no score of any sample': 16")
    with scripted(answer) as server, error:
        generate(recipe(server, tmp_path, generator))


@slow
def test_another_model_can_be_the_judge(tmp_path):
    generator = {"kind": "answer", "prompts": prompts(tmp_path, 4)}
    with scripted(judged) as server, scripted(lambda body, number: chat("9")) as other:
        section = {"kind": "remote", "model": "j", "url": other.url, "concurrency": 1}
        judge = {"aspects": ["quality"], "teacher": section}
        made = generate(recipe(server, tmp_path, generator, judge=judge))
        assert (server.asked, other.asked) == (4, 4)
        assert other.seen[0][2]["model"] == "j"
        assert {row["score_quality"] for row in read_jsonl(made.folder / "train.jsonl")} == {9.0}
        # Its scores are not taken for those of a third one.
        other.reply = lambda body, number: chat("4")
        third = {"aspects": ["quality"], "teacher": section | {"model": "k"}}
        generate(recipe(server, tmp_path, generator, judge=third), resume=True)
        assert (server.asked, other.asked) == (4, 8)
        assert {row["score_quality"] for row in read_jsonl(made.folder / "train.jsonl")} == {4.0}
    assert "**Judge**: `k`" in (made.folder / "README.md").read_text()


@slow
@pytest.mark.parametrize("format", ["messages", "alpaca"])
def test_pairs_of_preferences_for_dpo(tmp_path, format):
    generator = {
        "kind": "answer", "prompts": prompts(tmp_path, 10), "samples": 3, "best_by": "judge", "pairs": True,
    }  # fmt: skip
    with scripted(judged) as server:
        made = generate(recipe(server, tmp_path, generator, format=format))
        assert server.asked == 60
    rows = read_jsonl(made.folder / "train.jsonl")
    for row in rows:
        assert row["score_chosen"] > row["score_rejected"]
        if format == "messages":
            assert [m["role"] for m in row["prompt"]] == ["user"]
            assert row["chosen"][0]["content"] != row["rejected"][0]["content"]
        else:
            assert row["chosen"] != row["rejected"]
            assert "output" not in row
    assert len(rows) + made.counts.dropped["no preference"] / 3 == 10
    loaded = load_dataset(str(made.folder), cache_dir=str(tmp_path / "c"))
    assert {"chosen", "rejected"} <= set(loaded["train"].column_names)


def pair_of(replies, by="reference"):
    given = [Task("Say it.", reference="a b c d")]
    said = iter(replies)
    generator = Answer(given, samples=len(replies), best_by=by, pairs=True)
    (made,), _ = tasks_of(generator, lambda request: next(said))
    return made.parsed


def test_a_pair_needs_two_whole_answers_that_differ():
    made = pair_of(["a b c d", "a b", "x"])
    (task,) = made.tasks
    assert (task.output, task.rejected) == ("a b c d", "x")
    assert task.scores == {"chosen": 1.0, "rejected": 0.0}
    assert made.dropped == {"not the best sample": 2}
    cut = pair_of(["a b c d", Reply("x", truncated=True), "", "a b"])
    assert cut.tasks[0].rejected == "a b"
    for same in (["x", "y"], ["a", "a"], ["a", Reply("b", truncated=True)], ["a", ""]):
        assert pair_of(same) == ([], {"no preference": 2})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"filters": [{"kind": "score", "aspect": "quality", "at_least": 3}]}, "needs a judge of 'quality'"),
        ({"filters": [{"kind": "score", "aspect": "quality"}]}, "set 'at_most', 'at_least' or both"),
        ({"generator": {"kind": "magpie", "answering": None}, "judge": {}}, "have no 'quality'"),
        ({"generator": {"kind": "magpie", "answering": None, "turns": 2}}, "need answers between"),
        ({"generator": {"kind": "answer", "prompts": "x", "pairs": True}}, "needs an order of the samples"),
        ({"generator": {"kind": "evolve", "own_ways": {"fun": "Make it fun."}}}, r"Write \{task\} where"),
        ({"generator": {"kind": "evolve", "ways": []}}, "at least one way"),
        ({"generator": {"kind": "evolve", "answering": {"json_schema": {}}}}, "needs a teacher of kind remote"),
        ({"generator": {"kind": "evolve", "sampling": {"presence_penalty": 3.0}}}, "presence_penalty"),
        ({"generator": {"kind": "evolve", "sampling": {"presence_penalty": 1.0, "continuous": True}}}, "penalties cannot"),
    ],
)  # fmt: skip
def test_a_wrong_recipe_is_named(changes, said):
    given = {"output": "o", "teacher": {"model": "m"}, "generator": {"kind": "magpie"}, "target": 3}
    with pytest.raises(RecipeError, match=said):
        build_generation(given | changes)


# ---- evolution ----


@pytest.mark.parametrize("way", EVOLUTIONS)
def test_each_way_shows_the_task_and_is_recorded(way):
    (made,), (request, _) = tasks_of(
        Evolve(SEEDS[:1], ways=[way]), lambda request: "Do two hard things at once."
    )
    assert "Do thing 0 well." in request.messages[0]["content"]
    assert made.parsed.tasks[0].variant == way


def test_a_task_is_evolved_in_several_steps_and_ways_of_ones_own():
    said = iter(["Do two things.", "Do three other deeds.", "Done."])
    generator = Evolve(SEEDS[:1], ways=["harder"], own_ways={"fun": "{task}\nFunnier!"}, steps=2)
    (made,), requests = tasks_of(generator, lambda request: next(said))
    assert requests[1].messages[0]["content"] == "Do two things.\nFunnier!"
    (task,) = made.parsed.tasks
    assert (task.instruction, task.variant) == ("Do three other deeds.", "harder, fun")
    assert generator.at_most.requests == 3


@pytest.mark.parametrize(
    "reply",
    [
        "Do thing 0 well.", "do THING 0 well", "Here is a harder version of the given prompt",
        "I'm sorry, but I cannot do that.", "The rewritten task is about things.",
        "As an AI I have no tasks.",
    ],
)  # fmt: skip
def test_a_failed_evolution_is_recognised(reply):
    (made,), requests = tasks_of(Evolve(SEEDS[:1]), lambda request: reply)
    assert made.parsed == ([], {"failed evolution": 1})
    assert len(requests) == 1
    # After a step that went well, its result is kept.
    said = iter(["Write a poem of the sea.", "Write a poem of the sea.", "Blue."])
    (made,), _ = tasks_of(Evolve(SEEDS[:1], steps=2), lambda request: next(said))
    assert made.parsed.tasks[0].instruction == "Write a poem of the sea."
    assert made.parsed.tasks[0].variant == "rarer"


def test_an_apology_is_no_answer_to_an_evolved_task():
    said = iter(["Write a poem of the sea.", "I'm sorry, that is too hard for me."])
    (made,), _ = tasks_of(Evolve(SEEDS[:1]), lambda request: next(said))
    assert made.parsed == ([], {"failed evolution": 1})
    long = "Sorry that this is long. " * 40
    said = iter(["Write a poem of the sea.", long])
    (made,), _ = tasks_of(Evolve(SEEDS[:1]), lambda request: next(said))
    assert len(made.parsed.tasks) == 1


# ---- one's own generator and filter ----


OWN = """
from llmdistill.instruct.own import Task, ask

ANIMALS = ["cat", "owl", "eel"]


def riddles(number, kept, tone="short"):
    animal = ANIMALS[number % 3]
    (riddle,) = yield [ask(f"Write a {tone} riddle number {number} about: {animal}")]
    (solution,) = yield [ask(f"Solve this riddle: {riddle.text}")]
    return [Task(riddle.text, output=solution.text)]


def no_owls(task):
    return "about owls" if "owl" in task.instruction else None


def wrong(task):
    return True


def no_generator(number, kept):
    return []


def yields_one(number, kept):
    yield ask("x")


def yields_texts(number, kept):
    yield ["x"]


def returns_one(number, kept):
    yield [ask("x")]
    return Task("x")


def fails(number, kept):
    yield [ask("x")]
    raise KeyError("birds")


broken = 3
"""


@pytest.fixture
def own(tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    return str(tmp_path / "own.py")


@slow
def test_ones_own_generator_and_filter(tmp_path, own):
    def answer(body, number):
        text = last(body)
        return chat(
            f"What purrs like a {text.split(': ')[1]}?{text[-1:]}" if "Write" in text else "!"
        )

    generator = {
        "kind": "python",
        "function": f"{own}:riddles",
        "options": {"tone": "long"},
        "calls": 9,
    }
    filters = [{"kind": "python", "function": f"{own}:no_owls"}]
    with scripted(answer) as server:
        given = recipe(server, tmp_path, generator, filters=filters, round_size=3)
        made = generate(given)
        assert (made.counts.kept, made.counts.dropped) == (6, {"about owls": 3})
        assert "Write a long riddle" in json.dumps([body for _, _, body in server.seen])
        asked = server.asked
        assert generate(given, resume=True).counts.kept == 6
        assert server.asked == asked
    card = (made.folder / "README.md").read_text()
    assert "own.py:riddles" in card
    assert str(tmp_path) not in card


@pytest.mark.parametrize(
    ("function", "said"),
    [
        ("none.py:x", "names no file"), ("{own}:nothing", "has no function or class 'nothing'"),
        ("{own}:broken", "has no function or class 'broken'"), ("{own}", "names no file"),
    ],
)  # fmt: skip
def test_a_function_that_cannot_be_found_is_named(own, function, said):
    from llmdistill.instruct.own import own_filter

    with pytest.raises(RecipeError, match=said):
        own_filter(function.replace("{own}", own), {})


def test_a_file_that_cannot_be_run_is_named(tmp_path):
    from llmdistill.instruct.own import own_filter

    (tmp_path / "bad.py").write_text("1/0\n")
    with pytest.raises(RecipeError, match="bad.py cannot be run: ZeroDivisionError"):
        own_filter(f"{tmp_path}/bad.py:x", {})


def test_what_an_own_function_returns_is_checked(own):
    from llmdistill.instruct.own import own_filter, own_generator

    with pytest.raises(DataError, match="must return why a task is dropped, as text"):
        own_filter(f"{own}:wrong", {}).reason(Task("a"))
    for name, said in (
        ("no_generator", "must yield lists of requests, got a list of"),
        ("yields_one", "must yield lists of requests, got Request"),
        ("yields_texts", "must yield lists of requests, got a list of str"),
        ("returns_one", "must return a list of tasks, got Task"),
        ("fails", "KeyError: 'birds'"),
    ):
        generator = own_generator(f"{own}:{name}", {}, None)
        with pytest.raises(DataError, match=f"call 0 of the generator '{name}'.*{said}"):
            exchange(generator, Says(lambda request: "so"), [0], [])


def test_the_calls_of_a_class_are_limited_too(tmp_path):
    from llmdistill.instruct.own import own_generator

    text = "from llmdistill.instruct.own import TaskGenerator\n\n\nclass Mine(TaskGenerator):\n"
    (tmp_path / "own.py").write_text(f"{text}    at_most = None\n    call = None\n")
    assert own_generator(f"{tmp_path}/own.py:Mine", {}, 3).num_calls == 3


@slow
def test_a_dry_run_of_an_own_generator(tmp_path, own, monkeypatch, capsys):
    with scripted(lambda body, number: chat("x")) as server:
        given = recipe(server, tmp_path, {"kind": "python", "function": f"{own}:riddles"}, target=3)
    (tmp_path / "r.yaml").write_text(json.dumps(given.model_dump(mode="json")))
    monkeypatch.setattr(
        "sys.argv", ["llmdistill", "generate", str(tmp_path / "r.yaml"), "--dry-run"]
    )
    with pytest.raises(SystemExit) as stop:
        main()
    assert not stop.value.code
    shown = capsys.readouterr().out
    assert "Write a short riddle number 0 about: cat" in shown
    assert "is not known" in shown


# ---- similar rows ----


def test_the_most_similar_instructions_are_recorded():
    rouge = filters.Rouge(0.7, ["tell me of the sea", "name a red bird"], most_similar=2)
    task = Task("tell me of the hills")
    columns = rouge.columns(task)
    first = columns["most_similar"][0]
    assert first == {"instruction": "tell me of the sea", "score": pytest.approx(0.8)}
    assert columns["most_similar"][1] == {"instruction": "name a red bird", "score": 0.0}
    assert columns["mean_similarity"] == pytest.approx(0.4)
    rouge.kept(task)
    assert rouge.columns(Task("tell me of the hills"))["most_similar"][0]["score"] == 1.0
    assert filters.Rouge(0.7).columns(task) == {}
    assert filters.Rouge(0.7, most_similar=3).columns(task)["mean_similarity"] is None


@slow
def test_similar_instructions_are_columns_of_the_rows(tmp_path):
    with scripted(lambda body, number: chat(f"It is {number}.")) as server:
        generator = {"kind": "answer", "prompts": prompts(tmp_path)}
        rouge = [{"kind": "rouge", "at_most": 0.99, "most_similar": 2}]
        made = generate(recipe(server, tmp_path, generator, filters=rouge))
    rows = read_jsonl(made.folder / "train.jsonl")
    assert all(len(row["most_similar"]) == 2 for row in rows)
    assert read_table(made.folder / "train.parquet").num_rows == len(rows)


@pytest.fixture(scope="module")
def embedder(tmp_path_factory):
    """A small Sentence Transformers model: the mean of toy states."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Pooling, Transformer

    folder = tmp_path_factory.mktemp("embedder")
    toy.teacher_model().model.save_pretrained(folder / "toy")
    toy.tokenizer("teacher").save_pretrained(folder / "toy")
    inner = Transformer(str(folder / "toy"))
    pooling = Pooling(inner.get_word_embedding_dimension())
    SentenceTransformer(modules=[inner, pooling], device="cpu").save(str(folder / "model"))
    return str(folder / "model")


@slow
@pytest.mark.filterwarnings("ignore")
def test_rows_of_the_same_meaning_are_dropped(embedder):
    filter = model_filters.Embeddings(embedder, threshold=0.999)
    first, same, other = (
        Task("tell of the sea"),
        Task("tell of the sea"),
        Task("why name red birds"),
    )
    assert filter.reason(first) is None
    assert filter.columns(first) == {"nearest_meaning": None}
    filter.kept(first)
    assert filter.reason(same) == "same meaning"
    assert filter.reason(other) is None
    assert filter.columns(other)["nearest_meaning"] < 0.999
    for number in range(70):  # more than the first block of memory holds
        filter.kept(Task(" ".join(toy.WORDS[number % 19 :]) + " the" * number))
    assert filter.count == 71
    assert filter.reason(same) == "same meaning"


def test_the_package_for_embeddings_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(RecipeError, match=r"llmdistill\[embeddings\]"):
        model_filters.Embeddings("x")


# ---- structured output ----


SCHEMA = {
    "type": "object", "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name", "age"],
}  # fmt: skip


@slow
def test_answers_follow_a_schema_of_json(tmp_path):
    said = [
        '```json\n{"name": "Ann", "age": 3}\n```',
        '{"name": "Ann"}',
        "Ann is 3",
        '{"name": "Bob", "age": "x"}',
    ]
    generator = {
        "kind": "answer", "prompts": prompts(tmp_path), "answering": {"json_schema": SCHEMA},
    }  # fmt: skip
    with scripted(lambda body, number: chat(said[number % 4])) as server:
        made = generate(recipe(server, tmp_path, generator))
        form = server.seen[0][2]["response_format"]
    assert form["type"] == "json_schema"
    assert form["json_schema"]["schema"] == SCHEMA
    assert (made.counts.kept, made.counts.dropped) == (2, {"not the JSON that was asked for": 6})
