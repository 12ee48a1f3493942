"""Servers as they are: quotas, pauses, redirects, certificates, replies without end."""

from __future__ import annotations

import itertools
import json
import shutil
import ssl
import subprocess
import sys
import threading
import time
from http.server import HTTPServer

import pytest

from llmdistill.errors import RecipeError, TeacherError
from llmdistill.generate import generate
from llmdistill.instruct.requests import user
from llmdistill.sampling import Sampling
from llmdistill.teachers import pacing
from llmdistill.teachers.questions import open_client
from llmdistill.teachers.remote import Question, RemoteTeacher
from tests.support.files import read_jsonl, write_jsonl
from tests.support.recipes import build_generation
from tests.support.servers import ScriptedHandler, chat, last, scripted

slow = pytest.mark.slow


def said(body, number):
    return chat(f"about {last(body).split()[-1]}")


def questions(number, max_new_tokens=9):
    return [
        Question(user(f"tell of {i}"), Sampling(), max_new_tokens, seed=i) for i in range(number)
    ]


def ask(server, number, **options):
    teacher = RemoteTeacher(server.url, "m", **{"pause": 0.01, "timeout": 20} | options)
    return [one.text or one.refused for one in teacher.answer(questions(number))]


class Quota:
    """Answers `rate` requests per second, and says 429 to all others."""

    def __init__(self, rate, **headers):
        self.gap, self.headers = 1 / rate, {"retry-after": "1"} | headers
        self.next, self.refused, self.lock = 0.0, 0, threading.Lock()

    def __call__(self, body, number):
        with self.lock:
            now = time.monotonic()
            if now < self.next:
                self.refused += 1
                return 429, self.headers, {"error": {"message": "slow"}}
            self.next = now + self.gap
        return said(body, number)


def expected(number):
    return [f"about {i}" for i in range(number)]


@slow
def test_a_quota_is_used_up_and_not_fatal():
    """Four answers per second, for 32 requests at a time: 16 seconds would be the least.

    `test_pacing.py` has more quotas, in simulated time.
    """
    quota, start = Quota(4), time.monotonic()
    with scripted(quota) as server:
        assert ask(server, 64, concurrency=32, retries=6) == expected(64)
    assert time.monotonic() - start < 40
    assert quota.refused < 64


@slow
def test_a_quota_per_window_is_used_up():
    """Twenty answers at once, then none until the window of two seconds ends."""
    lock, window = threading.Lock(), [0.0, 0]

    def answer(body, number):
        with lock:
            now = time.monotonic()
            if now >= window[0]:
                window[:] = [now + 2, 0]
            window[1] += 1
            if window[1] > 20:
                return 429, {"retry-after": f"{window[0] - now:.2f}"}, {"error": {}}
        return said(body, number)

    start = time.monotonic()
    with scripted(answer) as server:
        assert ask(server, 60) == expected(60)
        assert server.asked < 100
    assert time.monotonic() - start < 12


@slow
@pytest.mark.parametrize("status", [429, 503])
def test_one_retry_after_holds_all_requests(status):
    def answer(body, number):
        if number == 3:
            return status, {"retry-after": "1"}, {"error": {"message": "wait"}}
        time.sleep(0.02)
        return said(body, number)

    with scripted(answer) as server:
        assert ask(server, 60, concurrency=6) == expected(60)
    gaps = [later - earlier for earlier, later in itertools.pairwise(server.times)]
    assert max(gaps) > 0.9
    (long,) = [place for place, gap in enumerate(gaps) if gap > 0.5]
    assert long <= 10  # only what was under way already came before the pause


def test_a_server_that_only_refuses_is_given_up_after_its_attempts():
    with scripted(lambda body, number: (429, {}, {"error": {"message": "slow"}})) as server:
        with pytest.raises(TeacherError, match="no usable reply in 3 attempts.*HTTP 429"):
            ask(server, 1, retries=2)
        assert server.asked == 3


def test_an_empty_account_is_not_asked_again():
    error = {"error": {"message": "You exceeded your quota", "code": "insufficient_quota"}}
    with scripted(lambda body, number: (429, {}, error)) as server:
        with pytest.raises(TeacherError, match="no credit left"):
            ask(server, 1)
        assert server.asked == 1


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        ({"retry-after": "2"}, 2), ({"retry-after": "1e9"}, 300), ({"retry-after": "nan"}, 0),
        ({"retry-after": "inf"}, 0), ({"retry-after": "-3"}, 0), ({"retry-after": "soon"}, 0),
        ({"retry-after-ms": "250", "retry-after": "9"}, 0.25), ({}, 0),
        ({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}, 0),
    ],
)  # fmt: skip
def test_a_pause_is_a_finite_number_of_seconds(header, seconds):
    assert pacing.asked_to_wait(header) == seconds


@pytest.mark.parametrize("status", [302, 307, 308])
def test_a_redirect_is_an_error_with_the_new_address(status):
    moved = (status, {"location": "http://other.example:81/v2/chat?key=secret"}, b"")
    with scripted(lambda body, number: moved) as server:
        with pytest.raises(
            TeacherError, match=r"redirects to http://other.example:81/v2/chat, w"
        ) as e:
            ask(server, 3)
        assert server.asked <= 3
    assert "secret" not in str(e.value)


@slow
@pytest.mark.parametrize("megabytes", [1.2, 150])
def test_a_reply_without_end_costs_its_row(megabytes):
    def answer(body, number):
        return chat("x" * int(megabytes * 2**20)) if last(body).endswith(" 2") else said(body, 1)

    with scripted(answer) as server:
        found = ask(server, 4, retries=1)
        with pytest.raises(TeacherError, match="unusable reply: it has"):
            RemoteTeacher(server.url, "m", retries=0).answer(questions(4)[2:3])
    assert found == ["about 0", "about 1", "unusable reply", "about 3"]


ODD = [{"choices": None}, [], "text", {"choices": [None]}, {"choices": "ab"}, None, True, 3]


@pytest.mark.parametrize("odd", [*ODD, "[" * 100_000])
def test_an_odd_reply_costs_its_row_even_if_it_comes_first(odd):
    def answer(body, number):
        text = odd if str(odd).startswith("[[") else json.dumps(odd)
        return (200, {}, text.encode()) if last(body).endswith(" 0") else said(body, 1)

    with scripted(answer) as server:
        found = ask(server, 3, retries=1, concurrency=1)
    assert found == ["unusable reply", "about 1", "about 2"]


def test_if_all_replies_are_odd_most_are_asked_for_once():
    with scripted(lambda body, number: (200, {}, b"<html>")) as server:
        with pytest.raises(TeacherError, match="unusable reply"):
            ask(server, 50, retries=2)
        assert server.asked < 80


def test_half_a_character_costs_its_row():
    def answer(body, number):
        return chat("a \ud800 b") if last(body).endswith(" 1") else said(body, 1)

    with scripted(answer) as server:
        assert ask(server, 3, retries=1) == ["about 0", "unusable reply", "about 2"]


@pytest.mark.parametrize("log_prob", [None, "x", float("nan"), float("-inf")])
def test_an_odd_log_probability_costs_its_row(log_prob):
    def answer(body, number):
        given = log_prob if last(body).endswith(" 1") else -0.5
        tokens = [{"token": "a", "logprob": given, "bytes": None, "top_logprobs": []}]
        return chat(said(body, 1)["choices"][0]["message"]["content"], logprobs={"content": tokens})

    with scripted(answer) as server:
        assert ask(server, 3, retries=1, scored=True) == ["about 0", "unusable reply", "about 2"]


def test_the_names_of_an_organisation_go_to_no_other_server(monkeypatch):
    monkeypatch.setenv("OPENAI_ORG_ID", "org-private")
    monkeypatch.setenv("OPENAI_PROJECT_ID", "proj-private")
    with scripted(said) as server:
        ask(server, 1)
        (_, headers, _), *_ = server.seen
    assert not [name for name in headers if name.lower().startswith("openai-")]
    own = open_client("https://api.openai.com/v1", "key", 9.0).default_headers
    assert own["OpenAI-Organization"] == "org-private"


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("http://127.0.0.1:9/v1", "ConnectionRefusedError: .*Connect call failed"),
        ("http://no.such.host.invalid/v1", "the host of .* is not known: "),
    ],
)
def test_why_a_server_cannot_be_reached_is_said(url, why):
    with pytest.raises(TeacherError, match=why):
        RemoteTeacher(url, "m", retries=1, pause=0.01).answer(questions(1))


def test_an_unknown_host_is_not_asked_again(monkeypatch):
    paces = []
    monkeypatch.setattr(pacing.Pace, "start", lambda self: _start(paces))
    monkeypatch.setattr(pacing.Pace, "end", lambda self: None)
    with pytest.raises(TeacherError, match="Check teacher.url"):
        RemoteTeacher("http://no.such.host.invalid/v1", "m", retries=6).answer(questions(1))
    assert len(paces) == 1


async def _start(paces):
    paces.append(1)
    return 0.0


@pytest.mark.skipif(shutil.which("openssl") is None, reason="makes a certificate with openssl")
def test_a_certificate_that_is_not_trusted_is_named_and_not_asked_again(tmp_path):
    key, certificate = str(tmp_path / "key"), str(tmp_path / "cert")
    made = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost"]
    subprocess.run(
        [*made, "-keyout", key, "-out", certificate, "-days", "2"], check=True, capture_output=True
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    accepted = []

    class Counting(HTTPServer):
        def get_request(self):
            accepted.append(1)
            return super().get_request()

        def handle_error(self, request, address):  # the client leaves
            return

    server = Counting(("127.0.0.1", 0), ScriptedHandler)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with pytest.raises(TeacherError, match="CERTIFICATE_VERIFY_FAILED.*SSL_CERT_FILE"):
        RemoteTeacher(f"https://127.0.0.1:{server.server_port}/v1", "m").answer(questions(1))
    server.shutdown()
    server.server_close()
    assert len(accepted) == 1


def recipe(server, folder, teacher, **changes):
    write_jsonl(folder / "prompts.jsonl", [{"prompt": f"tell of {i}"} for i in range(40)])
    given = {
        "output": str(folder / "set"), "filters": [], "test_share": 0.0,
        "teacher": {"kind": "remote", "model": "m", "url": server.url} | teacher,
        "generator": {"kind": "answer", "prompts": str(folder / "prompts.jsonl")},
    }  # fmt: skip
    return build_generation(given | changes)


def test_any_field_of_a_server_can_be_sent(tmp_path):
    extra = {"presence_penalty": 2.0, "logit_bias": {"50256": -100}, "min_p": 0.1}
    with scripted(said) as server:
        generate(recipe(server, tmp_path, {"extra_body": extra}))
        assert all(extra.items() <= body.items() for _, _, body in server.seen)
    assert "presence_penalty" in (tmp_path / "set" / "README.md").read_text()


@pytest.mark.parametrize(
    ("field", "key"), [("temperature", "sampling"), ("api_key", "key_from"), ("n", "samples")]
)
def test_a_field_with_a_key_of_its_own_is_refused(tmp_path, field, key):
    with scripted(said) as server, pytest.raises(RecipeError, match=f"'{field}' cannot.*{key}"):
        recipe(server, tmp_path, {"extra_body": {field: 1}})


@slow
def test_ranks_share_the_requests_that_may_run(tmp_path):
    running, most, lock = [0], [0], threading.Lock()

    def answer(body, number):
        with lock:
            running[0] += 1
            most[0] = max(most[0], running[0])
        time.sleep(0.05)
        with lock:
            running[0] -= 1
        return said(body, number)

    with scripted(answer) as server:
        given = recipe(server, tmp_path, {"concurrency": 5})
        (tmp_path / "r.yaml").write_text(json.dumps(given.model_dump(mode="json")))
        # Without --standalone, two tests at a time would use one port.
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", "2"]
        command += ["-m", "llmdistill", "generate", str(tmp_path / "r.yaml")]
        subprocess.run(command, check=True, capture_output=True)
    assert 4 <= most[0] <= 5
    assert len(read_jsonl(tmp_path / "set" / "rows.jsonl")) == 40
