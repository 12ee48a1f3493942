"""What was paid for is used again: replies of a server, whatever changed since they were recorded."""

from __future__ import annotations

import json

import pytest

from llmdistill.errors import CheckpointError, DataError, TeacherError
from llmdistill.generate import generate
from tests.support.files import read_jsonl, write_jsonl
from tests.support.recipes import build_generation
from tests.support.servers import chat, last, scripted

pytestmark = pytest.mark.slow


def numbered(body, number):
    return chat(f"The answer to this is number {number} of all of them.")


def questions(number, start=0):
    return [{"prompt": f"Question number {i}: what is {i} plus {i}?"} for i in range(start, number)]


def recipe(server, folder, prompts, **changes):
    write_jsonl(folder / "prompts.jsonl", prompts)
    teacher = {"kind": "remote", "model": "m", "url": server.url, "retries": 1}
    given = {
        "output": str(folder / "set"), "teacher": teacher, "filters": [], "test_share": 0.0,
        "generator": {"kind": "answer", "prompts": str(folder / "prompts.jsonl")},
    }  # fmt: skip
    return build_generation(given | changes)


def outputs(folder):
    rows = read_jsonl(folder / "set" / "rows.jsonl")
    return {row["instruction"]: row["output"] for row in rows}


def test_a_longer_file_of_prompts_asks_only_the_new_ones(tmp_path):
    with scripted(numbered) as server:
        generate(recipe(server, tmp_path, questions(50)))
        before = outputs(tmp_path)
        generate(recipe(server, tmp_path, questions(51)), resume=True)
        assert server.asked == 51
    after = outputs(tmp_path)
    assert len(after) == 51
    assert before.items() <= after.items()


def test_a_shorter_file_loses_no_reply_and_the_old_one_can_be_put_back(tmp_path):
    with scripted(numbered) as server:
        generate(recipe(server, tmp_path, questions(200)))
        before = outputs(tmp_path)
        calls = (tmp_path / "set" / "calls.jsonl").read_bytes()
        generate(recipe(server, tmp_path, questions(10)), resume=True)
        assert len(outputs(tmp_path)) == 10
        assert (tmp_path / "set" / "calls.jsonl").read_bytes() == calls
        generate(recipe(server, tmp_path, questions(200)), resume=True)
        assert server.asked == 200
    assert outputs(tmp_path) == before


@pytest.mark.parametrize(
    ("change", "new"),
    [
        (lambda rows: [{"prompt": "A new first one?"}, *rows], 1),
        (lambda rows: rows[::-1], 0),
        (lambda rows: rows[:3] + rows[4:], 0),
        (lambda rows: [*rows, rows[3]], 1),  # the copy needs another reply
        (lambda rows: [*rows[:5], {"prompt": "Changed?"}, *rows[6:]], 1),
    ],
)
def test_a_reply_goes_where_its_prompt_goes(tmp_path, change, new):
    rows = questions(80)
    with scripted(numbered) as server:
        generate(recipe(server, tmp_path, rows))
        before = outputs(tmp_path)
        changed = change(rows)
        generate(recipe(server, tmp_path, changed), resume=True)
        assert server.asked == 80 + new
        generate(recipe(server, tmp_path, rows), resume=True)  # and back again
        assert server.asked == 80 + new
    assert outputs(tmp_path) == before


def test_a_reply_whose_place_was_taken_is_found_again(tmp_path):
    a, b, c = questions(3)
    with scripted(numbered) as server:
        for rows, asked in (([a, b], 2), ([c, b], 3), ([c, b, a], 3)):
            generate(recipe(server, tmp_path, rows), resume=asked > 2)
            assert server.asked == asked


def test_a_system_prompt_moves_with_its_prompt(tmp_path):
    answering = {"system": ["You teach maths.", "You are a pirate."]}
    generator = {
        "kind": "answer",
        "prompts": str(tmp_path / "prompts.jsonl"),
        "answering": answering,
    }
    with scripted(numbered) as server:
        generate(recipe(server, tmp_path, questions(40), generator=generator))
        rows = [{"prompt": "A new first one?"}, *questions(40)]
        generate(recipe(server, tmp_path, rows, generator=generator), resume=True)
        assert server.asked == 41


def test_scores_move_with_their_prompts(tmp_path):
    judge = {"judge": {"aspects": ["quality"]}}
    with scripted(lambda body, number: chat("7" if "How good" in last(body) else "So.")) as server:
        generate(recipe(server, tmp_path, questions(20), **judge))
        rows = [{"prompt": "A new first one?"}, *questions(20)]
        generate(recipe(server, tmp_path, rows, **judge), resume=True)
        assert server.asked == 42


def test_samples_of_a_prompt_are_taken_again_and_one_more_is_asked(tmp_path):
    generator = {"kind": "answer", "prompts": str(tmp_path / "prompts.jsonl"), "samples": 3}
    with scripted(numbered) as server:
        generate(recipe(server, tmp_path, questions(5), generator=generator))
        moved = questions(6)[1:]
        generate(recipe(server, tmp_path, moved, generator=generator), resume=True)
        assert server.asked == 15 + 3


def test_a_mended_server_is_asked_again_for_what_it_refused(tmp_path):
    is_bad = True

    def fails(body, number):
        if is_bad and number > 64:
            return 400, {}, {"error": {"message": "max_model_len exceeded"}}
        return numbered(body, number)

    with scripted(fails) as server:
        given = recipe(server, tmp_path, questions(200))
        with pytest.raises(TeacherError, match="answered none of 64 requests: .*refused by the"):
            generate(given)
        assert server.asked == 128
        is_bad = False
        assert generate(given, resume=True).counts.kept == 200
        assert server.asked == 128 + 136


def test_single_refusals_are_asked_again_with_resume(tmp_path):
    refused = {"3", "70", "71"}

    def picky(body, number):
        if last(body).split()[2].rstrip(":") in refused:
            return 400, {}, {"error": {"message": "no"}}
        return numbered(body, number)

    with scripted(picky) as server:
        given = recipe(server, tmp_path, questions(75))
        assert generate(given).counts.dropped == {"refused by the server": 3}
        before = outputs(tmp_path)
        assert generate(given, resume=True).counts.dropped == {"refused by the server": 3}
        calls = read_jsonl(tmp_path / "set" / "calls.jsonl")
        assert len(calls) == 75  # the same refusals are not recorded twice
        refused.clear()
        assert generate(given, resume=True).counts.kept == 75
        assert server.asked == 75 + 3 + 3
    assert before.items() <= outputs(tmp_path).items()


def test_a_round_of_refused_answers_stops_although_questions_came(tmp_path):
    """The two endpoints of a server may differ: here the list comes, and no answer to it."""

    def half(body, number):
        if "list of tasks" in last(body):
            return chat(f" Tell thing {number} of the town {number * 7}.\n4. Input: <noinput>")
        return 400, {}, {"error": {"message": "no"}}

    generator = {"kind": "alpaca", "tasks_per_call": 1, "answering": {}}
    with scripted(half) as server:
        given = recipe(server, tmp_path, [], generator=generator, target=50, round_size=8)
        with pytest.raises(TeacherError, match="answered none of 8 requests"):
            generate(given)
        assert server.asked == 16


def test_filters_and_batches_may_change_on_resume(tmp_path):
    with scripted(numbered) as server:
        generate(recipe(server, tmp_path, questions(30)))
        short = [{"kind": "length", "field": "output", "min_words": 99, "max_words": 100}]
        changes = {"filters": short, "batch_size": 3}
        with pytest.raises(DataError, match="no row was kept"):
            generate(recipe(server, tmp_path, questions(30), **changes), resume=True)
        made = generate(recipe(server, tmp_path, questions(30), round_size=7), resume=True)
        assert made.counts.kept == 30
        assert server.asked == 30


def test_a_filter_of_log_probabilities_cannot_be_added_later(tmp_path):
    with scripted(numbered) as server:
        generate(recipe(server, tmp_path, questions(5)))
        changed = recipe(
            server, tmp_path, questions(5), filters=[{"kind": "perplexity", "at_most": 9.0}]
        )
        with pytest.raises(CheckpointError, match="needs log-probabilities"):
            generate(changed, resume=True)
        assert server.asked == 5


def test_single_replies_that_no_call_has_are_kept_at_the_end(tmp_path):
    """A run stops within a round; the file of prompts is then made shorter."""

    def dies(body, number):
        return numbered(body, number) if number <= 20 else (401, {}, {"error": {"message": "?"}})

    with scripted(dies) as server:
        with pytest.raises(TeacherError, match="HTTP 401"):
            generate(recipe(server, tmp_path, questions(40), round_size=10))
        given = recipe(server, tmp_path, questions(3), round_size=10)
        generate(given, resume=True)
        server.reply = numbered
        asked = server.asked
        generate(recipe(server, tmp_path, questions(40), round_size=10), resume=True)
        assert server.asked - asked <= 20
    assert not list((tmp_path / "set").glob("spoken-*"))
    assert len(outputs(tmp_path)) == 40


def test_an_empty_sample_scores_below_all_others(tmp_path):
    tokens = [{"token": "a", "logprob": -0.5, "bytes": None, "top_logprobs": []}]

    def some(body, number):
        said = "" if number % 3 == 0 else f"An answer {number}."
        return chat(said, logprobs={"content": tokens})

    generator = {
        "kind": "answer", "prompts": str(tmp_path / "prompts.jsonl"), "samples": 3,
        "best_by": "likelihood",
    }  # fmt: skip
    with scripted(some) as server:
        given = recipe(server, tmp_path, questions(5), generator=generator)
        assert generate(given).counts.kept == 5
    assert all(outputs(tmp_path).values())


def test_an_empty_data_set_is_an_error_and_keeps_its_record(tmp_path):
    with scripted(lambda body, number: chat(" ")) as server:
        given = recipe(server, tmp_path, questions(4))
        with pytest.raises(DataError, match=r"no row was kept of 4 tasks: \{'empty answer': 4\}"):
            generate(given)
        with pytest.raises(DataError, match="no row was kept"):
            generate(given, resume=True)
        assert server.asked == 4
    assert not list((tmp_path / "set").glob("train.*"))
    assert not (tmp_path / "set" / "README.md").exists()


def test_the_old_data_set_stays_if_the_new_one_is_empty(tmp_path):
    with scripted(numbered) as server:
        generate(recipe(server, tmp_path, questions(4)))
        server.reply = lambda body, number: chat("")
        with pytest.raises(DataError, match="no row was kept"):
            generate(recipe(server, tmp_path, questions(4)), overwrite=True)
    assert len(json.loads((tmp_path / "set.old" / "train.jsonl").read_text().split("\n")[0])) > 1
