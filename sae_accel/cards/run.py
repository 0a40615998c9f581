"""
Reads a run's folder for its model card: configs of heads, recipe, metrics, log and firing frequencies.

A person may have edited these files, or a kill may have cut them. So every value that the card shows is checked here,
and the error names the file and the value. A missing file only leaves its part of the card out.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from safetensors import SafetensorError
from safetensors.numpy import load_file

from ..common.errors import InputError, one_line
from ..common.run_files import ADAPTER, FREQUENCIES, HISTORY, METRICS, RECIPE
from ..loading.auto import AutoSae
from ..models import HeadConfig
from .markdown import number


# The card shows this in place of a metric that is NaN or infinite.
NO_NUMBER = "no number"
# The fields of a recipe that the card reads, and their types.
_RECIPE_KINDS: dict[str, dict[str, type]] = {
    "model": {"name_or_path": str, "revision": str, "quantization": str, "adapter": str},
    "data": {"path": str, "name": str, "split": str, "ctx_len": int, "load_args": dict},
    "training": {"optim": str, "loss": str, "init_from": str},
}
_WORDS = {str: "text", int: "a whole number", float: "a number", list: "a list", dict: "a mapping"}


@dataclass(frozen=True)
class Run:
    """
    The content of a run's folder, as a card reads it.

    Args:
        folder (`Path`): The run's folder.
        configs (`dict[str, HeadConfig]`): The config of each head.
        recipe_text (`str`): The recipe as it was written; empty if there is none.
        recipe (`dict[str, Any]`): The recipe's content; empty if there is none.
        metrics (`dict[str, float]`): The metrics that are finite numbers.
        no_number (`frozenset[str]`): The names of the metrics that are NaN or infinite.
    """

    folder: Path
    configs: dict[str, HeadConfig]
    recipe_text: str
    recipe: dict[str, Any]
    metrics: dict[str, float]
    no_number: frozenset[str] = frozenset()

    def section(self, name: str) -> dict[str, Any]:
        """A section of the recipe; empty if the recipe has none of this name."""
        return self.recipe.get(name) or {}

    def shown(self, key: str, form: str) -> str:
        """A metric as text for the card; empty if it was not measured."""
        return NO_NUMBER if key in self.no_number else number(self.metrics.get(key), form)

    @property
    def has_adapter(self) -> bool:
        """Whether the run trained a LoRA of the LM."""
        return (self.folder / ADAPTER / "adapter_config.json").is_file()


def read_run(folder: Path, include: Sequence[str]) -> Run:
    """
    Reads a run's folder.

    Args:
        folder (`Path`): The folder in which heads were saved.
        include (`Sequence[str]`): Globs over the names of heads; all heads if empty.

    Raises:
        `InputError`: if the folder has no head, or a file in it cannot be read or has a wrong content.
    """
    if not folder.is_dir():
        raise InputError(f"There is no folder {str(folder)!r}.")
    heads = AutoSae.open(folder)
    if include:
        heads = heads.select(*include)
    file = folder / RECIPE
    recipe = _mapping(file, yaml.safe_load)
    _check_recipe(file, recipe)
    metrics = _mapping(folder / METRICS, json.loads)
    for key, value in metrics.items():
        _expect(folder / METRICS, key, value, float)
    return Run(
        folder,
        {name: heads.config(name) for name in heads},
        file.read_text(encoding="utf-8") if recipe else "",
        recipe,
        {key: value for key, value in metrics.items() if math.isfinite(value)},
        frozenset(key for key, value in metrics.items() if not math.isfinite(value)),
    )


def check_run(folder: Path, include: Sequence[str]) -> None:
    """
    Reads every file that the card of a run needs, so that a damaged one is refused before a push starts.

    Raises:
        `InputError`: if a file cannot be read, or has a wrong content.
    """
    run = read_run(folder, include)
    log_history(run)
    frequencies_of(run)


def log_history(run: Run) -> list[dict[str, Any]]:
    """The values of the trainer's log that the plots show."""
    path = run.folder / HISTORY
    shown = {"train/tokens", *(f"train/fvu/{name}" for name in run.configs)}
    if not path.is_file():
        return []
    with open(path, encoding="utf-8") as lines:
        return [_logged(path, i, line, shown) for i, line in enumerate(lines, 1)]


def _logged(path: Path, number: int, line: str, shown: set[str]) -> dict[str, Any]:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        if not line.endswith("\n"):
            # A kill interrupted the last line.
            return {}
        raise InputError(f"{str(path)!r} cannot be read: line {number}: {one_line(error)}") from error
    _expect(path, f"line {number}", entry, dict)
    for key in shown & entry.keys():
        _expect(path, f"line {number}, {key}", entry[key], float)
    return {key: value for key, value in entry.items() if key in shown}


def frequencies_of(run: Run) -> dict[str, Any]:
    """For each head, the share of tokens on which each latent is active, `(num_latents,)`."""
    path = run.folder / FREQUENCIES
    try:
        frequencies = load_file(path) if path.is_file() else {}
    except (SafetensorError, TypeError) as error:
        # numpy lacks some number types of torch.
        raise InputError(f"{str(path)!r} cannot be read: {error}") from error
    for name in frequencies.keys() & run.configs.keys():
        values, allowed = frequencies[name], (run.configs[name].num_latents,)
        if values.shape != allowed or not (np.isfinite(values) & (values >= 0)).all():
            raise InputError(
                f"{str(path)!r} must hold for head {name!r} the share of tokens on which each latent is active, "
                f"of shape {allowed}; it holds other values, or another shape: {values.shape}. Delete it to go on."
            )
    return frequencies


def _mapping(path: Path, parse: Any) -> dict[str, Any]:
    """The mapping in a file; empty if there is no file."""
    if not path.is_file():
        return {}
    try:
        content = parse(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise InputError(f"{str(path)!r} cannot be read: {one_line(error)}") from error
    if not isinstance(content, dict):
        raise InputError(f"{str(path)!r} holds a {type(content).__name__}, but must hold a mapping.")
    return content


def _expect(path: Path, where: str, value: object, kind: type) -> None:
    """Refuses a value that is not of the type that the card reads."""
    if not isinstance(value, (int, float) if kind is float else kind):
        raise InputError(
            f"{str(path)!r} holds {type(value).__name__} {value!r:.40} as {where}, but must hold {_WORDS[kind]}."
        )


def _check_recipe(path: Path, recipe: dict[str, Any]) -> None:
    """Refuses a recipe with a field of a wrong type. Any field may be missing."""
    for section, kinds in _RECIPE_KINDS.items():
        _expect(path, section, recipe.get(section) or {}, dict)
        for key, kind in kinds.items():
            if (value := (recipe.get(section) or {}).get(key)) is not None:
                _expect(path, f"{section}.{key}", value, kind)
    _expect(path, "heads", recipe.get("heads") or [], list)
    for i, head in enumerate(recipe.get("heads") or []):
        _expect(path, f"heads[{i}]", head, dict)
        _expect(path, f"heads[{i}].dead_after_tokens", head.get("dead_after_tokens") or 0, int)
