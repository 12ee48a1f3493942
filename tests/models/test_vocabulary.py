"""Tokenizers are compared by what they say, never by their sizes."""

from __future__ import annotations

import json

import pytest
from tokenizers import Tokenizer, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast

from llmdistill.errors import VocabularyError
from llmdistill.models.vocabulary import VocabularyMatch, compare, end_ids, num_tokens, require_same
from tests import toy

V = toy.NUM_TOKENS


def edited(change, **options) -> PreTrainedTokenizerFast:
    """The toy tokenizer after `change` of the JSON that it is stored as."""
    stored = json.loads(toy.tokenizer().backend_tokenizer.to_str())
    change(stored)
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(stored)),
        **({"pad_token": "<|pad|>", "eos_token": "<|im_end|>"} | options),
    )


def swap(stored: dict) -> None:
    vocab = stored["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]


def drop_highest(stored: dict) -> None:
    vocab = stored["model"]["vocab"]
    del vocab[max(vocab, key=vocab.get)]


def lower_case(stored: dict) -> None:
    stored["normalizer"] = {"type": "Lowercase"}


def test_one_tokenizer_twice_is_the_same():
    found = compare(toy.tokenizer("a"), toy.tokenizer("b"), V + 5, V + 5)
    assert found.match is VocabularyMatch.SAME
    assert found.shared == V


def test_the_vocabulary_is_read_a_few_times_and_not_once_per_token(monkeypatch):
    reads = []
    get_vocab = PreTrainedTokenizerFast.get_vocab
    monkeypatch.setattr(
        PreTrainedTokenizerFast, "get_vocab", lambda self: reads.append(self) or get_vocab(self)
    )
    compare(toy.tokenizer(), toy.tokenizer(), V, V)
    assert 0 < len(reads) < 10


@pytest.mark.parametrize(
    ("teacher_rows", "student_rows"), [(V + 13, V + 5), (V, V + 5), (V + 1, V)]
)
def test_padding_rows_may_differ(teacher_rows, student_rows):
    found = compare(toy.tokenizer(), toy.tokenizer(), teacher_rows, student_rows)
    assert found.match is VocabularyMatch.PADDING_DIFFERS
    assert found.shared == V


def test_two_swapped_ids_of_one_size_differ():
    found = compare(toy.tokenizer(), edited(swap), V, V)
    assert found.match is VocabularyMatch.DIFFERENT
    assert found.shared == 0
    assert found.reason.startswith(
        ("2 tokens differ; for example, 'a' has", "2 tokens differ; for example, 'b' has")
    )


@pytest.mark.parametrize("side", ["teacher", "student"])
def test_a_token_that_only_one_side_has_is_named(side):
    highest = max(toy.tokenizer().get_vocab().items(), key=lambda item: item[1])
    sides = {"teacher": toy.tokenizer(), "student": toy.tokenizer(), side: edited(drop_highest)}
    reason = compare(sides["teacher"], sides["student"], V, V).reason
    assert "1 tokens differ" in reason
    assert repr(highest[0]) in reason
    assert f"None in the {side}" in reason


def test_an_added_token_counts():
    student = toy.tokenizer()
    student.add_tokens(["<|tool|>"])
    assert num_tokens(student) == V + 1
    assert "'<|tool|>'" in compare(toy.tokenizer(), student, V + 5, V + 5).reason


def test_another_end_token_is_no_difference():
    """A run ends responses at the tokens of both sides; `data/pairing.py` compares its rows."""
    student = edited(lambda stored: None, eos_token="<|pad|>")
    assert compare(toy.tokenizer(), student, V, V).match is VocabularyMatch.SAME


def test_ids_that_no_model_has_are_no_difference():
    """Some tokenizers have a padding token that their model was never given."""
    student = toy.tokenizer()
    student.add_tokens(["[PAD]"])
    student.model_rows = V
    assert compare(toy.tokenizer(), student, V, V).match is VocabularyMatch.SAME
    assert num_tokens(student) == V


def test_another_way_to_split_one_vocabulary_differs():
    assert "they tokenise" in compare(toy.tokenizer(), edited(lower_case), V, V).reason


def test_another_pre_tokenizer_differs():
    student = toy.tokenizer()
    student.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(
        add_prefix_space=True, use_regex=False
    )
    assert "they tokenise" in compare(toy.tokenizer(), student, V, V).reason


@pytest.mark.parametrize("rows", [(V - 1, V), (V, V - 1)])
def test_a_head_smaller_than_the_tokenizer_is_refused(rows):
    found = compare(toy.tokenizer(), toy.tokenizer(), *rows)
    assert found.match is VocabularyMatch.DIFFERENT
    assert (
        found.reason
        == f"the tokenizer has {V} ids, but the heads have {rows[0]} and {rows[1]} rows"
    )


def test_require_same_gives_the_number_of_shared_ids():
    assert require_same(toy.tokenizer(), toy.tokenizer(), V + 13, V + 5) == V


def test_require_same_names_both_tokenizers_and_their_sizes():
    """N11."""
    student = edited(drop_highest)
    student.name_or_path = "small/student"
    with pytest.raises(VocabularyError) as caught:
        require_same(toy.tokenizer("big/teacher"), student, V + 13, V + 5)
    said = str(caught.value)
    assert f"teacher 'big/teacher' ({V} tokens, head of {V + 13} rows)" in said
    assert f"student 'small/student' ({V - 1} tokens, head of {V + 5} rows)" in said


@pytest.mark.parametrize(
    ("configured", "expected"), [(None, {2}), (2, {2}), (7, {2, 7}), ([7, 9], {2, 7, 9}), ([], {2})]
)
def test_end_ids_are_the_tokenizers_and_the_generation_configs(student, configured, expected):
    student.generation_config = GenerationConfig(eos_token_id=configured)
    assert end_ids(student, toy.tokenizer()) == expected


def test_end_ids_without_any(student):
    tokenizer = toy.tokenizer()
    tokenizer.eos_token = None
    student.generation_config = None
    assert end_ids(student, tokenizer) == {2}  # the token with which the template ends an answer
    tokenizer.chat_template = None
    assert end_ids(student, tokenizer) == frozenset()
