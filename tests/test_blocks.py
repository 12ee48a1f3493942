"""P2: every bash, yaml and python block of the README and the manual runs on toys, or says why not."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.support.desk import Desk, stand_ins

ROOT = Path(__file__).parents[1]
# tests/test_docs.py runs the examples of docs/extending.md.
PAGES = [
    ROOT / "README.md",
    *sorted(path for path in (ROOT / "docs").rglob("*.md") if path.name != "extending.md"),
]
BLOCK = re.compile(
    r"(?:^<!-- not run: (.+?) -->\n)?^```(\w+)\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL
)
REASONS = {
    "needs a GPU", "needs the network", "needs the files of this measurement", "starts two processes",
}  # fmt: skip
LANGUAGES = {"bash", "yaml", "python"}


def blocks(path: Path) -> list[tuple[str, str, str]]:
    """(reason why it is not run or "", language, text) of each block of a page."""
    found = BLOCK.findall(path.read_text(encoding="utf-8"))
    return [block for block in found if block[1] in LANGUAGES]


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_every_block_is_found_and_its_mark_has_a_known_reason(path):
    text = path.read_text(encoding="utf-8")
    fences = re.findall(r"^ *```(\w*)\n(.*?)^ *```$", text, flags=re.MULTILINE | re.DOTALL)
    assert {language for language, _ in fences} <= LANGUAGES | {""}
    assert len([one for one in fences if one[0]]) == len(blocks(path))
    for language, block in fences:  # a block without a language shows output, and no command
        assert language or not re.search(r"^(\$|llmdistill|pip|scripts/)", block, re.MULTILINE)
    marks = re.findall(r"<!-- not run: (.+?) -->", text)
    assert marks == [reason for reason, _, _ in blocks(path) if reason]
    assert set(marks) <= REASONS


@pytest.mark.slow
@pytest.mark.parametrize(
    "path", [p for p in PAGES if any(not reason for reason, _, _ in blocks(p))], ids=name
)
def test_the_blocks_of_a_page_run(path, pair, tmp_path, monkeypatch):
    stand_ins(monkeypatch, tmp_path, pair)
    monkeypatch.chdir(tmp_path)
    desk = Desk(tmp_path, pair)
    for reason, language, text in blocks(path):
        if not reason:
            desk.run(language, text)


@pytest.mark.parametrize(
    ("language", "text", "error"),
    [
        ("bash", "rm -rf data\n", "mark the block"),
        ("bash", "llmdistill check no.yaml\n", "llmdistill check"),
        ("yaml", "rollout: {kind: sampeld}\n", "sampeld"),
        ("python", "raise ValueError('seen')\n", "seen"),
    ],
)
def test_a_block_that_is_wrong_is_seen(language, text, error, pair, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((AssertionError, ValueError), match=error):
        Desk(tmp_path, pair).run(language, text)
