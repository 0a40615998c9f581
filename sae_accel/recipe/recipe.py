"""
The recipe: every setting of a run, as one checked object.

A recipe comes from a YAML file (`load_recipe`), from nested mappings (`Recipe.from_dict`) or from Python
(`Recipe(...)`). In each case it is checked at once, with nothing loaded. An unknown key or a value of another type is
refused with the path of the key. A run saves its recipe with every default filled in and every secret left out.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from ..common.errors import InputError
from ..common.secrets import without_secret_keys
from .arguments import (
    SECTIONS,
    DataArguments,
    HeadArguments,
    LoraArguments,
    ModelArguments,
    SaeTrainingArguments,
    secret_fields,
)
from .changes import check_allowed
from .checks import check_entry, check_hub, check_model, check_objective, check_schedule, check_steps, check_trackers
from .overrides import advice, with_values
from .schema import field_hints, shown, typed
from .yaml_file import read_yaml


@dataclass
class Recipe:
    """
    All settings of a run. A combination that cannot run is refused when the recipe is made.

    Args:
        model ([`ModelArguments`]): The LM.
        data ([`DataArguments`]): The dataset.
        heads (`list[HeadArguments]`): The heads to train.
        training ([`SaeTrainingArguments`]): How the heads train.
        lora ([`LoraArguments`], *optional*): A LoRA of the LM to train around the heads.

    Raises:
        `InputError`: if the settings do not go together.

    Examples:
        ```python
        from sae_accel import HeadArguments, ModelArguments, Recipe, SaeTrainingArguments

        recipe = Recipe(
            model=ModelArguments(name_or_path="HuggingFaceTB/SmolLM2-135M"),
            heads=[HeadArguments(hookpoints="layers.*", stride=2, k=64)],
            training=SaeTrainingArguments(output_dir="runs/smollm2", max_tokens=10_000_000),
        )
        recipe.save("recipes/smollm2.yaml")
        ```
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
            content (`Mapping[str, Any]`): The sections. A missing section or field has its default.
            origin (`str`): The source of the mappings, with which an error begins.

        Raises:
            `InputError`: with the path of the key, what was found and what is allowed.

        Examples:
            ```python
            from sae_accel import Recipe

            Recipe.from_dict({"heads": [{"hookpoints": "layers.*", "k": 64}], "training": {"max_steps": 100}})
            ```
        """
        try:
            return cls(**_sections(content))
        except InputError as error:
            raise InputError(f"{origin}: {error}") from error
        except RecursionError as error:
            raise InputError(f"{origin}: it is nested too deeply, or holds itself by an alias.") from error

    def validate(self) -> None:
        """
        Checks everything that needs neither the LM nor the data. It runs when the recipe is made.

        Raises:
            `InputError`: on the first combination that cannot run.

        Examples:
            ```python
            from sae_accel import Recipe

            recipe = Recipe()
            recipe.training.loss = "kl"
            recipe.validate()
            ```
        """
        if not self.heads:
            raise InputError(
                "heads: it has no entry, so there is nothing to train. Add one, such as hookpoints: layers.*"
            )
        for i, entry in enumerate(self.heads):
            check_entry(entry, f"heads[{i}]")
            if entry in self.heads[:i]:
                raise InputError(
                    f"heads[{i}]: the same as heads[{self.heads.index(entry)}] in every field. Remove one of the two."
                )
        if not self.data.path:
            raise InputError("data.path: it is empty. Name a dataset, a folder or files: --data.path texts.jsonl")
        check_model(self.model)
        check_objective(self.training, self.heads, self.lora)
        if self.lora is not None and self.model.adapter is not None:
            raise InputError(
                "lora: the LM carries model.adapter already. Merge the adapter into the LM, or remove one of the two."
            )
        if self.training.save_best and not (self.training.eval_steps and self.data.eval_examples):
            raise InputError(
                "training.save_best: it needs evaluations. Set --training.eval_steps 100 and --data.eval_examples 32."
            )
        _check_init_from(self.training)
        check_hub(self.training)
        check_schedule(self.training)
        if self.training.max_steps is not None:
            entries = {f"heads[{i}]": entry for i, entry in enumerate(self.heads)}
            check_steps(self.training, entries, self.training.max_steps)
        check_trackers(self.training.report_to)
        check_allowed(self.training.allow_changes)

    def to_dict(self) -> dict[str, Any]:
        """
        Every field of every section, without secrets. `from_dict` reads it back.

        Examples:
            ```python
            from sae_accel import Recipe

            Recipe().to_dict()["heads"][0]["k"]  # 32
            ```
        """
        return {
            "model": _without_secrets(self.model),
            "data": _without_secrets(self.data),
            "heads": [_without_secrets(entry) for entry in self.heads],
            **({} if self.lora is None else {"lora": _without_secrets(self.lora)}),
            "training": _without_secrets(self.training),
        }

    def save(self, path: str | Path) -> None:
        """
        Writes the recipe as YAML, with every default and without secrets.

        Args:
            path (`str` or `Path`): The file. Missing folders are made.

        Examples:
            ```python
            from sae_accel import load_recipe

            load_recipe("recipes/quickstart.yaml").save("recipes/copy.yaml")
            ```
        """
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        text = yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)
        Path(path).write_text(text, encoding="utf-8")


def load_recipe(path: str | Path, overrides: Iterable[tuple[str, Any]] = ()) -> Recipe:
    """
    Reads a recipe from a YAML file.

    Args:
        path (`str` or `Path`): The file.
        overrides (`Iterable[tuple[str, Any]]`): Dotted names and values that replace the file's, such as
            `("heads.k", 64)` for all entries of heads, or `("heads.1.k", 64)` for the second.

    Raises:
        `InputError`: if the file is missing, is not YAML, or cannot run as a recipe.

    Examples:
        ```python
        from sae_accel import load_recipe

        recipe = load_recipe("recipes/quickstart.yaml", [("heads.k", 16), ("training.output_dir", "runs/k16")])
        ```
    """
    overrides = list(overrides)
    origin = f"{path} with overrides" if overrides else str(path)
    return Recipe.from_dict(with_values(read_yaml(Path(path)), overrides), origin)


def _sections(content: Any) -> dict[str, Any]:
    if not isinstance(content, Mapping):
        raise InputError(f"expected a mapping with the keys {', '.join(SECTIONS)}, found {shown(content)}.")
    _check_keys(content, "", SECTIONS)
    sections = {name: _section(SECTIONS[name], content[name], name) for name in content if name != "heads"}
    entries = content.get("heads", [{}])
    if not isinstance(entries, list) or not entries:
        raise InputError(f"heads: expected a list of entries, each after a dash, found {shown(entries)}.")
    return {**sections, "heads": [_section(HeadArguments, entry, f"heads[{i}]") for i, entry in enumerate(entries)]}


def _section(section: type, content: Any, path: str) -> Any:
    if not isinstance(content, Mapping):
        raise InputError(f"{path}: expected a mapping of keys to values, found {shown(content)}.")
    hints = field_hints(section)
    _check_keys(content, path, hints)
    helps = {f.name: f.metadata["help"] for f in fields(section)}
    return section(**{key: typed(value, hints[key], helps[key], f"{path}.{key}") for key, value in content.items()})


def _check_keys(content: Mapping[str, Any], path: str, allowed: Iterable[str]) -> None:
    for key in content:
        if key not in allowed:
            # repr keeps a key with a line break on one line.
            shown = key if isinstance(key, str) and key.isidentifier() else repr(key)
            where = f"{path}.{shown}" if path else shown
            raise InputError(
                f"{where}: there is no such key.{advice(str(key), allowed)} Allowed are {', '.join(allowed)}."
            )


def _check_init_from(training: SaeTrainingArguments) -> None:
    if training.init_from is None or not training.overwrite_output_dir:
        return
    source, output_dir = Path(training.init_from).resolve(), Path(training.output_dir).resolve()
    if source.is_dir() and source.is_relative_to(output_dir):
        raise InputError(
            f"training.init_from: {training.init_from!r} lies in training.output_dir, which overwrite_output_dir "
            "would delete. Use another --training.output_dir."
        )


def _without_secrets(arguments: Any) -> dict[str, Any]:
    hidden = secret_fields(arguments)
    content = {key: value for key, value in asdict(arguments).items() if key not in hidden}
    # A mapping for another library may hold a secret, too, such as `data.load_args.token`.
    return {key: without_secret_keys(value) if isinstance(value, dict) else value for key, value in content.items()}
