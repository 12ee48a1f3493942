"""What a run is: one YAML file that answers three questions, and what else a run needs.

Reading one imports neither torch nor transformers, so a typo is found in well under a second.
"""

from llmdistill.recipe.reading import build, dump, load, parse_yaml
from llmdistill.recipe.schema import (
    AdaptiveShareRecipe,
    CarveRecipe,
    ConstantShareRecipe,
    CrossEntropyRecipe,
    DataRecipe,
    EvaluateRecipe,
    FixedRecipe,
    LinearShareRecipe,
    LocalTeacherRecipe,
    MixedRecipe,
    ObjectiveRecipe,
    PeftRecipe,
    Recipe,
    ReplayRecipe,
    ResponseRecipe,
    RolloutRecipe,
    SampledRecipe,
    SamplingRecipe,
    Schedule,
    SourceRecipe,
    Strict,
    StudentRecipe,
)

__all__ = [
    "AdaptiveShareRecipe",
    "CarveRecipe",
    "ConstantShareRecipe",
    "CrossEntropyRecipe",
    "DataRecipe",
    "EvaluateRecipe",
    "FixedRecipe",
    "LinearShareRecipe",
    "LocalTeacherRecipe",
    "MixedRecipe",
    "ObjectiveRecipe",
    "PeftRecipe",
    "Recipe",
    "ReplayRecipe",
    "ResponseRecipe",
    "RolloutRecipe",
    "SampledRecipe",
    "SamplingRecipe",
    "Schedule",
    "SourceRecipe",
    "Strict",
    "StudentRecipe",
    "build",
    "dump",
    "load",
    "parse_yaml",
]
