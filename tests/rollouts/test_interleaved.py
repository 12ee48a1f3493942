"""Two models write one answer: against a slow reference, against the law, and by counting."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from scipy.stats import chi2

from llmdistill.batch import Prompts
from llmdistill.decoding.keyed import coin, draw_tokens, log_prob, row_keys
from llmdistill.decoding.session import can_hold_holes, session
from llmdistill.errors import RecipeError
from llmdistill.models.heads import split
from llmdistill.models.vocabulary import end_ids
from llmdistill.objectives.divergences import forward_kl
from llmdistill.objectives.response import ResponseObjective
from llmdistill.protocols import Progress
from llmdistill.rollouts import interleaved
from llmdistill.rollouts.acceptance import Mixture, Switch, TopK, TopP
from llmdistill.rollouts.fixed import FixedRollout
from llmdistill.rollouts.interleaved import InterleavedRollout
from llmdistill.rollouts.mixed import MixedRollout
from llmdistill.rollouts.sampled import SampledRollout
from llmdistill.sampling import Draw, Sampling, Writer
from llmdistill.teachers.local import LocalTeacher
from llmdistill.training.step import Distillation
from tests import toy
from tests.support.models import FAMILIES, family, sliding

PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13], [20, 21], [30] * 7]
ROW_IDS = [4, 0, 9, 7, 2]
AT = Progress(step=0, epoch=0, seed=3)
ROOM = 24
OPEN = {"student_sampling": Sampling(0.4), "teacher_sampling": Sampling(0.7)}
SIZES = [1, 2, 3, 5, 8, "auto"]


class Pair:
    """A student that can be stepped and written with, and its teacher."""

    def __init__(self, student, teacher, tokenizer) -> None:
        self.teacher = LocalTeacher(teacher, tokenizer)
        self.student = Distillation(student, self.teacher, [ResponseObjective()], tokenizer)
        for model in (student, teacher):
            can_hold_holes(model)  # a trial of three passes, once: not to be counted

    def write(self, rows=range(5), progress=AT, **options):
        options = {"max_new_tokens": ROOM} | OPEN | options
        return InterleavedRollout(**options).write(pack(rows), self.student, self.teacher, progress)


def pack(rows=range(5)):
    return Prompts.pack([PROMPTS[i] for i in rows], [ROW_IDS[i] for i in rows], pad_id=0)


def alike(*, noise: float = 0.03, **options):
    """A student that is its teacher, a little disturbed: drafts are accepted in runs."""
    teacher, student = toy.teacher_model(**options), toy.teacher_model(**options)
    generator = torch.Generator().manual_seed(9)
    for parameter in student.parameters():
        parameter.data += noise * torch.randn(parameter.shape, generator=generator)
    return student, teacher


def ending():
    """A pair whose answers end early, at different places."""
    student, teacher = alike()
    for model in (student, teacher):
        model.lm_head.weight.data[2] *= 2.5
    return student, teacher


@pytest.fixture(scope="module")
def pair():
    student, teacher = alike()
    return Pair(student.double(), teacher.double(), toy.tokenizer())


def writers(sequences) -> list[list[int]]:
    return [
        row[mask].tolist()
        for row, mask in zip(sequences.writer_BT, sequences.response_mask_BT, strict=True)
    ]


# ---- the reference: one row, one token, no cache ----


def logits_after(model, ids):
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids]), use_cache=False).logits[:, -1, : toy.NUM_TOKENS]


def stays(accept, teacher_V, student_V, token, slot, keys, seen) -> bool:
    """Each rule once more, by sorting and by lists."""
    scores = teacher_V.tolist()
    ranked = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    if isinstance(accept, TopK):
        return token in ranked[: accept.top_k]
    if isinstance(accept, TopP):
        mass = teacher_V.softmax(-1).tolist()
        return sum(mass[i] for i in ranked[: ranked.index(token)]) < accept.top_p
    if isinstance(accept, Mixture):
        return float(coin(keys[Writer.DATA], slot)[0]) >= accept.teacher_share
    gap = float(forward_kl(student_V[None], teacher_V[None])[0])
    before = seen[-accept.window :]
    jumps = len(seen) >= accept.window and gap > accept.factor * sum(before) / accept.window
    seen.append(float("inf") if jumps or float("inf") in seen else gap)
    return seen[-1] != float("inf")


def by_the_book(pair, row: int, accept, room: int = ROOM):
    """(ids, writers) of one row, written slowly."""
    row_id = torch.tensor([ROW_IDS[row]])
    keys = {writer: row_keys(Draw(AT.seed), row_id, writer) for writer in Writer}
    ids, who, seen = [], [], []
    while len(ids) < room and not (ids and ids[-1] == 2):
        text, slot = PROMPTS[row] + ids, len(ids)
        teacher_1V = logits_after(pair.teacher.model, text).float()
        student_1V = logits_after(pair.student.student, text).float()
        sampling = OPEN["student_sampling"]
        token = int(draw_tokens(student_1V, sampling, keys[Writer.STUDENT], slot))
        writer = Writer.STUDENT
        if not stays(accept, teacher_1V[0], student_1V[0], token, slot, keys, seen):
            sampling, writer = OPEN["teacher_sampling"], Writer.TEACHER
            token = int(draw_tokens(teacher_1V, sampling, keys[Writer.TEACHER], slot))
        ids.append(token)
        who.append(int(writer))
    return ids, who


RULES = [TopK(3), TopK(25), TopP(0.8), Mixture(0.3), Switch(factor=1.3, window=3)]


@pytest.fixture(scope="module")
def book(pair):
    return {accept: [by_the_book(pair, row, accept) for row in range(5)] for accept in RULES}


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("accept", RULES, ids=str)
def test_every_block_size_writes_what_the_reference_writes(pair, book, accept, size):
    written = pair.write(accept=accept, block_size=size)
    assert written.responses() == [ids for ids, _ in book[accept]]
    assert writers(written) == [who for _, who in book[accept]]


def test_the_reference_has_runs_and_replacements_of_both_writers(book):
    """Otherwise the tests above would compare little."""
    for accept, rows in book.items():
        text = ["".join(map(str, who)) for _, who in rows]
        both = sum(Writer.TEACHER in who and Writer.STUDENT in who for _, who in rows)
        assert both >= 3, (accept, text)
        assert any("22" in row for row in text), (accept, text)


@pytest.mark.parametrize("rows", [[2], [1, 3], [4, 2, 0, 3, 1]])
@pytest.mark.parametrize("size", [1, 4])
def test_a_row_is_written_the_same_beside_any_others(pair, book, rows, size):
    written = pair.write(rows, accept=TopK(3), block_size=size)
    assert written.responses() == [book[TopK(3)][row][0] for row in rows]
    assert written.row_ids_B.tolist() == [ROW_IDS[row] for row in rows]


def test_another_epoch_or_seed_writes_something_else(pair, book):
    first = [ids for ids, _ in book[TopK(3)]]
    for progress in (Progress(0, 1, 3), Progress(0, 0, 4)):
        assert pair.write(accept=TopK(3), progress=progress).responses() != first
    later = Progress(step=9, epoch=0, seed=3)
    assert pair.write(accept=TopK(3), progress=later).responses() == first


# ---- the limits ----


@pytest.mark.parametrize("size", [1, 5, "auto"])
def test_accepting_everything_is_the_students_own_sample(pair, size):
    written = pair.write(top_k=toy.NUM_TOKENS, block_size=size)
    own = SampledRollout("student", max_new_tokens=ROOM, sampling=OPEN["student_sampling"])
    expected = own.write(pack(), pair.student, pair.teacher, AT)
    assert written.responses() == expected.responses()
    assert set().union(*writers(written)) == {Writer.STUDENT}


@pytest.mark.parametrize("size", [1, 5, "auto"])
def test_accepting_nothing_is_the_teachers_own_sample(pair, size):
    written = pair.write(top_k=0, block_size=size)
    own = SampledRollout("teacher", max_new_tokens=ROOM, sampling=OPEN["teacher_sampling"])
    assert written.responses() == own.write(pack(), pair.student, pair.teacher, AT).responses()
    assert set().union(*writers(written)) == {Writer.TEACHER}


GREEDY = {"student_sampling": Sampling(0.0), "teacher_sampling": Sampling(0.0)}


def test_one_token_and_greedy_is_the_teachers_greedy_answer(pair):
    for sampling in ({"teacher_sampling": Sampling(0.0)}, GREEDY):  # whatever the student proposes
        written = pair.write(top_k=1, block_size=4, **sampling)
        own = SampledRollout("teacher", max_new_tokens=ROOM, sampling=Sampling(0.0))
        assert written.responses() == own.write(pack(), pair.student, pair.teacher, AT).responses()


class Vocabulary:
    """As much of a tokenizer as writing needs."""

    pad_token_id, name_or_path = 0, "toy"

    def __init__(self, size: int, eos_token_id: int | None) -> None:
        self.size, self.eos_token_id = size, eos_token_id

    def get_vocab(self) -> dict[str, int]:
        return {str(i): i for i in range(self.size)}


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 3, 4])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_model_beside_itself_writes_what_generate_does(name, size):
    """Greedily, in every family, batched with padding on the left (in float64 some have no
    products or write NaN behind padding, alone too).
    """
    model, tokenizer = family(name), Vocabulary(61, eos_token_id=7)
    pair = Pair(model, model, tokenizer)
    written = pair.write(top_k=1, block_size=size, max_new_tokens=12, **GREEDY)
    assert set().union(*writers(written)) == {Writer.STUDENT}  # all accepted
    for prompt, answer in zip(PROMPTS, written.responses(), strict=True):
        ids = torch.tensor([prompt])
        expected = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False,
            eos_token_id=sorted(end_ids(model, tokenizer)), pad_token_id=0,
        )  # fmt: skip
        assert answer == expected[0, len(prompt) :].tolist()


# ---- the law, by enumeration ----


SMALL = 7
LAW_SAMPLING = (Sampling(0.8), Sampling(0.6, top_k=3))  # of the student, of the teacher


def probabilities(model, ids, sampling):
    """What the sampler draws with which probability: (V,), float64."""
    with torch.no_grad():
        logits_1V = model(input_ids=torch.tensor([ids]), use_cache=False).logits[:, -1, :SMALL]
    tokens_V = torch.arange(SMALL)
    return log_prob(logits_1V.expand(SMALL, -1), sampling, tokens_V).double().exp(), logits_1V[0]


def law(accept, pair, ids):
    """P(y) = q(y) 1[y stays] + q(replaced) p(y), for one slot: (V,)."""
    q_V, _ = probabilities(pair.student.student, ids, LAW_SAMPLING[0])
    p_V, teacher_V = probabilities(pair.teacher.model, ids, LAW_SAMPLING[1])
    if isinstance(accept, Mixture):
        return accept.teacher_share * p_V + (1 - accept.teacher_share) * q_V
    ranked = sorted(range(SMALL), key=lambda i: (-float(teacher_V[i]), i))
    stay = (
        ranked[: accept.top_k]
        if isinstance(accept, TopK)
        else nucleus(teacher_V, ranked, accept.top_p)
    )
    inside_V = torch.tensor([i in stay for i in range(SMALL)])
    return q_V * inside_V + q_V[~inside_V].sum() * p_V


def nucleus(logits_V, ranked, p):
    mass = logits_V.softmax(-1)[ranked].cumsum(0).tolist()
    return ranked[: next(i for i, m in enumerate(mass) if m >= p) + 1]


@pytest.fixture(scope="module")
def small_pair():
    student, teacher = toy.model(rows=SMALL).double(), toy.teacher_model(rows=SMALL).double()
    for model in (student, teacher):
        model.lm_head.weight.data *= 1.2
    return Pair(student, teacher, Vocabulary(SMALL, eos_token_id=2))


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("accept", [TopK(1), TopK(3), TopP(0.7), Mixture(0.4)], ids=str)
def test_sequences_follow_the_law_slot_by_slot(small_pair, accept, size):
    """Three tokens behind one prompt, 6,000 rows: every sequence's count, by chi-square."""
    number = 6000
    rollout = InterleavedRollout(
        accept=accept, block_size=size, max_new_tokens=3,
        student_sampling=LAW_SAMPLING[0], teacher_sampling=LAW_SAMPLING[1],
    )  # fmt: skip
    prompts = Prompts.pack([[3, 5]] * number, range(number), pad_id=0)
    written = rollout.write(prompts, small_pair.student, small_pair.teacher, AT)
    expected: dict[tuple[int, ...], float] = {}

    def spread(answer, weight):
        if len(answer) == 3 or (answer and answer[-1] == 2):
            expected[tuple(answer)] = weight
            return
        for token, share in enumerate(law(accept, small_pair, [3, 5, *answer]).tolist()):
            spread([*answer, token], weight * share)

    spread([], 1.0)
    assert sum(expected.values()) == pytest.approx(1)
    counts = dict.fromkeys(expected, 0)
    for ids in written.responses():
        counts[tuple(ids)] += 1
    assert all(counts[answer] == 0 for answer, share in expected.items() if share == 0)
    common = {a: s * number for a, s in expected.items() if s * number >= 5}
    rare = number - sum(common.values())  # all the others are one more class
    table = [(counts[answer], mean) for answer, mean in common.items()]
    table += [(number - sum(counts[a] for a in common), rare)] * (rare >= 5)
    statistic = sum((found - mean) ** 2 / mean for found, mean in table)
    assert len(table) > 10
    assert statistic < chi2.ppf(0.999, len(table) - 1)


@pytest.mark.slow
def test_a_wider_rule_accepts_no_less(small_pair):
    """Expected acceptance is the student's mass inside the teacher's top K."""
    prompts = Prompts.pack([[3, 5]] * 3000, range(3000), pad_id=0)
    shares = []
    for k in range(SMALL + 1):
        rollout = InterleavedRollout(
            top_k=k, block_size=1, max_new_tokens=1, student_sampling=Sampling(0.8)
        )
        written = rollout.write(prompts, small_pair.student, small_pair.teacher, AT)
        shares.append(float((written.target_writers_N == Writer.STUDENT).double().mean()))
        q_V, _ = probabilities(small_pair.student.student, [3, 5], Sampling(0.8))
        _, teacher_V = probabilities(small_pair.teacher.model, [3, 5], Sampling())
        inside = teacher_V.topk(k).indices
        assert shares[-1] == pytest.approx(float(q_V[inside].sum()), abs=0.03)
    assert shares == sorted(shares)
    assert (shares[0], shares[-1]) == (0.0, 1.0)


def test_a_mixture_keeps_the_probability_with_which_it_wrote(pair):
    written = pair.write(accept=Mixture(0.3), block_size=4)
    assert written.writer_logprob_BT[~written.response_mask_BT].eq(0).all()
    for row, (prompt, answer) in enumerate(zip(PROMPTS, written.responses(), strict=True)):
        for slot in (0, 1, len(answer) - 1):
            found = written.writer_logprob_BT[row, len(prompt) + slot]
            text, token = prompt + answer[:slot], torch.tensor(answer[slot : slot + 1])
            p = log_prob(logits_after(pair.teacher.model, text), OPEN["teacher_sampling"], token)
            q = log_prob(logits_after(pair.student.student, text), OPEN["student_sampling"], token)
            assert float(found.exp()) == pytest.approx(float(0.3 * p.exp() + 0.7 * q.exp()))
    assert pair.write(top_k=3).writer_logprob_BT is None


def test_a_switch_happens_once(pair):
    written = pair.write(accept=Switch(factor=1.3, window=3), block_size=5)
    text = ["".join(map(str, who)) for who in writers(written)]
    assert all(re.fullmatch("2+1*", row) for row in text)
    assert sum("1" in row for row in text) >= 3


# ---- the teacher runs once ----


def test_the_states_that_come_along_are_those_of_judging_again():
    student, teacher = ending()
    pair = Pair(student, teacher, toy.tokenizer())
    for size in (1, 4):
        written = pair.write(top_k=3, block_size=size)
        assert len(set(written.num_predicted.tolist())) > 1  # ragged
        again = pair.teacher.judge(written, pair.teacher.provides)
        torch.testing.assert_close(
            written.signal.distribution.hidden_NH, again.distribution.hidden_NH, rtol=0, atol=1e-4
        )
        with_it, without = (pair.student(some) for some in (written, replace(written, signal=None)))
        torch.testing.assert_close(with_it.loss, without.loss, rtol=1e-5, atol=1e-5)


class Passes:
    """Counts a model's passes, with the number of rows and tokens of each."""

    def __init__(self, model) -> None:
        self.seen = []
        backbone, _ = split(model)
        backbone.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, module, args, kwargs):
        self.seen.append(tuple(kwargs["input_ids"].shape))


def test_a_block_is_a_pass_a_token_of_the_student_and_one_of_the_teacher():
    student, teacher = alike()
    pair = Pair(student, teacher, toy.tokenizer())
    drafted, judged = Passes(student), Passes(teacher)
    prompts = Prompts.pack([[5 + i, 6, 7] for i in range(8)], range(8), pad_id=0)
    rollout = InterleavedRollout(top_k=10, block_size=4, max_new_tokens=12, **OPEN)
    written = rollout.write(prompts, pair.student, pair.teacher, AT)
    reading, *blocks = judged.seen
    assert reading == (8, 2)
    assert all(width <= 4 for _, width in blocks)
    assert blocks[0] == (8, 4)
    assert len(drafted.seen) - 1 == sum(width for _, width in blocks) <= 4 * len(blocks)
    assert all(width == 1 for _, width in drafted.seen[1:])
    assert len(blocks) < written.num_predicted.max()  # or blocks would be for nothing
    assert int(written.teacher_passes_B.max()) == len(blocks)
    judged.seen.clear()
    pair.student(written)  # the loss
    assert judged.seen == []


def test_rows_that_have_ended_leave_the_batch():
    student, teacher = ending()
    pair = Pair(student, teacher, toy.tokenizer())
    judged = Passes(teacher)
    written = pair.write(top_k=10, block_size=2)
    lengths = sorted(written.num_predicted.tolist())
    assert lengths[0] < lengths[-1]
    rows = [rows for rows, _ in judged.seen]
    assert rows == sorted(rows, reverse=True)
    assert rows[-1] == sum(length == lengths[-1] for length in lengths) or rows[-1] < 5


# ---- ends and edges ----


@pytest.mark.parametrize("size", [1, 3, "auto"])
def test_a_rank_that_is_done_makes_the_passes_of_the_others(monkeypatch, size):
    """With sharded weights the other ranks wait for them.  They change no response."""
    pair = Pair(*ending(), toy.tokenizer())
    alone = pair.write(block_size=size).responses()
    passes = []
    pair.teacher.model.model.register_forward_hook(lambda *_: passes.append(1))
    # Another rank needs 40 blocks of 4 tokens, and this one at most ROOM blocks.
    needed = [4] * 40 + [0]
    monkeypatch.setattr(interleaved, "has_sharded_weights", lambda _: True)
    monkeypatch.setattr(interleaved, "largest", lambda own: max(own, needed.pop(0)))
    assert pair.write(block_size=size).responses() == alone
    assert len(passes) == 1 + 40


@pytest.mark.parametrize("size", [1, 3, 8])
def test_nothing_is_written_behind_an_end_and_the_end_is_trained(size):
    student, teacher = ending()
    pair = Pair(student.double(), teacher.double(), toy.tokenizer())
    written = pair.write(top_k=10, block_size=size)
    answers = written.responses()
    assert any(ids[-1] == 2 for ids in answers)
    assert all(2 not in ids[:-1] for ids in answers)
    assert all(len(ids) == ROOM for ids in answers if ids[-1] != 2)
    assert written.num_predicted.tolist() == [len(ids) for ids in answers]
    assert len(written.signal.distribution.hidden_NH) == sum(map(len, answers))


def test_an_end_that_the_teacher_refuses_is_replaced():
    """The student would end at once; the teacher never does."""
    student, teacher = toy.model(), toy.teacher_model()
    student.lm_head.weight.data[2] = 0
    tokenizer = toy.tokenizer()
    pair = Pair(student, teacher, tokenizer)
    bias = torch.zeros(toy.NUM_TOKENS + 5)

    def ends(module, inputs, logits):
        return logits.index_fill(-1, torch.tensor([2]), 1e4) + bias

    def never(module, inputs, logits):
        return logits.index_fill(-1, torch.tensor([2]), -1e4)

    handles = [
        student.lm_head.register_forward_hook(ends),
        teacher.lm_head.register_forward_hook(never),
    ]
    written = pair.write(top_k=toy.NUM_TOKENS - 1, block_size=3)
    for handle in handles:
        handle.remove()
    assert all(len(ids) == ROOM and 2 not in ids for ids in written.responses())
    assert set().union(*writers(written)) == {Writer.TEACHER}


@pytest.mark.parametrize("room", [1, 2, 7])
def test_an_answer_ends_in_the_middle_of_a_block_when_it_is_full(pair, book, room):
    written = pair.write(accept=TopK(3), block_size=5, max_new_tokens=room)
    assert written.responses() == [ids[:room] for ids, _ in book[TopK(3)]]


def test_what_either_calls_an_end_ends_an_answer():
    student, teacher = alike()
    teacher.generation_config.eos_token_id = [2, *range(100, 180)]
    answers = Pair(student, teacher, toy.tokenizer()).write(top_k=10).responses()
    assert any(100 <= ids[-1] < 180 for ids in answers)
    assert not any(100 <= token < 180 for ids in answers for token in ids[:-1])


def test_no_token_without_a_meaning_is_written():
    """The heads have more rows than the tokenizer has ids."""
    student, teacher = alike()
    for model in (student, teacher):
        model.lm_head.weight.data[toy.NUM_TOKENS :] *= 50
    answers = Pair(student, teacher, toy.tokenizer()).write(top_k=5, block_size=3).responses()
    assert max(map(max, answers)) < toy.NUM_TOKENS


def test_the_models_are_left_as_they_were():
    student, teacher = toy.model(attention_dropout=0.5), toy.teacher_model()
    pair = Pair(student, teacher, toy.tokenizer())
    student.train()
    before = [p.detach().clone() for m in (student, teacher) for p in m.parameters()]
    state = torch.get_rng_state()
    written = pair.write(top_k=5, block_size=3)
    assert student.training
    assert not teacher.training
    assert torch.equal(torch.get_rng_state(), state)
    after = [p for m in (student, teacher) for p in m.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
    assert not written.signal.distribution.hidden_NH.requires_grad
    assert all("forward" not in module.__dict__ for module in student.modules())


# ---- layers that count columns ----


def sliding_pair():
    teacher = sliding("Mistral", window=6, initializer_range=0.3)
    return Pair(toy.model().double(), teacher, toy.tokenizer())


def test_beside_a_window_blocks_are_of_one_token():
    """A window that is passed, rows of all lengths, some of which end."""
    pair = sliding_pair()
    judged = Passes(pair.teacher.model)
    written = pair.write(accept=TopK(25), block_size=5)
    assert {width for _, width in judged.seen[1:]} == {1}
    expected = [by_the_book(pair, row, TopK(25)) for row in range(5)]
    assert written.responses() == [ids for ids, _ in expected]
    assert writers(written) == [who for _, who in expected]


# ---- what cannot be ----


def test_a_teacher_that_cannot_be_stepped_is_named(pair):
    class Remote:
        write = judge = None

    with pytest.raises(
        RecipeError, match="a Remote has no 'session' method. Use a teacher of kind local"
    ):
        InterleavedRollout().write(pack(), pair.student, Remote(), AT)


def test_two_rules_or_a_continuous_sampler_are_refused():
    with pytest.raises(
        RecipeError, match="cannot be combined with another acceptance rule. .* not both"
    ):
        InterleavedRollout(top_k=3, accept=TopP(0.9))
    with pytest.raises(RecipeError, match="does not support continuous batching"):
        InterleavedRollout(student_sampling=Sampling(continuous=True))


# ---- in a mixture ----


def test_a_mixture_of_both_and_the_data_set(pair):
    """mixed_skd: a step is interleaved, or the dataset's."""
    prompts = Prompts.pack(PROMPTS, ROW_IDS, pad_id=0, responses=[[40, 2]] * 5)
    rollout = MixedRollout(
        InterleavedRollout(max_new_tokens=4, block_size=2, **OPEN), FixedRollout()
    )
    seen = set()
    for step in range(12):
        written = rollout.write(prompts, pair.student, pair.teacher, Progress(step, 0, 3))
        assert (written.signal is None) == (written.responses()[0] == [40, 2])
        seen.add(written.signal is None)
    assert seen == {True, False}


def test_all_block_sizes_come_up_in_auto(pair):
    """The first blocks try what there is to choose from."""
    rollout = InterleavedRollout(top_k=toy.NUM_TOKENS, max_new_tokens=120, **OPEN)
    judged = Passes(pair.teacher.model)
    rollout.write(pack(), pair.student, pair.teacher, AT)
    widths = [width for _, width in judged.seen[1:]]
    assert {1, 2, 4, 8} <= set(widths)
    assert widths[:4] == [4, 1, 8, 2]


def test_sessions_of_one_model_do_not_disturb_each_other(pair):
    model, tokenizer = pair.teacher.model, toy.tokenizer()
    prompts = pack()
    with session(model, tokenizer, prompts) as one, session(model, tokenizer, prompts) as other:
        first = one.extend(prompts.input_ids_BP[:, -1:])
        other.extend(torch.full((5, 3), 9))
        again = one.extend(torch.full((5, 1), 11))
    with session(model, tokenizer, prompts) as alone:
        torch.testing.assert_close(alone.extend(prompts.input_ids_BP[:, -1:]), first)
        torch.testing.assert_close(alone.extend(torch.full((5, 1), 11)), again)


def test_logits_are_held_a_few_rows_at_a_time(pair, book, monkeypatch):
    monkeypatch.setattr("llmdistill.rollouts.interleaved.LOGITS", 2 * 5 * toy.NUM_TOKENS + 7)
    for accept in (TopK(3), Mixture(0.3), Switch(factor=1.3, window=3)):
        written = pair.write(accept=accept, block_size=5)
        assert written.responses() == [ids for ids, _ in book[accept]]
        assert writers(written) == [who for _, who in book[accept]]


def test_an_answer_may_fill_the_context():
    """Learned positions end with it; a block may not read behind them."""
    student, teacher = (family("GPT2", n_positions=32, vocab_size=toy.NUM_TOKENS) for _ in range(2))
    torch.manual_seed(0)
    student, teacher = (
        student.double(),
        teacher.double(),
    )
    pair = Pair(student, teacher, toy.tokenizer())
    prompts = Prompts.pack([[5] * 12, [6] * 9, [7] * 12], range(3), pad_id=0)
    answers = []
    for size in (1, 5, 8, "auto"):
        rollout = InterleavedRollout(top_k=60, block_size=size, max_new_tokens=20, **OPEN)
        answers.append(rollout.write(prompts, pair.student, pair.teacher, AT).responses())
        assert answers[-1] == answers[0]
    assert max(map(len, answers[0])) == 20


def test_under_autocast_the_teacher_judges_in_its_own_precision():
    student, teacher = alike()
    pair = Pair(student, teacher, toy.tokenizer())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        written = pair.write(top_k=10, block_size=3)
    assert written.signal.distribution.hidden_NH.dtype == torch.float32
    again = pair.teacher.judge(written, pair.teacher.provides)
    torch.testing.assert_close(
        written.signal.distribution.hidden_NH, again.distribution.hidden_NH, rtol=0, atol=1e-4
    )


@pytest.mark.parametrize("option", ["block_size", "max_new_tokens"])
def test_no_block_and_no_answer_is_empty(option):
    with pytest.raises(RecipeError, match=f"rollout.{option} should be 1 or more, got 0"):
        InterleavedRollout(**{option: 0})
