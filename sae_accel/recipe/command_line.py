import re
import shutil
import textwrap
from dataclasses import fields
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin

import yaml

from ..common.errors import InputError
from .arguments import SECTIONS, Help
from .json_schema import json_schema_text
from .overrides import split_name, with_values
from .packaged import copy, listing
from .recipe import Recipe, load_recipe
from .schema import default_of, field_hints, is_union, takes_mapping, type_name
from .yaml_file import StrictLoader


USAGE = """\
Trains SAEs and transcoders on the activations of a language model.

  accelerate launch -m sae_accel.train [RECIPE] [--section.field value ...]
  sae-accel train [RECIPE] [--section.field value ...]

The first line trains on all devices that the Accelerate config names, the
second on one. RECIPE is a YAML file, or the name of a packaged recipe, such
as quickstart. These options do not train:

  --dry-run [PROCESSES]  print the memory that each process needs; it takes
                         the same recipe and values as a run
  --list-recipes         list the packaged recipes and Accelerate configs
  --copy-recipe NAME     write one of them into the current folder, to edit
  --schema               print the JSON schema of recipes, for editors
  -h, --help             print this text

  --debug                print the traceback and report of an error here

Examples:

  accelerate launch -m sae_accel.train recipes/llama3.yaml

  accelerate launch -m sae_accel.train recipes/llama3.yaml \\
      --heads.k 64 --training.output_dir runs/k64

  accelerate launch -m sae_accel.train --model.name_or_path gpt2 \\
      --heads.hookpoints "h.*.attn" "h.*.mlp.act"
"""
NOTES = (
    "A recipe has the sections below. The command line sets a field by its dotted name, and replaces the value of the "
    "recipe: --heads.k sets k for all entries of heads, --heads.1.k for the second entry. A list takes several words. "
    "A true-or-false field without a value is true. --data.load_args.revision sets one key of a mapping."
)


# Options that answer at once, each with the word that it takes.
_ANSWERS = {"--list-recipes": None, "--copy-recipe": "NAME", "--schema": None}


def parse_command_line(argv: list[str]) -> Recipe:
    """
    Returns the recipe that the words `[RECIPE] [--section.field value ...]` describe.

    Args:
        argv (`list[str]`): Words after the program's name.

    Raises:
        `InputError`: if one of the words cannot be used.
    """
    if not argv:
        raise InputError(
            "There is no recipe. Give a recipe's file or name (--list-recipes), or values such as "
            "--model.name_or_path gpt2. --help lists all fields."
        )
    has_recipe = not argv[0].startswith("-")
    overrides = [(name, _value(name, words)) for name, words in _options(argv[1:] if has_recipe else argv)]
    if has_recipe:
        return load_recipe(argv[0], overrides)
    return Recipe.from_dict(with_values({}, overrides), "command line")


def answer(words: list[str]) -> str | None:
    """
    Returns the text that a command line asks for instead of a run, such as the help; None if it asks for a run.

    Args:
        words (`list[str]`): Words after the program's name.

    Raises:
        `InputError`: if the words cannot be used. `--copy-recipe` also raises it if it cannot write the file.
    """
    if {"-h", "--help"} & set(words):
        return help_text(shutil.get_terminal_size().columns)
    asked = [word for word in words if word in _ANSWERS]
    if not asked:
        return None
    option, rest = asked[0], [word for word in words if word != asked[0]]
    name = _ANSWERS[option]
    if len(words) != 1 + len(rest) or len(rest) != (name is not None):
        example = f"{option} {name}" if name else option
        found = " ".join(words)
        raise InputError(f"{option}: found {found!r}, but it takes no other words. Write: sae-accel train {example}")
    if option == "--copy-recipe":
        return copy(rest[0], Path.cwd())
    return json_schema_text() if option == "--schema" else listing(shutil.get_terminal_size().columns)


def split_dry_run(argv: list[str]) -> tuple[list[str], int | None]:
    """
    Splits `--dry-run [PROCESSES]` off the words of a command line.

    Returns:
        `tuple`: the other words, and the number of processes: 0 if none is given, which means the number that was
        started; None if there is no `--dry-run`.

    Raises:
        `InputError`: if the word that follows is not a number of processes.
    """
    if "--dry-run" not in argv:
        return argv, None
    place = argv.index("--dry-run")
    before, after = argv[:place], argv[place + 1 :]
    if not after or after[0].startswith("--"):
        return before + after, 0
    if not re.fullmatch("[1-9][0-9]{0,5}", after[0]):
        raise InputError(
            f"--dry-run: expected a number of processes, found {after[0]!r}. Write --dry-run 8, or --dry-run alone "
            "for the number that is started."
        )
    return before + after[1:], int(after[0])


def help_text(width: int) -> str:
    """Returns every field with its type, default and meaning, in lines of at most `width` characters, or 76."""
    width = max(76, min(width, 120))
    lines = [USAGE, _filled(NOTES, width, 0, 0)]
    for section, arguments in SECTIONS.items():
        meaning = (arguments.__doc__ or "").strip().splitlines()[0]
        lines += ["", _filled(f"{section}: {meaning}", width, 0, 2), ""]
        hints = field_hints(arguments)
        for option in fields(arguments):
            kind = type_name(hints[option.name]) + range_of(option.metadata["help"])
            default = yaml.safe_dump(default_of(option), default_flow_style=True).splitlines()[0]
            lines.append(_filled(f"--{section}.{option.name}  {kind}; default {default}", width, 2, 6))
            lines.append(_filled(option.metadata["help"], width, 6, 6))
    return "\n".join(lines)


def _filled(text: str, width: int, first: int, rest: int) -> str:
    # A line must not break at the hyphens of options and names.
    return textwrap.fill(text, width, initial_indent=" " * first, subsequent_indent=" " * rest, break_on_hyphens=False)


def range_of(help: Help) -> str:
    if help.minimum is not None:
        return f", at least {help.minimum:g}" + ("" if help.maximum is None else f" and at most {help.maximum}")
    return "" if help.above is None else f", above {help.above:g}"


def _options(words: list[str]) -> list[tuple[str, list[str]]]:
    """Returns each dotted name with the words that follow it."""
    options: list[tuple[str, list[str]]] = []
    for word in words:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            options.append((name, [value] if equals else []))
        elif not options:
            raise InputError(
                f"{word!r} stands before any option. Write one recipe at most, and then --section.field value."
            )
        else:
            options[-1][1].append(word)
    return options


def _value(name: str, words: list[str]) -> Any:
    """Returns words as the type of their field: a string stays as it is typed, a list takes several words."""
    section, _, keys = split_name(name)
    hint = field_hints(SECTIONS[section]).get(keys[0])
    if hint is None:
        # One place, the reader of recipes, refuses all unknown keys.
        return " ".join(words)
    options = get_args(hint) if is_union(hint) else (hint,)
    if not words and bool in options:
        return True
    if get_origin(hint) is list:
        return [word if str in get_args(hint) else _yaml_value(word, name) for word in words]
    if len(words) != 1:
        found = " ".join(words) or "none. A value that begins with -- goes after =, as in --name=--value"
        kind = type_name(hint) if len(keys) == 1 else "any"
        raise InputError(f"--{name}: expected one value ({kind}), found {found}.")
    return _one_value(words[0], options, name)


def _one_value(word: str, options: tuple[Any, ...], name: str) -> Any:
    if NoneType in options and word == "null":
        return None
    if bool in options and word.lower() in ("true", "false"):
        return word.lower() == "true"
    if takes_mapping(options) and word.startswith("{"):
        return _yaml_value(word, name)
    as_typed = any(option is str or get_origin(option) is Literal for option in options)
    return word if as_typed else _yaml_value(word, name)


def _yaml_value(word: str, name: str) -> Any:
    try:
        return yaml.load(word, Loader=StrictLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InputError(f"--{name}: {word!r} is not a value that YAML can read.") from error
