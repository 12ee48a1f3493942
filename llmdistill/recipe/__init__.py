"""What a run is: one YAML file that answers three questions, and what else a run needs.

Reading one imports neither torch nor transformers, so a typo is found in well under a second.
"""

from llmdistill.recipe.base import Strict
from llmdistill.recipe.generation import GenerationRecipe
from llmdistill.recipe.generators import LionRecipe
from llmdistill.recipe.questions import (
    ACCEPT_OPTIONS,
    AdapterOffTeacherRecipe,
    AdaptiveShareRecipe,
    ConstantShareRecipe,
    CrossEntropyRecipe,
    FixedRecipe,
    InterleavedRecipe,
    LinearShareRecipe,
    LocalTeacherRecipe,
    MixedRecipe,
    ObjectiveRecipe,
    ReplayRecipe,
    ResponseRecipe,
    RolloutRecipe,
    SampledRecipe,
    SamplingRecipe,
    Schedule,
    TeacherRecipe,
)
from llmdistill.recipe.reading import (
    build,
    build_part,
    command_of,
    dump,
    load,
    load_generation,
    parse_yaml,
)
from llmdistill.recipe.remote import RemoteTeacherRecipe
from llmdistill.recipe.schema import (
    CarveRecipe,
    DataRecipe,
    EvaluateRecipe,
    PeftRecipe,
    Recipe,
    StudentRecipe,
)
from llmdistill.recipe.sources import SourceRecipe

__all__ = [
    "ACCEPT_OPTIONS",
    "AdapterOffTeacherRecipe",
    "AdaptiveShareRecipe",
    "CarveRecipe",
    "ConstantShareRecipe",
    "CrossEntropyRecipe",
    "DataRecipe",
    "EvaluateRecipe",
    "FixedRecipe",
    "GenerationRecipe",
    "InterleavedRecipe",
    "LinearShareRecipe",
    "LionRecipe",
    "LocalTeacherRecipe",
    "MixedRecipe",
    "ObjectiveRecipe",
    "PeftRecipe",
    "Recipe",
    "RemoteTeacherRecipe",
    "ReplayRecipe",
    "ResponseRecipe",
    "RolloutRecipe",
    "SampledRecipe",
    "SamplingRecipe",
    "Schedule",
    "SourceRecipe",
    "Strict",
    "StudentRecipe",
    "TeacherRecipe",
    "build",
    "build_part",
    "command_of",
    "dump",
    "load",
    "load_generation",
    "parse_yaml",
]
