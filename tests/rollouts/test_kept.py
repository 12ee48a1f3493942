"""Responses in files: whole, found by their keys, never changed."""

from __future__ import annotations

import numpy as np
import pytest

from llmdistill.batch import Prompts
from llmdistill.decoding import batches
from llmdistill.errors import CheckpointError
from llmdistill.models.footprint import cached_numbers
from llmdistill.rollouts.kept import KeptResponses, identity, response_key
from llmdistill.rollouts.parts import in_parts
from llmdistill.sampling import Draw, Sampling, Writer
from llmdistill.teachers.ensemble import EnsembleTeacher
from llmdistill.teachers.local import LocalTeacher
from tests import toy


def keys(*numbers) -> np.ndarray:
    return np.array(numbers, np.uint64)


def test_responses_are_found_in_any_order(tmp_path):
    kept = KeptResponses(tmp_path)
    kept.add(keys(2**64 - 1, 5), [[1, 2], []])
    kept.add(keys(7), [[3]])
    for one in (kept, KeptResponses(tmp_path)):
        one.refresh()
        assert one.responses(keys(7, 5, 2**64 - 1, 7)) == [[3], [], [1, 2], [3]]
        assert one.missing(keys(5, 6, 7, 6)).tolist() == [1]
        assert len(one) == 3


def test_a_file_that_is_not_whole_is_not_read(tmp_path):
    kept = KeptResponses(tmp_path)
    kept.add(keys(1), [[1]])
    (tmp_path / "0000000000000002-0.arrow.17.new").write_bytes(b"half")
    again = KeptResponses(tmp_path)
    again.refresh()
    assert len(again) == 1


def test_a_damaged_file_is_refused_with_what_to_do(tmp_path):
    KeptResponses(tmp_path).add(keys(1), [[1] * 100])
    (path,) = tmp_path.glob("*.arrow")
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(CheckpointError, match=rf"{path.name} is damaged.*Delete it"):
        KeptResponses(tmp_path).refresh()


def test_two_processes_read_what_the_other_wrote(tmp_path):
    ours, theirs = KeptResponses(tmp_path), KeptResponses(tmp_path)
    ours.add(keys(1), [[1]])
    theirs.add(keys(2), [[2]])
    ours.refresh()
    theirs.refresh()
    assert ours.responses(keys(1, 2)) == theirs.responses(keys(1, 2)) == [[1], [2]]


def test_every_part_of_a_key_counts():
    parts = [(0, 0, [1, 2]), (1, 0, [1, 2]), (0, 1, [1, 2]), (0, 0, [1]), (2**41, 0, [1, 2])]
    assert len({response_key(*one) for one in parts}) == len(parts)


def test_teachers_are_told_apart_by_their_weights():
    tokenizer = toy.tokenizer()
    one, two = (LocalTeacher(toy.teacher_model(seed=seed), tokenizer) for seed in (1, 2))
    assert identity(one) == identity(LocalTeacher(toy.teacher_model(seed=1), tokenizer))
    assert identity(one) != identity(two)
    assert identity(EnsembleTeacher([one, two])) != identity(EnsembleTeacher([two, one]))
    assert identity(EnsembleTeacher([one, two])) != identity(one)


# ---- in parts ----


def ragged(number: int) -> Prompts:
    rows = [[5 + row % 40] * (1 + 7 * row % 11) for row in range(number)]
    return Prompts.pack(rows, range(100, 100 + number), pad_id=0)


@pytest.mark.parametrize("size", [1, 3, 5, "auto"])
def test_responses_do_not_depend_on_the_batch_size(size):
    teacher = LocalTeacher(toy.teacher_model().double(), toy.tokenizer())
    prompts, samples = ragged(7), (0, 1, 2, 3, 4, 5, 6)

    def write(some, draw):
        return teacher.write(some, Sampling(), max_new_tokens=9, draw=draw)

    options = {"new_tokens": 9, "writers": (teacher,)}
    draw = Draw(3, sample=samples)
    written = in_parts(prompts, draw, write, batch_size=size, **options)
    whole = write(prompts, draw)
    assert written.responses() == whole.responses()
    assert written.row_ids_B.tolist() == whole.row_ids_B.tolist()
    assert (written.writer_BT == Writer.TEACHER).sum() == written.num_predicted.sum()
    ours, theirs = (one.signal.distribution.hidden_NH for one in (written, whole))
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() < 1e-12


def test_a_cache_that_does_not_fit_is_made_in_parts(monkeypatch):
    teacher = LocalTeacher(toy.teacher_model(), toy.tokenizer())
    per_token = cached_numbers(teacher.model) * 4
    monkeypatch.setattr(batches, "_free_bytes", lambda _: 90 * per_token)  # half of it: 45 tokens
    sizes = []

    def write(some, draw):
        sizes.append((len(some), some.input_ids_BP.shape[1] + 9))
        return teacher.write(some, Sampling(), max_new_tokens=9, draw=draw)

    in_parts(ragged(7), Draw(0), write, new_tokens=9, batch_size="auto", writers=(teacher,))
    assert sum(rows for rows, _ in sizes) == 7
    assert all(rows * width <= 45 for rows, width in sizes)
    assert len(sizes) > 2
