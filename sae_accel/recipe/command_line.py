import re
import shutil
import sys
import textwrap
from dataclasses import fields
from types import NoneType
from typing import Any, Literal, get_args, get_origin

import yaml

from ..common.errors import InputError
from .arguments import SECTIONS, Help
from .overrides import split_name, with_values
from .recipe import Recipe, load_recipe
from .schema import default_of, field_hints, is_union, takes_mapping, type_name
from .yaml_file import StrictLoader


USAGE = """\
Trains SAEs and transcoders on the activations of a language model.

  accelerate launch -m sae_accel.train [RECIPE] [--section.field value ...]
  python -m sae_accel.train RECIPE --dry-run [PROCESSES]

The second trains nothing, but prints what each process would hold and need
of memory. It takes the same values as the first. Anywhere in either,

  --debug

shows an error's traceback here, and of a defect the whole report, which is
a file else.

Examples:

  accelerate launch -m sae_accel.train recipes/llama3.yaml

  accelerate launch -m sae_accel.train recipes/llama3.yaml \\
      --heads.k 64 --training.output_dir runs/k64

  accelerate launch -m sae_accel.train --model.name_or_path gpt2 \\
      --heads.hookpoints "h.*.attn" "h.*.mlp.act"
"""
NOTES = (
    "A recipe is a YAML file with the sections below. Each value can be set here by its dotted name as well: "
    "--heads.k sets it for all entries of heads, --heads.1.k for the second. A list takes several words, a switch "
    "needs none for true, and --data.load_args.revision sets one key of a mapping."
)


def parse_command_line(argv: list[str]) -> Recipe:
    """
    The recipe that `[RECIPE] [--section.field value ...]` describes.

    Args:
        argv (`list[str]`): Words after the program's name.

    Raises:
        `InputError`: if something in it cannot be used.
        `SystemExit`: with status 0, after printing the help that was asked for.
    """
    if {"-h", "--help"} & set(argv):
        print(help_text(shutil.get_terminal_size().columns))
        sys.exit(0)
    if not argv:
        raise InputError("Give a recipe, or values such as --model.name_or_path gpt2. --help lists them all.")
    has_recipe = not argv[0].startswith("-")
    overrides = [(name, _value(name, words)) for name, words in _options(argv[1:] if has_recipe else argv)]
    if has_recipe:
        return load_recipe(argv[0], overrides)
    return Recipe.from_dict(with_values({}, overrides), "command line")


def split_dry_run(argv: list[str]) -> tuple[list[str], int | None]:
    """
    The words without `--dry-run [PROCESSES]`, and for how many processes it asks: 0 for as many as were started, None
    if it is not there.

    Raises:
        `InputError`: if what follows it is no number of processes.
    """
    if "--dry-run" not in argv:
        return argv, None
    place = argv.index("--dry-run")
    before, after = argv[:place], argv[place + 1 :]
    if not after or after[0].startswith("--"):
        return before + after, 0
    if not re.fullmatch("[1-9][0-9]{0,5}", after[0]):
        raise InputError(f"--dry-run: expected a number of processes, or none for as many as run, found {after[0]}.")
    return before + after[1:], int(after[0])


def help_text(width: int) -> str:
    """Every field of every section, with type, default and meaning, in lines of at most `width` characters, or 76."""
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
    # Options and names hold hyphens, at which a line must not break.
    return textwrap.fill(text, width, initial_indent=" " * first, subsequent_indent=" " * rest, break_on_hyphens=False)


def range_of(help: Help) -> str:
    if help.minimum is not None:
        return f", at least {help.minimum:g}" + ("" if help.maximum is None else f" and at most {help.maximum}")
    return "" if help.above is None else f", above {help.above:g}"


def _options(words: list[str]) -> list[tuple[str, list[str]]]:
    """Pairs of a dotted name and the words that follow it."""
    options: list[tuple[str, list[str]]] = []
    for word in words:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            options.append((name, [value] if equals else []))
        elif not options:
            raise InputError(f"{word!r} stands before any option. One recipe, then --section.field value.")
        else:
            options[-1][1].append(word)
    return options


def _value(name: str, words: list[str]) -> Any:
    """Words as the type of a field asks: a string stays as it was typed, lists take several words."""
    section, _, keys = split_name(name)
    hint = field_hints(SECTIONS[section]).get(keys[0])
    if hint is None:
        # An unknown key goes on as text, so that one place refuses all of them.
        return " ".join(words)
    options = get_args(hint) if is_union(hint) else (hint,)
    if not words and bool in options:
        return True
    if get_origin(hint) is list:
        return [word if str in get_args(hint) else _yaml_value(word, name) for word in words]
    if len(words) != 1:
        found = " ".join(words) or "none; one that begins with -- goes after =, as in --name=--value"
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
