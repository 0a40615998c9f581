"""The recipes and Accelerate configs that come with the package: their folder, their list, and copies to edit."""

import re
import textwrap
from pathlib import Path

from ..common.errors import InputError, near
from .recipe import Recipe


SCHEMA = "schema.json"
# An editor reads this line, and finds the schema beside the recipe.
MODELINE = f"# yaml-language-server: $schema={SCHEMA}\n"
# Fields of the quickstart recipes that name folders, and the folders, which `make quickstart` makes.
_MADE_BY_QUICKSTART = {
    ("model", "name_or_path"): "quickstart/SmolLM2-135M-Instruct",
    ("data", "path"): "quickstart/text",
    ("training", "init_from"): "runs/quickstart",
}


def packaged_folder() -> Path:
    """The folder with the recipes: inside an installed package, and beside the package in a checkout."""
    package = Path(__file__).parents[1]
    inside = package / "recipes"
    return inside if inside.is_dir() else package.parent / "recipes"


def packaged_names() -> list[str]:
    """Names of all recipes and then of all Accelerate configs, such as `llama3.yaml` and `accelerate/ddp.yaml`."""
    folder = packaged_folder()
    configs = [path for path in (folder / "accelerate").glob("*") if path.suffix in (".yaml", ".slurm")]
    return [str(path.relative_to(folder)) for path in [*sorted(folder.glob("*.yaml")), *sorted(configs)]]


def with_packaged(words: list[str]) -> tuple[list[str], str]:
    """
    Words of a command line whose recipe, if there is no such file here, is the packaged one of that name.

    Args:
        words (`list[str]`): `quickstart.yaml`, `quickstart` and `recipes/quickstart.yaml` name one packaged recipe.

    Returns:
        `tuple`: the words, and a line that says which file the recipe is; empty if the words stay as they are.

    Raises:
        `InputError`: if the first word is a bare name, and there is neither such a file nor such a recipe.
    """
    if not words or words[0].startswith("-") or Path(words[0]).exists():
        return words, ""
    name, recipes = words[0], _names_of_recipes()
    found = _full_name(name)
    if found not in recipes:
        # A path in another folder is a mistake in that path, which the reader of recipes explains.
        if "/" in name.removeprefix("recipes/"):
            return words, ""
        here = sorted(path.name for path in Path.cwd().iterdir() if path.suffix in (".yaml", ".yml"))
        there = f" In this folder there are: {', '.join(here)}." if here else ""
        raise InputError(
            f"There is no recipe {name!r}, neither here nor in the package.{_near(found, [*here, *recipes])}{there} "
            f"The package has {', '.join(recipes)}."
        )
    path = str(packaged_folder() / found)
    return [path, *words[1:]], f"Reads the packaged recipe {path!r}, since there is no file {name!r} here."


def listing(width: int) -> str:
    """Every packaged file with a sentence about it, in lines of at most `width` characters, or 76."""
    width = max(76, min(width, 120))
    recipes = _names_of_recipes()
    configs = [name for name in packaged_names() if name not in recipes]
    lines = ["Recipes, for sae-accel train NAME:", "", *_rows(recipes, width), ""]
    lines += ["Accelerate configs, for accelerate launch --config_file FILE:", "", *_rows(configs, width), ""]
    return "\n".join([*lines, "--copy-recipe NAME writes one of these files into the current folder."])


def copy(name: str, into: Path) -> str:
    """
    Writes a packaged recipe or Accelerate config into a folder, to be edited.

    Args:
        name (`str`): A name of the list, such as `llama3.yaml` or `accelerate/ddp.yaml`.
        into (`Path`): The folder.

    Returns:
        `str`: what was written, and the command that uses it.

    Raises:
        `InputError`: if there is no such name, or a file of that name is in the folder.
    """
    names, full = packaged_names(), _full_name(name)
    if full not in names:
        raise InputError(
            f"--copy-recipe: there is no recipe {name!r}.{_near(full, names)} Allowed are {', '.join(names)}."
        )
    source, target = packaged_folder() / full, into / Path(full).name
    schema = (packaged_folder() / SCHEMA).resolve().as_uri()
    text = source.read_text(encoding="utf-8").replace(MODELINE, MODELINE.replace(SCHEMA, schema))
    try:
        # Commands in the comments name the copy, and not the packaged file.
        with open(target, "x", encoding="utf-8") as file:
            file.write(text.replace(f"recipes/{full}", target.name))
    except FileExistsError as error:
        raise InputError(
            f"--copy-recipe: {target.name!r} is in this folder already, and stays as it is. Rename it, or copy into "
            "another folder."
        ) from error
    return f"Wrote {target.name}. Edit it, then run: {_command(full, target.name)}"


def description(text: str) -> str:
    """The first sentence of the comment at the top of a recipe."""
    lines = re.match(r"(?:#!.*\n|# yaml-language-server.*\n)?((?:# \S.*\n)+)", text)
    assert lines is not None, "each packaged file begins with a sentence"
    comment = " ".join(line.removeprefix("# ") for line in lines[1].splitlines())
    return re.split(r"(?<=[.:])\s", comment, maxsplit=1)[0]


def check_made_by_quickstart(recipe: Recipe) -> None:
    """
    Checks that the folders that `make quickstart` makes are here, if a recipe names them.

    Raises:
        `InputError`: if one is not.
    """
    for (section, field), folder in _MADE_BY_QUICKSTART.items():
        unused = field == "init_from" and recipe.training.resume_from_checkpoint
        if getattr(getattr(recipe, section), field) == folder and not unused and not Path(folder).is_dir():
            raise InputError(
                f"{section}.{field}: there is no folder {folder!r} here. `make quickstart` makes it, in a checkout of "
                f"sae_accel: run both there, or set --{section}.{field} to something else."
            )


def _near(name: str, names: list[str]) -> str:
    """The nearest name without its ending, since names are alike in that."""
    return near(Path(name).with_suffix(""), [str(Path(known).with_suffix("")) for known in names])


def _names_of_recipes() -> list[str]:
    return [name for name in packaged_names() if "/" not in name]


def _full_name(name: str) -> str:
    """`recipes/llama3.yaml` and `llama3` are `llama3.yaml`."""
    name = name.removeprefix("recipes/")
    return name if Path(name).suffix else f"{name}.yaml"


def _rows(names: list[str], width: int) -> list[str]:
    longest = max(map(len, names))
    rows = []
    for name in names:
        meaning = description((packaged_folder() / name).read_text(encoding="utf-8"))
        first, rest = f"  {name:<{longest}}  ", " " * (longest + 4)
        rows.append(
            textwrap.fill(meaning, width, initial_indent=first, subsequent_indent=rest, break_on_hyphens=False)
        )
    return rows


def _command(full: str, file: str) -> str:
    if file.endswith(".slurm"):
        return f"sbatch {file} RECIPE CONFIG, with the config of --copy-recipe accelerate/nodes.yaml"
    config = f"--config_file {file} " if full.startswith("accelerate/") else ""
    return f"accelerate launch {config}-m sae_accel.train {'RECIPE' if config else file}"
