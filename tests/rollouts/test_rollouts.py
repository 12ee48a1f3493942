"""Who writes what, when, and how often."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from llmdistill.batch import Prompts, Sequences
from llmdistill.decoding.sample import sample
from llmdistill.errors import DataError, RecipeError
from llmdistill.protocols import Progress, Stateful
from llmdistill.recipe import rollouts as sections
from llmdistill.recipe.sampling import SamplingRecipe
from llmdistill.rollouts.acceptance import Mixture, Switch, TopK, TopP
from llmdistill.rollouts.build import build_rollout
from llmdistill.rollouts.fixed import FixedRollout
from llmdistill.rollouts.interleaved import InterleavedRollout
from llmdistill.rollouts.mixed import MixedRollout
from llmdistill.rollouts.replay import ReplayRollout
from llmdistill.rollouts.sampled import SampledRollout
from llmdistill.sampling import Draw, Sampling, Writer
from llmdistill.schedules import Adaptive, Linear
from llmdistill.teachers.local import LocalTeacher
from tests import toy

PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12]]
RESPONSES = [[20], [21, 22, 23], [24, 2]]
ROW_IDS = [4, 0, 9]


def prompts(places=(0, 1, 2), *, responses=True) -> Prompts:
    return Prompts.pack(
        [PROMPTS[i] for i in places],
        [ROW_IDS[i] for i in places],
        pad_id=0,
        responses=[RESPONSES[i] for i in places] if responses else None,
    )


def at(step=0, *, epoch=0, seed=3, **known) -> Progress:
    return Progress(step=step, epoch=epoch, seed=seed, **known)


class Scribe:
    """Writes, for row r in sample k of epoch e, the ids [100 + r, 50 + k, 30 + e]; remembers its calls."""

    def __init__(self, writer: Writer) -> None:
        self.writer, self.calls = writer, []

    def write(self, prompts, sampling, *, max_new_tokens, draw: Draw) -> Sequences:
        rows = prompts.row_ids_B.tolist()
        k = draw.sample
        self.calls.append(([(row, k) for row in rows], sampling, max_new_tokens, draw.seed))
        assert prompts.ids() == [PROMPTS[ROW_IDS.index(row)] for row in rows]
        return Sequences.pack(
            prompts.ids(),
            # Ragged, so that a mix-up of rows shows in the lengths too.
            [
                [100 + row, 50 + k, 30 + draw.epoch][: 2 + (row + k) % 2] if row else [100, 50 + k]
                for row in rows
            ],
            rows,
            writer=self.writer,
            pad_id=0,
        )


class OtherScribe(Scribe):
    pass


@pytest.fixture
def scribes():
    return Scribe(Writer.STUDENT), Scribe(Writer.TEACHER)


def refuse(*_args, **_options):
    pytest.fail("nobody was to write")


class Nobody:
    write = judge = refuse


# ---- fixed ----


def test_fixed_is_the_data_sets_own():
    written = FixedRollout().write(prompts(), Nobody(), Nobody(), at())
    assert written.responses() == RESPONSES
    assert written.row_ids_B.tolist() == ROW_IDS
    assert written.input_ids_BT[0, :4].tolist() == [5, 6, 7, 20]
    assert written.writer_BT.eq(Writer.DATA).all()
    assert written.num_predicted.tolist() == [1, 3, 2]


def test_fixed_without_responses_is_an_error_and_no_other_rollout():
    with pytest.raises(DataError, match=r"row 4 has no response.*rollout\.kind: sampled"):
        FixedRollout().write(prompts(responses=False), Nobody(), Nobody(), at())


# ---- sampled by the student ----


def student_texts(model, progress):
    class Student:
        def write(self, prompts, sampling, **options):
            return sample(
                model, toy.tokenizer(), prompts, sampling, writer=Writer.STUDENT, **options
            )

    rollout = SampledRollout("student", max_new_tokens=8)
    return rollout.write(prompts(), Student(), Nobody(), progress)


def test_the_student_writes_anew_each_epoch_and_the_same_within_one():
    model = toy.model().double()
    first = student_texts(model, at(0)).responses()
    assert student_texts(model, at(7)).responses() == first
    assert student_texts(model, at(0, epoch=1)).responses() != first
    assert student_texts(model, at(0, seed=4)).responses() != first


def test_the_student_is_asked_each_time_with_its_sampling(scribes):
    student, _ = scribes
    sampling = Sampling(0.7, 0.9, 5)
    rollout = SampledRollout("student", sampling=sampling, max_new_tokens=11)
    for step in range(3):
        written = rollout.write(prompts(), student, Nobody(), at(step, epoch=step, seed=6))
        assert written.writer_BT[written.response_mask_BT].eq(Writer.STUDENT).all()
    assert student.calls == [([(4, 0), (0, 0), (9, 0)], sampling, 11, 6)] * 3
    assert written.responses()[0] == [104, 50]


def test_the_student_has_no_number_of_samples():
    with pytest.raises(RecipeError, match=r"rollout\.samples should be 1 with by: student, got"):
        SampledRollout("student", samples=2)


# ---- sampled by the teacher ----


def test_the_teacher_writes_once(scribes):
    _, teacher = scribes
    rollout = SampledRollout("teacher", sampling=Sampling(0.5), max_new_tokens=9)
    first = rollout.write(prompts(), Nobody(), teacher, at(0))
    for epoch in range(1, 4):
        again = rollout.write(prompts(), Nobody(), teacher, at(9, epoch=epoch))
        assert again.responses() == first.responses()
    assert teacher.calls == [([(4, 0), (0, 0), (9, 0)], Sampling(0.5), 9, 3)]
    assert first.writer_BT[first.response_mask_BT].eq(Writer.TEACHER).all()
    assert first.writer_BT[~first.response_mask_BT].eq(Writer.DATA).all()


def test_only_rows_not_seen_before_are_written(scribes):
    _, teacher = scribes
    rollout = SampledRollout("teacher")
    rollout.write(prompts([1]), Nobody(), teacher, at())
    both = rollout.write(prompts([2, 1, 0]), Nobody(), teacher, at())
    assert [rows for rows, *_ in teacher.calls] == [[(0, 0)], [(9, 0), (4, 0)]]
    assert [ids[0] for ids in both.responses()] == [109, 100, 104]


def test_a_row_that_stands_twice_in_a_batch_is_written_once(scribes):
    """The last batch of an epoch repeats rows."""
    _, teacher = scribes
    written = SampledRollout("teacher", samples=2).write(
        prompts([0, 1, 0]), Nobody(), teacher, at()
    )
    (rows, *_), *others = teacher.calls
    assert not others
    assert sorted(rows) == [(0, 0), (4, 0)]
    assert written.responses()[0] == written.responses()[2]


def test_samples_cycle_over_the_epochs(scribes):
    _, teacher = scribes
    rollout = SampledRollout("teacher", samples=3)
    seen = [
        [ids[1] for ids in rollout.write(prompts(), Nobody(), teacher, at(epoch=epoch)).responses()]
        for epoch in range(5)
    ]
    assert seen == [[50] * 3, [51] * 3, [52] * 3, [50] * 3, [51] * 3]
    assert [[k for _, k in rows] for rows, *_ in teacher.calls] == [[0] * 3, [1] * 3, [2] * 3]


def test_the_samples_of_a_real_teacher_differ(tokenizer):
    teacher = LocalTeacher(toy.teacher_model().double(), tokenizer)
    rollout = SampledRollout("teacher", samples=2, max_new_tokens=8)
    first, second = (rollout.write(prompts(), Nobody(), teacher, at(epoch=e)) for e in (0, 1))
    for one, two in zip(first.responses(), second.responses(), strict=True):
        assert one != two
    # As if it had been asked for that sample alone.
    alone = teacher.write(prompts(), Sampling(), max_new_tokens=8, draw=Draw(3, sample=1))
    assert second.responses() == alone.responses()


def test_what_a_teacher_wrote_is_read_from_its_files(scribes, tmp_path):
    _, teacher = scribes
    rollout = SampledRollout("teacher", samples=2)
    rollout.keep_in(tmp_path, teacher, seed=3)
    written = [rollout.write(prompts(), Nobody(), teacher, at(epoch=e)).responses() for e in (0, 1)]
    assert not isinstance(rollout, Stateful)  # a checkpoint holds none of it
    restored = SampledRollout("teacher", samples=2)
    restored.keep_in(tmp_path, teacher, seed=3)
    for epoch in (0, 1):
        got = restored.write(prompts(), Nobody(), Nobody(), at(epoch=epoch))
        assert got.responses() == written[epoch]


@pytest.mark.parametrize(
    "other",
    [
        lambda teacher: (SampledRollout("teacher", max_new_tokens=9), teacher, 3),
        lambda teacher: (SampledRollout("teacher", sampling=Sampling(0.5)), teacher, 3),
        lambda teacher: (SampledRollout("teacher"), teacher, 4),
        lambda _: (SampledRollout("teacher"), OtherScribe(Writer.TEACHER), 3),
    ],
)
def test_responses_of_other_settings_are_not_read(scribes, tmp_path, other):
    _, teacher = scribes
    rollout = SampledRollout("teacher")
    rollout.keep_in(tmp_path, teacher, seed=3)
    rollout.write(prompts(), Nobody(), teacher, at())
    changed, writer, seed = other(teacher)
    changed.keep_in(tmp_path, writer, seed)
    assert len(rollout.kept) == 3
    assert not len(changed.kept)


def test_a_changed_row_does_not_get_the_response_of_another(scribes, tmp_path):
    """A line was put before the others in the file, so all rows have other numbers."""
    _, teacher = scribes
    rollout = SampledRollout("teacher")
    rollout.keep_in(tmp_path, teacher, seed=3)
    rollout.write(prompts(), Nobody(), teacher, at())
    moved = replace(prompts(), row_ids_B=prompts().row_ids_B.roll(1))
    assert rollout.missing(moved, [0, 0, 0]) == [0, 1, 2]


# ---- mixed ----


def choices(share, *, seed=3, steps=range(200)):
    """Which of the steps are the student's own."""
    student, teacher = Scribe(Writer.STUDENT), Scribe(Writer.TEACHER)
    rollout = MixedRollout(SampledRollout("student"), FixedRollout(), share=share)
    return [
        bool(rollout.write(prompts(), student, teacher, at(step, seed=seed)).writer_BT.any())
        for step in steps
    ]


def test_a_share_of_none_and_all():
    assert not any(choices(0.0))
    assert all(choices(1.0))


@pytest.mark.parametrize("share", [0.25, 0.5, 0.8])
def test_the_student_writes_its_share(share):
    steps = range(2000)
    found = sum(choices(share, steps=steps)) / len(steps)
    assert found == pytest.approx(share, abs=4 * (share * (1 - share) / len(steps)) ** 0.5)


def test_the_choice_is_keyed_by_seed_and_step():
    first = choices(0.5)
    assert choices(0.5) == first
    assert choices(0.5, steps=range(100, 200)) == first[100:]  # a resumed run
    assert choices(0.5, seed=4) != first


def test_the_choice_does_not_read_or_move_the_global_generators():
    import random

    random.seed(1)
    state, torch_state = random.getstate(), torch.get_rng_state()
    first = choices(0.5)
    assert random.getstate() == state
    assert torch.equal(torch.get_rng_state(), torch_state)
    random.seed(2)
    assert choices(0.5) == first


def test_each_step_of_a_mixture_is_marked_with_its_writer(scribes):
    student, teacher = scribes
    rollout = MixedRollout(SampledRollout("student"), SampledRollout("teacher"))
    seen = set()
    for step in range(20):
        written = rollout.write(prompts(), student, teacher, at(step))
        writers = set(written.writer_BT[written.response_mask_BT].tolist())
        assert len(writers) == 1
        seen |= writers
    assert seen == {Writer.STUDENT, Writer.TEACHER}
    assert len(teacher.calls) == 1
    assert 1 < len(student.calls) < 20


def test_a_mixture_keeps_what_its_teacher_wrote(scribes, tmp_path):
    _, teacher = scribes
    rollout = MixedRollout(SampledRollout("student"), SampledRollout("teacher"), share=0.0)
    rollout.keep_in(tmp_path, teacher, seed=3)
    written = rollout.write(prompts(), Nobody(), teacher, at())
    restored = MixedRollout(SampledRollout("student"), SampledRollout("teacher"), share=0.0)
    restored.keep_in(tmp_path, teacher, seed=3)
    assert restored.write(prompts(), Nobody(), Nobody(), at(5)).responses() == written.responses()


def test_a_mixture_with_the_data_set_has_state_too():
    rollout = MixedRollout(SampledRollout("student"), FixedRollout())
    rollout.load_state_dict(json.loads(json.dumps(rollout.state_dict())))


# ---- schedules ----


def test_a_mixture_follows_its_schedule(scribes):
    student, _ = scribes
    rollout = MixedRollout(SampledRollout("student"), FixedRollout(), share=Linear(0.0, 1.0))
    for step in range(200):
        rollout.write(prompts(), student, Nobody(), at(step, num_steps=200))
        if step == 99:
            early = len(student.calls)
    assert 0 < early < (len(student.calls) - early) / 2


# ---- replay ----


def replay(capacity=6):
    return ReplayRollout(SampledRollout("student"), capacity=capacity)


def test_nothing_is_replayed_before_the_buffer_is_full(scribes):
    student, _ = scribes
    rollout = replay(capacity=12)
    for step in range(90, 94):
        rollout.write(prompts(), student, Nobody(), at(step, num_steps=90))
    assert len(student.calls) == 4
    replayed = rollout.write(prompts(), Nobody(), Nobody(), at(90, num_steps=90))
    assert set(replayed.row_ids_B.tolist()) <= set(ROW_IDS)


def test_at_the_first_step_nothing_is_replayed_and_at_the_last_everything(scribes):
    student, _ = scribes
    rollout = replay(capacity=3)
    for _ in range(3):
        rollout.write(prompts(), student, Nobody(), at(0, num_steps=50))
    assert len(student.calls) == 3
    rollout.write(prompts(), Nobody(), Nobody(), at(50, num_steps=50))


def test_replayed_rows_are_those_written_prompt_and_all(scribes):
    student, _ = scribes
    rollout = replay(capacity=3)
    written = rollout.write(prompts(), student, Nobody(), at(0, num_steps=9))
    original = dict(zip(written.row_ids_B.tolist(), written.responses(), strict=True))
    again = rollout.write(prompts([0, 1]), Nobody(), Nobody(), at(9, num_steps=9))
    assert len(again) == 2
    for row, ids, response in zip(
        again.row_ids_B.tolist(), again.input_ids_BT.tolist(), again.responses(), strict=True
    ):
        prompt = PROMPTS[ROW_IDS.index(row)]
        assert ids[: len(prompt)] == prompt
        assert response == original[row]
    assert again.writer_BT[again.response_mask_BT].eq(Writer.STUDENT).all()


def test_the_oldest_rows_leave_the_buffer_first(scribes):
    student, _ = scribes
    rollout = replay(capacity=3)
    rollout.write(prompts([0, 1]), student, Nobody(), at(0, num_steps=9))
    rollout.write(prompts([2]), student, Nobody(), at(0, num_steps=9, epoch=1))
    rollout.write(prompts([1]), student, Nobody(), at(0, num_steps=9, epoch=2))
    assert [row for row, *_ in rollout.state_dict()["kept"]] == [0, 9, 0]


def test_the_buffer_survives_as_json(scribes):
    student, _ = scribes
    rollout = replay(capacity=3)
    rollout.write(prompts(), student, Nobody(), at(0, num_steps=9))
    restored = replay(capacity=3)
    restored.load_state_dict(json.loads(json.dumps(rollout.state_dict())))
    for step in range(9, 14):
        ours, theirs = (
            r.write(prompts(), Nobody(), Nobody(), at(step, num_steps=9)).responses()
            for r in (restored, rollout)
        )
        assert ours == theirs


# ---- from a recipe ----


def test_a_recipe_builds_its_rollout():
    sampling = SamplingRecipe(temperature=0.5, top_p=0.9, top_k=7)
    student = sections.SampledRecipe(sampling=sampling, max_new_tokens=33)
    other = sections.SampledRecipe(by="teacher", samples=4)
    built = build_rollout(
        sections.MixedRecipe.model_validate({"share": 0.3, "student": student, "other": other})
    )
    assert isinstance(built, MixedRollout)
    assert built.share == 0.3
    assert (built.student.by, built.student.max_new_tokens) == ("student", 33)
    assert built.student.sampling == Sampling(temperature=0.5, top_p=0.9, top_k=7)
    assert (built.other.by, built.other.samples) == ("teacher", 4)
    assert isinstance(build_rollout(sections.FixedRecipe()), FixedRollout)


def test_a_recipe_builds_schedules_and_replay():
    schedule = {"kind": "adaptive", "start": 0.2, "rise": 0.3, "tolerance": 0.05}
    student = {"kind": "replay", "capacity": 7, "rollout": {"kind": "sampled"}}
    mixed = sections.MixedRecipe.model_validate({"share": schedule, "student": student})
    built = build_rollout(mixed)
    assert built.share == Adaptive(start=0.2, rise=0.3, tolerance=0.05)
    assert isinstance(built.student, ReplayRollout)
    assert built.student.capacity == 7
    linear = {"share": {"kind": "linear", "start": 1.0, "end": 0.0}}
    assert build_rollout(sections.MixedRecipe.model_validate(linear)).share == Linear(1.0, 0.0)


@pytest.mark.parametrize(
    ("given", "accept"),
    [
        ({}, TopK(25)),
        ({"top_k": 0}, TopK(0)),
        ({"accept": "top_p"}, TopP(0.95)),
        ({"accept": "top_p", "top_p": 0.5}, TopP(0.5)),
        ({"accept": "mixture", "teacher_share": 0.4}, Mixture(0.4)),
        ({"accept": "switch", "window": 7}, Switch(3.0, 7)),
    ],
)
def test_a_recipe_builds_an_interleaved_rollout(given, accept):
    built = build_rollout(sections.InterleavedRecipe.model_validate(given))
    assert isinstance(built, InterleavedRollout)
    assert built.accept == accept
    assert (built.block_size, built.max_new_tokens) == ("auto", 256)
    assert built.student_sampling == Sampling(0.5, 0.5)
    assert built.teacher_sampling == Sampling(0.2, 0.5)


def test_a_recipe_gives_an_interleaved_rollout_its_options():
    answer = sections.InterleavedRecipe.model_validate(
        {"block_size": 5, "max_new_tokens": 9, "student_sampling": {"temperature": 1.0},
         "teacher_sampling": {"top_k": 4}}
    )  # fmt: skip
    built = build_rollout(sections.MixedRecipe(student=answer)).student
    assert (built.block_size, built.max_new_tokens) == (5, 9)
    assert built.student_sampling == Sampling(1.0, 0.5)
    assert built.teacher_sampling == Sampling(0.2, 0.5, top_k=4)
