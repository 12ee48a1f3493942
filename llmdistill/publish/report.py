"""The report of one or several runs: one HTML file that needs no network, and its charts as PNG."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmdistill.evaluation.measure import MEANING, remarks
from llmdistill.publish.card import figures_table, summary
from llmdistill.publish.charts import Chart, charts, png
from llmdistill.publish.names import public_dump
from llmdistill.publish.runs import Run, read_runs

REPORT, PLOTS = "report.html", "plots"
TEMPLATE = "report.html.jinja"
SHOWN_ANSWERS = 25
TILES = (
    ("KL from the teacher", "kl_teacher_text", ".3f"),
    ("same first token", "top1_agreement", ".0%"),
    ("drafts accepted", "draft_acceptance", ".0%"),
)


@dataclass(frozen=True)
class Report:
    """The files of a report: the page, and each chart as PNG with its title."""

    page: Path
    plots: dict[Path, str]


def write_report(folders: Sequence[str | Path], output: str | Path | None = None) -> Report:
    """Write the report of run folders.

    Args:
        folders: Run folders.  A run that is not finished is shown as far as it has come.
        output: File to write.  None is `report.html` in the run folder, or in the working folder
            if there are several runs.  The charts are PNG files in `plots` in the same folder.

    Raises:
        CheckpointError: A folder has no run.
    """
    places = [Path(folder) for folder in folders]
    runs = read_runs(places)
    page = Path(output) if output is not None else Path(REPORT)
    if output is None and len(places) == 1:
        page = places[0] / REPORT
    drawn = charts(runs)
    plots = page.parent / PLOTS
    plots.mkdir(parents=True, exist_ok=True)
    files = {plots / f"{chart.name}.png": chart for chart in drawn}
    for file, chart in files.items():
        file.write_bytes(png(chart))
    page.write_text(render(runs, drawn), encoding="utf-8")
    return Report(page, {file: chart.title for file, chart in files.items()})


def render(runs: Sequence[Run], drawn: Sequence[Chart]) -> str:
    """Return the page.  Text of models, data and recipes is escaped by the template."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("llmdistill.publish", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    specs = {chart.name: chart.spec for chart in drawn}
    return environment.get_template(TEMPLATE).render(
        title=" · ".join(run.name for run in runs),
        runs=[_shown(run) for run in runs],
        compared=_compared(runs) if len(runs) > 1 else [],
        charts=drawn,
        meaning=MEANING,
        specs=_in_script(json.dumps(specs)),
        library=_in_script(_library(), quoted=False),
    )


def _shown(run: Run) -> dict[str, Any]:
    """Return what the page shows of a run."""
    rows = figures_table(run.evaluation) if run.evaluation else []
    return {
        "name": run.name,
        "summary": summary(run.recipe),
        "tiles": _tiles(run),
        "figures": rows,
        "remarks": remarks(run.evaluation),
        "answers": run.answers[:SHOWN_ANSWERS],
        "more_answers": max(len(run.answers) - SHOWN_ANSWERS, 0),
        "looked_at": [_marked(row) for row in run.looked_at],
        "samples": run.samples,
        "recipe": public_dump(run.recipe),
        "facts": _facts(run),
        "is_finished": run.facts is not None,
    }


def _tiles(run: Run) -> list[tuple[str, str, str]]:
    """Return the figures at the top: (label, value, what it was before or is for the teacher)."""
    before, after, teacher = (run.evaluation.get(n) for n in ("before", "after", "teacher"))
    if before is None or after is None:
        return []
    tiles = []
    for label, key, form in TILES:
        now, then = (format(getattr(figures, key), form) for figures in (after, before))
        tiles.append((label, now, f"{then} before"))
    if teacher is not None:
        size = after.num_bytes / teacher.num_bytes
        speed = after.tokens_per_second / teacher.tokens_per_second
        tiles.append(("size", f"{size:.0%}", "of the teacher's bytes"))
        tiles.append(("speed", f"{speed:.2f} x", "the teacher's tokens per second"))
    return tiles


def _compared(runs: Sequence[Run]) -> list[list[str]]:
    """Return a table with the trained students of all runs side by side, and the first teacher."""
    found = {run.name: run.evaluation["after"] for run in runs if "after" in run.evaluation}
    teachers = [run.evaluation["teacher"] for run in runs if "teacher" in run.evaluation]
    return figures_table(found | ({"teacher": teachers[0]} if teachers else {})) if found else []


def _marked(row: dict[str, Any]) -> dict[str, Any]:
    """Return a response with a shade from 0 to 1 and a note for each of its tokens."""
    tokens = [
        {
            "text": one["text"],
            "shade": f"{1 - math.exp(-max(one['kl'], 0.0)):.3f}",
            "note": "\n".join([
                f"KL {one['kl']:.3f} nats",
                *(f"{who}: {_choices(one[who])}" for who in ("teacher", "student")),
            ]),
        }
        for one in row["positions"]
    ]  # fmt: skip
    return {"prompt": row["prompt"], "tokens": tokens}


def _choices(choices: Sequence[tuple[str, float]]) -> str:
    return ", ".join(f"{text!r} {share:.0%}" for text, share in choices)


def _facts(run: Run) -> list[tuple[str, str]]:
    """Return the facts of a run as lines of a table."""
    facts = run.facts
    if facts is None:
        return []
    written = ", ".join(f"{count:,} by {who}" for who, count in facts.tokens.items())
    lines = [
        ("finished", facts.finished),
        ("training", f"{facts.steps:,} steps in {facts.seconds / 60:.1f} minutes"),
        ("tokens trained on", written.replace("by data", "of the dataset")),
        ("rows to train on", facts.rows.get("train", "a stream")),
        ("held-out rows", facts.rows.get("held_out", "none")),
        *(("note", note) for note in facts.notes),
        ("machine", facts.machine),
        ("processes", str(facts.processes)),
        ("peak memory of the first process", f"{facts.memory / 2**30:.2f} GiB"),
        ("versions", ", ".join(f"{name} {number}" for name, number in facts.packages.items())),
        *((f"commit of {name}", commit) for name, commit in facts.revisions.items()),
    ]
    return [(name, text) for name, text in lines if text]


def _in_script(text: str, *, quoted: bool = True) -> Any:
    """Return text for a `script` element that it cannot end: JSON, or JavaScript as it is."""
    from markupsafe import Markup

    return Markup(
        text.replace("<", "\\u003c") if quoted else text.replace("</script", "<\\/script")
    )


@functools.cache
def _library() -> str:
    """Return Vega, Vega-Lite and vega-embed as one script."""
    import vl_convert

    return str(vl_convert.javascript_bundle())  # type: ignore[call-arg]  # its stub has no default
