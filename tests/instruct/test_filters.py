"""Each filter by a task that it drops, one that it keeps, and the reason."""

from __future__ import annotations

import pytest

from llmdistill.instruct import filters
from llmdistill.instruct.tasks import Task
from tests.evaluation.results import RESULTS

GOOD = Task(
    "Explain why the sea is blue.", "", "Water takes up red light and lets blue light pass."
)


def task(**changes) -> Task:
    return Task(**{"instruction": GOOD.instruction, "output": GOOD.output} | changes)


MAKERS = {
    "length": filters.Length,
    "answer length": lambda: filters.Length(2, 20, field="output"),
    "truncated": filters.Truncated,
    "blacklist": filters.Blacklist,
    "odd start": filters.OddStart,
    "repeats": filters.RepeatedLines,
    "empty or echo": filters.EmptyOrEcho,
    "open end": filters.OpenEnd,
    "rouge": lambda: filters.Rouge(seeds=["Explain why the sky is so very blue today."]),
    "contamination": lambda: filters.Contamination(["one two three four five six seven"], ngram=4),
    "short contamination": lambda: filters.Contamination(
        ["What is the capital of France?", "Water"]
    ),
    "language": filters.Language,
    "result": lambda: filters.SameResult(r"#### (-?[\d,.]+)"),
    "perplexity": lambda: filters.Perplexity(at_most=20.0, at_least=1.5),
    "balanced": lambda: filters.Balanced(1),
}


@pytest.mark.parametrize("name", MAKERS)
def test_keeps_a_good_task(name):
    assert MAKERS[name]().reason(GOOD) is None


@pytest.mark.parametrize(
    ("name", "bad", "reason"),
    [
        ("length", task(instruction="Name three birds."), "instruction too short"),
        ("length", task(instruction="word " * 151), "instruction too long"),
        ("answer length", task(output="Yes."), "output too short"),
        ("truncated", task(truncated=True), "truncated"),
        ("blacklist", task(instruction="Describe this Image in a few words."), "blacklisted word"),
        ("blacklist", task(instruction="Say where I should go to eat well."), "blacklisted word"),
        ("odd start", task(instruction="- Explain the tides."), "odd start"),
        ("odd start", task(instruction="🙂 Explain the tides."), "odd start"),
        ("odd start", task(instruction="Write a program that sorts."), "odd start"),
        ("odd start", task(instruction="  "), "odd start"),
        ("repeats", task(output="a b c d e\n" * 4), "repeats itself"),
        ("repeats", task(output="one two three four " * 5), "repeats itself"),
        ("empty or echo", task(output=" ...\n"), "empty answer"),
        ("empty or echo", task(output="explain why the sea is blue"), "echo"),
        ("empty or echo", task(input="Red birds", output="Red birds."), "echo"),
        ("open end", task(output="Here they are:"), "ends with a colon"),
        ("open end", task(input="The list: "), "ends with a colon"),
        ("rouge", task(instruction="Explain why the sky is so blue today."), "too similar"),
        ("perplexity", task(log_prob=-3.01), "perplexity too high"),
        ("perplexity", task(log_prob=-9999.0), "perplexity too high"),
        ("short contamination", task(instruction="Please tell me: what is the capital of France? Now."), "in an evaluation set"),
        ("short contamination", task(instruction="Answer it.", input="What is the capital of France"), "in an evaluation set"),
        ("perplexity", task(log_prob=-0.4), "perplexity too low"),
        ("contamination", task(output="And two, three: FOUR five!"), "in an evaluation set"),
        ("language", Task("Erkläre mir, warum das Meer blau ist.", "", "Wasser nimmt rotes Licht auf."), "another language"),
        ("result", task(output="#### 17", reference="#### 18"), "another result"),
        ("result", task(output="It is 18.", reference="#### 18"), "another result"),
    ],
)  # fmt: skip
def test_drops_with_a_reason(name, bad, reason):
    assert MAKERS[name]().reason(bad) == reason


@pytest.mark.parametrize(
    ("name", "good"),
    [
        ("length", task(instruction="Name three red birds.")),
        ("length", task(instruction="word " * 150)),
        ("blacklist", task(instruction="Say what a roadmap or imagery is.")),
        ("odd start", task(instruction="3 birds: name them.")),
        ("repeats", task(output="yes\nno")),
        ("rouge", task(instruction="Describe how bread is baked at home.")),
        ("contamination", task(output="one two three five")),
        ("result", task(output="So #### 1,018.", reference="#### 1018")),
    ],
)
def test_keeps_what_is_just_inside(name, good):
    assert MAKERS[name]().reason(good) is None


def test_a_short_question_of_an_evaluation_set_is_found_behind_any_answer():
    found = filters.Contamination(["What is the capital of France?", "Paris"], ngram=10)
    copied = Task("What is the capital of France?", "", "It is Paris, " + "and so on " * 9)
    assert found.reason(copied) == "in an evaluation set"
    assert found.reason(task(output="Paris")) is None  # one word stands in many texts


def test_near_duplicates_are_told_at_their_threshold():
    """Its index only guesses: who is above is found, who is below is kept."""
    words = [f"word{i}" for i in range(200)]
    for changed, dropped in ((8, True), (60, False)):
        near = filters.NearDuplicates(threshold=0.7, ngram=1)
        near.kept(Task("same", "", " ".join(words)))
        other = words[changed:] + [f"other{i}" for i in range(changed)]
        assert (near.reason(Task("same", "", " ".join(other))) is not None) is dropped


def test_rouge_compares_with_what_was_kept():
    rouge = filters.Rouge()
    assert rouge.reason(GOOD) is None
    assert rouge.reason(GOOD) is None  # asked, not kept
    rouge.kept(GOOD)
    assert rouge.reason(GOOD) == "too similar"


def test_near_duplicates_compare_prompts_and_answers_with_what_was_kept():
    near = filters.NearDuplicates(threshold=0.6)
    words = " ".join(f"word{i}" for i in range(60))
    near.kept(task(output=words))
    assert near.reason(task(output=words.replace("word30", "other"))) == "near duplicate"
    assert near.reason(task(output=" ".join(f"thing{i}" for i in range(60)))) is None
    near.kept(task(output="something else entirely, in a few words"))
    assert near.reason(task(output=words)) == "near duplicate"


def test_an_answer_without_a_reference_has_no_result_to_compare():
    assert MAKERS["result"]().reason(task(output="no number")) is None


@pytest.mark.parametrize(("text", "pattern", "result"), RESULTS)
def test_a_result_is_read_as_evaluation_reads_it(text, pattern, result):
    """Each text against every other one: kept if both state the same result."""
    same = filters.SameResult(pattern)
    for other, _, expected in (case for case in RESULTS if case[1] == pattern):
        is_kept = same.reason(Task("Say it.", "", text, reference=other)) is None
        assert is_kept is (result is not None and result == expected)


@pytest.mark.parametrize("log_prob", [None, -2.99, -0.41])
def test_perplexity_is_bounded_where_it_is_known(log_prob):
    assert filters.Perplexity(at_most=20.0, at_least=1.5).reason(task(log_prob=log_prob)) is None


def test_no_variant_is_kept_more_often_than_said():
    balanced = filters.Balanced(2)
    for _ in range(2):
        assert balanced.reason(task(variant="hard")) is None
        balanced.kept(task(variant="hard"))
    assert balanced.reason(task(variant="hard")) == "enough hard ones"
    assert balanced.reason(task(variant="easy")) is None
