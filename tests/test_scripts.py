"""What the scripts of the project agree on."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from tests import toy

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def upgraded(*wanted: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts" / "upgraded_requirements.py"), *wanted]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("wanted", ["transformers==5.24", "rouge_score>=0.2", "torch @ file:///x"])
def test_an_upgrade_replaces_one_requirement(wanted):
    name = re.split(r"[ =>]", wanted)[0].replace("_", "-")
    lines = upgraded(wanted).stdout.splitlines()
    kept = [one for one in PROJECT["dependencies"] if re.split(r"[>=]", one)[0] != name]
    assert len(kept) == len(PROJECT["dependencies"]) - 1
    assert lines[: len(kept) + 1] == [wanted, *kept]
    runner = lines[len(kept) + 1 :]
    assert runner
    assert all(line.startswith("pytest") for line in runner)


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (["transformer==5.24"], "'transformer==5.24' does not name a dependency of the package"),
        ([""], "does not name a dependency of the package"),
        ([], "Give one requirement, such as"),
    ],
)
def test_an_upgrade_of_something_else_is_refused(wanted, message):
    done = upgraded(*wanted)
    assert done.returncode == 1
    assert message in done.stderr
    assert not done.stdout


def test_a_commit_is_checked_as_scripts_check_does():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert [repo["repo"] for repo in hooks] == ["local"]  # nothing to download
    entries = [hook["entry"] for hook in hooks[0]["hooks"]]
    lines = (ROOT / "scripts" / "check").read_text().splitlines()
    checks = [re.sub(r" --check| \.$", "", line) for line in lines if line.startswith(".venv/")]
    assert len(checks) == 6
    assert entries == [re.sub(r" \.$", "", line) for line in checks]


def test_the_whole_suite_installs_what_its_tests_need():
    """A test that is skipped in CI tests nothing."""
    (line,) = [
        line
        for line in (ROOT / "scripts" / "test").read_text().splitlines()
        if line.startswith("scripts/install")
    ]
    extras = set(line.split()[1:])
    assert {"dev", "dev-server", "quickstart"} <= extras <= set(PROJECT["optional-dependencies"])


def benchmark(name: str, *options: str) -> subprocess.CompletedProcess[str]:
    """Run a benchmark as on a machine without a GPU."""
    command = [sys.executable, str(ROOT / "scripts" / name), *options]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


@pytest.mark.slow
def test_the_gpu_benchmark_runs_on_toys(tmp_path):
    page = tmp_path / "gpu.md"
    done = benchmark("bench_gpu.py", "--tiny", "--out", str(page))
    assert done.returncode == 0, done.stderr
    text = page.read_text(encoding="utf-8")
    assert text in done.stdout
    assert "A toy run, whose figures mean nothing" in text
    assert re.search(r"`python \S*bench_gpu.py --tiny .*`, \d{4}-\d\d-\d\d, .* torch 2", text)
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| ")]
    named = {row[0].removeprefix("| "): row for row in rows}
    for name in (
        "jsd", "fixed, ours", "on-policy, ours", "interleaved, ours", "student, generate",
        "teacher, ours, sample", "teacher, ours, continuous (generate_batch)",
    ):  # fmt: skip
        assert named[name][-2].endswith("%"), name  # the utilisation, and no error
    assert not [name for name in named if "TRL" in name or "compiled" in name]


@pytest.mark.slow
def test_the_gpu_benchmark_needs_a_gpu():
    done = benchmark("bench_gpu.py")
    assert done.returncode == 2
    assert done.stderr.endswith("no GPU was found. Run it on one, or use --tiny.\n")


@pytest.mark.slow
def test_every_writer_of_the_benchmark_writes(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    bench_rollouts = importlib.import_module("bench_rollouts")
    parts = (toy.teacher_model(), toy.model(), toy.tokenizer(), bench_rollouts.TopK(25))
    rows = bench_rollouts.Bench(*parts).rows(2, 1)
    assert len(rows) == 9
    assert all(float(row["tokens/s"]) > 0 for row in rows)
