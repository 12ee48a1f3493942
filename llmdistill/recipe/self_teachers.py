"""Teachers of a recipe that are the student itself, or students of earlier runs."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from llmdistill.recipe.objective_base import ObjectiveSection
from llmdistill.recipe.objectives import CrossEntropyRecipe
from llmdistill.recipe.students import StudentRecipe
from llmdistill.recipe.tables import Table, defaults, needs, one_of
from llmdistill.recipe.teachers import LocalTeacherRecipe, Reads, TeacherSection, Weights

if TYPE_CHECKING:
    from llmdistill.recipe.schema import Recipe

_reflexive = defaults("teachers/reflexive.py", "ReflexiveTeacher")


class AdapterOffTeacherRecipe(TeacherSection):
    """The student's base model as the teacher, with the adapter of `student.peft` switched off.  It
    takes no memory for a second model.  It needs `student.peft` and no `student.carve`.
    """

    uses_student: ClassVar[bool] = True
    kind: Literal["adapter_off"] = "adapter_off"

    @property
    def provides(self) -> frozenset[str]:
        return needs("teachers/local.py", "LocalTeacher")

    @property
    def reads_changes(self) -> bool:
        return True

    @property
    def who(self) -> str:
        return "the student's base model, with its adapter switched off"

    def source(self, student: StudentRecipe) -> tuple[str, str | None]:
        return student.model, student.revision

    def misfit(self, recipe: Recipe) -> str | None:
        # A carved base is a smaller model than the one that the recipe names as its teacher.
        if recipe.student.peft is not None and recipe.student.carve is None:
            return None
        return (
            "a teacher of kind adapter_off is the base model under the student's adapter. Set "
            "'student.peft' and remove 'student.carve', or use a teacher of kind local."
        )


class ReflexiveTeacherRecipe(TeacherSection):
    """The student as its own teacher, with a context that only the teacher reads (OPSD, SDFT), or
    with a moving average of the student's weights.  It takes no memory for a second model, only a
    copy of the trained weights.
    """

    uses_student: ClassVar[bool] = True
    steps: ClassVar[bool] = False
    kind: Literal["reflexive"] = "reflexive"
    weights: one_of(Table("teachers/reflexive.py", "WEIGHTS")) = _reflexive.weights  # type: ignore[valid-type]
    """Weights of the teacher: `base` are those that the student starts with, `ema` is a moving
    average of them, and `live` are those that it has now.
    """
    ema_rate: float = Field(_reflexive.ema_rate, gt=0, le=1)
    """Share of the student's new weights in the moving average, after each step."""
    context: str | None = None
    """Text of the last message as the teacher reads it, such as `"{prompt}\\n\\nA solution:
    {solution}"`.  `{prompt}` is the message that the student reads, and other names in braces are
    columns of the rows.  `null` is the student's own prompt.
    """
    max_context_tokens: int = Field(2048, gt=0)
    """Longest prompt of the teacher, in tokens.  Rows with a longer one are dropped and counted."""
    export_ema: bool = False
    """Export the moving average as the student.  It needs `weights: ema`."""

    @property
    def provides(self) -> frozenset[str]:
        return needs("teachers/local.py", "LocalTeacher")

    @property
    def reads(self) -> Reads | None:
        if self.context is None:
            return None
        return Reads(
            columns=self._columns,
            context=self.context,
            max_context_tokens=self.max_context_tokens,
        )

    @property
    def reads_changes(self) -> bool:
        return self.context is None

    @property
    def copies(self) -> int:
        return 2 if self.weights == "ema" else 1

    @property
    def _columns(self) -> tuple[str, ...]:
        names = dict.fromkeys(re.findall(r"\{(\w+)\}", self.context or ""))
        return tuple(name for name in names if name != "prompt")

    @property
    def who(self) -> str:
        weights = {
            "base": "with the weights it started with",
            "ema": "as a moving average of its weights",
            "live": "with its current weights",
        }
        shown = f"the student itself, {weights.get(self.weights, '')}"
        return f"{shown}, which also reads {', '.join(self._columns)}" if self.context else shown

    def source(self, student: StudentRecipe) -> tuple[str, str | None]:
        return student.model, student.revision

    @model_validator(mode="after")
    def _its_keys_fit(self) -> ReflexiveTeacherRecipe:
        wrong = None
        if self.context is not None and ("{prompt}" not in self.context or not self._columns):
            wrong = (
                "'context' needs {prompt} and the name of at least one column in braces, as in "
                '"{prompt}\n\nA solution: {solution}"'
            )
        elif self.export_ema and self.weights != "ema":
            wrong = "'export_ema' needs 'weights: ema'"
        if wrong:
            raise PydanticCustomError("reflexive", "{wrong}", {"wrong": wrong})
        return self

    def misfit(self, recipe: Recipe) -> str | None:
        needs_it = [bool(one.teacher_needs) for one in recipe.objectives]
        if self.context is not None or not any(needs_it):
            return None
        if self.weights == "live":
            return (
                "the teacher is the student itself with the same weights and the same prompt, so "
                "there is nothing to learn from it. Set 'teacher.context', use 'teacher.weights: "
                "ema' or 'base', or use objectives that need no teacher."
            )
        if all(needs_it):
            return (
                "the teacher starts as the student with the same prompt, so the loss is 0 and "
                "stays 0. Set 'teacher.context', or add an objective that needs no teacher, such "
                "as 'kind: cross_entropy'."
            )
        return None


class ChainTeacherRecipe(TeacherSection):
    """A teacher with assistants of decreasing size (TAKD): it teaches the first assistant, each
    assistant teaches the next one, and the last one teaches `student`.  Each is a run, in the
    folders `<output>.assistant1` and so on, with the other keys of the recipe.  All are measured
    against `teacher`.
    """

    several_runs: ClassVar[bool] = True
    kind: Literal["chain"] = "chain"
    teacher: LocalTeacherRecipe
    """The first teacher, with the keys of kind `local`."""
    assistants: list[StudentRecipe]
    """The assistants, from the largest to the smallest, each with the keys of `student`.  The model
    of one can be the folder of the one before, such as `<output>.assistant1/student`.
    """

    @property
    def provides(self) -> frozenset[str]:
        return self.teacher.provides

    @property
    def models(self) -> tuple[Weights, ...]:
        return self.teacher.models

    @property
    def reads_changes(self) -> bool:
        return self.teacher.reads_changes

    @property
    def gives_gradients(self) -> bool:
        return self.teacher.gives_gradients

    @property
    def who(self) -> str:
        number = len(self.assistants)
        return f"through {number} assistant{'s' * (number != 1)} (TAKD)"

    def source(self, student: StudentRecipe) -> tuple[str, str | None]:
        return self.teacher.source(student)

    @model_validator(mode="after")
    def _whole_assistants(self) -> ChainTeacherRecipe:
        if any(one.peft and one.peft.save == "adapter" for one in self.assistants):
            raise PydanticCustomError(
                "chain",
                "an assistant teaches the next model, so it is saved as a whole. Use 'save: "
                "merged' in its 'peft'.",
            )
        return self

    def stages(self, recipe: Recipe) -> list[Recipe]:
        evaluate = recipe.evaluate
        if evaluate.against is None and (recipe.data.eval or recipe.data.hold_back):
            evaluate = evaluate.model_copy(update={"against": self.teacher})
        found, teacher = [], self.teacher
        for number, assistant in enumerate(self.assistants, start=1):
            output = f"{recipe.output.rstrip('/')}.assistant{number}"
            changes = {"output": output, "teacher": teacher, "student": assistant}
            changes |= {"evaluate": evaluate, "training": _not_pushed(recipe)}
            found.append(recipe.model_copy(update=changes))
            teacher = _student_of(output, self.teacher)
        return [*found, recipe.model_copy(update={"teacher": teacher, "evaluate": evaluate})]


class BornAgainTeacherRecipe(TeacherSection):
    """The student's earlier generation as its teacher (born-again networks).  Generation 0 learns
    from the labels alone.  Each later one starts from `student` again, and learns from the one
    before.  Each is a run, in the folders `<output>.generation0` and so on; the last one is in
    `output`.
    """

    several_runs: ClassVar[bool] = True
    kind: Literal["born_again"] = "born_again"
    generations: int = Field(1, gt=0)
    """Number of generations after generation 0."""

    @property
    def provides(self) -> frozenset[str]:
        return needs("teachers/local.py", "LocalTeacher")

    @property
    def reads_changes(self) -> bool:
        return True

    @property
    def gives_gradients(self) -> bool:
        return True

    @property
    def who(self) -> str:
        return f"generation {self.generations - 1} of the student (born-again networks)"

    def source(self, student: StudentRecipe) -> tuple[str, str | None]:
        return student.model, student.revision

    def misfit(self, recipe: Recipe) -> str | None:
        if not recipe.rollout.has_labels or not recipe.rollout.takes_data:
            return (
                "generation 0 learns from the labels of the dataset, but they are not trained on. "
                "Use 'rollout: {kind: fixed}'."
            )
        if recipe.student.peft and recipe.student.peft.save == "adapter":
            return (
                "a generation teaches the next one, so it is saved as a whole. Use 'save: merged' "
                "in 'student.peft'."
            )
        return None

    def stages(self, recipe: Recipe) -> list[Recipe]:
        found = []
        teacher: TeacherSection = ReflexiveTeacherRecipe(weights="live")
        objectives: list[ObjectiveSection] = [CrossEntropyRecipe()]
        for number in range(self.generations):
            output = f"{recipe.output.rstrip('/')}.generation{number}"
            changes = {"output": output, "teacher": teacher, "objectives": objectives}
            changes["training"] = _not_pushed(recipe)
            if number == 0 and recipe.evaluate.against is None:
                # Nothing has taught it, so there are no answers whose loss could be followed.
                changes["evaluate"] = recipe.evaluate.model_copy(
                    update={"every_steps": 0, "patience": None}
                )
            found.append(recipe.model_copy(update=changes))
            teacher, objectives = _student_of(output), list(recipe.objectives)
        return [*found, recipe.model_copy(update={"teacher": teacher})]


def _not_pushed(recipe: Recipe) -> dict[str, Any]:
    """Return the arguments of an earlier run: only the student of the last one is pushed."""
    return {
        key: value
        for key, value in recipe.training.items()
        if not key.startswith(("hub_", "push_to_hub"))
    }


def _student_of(output: str, like: LocalTeacherRecipe | None = None) -> LocalTeacherRecipe:
    """Return the section of a teacher that is the student of a run in the folder `output`."""
    place = (
        {} if like is None else like.model_dump(include={"dtype", "device", "attn_implementation"})
    )
    return LocalTeacherRecipe(model=f"{output}/student", **place)
