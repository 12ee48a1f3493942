"""Targets: the distributions that the student is compared with.

n = positions of one block, V = vocabulary.  A target builder turns the logits of both models into
the logits of the target.  The student's logits are detached before the call, so no gradient flows
through a target.  To add one, write a function here and put its name into TARGETS.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

TargetBuilder = Callable[[Tensor, Tensor], Tensor]  # (student_nV, teacher_nV) -> (n, V) logits


def teacher(student_nV: Tensor, teacher_nV: Tensor) -> Tensor:
    """Compare the student with the teacher's distribution itself.

    The target's logits are the teacher's logits, unchanged: (n, V).  There are no options.
    """
    return teacher_nV


# Recipes read the names with `ast`, so the table must stay a dict literal.
TARGETS: dict[str, TargetBuilder] = {"teacher": teacher}
