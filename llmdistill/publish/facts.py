"""What a run was made of and what it took: `run.json`, which the card and the report show."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from llmdistill import run_folder
from llmdistill.data.collate import EncodedRows, PromptDataset
from llmdistill.models.embedded import hub_name
from llmdistill.models.load import default_device
from llmdistill.recipe import Recipe

FACTS = "run.json"
# Packages whose versions a card states.
PACKAGES = ("llmdistill", "torch", "transformers", "accelerate")


@dataclass(frozen=True)
class Facts:
    """What a run was made of.

    - `seconds`: time of training.
    - `tokens`: predicted tokens by writer ("teacher", "student", "data").
    - `memory`: the most bytes that the first process had.
    - `terms`: names of the terms of the loss in the log.
    - `revisions`: commits of the models that came from the Hub.
    - `rows`: a phrase for `train` and for `held_out`.
    - `notes`: a sentence for each kind of row that was dropped or cut.
    """

    finished: str
    steps: int
    seconds: float
    tokens: dict[str, int]
    machine: str
    processes: int
    memory: int
    packages: dict[str, str]
    terms: list[str] = field(default_factory=list)
    revisions: dict[str, str] = field(default_factory=dict)
    rows: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @classmethod
    def read(cls, folder: Path) -> Facts | None:
        """Return the facts of a run folder; None if it has none, or those of another version."""
        try:
            return cls(**json.loads((folder / FACTS).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None

    def write(self, folder: Path) -> None:
        """Write `run.json`."""
        text = json.dumps(asdict(self), indent=2)
        (folder / FACTS).write_text(text + "\n", encoding="utf-8")


def facts_of(
    recipe: Recipe,
    folder: Path,
    train: EncodedRows,
    held: PromptDataset | None,
    terms: Sequence[str],
) -> Facts:
    """Return the facts of the run that this process has just made, from its log and its rows.

    Of a recipe of several runs, they are those of the last run.
    """
    log = run_folder.read_lines(folder / run_folder.METRICS)
    rows = {"train": str(train.counts)} if isinstance(train, PromptDataset) else {}
    if held is not None:
        rows["held_out"] = str(held.counts)
    return Facts(
        finished=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        steps=log[-1]["step"] if log else 0,
        seconds=log[-1].get("seconds", 0.0) if log else 0.0,
        tokens=tokens_by_writer(log),
        machine=machine(use_cpu=bool(recipe.training.get("use_cpu"))),
        processes=PartialState().num_processes,
        memory=peak_memory(),
        packages={name: version(name) for name in PACKAGES},
        terms=list(terms),
        revisions=dict(_commits(recipe)),
        rows=rows,
        notes=list(train.counts.notes()),
    )


def tokens_by_writer(log: list[dict[str, Any]]) -> dict[str, int]:
    """Return the predicted tokens of a run by who wrote them, without writers that wrote none."""
    found = dict.fromkeys(("teacher", "student", "data"), 0.0)
    for line in log:
        count = line.get("predicted_tokens", 0.0)
        shares = {name: line.get(f"{name}_token_share", 0.0) for name in ("teacher", "student")}
        for name, share in (shares | {"data": 1.0 - sum(shares.values())}).items():
            found[name] += count * share
    return {name: round(count) for name, count in found.items() if round(count)}


def machine(*, use_cpu: bool) -> str:
    """Return the device of this process in words."""
    if not use_cpu and default_device().type == "cuda":
        return torch.cuda.get_device_name()
    name = _processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} threads"


def peak_memory() -> int:
    """Return the most bytes that this process has had: on its GPU, or of main memory."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ImportError:  # Windows
        return 0
    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def version(package: str) -> str:
    """Return the installed version of a package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:  # not Linux
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in text.splitlines()
                 if line.startswith("model name")), "")  # fmt: skip


def _commits(recipe: Recipe) -> list[tuple[str, str]]:
    """Return each model that came from the Hub with its commit, as the Hub's cache has it."""
    from huggingface_hub import try_to_load_from_cache

    sources = {(recipe.student.model, recipe.student.revision), *recipe.teacher_sources}
    found = []
    for name, revision in sorted(sources, key=str):
        if hub_name(name) != name:  # a local one, or the embedded one
            continue
        file = try_to_load_from_cache(name, "config.json", revision=revision)
        if isinstance(file, str):
            found.append((name, Path(file).parent.name))
    return found
