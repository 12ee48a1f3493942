"""What a run is: one YAML file that answers three questions, and what else a run needs.

A recipe is strict (unknown keys and wrong types are errors, with a suggestion), frozen and typed.
Reading one imports neither torch nor transformers, so a typo is found in well under a second.
Overrides are dotted paths: `objectives.0.beta=0.5`.
"""

from __future__ import annotations

import ast
import difflib
import functools
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import PydanticCustomError

from llmdistill.errors import RecipeError

Dtype = Literal["auto", "float32", "bfloat16", "float16"]


class Strict(BaseModel):
    """Base of all recipe classes: no unknown keys, no silent conversion, no change after reading."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _known_keys_only(cls, data: Any) -> Any:
        if isinstance(data, Mapping):
            for key in data:
                if key not in cls.model_fields:
                    raise PydanticCustomError(
                        "unknown_key", "", {"key": key, "known": list(cls.model_fields)}
                    )
        return data


class SamplingRecipe(Strict):
    """How tokens are drawn."""

    temperature: float = Field(1.0, ge=0)
    """0 is greedy."""
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0)
    """0 keeps every token."""


class LocalTeacherRecipe(Strict):
    """Who judges: a model on this machine."""

    kind: Literal["local"] = "local"
    model: str
    """A Hub id, a folder, a .gguf file, or `smollm2-135m-instruct` (embedded)."""
    revision: str | None = None
    dtype: Dtype = "auto"
    """auto: bfloat16 where the device multiplies it natively, else float32."""
    device: str | None = None


class CarveRecipe(Strict):
    """How a student is cut out of its model."""

    layers: int | list[int]
    """How many to keep, or which ones."""
    by: Literal["influence", "even"] = "influence"
    """influence: those that change the hidden states most; even: evenly spaced."""


class StudentRecipe(Strict):
    model: str
    revision: str | None = None
    dtype: Dtype = "float32"
    """Master weights; `training.bf16` sets the dtype of products."""
    carve: CarveRecipe | None = None


class DataRecipe(Strict):
    train: str
    """A .jsonl file, a data set of the Hub (org/name or org/name:split), or `seed_tasks`."""
    eval: str | None = None
    """The same, for rows that are only measured on."""
    hold_back: int = Field(0, ge=0)
    """Instead of `eval`: this many evenly spaced rows of `train` are only measured on."""
    format: Literal["auto", "messages", "prompt_completion", "alpaca"] = "auto"
    max_prompt_tokens: int = Field(512, gt=0)
    """Longer prompts are dropped, and counted."""
    max_response_tokens: int = Field(1024, gt=0)
    """Longer responses of the data set are cut, and counted."""
    on_bad_row: Literal["stop", "skip"] = "stop"

    @model_validator(mode="after")
    def _one_source_of_eval_rows(self) -> DataRecipe:
        if self.eval is not None and self.hold_back:
            raise PydanticCustomError("both", "give 'eval' or 'hold_back', not both")
        return self


class FixedRecipe(Strict):
    """Who writes: the data set."""

    kind: Literal["fixed"] = "fixed"


class SampledRecipe(Strict):
    """Who writes: one model."""

    kind: Literal["sampled"] = "sampled"
    by: Literal["student", "teacher"] = "student"
    sampling: SamplingRecipe = SamplingRecipe()
    max_new_tokens: int = Field(256, gt=0)
    samples: int = Field(1, gt=0)
    """Answers of the teacher to each prompt, written once; epoch e trains on answer e mod samples."""

    @model_validator(mode="after")
    def _student_writes_anew(self) -> SampledRecipe:
        if self.by == "student" and self.samples != 1:
            raise PydanticCustomError("samples", "'samples' is for by: teacher; a student writes anew")
        return self


Part = Annotated[FixedRecipe | SampledRecipe, Field(discriminator="kind")]


class MixedRecipe(Strict):
    """Who writes: the student a share of the steps, another rollout the rest."""

    kind: Literal["mixed"] = "mixed"
    share: float = Field(0.5, ge=0, le=1)
    """Probability that a step is written by `student`."""
    student: SampledRecipe = SampledRecipe()
    other: Part = FixedRecipe()


RolloutRecipe = Annotated[FixedRecipe | SampledRecipe | MixedRecipe, Field(discriminator="kind")]


class ResponseRecipe(Strict):
    """What is matched: next-token distributions."""

    kind: Literal["response"] = "response"
    divergence: str = "forward_kl"
    beta: float | None = Field(None, ge=0, le=1)
    """For jsd: 0 is forward KL, 1 reverse KL."""
    temperature: float = Field(1.0, gt=0)
    """Of the divergence; a sampler has its own."""
    target: Literal["teacher"] = "teacher"
    token_weight: Literal["uniform", "sequence_mean"] = "uniform"
    weight: float = 1.0

    @field_validator("divergence")
    @classmethod
    def _known_divergence(cls, name: str) -> str:
        if name not in divergence_options():
            close = _suggestion(name, divergence_options())
            raise PydanticCustomError(
                "divergence", "should be one of {names}{close}", {"names": _list(divergence_options()), "close": close}
            )
        return name

    @model_validator(mode="after")
    def _own_options_only(self) -> ResponseRecipe:
        for option in self.options():
            if option not in divergence_options()[self.divergence]:
                raise PydanticCustomError(
                    "option",
                    "divergence '{name}' has no option '{option}'",
                    {"name": self.divergence, "option": option},
                )
        return self

    def options(self) -> dict[str, float]:
        """The divergence's own options that were given."""
        given = {"temperature": self.temperature, "beta": self.beta}
        return {name: value for name, value in given.items() if value is not None}


class CrossEntropyRecipe(Strict):
    """What is matched: the tokens themselves, where the student did not write them."""

    kind: Literal["cross_entropy"] = "cross_entropy"
    weight: float = 1.0


ObjectiveRecipe = Annotated[ResponseRecipe | CrossEntropyRecipe, Field(discriminator="kind")]


class EvaluateRecipe(Strict):
    """How the student is measured before and after."""

    max_new_tokens: int = Field(96, gt=0)
    every_steps: int = Field(0, ge=0)
    """Also the held-out loss every so many steps; 0 is never."""


class Recipe(Strict):
    """A run of `llmdistill train`."""

    seed: int = Field(0, ge=0)
    output: str
    """The run folder."""
    teacher: LocalTeacherRecipe
    student: StudentRecipe
    data: DataRecipe
    rollout: RolloutRecipe = FixedRecipe()
    objectives: list[ObjectiveRecipe] = Field(default_factory=lambda: [ResponseRecipe()], min_length=1)
    training: dict[str, Any] = {}
    """transformers.TrainingArguments."""
    evaluate: EvaluateRecipe = EvaluateRecipe()

    @field_validator("training")
    @classmethod
    def _training_arguments(cls, given: dict[str, Any]) -> dict[str, Any]:
        for key, value in given.items():
            _check_training_argument(key, value)
        return given


# ---- reading ----


def load(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in a YAML file, with overrides `dotted.path=value`.  RecipeError says what is wrong."""
    path = Path(path)
    if not path.is_file():
        raise RecipeError(f"no such recipe: {path}")
    data = parse_yaml(path.read_text(encoding="utf-8"), str(path))
    if not isinstance(data, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of keys to values, got {type(data).__name__}")
    for override in overrides:
        _override(data, override)
    return build(data, str(path))


def build(data: dict[str, Any], place: str = "recipe") -> Recipe:
    """A recipe from plain data; RecipeError with the dotted path of each mistake."""
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        lines = [_describe(dict(item), data) for item in error.errors()]
        raise RecipeError(f"{place}: " + "\n".join(dict.fromkeys(lines))) from None


def dump(recipe: Recipe) -> str:
    """The resolved recipe as YAML, defaults written out; reading it gives the same recipe."""
    return yaml.safe_dump(recipe.model_dump(mode="json", exclude_none=True), sort_keys=False)


class _Loader(yaml.SafeLoader):
    """YAML with the floats that people write (1e-4), and without silent duplicate keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                line = node.start_mark.line + 1
                raise yaml.constructor.ConstructorError(None, None, f"key '{key}' stands twice (line {line})")
        return super().construct_mapping(node, deep)


_FLOAT = r"^[-+]?(?:[0-9][0-9_]*\.?[0-9_]*[eE][-+]?[0-9]+|\.[0-9]+(?:[eE][-+]?[0-9]+)?)$"
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", __import__("re").compile(_FLOAT), list("-+.0123456789"))


def parse_yaml(text: str, place: str) -> Any:
    loader = _Loader(text)
    try:
        return loader.get_single_data()
    except yaml.YAMLError as error:
        raise RecipeError(f"{place}: not YAML: {error}") from None
    finally:
        loader.dispose()


def _override(data: dict[str, Any], override: str) -> None:
    """Puts one `dotted.path=value` into the data, making mappings on the way; lists must be there."""
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise RecipeError(f"override '{override}' is not of the form dotted.path=value")
    value = parse_yaml(text, f"override '{override}'")
    *parents, last = path.split(".")
    target: Any = data
    for key in parents:
        if isinstance(target, list):
            target = target[_index(target, key, override)]
        elif isinstance(target, dict):
            target = target.setdefault(key, {})
    if isinstance(target, list):
        target[_index(target, last, override)] = value
    elif isinstance(target, dict):
        target[last] = value
    else:
        raise RecipeError(f"override '{override}': '{'.'.join(parents)}' is {target!r}, not a mapping or list")


def _index(items: list[Any], key: str, override: str) -> int:
    if not key.isdigit() or int(key) >= len(items):
        raise RecipeError(f"override '{override}': '{key}' is no place in a list of {len(items)}")
    return int(key)


# ---- saying what is wrong ----


def _describe(error: dict[str, Any], data: Any) -> str:
    """One validation error as: path, what is expected, what was given, what to do."""
    path = _dotted(error["loc"], data)
    kind, context = error["type"], error.get("ctx", {})
    if kind == "unknown_key":
        full = f"{path}.{context['key']}" if path else context["key"]
        return f"unknown key '{full}'.{_hint(context['key'], context['known'])}"
    if kind == "missing":
        return f"'{path}' is missing"
    if kind.startswith("union_tag"):
        given = error["input"].get("kind") if isinstance(error["input"], dict) else error["input"]
        return f"'{path}.kind' should be one of {context.get('expected_tags', 'the known kinds')}, got {given!r}"
    message = error["msg"][0].lower() + error["msg"][1:]
    if isinstance(error["input"], dict | BaseModel):
        return f"'{path}': {message}"
    return f"'{path}': {message}, got {error['input']!r} ({type(error['input']).__name__})"


def _dotted(location: Sequence[str | int], data: Any) -> str:
    """'objectives[0].beta'; the tags that pydantic puts in for the kind of a union are left out."""
    path, here = "", data
    for step in location:
        if isinstance(here, dict) and step not in here and step == here.get("kind", step) and _is_kind(step):
            continue
        path += f"[{step}]" if isinstance(step, int) else f"{'.' if path else ''}{step}"
        try:
            here = here[step]
        except (KeyError, IndexError, TypeError):
            here = None
    return path


def _is_kind(step: str | int) -> bool:
    kinds = {"fixed", "sampled", "mixed", "response", "cross_entropy", "local"}
    return step in kinds


def _hint(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" Did you mean '{close[0]}'?" if close else f" Known here: {_list(known)}."


def _suggestion(name: str, known: Sequence[str] | Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" (did you mean '{close[0]}'?)" if close else ""


def _list(names: Any) -> str:
    return ", ".join(names)


# ---- facts read from source, so that nothing heavy is imported ----

RENAMED = {
    "warmup_ratio": "warmup_steps takes a share below 1 now",
    "evaluation_strategy": "use evaluate.every_steps",
    "save_safetensors": "weights are always saved as safetensors",
    "gradient_checkpointing": "it is called activation_checkpointing now",
    "gradient_checkpointing_kwargs": "it is called activation_checkpointing_kwargs now",
    "no_cuda": "it is called use_cpu now",
    "max_length": "use data.max_prompt_tokens and data.max_response_tokens",
}
OWNED = {
    "output_dir": "output",
    "seed": "seed",
    "data_seed": "seed",
    "remove_unused_columns": "nothing: it is always off",
    "eval_strategy": "evaluate.every_steps",
    "eval_steps": "evaluate.every_steps",
    "resume_from_checkpoint": "the option --resume",
    "hub_token": "`hf auth login` or HF_TOKEN: keys do not belong into a recipe",
}


def _check_training_argument(key: str, value: Any) -> None:
    fields = training_fields()
    if key in OWNED:
        raise PydanticCustomError("owned", f"'{key}' is set by llmdistill; use {OWNED[key]}")
    if key in RENAMED:
        raise PydanticCustomError("renamed", f"'{key}': {RENAMED[key]}")
    if key not in fields:
        raise PydanticCustomError("unknown_key", "", {"key": key, "known": list(fields)})
    expected = fields[key]
    if expected and not isinstance(value, expected) or (isinstance(value, bool) and bool not in expected and expected):
        names = " or ".join(t.__name__ for t in expected if t is not type(None))
        raise PydanticCustomError("type", f"'{key}' should be {names}, got {value!r} ({type(value).__name__})")


@functools.cache
def training_fields() -> dict[str, tuple[type, ...]]:
    """The fields of transformers.TrainingArguments and their plain types, read from its source."""
    spec = importlib.util.find_spec("transformers")
    assert spec is not None and spec.origin is not None
    source = (Path(spec.origin).parent / "training_args.py").read_text(encoding="utf-8")
    body = next(
        node.body
        for node in ast.parse(source).body
        if isinstance(node, ast.ClassDef) and node.name == "TrainingArguments"
    )
    return {
        node.target.id: _plain_types(ast.unparse(node.annotation))
        for node in body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id[0] != "_"
    }


def _plain_types(annotation: str) -> tuple[type, ...]:
    """(float, int) for 'float'; () where the annotation names more than plain types."""
    plain: dict[str, tuple[type, ...]] = {
        "bool": (bool,),
        "int": (int,),
        "float": (float, int),
        "str": (str,),
        "None": (type(None),),
    }
    parts = [part.strip() for part in annotation.split("|")]
    if not all(part in plain for part in parts):
        return ()
    return tuple(kind for part in parts for kind in plain[part])


@functools.cache
def divergence_options() -> dict[str, list[str]]:
    """The names in objectives/divergences.py's DIVERGENCES and each one's options, read from its source."""
    path = Path(__file__).parent / "objectives" / "divergences.py"
    tree = ast.parse(path.read_text(encoding="utf-8"))
    options = {
        node.name: [argument.arg for argument in node.args.kwonlyargs]
        for node in tree.body
        if isinstance(node, ast.FunctionDef)
    }
    table = next(
        node.value
        for node in tree.body
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "DIVERGENCES"
    )
    assert isinstance(table, ast.Dict)
    return {ast.literal_eval(k): options[ast.unparse(v)] for k, v in zip(table.keys, table.values, strict=True) if k}
