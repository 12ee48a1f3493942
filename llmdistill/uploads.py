"""Uploads to the Hub: what of a model belongs there, one way to upload it, and what can go wrong.

Files are uploaded because a list names them, and never because no list forbids them.  So an
optimizer, a pickle or a checkpoint stays on this machine, whatever its name is.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from llmdistill.data.sources import hub_name
from llmdistill.errors import HubError

if TYPE_CHECKING:
    from huggingface_hub import HfApi

Kind = Literal["model", "dataset"]

CARD = "README.md"
ADAPTER = "adapter_config.json"
WEIGHTS = (
    *("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json"),
    *("adapter_model.safetensors", ADAPTER),
)
TOKENIZER = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template.jinja", "additional_chat_templates/*.jinja", "tokenizer.model", "vocab.json"),
    *("vocab.txt", "merges.txt", "spiece.model", "sentencepiece.bpe.model", "*.tiktoken"),
)
MODEL_FILES = (
    *(CARD, "LICENSE*", "NOTICE*", "*.png", "*.svg", "plots/*.png", "plots/*.svg"),
    *("config.json", "generation_config.json", *WEIGHTS, *TOKENIZER),
)

# What to do about an answer of the Hub.
ADVICE = {
    401: "Log in with 'hf auth login', or set HF_TOKEN to a token that may write",
    403: "Use a token that may write there, or choose another name",
    404: "Check the name and the branch, and use a token that may write there",
    409: "Something else changed the repository at the same time. Try again",
    429: "The Hub limits the number of requests. Wait a few minutes and try again",
}
# Names of tokens, in case an answer repeats one.
SECRET = re.compile(r"\b(hf|api)_\w{6,}")
SHOWN_CHARACTERS = 300


@dataclass(frozen=True)
class Repository:
    """A repository on the Hub.  Without a `token`, the one of the login or of HF_TOKEN is used.

    All methods raise HubError if the Hub cannot be reached or refuses the request.
    """

    name: str
    kind: Kind = "model"
    token: str | None = field(default=None, repr=False)

    def prepare(self, *, private: bool, allow: str) -> Repository:
        """Create it, if it does not exist, and return it with its full name.

        A new one is private or public, as asked.  HubError is raised if it should be private, but
        exists and is public; the message then says that `allow` permits it.
        """
        with self._clear_errors("use"):
            made = self._api.create_repo(
                self.name, repo_type=self.kind, private=private, exist_ok=True
            )
            found = replace(self, name=made.repo_id)
            is_public = not found._is_private()  # `exist_ok` leaves an existing one as it is
        if private and is_public:
            raise HubError(
                f"{found.name} is public on the Hub, and this upload is private. To publish it, "
                f"{allow}; or choose another name."
            )
        return found

    def upload(
        self,
        folder: Path,
        *,
        message: str,
        revision: str | None = None,
        create_pr: bool = False,
        replaces: Sequence[str] = (),
    ) -> str:
        """Upload all files of a folder, and return the address where they are.

        This is `HfApi.upload_folder`, also for large folders: it takes a revision or a pull
        request, and if `hf_xet` is installed, it uploads in parts, which a second try does not
        repeat.

        Args:
            folder: A folder that `stage` has filled, so that nothing else is in it.
            message: Message of the commit.
            revision: Branch, which is created if it does not exist; or a pull request, as
                `refs/pr/1`.
            create_pr: Open a pull request instead of changing the branch.
            replaces: Patterns of names.  Files there with such names are deleted, unless the
                folder has them.
        """
        with self._clear_errors("upload to"):
            if revision and not revision.startswith("refs/"):
                self._api.create_branch(
                    self.name, branch=revision, repo_type=self.kind, exist_ok=True
                )
            done = self._api.upload_folder(
                repo_id=self.name,
                repo_type=self.kind,
                folder_path=folder,
                commit_message=message,
                revision=revision,
                create_pr=create_pr,
                delete_patterns=list(replaces) or None,
            )
        address = f"{self._api.endpoint}/{'datasets/' * (self.kind == 'dataset')}{self.name}"
        return done.pr_url or (f"{address}/tree/{revision}" if revision else address)

    def make_public(self) -> None:
        """Make it public, if it is private."""
        with self._clear_errors("publish"):
            if self._is_private():
                self._api.update_repo_settings(self.name, private=False, repo_type=self.kind)

    def _is_private(self) -> bool:
        return bool(self._api.repo_info(self.name, repo_type=self.kind).private)

    @property
    def _api(self) -> HfApi:
        from huggingface_hub import HfApi

        return HfApi(token=self.token)

    @contextlib.contextmanager
    def _clear_errors(self, doing: str) -> Iterator[None]:
        """Turn any error of the Hub's client into a HubError without the token."""
        try:
            yield
        except Exception as error:
            got, advice = _explained(error)
            text = f"cannot {doing} {self.name} on the Hub: {got}. {advice}."
            text = SECRET.sub(r"\1_...", text)
            raise HubError(text.replace(self.token, "...") if self.token else text) from error


def belonging(folder: Path, patterns: Sequence[str]) -> dict[str, Path]:
    """Return the files of a folder that match one of the patterns, by their names in it."""
    found = (path for pattern in patterns for path in sorted(folder.glob(pattern)))
    return {path.relative_to(folder).as_posix(): path for path in found if path.is_file()}


def stage(
    files: Mapping[str, Path | str], folder: Path, *, link: Callable[[Path, Path], Any] = os.symlink
) -> None:
    """Fill a folder with what is to be uploaded, by name: links to files, and texts.

    A hard link (`os.link`) stays whole if the file is deleted.  Where `link` fails, files are
    copied.
    """
    for name, content in files.items():
        place = folder / name
        place.parent.mkdir(parents=True, exist_ok=True)
        if name == ADAPTER and isinstance(content, Path):
            content = _public_adapter(content)
        if isinstance(content, str):
            place.write_text(content, encoding="utf-8")
            continue
        try:
            link(content.resolve(), place)
        except OSError:  # another disk, or a system without links
            shutil.copyfile(content, place)


def _public_adapter(file: Path) -> str:
    """Return the configuration of an adapter, without the path of its base model."""
    settings = json.loads(file.read_text(encoding="utf-8"))
    if base := settings.get("base_model_name_or_path"):
        settings["base_model_name_or_path"] = public_part(base)
    return json.dumps(settings, indent=2, sort_keys=True) + "\n"


def public_part(name: str) -> str:
    """Return a name that others can use, or the last part of a path on this machine.

    A path can hold the names of people and machines.
    """
    is_local = (
        *(name.startswith((".", "/", "~")), Path(name).exists(), "\\" in name),
        hub_name(name) is None,
    )
    return re.split(r"[\\/]", name.rstrip("\\/"))[-1] if any(is_local) else name


def _explained(error: Exception) -> tuple[str, str]:
    """Return what the Hub or the network said, and what to do about it."""
    from huggingface_hub import errors

    outer = _first_line(f"{type(error).__name__}: {error}").rstrip(".")
    causes = list(_causes(error))
    for one in causes:
        if isinstance(one, errors.HfHubHTTPError):
            return _answered(one, outer)
        if isinstance(one, errors.HFValidationError):
            return _first_line(str(one)).rstrip("."), "Give it a name such as me/my-model"
        if isinstance(one, errors.OfflineModeIsEnabled):
            return "HF_HUB_OFFLINE is set", "Unset it, and try again"
        if isinstance(one, errors.HTTPError | ConnectionError):  # no answer came
            return f"no connection, or it was cut ({outer})", "Check the network, and try again"
    inner = _first_line(f"{type(causes[-1]).__name__}: {causes[-1]}").rstrip(".")
    return inner, "Log in with 'hf auth login', check the name and the network, and try again"


def _answered(error: Any, outer: str) -> tuple[str, str]:
    """Return what the Hub answered, and what to do about it."""
    status, reason = error.response.status_code, error.response.reason_phrase
    # A card that the Hub refuses is described by the error around the answer.
    said = error.server_message or (outer if status == 400 else "")
    got = f"{status} {reason}" + (f": {_first_line(said).rstrip('.')}" if said else "")
    other = "Correct what the answer names" if status < 500 else "Try again later"
    return got, ADVICE.get(status, other)


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and those that it comes from."""
    one: BaseException | None = error
    while one is not None:
        yield one
        one = one.__cause__


def _first_line(text: str) -> str:
    return " ".join(text.split())[:SHOWN_CHARACTERS]
