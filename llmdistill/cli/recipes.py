"""`llmdistill recipes`: the recipes that the package includes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

LAUNCHING = "accelerate"  # the folder of the launcher's configurations, which are no recipes
COMMANDS = {"train": "Train a student", "generate": "Generate a dataset"}

recipes = typer.Typer(
    help="List the recipes that the package includes, or copy one.", no_args_is_help=True
)


@recipes.command("list")
def list_recipes() -> None:
    """List each recipe with its method, by the command that runs it."""
    import shutil
    import textwrap

    width = shutil.get_terminal_size().columns
    shipped = _shipped()
    column = max(map(len, shipped)) + 1
    for command, title in COMMANDS.items():
        print(f"{title} (llmdistill {command}):\n")
        for name, path in shipped.items():
            if (path.parent.name == "generate") == (command == "generate"):
                lines = textwrap.wrap(_about(path), max(width - column - 1, 40))
                print(f"{name:<{column}} " + ("\n" + (column + 1) * " ").join(lines))
        print()
    print("Copy one to change it: llmdistill recipes copy NAME")


@recipes.command("copy")
def copy_recipe(
    name: Annotated[str, typer.Argument(help="A name that `llmdistill recipes list` prints.")],
    target: Annotated[
        str | None, typer.Argument(help="The new file. The default is NAME.yaml.")
    ] = None,
) -> None:
    """Copy a recipe to a new file that you can change."""
    from llmdistill import recipe
    from llmdistill.errors import RecipeError
    from llmdistill.recipe.facts import close_to

    shipped = _shipped()
    if name not in shipped:
        raise RecipeError(f"there is no recipe '{name}'.{close_to(name, list(shipped))}")
    path = Path(target or f"{name}.yaml")
    if path.exists():
        raise RecipeError(f"{path} exists. Choose another file name.")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(shipped[name].read_bytes())
    command = recipe.command_of(recipe.parse_yaml(path.read_text(encoding="utf-8"), str(path)))
    print(f"Copied to {path}. Run it with: llmdistill {command} {path}")


def _shipped() -> dict[str, Path]:
    """Return the recipes by name, from the installed package or from the clone that it is in."""
    package = Path(__file__).parents[1]
    folders = (package / "recipes", package.parent / "recipes")
    folder = next(folder for folder in folders if folder.is_dir())
    found = sorted(folder.rglob("*.yaml"))
    return {path.stem: path for path in found if path.parent.name != LAUNCHING}


def _about(path: Path) -> str:
    """Return the first paragraph of a recipe's header."""
    words: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if line in ("#", "") or not line.startswith("#"):
            break
        words.append(line.removeprefix("#").strip())
    return " ".join(words)
