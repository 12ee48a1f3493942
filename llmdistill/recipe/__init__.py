"""What a run is: one YAML file that answers three questions, and what else a run needs.

Reading one imports neither torch nor transformers, so a typo is found in well under a second.  A
section answers for itself: code outside this package asks it, and does not look at its class.
"""

from llmdistill.recipe.base import Strict
from llmdistill.recipe.generation import GenerationRecipe
from llmdistill.recipe.generators import LionRecipe
from llmdistill.recipe.objectives import (
    CrossEntropyRecipe,
    HiddenRecipe,
    ObjectiveRecipe,
    ResponseRecipe,
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
from llmdistill.recipe.rollouts import (
    FixedRecipe,
    InterleavedRecipe,
    MixedRecipe,
    ReplayRecipe,
    RolloutRecipe,
    RolloutSection,
    SampledRecipe,
)
from llmdistill.recipe.sampling import SamplingRecipe
from llmdistill.recipe.schedules import ScheduleSection
from llmdistill.recipe.schema import (
    CarveRecipe,
    DataRecipe,
    EvaluateRecipe,
    PeftRecipe,
    Recipe,
    StudentRecipe,
)
from llmdistill.recipe.sources import SourceRecipe
from llmdistill.recipe.teachers import AdapterOffTeacherRecipe, LocalTeacherRecipe, TeacherRecipe

__all__ = [
    "AdapterOffTeacherRecipe",
    "CarveRecipe",
    "CrossEntropyRecipe",
    "DataRecipe",
    "EvaluateRecipe",
    "FixedRecipe",
    "GenerationRecipe",
    "HiddenRecipe",
    "InterleavedRecipe",
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
    "RolloutSection",
    "SampledRecipe",
    "SamplingRecipe",
    "ScheduleSection",
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
