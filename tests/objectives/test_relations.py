"""RKD, SP, PKT and information flow: values by hand, invariances, and gradients.

S = samples, D = width.
"""

from __future__ import annotations

import math

import pytest
import torch

from llmdistill.errors import ModelError, TrainingError
from llmdistill.objectives.build import build_objectives
from llmdistill.objectives.relations import (
    KERNELS,
    FlowObjective,
    PktObjective,
    RkdObjective,
    SimilarityObjective,
    angle_loss,
    distance_loss,
    pkt_loss,
    similarity_loss,
)
from llmdistill.protocols import Progress
from llmdistill.schedules import CriticalPeriod, value
from llmdistill.teachers.local import LocalTeacher
from tests import toy
from tests.conformance import entries
from tests.support.objectives import loss, prepared
from tests.training.helpers import trainer

LOSSES = {
    "distance": distance_loss,
    "angle": angle_loss,
    "similarity": similarity_loss,
    "pkt cosine": lambda a, b: pkt_loss(a, b, KERNELS["cosine"]),
    "pkt student_t": lambda a, b: pkt_loss(a, b, KERNELS["student_t"]),
}
each = pytest.mark.parametrize("name", LOSSES)


def samples(seed, width=5, number=6):
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(number, width, generator=draw, dtype=torch.float64)


def rotation(width, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(width, width, generator=draw, dtype=torch.float64))[0]


@each
def test_gradient_is_right(name):
    """The widths of student and teacher differ."""
    student_SD = samples(1, width=3).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: LOSSES[name](x, samples(2)), student_SD)


@each
def test_equal_samples_and_a_rotation_of_them_are_the_minimum(name):
    x_SD = samples(1)
    assert abs(LOSSES[name](x_SD, x_SD).item()) < 1e-12
    assert abs(LOSSES[name](x_SD @ rotation(5), x_SD).item()) < 1e-12
    assert LOSSES[name](samples(2), x_SD) > 1e-4


@each
def test_the_order_of_the_samples_does_not_matter(name):
    order = [3, 0, 5, 1, 4, 2]
    expected = LOSSES[name](samples(1, 3), samples(2))
    torch.testing.assert_close(LOSSES[name](samples(1, 3)[order], samples(2)[order]), expected)


@pytest.mark.parametrize("name", ["distance", "angle", "similarity", "pkt cosine"])
def test_scale_does_not_matter(name):
    expected = LOSSES[name](samples(1), samples(2))
    torch.testing.assert_close(LOSSES[name](7 * samples(1), samples(2)), expected)


@pytest.mark.parametrize("name", ["distance", "angle"])
def test_rkd_does_not_change_with_a_shift_of_either_side(name):
    expected = LOSSES[name](samples(1), samples(2))
    torch.testing.assert_close(LOSSES[name](samples(1) + 3, samples(2) - 1), expected)


def test_the_student_t_kernel_sees_the_scale():
    x_SD = samples(1)
    assert LOSSES["pkt student_t"](5 * x_SD, x_SD) > 1e-4


@each
def test_duplicates_and_few_samples_stay_finite(name):
    for x_SD in (samples(1)[[0, 0, 0, 0]], samples(1)[:1], samples(1)[:2]):
        student_SD = x_SD.clone().requires_grad_()
        found = LOSSES[name](student_SD, samples(3)[: len(x_SD)])
        found.backward()
        assert torch.isfinite(found)
        assert torch.isfinite(student_SD.grad).all()


@each
def test_nearly_equal_samples_have_a_small_gradient(name):
    """Their difference is a rounding error, whose direction means nothing."""
    x_SD, noise_D = samples(1, number=8), samples(5)[0]
    for size in (1e-3, 1e-5, 1e-7, 0.0):
        student_SD = x_SD.clone()
        student_SD[1] = student_SD[0] + size * noise_D
        student_SD.requires_grad_()
        LOSSES[name](student_SD, samples(2, number=8)).backward()
        assert student_SD.grad.norm() < 10
    together_SD = (x_SD[:1] + 1e-7 * samples(3, number=8)).requires_grad_()
    LOSSES[name](together_SD, samples(2, number=8)).backward()
    assert torch.isfinite(together_SD.grad).all()


def test_two_samples_have_no_distance_to_compare_and_one_has_nothing():
    assert distance_loss(samples(1)[:2], samples(2)[:2]).item() == pytest.approx(0, abs=1e-12)
    for name in ("distance", "angle"):
        assert LOSSES[name](samples(1)[:1], samples(2)[:1]).item() == 0


def test_three_samples_by_hand():
    line_SD = torch.tensor([[0.0], [1.0], [3.0]])  # distances 1, 3, 2: mean 2
    triangle_SD = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])  # 1, 1, sqrt 2
    mean = (2 + math.sqrt(2)) / 3
    gaps = [0.5 - 1 / mean, 1.5 - 1 / mean, 1.0 - math.sqrt(2) / mean]
    expected = 2 * sum(0.5 * gap**2 for gap in gaps) / 9  # all gaps are below 1
    assert distance_loss(line_SD, triangle_SD).item() == pytest.approx(expected, rel=1e-5)
    # On the line the cosines are 1, -1, 1; in the triangle 0, 1 / sqrt 2, 1 / sqrt 2.  At each
    # corner the two other samples are compared in both orders; each with itself gives 1 - 1.
    gaps = [1.0, -1 - math.sqrt(0.5), 1 - math.sqrt(0.5)]
    smooth = [0.5 * g**2 if abs(g) < 1 else abs(g) - 0.5 for g in gaps]
    assert angle_loss(line_SD, triangle_SD).item() == pytest.approx(2 * sum(smooth) / 27, rel=1e-5)


def test_similarity_of_two_samples_by_hand():
    student_SD = torch.tensor([[1.0, 0.0], [0.0, 1.0]])  # rows of the Gram matrix: (1, 0), (0, 1)
    teacher_SD = torch.tensor([[1.0, 0.0], [1.0, 0.0]])  # rows: (1, 1) / sqrt 2 twice
    half = math.sqrt(0.5)
    expected = 2 * ((1 - half) ** 2 + half**2) / 4
    assert similarity_loss(student_SD, teacher_SD).item() == pytest.approx(expected, rel=1e-6)


def test_pkt_of_two_samples_by_hand():
    student_SD = torch.tensor([[0.0], [1.0]])  # kernel 1, 1/2: probabilities 2/3, 1/3
    teacher_SD = torch.tensor([[0.0], [3.0]])  # kernel 1, 1/4: probabilities 4/5, 1/5
    pairs = [(4 / 5, 2 / 3), (1 / 5, 1 / 3)]
    expected = sum((p - q) * math.log(p / q) for p, q in pairs) / 2
    found = pkt_loss(student_SD, teacher_SD, KERNELS["student_t"])
    assert found.item() == pytest.approx(expected, rel=1e-5)


def test_both_kernels_are_the_sum_of_each():
    student, teacher = toy.model(), LocalTeacher(toy.teacher_model(), toy.tokenizer())
    values = [
        loss(prepared(PktObjective(kernel=kernel), student, teacher), student, teacher,
             toy.sequences()).total.item()
        for kernel in ("cosine", "student_t", "both")
    ]  # fmt: skip
    assert values[2] == pytest.approx(values[0] + values[1], rel=1e-5)


def test_two_responses_to_one_prompt_have_the_teachers_relation():
    """A student with the teacher's relations has no loss, whichever prompts the rows share."""
    teacher = LocalTeacher(toy.model(), toy.tokenizer())
    sequences = toy.sequences()
    same = sequences.select(torch.tensor([0, 0, 1, 2]))
    for objective in (RkdObjective(), SimilarityObjective(), PktObjective()):
        made = prepared(objective, toy.model(), teacher)
        assert abs(loss(made, toy.model(), teacher, same).total.item()) < 1e-5


# ---- information flow ----


def flow(**options):
    section = entries.recipe(objectives=[{"kind": "flow", **options}]).objectives[0]
    return build_objectives([section])


def test_flow_is_two_terms_over_the_inner_and_the_last_layers():
    student, teacher = toy.model(), LocalTeacher(toy.teacher_model(), toy.tokenizer())
    inner, last = (prepared(one, student, teacher) for one in flow(weight=2.0))
    assert (inner.name, last.name) == ("flow_inner", "flow_last")
    assert last.weight == 2.0
    assert [mine.layer for mine, _ in inner.needs] == [1, 2]
    assert [(mine.layer, other.layer) for mine, other in last.needs] == [(3, 4)]
    # The last term is PKT over the last pair, and the inner one a mean over the others.
    pairs = [[(1, 1)], [(2, 3)], [(3, 4)]]
    values = [
        loss(prepared(PktObjective(layers=pair), student, teacher), student, teacher,
             toy.sequences()).total
        for pair in pairs
    ]  # fmt: skip
    found = [loss(one, student, teacher, toy.sequences()).total for one in (inner, last)]
    torch.testing.assert_close(found[0], (values[0] + values[1]) / 2)
    torch.testing.assert_close(found[1], values[2])


def test_the_critical_period_fades_and_the_last_layer_keeps_its_weight(tmp_path):
    schedule = CriticalPeriod(start=100.0, periods=50)
    weights = [value(schedule, Progress(step, 0, 0, num_steps=50)) for step in (0, 1, 10)]
    assert weights == pytest.approx([100, 70, 100 * 0.7**10])
    inner, last = flow()
    made = trainer(tmp_path, objectives=[inner, last], max_steps=3)
    made.train()
    logged = [entry for entry in made.state.log_history if "weight_flow_inner" in entry]
    assert logged[0]["weight_flow_inner"] == 10.0
    assert logged[-1]["weight_flow_inner"] < 0.1
    assert not any("weight_flow_last" in entry for entry in logged)


def test_a_flow_of_one_pair_is_refused():
    teacher = LocalTeacher(toy.teacher_model(), toy.tokenizer())
    with pytest.raises(ModelError, match="needs at least two: inner ones and a last one"):
        prepared(FlowObjective("inner", layers=[(-1, -1)]), toy.model(), teacher)


@pytest.mark.parametrize(
    ("objective", "rows"), [(RkdObjective(), 2), (SimilarityObjective(), 1), (PktObjective(), 1)]
)
def test_a_batch_with_too_few_rows_is_refused_before_training(tmp_path, objective, rows):
    needed = rows + 1
    with pytest.raises(TrainingError, match=f"compares at least {needed} rows .*, but a batch has"):
        trainer(tmp_path, objectives=[objective], per_device_train_batch_size=rows)
