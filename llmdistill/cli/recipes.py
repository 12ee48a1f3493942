"""`llmdistill recipes`: the recipes that come along."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

recipes = typer.Typer(help="List the recipes that come along, or copy one.", no_args_is_help=True)


@recipes.command("list")
def list_recipes() -> None:
    """Show each recipe's name and what it is."""
    import shutil
    import textwrap

    width = shutil.get_terminal_size().columns
    for name, path in _shipped().items():
        lines = textwrap.wrap(_about(path), max(width - 16, 40))
        print(f"{name:<15} " + ("\n" + 16 * " ").join(lines))


@recipes.command("copy")
def copy_recipe(
    name: Annotated[str, typer.Argument(help="A name of `llmdistill recipes list`.")],
    target: Annotated[
        str | None, typer.Argument(help="The new file; NAME.yaml if not said.")
    ] = None,
) -> None:
    """Copy a recipe, to change it."""
    from llmdistill import recipe
    from llmdistill.errors import RecipeError
    from llmdistill.recipe.facts import close_to

    shipped = _shipped()
    if name not in shipped:
        raise RecipeError(f"no recipe '{name}'.{close_to(name, list(shipped))}")
    path = Path(target or f"{name}.yaml")
    if path.exists():
        raise RecipeError(f"{path} is there already; name another file")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(shipped[name].read_bytes())
    command = recipe.command_of(recipe.parse_yaml(path.read_text(encoding="utf-8"), str(path)))
    print(f"{path}: run it with `llmdistill {command} {path}`")


def _shipped() -> dict[str, Path]:
    """The recipes by name: inside the installed package, or next to it in a clone."""
    package = Path(__file__).parents[1]
    folders = (package / "recipes", package.parent / "recipes")
    folder = next(folder for folder in folders if folder.is_dir())
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def _about(path: Path) -> str:
    """The first paragraph of a recipe's header."""
    words: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if line in ("#", "") or not line.startswith("#"):
            break
        words.append(line.removeprefix("#").strip())
    return " ".join(words)
