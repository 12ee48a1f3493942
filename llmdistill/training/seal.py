"""Seals checkpoints: a manifest, written last, tells that a checkpoint is whole and unchanged.

A checkpoint has many files, from several ranks.  A run that is killed while it saves leaves some of
them, and Trainer would load what there is and make up the rest.  So each checkpoint has a

    manifest.json     step, number of ranks, what the run depends on, and the size and SHA-256 of
                      each file

and a run resumes only from a checkpoint whose files are those of its manifest.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from llmdistill.errors import CheckpointError

MANIFEST = "manifest.json"
FORMAT = 1
NUMBERED = re.compile(r"checkpoint-(\d+)")


class Sealed(NamedTuple):
    """What the manifest of a checkpoint says about the run.

    `depends_on` maps names to hashes or numbers that a resumed run must have, too.
    """

    step: int
    world_size: int
    depends_on: dict[str, Any]


class Found(NamedTuple):
    """The newest whole checkpoint, or None; and why each newer one was skipped."""

    folder: Path | None
    sealed: Sealed | None
    skipped: list[str]


def seal(folder: Path, about: Sealed) -> None:
    """Write the manifest of a checkpoint that all ranks have finished writing."""
    files = {
        file.relative_to(folder).as_posix(): {"bytes": file.stat().st_size, "sha256": _hash(file)}
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.name != MANIFEST
    }
    text = json.dumps({"format": FORMAT, **about._asdict(), "files": files}, indent=2)
    unfinished = folder / f"{MANIFEST}.new"
    unfinished.write_text(text + "\n", encoding="utf-8")
    # Older checkpoints are deleted next, so this one must not be in a cache only.
    for file in (*(folder / name for name in files), unfinished):
        _to_disk(file)
    unfinished.rename(folder / MANIFEST)
    _to_disk(folder)


def require_sealed(folder: Path) -> Sealed:
    """Return what the manifest says.  Raises CheckpointError if a file is not as it was sealed."""
    manifest = _manifest(folder)
    for name, known in manifest["files"].items():
        file = folder / str(name)
        if not file.is_file():
            raise CheckpointError(f"{folder} has lost its file {name}")
        if (size := file.stat().st_size) != known.get("bytes"):
            raise CheckpointError(f"{file} has {size} bytes and had {known.get('bytes')}")
        if _hash(file) != known.get("sha256"):
            raise CheckpointError(f"{file} has changed since it was saved (its SHA-256 differs)")
    return Sealed(*(manifest[name] for name in Sealed._fields))


def newest(checkpoints: Path) -> Found:
    """Look for the newest checkpoint that is whole among the folders `checkpoint-<step>`.

    Raises CheckpointError if there are sealed ones, but each of them is damaged, or if a folder was
    saved without what a resume needs.
    """
    skipped: list[str] = []
    for folder in numbered(checkpoints)[::-1]:
        try:
            return Found(folder, require_sealed(folder), skipped)
        except (CheckpointError, OSError) as error:
            skipped.append(str(error))
    if any(is_sealed(one) or _has_only_the_model(one) for one in numbered(checkpoints)):
        raise CheckpointError(
            f"no checkpoint in {checkpoints} is whole: {'; '.join(skipped)}. Restore the files, or "
            "start again with overwrite."
        )
    return Found(None, None, skipped)


def is_sealed(folder: Path) -> bool:
    """Whether the checkpoint was saved to the end.  It may have been damaged since."""
    return (folder / MANIFEST).is_file()


def keep_newest(checkpoints: Path, number: int | None, keep: Iterable[Path]) -> None:
    """Delete the oldest sealed checkpoints until `number` are left, but none of `keep`.

    None or 0 keeps all of them.
    """
    found = [one for one in numbered(checkpoints) if is_sealed(one)]
    kept = {one.resolve() for one in keep}
    spare = [one for one in found if one.resolve() not in kept]
    too_many = min(len(found) - number, len(spare)) if number else 0
    for folder in spare[: max(too_many, 0)]:
        shutil.rmtree(folder, ignore_errors=True)


def numbered(checkpoints: Path) -> list[Path]:
    """Return the folders `checkpoint-<step>`, whole or not, by their step."""
    found = {
        int(match[1]): folder
        for folder in checkpoints.glob("checkpoint-*")
        if (match := NUMBERED.fullmatch(folder.name)) and folder.is_dir()
    }
    return [found[step] for step in sorted(found)]


def differences(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return the names of what a run depends on that are not the same now."""
    return [name for name in dict.fromkeys([*saved, *now]) if saved.get(name) != now.get(name)]


def _has_only_the_model(folder: Path) -> bool:
    """Whether a checkpoint was saved with `save_only_model`.  Its state is written last."""
    return (folder / "trainer_state.json").is_file() and not any(folder.glob("*optim*"))


def _to_disk(path: Path) -> None:
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def _manifest(folder: Path) -> dict[str, Any]:
    file = folder / MANIFEST
    if not file.is_file():
        raise CheckpointError(
            f"{folder} has no {MANIFEST}: it was not saved to the end, or without what a resume "
            "needs (training.save_only_model)"
        )
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
        known = manifest["format"]
        _ = manifest["files"], [manifest[name] for name in Sealed._fields]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file} cannot be read: {error!r}") from error
    if known != FORMAT:
        raise CheckpointError(f"{file} has format {known}, and this version reads {FORMAT}")
    return manifest


def _hash(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
