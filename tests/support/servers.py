"""A server that speaks OpenAI's protocol and fails in the ways that a test asks for."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Iterator
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from tests import toy


class Server(ThreadingHTTPServer):
    """Answers with the last word of the request; `faults` come first, one per request."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.faults, self.asked, self.keys = [], [], set()
        self.running, self.most, self.lock = 0, 0, threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        server = self.server
        with server.lock:
            server.asked.append((self.path, body))
            server.keys.add(self.headers["authorization"])
            server.running += 1
            server.most = max(server.most, server.running)
            fault = server.faults.pop(0) if server.faults else None
        time.sleep(0.01)
        with server.lock:
            server.running -= 1
        getattr(self, f"do_{fault}" if fault else "answer")(body)

    def answer(self, body, **changes):
        chat = "messages" in body
        text = body["messages"][-1]["content"] if chat else body["prompt"]
        if isinstance(text, list):
            text = toy.tokenizer().decode(text)
        said = f"about {text.split()[-1]}" if chat or "im_start" not in text else "say what"
        model = changes.pop("model", "m")
        choice = {"index": 0, "finish_reason": "stop"} | changes
        choice |= {"message": {"role": "assistant", "content": said}} if chat else {"text": said}
        self.send(
            200, {"id": "1", "object": "x", "created": 0, "model": model, "choices": [choice]}
        )

    def send(self, status, body, **headers):
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {
            "content-type": "application/json",
            "content-length": len(data),
            **headers,
        }.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(data)

    def do_busy(self, body):
        self.send(429, {"error": {"message": "slow down"}}, **{"retry-after": "0.01"})

    def do_broken(self, body):
        self.send(500, {"error": {"message": "oh"}})

    def do_garbage(self, body):
        self.send(200, b"<html>not json")

    def do_empty(self, body):
        self.send(200, {"id": "1", "object": "x", "created": 0, "model": "m", "choices": []})

    def do_half(self, body):
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", "500")
        self.end_headers()
        self.wfile.write(b'{"id": "1", "choi')
        self.close_connection = True

    def do_unfinished(self, body):
        self.answer(body, finish_reason=None)

    def do_nothing(self, body):
        self.close_connection = True

    def do_hang(self, body):
        time.sleep(1.5)
        self.close_connection = True

    def do_refused(self, body):
        self.send(401, {"error": {"message": "who are you"}})

    def do_odd(self, body):
        self.send(200, {"id": "1", "choices": {"text": 1}})

    def do_drip(self, body):
        """Send a byte now and then: each read is in time, but the whole reply is not."""
        message = {"role": "assistant", "content": "too late"}
        choice = {"index": 0, "finish_reason": "stop", "message": message}
        reply = json.dumps(
            {"id": "1", "object": "x", "created": 0, "model": "m", "choices": [choice]}
        )
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(8 + len(reply)))
        self.end_headers()
        with contextlib.suppress(OSError):  # the client may have left
            for _ in range(8):
                self.wfile.write(b" ")
                self.wfile.flush()
                time.sleep(0.2)
            self.wfile.write(reply.encode())

    def do_cut(self, body):
        self.answer(body, finish_reason="length")

    def do_unwanted(self, body):
        self.send(400, {"error": {"message": "too long"}})

    def do_filtered(self, body):
        self.answer(body, finish_reason="content_filter")

    def do_later(self, body):
        date = formatdate(time.time() + 2, usegmt=True)  # whole seconds
        self.send(429, {"error": {"message": "later"}}, **{"retry-after": date})

    def do_other(self, body):
        self.answer(body, model="n")

    def do_scored(self, body):
        tokens = [
            {"token": "a", "logprob": -1.0, "top_logprobs": []},
            {"token": "b", "logprob": -2.0, "top_logprobs": []},
        ]
        chat = "messages" in body
        self.answer(
            body, logprobs={"content": tokens} if chat else {"token_logprobs": [-1.0, -2.0]}
        )


def chat(text, reason="stop", logprobs=None, **message):
    """The body of a reply of the chat endpoint."""
    message = {"role": "assistant", "content": text} | message
    choice = {"index": 0, "finish_reason": reason, "logprobs": logprobs, "message": message}
    return {"id": "x", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice]}


def last(body) -> str:
    """The last message of a request, or the text that it continues."""
    return body["messages"][-1]["content"] if "messages" in body else body["prompt"]


class Scripted(ThreadingHTTPServer):
    """Answers with `reply(body, number)`: a body, or a status, headers and a body.

    `seen` has the path, the headers and the body of each request, and `times` when it came.
    """

    daemon_threads, request_queue_size = True, 128

    def __init__(self, reply) -> None:
        super().__init__(("127.0.0.1", 0), ScriptedHandler)
        self.reply, self.lock = reply, threading.Lock()
        self.seen, self.times = [], []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    @property
    def asked(self) -> int:
        return len(self.seen)


class ScriptedHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers.get("content-length", 0))) or b"{}")
        with self.server.lock:
            self.server.seen.append((self.path, dict(self.headers), body))
            self.server.times.append(time.monotonic())
            number = len(self.server.seen)
        said = self.server.reply(body, number)
        status, headers, data = said if isinstance(said, tuple) else (200, {}, said)
        data = data if isinstance(data, bytes) else json.dumps(data).encode()
        self.send_response(status)
        headers = {"content-type": "application/json", "content-length": len(data)} | headers
        for name, value in headers.items():
            self.send_header(name, str(value))
        self.end_headers()
        with contextlib.suppress(OSError):  # the client may have left
            self.wfile.write(data)

    do_GET = do_POST


@contextlib.contextmanager
def scripted(reply) -> Iterator[Scripted]:
    """Run a server that answers with `reply` until the block ends."""
    server = Scripted(reply)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@contextlib.contextmanager
def serving() -> Iterator[Server]:
    """Run a server on a free port until the block ends."""
    server = Server()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()
