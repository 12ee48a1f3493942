"""Layer maps: which layer of the student is compared with which layer of the teacher.

M = decoder layers of the student, N = decoder layers of the teacher.  A layer map takes the text
configurations of both models and returns pairs (student's layer, teacher's layer), counted from 1.
To add one, write a function here and put its name into LAYER_MAPS.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from llmdistill.errors import ModelError
from llmdistill.models.carve import DEPTH, KEPT_LAYERS
from llmdistill.objectives.choices import choose

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

Pairs = Sequence[Sequence[int]]
LayerMap = Callable[["PreTrainedConfig", "PreTrainedConfig"], Pairs]
Layers = str | Pairs | LayerMap

LAST_LAYERS = ((-1, -1),)  # the last layer of each model


def last(student: PreTrainedConfig, teacher: PreTrainedConfig) -> Pairs:
    """Compare all layers of the student with the same number of last layers of the teacher.

    Student's layer m and teacher's layer N - M + m.  Sun et al. 2019 (PKD), PKD-Last.  There are no
    options.
    """
    ours, theirs = student.num_hidden_layers, teacher.num_hidden_layers
    if ours > theirs:
        raise _does_not_fit("last", "at least as many layers as the student", ours, theirs)
    return [(layer, theirs - ours + layer) for layer in range(1, ours + 1)]


def skip(student: PreTrainedConfig, teacher: PreTrainedConfig) -> Pairs:
    """Compare all layers of the student with every k-th layer of the teacher.

    Student's layer m and teacher's layer m N / M; N must be a multiple of M.  Sun et al. 2019
    (PKD), PKD-Skip.  There are no options.
    """
    ours, theirs = student.num_hidden_layers, teacher.num_hidden_layers
    if theirs % ours:
        raise _does_not_fit("skip", "a multiple of the student's layers", ours, theirs)
    return [(layer, layer * theirs // ours) for layer in range(1, ours + 1)]


def uniform(student: PreTrainedConfig, teacher: PreTrainedConfig) -> Pairs:
    """Compare all layers of the student with layers at the same relative depth of the teacher.

    Student's layer m and teacher's layer m N / M, rounded, for any two depths.  Jiao et al. 2020
    (TinyBERT), the uniform mapping without the embeddings.  There are no options.
    """
    ours, theirs = student.num_hidden_layers, teacher.num_hidden_layers
    # Python's `round` would take the even neighbour of a half.
    return [(m, max(1, (2 * m * theirs + ours) // (2 * ours))) for m in range(1, ours + 1)]


def carved(student: PreTrainedConfig, teacher: PreTrainedConfig) -> Pairs:
    """Compare each layer of a carved student with the layer that it was cut from.

    The student must have been carved by `carve`, out of a model with as many layers as the teacher
    has.  There are no options.
    """
    kept = getattr(student, KEPT_LAYERS, None)
    if kept is None:
        raise ModelError(
            "layers: 'carved' needs a student that was carved, and the configuration of this one "
            f"has no '{KEPT_LAYERS}'. Set student.carve, or use 'uniform'."
        )
    if (depth := getattr(student, DEPTH)) != teacher.num_hidden_layers:
        raise ModelError(
            f"layers: 'carved': the student was carved from a model of {depth} layers, but the "
            f"teacher has {teacher.num_hidden_layers}. Use the teacher that the student was carved "
            "from, or 'uniform'."
        )
    return list(enumerate(kept, start=1))


# Recipes read the names with `ast`, so the table must stay a dict literal.
LAYER_MAPS: dict[str, LayerMap] = {
    "last": last,
    "skip": skip,
    "uniform": uniform,
    "carved": carved,
}


def layer_pairs(layers: Layers, student: PreTrainedConfig, teacher: PreTrainedConfig) -> Pairs:
    """Return the pairs of a layer map, or the pairs themselves.

    Raises ModelError if the map does not fit the models, and RecipeError for an unknown name.
    Whether a given layer exists is checked where it is tapped.
    """
    if isinstance(layers, str) or callable(layers):
        return choose("layers", layers, LAYER_MAPS)(student, teacher)
    return layers


def spread(num_layers: int, number: int) -> list[int]:
    """Return the numbers of up to `number` evenly spaced layers; the last layer is among them."""
    number = min(number, num_layers)
    return [(i * num_layers) // number for i in range(1, number + 1)]


def _does_not_fit(name: str, wanted: str, ours: int, theirs: int) -> ModelError:
    return ModelError(
        f"layers: '{name}' needs a teacher with {wanted}, but the student has {ours} layers and "
        f"the teacher {theirs}. Use 'uniform', or list pairs of layers."
    )
