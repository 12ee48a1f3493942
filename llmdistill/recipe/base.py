"""What all recipe classes share: strict parsing, and fields that name entries of tables."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from llmdistill.recipe.facts import close_to
from llmdistill.recipe.tables import Table, one_of

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Quantization = one_of(Table("models/quantization.py", "QUANTIZATIONS"))
Placement = one_of(Table("models/placement.py", "PLACEMENTS"))
_IMPLEMENTATIONS = Table("models/kernels.py", "IMPLEMENTATIONS")


def _attention(name: str) -> str:
    known = _IMPLEMENTATIONS.entries
    if name not in known and "/" not in name:
        raise PydanticCustomError(
            "attention",
            "should be one of {names}, or a kernel of the Hub (owner/name).{close}",
            {"names": ", ".join(known), "close": close_to(name, known)},
        )
    return name


def _seed(seed: int) -> int:
    # The generators of numpy take no larger one, and Trainer seeds them.
    if seed >= 2**32:
        raise PydanticCustomError("seed", "should be less than 4294967296 (2 to the power of 32)")
    return seed


def _template_options(options: dict[str, Any]) -> dict[str, Any]:
    # Arguments of `apply_chat_template` itself, which llmdistill sets.
    taken = {"tokenize", "add_generation_prompt", "continue_final_message", "return_dict"}
    taken |= {"messages", "conversation", "chat_template", "documents", "return_tensors"}
    if wrong := sorted(taken & set(options)):
        raise PydanticCustomError(
            "template",
            "'{key}' is no option of a chat template, but of the function that renders it. Remove "
            "it.",
            {"key": wrong[0]},
        )
    return options


TemplateOptions = Annotated[dict[str, Any], AfterValidator(_template_options)]
Seed = Annotated[int, Field(ge=0), AfterValidator(_seed)]
AttnImplementation = Annotated[str, AfterValidator(_attention)]
# The shell does not expand `~` within a recipe, or after `output=`.
Folder = Annotated[str, AfterValidator(lambda path: str(Path(os.path.expanduser(path))))]


class Strict(BaseModel):
    """Base of all recipe classes: it refuses unknown keys, converts nothing silently and cannot be
    changed after reading.
    """

    # strict: "3" is a mistake and not 3.  frozen: default sections are shared between recipes.
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    RENAMED: ClassVar[Mapping[str, str]] = {}
    """Keys that were renamed: the old name, and the key that replaces it."""
    CHOICES: ClassVar[Mapping[str, Table]] = {}
    """The table of each field that names an entry of one."""

    @classmethod
    def known_keys(cls) -> list[str]:
        """Return the keys that a user can set in this section."""
        return list(cls.model_fields)

    # pydantic's `extra="forbid"` would report each unknown key, but without the known keys that the
    # suggestion needs.  This runs first and raises an error that carries them.
    @model_validator(mode="before")
    @classmethod
    def _known_keys_only(cls, data: Any) -> Any:
        if isinstance(data, Mapping):
            known = cls.known_keys()
            for key in data:
                if key not in known:
                    raise PydanticCustomError(
                        "unknown_key",
                        "",
                        {
                            "key": str(key),
                            "known": known,
                            "renamed": cls.RENAMED.get(str(key), ""),
                        },
                    )
        return data
