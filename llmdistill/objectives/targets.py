"""What the student's distribution is compared with.

n = positions of one block, V = vocabulary.  A target builder turns the logits of both sides into
the target's logits; what it takes from the student carries no gradient.  To add one: a function
here and its name in TARGETS.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

TargetBuilder = Callable[[Tensor, Tensor], Tensor]


def teacher(student_nV: Tensor, teacher_nV: Tensor) -> Tensor:
    """The teacher's own distribution: (n, V) logits."""
    return teacher_nV


TARGETS: dict[str, TargetBuilder] = {"teacher": teacher}
