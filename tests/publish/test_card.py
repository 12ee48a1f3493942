"""The model card parses, says where the student comes from, and lets no name out of its place (S6)."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import yaml
from huggingface_hub import ModelCard

from llmdistill import recipe as recipes
from llmdistill.evaluation.measure import Figures
from llmdistill.models.load import EMBEDDED
from llmdistill.publish.card import figures_table, license_of, model_card

EMBEDDED_NAME = "smollm2-135m-instruct"
FIGURES = Figures(
    dtype="float32",
    kl_teacher_text=0.12345,
    kl_own_text=1.5,
    top1_agreement=0.5,
    draft_acceptance=0.25,
    rouge_l_teacher=1.0,
    rouge_l_references=0.125,
    exact_match=None,
    perplexity=7.5,
    repeated_4grams=0.0,
    num_parameters=1_234_567,
    num_bytes=4_938_268,
    tokens_per_second=123.4,
)
HOSTILE = "a<script>alert(1)</script>|b`c`\n# d"


def recipe(**changes) -> recipes.Recipe:
    data = {
        "output": "runs/tiny-student",
        "teacher": {"kind": "local", "model": EMBEDDED_NAME},
        "student": {"model": "org/student", "carve": {"layers": 4}},
        "data": {"train": "org/rows:test", "hold_back": 3},
        "objectives": [
            {"kind": "response", "divergence": "jsd", "beta": 0.25},
            {"kind": "cross_entropy"},
        ],
    }
    return recipes.build(data | changes)


def parsed(evaluation=None, **changes) -> ModelCard:
    return ModelCard(model_card(recipe(**changes), evaluation))


def prose(card: ModelCard) -> str:
    """The card's text without its code blocks and code spans."""
    return re.sub(r"```.*?```|`[^`\n]*`", "", card.text, flags=re.DOTALL)


def test_the_metadata_is_there():
    data = parsed().data.to_dict()
    assert data["base_model"] == "org/student"
    assert data["license"] == "apache-2.0"
    assert data["datasets"] == ["org/rows"]
    assert {"distillation", "llmdistill", "response", "cross_entropy"} == set(data["tags"])
    assert data["library_name"] == "transformers"
    assert data["pipeline_tag"] == "text-generation"


@pytest.mark.slow
def test_a_card_is_the_same_each_time():
    """Whatever the hash seed of the process: a set has another order with seed 1."""
    code = "from tests.publish.test_card import parsed; print(parsed().data.to_dict()['tags'])"
    found = {
        subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("0", "1")
    }
    assert len(found) == 1


def test_the_embedded_student_has_its_name_on_the_hub():
    data = parsed(student={"model": EMBEDDED_NAME}).data.to_dict()
    assert data["base_model"] == EMBEDDED[EMBEDDED_NAME].hub_id


@pytest.mark.parametrize(
    "model", ["/home/me/secret", "./here/there", "../up", "~/mine", "a/b.gguf"]
)
def test_a_local_path_is_no_base_model(model):
    assert "base_model" not in parsed(student={"model": model}).data.to_dict()


@pytest.mark.parametrize("source", ["seed_tasks", "rows.jsonl", "data/rows.jsonl", "./a/b"])
def test_local_rows_are_no_data_set_of_the_hub(source):
    assert "datasets" not in parsed(data={"train": source}).data.to_dict()


def test_an_unknown_licence_is_said_to_be_unknown(tmp_path):
    card = parsed(teacher={"kind": "local", "model": str(tmp_path)})
    assert card.data.to_dict()["license"] == "other"
    assert "licence could not be read" in card.text


def test_a_licence_is_read_from_the_teachers_own_card(tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\nhello\n")
    assert license_of(str(tmp_path)) == "mit"
    card = parsed(teacher={"kind": "local", "model": str(tmp_path)})
    assert card.data.to_dict()["license"] == "mit"
    assert "The teacher's licence is mit." in card.text


@pytest.mark.parametrize("text", ["", "no front matter", "---\nlicense: [\n---\n", "---\n3\n---\n"])
def test_a_card_that_cannot_be_read_states_no_licence(tmp_path, text):
    (tmp_path / "README.md").write_text(text)
    assert license_of(str(tmp_path)) is None


def test_a_hub_teacher_offline_states_no_licence():
    assert license_of("org/none-such") is None


def test_a_hostile_licence_is_escaped(tmp_path):
    """It comes from a file that somebody else wrote."""
    (tmp_path / "README.md").write_text("---\nlicense: '<script>x</script>'\n---\n")
    assert "<script>" not in prose(parsed(teacher={"kind": "local", "model": str(tmp_path)}))


def test_a_licence_that_is_a_list_leaves_a_card_that_parses(tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense:\n- mit\n- apache-2.0\n---\n")
    card = parsed(teacher={"kind": "local", "model": str(tmp_path)})
    assert "mit" in str(card.data.to_dict()["license"])


def test_the_text_says_how_it_was_made():
    text = parsed().text
    assert "# tiny-student\n" in text
    assert "`org/student`, carved (layers 4)" in text
    assert f"**Teacher**: `{EMBEDDED_NAME}`" in text
    assert "response (divergence jsd, beta 0.25); cross_entropy" in text
    assert "**Rollout**: fixed" in text


def test_sections_inside_a_section_are_said_in_words():
    """Not as Python's dicts."""
    student = {"kind": "sampled", "max_new_tokens": 96}
    text = parsed(rollout={"kind": "mixed", "share": 0.3, "student": student}).text
    described = "mixed (share: constant (value 0.3), student: sampled (max_new_tokens 96))"
    assert f"**Rollout**: {described}\n" in text


def test_the_recipe_in_the_card_is_the_recipe():
    fenced = re.search(r"```yaml\n(.*?)```", parsed().text, re.DOTALL)[1]
    assert recipes.build(yaml.safe_load(fenced)) == recipe()


def test_the_figures_are_a_table():
    rows = figures_table({"before": FIGURES, "after": FIGURES})
    assert rows[0] == ["", "before", "after"]
    assert {len(row) for row in rows} == {3}
    cells = {row[0]: row[1] for row in rows[1:]}
    assert cells["kl_teacher_text"] == "0.123"
    assert cells["num_parameters"] == "1,234,567"
    assert cells["tokens_per_second"] == "123"
    assert set(cells) == set(vars(FIGURES)) - {"exact_match"}  # nothing took it


def test_the_table_is_in_the_card_with_where_its_rows_come_from():
    text = parsed({"before": FIGURES, "after": FIGURES}).text
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in lines} == {5}
    assert lines[0] == "|  | before | after | meaning |"
    assert any(line.startswith("| kl_teacher_text | 0.123 | 0.123 |") for line in lines)
    assert "Measured on 3 held-out rows of `org/rows:test`:" in text
    assert "## Evaluation" not in parsed().text


@pytest.mark.parametrize(
    "changes",
    [
        {"teacher": {"kind": "local", "model": HOSTILE}},
        {"student": {"model": HOSTILE}},
        {"data": {"train": HOSTILE, "hold_back": 1}},
        {"data": {"train": "x.jsonl", "eval": HOSTILE}},
        {"output": f"runs/{HOSTILE.replace('/', '')}"},
    ],
    ids=["teacher", "student", "train", "eval", "output"],
)
def test_hostile_names_stay_text(changes):
    card = parsed({"after": FIGURES}, **changes)
    assert {"license", "tags"} <= set(card.data.to_dict())
    assert "<script>" not in prose(card)
    assert not re.search(r"^# d", prose(card), re.MULTILINE)
    assert card.text.count("```") == 2
    outside = re.sub(r"```.*?```", "", card.text, flags=re.DOTALL)
    assert "<script>" not in outside
    assert "`c`" not in outside


@pytest.mark.parametrize(
    "name", ["x\n```\n<script>y</script>", "````", "~~~", "---\nlicense: mit\n---"]
)
def test_a_name_cannot_close_the_recipes_fence(name):
    card = parsed(teacher={"kind": "local", "model": name})
    assert card.text.count("```") == 2
    assert "<script>" not in prose(card)
    assert "# tiny-student" in card.text


@pytest.mark.parametrize(
    "name", ["org/a: b", "org/'", "org/#", "org/\n---\nlicense: x", "org/\u2028"]
)
def test_hostile_names_do_not_break_the_metadata(name):
    data = parsed(student={"model": name}, data={"train": name}).data.to_dict()
    assert data["license"] == "apache-2.0"
    assert data["base_model"] == name


def test_a_figure_that_one_model_lacks_is_a_dash():
    other = replace(FIGURES, exact_match=0.5)
    rows = {row[0]: row[1:] for row in figures_table({"a": FIGURES, "b": other})}
    assert rows["exact_match"] == ["-", "0.500"]


def test_a_folder_is_no_model_of_the_hub_and_no_path_is_shown(tmp_path, monkeypatch):
    """`models/tiny` on the Hub is somebody else's."""
    (tmp_path / "models/tiny").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    home = str(tmp_path / "home/ann/project_x")
    card = parsed(
        output=f"{home}/run1",
        student={"model": "models/tiny"},
        teacher={"kind": "local", "model": f"{home}/teacher"},
        data={"train": [f"{home}/t.jsonl", "~/u.jsonl"]},
    )
    assert card.data.base_model is None
    for private in (str(tmp_path), "ann", "project_x", "~/"):
        assert private not in card.content
    for name in ("run1", "tiny", "teacher", "t.jsonl", "u.jsonl"):
        assert name in card.text


def test_the_address_of_a_server_is_not_shown():
    generated = {
        "output": "d", "target": 3, "generator": {"kind": "answer", "prompts": "org/q"},
        "teacher": {"kind": "remote", "model": "m", "url": "http://10.1.2.3:8000/v1", "key_from": "MY_KEY"},
    }  # fmt: skip
    card = parsed(generate=generated)
    assert "10.1.2.3" not in card.content
    assert "MY_KEY" not in card.content
