"""
Dotted names, such as `heads.1.k`: how a value of the command line, or an override in Python, replaces one of a recipe.
"""

import difflib
import re
from collections.abc import Iterable, Mapping
from typing import Any, get_args

from ..common.errors import InputError
from .arguments import SECTIONS
from .schema import field_hints, is_union, takes_mapping, type_name


def with_values(content: dict[str, Any], overrides: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """
    A recipe's nested mappings with some values replaced. A section of the wrong type stays, so that `from_dict`
    refuses it.

    Args:
        content (`dict[str, Any]`): The recipe, as YAML gives it.
        overrides (`Iterable[tuple[str, Any]]`): Dotted names and values.

    Raises:
        `InputError`: if a dotted name has no section, or names an entry of heads that does not exist.
    """
    for name, value in overrides:
        section, index, keys = split_name(name)
        if section != "heads":
            content = _with_value(content, [section, *keys], value)
        elif isinstance(entries := content.get("heads", [{}]), list):
            if index is not None and index >= len(entries):
                raise InputError(f"{name!r}: the recipe has no heads[{index}]; it has {len(entries)}, counted from 0.")
            chosen = range(len(entries)) if index is None else [index]
            changed = [_with_value(entry, keys, value) if i in chosen else entry for i, entry in enumerate(entries)]
            content = {**content, "heads": changed}
    return content


def split_name(name: str) -> tuple[str, int | None, list[str]]:
    """
    The parts of a dotted name: the section, the number of an entry of heads or None, and the field with keys inside
    it.

    Args:
        name (`str`): A dotted name, such as `heads.1.k` or `data.load_args.revision`.

    Raises:
        `InputError`: if it names no field of a section, or a key inside a field that is not a mapping.
    """
    section, *keys = name.split(".")
    index = int(keys.pop(0)) if section == "heads" and keys and re.fullmatch("[0-9]{1,9}", keys[0]) else None
    if section not in SECTIONS or not keys:
        near = "" if section in SECTIONS else advice(section, SECTIONS)
        raise InputError(
            f"{name!r}: there is no such option.{near} Options are --section.field, with a section of "
            f"{', '.join(SECTIONS)}."
        )
    hint = field_hints(SECTIONS[section]).get(keys[0])
    options = get_args(hint) if is_union(hint) else (hint,)
    if hint is not None and len(keys) > 1 and not takes_mapping(options):
        raise InputError(f"{name!r}: {section}.{keys[0]} is {type_name(hint)}, with no keys inside.")
    return section, index, keys


def advice(key: str, allowed: Iterable[str]) -> str:
    """
    A hint for an unknown key: the section that has this key, or the nearest known key; empty if none is near.

    Args:
        key (`str`): The key that was found.
        allowed (`Iterable[str]`): The keys that are allowed there.
    """
    homes: dict[str, list[str]] = {}
    for name, section in SECTIONS.items():
        for known in field_hints(section):
            homes.setdefault(known, []).append(name)
    if key in homes:
        return f" It belongs under {' or '.join(homes[key])}."
    if key in SECTIONS:
        return " It is a section of its own, beside the others."
    for closest in difflib.get_close_matches(key, {*allowed, *homes}, n=1):
        there = "" if closest in allowed else f", under {' or '.join(homes[closest])}"
        return f" Did you mean {closest}{there}?"
    return ""


def _with_value(content: Any, keys: list[str], value: Any) -> Any:
    """A copy of nested mappings, with the value under the given keys replaced."""
    if not keys:
        return value
    if not isinstance(content, Mapping):
        return content
    first, *rest = keys
    return {**content, first: _with_value(content.get(first, {}), rest, value)}
