"""What the studies in scripts/ change in their rows, and what it does to a toy student."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch

from llmdistill.data.collate import PromptDataset, collate
from llmdistill.data.table import Row
from llmdistill.objectives.response import CrossEntropyObjective, ResponseObjective
from llmdistill.protocols import Progress
from llmdistill.rollouts.fixed import FixedRollout
from llmdistill.teachers.local import LocalTeacher
from tests import toy
from tests.support.objectives import loss
from tests.training.helpers import trainer

SCRIPTS = Path(__file__).parents[1] / "scripts"


@pytest.fixture
def study(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module("study_noise")


def echoes(number: int) -> list[Row]:
    """Rows whose response repeats the token of the prompt."""
    return [Row(row, [token, 3], [token] * 3) for row in range(number) for token in [10 + row % 40]]


@pytest.mark.parametrize("share", [0.0, 0.2, 0.4, 0.6, 1.0])
def test_noise_changes_as_many_rows_as_it_says(study, share):
    rows = echoes(25)
    noisy = study.corrupted(rows, share, 0)
    changed = [place for place, row in enumerate(noisy) if row != rows[place]]
    assert len(changed) == int(share * 25)
    assert all(noisy[place].prompt_ids == rows[place].prompt_ids for place in range(25))
    assert all(noisy[place].response_ids[0] in range(10, 35) for place in changed)


def test_noise_is_stable_under_a_seed_and_grows(study):
    rows = echoes(30)
    some, more = study.corrupted(rows, 0.2, 0), study.corrupted(rows, 0.5, 0)
    assert study.corrupted(rows, 0.2, 0) == some
    assert study.corrupted(rows, 0.2, 1) != some
    assert all(b == a for row, a, b in zip(rows, some, more, strict=True) if a != row)


@pytest.mark.parametrize(("ratio", "few"), [(1, 20), (10, 4), (50, 1), (1000, 1)])
def test_a_mixture_has_the_ratio_that_it_says(study, ratio, few):
    common, rare = echoes(60), [Row(row, [9], [9]) for row in range(60)]
    found = study.imbalanced(common, rare, ratio, 40)
    assert len(found) == 40
    assert sum(row.prompt_ids == [9] for row in found) == few


@pytest.mark.slow
def test_wrong_responses_harm_labels_more_than_a_teacher(study, tmp_path):
    """METHODS 13: on an echo task whose teacher knows the answer."""
    rows = PromptDataset(echoes(40))
    held = FixedRollout().write(collate(rows.rows), None, None, Progress(step=0, epoch=0, seed=0))
    options = {"learning_rate": 0.02, "optim": "adamw_torch", "max_steps": 60}
    labels = CrossEntropyObjective()

    def after(given, objective, teacher=None, **more):
        made = trainer(
            tmp_path, rows=PromptDataset(given), objectives=[objective], teacher=teacher,
            per_device_train_batch_size=20, **options | more,
        )  # fmt: skip
        made.train()
        return made.model.student

    def error(student):
        with torch.no_grad():
            found = loss(labels, student, teacher, held)
        return float(found.total / found.num_tokens)

    teacher = LocalTeacher(after(rows.rows, CrossEntropyObjective()), toy.tokenizer())
    noisy = study.corrupted(list(rows.rows), 0.6, 0)
    rise = {}
    for objective in (CrossEntropyObjective, ResponseObjective):
        errors = [error(after(given, objective(), teacher)) for given in (rows.rows, noisy)]
        rise[objective] = errors[1] - errors[0]
    assert rise[CrossEntropyObjective] > 2 * rise[ResponseObjective]
    assert rise[CrossEntropyObjective] > 0.3
