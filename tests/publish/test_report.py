"""The report shows what a run has written, draws it in a browser, and lets no text out of its place."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from llmdistill import recipe as recipes
from llmdistill.errors import CheckpointError
from llmdistill.publish import charts
from llmdistill.publish.facts import Facts, tokens_by_writer
from llmdistill.publish.report import render, write_report
from llmdistill.publish.runs import Run, read_runs
from llmdistill.run import distill
from tests import toy
from tests.support.files import read_jsonl, write_jsonl

pytestmark = pytest.mark.charts
HOSTILE = "\" onmouseover=\"console.error('out') </script><script>console.error('let out')</script><img src=x onerror=console.error('let-out')>"
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
STEPS = 4


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """The folder of a finished run of SKD on toys, one of whose prompts is hostile."""
    folder = tmp_path_factory.mktemp("report")
    pair = toy.save_pair(folder / "pair")
    rows = toy.rows(12)
    rows[0]["prompt"] = HOSTILE
    write_jsonl(folder / "rows.jsonl", rows)
    distill(
        recipes.build({
            "output": str(folder / "skd"),
            "teacher": {"model": pair[0], "dtype": "float32"},
            "student": {"model": pair[1], "export_dtype": "float32"},
            "data": {"train": str(folder / "rows.jsonl"), "eval": str(folder / "rows.jsonl")},
            "rollout": {"kind": "interleaved", "top_k": 120, "block_size": 3, "max_new_tokens": 6},
            "objectives": [{"kind": "response"}, {"kind": "cross_entropy", "weight": 0.5}],
            "evaluate": {"max_new_tokens": 6, "every_steps": 2, "samples_every": 2},
            "training": {
                "use_cpu": True, "max_steps": STEPS, "per_device_train_batch_size": 4,
                "bf16": False, "dataloader_pin_memory": False, "save_strategy": "no",
            },
        }),
        show_progress=False,
    )  # fmt: skip
    return folder / "skd"


def values(runs: list[Run], name: str) -> list[dict]:
    [chart] = [one for one in charts.charts(runs) if one.name == name]
    return chart.spec["data"]["values"]


def test_a_finished_run_has_its_report_and_its_charts(run):
    page = (run / "report.html").read_text()
    assert len(page) < 2_000_000
    names = {file.stem for file in (run / "plots").iterdir()}
    assert names == {
        *("loss", "held_out_kl", "held_out_agreement", "draft_acceptance"),
        *("writers", "replaced", "responses"),
    }
    for file in (run / "plots").iterdir():
        assert file.read_bytes().startswith(b"\x89PNG")
        assert (run / "student" / "plots" / file.name).is_file()
    card = (run / "student" / "README.md").read_text()
    assert "![Loss](plots/loss.png)" in card


def test_a_page_needs_no_network(run):
    page = (run / "report.html").read_text()
    outside = re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL)
    assert not re.search(r"(src|href)=[\"']?https?:", outside)
    assert "default-src 'none'" in page


def test_the_charts_show_what_was_logged(run):
    log = read_jsonl(run / "metrics.jsonl")
    runs = read_runs([run])
    losses = [row for row in values(runs, "loss") if row["series"] == "loss"]
    logged = [line for line in log if "loss" in line]
    assert [row["value"] for row in losses] == [line["loss"] for line in logged]
    assert [row["step"] for row in losses] == [1, 2, 3, 4]
    assert losses[-1]["minutes"] == round(logged[-1]["seconds"] / 60, 3)
    assert {row["series"] for row in values(runs, "loss")} == {
        "loss",
        "forward_kl",
        "cross_entropy",
    }
    writers = [row for row in values(runs, "writers") if row["step"] == 1]
    shares = {row["series"]: row["value"] for row in writers}
    assert shares.keys() == {"teacher", "student"}
    assert shares["teacher"] == logged[0]["teacher_token_share"]
    assert sum(shares.values()) == pytest.approx(1)


def test_a_held_out_figure_starts_before_training_and_ends_after_it(run):
    evaluation = json.loads((run / "evaluation.json").read_text())
    points = values(read_runs([run]), "held_out_kl")
    assert [row["step"] for row in points] == [0, 2, 4]
    assert points[0]["value"] == evaluation["before"]["kl_teacher_text"]
    # Measured in training at the last step, and equal to the exported student's.
    assert points[-1]["value"] == pytest.approx(evaluation["after"]["kl_teacher_text"], rel=1e-3)


def test_what_was_not_measured_in_training_is_measured_around_it(run):
    [one] = read_runs([run])
    log = [line for line in one.log if "eval_kl" not in line]
    points = values([replace(one, log=log)], "held_out_kl")
    after = one.evaluation["after"].kl_teacher_text
    assert [(row["step"], row["value"]) for row in points[1:]] == [(STEPS, after)]


def test_figures_of_another_teacher_are_not_joined(run):
    """With an objective on states, the held-out loss is that of the run's own teacher."""
    [one] = read_runs([run])
    given = recipes.as_data(one.recipe)
    given["objectives"].append({"kind": "hidden", "layers": [[1, -1]]})
    given["evaluate"]["against"] = {"model": "org/other"}
    points = values([replace(one, recipe=recipes.build(given))], "held_out_kl")
    assert [row["step"] for row in points] == [2, 4]


def test_a_figure_that_is_not_finite_is_left_out(run):
    [one] = read_runs([run])
    log = [line | {"loss": float("nan")} if line.get("step") == 2 else line for line in one.log]
    drawn = charts.charts([replace(one, log=log)])
    json.dumps([chart.spec for chart in drawn], allow_nan=False)


def test_figures_of_another_version_are_refused(run, tmp_path):
    shutil.copy(run / "recipe.yaml", tmp_path / "recipe.yaml")
    for text in ('{"after": {"old": 1}}', '{"after": '):
        (tmp_path / "evaluation.json").write_text(text)
        with pytest.raises(CheckpointError, match="damaged, or of another version"):
            write_report([tmp_path])


def test_a_report_that_cannot_be_written_says_so(run, tmp_path):
    (tmp_path / "report.html").mkdir()
    with pytest.raises(CheckpointError, match="cannot be written"):
        write_report([run], tmp_path / "report.html")


def test_a_run_called_teacher_keeps_its_column(run, tmp_path):
    for name in ("p/teacher", "q/teacher"):
        shutil.copytree(run, tmp_path / name)
    names = [one.name for one in read_runs([tmp_path / "p/teacher", tmp_path / "q/teacher"])]
    assert names == ["p/teacher", "q/teacher"]
    assert [one.name for one in read_runs([tmp_path / "p/teacher"])] == ["p/teacher"]


def test_a_long_run_is_drawn_with_means(run, monkeypatch):
    monkeypatch.setattr(charts, "MOST_POINTS", 2)
    [one] = read_runs([run])
    points = [row for row in values([one], "loss") if row["series"] == "loss"]
    logged = [line["loss"] for line in one.log if "loss" in line]
    means = [sum(logged[:2]) / 2, sum(logged[2:]) / 2]
    assert [row["value"] for row in points] == pytest.approx(means)
    assert [row["step"] for row in points] == [2, 4]


def test_several_runs_share_each_chart(run, tmp_path):
    other = tmp_path / "skd"
    shutil.copytree(run, other)
    runs = read_runs([run, other])
    assert [one.name for one in runs] == [f"{run.parent.name}/skd", f"{tmp_path.name}/skd"]
    assert [one.name for one in read_runs([run, run])] == ["skd"]
    assert {row["series"] for row in values(runs, "loss")} == {one.name for one in runs}
    written = write_report([run, other], tmp_path / "both.html")
    assert written.page == tmp_path / "both.html"
    assert "Trained students" in written.page.read_text()
    assert (tmp_path / "both-plots" / "loss.png").is_file()


def test_a_run_that_is_not_finished_is_shown_as_far_as_it_is(run, tmp_path):
    for name in ("recipe.yaml", "metrics.jsonl", "before.json"):
        shutil.copy(run / name, tmp_path / name)
    whole = (tmp_path / "metrics.jsonl").read_text()
    (tmp_path / "metrics.jsonl").write_text(whole + '{"step": 5, "lo')  # a kill cut it off
    page = write_report([tmp_path]).page.read_text()
    assert "This run is not finished" in page
    assert "Figures on the held-out rows" in page


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"has no run: there is no recipe.yaml"):
        write_report([tmp_path])


def test_tokens_are_counted_by_who_wrote_them():
    log = [
        {"step": 1, "predicted_tokens": 100.0, "teacher_token_share": 0.2, "student_token_share": 0.3},
        {"step": 2, "predicted_tokens": 10.0, "teacher_token_share": 0.0, "student_token_share": 1.0},
        {"step": 2, "eval_loss": 1.0},
    ]  # fmt: skip
    assert tokens_by_writer(log) == {"teacher": 20, "student": 40, "data": 50}


def test_the_facts_count_what_was_trained_on(run):
    facts = Facts.read(run)
    logged = sum(line.get("predicted_tokens", 0) for line in read_jsonl(run / "metrics.jsonl"))
    assert sum(facts.tokens.values()) == logged
    assert facts.steps == STEPS
    assert facts.seconds > 0
    assert facts.memory > 50e6
    assert facts.rows == {"train": "12 of 12 rows", "held_out": "12 of 12 rows"}


def test_positions_are_those_of_the_teachers_answers(run):
    """A greedy answer has the teacher's first choice at each position."""
    rows = read_jsonl(run / "positions.jsonl")
    assert len(rows) == 4
    assert rows[0]["prompt"] == HOSTILE
    assert [row["prompt"] for row in rows] == [
        one["prompt"] for one in read_jsonl(run / "answers.jsonl")[:4]
    ]
    for one in (one for row in rows for one in row["positions"]):
        assert one["teacher"][0][0] == one["text"]


def test_samples_are_the_greedy_answers_of_the_student(run):
    samples = read_jsonl(run / "samples.jsonl")
    assert [one["step"] for one in samples] == [2, 2, 2, 4, 4, 4]
    answers = read_jsonl(run / "answers.jsonl")
    assert [one["prompt"] for one in samples[:3]] == [one["prompt"] for one in answers[:3]]
    assert [one["response"] for one in samples[3:]] == [one["after"] for one in answers[:3]]


def test_hostile_text_stays_text(run):
    page = (run / "report.html").read_text()
    own = page.count("<script")
    assert own == page.replace(HOSTILE, "").count("<script")
    [one] = read_runs([run])
    hostile = replace(
        one, name=HOSTILE, samples=[{"step": 1, "prompt": HOSTILE, "response": HOSTILE}]
    )
    page = render([hostile, one], charts.charts([hostile, one]))
    assert page.count("<script") == own
    assert page.count("</script>") == own


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
@pytest.mark.slow
def test_a_browser_draws_the_report_without_errors(run, tmp_path):
    """In both themes and at a phone's width; nothing hostile runs, and nothing is fetched."""
    from playwright.sync_api import sync_playwright

    [one] = read_runs([run])
    hostile = replace(one, name=HOSTILE)
    (tmp_path / "report.html").write_text(
        render([one, hostile], charts.charts([one, hostile])), encoding="utf-8"
    )
    said, asked = [], []
    quiet = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=quiet)
        for file, scheme, width in (
            (run / "report.html", "light", 1200),
            (run / "report.html", "dark", 390),
            (tmp_path / "report.html", "light", 390),
        ):
            page = browser.new_page(
                viewport={"width": width, "height": 800},
                color_scheme=scheme,
                java_script_enabled=True,
            )
            page.on("console", lambda message: said.append(message.text))
            page.on("pageerror", lambda error: said.append(str(error)))
            page.on("request", lambda request: asked.append(request.url))
            page.goto(file.as_uri())
            places = page.locator("[data-chart]")
            for place in range(places.count()):
                places.nth(place).locator("svg").wait_for(timeout=60_000)
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            page.get_by_role("button", name="by time").click()
            page.get_by_text("minutes").first.wait_for()
            page.locator(".marked span").first.click()
            assert page.locator("#note").inner_text().startswith("KL ")
            page.close()
        browser.close()
    assert said == []
    assert all(url.startswith("file:") for url in asked)
