"""One tokenizer, one template and one set of end tokens from the first row to the export."""

from __future__ import annotations

import datetime
import json
from types import SimpleNamespace

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmdistill import recipe as recipes
from llmdistill.batch import Prompts
from llmdistill.data import encoding
from llmdistill.data.build import load_student_tokenizer
from llmdistill.decoding.sample import sample
from llmdistill.errors import CheckpointError, RecipeError, VocabularyError
from llmdistill.models.vocabulary import num_tokens
from llmdistill.run import distill
from llmdistill.sampling import Draw, Sampling, Writer
from tests import toy
from tests.support.families import FAMILIES, tokenizer
from tests.support.files import read_jsonl, write_jsonl

pytestmark = pytest.mark.slow


def saved(folder, family, *, ends=None, **options):
    """Save a toy model with the tokenizer of a family, and return the folder."""
    made = tokenizer(family)
    rows = num_tokens(made) + options.pop("padding", 0)
    model = toy.model(rows=rows, **options)
    model.generation_config.eos_token_id = ends or made.eos_token_id
    model.config.eos_token_id = made.eos_token_id
    model.save_pretrained(folder)
    made.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def given(tmp_path):
    """A recipe with an instruct teacher and the base student of its family."""
    write_jsonl(tmp_path / "rows.jsonl", toy.rows(8))
    return {
        "output": str(tmp_path / "run"),
        "teacher": {"model": saved(tmp_path / "t", "smollm2-instruct", seed=1), "dtype": "float32"},
        "student": {"model": saved(tmp_path / "s", "smollm2-base", padding=3)},
        "data": {"train": str(tmp_path / "rows.jsonl")},
        "training": {
            "use_cpu": True, "max_steps": 2, "per_device_train_batch_size": 4,
            "save_strategy": "no", "dataloader_pin_memory": False,
        },
    }  # fmt: skip


ON_POLICY = {"kind": "sampled", "by": "student", "max_new_tokens": 6}


def test_a_base_student_is_refused_with_the_key(given):
    with pytest.raises(VocabularyError, match=r"student\.tokenizer: teacher"):
        distill(recipes.build(given))


@pytest.mark.parametrize("rollout", [{"kind": "fixed"}, ON_POLICY])
def test_a_base_student_takes_the_tokenizer_of_its_teacher(given, rollout):
    given["student"]["tokenizer"] = "teacher"
    result = distill(recipes.build(given | {"rollout": rollout}))
    exported = AutoTokenizer.from_pretrained(result.student)
    taught = tokenizer("smollm2-instruct")
    assert exported.chat_template == taught.chat_template
    assert exported.eos_token == taught.eos_token == "<|im_end|>"
    ends = AutoModelForCausalLM.from_pretrained(result.student).generation_config.eos_token_id
    base = tokenizer("smollm2-base")
    assert {taught.eos_token_id, base.eos_token_id} == set(ends)


def test_a_student_of_another_family_cannot_take_it(given, tmp_path):
    other = toy.tokenizer()
    other.save_pretrained(tmp_path / "s")
    given["student"]["tokenizer"] = "teacher"
    with pytest.raises(VocabularyError, match="was trained with another vocabulary"):
        load_student_tokenizer(recipes.build(given))


def test_a_student_that_teaches_itself_has_no_other_tokenizer(given):
    given["student"] |= {"tokenizer": "teacher", "peft": {"r": 2}}
    given["teacher"] = {"kind": "adapter_off"}
    with pytest.raises(RecipeError, match="has no other tokenizer"):
        recipes.build(given)


def test_another_end_token_alone_is_no_reason(given, tmp_path):
    """Both templates close a turn with the same token, so both are trained with it."""
    given["teacher"]["model"] = saved(tmp_path / "q", "qwen2.5-instruct", seed=1)
    given["student"]["model"] = saved(tmp_path / "b", "qwen2.5-base")
    result = distill(recipes.build(given | {"rollout": ON_POLICY}))
    ends = AutoModelForCausalLM.from_pretrained(result.student).generation_config.eos_token_id
    made = tokenizer("qwen2.5-base")
    assert set(ends) == {made.eos_token_id, made.convert_tokens_to_ids("<|im_end|>")}


def test_a_response_ends_at_the_token_with_which_the_template_closes_a_turn(tmp_path):
    """Gemma's turns end with a token that its generation config need not list."""
    folder = saved(tmp_path / "g", "gemma-3-instruct", ends=None)
    made = tokenizer("gemma-3-instruct")
    turn_ends = made.convert_tokens_to_ids("<end_of_turn>")
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    prompts = Prompts.pack([[5, 6, 7]] * 16, range(16), pad_id=0)
    written = sample(
        model, made, prompts, Sampling(temperature=4.0), max_new_tokens=200, draw=Draw(0),
        writer=Writer.STUDENT,
    )  # fmt: skip
    found = [ids for ids in written.responses() if turn_ends in ids]
    assert found
    assert all(ids.index(turn_ends) == len(ids) - 1 for ids in found)


def test_unfinished_responses_are_logged_and_warned_about(given, caplog, tmp_path):
    given["student"]["tokenizer"] = "teacher"
    distill(recipes.build(given | {"rollout": ON_POLICY | {"max_new_tokens": 2}}))
    shares = [
        line["unfinished"]
        for line in read_jsonl(tmp_path / "run/metrics.jsonl")
        if "unfinished" in line
    ]
    assert len(shares) == 2
    assert min(shares) > 0.5
    assert len([r for r in caplog.records if "have no end token" in r.message]) == 1


def test_dates_are_rendered_with_the_options_of_the_recipe(given, tmp_path):
    given["teacher"]["model"] = saved(tmp_path / "l1", "llama-3.1-instruct", seed=1)
    given["student"]["model"] = saved(tmp_path / "l2", "llama-3.2-instruct")
    with pytest.raises(VocabularyError, match=r"date_string"):
        distill(recipes.build(given))
    given["data"]["chat_template_kwargs"] = {"date_string": "1 Jan 2026"}
    distill(recipes.build(given))


def test_an_adopted_template_writes_the_exported_config(given, tmp_path):
    given["student"]["tokenizer"] = "teacher"
    result = distill(recipes.build(given))
    stored = json.loads((result.student / "tokenizer_config.json").read_text())
    assert stored["eos_token"] == "<|im_end|>"
    assert FAMILIES["smollm2-base"].template is None


def test_a_run_that_is_resumed_on_another_day_says_that_its_rows_differ(
    given, tmp_path, monkeypatch
):
    for name in ("t", "s"):
        saved(tmp_path / name, "llama-3.2-instruct", seed=int(name == "t"))
    given["training"] |= {"save_strategy": "steps", "save_steps": 1}
    distill(recipes.build(given))
    given["training"]["max_steps"] = 3

    class Tomorrow(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime.datetime(2031, 5, 4)

    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Tomorrow)
    monkeypatch.setattr(
        encoding, "datetime", SimpleNamespace(date=SimpleNamespace(today=Tomorrow.now))
    )
    with pytest.raises(CheckpointError, match=r"other tokens than on .*date_string"):
        distill(recipes.build(given))


def test_a_student_without_a_row_for_each_token_is_refused_before_it_is_measured(
    given, tmp_path, monkeypatch
):
    toy.model(rows=200).save_pretrained(tmp_path / "s")
    given["student"]["tokenizer"] = "teacher"
    given["data"]["hold_back"] = 2
    monkeypatch.setattr("llmdistill.measuring.Evaluation", None)
    with pytest.raises(VocabularyError, match="but the heads have 200 rows"):
        distill(recipes.build(given))
