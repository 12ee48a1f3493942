"""What to install to run the tests with another version of a dependency, one requirement per line.

    python scripts/upgraded_requirements.py transformers==5.24

These are the package's dependencies and pytest; the requirement given takes the place of the one in
pyproject.toml.
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

PROJECT = Path(__file__).parents[1] / "pyproject.toml"


def name(requirement: str) -> str:
    """transformers>=5.23,<5.24 -> transformers"""
    return re.split(r"[^\w.-]", requirement.strip(), maxsplit=1)[0].lower().replace("_", "-")


def requirements(wanted: str) -> list[str]:
    project = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]
    dependencies = project["dependencies"]
    if name(wanted) not in map(name, dependencies):
        names = ", ".join(map(name, dependencies))
        sys.exit(f"'{wanted}' is no requirement on a dependency. Give one on: {names}")
    runner = [one for one in project["optional-dependencies"]["dev"] if one.startswith("pytest")]
    return [wanted, *(one for one in dependencies if name(one) != name(wanted)), *runner]


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("give one requirement, such as transformers==5.24")
    print("\n".join(requirements(sys.argv[1])))
