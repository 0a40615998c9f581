import re
import shutil
import sys
import textwrap
from dataclasses import fields
from types import NoneType
from typing import Any, Literal, get_args, get_origin

import yaml

from .errors import InputError
from .recipe import SECTIONS, Recipe, checked, default_of, field_hints, is_union, read_yaml, type_name


USAGE = """\
Trains sparse autoencoders and transcoders on the activations of a language model.

  accelerate launch -m sae_accel.train recipes/llama3.yaml
  accelerate launch -m sae_accel.train recipes/llama3.yaml --heads.k 64 --training.output_dir runs/k64
  accelerate launch -m sae_accel.train --model.name_or_path gpt2 --heads.hookpoints "h.*.attn" "h.*.mlp.act"

A recipe is a YAML file with the sections below. Each value can be set here by its dotted name
as well; --heads.k sets it for all entries, --heads.1.k for the second.
"""


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
    has_recipe = not argv[0].startswith("--")
    content = read_yaml(argv[0]) if has_recipe else {}
    for name, words in _options(argv[1:] if has_recipe else argv):
        _set_value(content, name, words)
    return checked(content, argv[0]) if has_recipe else Recipe.from_dict(content)


def help_text(width: int) -> str:
    """Every field of every section, with type, default and meaning, in lines of at most `width` characters."""
    width = max(60, min(width, 120))
    lines = [USAGE.rstrip()]
    for section, arguments in SECTIONS.items():
        lines.append(f"\n{section}: {' '.join((arguments.__doc__ or '').strip().split(chr(10))[0].split())}")
        hints = field_hints(arguments)
        for option in fields(arguments):
            default = yaml.safe_dump(default_of(option), default_flow_style=True).splitlines()[0]
            lines.append(f"  --{section}.{option.name}  {type_name(hints[option.name])}; default {default}")
            lines.append(
                textwrap.fill(option.metadata["help"], width, initial_indent=" " * 6, subsequent_indent=" " * 6)
            )
    return "\n".join(lines)


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


def _set_value(content: dict[str, Any], name: str, words: list[str]) -> None:
    match = re.fullmatch(r"(\w+)\.(?:(\d+)\.)?(\w+)(?:\.(\w+))?", name)
    if match is None or match[1] not in SECTIONS or (match[2] and match[1] != "heads"):
        raise InputError(f"--{name}: options are --section.field, with a section of {', '.join(SECTIONS)}.")
    section, index, key, inner = match.groups()
    hint = field_hints(SECTIONS[section]).get(key)
    # An unknown key goes on as text, so that one place refuses all of them.
    value = " ".join(words) if hint is None else _parse(words, hint, f"--{name}", inner)
    for target in _targets(content, section, index, name):
        if inner is None:
            target[key] = value
        else:
            target[key] = {**(target.get(key) or {}), inner: value}


def _targets(content: dict[str, Any], section: str, index: str | None, name: str) -> list[dict[str, Any]]:
    """The mappings of a recipe that an option sets."""
    if section != "heads":
        return [content.setdefault(section, {})]
    entries = content.setdefault("heads", [{}])
    if not isinstance(entries, list):
        return []
    if index is None:
        return entries
    if int(index) >= len(entries):
        raise InputError(f"--{name}: the recipe has {len(entries)} entries of heads, counted from 0.")
    return [entries[int(index)]]


def _parse(words: list[str], hint: Any, option: str, inner: str | None) -> Any:
    """Words as the type of a field asks: a string stays as it was typed, lists take several words."""
    options = get_args(hint) if is_union(hint) else (hint,)
    if not words and bool in options:
        return True
    if get_origin(hint) is list:
        return [word if get_args(hint)[0] is str else _yaml_value(word, option) for word in words]
    if len(words) != 1:
        raise InputError(f"{option}: expected one value, {type_name(hint)}, found {len(words)}.")
    if NoneType in options and words[0] == "null":
        return None
    if inner is None and bool in options and str in options and words[0] in ("true", "false"):
        return words[0] == "true"
    as_typed = inner is None and any(part is str or get_origin(part) is Literal for part in options)
    return words[0] if as_typed else _yaml_value(words[0], option)


def _yaml_value(word: str, option: str) -> Any:
    try:
        return yaml.safe_load(word)
    except yaml.YAMLError as error:
        raise InputError(f"{option}: {word!r} is not a value.") from error
