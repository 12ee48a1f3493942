"""The report of one or several runs: one HTML file that needs no network, and its charts as PNG."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmdistill.errors import CheckpointError
from llmdistill.evaluation.measure import MEANING, remarks
from llmdistill.publish.card import figures_table, summary
from llmdistill.publish.charts import Chart, charts, png
from llmdistill.publish.names import public_dump
from llmdistill.publish.runs import Run, read_runs

REPORT, PLOTS = "report.html", "plots"
TEMPLATE = "report.html.jinja"
SHOWN_ANSWERS = 25
DARKEST = 3.0  # nats of KL at which a token has the full colour
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
            if there are several runs.  The charts are PNG files in `plots` in the run folder, or
            next to the file in a folder of its name.

    Raises:
        CheckpointError: A folder has no run that can be read, or the report cannot be written.
    """
    places = [Path(folder) for folder in folders]
    runs = read_runs(places)
    page = Path(output) if output is not None else Path(REPORT)
    plots = page.with_name(f"{page.stem}-{PLOTS}")
    if output is None and len(places) == 1:
        page, plots = places[0] / REPORT, places[0] / PLOTS
    drawn = charts(runs)
    files = {plots / f"{chart.name}.png": chart for chart in drawn}
    try:
        plots.mkdir(parents=True, exist_ok=True)
        for file, chart in files.items():
            file.write_bytes(png(chart))
        page.write_text(render(runs, drawn), encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"the report cannot be written to {page}: {error}.") from error
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
        "is_finished": run.is_finished,
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
        tiles.append(("size", f"{size:.0%}", "of the teacher's bytes"))
        if teacher.tokens_per_second:
            speed = after.tokens_per_second / teacher.tokens_per_second
            tiles.append(("speed", f"{speed:.2f} x", "the teacher's tokens per second"))
    return tiles


def _compared(runs: Sequence[Run]) -> list[list[str]]:
    """Return a table with the trained students of all runs side by side.

    Their teacher is in it if all of them have the same one and the same held-out rows.
    """
    found = {run.name: run.evaluation["after"] for run in runs if "after" in run.evaluation}
    same = len({repr((run.recipe.teacher, run.recipe.data)) for run in runs}) == 1
    if same and found and "teacher" in runs[0].evaluation:
        found["teacher"] = runs[0].evaluation["teacher"]
    return figures_table(found) if found else []


def _marked(row: dict[str, Any]) -> dict[str, Any]:
    """Return a response with a shade from 0 to 1 and a note for each of its tokens."""
    tokens = [
        {
            "text": one["text"],
            "shade": f"{min(max(one['kl'] / DARKEST, 0.0), 1.0):.3f}",
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
        (
            "peak memory of the first process",
            f"{facts.memory / 2**30:.2f} GiB" if facts.memory else "",
        ),
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
