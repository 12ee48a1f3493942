"""A model's answers: those of `generate`, in any batch, whatever its own generation config says."""

from __future__ import annotations

import pytest
import torch

from llmdistill.batch import Prompts
from llmdistill.decoding.sample import sample
from llmdistill.forward import read
from llmdistill.models.heads import eval_mode, split
from llmdistill.sampling import Draw, Sampling, Writer
from tests import toy

pytestmark = pytest.mark.upgrade
END = 2
PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13], [5, 6, 7, 8], [200, 3]]
ROWS = [4, 0, 9, 2, 7]
GREEDY = Sampling(temperature=0)


def exact(**options):
    """In float64 the batch a row stands in does not change its tokens by rounding."""
    return toy.model(**options).double()


def write(model, sampling=GREEDY, *, places=range(5), max_new_tokens=12, draw=None, **options):
    prompts = Prompts.pack([PROMPTS[i] for i in places], [ROWS[i] for i in places], pad_id=0)
    return sample(
        model,
        toy.tokenizer(),
        prompts,
        sampling,
        max_new_tokens=max_new_tokens,
        draw=draw or Draw(seed=5),
        writer=options.get("writer", Writer.STUDENT),
        keep_states=options.get("keep_states", False),
    )


def greedy_alone(model, prompt, **options) -> list[int]:
    ids = torch.tensor([prompt])
    options = {"max_new_tokens": 12, "do_sample": False} | options
    return model.generate(ids, attention_mask=torch.ones_like(ids), **options)[
        0, len(prompt) :
    ].tolist()


def ends_early(model, token: int):
    """The model with one more end token, which it is known to write."""
    model.generation_config.eos_token_id = [END, token]
    return model


# ---- what is written ----


@torch.no_grad()
def test_the_states_it_wrote_from_are_those_of_a_forward_pass():
    """Answers end at different places, and the states follow them row by row."""
    model = exact()
    written = write(ends_early(model, greedy_alone(model, PROMPTS[0])[4]), keep_states=True)
    assert len(set(written.num_predicted.tolist())) > 1
    _, head = split(model)
    expected_NH = read(model, written, toy.NUM_TOKENS).hidden_NH
    torch.testing.assert_close(
        written.signal.distribution.hidden_NH, expected_NH, rtol=1e-6, atol=1e-9
    )
    assert torch.equal(written.signal.distribution.head.weight_VH, head.weight_VH)
    assert write(model).signal is None


def test_greedy_is_generate_row_by_row():
    model = exact()
    written = write(model)
    expected = [greedy_alone(model, prompt) for prompt in PROMPTS]
    assert written.responses() == expected
    assert len({tuple(ids) for ids in expected}) == 5


def test_what_comes_back_is_packed_behind_the_prompts():
    written = write(exact())
    assert written.row_ids_B.tolist() == ROWS
    for row, prompt in enumerate(PROMPTS):
        length = int(written.attention_mask_BT[row].sum())
        assert written.input_ids_BT[row, : len(prompt)].tolist() == prompt
        assert written.response_mask_BT[row].nonzero()[:, 0].tolist() == list(
            range(len(prompt), length)
        )
    assert written.writer_BT[written.response_mask_BT].eq(Writer.STUDENT).all()
    assert written.writer_BT[~written.response_mask_BT].eq(Writer.DATA).all()


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.8, 0.9, 40), Sampling(1.5)])
def test_a_row_gets_the_same_tokens_alone_and_in_any_batch(sampling):
    model = exact()
    whole = write(model, sampling).responses()
    assert len({tuple(ids) for ids in whole}) == 5
    for places in ([0], [3], [4, 1], [2, 0, 4, 3, 1]):
        assert write(model, sampling, places=places).responses() == [whole[i] for i in places]


def test_a_longer_answer_begins_with_the_shorter():
    model = exact()
    short, long = (write(model, Sampling(), max_new_tokens=n).responses() for n in (4, 12))
    assert [ids[:4] for ids in long] == short


@pytest.mark.parametrize(
    "other",
    [
        {"draw": Draw(6)},
        {"draw": Draw(5, epoch=1)},
        {"draw": Draw(5, sample=1)},
        {"writer": Writer.TEACHER},
    ],
    ids=["seed", "epoch", "sample", "writer"],
)
def test_another_draw_writes_other_tokens(other):
    model = exact()
    first, second = write(model, Sampling()), write(model, Sampling(), **other)
    for one, two in zip(first.responses(), second.responses(), strict=True):
        assert one != two


def test_each_row_may_have_a_sample_of_its_own():
    model = exact()
    mixed = write(model, Sampling(), draw=Draw(5, sample=(0, 1, 0, 1, 2))).responses()
    for row, k in enumerate((0, 1, 0, 1, 2)):
        assert mixed[row] == write(model, Sampling(), draw=Draw(5, sample=k)).responses()[row]


def test_first_tokens_follow_the_models_distribution():
    """The noise meets the logits of the right place: chi-square over many samples of one prompt."""
    model, total = exact(hidden=16, layers=1, rows=toy.NUM_TOKENS), 3000
    with torch.no_grad():
        logits_V = model(torch.tensor([[5, 6, 7]])).logits[0, -1].float()
    expected = total * logits_V.softmax(-1)
    prompts = Prompts.pack([[5, 6, 7]] * total, [1] * total, pad_id=0)
    written = sample(
        model,
        toy.tokenizer(),
        prompts,
        Sampling(),
        max_new_tokens=1,
        draw=Draw(0, sample=tuple(range(total))),
        writer=Writer.STUDENT,
    )
    counts = torch.tensor(written.responses())[:, 0].bincount(minlength=len(expected))
    common = expected > 5
    freedom = int(common.sum())  # with all the rest as one more cell
    seen, wanted = (
        torch.cat([x[common], x[~common].sum()[None]]) for x in (counts.float(), expected)
    )
    statistic = ((seen - wanted) ** 2 / wanted).sum()
    assert freedom > 20
    assert statistic < freedom + 4 * (2 * freedom) ** 0.5


# ---- the end ----


def test_nothing_stands_behind_the_end_token_and_it_is_kept():
    model = exact()
    answers = write(model).responses()
    token = answers[2][3]  # row 2 now ends here at the latest
    written = write(ends_early(model, token)).responses()
    for answer, full in zip(written, answers, strict=True):
        cut = full.index(token) + 1 if token in full else len(full)
        assert answer == full[:cut]
    assert written[2][-1] == token
    assert len({len(answer) for answer in written}) > 1


def test_the_tokenizers_end_token_ends_an_answer_too():
    model = exact()
    token = write(model).responses()[0][2]
    tokenizer = toy.tokenizer()
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(token)
    prompts = Prompts.pack(PROMPTS[:1], [0], pad_id=0)
    written = sample(
        model,
        tokenizer,
        prompts,
        GREEDY,
        max_new_tokens=12,
        draw=Draw(0),
        writer=Writer.TEACHER,
    )
    assert written.responses()[0][-1] == token
    assert len(written.responses()[0]) <= 3


def test_an_answer_that_does_not_end_is_cut():
    assert [len(ids) for ids in write(exact(), max_new_tokens=3).responses()] == [3] * 5


# ---- what must not change it ----


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("do_sample", True),
        ("temperature", 0.01),
        ("top_k", 1),
        ("top_p", 0.01),
        ("typical_p", 0.1),
        ("num_beams", 3),
        ("num_return_sequences", 2),
        ("repetition_penalty", 5.0),
        ("no_repeat_ngram_size", 1),
        ("min_length", 30),
        ("min_new_tokens", 12),
        ("max_length", 4),
        ("max_time", 1e-9),
        ("stop_strings", "a"),
        ("bad_words_ids", [[i] for i in range(3, 200)]),
        ("suppress_tokens", list(range(3, 200))),
        ("begin_suppress_tokens", list(range(3, 200))),
        ("sequence_bias", [[[7], 50.0]]),
        ("forced_bos_token_id", 5),
        ("forced_eos_token_id", 2),
        ("exponential_decay_length_penalty", (1, 5.0)),
        ("guidance_scale", 3.0),
        ("renormalize_logits", True),
        ("watermarking_config", {"greenlist_ratio": 0.25, "bias": 20.0}),
        ("prompt_lookup_num_tokens", 3),
        ("token_healing", True),
        ("use_cache", False),
        ("return_dict_in_generate", True),
    ],
)
def test_the_models_own_generation_config_changes_nothing(field, value):
    model, plain = exact(), write(exact(), Sampling()).responses()
    setattr(model.generation_config, field, value)
    assert write(model, Sampling()).responses() == plain
    assert getattr(model.generation_config, field) == value


def test_padding_rows_of_a_head_are_never_written():
    model = exact(tie_word_embeddings=False)
    plain = [write(model, sampling).responses() for sampling in (GREEDY, Sampling())]
    with torch.no_grad():
        model.lm_head.weight[toy.NUM_TOKENS :] = 1e3 * model.lm_head.weight[:5]
    assert greedy_alone(model, PROMPTS[0])[0] >= toy.NUM_TOKENS  # generate itself writes them
    assert [write(model, sampling).responses() for sampling in (GREEDY, Sampling())] == plain


def test_the_models_mode_does_not_matter_and_is_restored():
    """Dropout of one half would change every answer."""
    model = exact(attention_dropout=0.5)
    plain = write(model).responses()
    model.train()
    model.model.layers[1].eval()
    before = [module.training for module in model.modules()]
    assert any(before)
    assert not all(before)
    assert write(model).responses() == plain
    assert [module.training for module in model.modules()] == before


def test_the_mode_is_restored_after_an_error():
    model = toy.model().train()
    model.lm_head.eval()
    before = [module.training for module in model.modules()]
    mode = eval_mode(model)
    mode.__enter__()
    assert not any(module.training for module in model.modules())
    mode.__exit__(RuntimeError, RuntimeError(), None)
    assert [module.training for module in model.modules()] == before


@pytest.mark.parametrize("sampling", [GREEDY, Sampling()])
def test_the_global_generator_is_neither_read_nor_moved(sampling):
    model = exact()
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = write(model, sampling).responses()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert write(model, sampling).responses() == first


def test_no_gradient_is_kept():
    model = toy.model()
    assert next(model.parameters()).requires_grad
    assert not write(model).input_ids_BT.requires_grad
    assert all(p.grad is None for p in model.parameters())


def test_linear_layers_are_put_back():
    model = toy.model()
    write(model)
    assert not any("forward" in module.__dict__ for module in model.modules())
