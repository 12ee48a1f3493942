"""Encoded rows as a dataset, split the same way each time, and as batches of prompts."""

from __future__ import annotations

import json

import pytest
import torch

from llmdistill.data.build import build_rows
from llmdistill.data.collate import PromptDataset, PromptStream, collate, fingerprint
from llmdistill.data.table import Row, question
from llmdistill.data.validate import RowCounts, Rules
from llmdistill.errors import DataError, RecipeError
from llmdistill.recipe import DataRecipe, SourceRecipe
from tests import toy
from tests.support.files import write_jsonl

ROWS = [Row(4, [5, 6, 7], [8]), Row(9, [0], [10, 2]), Row(1, [12, 13], [14, 15, 0])]


def numbered(count: int) -> PromptDataset:
    return PromptDataset([Row(i, [i + 3], None) for i in range(count)])


def ids(data: PromptDataset) -> list[int]:
    return [row.row_id for row in data.rows]


def test_prompts_are_padded_on_the_left():
    batch = collate(ROWS)
    assert batch.input_ids_BP.tolist() == [[5, 6, 7], [0, 0, 0], [0, 12, 13]]
    assert batch.attention_mask_BP.tolist() == [[1, 1, 1], [0, 0, 1], [0, 1, 1]]
    assert batch.row_ids_B.tolist() == [4, 9, 1]
    assert batch.responses == ((8,), (10, 2), (14, 15, 0))
    assert {t.dtype for t in (batch.input_ids_BP, batch.attention_mask_BP, batch.row_ids_B)} == {
        torch.long
    }


def test_a_prompt_token_that_looks_like_padding_is_kept():
    assert collate(ROWS).ids() == [[5, 6, 7], [0], [12, 13]]


def test_one_row_without_an_answer_takes_them_all():
    """All or none: a batch with a few would train on those few, silently."""
    assert collate([*ROWS, Row(2, [3], None)]).responses is None


def test_rows_are_encoded_whatever_form_they_come_in(tokenizer):
    assert PromptDataset.of(None, tokenizer) is None
    data = numbered(2)
    assert PromptDataset.of(data, tokenizer) is data
    made = PromptDataset.of(toy.rows(3), tokenizer)
    assert len(made) == 3
    assert made.counts == RowCounts(read=3, kept=3)
    assert tokenizer.decode(made[2].response_ids) == toy.rows(3)[2]["output"] + "<|im_end|>"
    with pytest.raises(DataError, match="row 1: 'prompt'"):
        PromptDataset.of([{"prompt": "a"}, {"prompt": 1}], tokenizer)


def test_several_datasets_by_name_are_not_taken_for_rows(tokenizer):
    """Trainer would evaluate each of them."""
    with pytest.raises(DataError, match="a mapping with the keys a, b. Pass one dataset"):
        PromptDataset.of({"a": toy.rows(2), "b": toy.rows(2)}, tokenizer)


def test_options_are_handed_on(tokenizer):
    rows = [("x:1", {"prompt": "a", "completion": "bcd"}), ("x:2", {"prompt": 3})]
    data = PromptDataset.encode(rows, tokenizer, Rules(skip_bad=True, max_response_tokens=2))
    assert len(data[0].response_ids) == 2
    assert data.counts == RowCounts(read=2, kept=1, bad=1, responses_truncated=1)


@pytest.mark.parametrize(
    ("count", "number", "held"),
    [
        (10, 1, [5]),
        (10, 2, [2, 7]),
        (9, 3, [1, 4, 7]),
        (175, 5, [17, 52, 87, 122, 157]),
        (4, 4, [0, 1, 2, 3]),
        (5, 0, []),
    ],
)
def test_held_back_rows_are_evenly_spaced(count, number, held):
    kept, back = numbered(count).hold_back(number)
    assert ids(back) == held
    assert ids(kept) == [i for i in range(count) if i not in held]


@pytest.mark.parametrize("count", range(1, 30))
def test_as_many_rows_are_held_back_as_asked_for(count):
    for number in range(count + 1):
        kept, back = numbered(count).hold_back(number)
        assert len(back) == number
        assert len(kept) == count - number


def test_the_counts_stay_with_the_rows_to_train_on(tokenizer):
    data = PromptDataset(ROWS, RowCounts(read=5, kept=3, bad=2))
    kept, back = data.hold_back(1)
    assert kept.counts.bad == 2
    assert back.counts == RowCounts(read=1, kept=1)


# ---- several sources ----


def test_row_ids_stay_unique_over_several_sources():
    parts = [(PromptDataset(ROWS, RowCounts(read=12, kept=3, bad=9)), 1.0), (numbered(2), 1.0)]
    joined = PromptDataset.join(parts, seed=0)
    assert ids(joined) == [4, 9, 1, 12, 13]
    assert joined.counts == RowCounts(read=14, kept=5, bad=9)


def test_one_source_of_weight_one_is_itself():
    assert PromptDataset.join([(numbered(7), 1.0)], seed=3).rows == numbered(7).rows


@pytest.mark.parametrize("weight", [0.25, 0.5, 1.75, 3.0])
def test_a_weight_is_how_often_a_row_stands_in_an_epoch(weight):
    joined = PromptDataset.join([(numbered(2000), weight)], seed=0)
    again = PromptDataset.join([(numbered(2000), weight)], seed=0)
    assert joined.rows == again.rows
    assert len(joined) == pytest.approx(2000 * weight, rel=0.06)
    assert len(set(ids(joined))) == len(joined)  # copies are rows of their own
    times = [sum(row.prompt_ids == [i + 3] for row in joined.rows) for i in range(100)]
    assert set(times) == {int(weight), int(weight + 0.99)}


def test_another_seed_takes_other_rows():
    one, other = (PromptDataset.join([(numbered(200), 0.5)], seed=s) for s in (0, 1))
    assert ids(one) != ids(other)


# ---- streams ----


def stream(tokenizer, rows, **rules):
    return PromptStream(
        lambda: ((f"x:{i}", row) for i, row in enumerate(rows)), tokenizer, Rules(**rules)
    )


def test_a_stream_gives_what_a_data_set_holds(tokenizer):
    rows = toy.rows(9)
    whole = PromptDataset.of(rows, tokenizer)
    made = stream(tokenizer, rows)
    for _ in range(2):  # epochs
        assert list(made) == whole.rows
        assert made.counts == whole.counts
    assert made.head(4) == whole.head(4) == whole.rows[:4]
    assert PromptDataset.of(made, tokenizer) is made


def test_a_stream_reads_no_further_than_asked(tokenizer):
    def endless():
        while True:
            yield "x", {"prompt": "hi"}

    assert len(PromptStream(endless, tokenizer, Rules()).head(5)) == 5


def test_a_malformed_row_stops_a_stream_when_it_comes(tokenizer):
    rows = [{"prompt": "a"}, {"prompt": 3}, {"prompt": "b"}]
    reading = iter(stream(tokenizer, rows))
    assert next(reading).row_id == 0
    with pytest.raises(DataError, match="x:1: 'prompt'"):
        next(reading)
    skipping = stream(tokenizer, rows, skip_bad=True)
    assert [row.row_id for row in skipping] == [0, 2]
    assert skipping.counts.bad == 1


@pytest.mark.parametrize("weight", [0.5, 1.5, 2.0])
def test_no_copy_of_a_held_row_is_trained_on(weight, tmp_path, tokenizer):
    lines = [json.dumps(row) for row in toy.rows(40)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    write_jsonl(tmp_path / "b.jsonl", toy.rows(10, seed=1))
    sources = [{"source": f"{tmp_path}/a.jsonl", "weight": weight}, f"{tmp_path}/b.jsonl"]
    answer = DataRecipe(train=sources, hold_back=9)
    train, held = build_rows(answer, tokenizer, needs_response=True, seed=0)
    assert len({tuple(row.prompt_ids + row.response_ids) for row in held.rows}) == len(held) == 9
    texts = {(tuple(row.prompt_ids), tuple(row.response_ids)) for row in held.rows}
    assert not texts & {(tuple(row.prompt_ids), tuple(row.response_ids)) for row in train.rows}
    assert len({row.row_id for row in train.rows} | {row.row_id for row in held.rows}) == len(
        train
    ) + len(held)


def test_a_format_for_all_sources_is_that_of_those_which_say_none(tokenizer, tmp_path):
    rows = [{"text": "plain", "instruction": "a", "output": "b"}]
    for name in ("one", "two"):
        write_jsonl(tmp_path / f"{name}.jsonl", rows)
    sources = [
        str(tmp_path / "one.jsonl"),
        {"source": str(tmp_path / "two.jsonl"), "format": "alpaca"},
    ]
    section = DataRecipe(train=sources, format="text")
    train, _ = build_rows(section, tokenizer, needs_response=True, seed=0)
    responses = [tokenizer.decode(row.response_ids) for row in train.rows]
    assert responses[0].startswith("lain")  # the first token of a text is its prompt
    assert responses[1].startswith("b")


def test_rows_of_one_question_are_held_back_together():
    """Else a held-out question would be trained with another answer."""
    rows = [Row(i, [i // 4 + 1], [9, i]) for i in range(40)]  # ten questions with four answers
    kept, held = PromptDataset(rows).hold_back(5)
    assert not {question(row) for row in kept.rows} & {question(row) for row in held.rows}
    assert (len(held), len(kept)) == (8, 32)
    again = PromptDataset(rows).hold_back(5)[1]
    assert [row.row_id for row in again.rows] == [row.row_id for row in held.rows]


def test_questions_apart_in_the_file_are_held_back_together():
    rows = [Row(i, [i % 3], [i]) for i in range(9)]
    kept, held = PromptDataset(rows).hold_back(1)
    assert [row.row_id for row in held.rows] == [1, 4, 7]
    assert len(kept) == 6


def test_a_single_question_cannot_be_held_back(tokenizer, tmp_path):
    write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "hi", "completion": str(i)} for i in range(8)])
    section = DataRecipe(train=[SourceRecipe(source=str(tmp_path / "rows.jsonl"))], hold_back=2)
    with pytest.raises(RecipeError, match="rows with the same prompt stay together"):
        build_rows(section, tokenizer, needs_response=True, seed=0)


def test_rows_that_are_trained_and_measured_are_counted(tokenizer, tmp_path, caplog):
    for name, answers in (("train", "ab"), ("eval", "ac")):
        rows = [
            {"prompt": f"{name[0]}{answer}" if answer != "a" else "hi", "completion": answer}
            for answer in answers
        ]
        write_jsonl(tmp_path / f"{name}.jsonl", rows)
    sources = {
        name: [SourceRecipe(source=str(tmp_path / f"{name}.jsonl"))] for name in ("train", "eval")
    }
    build_rows(DataRecipe(**sources), tokenizer, needs_response=True, seed=0)
    assert "1 rows of data.eval have a prompt of data.train" in caplog.text


def test_texts_with_the_same_start_are_different_rows(tokenizer):
    data = PromptDataset.of([{"text": f"hi {i}"} for i in range(6)], tokenizer)
    kept, held = data.hold_back(2)
    assert (len(kept), len(held)) == (4, 2)


@pytest.mark.parametrize(
    ("sizes", "number", "held"),
    [([1, 30, 1], 1, 1), ([1] * 10 + [500] + [1] * 10, 2, 2), ([5, 5, 5], 1, 5)],
)
def test_a_question_with_very_many_rows_is_not_held_back(sizes, number, held):
    rows = [Row(0, [place], [1]) for place, size in enumerate(sizes) for _ in range(size)]
    kept, back = PromptDataset(rows).hold_back(number)
    assert len(back) == held
    assert len(kept) == sum(sizes) - held


def test_what_the_teacher_reads_makes_no_other_question():
    rows = [Row(i, [i % 4], [1], {"solution": str(i)}) for i in range(16)]
    kept, held = PromptDataset(rows).hold_back(3)
    assert not {tuple(r.prompt_ids) for r in kept.rows} & {tuple(r.prompt_ids) for r in held.rows}
    assert fingerprint(PromptDataset(rows)) != fingerprint(
        PromptDataset([Row(i, [i % 4], [1]) for i in range(16)])
    )


@pytest.mark.parametrize(
    ("sizes", "number"), [([20, 1, 1], 5), ([10, 1, 1], 5), ([100, 1, 1, 1], 4)]
)
def test_too_few_small_questions_are_named(sizes, number):
    rows = [Row(0, [place], [1]) for place, size in enumerate(sizes) for _ in range(size)]
    with pytest.raises(
        DataError, match=rf"at most {number} rows, and questions are held back whole"
    ):
        PromptDataset(rows).hold_back(number)


def test_a_prompt_is_used_if_its_answer_cannot_be_rendered(tokenizer):
    row = {"prompt": "hi", "completion": "<think>\nlong and cut off"}
    with pytest.raises(DataError, match="is not closed"):
        PromptDataset.encode([("x:1", row)], tokenizer, Rules(needs_response=True))
    data = PromptDataset.encode([("x:1", row)], tokenizer, Rules())
    assert data[0].response_ids is None
    assert "1 answers left out: they cannot be rendered" in str(data.counts)
