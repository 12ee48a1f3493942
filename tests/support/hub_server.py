"""A small Hub on this machine, which the real client of huggingface_hub talks to.

It keeps what is uploaded, so that a test can look at it, and fails in the ways that a test asks
for.  Large files come by LFS: Xet storage would need another server, so `client_of` turns it off.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import threading
import time
from collections import defaultdict
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_NobodyMayEverReadThis1234567890"
LFS = (".safetensors", ".parquet")
ROUTES = (  # name, method, path
    ("whoami", "GET", r"/api/whoami-v2"),
    ("create", "POST", r"/api/repos/create"),
    ("yaml", "POST", r"/api/validate-yaml"),
    ("tree", "GET", r"/api/(models|datasets)/([^/]+/[^/]+)/tree/([^/]+)"),
    ("preupload", "POST", r"/api/(models|datasets)/([^/]+/[^/]+)/preupload/([^/]+)"),
    ("commit", "POST", r"/api/(models|datasets)/([^/]+/[^/]+)/commit/([^/]+)"),
    ("branch", "POST", r"/api/(models|datasets)/([^/]+/[^/]+)/branch/([^/]+)"),
    ("discuss", "POST", r"/api/(models|datasets)/([^/]+/[^/]+)/discussions"),
    ("discussion", "GET", r"/api/(models|datasets)/([^/]+/[^/]+)/discussions/(\d+)"),
    ("settings", "PUT", r"/api/(models|datasets)/([^/]+/[^/]+)/settings"),
    ("info", "GET", r"/api/(models|datasets)/([^/]+/[^/]+)(?:/revision/([^/]+))?"),
    ("batch", "POST", r"/(?:(datasets)/)?([^/]+/[^/]+)\.git/info/lfs/objects/batch"),
    ("put", "PUT", r"/lfs/(\w+)"),
)


@dataclass
class Repo:
    """A repository: its branches and pull requests with their files, and its commits in order."""

    private: bool
    branches: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"main": {}})
    pulls: list[dict[str, bytes]] = field(default_factory=list)
    commits: list[tuple[str, dict[str, bytes]]] = field(default_factory=list)


class Hub(ThreadingHTTPServer):
    """`faults` has a list for each route, with an entry for each of the next requests.

    A number is a status, "cut" closes the connection, and "wait" waits for the event `waits`.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[tuple[str, str], Repo] = {}
        self.faults: dict[str, list] = defaultdict(list)
        self.asked: list[str] = []
        self.blobs: dict[str, bytes] = {}
        self.waits = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request, client_address):
        pass  # the connections that are cut


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_GET(self):
        self.answer("GET")

    def do_POST(self):
        self.answer("POST")

    def do_PUT(self):
        self.answer("PUT")

    def answer(self, method: str) -> None:
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        found = ((n, re.fullmatch(p, url.path)) for n, m, p in ROUTES if m == method)
        name, match = next(((n, one) for n, one in found if one), ("none", None))
        self.server.asked.append(name)
        fault = self.server.faults[name].pop(0) if self.server.faults[name] else None
        if fault == "cut":
            self.rfile.read(1000)
            self.connection.close()
            self.close_connection = True
            return None
        body = self.body()
        if fault == "wait":
            assert self.server.waits.wait(30)
        if isinstance(fault, int):
            # A careless server repeats what it was sent.
            return self.send(fault, {"error": f"a fault with {self.headers.get('authorization')}"})
        if name == "none":
            return self.send(404, {"error": f"no such address: {self.path}"})
        if name != "put" and self.headers.get("authorization") != f"Bearer {TOKEN}":
            return self.send(401, {"error": "Invalid username or password."})
        getattr(self, f"on_{name}")(body, *match.groups())

    def body(self) -> bytes:
        if "content-length" in self.headers:
            return self.rfile.read(int(self.headers["content-length"]))
        parts = []
        if self.headers.get("transfer-encoding") == "chunked":
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
        return b"".join(parts)

    def send(self, status: int, body) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def repo(self, kind: str | None, name: str) -> Repo | None:
        found = self.server.repos.get((kind or "models", name))
        if found is None:
            self.send(404, {"error": "Repository not found"})
        return found

    def address(self, kind: str | None, name: str) -> str:
        return f"{self.server.url}/{'datasets/' if kind == 'datasets' else ''}{name}"

    # ---- one method for each route ----

    def on_whoami(self, body):
        self.send(200, {"type": "user", "name": "me", "orgs": []})

    def on_yaml(self, body):
        self.send(200, {"errors": [], "warnings": []})

    def on_create(self, body):
        asked = json.loads(body)
        kind = f"{asked.get('type', 'model')}s"
        name = f"{asked.get('organization') or 'me'}/{asked['name']}"
        if (kind, name) in self.server.repos:
            return self.send(409, {"error": "it exists", "url": self.address(kind, name)})
        if not name.startswith("me/"):
            return self.send(403, {"error": "You don't have the rights to create it"})
        self.server.repos[kind, name] = Repo(asked.get("visibility") == "private")
        self.send(200, {"url": self.address(kind, name)})

    def on_info(self, body, kind, name, revision):
        if repo := self.repo(kind, name):
            self.send(200, {"id": name, "private": repo.private, "sha": "0" * 40, "tags": []})

    def on_settings(self, body, kind, name):
        if repo := self.repo(kind, name):
            repo.private = json.loads(body)["visibility"] == "private"
            self.send(200, {})

    def on_branch(self, body, kind, name, branch):
        if repo := self.repo(kind, name):
            if unquote(branch).startswith("refs/"):
                return self.send(400, {"error": "Invalid reference for a branch"})
            if unquote(branch) in repo.branches:
                return self.send(409, {"error": "it exists"})
            repo.branches[unquote(branch)] = dict(repo.branches["main"])
            self.send(200, {})

    def on_discuss(self, body, kind, name):
        """Open an empty pull request, to which the pipeline of Xet pushes."""
        if repo := self.repo(kind, name):
            repo.pulls.append(dict(repo.branches["main"]))
            self.send(200, {"num": len(repo.pulls)})

    def on_discussion(self, body, kind, name, number):
        about = {"title": "a title", "num": int(number), "status": "draft", "isPullRequest": True}
        about |= {"createdAt": "2026-01-01T00:00:00.000Z", "changes": {"base": "main"}}
        about |= {"repo": {"name": name, "type": kind[:-1]}, "events": [], "filesWithConflicts": []}
        self.send(200, about)

    def files(self, repo: Repo, revision: str) -> dict[str, bytes] | None:
        """The files of a branch or of a pull request."""
        if pull := re.fullmatch(r"refs/pr/(\d+)", unquote(revision)):
            return repo.pulls[int(pull[1]) - 1]
        if unquote(revision) not in repo.branches:
            self.send(404, {"error": "Invalid rev id"})
        return repo.branches.get(unquote(revision))

    def on_tree(self, body, kind, name, revision):
        if (repo := self.repo(kind, name)) and (files := self.files(repo, revision)) is not None:
            listed = [(path, len(data)) for path, data in files.items()]
            kinds = {"type": "file", "oid": "0"}
            self.send(200, [kinds | {"path": path, "size": size} for path, size in listed])

    def on_preupload(self, body, kind, name, revision):
        if (repo := self.repo(kind, name)) and (files := self.files(repo, revision)) is not None:
            answers = []
            for one in json.loads(body)["files"]:
                path, mode = one["path"], "lfs" if one["path"].endswith(LFS) else "regular"
                known = _oid(files[path], mode) if path in files else None
                answers.append(
                    {"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": known}
                )
            self.send(200, {"files": answers})

    def on_batch(self, body, kind, name):
        objects = [
            {**one, "actions": {"upload": {"href": f"{self.server.url}/lfs/{one['oid']}"}}}
            for one in json.loads(body)["objects"]
        ]
        self.send(200, {"transfer": "basic", "objects": objects})

    def on_put(self, body, oid):
        if hashlib.sha256(body).hexdigest() != oid:
            return self.send(400, {"error": "the hash differs"})
        self.server.blobs[oid] = body
        self.send(200, {})

    def on_commit(self, body, kind, name, revision):
        if not (repo := self.repo(kind, name)) or (base := self.files(repo, revision)) is None:
            return
        files = dict(base)
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                repo.commits.append((value["summary"], files))
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.blobs[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        address, done = self.address(kind, name), {"commitOid": "1" * 40}
        if "create_pr" in self.query:
            repo.pulls.append(files)
            done["pullRequestUrl"] = f"{address}/discussions/{len(repo.pulls)}"
        else:
            base.clear()
            base.update(files)
        self.send(200, done | {"commitUrl": f"{address}/commit/{'1' * 40}"})


def _oid(data: bytes, mode: str) -> str:
    """The hash by which the client knows that a file has not changed."""
    if mode == "lfs":
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@contextlib.contextmanager
def serving_hub():
    with Hub() as hub:
        threading.Thread(target=hub.serve_forever, args=(0.01,), daemon=True).start()
        try:
            yield hub
        finally:
            hub.waits.set()
            hub.shutdown()


def client_of(hub: Hub, monkeypatch) -> None:
    """Let the client of this process talk to `hub`, and wait for nothing before it tries again."""
    from huggingface_hub import constants

    for name, value in environment(hub).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    patient = SimpleNamespace(**vars(time) | {"sleep": lambda seconds: None})
    monkeypatch.setattr("huggingface_hub.utils._http.time", patient)


def environment(hub: Hub) -> dict[str, str]:
    """What a process needs to talk to `hub`: the client reads it when it is imported."""
    return {
        "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN,
    }  # fmt: skip
