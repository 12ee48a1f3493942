"""Uploads the result of a run, a model or a dataset to the Hub.

What is uploaded, and under which name, is decided here.  How, and what can go wrong, is written in
`uploads.py`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from llmdistill import recipe as recipes
from llmdistill import run_folder, uploads
from llmdistill.errors import HubError
from llmdistill.instruct.dataset import FORMER_SPLITS, SPLITS
from llmdistill.instruct.records import read_whole_lines
from llmdistill.publish.names import public_dump
from llmdistill.uploads import CARD, Kind, Repository

# Files of a run, next to those of its student.
OF_A_RUN = ("evaluation.json", "report.html")
# The files of a dataset.
DATA_FILES = (CARD, *(f"{name}.{type}" for name in SPLITS for type in ("jsonl", "parquet")))
ALLOW = "pass private=False"


@dataclass(frozen=True)
class Content:
    """What belongs on the Hub of a folder: files or texts by their names there.

    `replaces` are patterns of names that an earlier upload may have used and this one does not.
    """

    kind: Kind
    files: Mapping[str, Path | str]
    replaces: tuple[str, ...]


def push(
    folder: str | Path,
    name: str,
    *,
    private: bool = True,
    revision: str | None = None,
    create_pr: bool = False,
    message: str | None = None,
    token: str | None = None,
) -> str:
    """Upload a finished run, an exported model or a finished dataset, and return its address.

    Of a run, the student with its card is uploaded, and the figures, the report and the recipe
    without local paths.  Only files that are known to belong there are uploaded: never checkpoints,
    optimizers, pickles or responses.

    Args:
        folder: A run folder, a model folder with a card, or a dataset of `llmdistill generate`.
        name: Repository, such as me/my-model.  It is created if it does not exist.
        private: Whether the repository is private.  False makes an existing one public, after
            the upload.
        revision: Branch to upload to, which is created if it does not exist.  None is `main`.
        create_pr: Open a pull request instead of changing the repository.
        message: Message of the commit.
        token: Token that may write there.  None is the one of `hf auth login` or HF_TOKEN.

    Raises:
        HubError: The folder is not complete or is none of these; the repository is public, but
            should be private; or the Hub cannot be reached or refuses the upload.
    """
    if create_pr and revision:
        raise HubError("a pull request is always made to the branch main. Choose one of the two.")
    found = content_of(Path(folder))
    repository = prepare(name, found.kind, private=private, token=token)
    with tempfile.TemporaryDirectory() as place:
        uploads.stage(found.files, Path(place))
        address = repository.upload(
            Path(place),
            message=message or f"Upload a {found.kind} of llmdistill",
            revision=revision,
            create_pr=create_pr,
            replaces=found.replaces,
        )
    if not private:
        repository.make_public()
    return address


def prepare(name: str, kind: Kind, *, private: bool = True, token: str | None = None) -> Repository:
    """Create a repository if it does not exist.  Raises HubError as `push` does."""
    return Repository(name, kind, token).prepare(private=private, allow=ALLOW)


def push_result(
    folder: Path, name: str, *, private: bool = True, revision: str | None = None
) -> str:
    """Upload what a command has just made, and return its address.

    If that fails, the HubError also says that nothing is lost, and how to repeat the upload.
    """
    try:
        return push(folder, name, private=private, revision=revision)
    except HubError as error:
        options = [ALLOW] * (not private) + [f"pass revision={revision}"] * bool(revision)
        told = f" ({', '.join(options)})" if options else ""
        raise HubError(
            f"{error} All results are in {folder}. To upload them later, run "
            f"`llmdistill push {folder} {name}`{told}."
        ) from error


def content_of(folder: Path) -> Content:
    """Return what belongs on the Hub of a run, a model or a dataset.

    Raises HubError if the folder is none of these, or is not complete.
    """
    if not folder.is_dir():
        raise HubError(f"{folder} is no folder. Name a run, a model or a dataset.")
    record = folder / run_folder.RECORD
    if record.is_file():
        data = recipes.parse_yaml(record.read_text(encoding="utf-8"), str(record))
        made_by_generate = recipes.command_of(data) == "generate"
        return _dataset(folder) if made_by_generate else _run(folder, record)
    if (folder / "trainer_state.json").is_file():
        raise HubError(
            f"{folder} is a checkpoint, which only resumes a run. Name the folder of the run."
        )
    return Content("model", _model(folder), uploads.WEIGHTS)


def _run(folder: Path, record: Path) -> Content:
    student = folder / "student"
    if not (student / CARD).is_file():
        raise HubError(
            f"the run in {folder} is not finished: there is no {student / CARD}. Train with the "
            "same recipe, which continues the run, and upload it then."
        )
    files: dict[str, Path | str] = {**_model(student), **uploads.belonging(folder, OF_A_RUN)}
    files[run_folder.RECORD] = public_dump(recipes.load(record))
    return Content("model", files, uploads.WEIGHTS)


def _model(folder: Path) -> dict[str, Path | str]:
    files: dict[str, Path | str] = {**uploads.belonging(folder, uploads.MODEL_FILES)}
    if not any(name.endswith(".safetensors") for name in files):
        raise HubError(
            f"{folder} has no weights in the format of safetensors. Name a run, a model that was "
            "saved with save_pretrained, or a dataset of `llmdistill generate`."
        )
    if CARD not in files:
        raise HubError(
            f"{folder} has no {CARD}. Write one that says where the model comes from and under "
            "which licence, or name a run, which has one."
        )
    return files


def _dataset(folder: Path) -> Content:
    files = uploads.belonging(folder, DATA_FILES)
    if CARD not in files or "train.jsonl" not in files:
        raise HubError(
            f"the dataset in {folder} is not finished: it has no {CARD} or no train.jsonl. Pass "
            "resume to `llmdistill generate` to finish it, and upload it then."
        )
    _check_images(folder)
    replaces = tuple(f"{name}.*" for name in (*SPLITS, *FORMER_SPLITS))
    return Content("dataset", files, replaces)


def _check_images(folder: Path) -> None:
    """Raise HubError if a row names an image by a path of this machine."""
    for row in read_whole_lines(folder / "rows.jsonl"):
        for value in row.values():
            files = value if isinstance(value, list) else []
            if found := [one for one in files if isinstance(one, str) and Path(one).is_absolute()]:
                raise HubError(
                    f"row {row['id']} names an image by its path on this machine: {found[0]}. "
                    "Set teacher.image_folder to the folder of the images, and generate the "
                    "dataset from prompts with paths that start there."
                )
