"""ROUGE-L against a pool: the scores of `rouge_score`, found fast."""

from __future__ import annotations

import random

import pytest
from rouge_score.rouge_scorer import RougeScorer

from llmdistill.instruct.similarity import RougePool
from tests import toy


def texts(number: int, *, seed: int, words: int = 14) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choices(toy.WORDS, k=draw.randint(1, words))) for _ in range(number)]


@pytest.fixture(scope="module")
def scorer():
    return RougeScorer(["rougeL"])


def plain(scorer, text, pool):
    """The best score by comparing with every one, and its place."""
    scores = [scorer.score(other, text)["rougeL"].fmeasure for other in pool]
    return max(scores), scores.index(max(scores))


@pytest.mark.parametrize("above", [0.3, 0.5, 0.7])
def test_finds_what_comparing_with_every_one_finds(scorer, above):
    pool, index = texts(200, seed=1), RougePool()
    for text in pool:
        index.add(text)
    found = 0
    for text in texts(60, seed=2):
        match, (score, place) = index.nearest(text, above), plain(scorer, text, pool)
        if score > above:
            assert match == (score, place)
            found += 1
        else:
            assert match is None
    assert 0 < found <= 60


def test_decides_as_rouge_score_does_on_pairs_around_the_threshold(scorer):
    """2,000 pairs near 0.7, exact ties among them."""
    draw, decided, ties = random.Random(3), 0, 0
    while decided < 2000:
        text = draw.choices(toy.WORDS, k=draw.randint(5, 20))
        other = [word for word in text if draw.random() > 0.25]
        other += draw.choices(toy.WORDS, k=draw.randint(0, 6))
        score = scorer.score(" ".join(other), " ".join(text))["rougeL"].fmeasure
        if abs(score - 0.7) > 0.1:
            continue
        index = RougePool()
        index.add(" ".join(other))
        assert (index.nearest(" ".join(text), 0.7) is not None) == (score > 0.7)
        decided += 1
        ties += abs(score - 0.7) < 1e-9
    assert ties > 10


def test_case_and_punctuation_do_not_count():
    index = RougePool()
    index.add("Name three RED birds, please!")
    assert index.nearest("name three red birds please", 0.7) == (1.0, 0)


def test_an_empty_text_is_like_nothing():
    index = RougePool()
    assert index.nearest("name three birds", 0.0) is None
    index.add("...")
    assert index.nearest("!!!", 0.0) is None
    assert len(index) == 1
