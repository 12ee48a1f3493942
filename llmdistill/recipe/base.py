"""What all recipe classes have in common."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, model_validator
from pydantic_core import PydanticCustomError

from llmdistill.recipe.tables import Table, one_of

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Quantization = one_of(Table("models/quantization.py", "QUANTIZATIONS"))


class Strict(BaseModel):
    """Base of all recipe classes: no unknown keys, no silent conversion, no change after
    reading.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    RENAMED: ClassVar[Mapping[str, str]] = {}
    """Keys that had another name before: the old name, and the key of today."""
    CHOICES: ClassVar[Mapping[str, Table]] = {}
    """Fields that name an entry of a table, and the tables."""

    @classmethod
    def known_keys(cls) -> list[str]:
        """What may be said here."""
        return list(cls.model_fields)

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
