"""A JSON schema of recipes, made from their dataclasses, by which editors complete and check a recipe."""

import json
from dataclasses import fields
from types import NoneType
from typing import Any, Literal, get_args, get_origin

from .arguments import SECTIONS
from .option import Help
from .schema import default_of, field_hints, is_union


_TYPES = {int: "integer", float: "number", str: "string", bool: "boolean", list: "array", dict: "object"}
_TYPES[NoneType] = "null"


def json_schema() -> dict[str, Any]:
    """
    The schema of a recipe. It knows keys, types, values and ranges; the reader of recipes also checks which of them go
    together.
    """
    sections: dict[str, Any] = {name: _section(section) for name, section in SECTIONS.items()}
    sections["heads"] = {
        "description": "What to train. Each entry makes one head at each hookpoint that its patterns match.",
        "type": "array",
        "minItems": 1,
        "items": sections["heads"],
    }
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "Recipe of sae_accel",
        "type": "object",
        "additionalProperties": False,
        "properties": sections,
    }


def json_schema_text() -> str:
    """The schema as the file `recipes/schema.json` holds it, without the last line's end."""
    return json.dumps(json_schema(), indent=2, ensure_ascii=False)


def _section(section: type) -> dict[str, Any]:
    hints = field_hints(section)
    doc = " ".join((section.__doc__ or "").split("Examples:")[0].split())
    properties = {option.name: _field(hints[option.name], option) for option in fields(section)}
    return {"description": doc, "type": "object", "additionalProperties": False, "properties": properties}


def _field(hint: Any, option: Any) -> dict[str, Any]:
    help: Help = option.metadata["help"]
    return {"description": str(help), **_kind(hint, help), "default": default_of(option)}


def _kind(hint: Any, help: Help) -> dict[str, Any]:
    """The types, values and range that a field takes. JSON schemas apply a range to numbers alone."""
    options = get_args(hint) if is_union(hint) else (hint,)
    kind: dict[str, Any] = {}
    types: list[str] = []
    for option in options:
        if get_origin(option) is Literal:
            types.append("string")
            kind["enum"] = [*get_args(option), *([None] if NoneType in options else [])]
        elif get_origin(option) is list:
            (item,) = get_args(option)
            kind["items"] = _kind(item, help)
            # A list of one string can be written without brackets.
            types += ["array", "string"] if item is str else ["array"]
        else:
            types.append(_TYPES[get_origin(option) or option])
    ranges = {"minimum": help.minimum, "maximum": help.maximum, "exclusiveMinimum": help.above}
    if {"integer", "number"} & set(types):
        kind |= {name: limit for name, limit in ranges.items() if limit is not None}
    return {"type": types[0] if len(types) == 1 else types, **kind}
