import difflib
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml
from accelerate.utils import LoggerType
from transformers import SchedulerType

from .arguments import DataArguments, HeadArguments, ModelArguments, SaeTrainingArguments, secret_fields
from .errors import InputError


SECTIONS = {"model": ModelArguments, "data": DataArguments, "heads": HeadArguments, "training": SaeTrainingArguments}
# The schedules that need nothing but a warm-up and a length.
SCHEDULES = ("linear", "cosine", "constant", "constant_with_warmup", "inverse_sqrt", "polynomial")


@dataclass
class Recipe:
    """
    All that a run is, checked: a wrong key, type or combination is refused when the recipe is made.

    Args:
        model ([`ModelArguments`]): The LM.
        data ([`DataArguments`]): The tokens.
        heads (`list[HeadArguments]`): What to train.
        training ([`SaeTrainingArguments`]): How.

    Raises:
        `InputError`: on an impossible combination.
    """

    model: ModelArguments = field(default_factory=ModelArguments)
    data: DataArguments = field(default_factory=DataArguments)
    heads: list[HeadArguments] = field(default_factory=lambda: [HeadArguments()])
    training: SaeTrainingArguments = field(default_factory=SaeTrainingArguments)

    def __post_init__(self) -> None:
        for i, entry in enumerate(self.heads):
            _check_entry(entry, f"heads[{i}]")
        _check_training(self.training)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "Recipe":
        """
        A recipe from nested mappings, as YAML gives them.

        Raises:
            `InputError`: with the path of the key, what was found and what is allowed.
        """
        _check_keys(content, "", SECTIONS)
        heads = content.get("heads", [{}])
        if not isinstance(heads, list) or not heads:
            raise InputError(f"heads: expected a list of entries, each after a dash, found {_shown(heads)}.")
        return cls(
            model=_section(ModelArguments, content.get("model", {}), "model"),
            data=_section(DataArguments, content.get("data", {}), "data"),
            heads=[_section(HeadArguments, entry, f"heads[{i}]") for i, entry in enumerate(heads)],
            training=_section(SaeTrainingArguments, content.get("training", {}), "training"),
        )

    def to_dict(self) -> dict[str, Any]:
        """Every field of every section, without secrets; `from_dict` reads it back."""
        sections = {name: _without_secrets(getattr(self, name)) for name in ("model", "data", "training")}
        heads = [_without_secrets(entry) for entry in self.heads]
        return {"model": sections["model"], "data": sections["data"], "heads": heads, "training": sections["training"]}

    def save(self, path: str | Path) -> None:
        """Writes the recipe as YAML, resolved: with every default."""
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True))


def load_recipe(path: str | Path) -> Recipe:
    """
    Reads a recipe from a YAML file.

    Raises:
        `InputError`: if it is missing, is not YAML, or cannot be run.
    """
    return checked(read_yaml(path), str(path))


def checked(content: Mapping[str, Any], origin: str) -> Recipe:
    """The recipe in nested mappings; an error names `origin`, the file it came from."""
    try:
        return Recipe.from_dict(content)
    except InputError as error:
        raise InputError(f"{origin}: {error}") from error


def read_yaml(path: str | Path) -> dict[str, Any]:
    """
    The mapping in a YAML file.

    Raises:
        `InputError`: if there is no such file, or no mapping in it, or a key stands in it twice.
    """
    path = Path(path)
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_StrictLoader)
    except FileNotFoundError as error:
        near = sorted(other.name for other in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        there = f" In {str(path.parent)!r} there are: {', '.join(near)}." if near else ""
        raise InputError(f"There is no recipe {str(path)!r}.{there}") from error
    except OSError as error:
        raise InputError(f"Recipe {str(path)!r} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise InputError(f"Recipe {str(path)!r} is not text in UTF-8.") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        reason = getattr(error, "problem", None) or "it cannot be parsed"
        raise InputError(f"Recipe {str(path)!r} is not YAML{where}: {reason}.") from error
    if not isinstance(content, dict):
        raise InputError(f"Recipe {str(path)!r} must be a mapping with the keys {', '.join(SECTIONS)}, and is not.")
    return content


def check_latents(k: int, num_latents: int, activation: str, multi_topk: bool, where: str) -> None:
    """
    Checks that a head can select its latents.

    Raises:
        `InputError`: naming the entry, `where`.
    """
    if k > num_latents:
        raise InputError(f"{where}: k is {k}, but the head has {num_latents} latents. Lower k or raise num_latents.")
    if activation == "groupmax" and num_latents % k:
        raise InputError(
            f"{where}: groupmax cuts {num_latents} latents into k = {k} equal groups, which does not divide. Change k "
            "or num_latents."
        )
    if multi_topk and activation != "topk":
        raise InputError(f"{where}: multi_topk goes with activation topk, not with {activation}.")
    if multi_topk and 4 * k > num_latents:
        raise InputError(f"{where}: multi_topk selects 4 * k = {4 * k} latents, but the head has {num_latents}.")


def convert(value: Any, hint: Any, metadata: Mapping[str, Any], path: str) -> Any:
    """
    `value` as the type `hint` of a field, without guessing: only what YAML itself reads as something else is
    converted.

    Raises:
        `InputError`: with the path, what was found and what is allowed.
    """
    if is_union(hint):
        return _convert_union(value, hint, metadata, path)
    origin = get_origin(hint)
    if origin is Literal:
        choices = get_args(hint)
        if value not in choices:
            raise InputError(
                f"{path}: found {_shown(value)}, allowed are {', '.join(choices)}.{_near(value, choices)}"
            )
        return value
    if origin is list:
        value = [value] if isinstance(value, str) else value
        if not isinstance(value, list):
            raise _wrong_type(value, hint, path)
        return [convert(item, get_args(hint)[0], metadata, f"{path}[{i}]") for i, item in enumerate(value)]
    if hint is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        value = _to_float(value)
    if not isinstance(value, origin or hint) or (isinstance(value, bool) and hint is not bool):
        raise _wrong_type(value, hint, path)
    if "minimum" in metadata and value < metadata["minimum"]:
        raise InputError(f"{path}: found {value}, the least allowed is {metadata['minimum']}.")
    if "above" in metadata and not value > metadata["above"]:
        raise InputError(f"{path}: found {value}, it must be above {metadata['above']}.")
    return value


def type_name(hint: Any) -> str:
    """A type in words."""
    if is_union(hint):
        return " or ".join(type_name(part) for part in get_args(hint))
    if get_origin(hint) is Literal:
        return f"one of {', '.join(get_args(hint))}"
    if get_origin(hint) is list:
        return f"list of {type_name(get_args(hint)[0])}s"
    if get_origin(hint) is dict:
        return "mapping"
    return {int: "integer", float: "number", str: "string", bool: "true or false", NoneType: "null"}[hint]


def is_union(hint: Any) -> bool:
    """Whether a type is one of several; `X | None` and `Literal[...] | None` have different classes in Python."""
    return get_origin(hint) in (Union, UnionType)


def field_hints(section: type) -> dict[str, Any]:
    """The types of a section's fields by name."""
    hints = get_type_hints(section)
    return {f.name: hints[f.name] for f in fields(section)}


def _section(section: type, content: Any, path: str) -> Any:
    if not isinstance(content, Mapping):
        raise InputError(f"{path}: expected a mapping of keys to values, found {_shown(content)}.")
    _check_keys(content, path, field_hints(section))
    hints = field_hints(section)
    known = {f.name: f.metadata for f in fields(section)}
    return section(**{key: convert(value, hints[key], known[key], f"{path}.{key}") for key, value in content.items()})


def _check_keys(content: Mapping[str, Any], path: str, allowed: Iterable[str]) -> None:
    allowed = list(allowed)
    for key in content:
        if key not in allowed:
            where = f"{path}.{key}" if path else str(key)
            homes = [name for name, section in SECTIONS.items() if key in field_hints(section)]
            hint = f" It belongs under {' or '.join(homes)}." if homes else _near(key, allowed)
            raise InputError(f"{where}: there is no such key.{hint} Allowed are {', '.join(allowed)}.")


def _convert_union(value: Any, hint: Any, metadata: Mapping[str, Any], path: str) -> Any:
    options = get_args(hint)
    if value is None and NoneType in options:
        return None
    rest = [option for option in options if option is not NoneType]
    if len(rest) == 1:
        return convert(value, rest[0], metadata, path)
    if not isinstance(value, tuple(rest)):
        raise _wrong_type(value, hint, path)
    return value


def _check_entry(entry: HeadArguments, where: str) -> None:
    if entry.hookpoints and entry.layers:
        raise InputError(f"{where}: hookpoints and layers are two ways to say one thing. Keep one.")
    if entry.type == "sae":
        for name in ("source", "skip_connection"):
            if getattr(entry, name):
                raise InputError(f"{where}.{name}: only a transcoder has one. Set type: transcoder, or remove it.")
    if entry.type == "transcoder" and entry.normalize_decoder:
        raise InputError(
            f"{where}.normalize_decoder: a transcoder's decoder starts at zero, which has no unit norm. Remove it."
        )
    if entry.name is not None and (not entry.name or set(entry.name) & set("/\\:") or entry.name.startswith(".")):
        raise InputError(f"{where}.name: {entry.name!r} cannot be the name of a folder.")
    if entry.num_latents is not None:
        check_latents(entry.k, entry.num_latents, entry.activation, entry.multi_topk, where)
    if entry.multi_topk and entry.activation != "topk":
        raise InputError(f"{where}: multi_topk goes with activation topk, not with {entry.activation}.")


def _check_training(training: SaeTrainingArguments) -> None:
    schedule = training.lr_scheduler_type
    if schedule is not None and schedule not in SCHEDULES:
        known = schedule in set(SchedulerType)
        reason = "needs arguments that a recipe does not have" if known else "is no schedule of transformers"
        raise InputError(f"training.lr_scheduler_type: {schedule!r} {reason}. Allowed are {', '.join(SCHEDULES)}.")
    if training.optim == "signum" and schedule not in (None, "constant", "constant_with_warmup"):
        raise InputError(
            f"training.lr_scheduler_type: signum is schedule-free, so {schedule} would count twice. Remove it, or "
            "use adam."
        )
    if training.max_steps is not None and training.warmup_steps is not None:
        if training.warmup_steps >= training.max_steps and training.warmup_steps >= 1:
            raise InputError(
                f"training.warmup_steps: {training.warmup_steps:g} is not below training.max_steps, "
                f"{training.max_steps}."
            )
    trackers = [str(tracker.value) for tracker in LoggerType] + ["none"]
    for tracker in training.report_to:
        if tracker not in trackers:
            raise InputError(
                f"training.report_to: {tracker!r} is no tracker of Accelerate.{_near(tracker, trackers)} Allowed are "
                f"{', '.join(trackers)}."
            )
    if "none" in training.report_to and len(training.report_to) > 1:
        raise InputError("training.report_to: none does not go with other trackers.")


def _without_secrets(arguments: Any) -> dict[str, Any]:
    hidden = secret_fields(arguments)
    return {key: value for key, value in asdict(arguments).items() if key not in hidden}


def _to_float(value: int | str) -> Any:
    """YAML reads 1e-3, without a point, as a string; what is no number stays as it is, and is refused."""
    try:
        return float(value)
    except ValueError:
        return value


def _wrong_type(value: Any, hint: Any, path: str) -> InputError:
    return InputError(f"{path}: expected {type_name(hint)}, found {_shown(value)}.")


def _shown(value: Any) -> str:
    return f"{value!r} ({type_name(type(value))})" if type(value) in (int, float, str, bool) else repr(value)


def _near(value: Any, choices: Iterable[str]) -> str:
    closest = difflib.get_close_matches(str(value), list(choices), n=1, cutoff=0.5)
    return f" Did you mean {closest[0]}?" if closest else ""


class _StrictLoader(yaml.SafeLoader):
    """YAML in which a key that stands twice is an error, where PyYAML would take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} stands twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def default_of(option: Any) -> Any:
    """The default of a dataclass field."""
    return option.default if option.default is not MISSING else option.default_factory()
