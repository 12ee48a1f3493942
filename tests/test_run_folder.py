"""A folder is claimed without losing what it holds, wherever the process is killed."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from llmdistill import run_folder
from llmdistill.errors import CheckpointError

RESULTS = ("student", "checkpoints")
OLD = {"recipe.yaml": "old", "metrics.jsonl": "1", "student/weights": "2", "student/more/card": "3"}


def fill(folder, files=OLD):
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def contents(folder):
    """Files with their text; not the mark of a folder that was moved aside."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    found = {str(path.relative_to(folder)): path.read_text() for path in files}
    return {name: text for name, text in found.items() if name != run_folder.REPLACED}


def check(folder, *, resume=False, overwrite=False, **options):
    run_folder.check(folder, resume=resume, overwrite=overwrite, **options)


def start(folder, text="new", *, overwrite=True):
    """The first part of a run that overwrites: it claims its folder and writes the record."""
    check(folder, overwrite=overwrite)
    run_folder.claim(folder, overwrite=overwrite, results=RESULTS)
    (folder / "recipe.yaml").write_text(text)


@pytest.mark.parametrize(
    ("files", "options", "said"),
    [
        (OLD, {}, "is not empty. To continue it, set resume=auto; to replace it, pass overwrite"),
        (
            {"thesis.txt": "years"},
            {"overwrite": True},
            "has files but no run, so it is neither used nor overwritten",
        ),
        ({"thesis.txt": "years"}, {"resume": True}, "has no run to resume"),
        ({}, {"resume": True, "noun": "dataset"}, "has no dataset to resume"),
        (OLD, {"resume": True, "overwrite": True}, "but not both"),
    ],
)
def test_a_folder_that_may_not_be_used_is_named_and_left_alone(tmp_path, files, options, said):
    fill(tmp_path / "run", files)
    with pytest.raises(CheckpointError, match=said):
        check(tmp_path / "run", **options)
    assert contents(tmp_path / "run") == files
    assert not (tmp_path / "run.old").exists()


@pytest.mark.parametrize(
    "files", [{}, {"recipe.yaml": "x"}, {"recipe.yaml.new": "x", "train.jsonl.new": ""}]
)
def test_a_start_that_failed_is_not_in_the_way(tmp_path, files):
    start(fill(tmp_path / "run", files), overwrite=False)
    assert (tmp_path / "run" / "recipe.yaml").read_text() == "new"


def test_a_file_in_its_place_is_in_the_way(tmp_path):
    (tmp_path / "run").write_text("")
    for overwrite in (False, True):
        with pytest.raises(CheckpointError):
            check(tmp_path / "run", overwrite=overwrite)


def test_the_old_folder_is_kept_until_it_is_discarded(tmp_path):
    run = fill(tmp_path / "run")
    check(run, overwrite=True)
    assert contents(run) == OLD  # checking changes nothing
    start(run)
    assert contents(run) == {"recipe.yaml": "new"}
    assert contents(tmp_path / "run.old") == OLD
    run_folder.discard_old(run)
    assert contents(run) == {"recipe.yaml": "new"}
    assert not (tmp_path / "run.old").exists()


def test_a_resumed_run_keeps_its_files(tmp_path):
    run = fill(tmp_path / "run")
    check(run, resume=True)
    run_folder.claim(run, overwrite=False, results=RESULTS)
    assert contents(run) == OLD


def test_of_two_old_folders_the_one_with_results_is_kept(tmp_path):
    run, old = fill(tmp_path / "run"), tmp_path / "run.old"
    start(run)
    fill(run, {"metrics.jsonl": "of a run that got nowhere"})
    start(run, "newer")
    assert contents(old) == OLD
    assert contents(run) == {"recipe.yaml": "newer"}
    fill(run, {"checkpoints/1/weights": "9"})
    start(run, "newest")
    assert contents(old) == {"recipe.yaml": "newer", "checkpoints/1/weights": "9"}
    assert contents(run) == {"recipe.yaml": "newest"}


def test_a_users_own_backup_is_neither_replaced_nor_discarded(tmp_path):
    run, backup = fill(tmp_path / "run"), fill(tmp_path / "run.old", {"mine": "kept by hand"})
    for step in (check, run_folder.claim):
        options = {"results": RESULTS} if step is run_folder.claim else {}
        with pytest.raises(
            CheckpointError, match=r"run\.old, which exists and was not made by overwriting"
        ):
            step(run, overwrite=True, **options)
    run_folder.discard_old(run)
    assert contents(run) == OLD
    assert contents(backup) == {"mine": "kept by hand"}


def test_a_folder_that_cannot_be_moved_stays(tmp_path, monkeypatch):
    """A mounted volume, say."""

    def busy(*args, **options):
        raise OSError(16, "Device or resource busy")

    run = fill(tmp_path / "run")
    monkeypatch.setattr("pathlib.Path.rename", busy)
    with pytest.raises(CheckpointError, match=r"cannot move .*Empty it, or choose another"):
        start(run)
    assert contents(run) == OLD


class Killed(BaseException):
    pass


def kill_at(patch, number):
    """Kills before this change of the file system is made; gives a list with the changes so far."""
    changes = []

    def counted(change):
        def run(*args, **options):
            changes.append(change.__name__)
            if len(changes) == number:
                raise Killed
            return change(*args, **options)

        return run

    def in_steps(folder):
        for file in sorted(folder.rglob("*"), reverse=True):
            file.rmdir() if file.is_dir() else file.unlink()
        folder.rmdir()

    for name in ("rename", "unlink", "rmdir", "mkdir", "touch"):
        patch.setattr(Path, name, counted(getattr(Path, name)))
    patch.setattr(shutil, "rmtree", in_steps)
    return changes


def overwritten_once(root, before):
    """A folder in one of three states, and what must not be lost of it."""
    run = fill(root / "run")
    if before == "no other":
        return run, OLD
    start(run)
    fill(run, {"metrics.jsonl": "4"})
    if before == "an older one with more to show":
        return run, OLD
    fill(run, {"student/weights": "5"})
    return run, {"recipe.yaml": "new", "metrics.jsonl": "4", "student/weights": "5"}


@pytest.mark.parametrize(
    "before", ["no other", "an older one with more to show", "an older one with less to show"]
)
def test_a_kill_anywhere_leaves_the_old_folder_or_both(tmp_path, before):
    """Each change of the file system in turn is the one that is not made."""
    killed_in = []
    for number in range(1, 99):
        run, precious = overwritten_once(tmp_path / str(number), before)
        step = "claim"
        with pytest.MonkeyPatch.context() as patch:
            kill_at(patch, number)
            try:
                start(run, "newer")
                step = "discard_old"
                run_folder.discard_old(run)
                step = "done"
            except Killed:
                killed_in.append(step)
        folders = [folder for folder in (run, run_folder.old_folder(run)) if folder.exists()]
        if step == "claim":
            assert precious in map(contents, folders)
        start(run, "newest")
        run_folder.discard_old(run)
        assert contents(run) == {"recipe.yaml": "newest"}
        assert os.listdir(run.parent) == ["run"]
        if step == "done":
            break
    assert set(killed_in) == {"claim", "discard_old"}
    assert len(killed_in) >= 10
