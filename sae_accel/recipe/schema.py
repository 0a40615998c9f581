"""
The types of a recipe's fields: which values a field takes, and how a value of another type is refused.

YAML and a command line give plain values. `typed` compares each with the type annotation of its field. It converts
only where YAML reads a number differently than a person does (`1e-3` is text for YAML), and never guesses. Every
refusal names the path of the field, the value that was found and the type that is allowed.
"""

import math
import re
from collections.abc import Iterable
from dataclasses import MISSING, fields
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from ..common.errors import InputError, near
from .arguments import Help


# A float holds every integer up to this exactly, and 64 bits hold it with room to spare.
_LARGEST = 2**53
_TYPE_NAMES = {int: "integer", float: "number", str: "string", bool: "true or false", list: "list", dict: "mapping"}


def typed(value: Any, hint: Any, help: Help, path: str) -> Any:
    """
    A value as the type of its field. Only values that YAML reads differently than a person does are converted.

    Args:
        value (`Any`): The value, as YAML gives it.
        hint (`Any`): The type annotation of the field.
        help ([`Help`]): The limits of the field.
        path (`str`): The path of the field, with which an error begins.

    Raises:
        `InputError`: with the path, what was found and what is allowed.
    """
    options = get_args(hint) if is_union(hint) else (hint,)
    if value is None and NoneType in options:
        return None
    _check_characters(value, path)
    for option in options:
        if get_origin(option) is list:
            (item_hint,) = get_args(option)
            items = [value] if isinstance(value, str) and item_hint is str else value
            if isinstance(items, list):
                return [typed(item, item_hint, help, f"{path}[{i}]") for i, item in enumerate(items)]
        elif get_origin(option) is Literal and isinstance(value, str) and value in get_args(option):
            return value
        elif option is float and (number := _number(value)) is not None:
            return _in_range(number, help, path)
        # isinstance would take true as an integer.
        elif type(value) is (get_origin(option) or option):
            return _in_range(value, help, path)
    choices = [choice for option in options if get_origin(option) is Literal for choice in get_args(option)]
    found = "a value of another type" if help.secret else shown(value)
    raise InputError(f"{path}: expected {type_name(hint)}, found {found}.{near(value, choices)}")


def type_name(hint: Any) -> str:
    """The name of a type in words, such as `list of strings`."""
    if is_union(hint):
        *names, last = (type_name(part) for part in get_args(hint))
        return f"{', '.join(names).replace('true or false', 'true, false')} or {last}"
    if get_origin(hint) is Literal:
        return f"one of {', '.join(get_args(hint))}"
    if get_origin(hint) is list:
        return f"list of {type_name(get_args(hint)[0])}s"
    return "null" if hint is NoneType else _TYPE_NAMES[get_origin(hint) or hint]


def is_union(hint: Any) -> bool:
    """Whether a type is a union. `X | None` and `Literal[...] | None` have different classes in Python."""
    return get_origin(hint) in (Union, UnionType)


def takes_mapping(options: Iterable[Any]) -> bool:
    """Whether one of several types is a mapping."""
    return any((get_origin(option) or option) is dict for option in options)


def field_hints(section: type) -> dict[str, Any]:
    """The types of a section's fields, by name. A field with choices has the type `Literal` of them."""
    hints = get_type_hints(section)
    choices = {f.name: f.metadata["help"].choices for f in fields(section)}
    return {name: Literal[tuple(allowed)] if allowed else hints[name] for name, allowed in choices.items()}


def default_of(option: Any) -> Any:
    """The default of a dataclass field."""
    return option.default if option.default is not MISSING else option.default_factory()


def _check_characters(value: Any, path: str) -> None:
    """Refuses characters that neither a file name nor a saved recipe can hold."""
    if isinstance(value, str) and (wrong := re.search("[\0\ud800-\udfff]", value)):
        raise InputError(
            f"{path}: it holds the character {wrong[0]!r}, which no file name or text can hold. Remove the character."
        )
    for item in value if isinstance(value, list) else ():
        _check_characters(item, path)
    for key, item in value.items() if isinstance(value, dict) else ():
        _check_characters(key, path)
        _check_characters(item, f"{path}.{key}")


def _in_range(value: Any, help: Help, path: str) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        raise InputError(f"{path}: found {value}, it must be finite.")
    if isinstance(value, int) and abs(value) > _LARGEST:
        raise InputError(f"{path}: found an integer of {len(str(value))} characters, at most {_LARGEST} is allowed.")
    if help.minimum is not None and value < help.minimum:
        raise InputError(f"{path}: found {value}, the least allowed is {help.minimum}.")
    if help.maximum is not None and value > help.maximum:
        raise InputError(f"{path}: found {value}, the largest allowed is {help.maximum}.")
    if help.above is not None and value <= help.above:
        raise InputError(f"{path}: found {value}, it must be above {help.above:g}.")
    if isinstance(value, dict) and help.device_keys:
        value = _flat(value)
    if isinstance(value, dict) and (wrong := [key for key in value if not isinstance(key, str)]):
        raise InputError(f"{path}: its keys must be strings, found {shown(wrong[0])}.")
    return value


def _flat(value: dict[Any, Any]) -> dict[str, Any]:
    """
    A mapping whose keys are all strings, without mappings inside.

    YAML reads device numbers as integers, and a command line reads dotted module names as nested mappings.
    """
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat |= (
            {f"{key}.{inner}": x for inner, x in _flat(item).items()} if isinstance(item, dict) else {str(key): item}
        )
    return flat


def _number(value: object) -> float | None:
    """The value as a float; None if it is not a number. YAML reads 1 as an integer, and 1e-3 as text."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        return float(value)
    except (ValueError, OverflowError):
        return None


def shown(value: object) -> str:
    """A value and its type, as an error shows it."""
    if value is None:
        return "null"
    return f"{value!r} ({_TYPE_NAMES.get(type(value), type(value).__name__)})"
