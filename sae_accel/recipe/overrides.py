import difflib
import re
from collections.abc import Iterable, Mapping
from typing import Any, get_args

from ..common.errors import InputError
from .arguments import SECTIONS
from .schema import field_hints, is_union, takes_mapping, type_name


def with_values(content: dict[str, Any], overrides: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """
    The nested mappings of a recipe with some values replaced. What is not a mapping stays, for `from_dict` to refuse.

    Raises:
        `InputError`: if a dotted name has no section, or asks for an entry of heads that is not there.
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
    A dotted name in parts: the section, which entry of heads if it says so, and the field with the keys inside it.

    Raises:
        `InputError`: if it names no field of a section, or a key inside a field that is no mapping.
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
    """The section that has a key, or the nearest of the allowed keys and those of all sections."""
    homes: dict[str, list[str]] = {}
    for name, section in SECTIONS.items():
        for known in field_hints(section):
            homes.setdefault(known, []).append(name)
    if key in homes:
        return f" It belongs under {' or '.join(homes[key])}."
    if key in SECTIONS:
        return " It is a section of its own."
    for closest in difflib.get_close_matches(key, {*allowed, *homes}, n=1):
        there = "" if closest in allowed else f", under {' or '.join(homes[closest])}"
        return f" Did you mean {closest}{there}?"
    return ""


def _with_value(content: Any, keys: list[str], value: Any) -> Any:
    """A copy of nested mappings in which the value at the end of the keys is another."""
    if not keys:
        return value
    if not isinstance(content, Mapping):
        return content
    first, *rest = keys
    return {**content, first: _with_value(content.get(first, {}), rest, value)}
