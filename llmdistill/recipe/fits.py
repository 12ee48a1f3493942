"""Whether the teacher of a recipe fits its objectives, its rollout and its data.

Each check returns what is wrong, and what to do, or None.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llmdistill.recipe.objective_base import ObjectiveSection
    from llmdistill.recipe.schema import Recipe


def unfit_teacher(recipe: Recipe) -> str | None:
    """Return the first reason why the rest of a recipe does not fit its teacher, or None."""
    checks = (_objectives, _writing, _rows, _shares, _reference, _tokenizer)
    found = (check(recipe) for check in checks)
    return next((wrong for wrong in found if wrong), None) or recipe.teacher.misfit(recipe)


def _objectives(recipe: Recipe) -> str | None:
    """Compare what the objectives need with what the teacher provides."""
    teacher = recipe.teacher
    for place, one in enumerate(recipe.objectives):
        if missing := one.teacher_needs - teacher.provides:
            return (
                f"objectives[{place}] of kind {one.kind} needs {', '.join(sorted(missing))} from "
                f"the teacher, but a teacher of kind {teacher.kind} provides "
                f"{', '.join(sorted(teacher.provides)) or 'nothing'}. Use another teacher, or "
                "remove the objective."
            )
        if one.changes_inputs and not teacher.reads_changes:
            return (
                f"objectives[{place}] of kind {one.kind} changes the embeddings that both models "
                f"read, which a teacher of kind {teacher.kind} cannot apply with these keys."
                f"{_clean(one)} Use another teacher, or remove the objective."
            )
        if one.needs_gradients and not teacher.gives_gradients:
            return (
                f"objectives[{place}] of kind {one.kind} needs gradients of the teacher, which one "
                "of kind local without 'quantization' and 'placement' has. Set 'teacher_sees: "
                "clean', or change the teacher."
            )
        if one.makes_the_student and recipe.student.peft is not None:
            return (
                f"objectives[{place}] of kind {one.kind} exports a part of the student, which does "
                "not work with an adapter. Remove 'export' or 'student.peft'."
            )
        uses = "distribution" in one.teacher_needs
        lacks = None
        if one.needs_final_states and not teacher.has_final_states:
            lacks = "needs the final states of one model"
        elif teacher.gives_several_targets and uses and not one.sums_targets:
            lacks = "needs one distribution without a factor for each token"
        if lacks:
            return (
                f"an objective of kind {one.kind} {lacks}, which the teacher of kind "
                f"{teacher.kind} does not give with these keys. Use 'kind: response', or change "
                "the teacher."
            )
    uses = any("distribution" in one.teacher_needs for one in recipe.objectives)
    if teacher.changes_distribution and not uses:
        return (
            f"a teacher of kind {teacher.kind} changes the distribution, but no objective uses it. "
            "Add one that does, such as 'response', or use a teacher of kind local."
        )
    return None


def _clean(section: ObjectiveSection) -> str:
    """Return the advice to let the teacher read unchanged inputs, if there is a key for it."""
    return " Set 'teacher_sees: clean'." if hasattr(section, "teacher_sees") else ""


def _writing(recipe: Recipe) -> str | None:
    """Compare what the rollout asks of the teacher with what it can write."""
    teacher, rollout = recipe.teacher, recipe.rollout
    if rollout.teacher_writes and not teacher.writes:
        return (
            f"a teacher of kind {teacher.kind} scores responses but cannot write them. Use "
            "'rollout: {kind: fixed}', or 'kind: sampled' with 'by: student'."
        )
    if rollout.steps_both_models and not teacher.steps:
        return (
            f"a teacher of kind {teacher.kind} cannot write token by token with the student, as an "
            "interleaved rollout does. Use 'kind: fixed' or 'kind: sampled'."
        )
    return None


def _rows(recipe: Recipe) -> str | None:
    """Find out whether the teacher can look up its rows."""
    if recipe.data.streaming and recipe.teacher.reads is not None:
        return (
            f"a teacher of kind {recipe.teacher.kind} looks up rows by their ids, which a stream "
            "does not keep. Set 'data.streaming: false'."
        )
    return None


def _shares(recipe: Recipe) -> str | None:
    """Find out whether all ranks run a sharded teacher equally often."""
    if all(one.placement != "sharded" for one in recipe.teacher.models):
        return None
    unequal = None
    if recipe.teacher.depends_on_rows:
        unequal = f"a teacher of kind {recipe.teacher.kind} depends on rows, and"
    elif recipe.data.streaming and recipe.rollout.teacher_writes:
        unequal = "the teacher writes the responses to a stream, and"
    if unequal is not None:
        return (
            f"{unequal} ranks with different rows would wait for each other with 'placement: "
            "sharded'. Use another placement."
        )
    return None


def _reference(recipe: Recipe) -> str | None:
    """Find out whether there is something that a student can be measured against."""
    measured = recipe.data.eval or recipe.data.hold_back
    if measured and not recipe.teacher.is_reference and recipe.evaluate.against is None:
        return (
            f"a teacher of kind {recipe.teacher.kind} changes during the run, so held-out figures "
            "need a model that stays as it is. Set 'evaluate.against' to one, or remove the "
            "held-out rows."
        )
    return None


def _tokenizer(recipe: Recipe) -> str | None:
    """Find out whether there is a teacher whose tokenizer the student can take."""
    student = recipe.student
    itself = (student.model, student.revision)
    if student.tokenizer == "teacher" and recipe.teacher.paired(student)[0] == itself:
        return (
            f"a teacher of kind {recipe.teacher.kind} is the student itself, so it has no other "
            "tokenizer. Remove 'student.tokenizer'."
        )
    return None
