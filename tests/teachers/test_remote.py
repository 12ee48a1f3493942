"""S11: a teacher behind a server that misbehaves in every way: asked again, or a clear end."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections import Counter

import pytest

from llmdistill import recipe as recipes
from llmdistill.batch import Prompts
from llmdistill.errors import RecipeError, TeacherError
from llmdistill.generate import generate
from llmdistill.instruct.pipeline import TaskCounts
from llmdistill.instruct.requests import Asked, Request, user
from llmdistill.instruct.responders import RemoteResponder
from llmdistill.sampling import Draw, Sampling, Writer
from llmdistill.teachers.remote import Question, RemoteTeacher, Spoken
from tests import toy
from tests.support.servers import Handler

pytestmark = pytest.mark.slow


def teacher(server, **options) -> RemoteTeacher:
    return RemoteTeacher(server.url, "m", **{"pause": 0.01, "timeout": 0.5} | options)


def questions(number: int, **options):
    options = {"sampling": Sampling(), "max_new_tokens": 9, "seed": 5} | options
    return [Question(user(f"tell of {i}")[0:1], **options) for i in range(number)]


def test_answers_come_in_the_order_of_the_questions(server):
    assert teacher(server).answer(questions(20)) == [Spoken(f"about {i}", False) for i in range(20)]
    assert len(server.asked) == 20


FAULTS = [
    *("busy", "broken", "garbage", "empty", "half", "nothing", "hang", "odd", "drip"),
]


@pytest.mark.parametrize("fault", FAULTS)
def test_what_goes_wrong_once_is_asked_again(server, fault):
    server.faults = [fault] * 3
    assert teacher(server).answer(questions(4)) == [Spoken(f"about {i}", False) for i in range(4)]
    assert len(server.asked) == 7
    assert set(Counter(body["messages"][0]["content"] for _, body in server.asked)) == {
        f"tell of {i}" for i in range(4)
    }


@pytest.mark.parametrize("fault", [fault for fault in FAULTS if fault not in ("hang", "drip")])
def test_what_stays_wrong_ends_with_an_error(server, fault):
    server.faults = [fault] * 99
    with pytest.raises(
        TeacherError, match=r"no usable reply in 3 attempts.*pass resume to continue"
    ):
        teacher(server, retries=2).answer(questions(1))
    assert len(server.asked) == 3


def test_a_refusal_is_not_asked_again(server):
    server.faults = ["refused"] * 99
    with pytest.raises(TeacherError, match="rejected the request: HTTP 401: .*who are you"):
        teacher(server, concurrency=1).answer(questions(5))
    assert len(server.asked) == 1


@pytest.mark.parametrize("fault", ["unwanted", "filtered"])
def test_a_request_that_is_refused_for_what_is_in_it_costs_no_other(server, fault):
    server.faults = [None, fault]
    spoken = teacher(server, concurrency=1).answer(questions(4))
    assert [one.refused for one in spoken] == ["", "refused by the server", "", ""]
    assert len(server.asked) == 4


@pytest.mark.parametrize("rows", [1, 24])
def test_where_all_is_refused_there_is_an_error_and_nothing_is_lost(server, tmp_path, rows, caplog):
    """What was wrong can be mended: the run goes on as if it had not been asked."""
    recipe = generation(server, tmp_path)
    path = tmp_path / "seeds.jsonl"
    path.write_text("\n".join(path.read_text().splitlines()[:rows]))
    server.faults = ["unwanted"] * 8
    with pytest.raises(
        TeacherError, match="answered none of [18] requests: .*'refused by the server'"
    ):
        generate(recipe)
    assert caplog.text.count("HTTP 400: ") == 1  # said once
    assert "too long" in caplog.text
    server.faults = []
    assert generate(recipe, resume=True).counts == TaskCounts(kept=rows)


@pytest.mark.slow
def test_the_last_rows_may_all_be_refused(server, tmp_path):
    """The server has answered before."""
    recipe = generation(server, tmp_path)
    server.faults = [None] * 20 + ["nothing"] * 99
    with pytest.raises(TeacherError):
        generate(recipe)
    server.faults = ["unwanted"] * 4
    assert generate(recipe, resume=True).counts == TaskCounts(
        20, Counter({"refused by the server": 4})
    )


def test_the_server_says_how_long_to_wait_by_a_date(server):
    server.faults = ["later"]
    start = time.perf_counter()
    teacher(server).answer(questions(1))
    assert 0.9 < time.perf_counter() - start < 5


def test_after_the_last_attempt_nothing_is_waited_for(server):
    server.faults = ["later"] * 9
    start = time.perf_counter()
    with pytest.raises(TeacherError, match="in 1 attempts"):
        teacher(server, retries=0).answer(questions(1))
    assert time.perf_counter() - start < 0.9


def test_another_model_than_asked_for_is_said(server, caplog):
    server.faults = ["other"] * 3
    teacher(server).answer(questions(5))
    assert caplog.text.count("was asked for 'm' but replies as 'n'") == 1


def test_the_pace_is_kept_from_one_call_to_the_next(server):
    start, one = time.perf_counter(), teacher(server, per_minute=60)
    for _ in range(3):
        one.answer(questions(1))
    assert time.perf_counter() - start > 1.9  # two steps of a second


@pytest.fixture
def _interruptible():
    """Under `nohup`, and in the background of a script, Python starts with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_interruptible")
def test_an_interrupt_does_not_wait_for_the_server(server):
    """Ctrl-C while a request hangs: what is under way is cancelled."""
    server.faults = ["hang"] * 3
    start = time.perf_counter()
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        teacher(server, timeout=60).answer(questions(3))
    assert time.perf_counter() - start < 1.2


@pytest.mark.parametrize("prompt", [user("tell of 1"), "tell of 1", (7, 9)])
def test_answers_come_with_their_log_probability_where_asked_for(server, prompt):
    question = Question(prompt, Sampling(), 9, 5)
    server.faults = ["scored"]
    (spoken,) = teacher(server, scored=True).answer([question])
    assert spoken.log_prob == -1.5
    with pytest.raises(TeacherError, match="it has no log-probabilities"):
        teacher(server, scored=True).answer([question])


def test_the_template_is_told_its_options_and_the_answer_where_to_end(server):
    options = {"enable_thinking": False}
    teacher(server, chat_template_kwargs=options).answer(questions(1, stop="###"))
    (_, body), *_ = server.asked
    assert (body["chat_template_kwargs"], body["stop"]) == (options, ["###"])


def test_a_server_that_is_not_there_is_named():
    gone = RemoteTeacher("http://127.0.0.1:9/v1", "m", retries=1, pause=0.01)
    with pytest.raises(TeacherError, match=r"127.0.0.1:9/v1 gave no usable reply in 2 attempts"):
        gone.answer(questions(1))


def test_an_answer_that_was_cut_off_says_so(server):
    server.faults = ["cut"]
    assert teacher(server).answer(questions(1)) == [Spoken("about 0", True)]


@pytest.mark.parametrize("concurrency", [1, 3])
def test_no_more_than_so_many_requests_run_at_once(server, concurrency):
    teacher(server, concurrency=concurrency).answer(questions(12))
    assert server.most == concurrency


def test_no_more_than_so_many_requests_begin_in_a_minute(server):
    start = time.perf_counter()
    teacher(server, per_minute=600).answer(questions(6))
    assert time.perf_counter() - start > 0.45  # five steps of a tenth of a second


def test_the_server_is_told_how_to_draw(server):
    sampling = Sampling(0.3, 0.9, top_k=7)
    teacher(server).answer(questions(1, sampling=sampling, max_new_tokens=4))
    (path, body), *_ = server.asked
    assert path == "/v1/chat/completions"
    told = {
        name: body[name]
        for name in ("model", "temperature", "top_p", "top_k", "max_tokens", "seed")
    }
    assert told == {
        "model": "m",
        "temperature": 0.3,
        "top_p": 0.9,
        "top_k": 7,
        "max_tokens": 4,
        "seed": 5,
    }


def test_the_key_comes_from_the_environment(server, monkeypatch):
    monkeypatch.setenv("MY_KEY", "secret-1")
    teacher(server, key_from="MY_KEY").answer(questions(1))
    assert server.keys == {"Bearer secret-1"}
    monkeypatch.delenv("MY_KEY")
    with pytest.raises(RecipeError, match="environment variable MY_KEY is not set"):
        teacher(server, key_from="MY_KEY")


def test_a_key_goes_to_no_other_server_than_its_own(server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret-3")
    teacher(server).answer(questions(1))
    assert server.keys == {"Bearer none"}
    assert RemoteTeacher("https://api.openai.com/v1", "m").key == "secret-3"


def test_writes_for_a_rollout(server):
    tokenizer = toy.tokenizer()
    prompts = Prompts.pack([tokenizer("say red")["input_ids"], [7]], [3, 1], pad_id=0)
    server.faults = ["cut"]
    written = teacher(server, tokenizer=tokenizer, concurrency=1).write(
        prompts, Sampling(), max_new_tokens=9, draw=Draw(0)
    )
    assert tokenizer.decode(written.responses()[0]) == "about red"  # cut off: no end
    assert written.responses()[1][-1] == tokenizer.eos_token_id or len(written.responses()[1]) == 9
    assert written.writer_BT[written.response_mask_BT].eq(Writer.TEACHER).all()
    assert [(path, body["prompt"]) for path, body in server.asked] == [
        ("/v1/completions", ids) for ids in prompts.ids()
    ]
    with pytest.raises(RecipeError, match="need one. Set teacher.tokenizer"):
        teacher(server).write(prompts, Sampling(), max_new_tokens=9, draw=Draw(0))


# ---- as the teacher of a dataset ----


@pytest.mark.parametrize(
    ("said", "start", "text"),
    [
        ("###\n4. Instruction: x", "###\n4. Instruction:", " x"),
        ("4. Instruction: x", "###\n4. Instruction:", " x"),
        (" x", "###\n4. Instruction:", " x"),
        ("Here is one:\n\n4. Instruction: x", "###\n4. Instruction:", " x"),
        ("Sure!\n###\n1. Instruction: x", "###\n4. Instruction:", " x"),
        ("### 4. Instruction: x", "###\n4. Instruction:", " x"),
        (
            " x\n4. Input:\n4. Output: y\n###\n5. Instruction: z",
            "###\n4. Instruction:",
            " x\n4. Input:\n4. Output: y\n###\n5. Instruction: z",
        ),
        (
            "1. Instruction: a\n###\n4. Instruction: b",
            "###\n4. Instruction:",
            " a\n###\n4. Instruction: b",
        ),
        ("Of course:\n1. Sing.\n2. Run.", "9.", " Sing.\n2. Run."),
        (" Sing.\n10. Run.", "9.", " Sing.\n10. Run."),
        ("It costs 9.50, they say.", "9.", "It costs 9.50, they say."),
        ("plain", "", "plain"),
    ],
)
def test_a_chat_may_say_again_what_it_was_to_begin_with(said, start, text):
    class Once:
        tokenizer = None

        def answer(self, asked, heard):
            heard(0, Spoken(said))

    request = Request(user("q"), Sampling(), 9, start=start)
    (reply,) = RemoteResponder(Once(), seed=0).respond([Asked(0, 0, 0, request)])
    assert reply.text == text


def generation(server, tmp_path, name="set", **changes):
    rows = tmp_path / "seeds.jsonl"
    rows.write_text(
        "\n".join(json.dumps({"instruction": f"tell of {i}", "output": "x"}) for i in range(24))
    )
    given = {
        "output": str(tmp_path / name), "seed_tasks": str(rows), "filters": [], "round_size": 8,
        "teacher": {"kind": "remote", "model": "m", "url": server.url, "timeout": 0.5, "retries": 4},
        "generator": {"kind": "answer", "prompts": str(rows)},
    }  # fmt: skip
    return recipes.build_part(recipes.GenerationRecipe, given | changes, "recipe")


def test_no_row_is_lost_and_none_comes_twice(server, tmp_path, monkeypatch):
    """S9: and the key is in no file."""
    monkeypatch.setattr("llmdistill.teachers.remote.LONGEST_PAUSE", 0.02)
    monkeypatch.setenv("MY_KEY", "secret-2")
    plain = generate(generation(server, tmp_path, "plain"))
    server.faults = ["busy", "broken", "garbage", "half", "nothing", "empty"] * 2
    recipe = generation(server, tmp_path, "odd")
    keyed = recipe.teacher.model_copy(update={"key_from": "MY_KEY"})
    made = generate(recipe.model_copy(update={"teacher": keyed}))
    assert "Bearer secret-2" in server.keys
    assert (made.folder / "rows.jsonl").read_bytes() == (plain.folder / "rows.jsonl").read_bytes()
    assert made.counts.kept == 24
    for file in made.folder.rglob("*"):
        assert b"secret-2" not in file.read_bytes()


def test_a_server_that_dies_ends_clearly_and_the_run_goes_on(server, tmp_path, monkeypatch):
    monkeypatch.setattr("llmdistill.teachers.remote.LONGEST_PAUSE", 0.02)
    whole = generate(generation(server, tmp_path, "whole"))
    begun = len(server.asked)
    recipe = generation(server, tmp_path, "stopped")
    server.faults = [None] * 11 + ["broken"] * 999
    with pytest.raises(TeacherError, match="HTTP 500"):
        generate(recipe)
    server.faults = []
    assert len((tmp_path / "stopped" / "rows.jsonl").read_text().splitlines()) == 8
    made = generate(recipe, resume=True)
    assert (made.folder / "rows.jsonl").read_bytes() == (whole.folder / "rows.jsonl").read_bytes()
    assert begun == 24


def test_a_reply_that_came_is_not_asked_for_again(server, tmp_path, monkeypatch):
    """One request of a round fails for good: the replies beside it are there when the run goes on."""
    monkeypatch.setattr("llmdistill.teachers.remote.LONGEST_PAUSE", 0.02)
    recipe = generation(server, tmp_path)
    server.faults = [None] * 13 + ["broken"] * 999
    with pytest.raises(TeacherError, match="HTTP 500"):
        generate(recipe)
    answered = {body["messages"][0]["content"] for _, body in server.asked[:13]}
    server.faults, server.asked = [], []
    made = generate(recipe, resume=True)
    assert made.counts.kept == 24
    again = {body["messages"][0]["content"] for _, body in server.asked}
    assert len(again) == len(server.asked) == 24 - 13
    assert not again & answered
    assert not list(made.folder.glob("spoken-*"))


def test_one_row_that_the_server_refuses_is_counted(server, tmp_path):
    server.faults = [None, "unwanted", None, "filtered"]
    made = generate(generation(server, tmp_path))
    assert made.counts.kept == 22
    assert made.counts.dropped == {"refused by the server": 2}


@pytest.mark.parametrize(
    "forged",
    [
        "a <|im_end|> b",
        "[INST] x",
        "a</s>",
        "<end_of_turn>",
        "<|eot_id|>",
        "<\uff5cUser\uff5c>",
        "[TOOL_CALLS]",
        "<turn|>",
    ],
)
def test_a_control_token_never_reaches_a_servers_template(server, tmp_path, forged):
    recipe = generation(server, tmp_path)
    rows = tmp_path / "seeds.jsonl"
    rows.write_text(f"{rows.read_text()}\n{json.dumps({'instruction': forged, 'output': 'x'})}")
    made = generate(recipe)
    assert made.counts.dropped == {"control token in the text": 1}
    assert all(forged not in json.dumps(body, ensure_ascii=False) for _, body in server.asked)


def test_half_a_character_is_not_sent(server, tmp_path):
    recipe = generation(server, tmp_path)
    rows = tmp_path / "seeds.jsonl"
    rows.write_text(rows.read_text() + '\n{"instruction": "a \\ud800 b", "output": "x"}')
    assert generate(recipe).counts.dropped == {"text that is not Unicode": 1}


LISTS = {
    "alpaca": "4. Instruction: Name {}\n4. Input:\n<noinput>\n4. Output:\nA {}\n###\n5. Instruction: Sell {}\n5. Input: x\n5. Output: y",
    "self_instruct": "Here:\n1. Name {}.\n2. Sell {}.",
}


@pytest.mark.parametrize("kind", LISTS)
def test_lists_of_a_server_become_rows(server, tmp_path, kind):
    """The whole way of the two generators that read lists."""

    def lists(handler, body, **changes):
        asked = body["messages"][0]["content"]
        number = len(handler.server.asked)
        said = LISTS[kind].replace("{}", f"thing {number}")
        if "Fixed answers" in asked:
            said = "yes"
        elif asked.startswith("Task: "):
            said = "Output: red\nInput: a rose"
        handler.send(
            200,
            {
                "id": "1",
                "object": "x",
                "created": 0,
                "model": "m",
                "choices": [
                    {
                        "index": 0,
                        "finish_reason": "stop",
                        "message": {"role": "assistant", "content": said},
                    }
                ],
            },
        )

    handler = type("Lists", (Handler,), {"answer": lists})
    server.RequestHandlerClass = handler
    made = generate(
        generation(
            server,
            tmp_path,
            generator={"kind": kind, "tasks_per_call": 2},
            target=8,
            round_size=2,
            format="alpaca",
            test_share=0,
        )
    )
    rows = [json.loads(line) for line in (made.folder / "train.jsonl").read_text().splitlines()]
    assert len(rows) == 8
    assert {row["instruction"].split()[0] for row in rows} == {"Name", "Sell"}
    if kind == "self_instruct":
        assert {(row["input"], row["output"]) for row in rows} == {("a rose", "red")}


def test_a_users_turn_is_opened_by_the_template_alone(server, tmp_path):
    tokenizer = toy.tokenizer()
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    remote = {
        "kind": "remote",
        "model": "m",
        "url": server.url,
        "tokenizer": str(tmp_path / "tokenizer"),
    }
    made = generate(
        generation(
            server, tmp_path, teacher=remote, generator={"kind": "magpie"}, target=3, round_size=3
        )
    )
    opened = [body for path, body in server.asked if path == "/v1/completions"]
    assert made.counts.kept == len(opened) == 3
    assert {body["prompt"] for body in opened} == {"<|im_start|>user\n"}
    assert {tuple(body["stop"]) for body in opened} == {("<|im_end|>",)}


@pytest.mark.parametrize(
    "url",
    ["http://me:secret@host/v1", "http://host/v1?api_key=secret", "host:8000/v1", "ftp://host"],
)
def test_an_address_holds_no_key(server, tmp_path, url):
    with pytest.raises(RecipeError, match="'url'") as error:
        generation(server, tmp_path, teacher={"kind": "remote", "model": "m", "url": url})
    assert "secret" not in str(error.value)


def test_magpie_needs_a_template(server, tmp_path):
    with pytest.raises(RecipeError, match=r"Set 'teacher\.tokenizer'"):
        generation(server, tmp_path, generator={"kind": "magpie"}, target=3)
