"""Print the requirements for running the tests with another version of a dependency, one per line.

    python scripts/upgraded_requirements.py transformers==5.24

These are the package's dependencies and pytest.  The argument replaces the requirement of the same
name in pyproject.toml.
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

PROJECT = Path(__file__).parents[1] / "pyproject.toml"


def name(requirement: str) -> str:
    """Return the package of a requirement: transformers>=5.23,<5.24 -> transformers."""
    return re.split(r"[^\w.-]", requirement.strip(), maxsplit=1)[0].lower().replace("_", "-")


def requirements(wanted: str) -> list[str]:
    """Return all requirements with `wanted` first; exit if it names no dependency."""
    project = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]
    dependencies = project["dependencies"]
    if name(wanted) not in map(name, dependencies):
        names = ", ".join(map(name, dependencies))
        sys.exit(f"'{wanted}' does not name a dependency of the package. Use one of: {names}")
    # Of the dev extra only pytest and its plugins are needed to run tests.
    runner = [one for one in project["optional-dependencies"]["dev"] if one.startswith("pytest")]
    return [wanted, *(one for one in dependencies if name(one) != name(wanted)), *runner]


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("Give one requirement, such as transformers==5.24")
    print("\n".join(requirements(sys.argv[1])))
