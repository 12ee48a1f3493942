"""A real OpenAI-compatible server: llama.cpp's, with the embedded model."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from llmdistill.generate import generate
from llmdistill.instruct.requests import user
from llmdistill.models.load import EMBEDDED
from llmdistill.sampling import Sampling
from llmdistill.teachers.remote import Question, RemoteTeacher
from tests import toy
from tests.support.files import read_jsonl
from tests.support.recipes import build_generation

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("llama_cpp") is None and "CI" not in os.environ,
        reason="needs the extra dev-server: pip install -e .[dev-server]",
    ),
]
NAME = "smollm2-135m-instruct"


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    embedded = EMBEDDED[NAME]
    spec = importlib.util.find_spec(embedded.module)
    assert spec is not None
    assert spec.origin is not None
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log"
    command = [
        *(sys.executable, "-m", "llama_cpp.server", "--host", "127.0.0.1", "--port", str(port)),
        *("--model", str(Path(spec.origin).parent / embedded.file), "--model_alias", NAME),
        *("--n_ctx", "1024", "--n_threads", "1", "--chat_format", "chatml"),
    ]
    with log.open("wb") as output:
        server = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    try:
        _wait(f"http://127.0.0.1:{port}/v1/models", server, log)
        _try_out(f"http://127.0.0.1:{port}/v1/completions", server)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()
        server.wait(20)


def _wait(url, server, log):
    for _ in range(600):
        assert server.poll() is None, log.read_text()[-2000:]
        try:
            with urllib.request.urlopen(url, timeout=2):
                return
        except OSError:
            time.sleep(0.1)
    pytest.fail(f"no answer from {url}: {log.read_text()[-2000:]}")


def _try_out(url, server):
    """Skip the tests if the server dies at a plain request: then it does not work on this CPU."""
    # Long enough to be read in large products, which is where it dies on some CPUs.
    body = json.dumps({"prompt": "the sea is blue " * 40, "max_tokens": 4}).encode()
    asked = urllib.request.Request(url, body, {"content-type": "application/json"})
    try:
        with urllib.request.urlopen(asked, timeout=60):
            return
    except OSError:
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = server.wait(10)
            pytest.skip(f"llama.cpp dies on this machine without llmdistill (exit code {code})")
        raise


def test_answers_a_chat(url, caplog):
    greedy = Sampling(temperature=0.0)
    questions = [
        Question(
            user(f"What is the capital of {land}? Answer in one short sentence."), greedy, 24, seed
        )
        for seed, land in enumerate(["France", "Italy"])
    ]
    teacher = RemoteTeacher(url, NAME, concurrency=2)
    paris, rome = teacher.answer(questions)
    assert "Paris" in paris.text
    assert "Rome" in rome.text
    assert not paris.truncated
    (cut,) = teacher.answer([Question(user("Tell me a long story."), greedy, 5, 0)])
    assert cut.truncated
    assert not caplog.records  # it serves the model that was asked for


def test_a_question_that_is_too_long_costs_itself_alone(url):
    long = Question(user("word " * 3000), Sampling(), 8, 0)
    short = Question(user("Say hello."), Sampling(temperature=0.0), 8, 0)
    spoken = RemoteTeacher(url, NAME, retries=1).answer([short, long])
    assert [one.refused for one in spoken] == ["", "refused by the server"]


def test_magpie_on_a_server(url, tmp_path):
    """Instruction by the completions endpoint, answer by chat."""
    tokenizer = toy.tokenizer()  # the same turns as the model's: ChatML
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    remote = {"kind": "remote", "model": NAME, "url": url, "tokenizer": str(tmp_path / "tokenizer")}
    given = {
        "output": str(tmp_path / "set"), "teacher": remote, "filters": [], "test_share": 0,
        "generator": {"kind": "magpie", "sampling": {"temperature": 0.8}, "max_instruction_tokens": 64, "answering": {"max_new_tokens": 32}},
        "target": 3, "round_size": 3,
    }  # fmt: skip
    made = generate(build_generation(given))
    rows = read_jsonl(made.folder / "train.jsonl")
    assert len(rows) == 3
    for row in rows:
        question, answer = (message["content"] for message in row["messages"])
        assert question
        assert answer
        assert "<|im" not in question + answer


def test_log_probabilities_of_a_server(url):
    greedy = Sampling(temperature=0.0)
    teacher = RemoteTeacher(url, NAME, scored=True)
    (spoken,) = teacher.answer([Question("The capital of France is", greedy, 4, 0)])
    assert spoken.log_prob is not None
    assert -5 < spoken.log_prob < 0
