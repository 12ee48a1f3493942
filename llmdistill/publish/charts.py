"""The charts of a report as Vega-Lite specifications, which are plain data.

One specification serves the page, where vega-embed draws it, and the PNG, which vl-convert draws.
Every chart has one row per point, with `step` and `minutes`, so that a page can show either.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from math import isfinite
from typing import Any, NamedTuple

from llmdistill.publish.runs import Run

SCHEMA = "https://vega.github.io/schema/vega-lite/v6.json"
MOST_POINTS = 600  # of a line: more cannot be told apart
HEIGHT, PNG_WIDTH, PNG_SCALE = 230, 640, 2
QUARTERS = {f"replaced_q{number}": f"quarter {number}" for number in range(1, 5)}
WRITERS = ("teacher", "student", "data")
HEALTH = {
    "unfinished": "cut off",
    "empty": "empty",
    "repeated_4grams": "repeated 4-grams",
}
# Figures over the steps: (file name, title, key in the log, figure of evaluation.json).
HELD_OUT = (
    ("held_out_kl", "Held-out KL, nats per token", "eval_kl", "kl_teacher_text"),
    ("held_out_agreement", "Same first token", "eval_top1_agreement", "top1_agreement"),
    ("draft_acceptance", "Draft acceptance", "eval_draft_acceptance", "draft_acceptance"),
)
SHARE = {"format": ".0%"}


class Chart(NamedTuple):
    """A chart: the name of its file, its title, what it shows in words, and its specification."""

    name: str
    title: str
    caption: str
    spec: dict[str, Any]


def charts(runs: Sequence[Run]) -> list[Chart]:
    """Return the charts for which the runs have figures.  Several runs share each chart."""
    made = [_loss(runs), *map(_held_out(runs), HELD_OUT)]
    if len(runs) == 1:
        made += [_writers(runs[0]), _replaced(runs[0]), _health(runs[0])]
    return [one for one in made if one.spec["data"]["values"]]


def png(chart: Chart) -> bytes:
    """Draw a chart on white."""
    import vl_convert

    spec = copy.deepcopy(chart.spec) | {"width": PNG_WIDTH, "title": chart.title}
    spec["background"] = "white"
    return bytes(vl_convert.vegalite_to_png(spec, scale=PNG_SCALE))


def _loss(runs: Sequence[Run]) -> Chart:
    """The loss of each step; the terms of a single run are shown, too."""
    rows = []
    for run in runs:
        terms = run.facts.terms if run.facts is not None and len(runs) == 1 else []
        shown = ("loss", *terms) if len(terms) > 1 else ("loss",)
        for name in shown:
            label = run.name if len(runs) > 1 else name
            rows += [row | {"series": label} for row in _points(run, name)]
    caption = "The loss that is trained on: the mean of the steps since the point before."
    if len({row["series"] for row in rows}) > 1 and len(runs) == 1:
        caption = "The loss, and each of its terms before its weight is applied."
    return Chart("loss", "Loss", caption, _lines(rows))


def _held_out(runs: Sequence[Run]) -> Any:
    def chart(of: tuple[str, str, str, str]) -> Chart:
        name, title, key, figure = of
        rows = []
        for run in runs:
            points = list(_around(run, figure, list(_points(run, key))))
            rows += [row | {"series": run.name} for row in points]
        caption = (
            "Measured on the teacher's responses to the held-out prompts: before training, after "
            "it, and in between if the recipe sets evaluate.every_steps."
        )
        shape = SHARE if name != "held_out_kl" else {}
        return Chart(name, title, caption, _lines(rows, shape, has_points=True))

    return chart


def _around(run: Run, figure: str, rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Add what was measured before the first step and after the last one."""
    if rows and _held_out_against_another(run):
        yield from rows
        return
    before, after = (run.evaluation.get(name) for name in ("before", "after"))
    end = run.log[-1] if run.log else {"step": 0}
    if before is not None and not any(row["step"] == 0 for row in rows):
        yield {"step": 0, "minutes": 0.0, "value": getattr(before, figure)}
    yield from rows
    if after is not None and not any(row["step"] == end["step"] for row in rows):
        yield {"step": end["step"], "minutes": _minutes(end), "value": getattr(after, figure)}


def _held_out_against_another(run: Run) -> bool:
    """Whether the held-out loss compares with another teacher than the figures do."""
    states = any(one.teacher_needs - {"distribution"} for one in run.recipe.objectives)
    return states and run.recipe.evaluate.against not in (None, run.recipe.teacher)


def _writers(run: Run) -> Chart:
    """Who wrote the tokens that each step trained on."""
    rows = []
    for writer in WRITERS:
        rows += [row | {"series": writer} for row in _points(run, partial(_share, writer))]
    taken = {row["series"] for row in rows if row["value"]}
    spec = _spec([row for row in rows if row["series"] in taken])
    spec["mark"] = {"type": "area", "tooltip": True}
    spec["encoding"] |= {
        "y": {"field": "value", "type": "quantitative", "stack": "zero", "title": None}
        | {"axis": SHARE},
        "color": _color([writer for writer in WRITERS if writer in taken]),
    }
    return Chart("writers", "Who wrote the tokens", "Shares of the predicted tokens.", spec)


def _replaced(run: Run) -> Chart:
    """Where in a response the teacher stepped in (interleaved rollouts)."""
    rows = []
    for key, label in QUARTERS.items():
        rows += [row | {"series": label} for row in _points(run, key)]
    caption = "Share of the tokens that the teacher replaced, in each quarter of the responses."
    return Chart("replaced", "Where the teacher stepped in", caption, _lines(rows, SHARE))


def _health(run: Run) -> Chart:
    """Whether responses end, and whether they repeat themselves."""
    rows = []
    for key, label in HEALTH.items():
        rows += [row | {"series": label} for row in _points(run, key)]
    caption = (
        "Of the responses that a model wrote for training: the share without an end token, the "
        "share with nothing else, and the share of 4-grams that came earlier in the response."
    )
    return Chart("responses", "Health of the responses", caption, _lines(rows, SHARE))


def _share(writer: str, line: dict[str, Any]) -> float | None:
    """Return the share of a step's tokens by a writer; None if the line has none."""
    if "teacher_token_share" not in line:
        return None
    shares = {name: line[f"{name}_token_share"] for name in ("teacher", "student")}
    return float((shares | {"data": 1.0 - sum(shares.values())})[writer])


def _points(run: Run, figure: str | Callable[..., float | None]) -> Iterator[dict[str, Any]]:
    """Yield the values of a figure in the log; of a long run, the means over equal parts."""
    of = figure if callable(figure) else lambda line: line.get(figure)
    known = [(line, of(line)) for line in run.log]
    points = [(line, value) for line, value in known if value is not None and isfinite(value)]
    size = -(-len(points) // MOST_POINTS) or 1
    for start in range(0, len(points), size):
        some = points[start : start + size]
        last, mean = some[-1][0], sum(value for _, value in some) / len(some)
        yield {"step": last["step"], "minutes": _minutes(last), "value": mean}


def _minutes(line: dict[str, Any]) -> float:
    return round(line.get("seconds", 0.0) / 60, 3)


def _spec(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what all charts share."""
    x = {"field": "step", "type": "quantitative", "title": "step", "axis": {"tickMinStep": 1}}
    return {
        "$schema": SCHEMA,
        "data": {"values": rows},
        "width": "container",
        "height": HEIGHT,
        "encoding": {"x": x},
    }


def _lines(
    rows: list[dict[str, Any]],
    axis: dict[str, Any] | None = None,
    *,
    has_points: bool = False,
) -> dict[str, Any]:
    """Return a chart with one line per series."""
    series = list(dict.fromkeys(row["series"] for row in rows))
    spec = _spec(rows)
    spec["mark"] = {"type": "line", "tooltip": True, "point": has_points, "clip": True}
    y: dict[str, Any] = {"field": "value", "type": "quantitative", "title": None}
    spec["encoding"] |= {
        "y": y | {"scale": {"zero": False}, "axis": axis or {}},
        "color": _color(series),
    }
    return spec


def _color(series: Sequence[str]) -> dict[str, Any]:
    legend = {"orient": "top", "title": None} if len(series) > 1 else None
    scale = {"domain": list(series), "scheme": "tableau10"}
    return {"field": "series", "type": "nominal", "legend": legend, "scale": scale}
