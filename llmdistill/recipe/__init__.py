"""What a run is: one YAML file that answers three questions, and what else a run needs.

Reading one imports neither torch nor transformers, so a typo is found in well under a second.  A
section answers for itself: code outside this package asks it, and does not look at its class.  The
kinds of a section are in the module of its question: `teachers`, `rollouts`, `objectives`,
`generators`, `filters`.
"""

from llmdistill.recipe.base import Strict
from llmdistill.recipe.generation import GenerationRecipe
from llmdistill.recipe.objectives import ObjectiveRecipe
from llmdistill.recipe.reading import (
    build,
    build_part,
    command_of,
    dump,
    load,
    load_generation,
    parse_yaml,
)
from llmdistill.recipe.rollouts import RolloutRecipe
from llmdistill.recipe.schema import (
    CarveRecipe,
    DataRecipe,
    EvaluateRecipe,
    PeftRecipe,
    Recipe,
    StudentRecipe,
)
from llmdistill.recipe.sources import SourceRecipe
from llmdistill.recipe.teachers import TeacherRecipe

__all__ = [
    "CarveRecipe",
    "DataRecipe",
    "EvaluateRecipe",
    "GenerationRecipe",
    "ObjectiveRecipe",
    "PeftRecipe",
    "Recipe",
    "RolloutRecipe",
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
