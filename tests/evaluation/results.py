"""Texts, patterns and the result that each text states: evaluation and filters must agree."""

from __future__ import annotations

NUMBER = r"#### (-?[\d,.]+)"
RESULTS = [
    ("So #### 72", NUMBER, "72"),
    ("#### 1,080.", NUMBER, "1080"),
    ("#### 5 no, #### 6", NUMBER, "6"),
    ("#### -3", NUMBER, "-3"),
    ("#### .5", NUMBER, ".5"),  # a point at the start belongs to the number
    ("#### 5", NUMBER, "5"),
    ("It is 72.", NUMBER, None),
    ("It costs $18", r"\$\d+", "$18"),  # what the pattern matches counts
    ("It costs $18", r"\$(\d+)", "18"),
    ("well, yes", "yes|no", "yes"),  # without a group: all of it
    ("#### 18 . ", "#### (.*)", "18"),
    ("no apples", r"(\d+ )?apples", None),  # the group took no part
    ("", NUMBER, None),
]
