"""Writing hardly ever makes the CPU wait for a GPU, and says where each tensor is."""

from __future__ import annotations

import pytest

from llmdistill.batch import Prompts
from llmdistill.decoding.session import can_hold_holes
from llmdistill.objectives.response import ResponseObjective
from llmdistill.protocols import Progress
from llmdistill.rollouts.acceptance import Mixture, Switch, TopK, TopP
from llmdistill.rollouts.interleaved import InterleavedRollout, _Pair
from llmdistill.rollouts.sampled import SampledRollout
from llmdistill.sampling import Sampling
from llmdistill.teachers.local import LocalTeacher
from llmdistill.training.step import Distillation
from tests import toy
from tests.support.waits import Waits

ROOM = 32
NUCLEUS = Sampling(temperature=1.0, top_p=0.9)
OPEN = {"student_sampling": NUCLEUS, "teacher_sampling": NUCLEUS}
# A batch is sent, and fetched at the end: waits that do not grow with its tokens.
PER_BATCH = 8


@pytest.fixture(scope="module")
def pair():
    student, teacher, tokenizer = toy.model(), toy.teacher_model(), toy.tokenizer()
    for model in (student, teacher):
        can_hold_holes(model)  # a trial, once
    local = LocalTeacher(teacher, tokenizer)
    return Distillation(student, local, [ResponseObjective()], tokenizer)


def written(pair, rollout):
    """Write 8 rows, and return the responses and the waits."""
    ids = [[5 + i, 6, 7] + [9] * (i % 3) for i in range(8)]
    prompts = Prompts.pack(ids, range(8), pad_id=0)
    on_cpu = (prompts.input_ids_BP, prompts.attention_mask_BP, prompts.row_ids_B)
    with Waits(pair.student, pair.teacher.model, on_cpu=on_cpu) as waits:
        sequences = rollout.write(prompts, pair, pair.teacher, Progress(0, 0, 0))
    return sequences.responses(), waits


@pytest.fixture
def sizes(monkeypatch):
    """The sizes of the blocks that are written."""
    seen, real = [], _Pair.write_block

    def write_block(self, size):
        seen.append(size)
        return real(self, size)

    monkeypatch.setattr(_Pair, "write_block", write_block)
    return seen


@pytest.mark.parametrize("accept", [TopK(120), TopP(0.9), Mixture(0.3), Switch()], ids=str)
@pytest.mark.parametrize("size", [1, 4])
def test_a_block_waits_once(pair, sizes, accept, size):
    """Of transformers' code, each pass of the student asks once whether its mask is full."""
    rollout = InterleavedRollout(accept=accept, block_size=size, max_new_tokens=ROOM, **OPEN)
    _, waits = written(pair, rollout)
    assert len(sizes) >= ROOM / size
    assert len(sizes) <= waits.of("llmdistill") <= len(sizes) + PER_BATCH, waits.counts
    passes = 2 * len(sizes) if size == 1 else sum(sizes)
    assert waits.of("transformers") <= passes + PER_BATCH
    assert waits.mixed == []


@pytest.mark.parametrize("by", ["student", "teacher"])
def test_a_sampled_token_waits_in_transformers_alone(pair, by):
    """There, `generate` asks for the mask, for the end tokens, and whether all rows have ended."""
    rollout = SampledRollout(by, max_new_tokens=ROOM, sampling=NUCLEUS)
    responses, waits = written(pair, rollout)
    assert max(map(len, responses)) == ROOM
    assert waits.of("llmdistill") <= PER_BATCH
    assert waits.of("transformers") <= 3 * ROOM + PER_BATCH
    assert waits.mixed == []


@pytest.mark.parametrize("size", [1, 4, "auto"])
def test_responses_are_those_of_a_cpu(pair, size):
    """The nucleus and the replacements are found in another way on a GPU."""
    rollout = InterleavedRollout(accept=Mixture(0.3), block_size=size, max_new_tokens=ROOM, **OPEN)
    responses, _ = written(pair, rollout)
    ids = [[5 + i, 6, 7] + [9] * (i % 3) for i in range(8)]
    prompts = Prompts.pack(ids, range(8), pad_id=0)
    again = rollout.write(prompts, pair, pair.teacher, Progress(0, 0, 0))
    assert responses == again.responses()


@pytest.mark.parametrize(("size", "times"), [(3, 0), ("auto", 3)])
def test_only_a_chosen_block_size_is_timed(pair, sizes, monkeypatch, size, times):
    """Times on a GPU are of finished work, so each costs a wait."""
    clocks = []
    monkeypatch.setattr(
        "llmdistill.rollouts.interleaved.time.perf_counter", lambda: clocks.append(1) or 0.0
    )
    written(pair, InterleavedRollout(block_size=size, max_new_tokens=8))
    assert len(clocks) == times * len(sizes)
