"""Fixtures that many tests share."""

from __future__ import annotations

import atexit
import gc
import os
import shutil
import tempfile

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach out
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # two workers share two cores; also of subprocesses
if "HF_DATASETS_CACHE" not in os.environ:  # encoded rows of tests are not the user's
    os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="llmdistill-rows-")
    atexit.register(shutil.rmtree, os.environ["HF_DATASETS_CACHE"], ignore_errors=True)

import pytest
import torch

from tests import toy
from tests.support.hub_server import client_of, serving_hub
from tests.support.machine import force_native_bfloat16
from tests.support.servers import serving

force_native_bfloat16()
torch.set_num_threads(1)  # two workers share two cores


def pytest_collection_finish() -> None:
    """Trainer collects garbage in each run, which takes a second if it visits all that is imported."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seed() -> None:
    """No test depends on the one before it."""
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _quick_ends_of_runs(request, monkeypatch) -> None:
    """A run measures its speed and draws charts, which takes longer than the rest of it on toys.

    The speed of a toy means nothing, and only tests of charts draw them.
    """
    monkeypatch.setattr("llmdistill.evaluation.measure.TIMED_TOKENS", 4)
    if "charts" not in request.keywords:
        monkeypatch.setattr("llmdistill.publish.report.png", lambda chart: b"")
        monkeypatch.setattr("llmdistill.publish.report._library", lambda: "")


@pytest.fixture(scope="session")
def tokenizer():
    return toy.tokenizer()


@pytest.fixture
def student():
    return toy.model()


@pytest.fixture
def teacher_model():
    return toy.teacher_model()


@pytest.fixture(scope="session")
def pair(tmp_path_factory):
    """(teacher folder, student folder) on disk."""
    return toy.save_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture
def server():
    """A server that speaks OpenAI's protocol."""
    with serving() as server:
        yield server


@pytest.fixture
def hub(monkeypatch):
    """A Hub on this machine, to which the real client talks."""
    with serving_hub() as hub:
        client_of(hub, monkeypatch)
        yield hub
