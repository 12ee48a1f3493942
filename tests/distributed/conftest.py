"""The folders of cases that have run on two ranks."""

from __future__ import annotations

import importlib.util

import pytest

from tests.distributed.launch import Launches


@pytest.fixture(scope="module")
def launches(request, tmp_path_factory):
    of_items = (getattr(item, "callspec", None) for item in request.session.items)
    wanted = {one.params["folder"] for one in of_items if one and "folder" in one.params}
    return Launches(tmp_path_factory.mktemp("ranks"), wanted)


@pytest.fixture
def folder(request, launches):
    """The folder of a case that has run on two ranks."""
    # DeepSpeed is no dependency of the tests: it changes how other libraries are imported.
    if request.param.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("needs DeepSpeed")
    return launches.folder(request.param)
