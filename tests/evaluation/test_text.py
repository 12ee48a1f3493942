"""Measures of text, worked by hand."""

from __future__ import annotations

import pytest

from llmdistill.errors import DataError
from llmdistill.evaluation.text import exact_match, repeated_ngrams, result_of, rouge_l, same_result
from tests.evaluation.results import RESULTS


@pytest.mark.parametrize(
    ("answers", "n", "share"),
    [
        (["a b c d e"], 2, 0.0),
        (["a b a b a"], 2, 2 / 4),  # ab ba ab ba
        (["a a a a a"], 4, 1 / 2),  # aaaa twice
        (["a a a"], 1, 2 / 3),
        (["a b c d", "a b c d"], 2, 0.0),  # only within one answer
        (["x x x x x", "a b c d e f g h"], 4, 1 / 7),  # 2 + 5 n-grams: over all, not per answer
        (["a  b\na b"], 2, 1 / 3),  # white space of any kind
        (["a b c", "a b c d e"], 4, 0.0),  # one is shorter than one n-gram
        (["我爱你我爱你"], 3, 1 / 4),  # each character of a script without spaces is a word
    ],
)
def test_repeated_ngrams(answers, n, share):
    assert repeated_ngrams(answers, n) == pytest.approx(share)


def test_four_words_are_the_default():
    text = "a b c d a b c d"  # five 4-grams, the last is the first; 3-grams would give 2 of 6
    assert repeated_ngrams([text]) == pytest.approx(1 / 5)


@pytest.mark.parametrize(
    ("answer", "reference", "score"),
    [
        ("the cat sat", "the cat sat", 1.0),
        ("one two", "three four", 0.0),
        # Longest common subsequence "the cat on the mat": 5 of 6 words and 5 of 6.
        ("the cat is on the mat", "the cat sat on the mat", 5 / 6),
        # "a c": precision 2/2, recall 2/4.
        ("a c", "a b c d", 2 * 1.0 * 0.5 / 1.5),
        ("b a", "a b", 0.5),  # the order counts
        ("The Cat!", "the cat", 1.0),  # letter case and punctuation do not
        ("running", "run", 0.0),  # no stemming
        ("", "a", 0.0),
        ("Напиши стихи", "Напиши стихи", 1.0),
        ("我 爱你", "我爱你", 1.0),
    ],
)
def test_rouge_l(answer, reference, score):
    assert rouge_l([answer], [reference]) == pytest.approx(score)


def test_rouge_l_is_the_mean_over_answers():
    assert rouge_l(["a b", "x", "a c"], ["a b", "y", "a b c d"]) == pytest.approx(
        (1 + 0 + 2 / 3) / 3
    )


@pytest.mark.parametrize("answers", [["a b c"], [""], [], ["我爱"]])
def test_a_measure_without_a_meaning_is_none_and_not_0(answers):
    assert repeated_ngrams(answers) is None
    assert rouge_l(answers, ["..."] * len(answers)) is None


def test_rouge_l_wants_a_reference_for_each():
    with pytest.raises(ValueError, match="shorter"):
        rouge_l(["a", "b"], ["a"])


@pytest.mark.parametrize(("text", "pattern", "result"), RESULTS)
def test_the_result_that_a_text_states(text, pattern, result):
    assert result_of(text, pattern) == result


GSM8K = r"#### (-?[\d,.]+)"


@pytest.mark.parametrize(
    ("answer", "reference", "same"),
    [
        ("So #### 72", "48 + 24 #### 72", True),
        ("#### 1,080.", "#### 1080", True),  # commas and the full stop do not count
        ("#### 5 no, #### 6", "#### 6", True),  # the last one counts
        ("#### 6 no, #### 5", "#### 6", False),
        ("72", "#### 72", False),  # no result
        ("#### -3", "#### 3", False),
        ("", "#### 3", False),
    ],
)
def test_exact_match(answer, reference, same):
    assert exact_match([answer], [reference], GSM8K) == float(same)


def test_exact_match_is_a_share():
    assert exact_match(["#### 1", "#### 2", "3"], ["#### 1"] * 3, GSM8K) == pytest.approx(1 / 3)
    assert exact_match(["yes"], ["well, yes"], "yes|no") == 1.0  # without a group: all of it


def test_a_reference_without_a_result_is_named():
    with pytest.raises(DataError, match="evaluation row 1 .*'none here'"):
        exact_match(["#### 1", "#### 1"], ["#### 1", "none here"], GSM8K)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("18", "18.00", True), ("$18", "18", True), ("18.50", "18.5", True), ("-0.50", "-.5", True), ("0", "-0", True),
        ("007", "7", True), ("€5", "5", True), ("18", "180", False), ("B", "B", True), ("B", "b", False), (None, None, False),
        ("18 apples", "18", False), ("1e3", "1000", False), ("100000000000000000001", "100000000000000000000", False),
    ],
)  # fmt: skip
def test_a_number_is_the_same_however_it_is_written(one, other, same):
    assert same_result(one, other) is same
    assert same_result(other, one) is same


def test_signs_of_a_currency_hide_no_result():
    assert exact_match(["#### $18"], ["#### 18"], r"#### (-?[\d,.]+)") == 1.0
    assert exact_match(["#### 9, no, #### $18"], ["#### 18"], r"#### (-?[\d,.]+)") == 1.0
    assert exact_match(["it is -$5"], ["-5"], r"-?\d+") == 1.0
    assert exact_match(["so 5.0"], ["so 5"], r"[\d.]+$") == 1.0
