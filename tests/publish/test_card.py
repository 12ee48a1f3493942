"""The model card parses, says where the student comes from, and lets no name out of its place (S6)."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

from llmdistill import recipe as recipes
from llmdistill.evaluation.measure import Figures
from llmdistill.models.load import EMBEDDED
from llmdistill.objectives.divergences import DIVERGENCES
from llmdistill.publish.card import DIRECTIONS, figures_table, model_card
from llmdistill.publish.facts import Facts
from llmdistill.publish.licences import Licence, Part, common, read_licence
from llmdistill.publish.papers import OBJECTIVES, papers_of
from tests.conformance import entries

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


def parsed(evaluation=None, facts=None, plots=None, **changes) -> ModelCard:
    return ModelCard(model_card(recipe(**changes), evaluation, facts, plots))


def licensed(folder: Path, text: str) -> str:
    """Return the path of a model whose card states a licence."""
    folder.mkdir()
    (folder / "README.md").write_text(f"---\n{text}\n---\nhello\n")
    return str(folder)


def prose(card: ModelCard) -> str:
    """The card's text without its code blocks and code spans."""
    return re.sub(r"```.*?```|`[^`\n]*`", "", card.text, flags=re.DOTALL)


def test_the_metadata_is_there():
    data = parsed().data.to_dict()
    assert data["base_model"] == "org/student"
    assert data["license"] == "other"  # neither the student's nor the data's could be read
    assert data["datasets"] == ["org/rows"]
    kinds = {"response", "cross_entropy", "fixed", "local"}
    assert {"distillation", "knowledge-distillation", "llmdistill"} | kinds == set(data["tags"])
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
    assert "Look up each licence that could not be read" in card.text
    assert f"| teacher | {tmp_path.name} | could not be read |" in card.text


def test_one_licence_is_stated_only_if_all_parts_have_it(tmp_path):
    """Student, teacher and data (faults 11: the student's base was not looked at)."""
    mit, llama = (licensed(tmp_path / one, f"license: {one}") for one in ("mit", "llama3.2"))
    same = {"teacher": {"model": mit}, "student": {"model": mit}}
    rows = {"train": licensed(tmp_path / "rows", "license: mit")}
    card = parsed(**same, data=rows)
    assert card.data.license == "mit"
    assert "All parts have the same licence" in card.text
    for changes in ({"student": {"model": llama}}, {"teacher": {"model": llama}}):
        card = parsed(**same | changes, data=rows)
        assert card.data.license == "other"
        assert card.data.license_name == "see-the-card"
        assert "llama3.2 |" in card.text
        assert "The licences differ" in card.text
    assert parsed(**same, data={"train": "x.jsonl"}).data.license == "other"


def test_the_name_and_the_link_of_a_licence_are_carried_over(tmp_path):
    stated = "license: other\nlicense_name: qwen-research\nlicense_link: https://x.y/LICENSE"
    name = licensed(tmp_path / "qwen", stated)
    known = Licence("other", "qwen-research", "https://x.y/LICENSE")
    assert read_licence(name) == known
    rows = licensed(tmp_path / "rows", stated)
    card = parsed(teacher={"model": name}, student={"model": name}, data={"train": rows})
    data = card.data.to_dict()
    assert (data["license"], data["license_name"], data["license_link"]) == known
    assert "| qwen-research (https://x.y/LICENSE) |" in card.text


def test_the_seed_tasks_have_the_licence_of_this_package():
    card = parsed(
        teacher={"model": EMBEDDED_NAME},
        student={"model": EMBEDDED_NAME},
        data={"train": "seed_tasks"},
    )
    assert card.data.license == "apache-2.0"


def test_links_tell_no_known_licences_apart():
    """Each model of a family links to its own copy."""
    parts = [
        Part("a", "a", Licence("apache-2.0", None, "https://x/1")),
        Part("b", "b", Licence("apache-2.0")),
    ]
    assert common(parts) == Licence("apache-2.0")
    others = [Part("a", "a", Licence("other", name)) for name in ("x", "y")]
    assert common(others).name == "see-the-card"


def test_an_assistant_counts_among_the_licences(tmp_path):
    mit, llama = (licensed(tmp_path / one, f"license: {one}") for one in ("mit", "llama3.2"))
    chain = {"kind": "chain", "teacher": {"model": mit}, "assistants": [{"model": llama}]}
    rows = {"train": licensed(tmp_path / "rows", "license: mit")}
    card = parsed(teacher=chain, student={"model": mit}, data=rows)
    assert card.data.license == "other"
    assert "| teacher | llama3.2 | llama3.2 |" in card.text


def test_weights_are_not_read_as_a_card(tmp_path, monkeypatch):
    (tmp_path / "t.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr("huggingface_hub.ModelCard.load", lambda name: pytest.fail("read"))
    assert read_licence(str(tmp_path / "t.gguf")) is None


def test_a_licence_has_the_form_that_the_hub_takes(tmp_path):
    name = licensed(
        tmp_path / "a",
        "license: other\nlicense_name: '![x](https://evil) Y'\nlicense_link: LICENSE",
    )
    assert read_licence(name) == Licence("other", "x-https-evil-y", None)


def test_paths_of_training_are_not_shown():
    training = {
        "deepspeed": "/home/ann/ds.json",
        "optim_args": "a=1",
        "fsdp_config": {"x": "~/y.json"},
    }
    text = parsed(training=training).content
    assert "/home/ann" not in text
    assert "~/y" not in text
    assert "deepspeed: ds.json" in text
    assert "optim_args: a=1" in text


@pytest.mark.parametrize(
    "name", ["https://host.corp/data", "file:///home/ann/x", "home/ann/data:train"]
)
def test_addresses_and_lost_folders_are_cut(name):
    text = parsed(data={"train": name}).content
    assert "host.corp" not in text
    assert "ann/" not in text


def test_two_splits_of_a_dataset_are_one(tmp_path):
    assert parsed(data={"train": ["org/rows:a", "org/rows:b"]}).data.datasets == ["org/rows"]


def test_the_card_of_several_runs_says_which_one_it_measured():
    chain = {"kind": "chain", "teacher": {"model": "org/t"}, "assistants": [{"model": "org/a"}]}
    text = parsed(teacher=chain, facts=FACTS).text
    assert "**Training in the last of 2 runs**: 96 steps" in text


@pytest.mark.parametrize("known", [None, Licence("mit")])
def test_a_part_that_cannot_be_read_leaves_no_licence_for_all(known):
    parts = [Part("student", "a", None), Part("teacher", "b", known)]
    assert common(parts) == Licence("other", "see-the-card")


@pytest.mark.parametrize("text", ["", "no front matter", "---\nlicense: [\n---\n", "---\n3\n---\n"])
def test_a_card_that_cannot_be_read_states_no_licence(tmp_path, text):
    (tmp_path / "README.md").write_text(text)
    assert read_licence(str(tmp_path)) is None


def test_a_hub_teacher_offline_states_no_licence():
    assert read_licence("org/none-such") is None


def test_a_hostile_licence_is_escaped(tmp_path):
    """It comes from a file that somebody else wrote."""
    (tmp_path / "README.md").write_text("---\nlicense: '<script>x</script>'\n---\n")
    assert "<script>" not in prose(parsed(teacher={"kind": "local", "model": str(tmp_path)}))


def test_a_licence_that_is_a_list_leaves_a_card_that_parses(tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense:\n- mit\n- apache-2.0\n---\n")
    card = parsed(teacher={"kind": "local", "model": str(tmp_path)})
    assert "| mit-and-apache-2.0 |" in card.text
    assert card.data.to_dict()["license"] == "other"


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
    measured = text.partition("## Evaluation")[2].partition("## How")[0]
    lines = [line for line in measured.splitlines() if line.startswith("|")]
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
    assert card.text.count("```") == 6  # how to use it, the recipe, BibTeX
    outside = re.sub(r"```.*?```", "", card.text, flags=re.DOTALL)
    assert "<script>" not in outside
    assert "`c`" not in outside


@pytest.mark.parametrize(
    "name", ["x\n```\n<script>y</script>", "````", "~~~", "---\nlicense: mit\n---"]
)
def test_a_name_cannot_close_the_recipes_fence(name):
    card = parsed(teacher={"kind": "local", "model": name})
    assert card.text.count("```") == 6
    assert "<script>" not in prose(card)
    assert "# tiny-student" in card.text


@pytest.mark.parametrize(
    "name", ["org/a: b", "org/'", "org/#", "org/\n---\nlicense: x", "org/\u2028"]
)
def test_hostile_names_do_not_break_the_metadata(name):
    data = parsed(student={"model": name}, data={"train": name}).data.to_dict()
    assert data["license"] == "other"
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
    for private in (str(tmp_path), "/ann", "project_x", "~/"):
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


FACTS = Facts(
    finished="2026-11-28T12:00:00+00:00",
    steps=96,
    seconds=480.0,
    tokens={"teacher": 1_200, "student": 34_567},
    machine="2 x NVIDIA H100",
    processes=2,
    memory=3 * 2**30,
    packages={"torch": "2.13.0"},
    revisions={"org/student": "0123abc"},
    rows={"train": "150 of 175 rows", "held_out": "25 of 25 rows"},
    notes=["12 responses were cut"],
)


def test_what_the_run_took_is_said():
    text = parsed({"after": FIGURES}, FACTS).text
    for said in (
        "on 2026-11-28.",
        "- **Rows**: 150 of 175 rows",
        "- **Tokens trained on**: 1,200 by the teacher, 34,567 by the student",
        "- **Training**: 96 steps in 8.0 minutes in 2 processes",
        "- **Machine**: 2 x NVIDIA H100, at most 3.0 GiB of memory",
        "- 12 responses were cut",
        "- **Student**: `org/student` at `0123abc`, carved",
    ):
        assert said in text, said


def test_a_revision_of_the_teacher_is_stated():
    text = parsed(teacher={"model": "org/teacher", "revision": "v2"}).text
    assert "- **Teacher**: `org/teacher` at `v2`" in text


def test_the_figures_are_in_the_model_index():
    card = parsed({"before": FIGURES, "after": replace(FIGURES, kl_teacher_text=0.05)})
    results = {one.metric_type: one for one in card.data.eval_results}
    assert results["kl_teacher_text"].metric_value == 0.05
    assert results["kl_teacher_text"].dataset_type == "org/rows"
    assert "dtype" not in results
    assert "exact_match" not in results  # not measured
    assert parsed().data.eval_results is None


def test_the_direction_of_the_divergence_is_said_in_words():
    for name, said in (
        ("forward_kl", "KL(teacher, student): the student covers"),
        ("reverse_kl", "KL(student, teacher): the student concentrates"),
    ):
        text = parsed(objectives=[{"kind": "response", "divergence": name}]).text
        assert f"- **Direction of the divergence**: {said}" in text


def test_every_divergence_has_its_direction():
    assert DIRECTIONS.keys() == DIVERGENCES.keys()


def test_an_adapter_is_loaded_with_peft():
    card = parsed(student={"model": "org/s", "peft": {"save": "adapter"}})
    assert card.data.library_name == "peft"
    assert "AutoPeftModelForCausalLM.from_pretrained(name)" in card.text


def test_the_charts_are_shown():
    text = parsed({"after": FIGURES}, plots={"loss.png": "Loss"}).text
    assert "![Loss](plots/loss.png)" in text


def test_the_papers_are_those_of_the_recipes_parts():
    student = {"kind": "sampled", "max_new_tokens": 96}
    made = recipe(
        rollout={"kind": "mixed", "share": 0.3, "student": student},
        objectives=[
            {"kind": "response", "divergence": "reverse_kl"},
            {"kind": "adversarial", "of": {"kind": "response", "divergence": "jsd", "beta": 0.5}},
        ],
    )
    assert [one.key for one in papers_of(made)] == ["agarwal2023", "gu2023", "miyato2016"]
    text = model_card(made, None)
    assert "@misc{gu2023," in text
    assert "eprint = {2306.13649}" in text


def test_every_objective_has_its_paper_or_is_plain():
    kinds = {one["kind"] for one in entries.main_objectives().values()}
    assert kinds - OBJECTIVES.keys() == {"response", "cross_entropy"}
