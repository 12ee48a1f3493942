"""One teacher for each row: by a column, or by difficulty (CES-KD)."""

from __future__ import annotations

import collections

import pytest
import torch

from llmdistill.data.collate import PromptDataset
from llmdistill.data.validate import Rules
from llmdistill.errors import DataError, RecipeError, TrainingError
from llmdistill.objectives.divergences import log_probs
from llmdistill.protocols import plain
from llmdistill.rollouts.sampled import SampledRollout
from llmdistill.sampling import GREEDY, Draw
from llmdistill.teachers.build import Parts, build_teacher
from llmdistill.teachers.routed import (
    CurriculumTeacher,
    Paced,
    RoutedTeacher,
    difficulty,
    ranks,
    token_balance,
)
from tests import toy
from tests.conformance import entries
from tests.support.spies import spy
from tests.support.teachers import experts, logits, served, signal
from tests.training.helpers import dataset, gradient, trainer

NAMES = ("maths", "code", "prose")


def named(number=3):
    return dict(zip(NAMES, experts(number), strict=False))


ROUTE = {0: "code", 1: "maths", 2: "code", 3: "prose", 4: "maths"}


def test_each_row_has_the_distribution_of_its_own_teacher():
    teachers, sequences = named(), toy.sequences()
    found = logits(RoutedTeacher(teachers, ROUTE))
    row_N = torch.arange(5).repeat_interleave(sequences.num_predicted)
    for row, name in ROUTE.items():
        torch.testing.assert_close(found[row_N == row], logits(teachers[name])[row_N == row])


def test_a_teacher_reads_its_own_rows_only():
    teachers = named()
    calls = {name: spy(teacher, "score") for name, teacher in teachers.items()}
    logits(RoutedTeacher(teachers, dict.fromkeys(range(5), "code") | {3: "maths"}))
    assert [len(calls[name]) for name in NAMES] == [1, 1, 0]
    read = {name: len(calls[name][0].distribution) for name in ("maths", "code")}
    counts = toy.sequences().num_predicted
    assert read == {"maths": int(counts[3]), "code": int(counts.sum() - counts[3])}


def test_a_part_of_the_signal_is_that_part_of_the_distribution():
    whole = signal(RoutedTeacher(named(), ROUTE))
    for places in (torch.tensor([9, 2, 2, 0]), torch.arange(len(whole)) % 3 == 1):
        torch.testing.assert_close(served(whole.select(places)), served(whole)[places])
    blocks = whole.serve(4)
    pieces = [blocks[slice(i, min(i + 3, len(whole)))].clone() for i in range(0, len(whole), 3)]
    torch.testing.assert_close(torch.cat(pieces), served(whole))


def test_all_rows_to_one_teacher_is_that_teacher(tmp_path):
    """N13."""
    teachers = named()
    expected = gradient(tmp_path / "one", teacher=teachers["code"], rows=dataset(8))
    routed = RoutedTeacher(teachers, dict.fromkeys(range(8), "code"))
    found = gradient(tmp_path / "routed", teacher=routed, rows=dataset(8))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-7)


def test_balanced_teachers_contribute_the_same_number_of_tokens():
    rows = dataset(8).rows
    route = {row.row_id: NAMES[row.row_id % 5 % 3] for row in rows}
    factors = token_balance(rows, route)
    tokens = collections.Counter()
    for row in rows:
        tokens[route[row.row_id]] += len(row.response_ids)
    assert len(set(tokens.values())) == 3
    counted = {name: factors[name] * tokens[name] for name in NAMES}
    assert list(counted.values()) == pytest.approx([sum(tokens.values()) / 3] * 3)


def test_rows_are_counted_if_a_model_writes_the_responses():
    rows = dataset(7).rows
    route = {row.row_id: "ab"[row.row_id % 2] for row in rows}
    found = token_balance(rows, route, by_tokens=False)
    assert found == {"a": pytest.approx(7 / 8), "b": pytest.approx(7 / 6)}


def test_the_factors_multiply_the_loss_of_each_teachers_rows(tmp_path):
    teachers, rows = named(2), dataset(8)
    route = {row: NAMES[row % 2] for row in range(8)}
    balance = {"maths": 0.25, "code": 3.0}
    expected = 0
    for name, factor in balance.items():
        alone = RoutedTeacher(teachers, route, balance={one: float(one == name) for one in balance})
        expected = expected + factor * gradient(tmp_path / name, teacher=alone, rows=rows)
    found = gradient(
        tmp_path / "all", teacher=RoutedTeacher(teachers, route, balance=balance), rows=rows
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_each_teacher_writes_its_own_rows():
    from llmdistill.data.collate import collate

    teachers = named(2)
    prompts = collate(dataset(4).rows)
    routed = RoutedTeacher(teachers, {0: "code", 1: "maths", 2: "code", 3: "code"})
    options = {"max_new_tokens": 5, "draw": Draw(0)}
    found = routed.write(prompts, GREEDY, **options).responses()
    for row, name in ((0, "code"), (1, "maths"), (2, "code"), (3, "code")):
        assert found[row] == teachers[name].write(prompts, GREEDY, **options).responses()[row]


def test_rollouts_of_either_model_work(tmp_path):
    for by in ("student", "teacher"):
        routed = RoutedTeacher(named(2), {row: NAMES[row % 2] for row in range(8)})
        rollout = SampledRollout(by, max_new_tokens=4)
        made = trainer(tmp_path / by, teacher=routed, rollout=rollout, rows=dataset(8))
        made.train()
        assert made.state.log_history[0]["loss"] > 0


def test_an_unlisted_teacher_and_a_row_without_one_are_refused_by_name():
    with pytest.raises(RecipeError, match=r"row 4 is routed to teacher 'law', which is not listed"):
        RoutedTeacher(named(), ROUTE | {4: "law"})
    with pytest.raises(DataError, match="no teacher is chosen for row 4"):
        logits(RoutedTeacher(named(), dict.fromkeys(range(4), "code")))


# ---- a curriculum of experts ----


def test_difficulty_is_the_mean_cross_entropy_of_the_response():
    rows = dataset(20).rows
    (teacher,) = experts(1)
    found = difficulty(teacher, rows)
    assert list(found) != sorted(found)  # read by length
    for row in (rows[3], rows[11]):
        ids = torch.tensor([[*row.prompt_ids, *row.response_ids]])
        with torch.no_grad():
            log = log_probs(teacher.model(ids).logits[0, :-1, : toy.NUM_TOKENS])
        labels = log.gather(-1, ids[0, 1:, None])[len(row.prompt_ids) - 1 :, 0]
        assert found[row.row_id] == pytest.approx(-labels.mean().item(), rel=1e-5)


def test_each_row_has_one_expert_and_harder_rows_a_larger_one():
    rows = dataset(20).rows
    teachers = named()
    teacher = CurriculumTeacher(teachers, rows)
    hard = difficulty(teachers["prose"], rows)
    assert teacher.place.keys() == {row.row_id for row in rows}
    by_difficulty = [teacher.place[row] for row in sorted(hard, key=hard.get)]
    assert by_difficulty == sorted(by_difficulty)
    assert sorted(collections.Counter(by_difficulty).values()) == [6, 7, 7]
    assert teacher.plain is teachers["prose"]


def test_one_expert_is_distillation_without_a_curriculum(tmp_path):
    """N13."""
    (one,) = experts(1)
    expected = gradient(tmp_path / "one", teacher=one, rows=dataset(8))
    teacher = CurriculumTeacher({"1": one}, dataset(8).rows)
    found = gradient(tmp_path / "ces", teacher=teacher, rows=dataset(8))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_ranks_lie_between_0_and_1_and_ties_keep_their_order():
    assert ranks({5: 2.0, 1: 1.0, 3: 2.0, 2: 9.0}) == {1: 0.0, 3: 0.25, 5: 0.5, 2: 0.75}


def drawn(number, start, *, epochs, epoch=0, seed=0):
    order = Paced([i / number for i in range(number)], start, epochs=epochs, seed=seed)
    order.set_epoch(epoch)
    return list(order)


def test_only_rows_below_the_pace_are_drawn():
    rows = drawn(100, 0.4, epochs=1)
    assert len(rows) == 100
    for position, row in enumerate(rows):
        assert row / 100 < 0.4 + 0.6 * position / 100
    assert max(rows) > 90
    assert rows == drawn(100, 0.4, epochs=1)
    assert rows != drawn(100, 0.4, epochs=1, seed=1)


def test_the_pace_of_two_epochs_goes_on_where_the_first_ended():
    first, second = (drawn(100, 0.4, epochs=2, epoch=epoch) for epoch in (0, 1))
    assert max(first) < 70
    assert max(second) > 90
    assert len(set(first)) > 60  # no row again before all others below the pace


def test_a_pace_of_all_rows_is_one_pass_over_them():
    assert sorted(drawn(50, 1.0, epochs=3)) == list(range(50))


def test_a_run_draws_the_easy_rows_first(tmp_path):
    rows = dataset(40)
    teacher = CurriculumTeacher(named(2), rows.rows, pace_from=0.2)
    seen = []

    class Look(SampledRollout):
        def write(self, prompts, *others):
            seen.append(prompts.row_ids_B.tolist())
            return super().write(prompts, *others)

    made = trainer(
        tmp_path, teacher=teacher, rows=rows, max_steps=10, rollout=Look(max_new_tokens=2)
    )
    made.train()
    mean = [sum(teacher.rank[row] for row in step) / len(step) for step in seen]
    assert max(teacher.rank[row] for row in seen[0]) < 0.3
    assert sum(mean[-3:]) > sum(mean[:3]) + 0.3


def test_rows_without_a_response_have_no_difficulty():
    rows = PromptDataset.of(toy.rows(3, answers=False), toy.tokenizer()).rows
    with pytest.raises(DataError, match="row 0 has no response"):
        CurriculumTeacher(named(2), rows)


def test_a_curriculum_and_lengths_cannot_both_choose_the_order(tmp_path):
    teacher = CurriculumTeacher(named(2), dataset(8).rows, pace_from=0.5)
    made = trainer(
        tmp_path, teacher=teacher, rows=dataset(8), train_sampling_strategy="group_by_length"
    )
    with pytest.raises(TrainingError, match="the teacher chooses the order of the rows"):
        made.train()


def test_a_student_is_measured_without_the_factors():
    teacher = RoutedTeacher(named(), ROUTE, balance=dict.fromkeys(NAMES, 2.0))
    with pytest.raises(TrainingError, match="only ResponseObjective can sum its losses"):
        signal(teacher).serve()
    torch.testing.assert_close(logits(plain(teacher)), logits(RoutedTeacher(named(), ROUTE)))


def test_a_column_that_names_no_teacher_is_refused_with_its_value(pair, tmp_path):
    rows = [row | {"domain": "ab"[i % 2]} for i, row in enumerate(toy.rows(4))]
    data = PromptDataset.encode(
        ((f"row {i}", row) for i, row in enumerate(rows)),
        toy.tokenizer(),
        Rules(columns=("domain",)),
    )
    teachers = [{"name": "a", "model": pair[0]}]
    section = entries.recipe(
        teacher={"kind": "route", "column": "domain", "teachers": teachers}
    ).teacher
    with pytest.raises(RecipeError, match="rows have 'b' in their column 'domain', but no teacher"):
        build_teacher(section, Parts(train=data.rows))
