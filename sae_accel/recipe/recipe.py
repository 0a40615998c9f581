import difflib
import math
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from ..common.errors import InputError, near
from .arguments import (
    DataArguments,
    HeadArguments,
    LoraArguments,
    ModelArguments,
    SaeTrainingArguments,
    secret_fields,
)
from .checks import (
    check_entry,
    check_hub,
    check_model,
    check_objective,
    check_schedule,
    check_trackers,
)


SECTIONS = {
    "model": ModelArguments,
    "data": DataArguments,
    "heads": HeadArguments,
    "lora": LoraArguments,
    "training": SaeTrainingArguments,
}
_TYPE_NAMES = {int: "integer", float: "number", str: "string", bool: "true or false", list: "list", dict: "mapping"}


@dataclass
class Recipe:
    """
    All that a run is, checked: an impossible combination is refused when the recipe is made.

    Args:
        model ([`ModelArguments`]): The LM.
        data ([`DataArguments`]): The tokens.
        heads (`list[HeadArguments]`): What to train.
        training ([`SaeTrainingArguments`]): How.
        lora ([`LoraArguments`], *optional*): A LoRA of the LM to train around the heads.

    Raises:
        `InputError`: on an impossible combination.
    """

    model: ModelArguments = field(default_factory=ModelArguments)
    data: DataArguments = field(default_factory=DataArguments)
    heads: list[HeadArguments] = field(default_factory=lambda: [HeadArguments()])
    training: SaeTrainingArguments = field(default_factory=SaeTrainingArguments)
    lora: LoraArguments | None = None

    def __post_init__(self) -> None:
        self.validate()

    @classmethod
    def from_dict(cls, content: Mapping[str, Any], origin: str = "recipe") -> "Recipe":
        """
        A recipe from nested mappings, as YAML gives them.

        Args:
            content (`Mapping[str, Any]`): The sections; those that are missing have their defaults.
            origin (`str`): Where they come from, with which an error begins.

        Raises:
            `InputError`: with the path of the key, what was found and what is allowed.
        """
        try:
            return cls(**_sections(content))
        except InputError as error:
            raise InputError(f"{origin}: {error}") from error

    def validate(self) -> None:
        """
        Checks what needs neither the LM nor the data.

        Raises:
            `InputError`: on the first combination that cannot be run.
        """
        if not self.heads:
            raise InputError("heads: there is no entry, so nothing to train.")
        for i, entry in enumerate(self.heads):
            check_entry(entry, f"heads[{i}]")
            if entry in self.heads[:i]:
                raise InputError(
                    f"heads[{i}]: the same as heads[{self.heads.index(entry)}] in every field. Remove one of them."
                )
        check_model(self.model)
        check_objective(self.training, self.heads, self.lora)
        if self.lora is not None and self.model.adapter is not None:
            raise InputError(
                "lora: the LM carries model.adapter already. Merge that into the LM first, or remove one."
            )
        if self.training.save_best and not (self.training.eval_steps and self.data.eval_examples):
            raise InputError(
                "training.save_best: it needs evaluations. Set training.eval_steps and data.eval_examples."
            )
        _check_init_from(self.training)
        check_hub(self.training)
        check_schedule(self.training)
        check_trackers(self.training.report_to)

    def to_dict(self) -> dict[str, Any]:
        """Every field of every section, without secrets; `from_dict` reads it back."""
        return {
            "model": _without_secrets(self.model),
            "data": _without_secrets(self.data),
            "heads": [_without_secrets(entry) for entry in self.heads],
            **({} if self.lora is None else {"lora": _without_secrets(self.lora)}),
            "training": _without_secrets(self.training),
        }

    def save(self, path: str | Path) -> None:
        """Writes the recipe as YAML, resolved: with every default."""
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        text = yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)
        Path(path).write_text(text, encoding="utf-8")


def load_recipe(path: str | Path, overrides: Iterable[tuple[str, Any]] = ()) -> Recipe:
    """
    Reads a recipe from a YAML file.

    Args:
        path (`str` or `Path`): The file.
        overrides (`Iterable[tuple[str, Any]]`): Dotted names and the values that replace those of the file, such as
            `("heads.k", 64)` for all entries of heads, or `("heads.1.k", 64)` for the second.

    Raises:
        `InputError`: if it is missing, is not YAML, or cannot be run.
    """
    overrides = list(overrides)
    origin = f"{path} with overrides" if overrides else str(path)
    return Recipe.from_dict(with_values(_read_yaml(Path(path)), overrides), origin)


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
    index = int(keys.pop(0)) if section == "heads" and keys and keys[0].isdecimal() else None
    if section not in SECTIONS or not keys:
        advice = "" if section in SECTIONS else _advice(section, SECTIONS)
        raise InputError(
            f"{name!r}: there is no such option.{advice} Options are --section.field, with a section of "
            f"{', '.join(SECTIONS)}."
        )
    hint = field_hints(SECTIONS[section]).get(keys[0])
    options = get_args(hint) if is_union(hint) else (hint,)
    if hint is not None and len(keys) > 1 and dict not in map(get_origin, options):
        raise InputError(f"{name!r}: {section}.{keys[0]} is {type_name(hint)}, with no keys inside.")
    return section, index, keys


def convert(value: Any, hint: Any, metadata: Mapping[str, Any], path: str) -> Any:
    """
    `value` as the type `hint` of a field, without guessing: only what YAML itself reads otherwise is converted.

    Raises:
        `InputError`: with the path, what was found and what is allowed.
    """
    options = get_args(hint) if is_union(hint) else (hint,)
    if value is None and NoneType in options:
        return None
    for option in options:
        if get_origin(option) is list:
            (item_hint,) = get_args(option)
            items = [value] if isinstance(value, str) and item_hint is str else value
            if isinstance(items, list):
                return [convert(item, item_hint, metadata, f"{path}[{i}]") for i, item in enumerate(items)]
        elif get_origin(option) is Literal and isinstance(value, str) and value in get_args(option):
            return value
        elif option is float and (number := _number(value)) is not None:
            return _in_range(number, metadata, path)
        # Not isinstance: true would be an integer.
        elif type(value) is (get_origin(option) or option):
            return _in_range(value, metadata, path)
    choices = [choice for option in options if get_origin(option) is Literal for choice in get_args(option)]
    found = "a value of another type" if metadata.get("secret") else _shown(value)
    raise InputError(f"{path}: expected {type_name(hint)}, found {found}.{near(value, choices)}")


def type_name(hint: Any) -> str:
    """A type in words."""
    if is_union(hint):
        *names, last = (type_name(part) for part in get_args(hint))
        return f"{', '.join(names).replace('true or false', 'true, false')} or {last}"
    if get_origin(hint) is Literal:
        return f"one of {', '.join(get_args(hint))}"
    if get_origin(hint) is list:
        return f"list of {type_name(get_args(hint)[0])}s"
    return "null" if hint is NoneType else _TYPE_NAMES[get_origin(hint) or hint]


def is_union(hint: Any) -> bool:
    """Whether a type is one of several; `X | None` and `Literal[...] | None` have different classes in Python."""
    return get_origin(hint) in (Union, UnionType)


def field_hints(section: type) -> dict[str, Any]:
    """The types of a section's fields by name."""
    hints = get_type_hints(section)
    return {f.name: hints[f.name] for f in fields(section)}


def default_of(option: Any) -> Any:
    """The default of a dataclass field."""
    return option.default if option.default is not MISSING else option.default_factory()


class StrictLoader(yaml.SafeLoader):
    """YAML in which a key that stands twice is an error, where PyYAML would take the last."""

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in seen:
                    raise yaml.composer.ComposerError(None, None, f"key {key.value!r} stands twice", key.start_mark)
                seen.add((key.tag, key.value))
        return node


def _read_yaml(path: Path) -> dict[str, Any]:
    text = _read_text(path)
    try:
        content = yaml.load(text, Loader=StrictLoader)
    except yaml.YAMLError as error:
        raise InputError(f"Recipe {str(path)!r} is not YAML{_fault(error, text)}.") from error
    except ValueError as error:
        # PyYAML lets a date that is none, such as 2020-13-45, end in Python's own error.
        raise InputError(f"Recipe {str(path)!r} holds a value that cannot be read: {error}.") from error
    if content is None:
        raise InputError(f"Recipe {str(path)!r} is empty. Its sections are {', '.join(SECTIONS)}.")
    if not isinstance(content, dict):
        raise InputError(f"Recipe {str(path)!r} must be a mapping with the keys {', '.join(SECTIONS)}, and is not.")
    return content


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (FileNotFoundError, IsADirectoryError) as error:
        folder = path if path.is_dir() else path.parent
        near = (
            sorted(other.name for other in folder.iterdir() if other.suffix in (".yaml", ".yml"))
            if folder.is_dir()
            else []
        )
        there = f" In {str(folder)!r} there are: {', '.join(near)}." if near else ""
        what = f"Recipe {str(path)!r} is a folder." if path.is_dir() else f"There is no recipe {str(path)!r}."
        raise InputError(f"{what}{there}") from error
    except OSError as error:
        raise InputError(f"Recipe {str(path)!r} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise InputError(f"Recipe {str(path)!r} is not text in UTF-8.") from error
    except ValueError as error:
        raise InputError(f"Recipe {str(path)!r} cannot be read: {error}.") from error


def _fault(error: yaml.YAMLError, text: str) -> str:
    """Where and why text is not YAML."""
    if isinstance(error, yaml.reader.ReaderError):
        before = text[: error.position]
        line, column = before.count("\n") + 1, len(before) - before.rfind("\n")
        return f", line {line}, column {column}: it holds the character {chr(error.character)!r}"
    mark = error.problem_mark
    reason = ", ".join(part for part in (error.context, error.problem) if part)
    return f", line {mark.line + 1}, column {mark.column + 1}: {reason}"


def _sections(content: Any) -> dict[str, Any]:
    if not isinstance(content, Mapping):
        raise InputError(f"expected a mapping with the keys {', '.join(SECTIONS)}, found {_shown(content)}.")
    _check_keys(content, "", SECTIONS)
    sections = {name: _section(SECTIONS[name], content[name], name) for name in content if name != "heads"}
    entries = content.get("heads", [{}])
    if not isinstance(entries, list) or not entries:
        raise InputError(f"heads: expected a list of entries, each after a dash, found {_shown(entries)}.")
    return {**sections, "heads": [_section(HeadArguments, entry, f"heads[{i}]") for i, entry in enumerate(entries)]}


def _section(section: type, content: Any, path: str) -> Any:
    if not isinstance(content, Mapping):
        raise InputError(f"{path}: expected a mapping of keys to values, found {_shown(content)}.")
    hints = field_hints(section)
    _check_keys(content, path, hints)
    metadata = {f.name: f.metadata for f in fields(section)}
    return section(
        **{key: convert(value, hints[key], metadata[key], f"{path}.{key}") for key, value in content.items()}
    )


def _check_keys(content: Mapping[str, Any], path: str, allowed: Iterable[str]) -> None:
    for key in content:
        if key not in allowed:
            # A quoted key stays on one line, whatever it holds.
            shown = key if isinstance(key, str) and key.isidentifier() else repr(key)
            where = f"{path}.{shown}" if path else shown
            raise InputError(
                f"{where}: there is no such key.{_advice(str(key), allowed)} Allowed are {', '.join(allowed)}."
            )


def _advice(key: str, allowed: Iterable[str]) -> str:
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


def _in_range(value: Any, metadata: Mapping[str, Any], path: str) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        raise InputError(f"{path}: found {value}, it must be finite.")
    if "minimum" in metadata and value < metadata["minimum"]:
        raise InputError(f"{path}: found {value}, the least allowed is {metadata['minimum']}.")
    if "above" in metadata and value <= metadata["above"]:
        raise InputError(f"{path}: found {value}, it must be above {metadata['above']:g}.")
    if isinstance(value, dict) and metadata.get("device_keys"):
        value = _flat(value)
    if isinstance(value, dict) and (wrong := [key for key in value if not isinstance(key, str)]):
        raise InputError(f"{path}: its keys must be strings, found {_shown(wrong[0])}.")
    return value


def _check_init_from(training: SaeTrainingArguments) -> None:
    if training.init_from is None or not training.overwrite_output_dir:
        return
    source, output_dir = Path(training.init_from).resolve(), Path(training.output_dir).resolve()
    if source.is_dir() and source.is_relative_to(output_dir):
        raise InputError(
            f"training.init_from: {training.init_from!r} lies in training.output_dir, which overwrite_output_dir "
            "would delete. Use another output_dir."
        )


def _flat(value: dict[Any, Any]) -> dict[str, Any]:
    """
    A mapping by strings alone: devices are numbers, which YAML reads as such, and modules have dotted names, which a
    command line takes for mappings in mappings.
    """
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat |= (
            {f"{key}.{inner}": x for inner, x in _flat(item).items()} if isinstance(item, dict) else {str(key): item}
        )
    return flat


def _number(value: Any) -> float | None:
    """A float, or what YAML takes for something else: an integer, or 1e-3, which without a point is a string."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        return float(value)
    except (ValueError, OverflowError):
        return None


def _without_secrets(arguments: Any) -> dict[str, Any]:
    hidden = secret_fields(arguments)
    return {key: value for key, value in asdict(arguments).items() if key not in hidden}


def _shown(value: Any) -> str:
    if value is None:
        return "null"
    return f"{value!r} ({_TYPE_NAMES.get(type(value), type(value).__name__)})"
