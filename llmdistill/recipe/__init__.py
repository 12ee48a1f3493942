"""Recipes: one YAML file describes a run, and this package reads and checks it.

Reading a recipe imports neither torch nor transformers, so a typo is reported in well under a
second.  Code outside this package asks a section for its properties and never checks its class.
The kinds of each section have a module: `teachers`, `rollouts`, `objectives`, `generators`,
`filters`.
"""

from llmdistill.recipe.base import Strict
from llmdistill.recipe.changes import require_same, same_results
from llmdistill.recipe.generation import GenerationRecipe
from llmdistill.recipe.objectives import ObjectiveRecipe
from llmdistill.recipe.reading import (
    as_data,
    build,
    build_part,
    command_of,
    dump,
    dump_data,
    load_generation,
    parse_yaml,
)
from llmdistill.recipe.reading import load_recipe as load
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
from llmdistill.recipe.teacher_groups import TeacherRecipe
from llmdistill.recipe.teachers import Reads

__all__ = [
    "CarveRecipe",
    "DataRecipe",
    "EvaluateRecipe",
    "GenerationRecipe",
    "ObjectiveRecipe",
    "PeftRecipe",
    "Reads",
    "Recipe",
    "RolloutRecipe",
    "SourceRecipe",
    "Strict",
    "StudentRecipe",
    "TeacherRecipe",
    "as_data",
    "build",
    "build_part",
    "command_of",
    "dump",
    "dump_data",
    "load",
    "load_generation",
    "parse_yaml",
    "require_same",
    "same_results",
]
