"""What a run is: one YAML file that answers three questions, and what else a run needs.

Reading one imports neither torch nor transformers, so a typo is found in well under a second.
"""

from llmdistill.recipe.reading import build, dump, load, parse_yaml
from llmdistill.recipe.schema import (
    CarveRecipe,
    CrossEntropyRecipe,
    DataRecipe,
    EvaluateRecipe,
    FixedRecipe,
    LocalTeacherRecipe,
    MixedRecipe,
    ObjectiveRecipe,
    PeftRecipe,
    Recipe,
    ResponseRecipe,
    RolloutRecipe,
    SampledRecipe,
    SamplingRecipe,
    SourceRecipe,
    Strict,
    StudentRecipe,
)

__all__ = [
    "CarveRecipe",
    "CrossEntropyRecipe",
    "DataRecipe",
    "EvaluateRecipe",
    "FixedRecipe",
    "LocalTeacherRecipe",
    "MixedRecipe",
    "ObjectiveRecipe",
    "PeftRecipe",
    "Recipe",
    "ResponseRecipe",
    "RolloutRecipe",
    "SampledRecipe",
    "SamplingRecipe",
    "SourceRecipe",
    "Strict",
    "StudentRecipe",
    "build",
    "dump",
    "load",
    "parse_yaml",
]
