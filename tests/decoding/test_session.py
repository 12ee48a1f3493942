"""A cache that takes tokens back, row by row, is the cache that never had them."""

from __future__ import annotations

import contextlib
import itertools

import pytest
import torch
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    Lfm2Config,
    Lfm2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MptConfig,
    MptForCausalLM,
)

from llmdistill.batch import Prompts
from llmdistill.decoding.session import HOLES, Session, _columns, can_hold_holes
from llmdistill.errors import ModelError
from llmdistill.models.heads import split
from tests import toy
from tests.support.models import FAMILIES, family, sliding

PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13], [20, 21, 22, 23]]


def pack(prompts):
    return Prompts.pack(prompts, range(len(prompts)), pad_id=0)


def draft(width: int, seed: int = 0, rows: int = 4):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, toy.NUM_TOKENS, (rows, width), generator=generator)


def hidden(model, ids):
    """The final hidden states of one row, without a cache: (T, H)."""
    backbone, _ = split(model)
    with torch.no_grad():
        return backbone(input_ids=torch.tensor([ids]), use_cache=False).last_hidden_state[0]


def start(model, prompts=PROMPTS):
    """A session that has read its prompts whole."""
    batch = pack(prompts)
    session = Session(model, toy.tokenizer(), batch)
    session.extend(batch.input_ids_BP[:, -1:])
    return session


@pytest.fixture
def exact():
    return toy.model().double()


def test_stepping_greedily_is_generate(exact):
    batch = pack(PROMPTS)
    session, head = Session(exact, toy.tokenizer(), batch), split(exact)[1]
    ids_B1, written = batch.input_ids_BP[:, -1:], []
    for _ in range(10):
        ids_B1 = head(session.extend(ids_B1)[:, -1]).argmax(-1)[:, None]
        written.append(ids_B1)
    exact.generation_config.eos_token_id = None
    for row, prompt in enumerate(PROMPTS):
        ids = torch.tensor([prompt])
        expected = exact.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=10, do_sample=False
        )
        assert torch.cat(written, 1)[row].tolist() == expected[0, len(prompt) :].tolist()


def test_extending_by_many_is_extending_one_by_one(exact):
    ids_BG = draft(6)
    together, stepwise = start(exact), start(exact)
    whole = together.extend(ids_BG)
    parts = torch.cat([stepwise.extend(ids_BG[:, i : i + 1]) for i in range(6)], 1)
    torch.testing.assert_close(whole, parts)
    for row, prompt in enumerate(PROMPTS):
        expected = hidden(exact, prompt + ids_BG[row].tolist())[len(prompt) :]
        torch.testing.assert_close(whole[row], expected)


def test_the_first_extension_predicts_the_first_response_token(exact):
    batch = pack(PROMPTS)
    session = Session(exact, toy.tokenizer(), batch)
    assert session.length_B.tolist() == [len(prompt) - 1 for prompt in PROMPTS]
    found = session.extend(batch.input_ids_BP[:, -1:])
    assert found.shape == (4, 1, 32)
    for row, prompt in enumerate(PROMPTS):
        torch.testing.assert_close(found[row, 0], hidden(exact, prompt)[-1])


def test_one_token_prompts_start_from_an_empty_cache(exact):
    session = Session(exact, toy.tokenizer(), pack([[8], [9]]))
    assert session.length_B.tolist() == [0, 0]
    torch.testing.assert_close(session.extend(torch.tensor([[8], [9]]))[1], hidden(exact, [9]))


def test_with_sharded_weights_one_token_prompts_make_the_pass_of_longer_ones(exact, monkeypatch):
    """FSDP2: the other ranks wait for it."""
    expected = start(exact, [[7], [9]]).extend(draft(2, rows=2))
    monkeypatch.setattr("llmdistill.decoding.session.has_sharded_weights", lambda _: True)
    passes = []
    exact.model.register_forward_hook(lambda *_: passes.append(1))
    found = start(exact, [[7], [9]]).extend(draft(2, rows=2))
    assert len(passes) == 3
    torch.testing.assert_close(found, expected)


def test_going_on_after_keep_is_a_fresh_start_row_by_row(exact):
    """Three rounds of different lengths: holes on holes."""
    session = start(exact)
    rows = [list(prompt) for prompt in PROMPTS]
    for round_, kept in enumerate([[5, 0, 2, 1], [0, 3, 4, 4], [2, 2, 0, 5]]):
        ids_BG = draft(5, seed=round_)
        found = session.extend(ids_BG)
        for row, ids in enumerate(rows):
            expected = hidden(exact, ids + ids_BG[row].tolist())[len(ids) :]
            torch.testing.assert_close(found[row], expected)
            ids += ids_BG[row, : kept[row]].tolist()
        session.keep(torch.tensor([len(ids) for ids in rows]))
        assert session.length_B.tolist() == [len(ids) for ids in rows]


def test_what_was_taken_back_would_have_mattered(exact):
    """Guards the test above: without `keep`, the states are others."""
    kept, whole = start(exact), start(exact)
    for session in (kept, whole):
        session.extend(draft(5))
    kept.keep(torch.tensor([len(prompt) for prompt in PROMPTS]))
    assert (kept.extend(draft(1, 9)) - whole.extend(draft(1, 9))).abs().max() > 1e-2


def test_the_tail_that_no_row_keeps_is_cut_off(exact, monkeypatch):
    monkeypatch.setattr("llmdistill.decoding.session.HOLES", 1.0)
    session = start(exact)
    assert session._cache.get_seq_length() == 5
    session.extend(draft(6))
    assert session._cache.get_seq_length() == 11
    session.keep(
        torch.tensor([len(prompt) + n for prompt, n in zip(PROMPTS, [1, 4, 0, 2], strict=True)])
    )
    assert session._cache.get_seq_length() == 9
    session.keep(torch.tensor([len(prompt) for prompt in PROMPTS]))
    assert session._cache.get_seq_length() == 5


def test_keeping_more_than_there_is_keeps_all(exact):
    session = start(exact)
    session.extend(draft(3))
    session.keep(torch.full((4,), 99))
    assert session.length_B.tolist() == [len(prompt) + 3 for prompt in PROMPTS]
    assert session._cache.get_seq_length() == 8


def test_keep_can_take_back_prompt_tokens(exact):
    session = start(exact)
    session.keep(torch.tensor([2, 1, 2, 3]))
    found = session.extend(draft(2))
    for row, length in enumerate([2, 1, 2, 3]):
        ids = PROMPTS[row][:length] + draft(2)[row].tolist()
        torch.testing.assert_close(found[row], hidden(exact, ids)[length:])


def test_keeping_nothing_empties_the_cache(exact):
    session = start(exact)
    session.keep(torch.zeros(4, dtype=torch.long))
    assert session.length_B.tolist() == [0] * 4
    assert session._cache.get_seq_length() == 0
    torch.testing.assert_close(session.extend(draft(2))[3], hidden(exact, draft(2)[3].tolist()))


@pytest.mark.parametrize("gone", [[1], [0, 2], [3, 1, 0]])
def test_dropped_rows_leave_the_others_as_they_were(exact, gone):
    session = start(exact)
    session.extend(draft(3))
    kept = [5, 2, 5, 7]
    session.keep(torch.tensor(kept))
    session.drop(torch.tensor(gone))
    stay = [row for row in range(4) if row not in gone]
    assert session.length_B.tolist() == [kept[row] for row in stay]
    found = session.extend(draft(2, 1)[stay])
    for place, row in enumerate(stay):
        ids = (PROMPTS[row] + draft(3)[row].tolist())[: kept[row]] + draft(2, 1)[row].tolist()
        torch.testing.assert_close(found[place], hidden(exact, ids)[-2:])


def test_dropping_no_row_changes_nothing(exact):
    session = start(exact)
    session.drop(torch.tensor([], dtype=torch.long))
    assert session.length_B.tolist() == [len(prompt) for prompt in PROMPTS]


def test_a_session_keeps_no_gradient():
    assert not start(toy.model()).extend(draft(1)).requires_grad


@pytest.mark.parametrize("family", ["Gemma2", "Mistral"])
def test_layers_with_a_window_refuse_holes(family):
    """The window counts columns: with holes in it, a row would see too little."""
    session = start(sliding(family, window=6), [[5, 6], [7, 8]])
    session.extend(draft(3, rows=2))
    with pytest.raises(
        ModelError, match=f"{family}ForCausalLM cannot remove tokens from its cache"
    ):
        session.keep(torch.tensor([5, 3]))


@pytest.mark.parametrize("family", ["Gemma2", "Mistral"])
def test_layers_with_a_window_step_as_they_should(family):
    model = sliding(family)
    prompts = [[5, 6, 7, 8, 9, 10], [7, 8, 9, 10, 11, 12]]
    session, ids_BG = start(model, prompts), draft(5, rows=2)
    for column in range(5):
        found = session.extend(ids_BG[:, column : column + 1])
        for row in range(2):
            ids = prompts[row] + ids_BG[row, : column + 1].tolist()
            torch.testing.assert_close(found[row], hidden(model, ids)[-1:], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ["Gemma2", "Mistral"])
def test_a_window_that_is_full_takes_nothing_back_or_says_so(family):
    """What left the window is gone: going on must be right or refused, never silently wrong."""
    model = sliding(family)
    prompts = [[5, 6, 7, 8, 9, 10], [7, 8, 9, 10, 11, 12]]
    session, ids_BG = start(model, prompts), draft(3, rows=2)
    session.extend(ids_BG)
    try:
        session.keep(torch.tensor([7, 7]))
        found = session.extend(draft(1, 5, rows=2))
    except ModelError:
        return
    for row in range(2):
        ids = [*prompts[row], int(ids_BG[row, 0]), int(draft(1, 5, rows=2)[row, 0])]
        torch.testing.assert_close(found[row], hidden(model, ids)[-1:], atol=1e-5, rtol=1e-4)


# ---- rows that move together ----


def test_rows_close_up_when_too_many_columns_are_holes(exact):
    """Blocks of 6 of which a row keeps one or two: most of the cache would be holes."""
    session = start(exact)
    rows = [list(prompt) for prompt in PROMPTS]
    widths = []
    for round_ in range(6):
        ids_BG = draft(6, seed=round_)
        found = session.extend(ids_BG)
        for row, ids in enumerate(rows):
            expected = hidden(exact, ids + ids_BG[row].tolist())[len(ids) :]
            torch.testing.assert_close(found[row], expected)
            ids += ids_BG[row, : 1 + (row + round_) % 2 + 3 * (row == round_ % 4)].tolist()
        session.keep(torch.tensor([len(ids) for ids in rows]))
        assert session.length_B.tolist() == [len(ids) for ids in rows]
        widths.append(session._cache.get_seq_length())
    longest = max(len(ids) for ids in rows)
    assert widths[-1] <= longest / (1 - HOLES)
    assert any(after < before + 5 for before, after in itertools.pairwise(widths))


def test_rows_stay_where_they_are_while_holes_are_few(exact, monkeypatch):
    moved = []
    monkeypatch.setattr(
        "llmdistill.decoding.session._columns", lambda *args: moved.append(1) or args[0]
    )
    session = start(exact)
    session.extend(draft(4))
    session.keep(torch.tensor([7, 4, 9, 8]))  # 9 columns; the longest row fills them
    assert moved == []


@pytest.mark.parametrize("compact", [True, False])
def test_values_of_another_size_than_keys_move_too(exact, monkeypatch, compact):
    monkeypatch.setattr("llmdistill.decoding.session.HOLES", 0.0 if compact else 1.0)
    states = torch.arange(2 * 1 * 4 * 3.0).reshape(2, 1, 4, 3)
    order = torch.tensor([[1, 3], [0, 2]])
    assert torch.equal(_columns(states, order)[1, 0], states[1, 0, [0, 2]])
    session = start(exact)
    session.extend(draft(4))
    session.keep(torch.tensor([3, 2, 6, 4]))
    expected = hidden(exact, PROMPTS[2] + draft(4)[2, :1].tolist() + [9])[-1]
    torch.testing.assert_close(session.extend(torch.full((4, 1), 9))[2, 0], expected)


def test_a_model_without_a_cache_of_its_tokens_is_refused():
    """A Mamba keeps states, not tokens."""
    config = MambaConfig(vocab_size=toy.NUM_TOKENS, hidden_size=16, num_hidden_layers=2)
    model = MambaForCausalLM(config).eval()
    with pytest.raises(ModelError, match="MambaForCausalLM does not keep its tokens"):
        start(model)


# ---- scores ----


def test_logits_are_the_models_own_over_the_ids_that_mean_something():
    batch = pack(PROMPTS)
    for name in FAMILIES:
        model = family(name)
        tokenizer = toy.tokenizer()
        session = Session(model, tokenizer, batch)
        session.num_tokens = 50  # of 61
        found = session.logits(session.extend(batch.input_ids_BP[:, -1:]))
        assert found.shape == (4, 1, 50)
        with torch.no_grad():
            expected = model(input_ids=torch.tensor([PROMPTS[2]]), use_cache=False).logits[0, -1]
        torch.testing.assert_close(found[2, 0], expected[:50], rtol=1e-4, atol=1e-4)


def test_each_pass_runs_within_its_context():
    entered = []

    @contextlib.contextmanager
    def within():
        entered.append(1)
        yield

    batch = pack(PROMPTS)
    session = Session(toy.model(), toy.tokenizer(), batch, within=within)
    states = session.extend(batch.input_ids_BP[:, -1:])
    session.logits(states)
    assert len(entered) == 3  # the prompt, the token, the scores


# ---- who can take tokens back ----


SMALL = {"vocab_size": toy.NUM_TOKENS, "num_hidden_layers": 2, "pad_token_id": 0}


def neo():
    sizes = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "vocab_size": toy.NUM_TOKENS}
    kinds = [[["global", "local"], 1]]
    return GPTNeoForCausalLM(GPTNeoConfig(**sizes, attention_types=kinds, window_size=6))


def mpt():
    return MptForCausalLM(MptConfig(d_model=32, n_heads=4, n_layers=2, vocab_size=toy.NUM_TOKENS))


def bloom():
    return BloomForCausalLM(BloomConfig(hidden_size=32, n_head=4, n_layer=2, vocab_size=264))


@pytest.mark.parametrize(("build", "can"), [(neo, False), (mpt, False), (bloom, True)])
def test_families_that_count_columns_are_found_out(build, can):
    """By their config, or (biases by distance) by numbers."""
    torch.manual_seed(0)
    model = build().eval()
    for parameter in model.parameters():
        parameter.data *= 4  # far from flat
    session = start(model)
    assert session.can_hold_holes is can
    session.extend(draft(3))
    if can:
        session.keep(torch.tensor([3, 2, 6, 4]))
    else:
        with pytest.raises(ModelError, match="Use block size 1"):
            session.keep(torch.tensor([3, 2, 6, 4]))


def test_the_trial_is_made_once_and_leaves_the_model_as_it_was():
    model = toy.model(attention_dropout=0.5).train()
    passes = []
    model.model.register_forward_pre_hook(lambda *args: passes.append(1))
    assert can_hold_holes(model)
    assert can_hold_holes(model)
    assert len(passes) == 3
    assert model.training


def hybrid():
    """Layers with a state of their own beside one that attends."""
    config = Lfm2Config(
        **SMALL, hidden_size=32, intermediate_size=48, num_attention_heads=4,
        num_key_value_heads=2, layer_types=["conv", "full_attention"], block_auto_adjust_ff_dim=False,
    )  # fmt: skip
    torch.manual_seed(0)
    return Lfm2ForCausalLM(config).eval()


def test_rows_of_a_hybrid_leave_with_their_states():
    model = hybrid()
    prompts = [prompt * 2 for prompt in PROMPTS]
    session = start(model, prompts)
    session.extend(draft(1))
    session.drop(torch.tensor([0, 2]))
    found = session.extend(draft(1, 1)[[1, 3]])
    for place, row in enumerate((1, 3)):
        ids = prompts[row] + [int(draft(1)[row]), int(draft(1, 1)[row])]
        torch.testing.assert_close(found[place, 0], hidden(model, ids)[-1], rtol=1e-3, atol=1e-4)


def test_tokens_beyond_the_last_position_are_read_as_if_they_stood_there():
    """They will be given back; what stands before them is as it should be."""
    model = family("GPT2", n_positions=8, vocab_size=toy.NUM_TOKENS)
    session = start(model)
    found = session.extend(draft(6), torch.tensor([7, 7, 7, 7]))
    for row in (0, 2):
        ids = (PROMPTS[row] + draft(6)[row].tolist())[:8]
        kept = len(ids) - len(PROMPTS[row])
        expected = hidden(model, ids)[len(PROMPTS[row]) :]
        torch.testing.assert_close(found[row, :kept], expected, rtol=1e-4, atol=1e-5)
