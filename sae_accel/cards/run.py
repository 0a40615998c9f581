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


# What stands where a metric came out as NaN or infinite.
NO_NUMBER = "no number"
# What the card reads of a recipe, and what that has to be.
_RECIPE_KINDS: dict[str, dict[str, type]] = {
    "model": {"name_or_path": str, "revision": str, "quantization": str, "adapter": str},
    "data": {"path": str, "name": str, "split": str, "ctx_len": int, "load_args": dict},
    "training": {"optim": str, "loss": str, "init_from": str},
}
_WORDS = {str: "text", int: "a whole number", float: "a number", list: "a list", dict: "a mapping"}


@dataclass(frozen=True)
class Run:
    """
    What lies in a run's folder: by head its config, and what the run wrote of itself, empty where it did not. Of its
    metrics, `metrics` has those that came out as finite numbers, and `no_number` the names of the others.
    """

    folder: Path
    configs: dict[str, HeadConfig]
    recipe_text: str
    recipe: dict[str, Any]
    metrics: dict[str, float]
    no_number: frozenset[str] = frozenset()

    def section(self, name: str) -> dict[str, Any]:
        """Of the recipe."""
        return self.recipe.get(name) or {}

    def shown(self, key: str, form: str) -> str:
        """A metric as the card shows it; empty if it was not measured."""
        return NO_NUMBER if key in self.no_number else number(self.metrics.get(key), form)

    @property
    def has_adapter(self) -> bool:
        """Whether a LoRA was trained around the heads."""
        return (self.folder / ADAPTER / "adapter_config.json").is_file()


def read_run(folder: Path, include: Sequence[str]) -> Run:
    """
    Reads a run's folder.

    Args:
        folder (`Path`): Where heads were saved.
        include (`Sequence[str]`): Globs over the names of heads; all if there are none.

    Raises:
        `InputError`: if there is no head in the folder, or a file in it cannot be read or holds what it should not.
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
    Reads all that a card tells of a run, before anything is done with it.

    Raises:
        `InputError`: if a file cannot be read, or holds what it should not.
    """
    run = read_run(folder, include)
    log_history(run)
    frequencies_of(run)


def log_history(run: Run) -> list[dict[str, Any]]:
    """What the trainer logged, as far as the plots read it."""
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
            # A kill came while it was written.
            return {}
        raise InputError(f"{str(path)!r} cannot be read: line {number}: {one_line(error)}") from error
    _expect(path, f"line {number}", entry, dict)
    for key in shown & entry.keys():
        _expect(path, f"line {number}, {key}", entry[key], float)
    return {key: value for key, value in entry.items() if key in shown}


def frequencies_of(run: Run) -> dict[str, Any]:
    """By head how often each latent is active, `(num_latents,)`."""
    path = run.folder / FREQUENCIES
    try:
        frequencies = load_file(path) if path.is_file() else {}
    except (SafetensorError, TypeError) as error:
        # Some types of numbers are torch's alone.
        raise InputError(f"{str(path)!r} cannot be read: {error}") from error
    for name in frequencies.keys() & run.configs.keys():
        values, allowed = frequencies[name], (run.configs[name].num_latents,)
        if values.shape != allowed or not (np.isfinite(values) & (values >= 0)).all():
            raise InputError(
                f"{str(path)!r} must hold for head {name!r} the part of tokens on which each latent is active, "
                f"of shape {allowed}; it holds other values, or another shape: {values.shape}. Take it away to go on."
            )
    return frequencies


def _mapping(path: Path, parse: Any) -> dict[str, Any]:
    """What a file says; nothing if it is not there."""
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
    """Refuses a value that is not what the card reads there."""
    if not isinstance(value, (int, float) if kind is float else kind):
        raise InputError(
            f"{str(path)!r} holds {type(value).__name__} {value!r:.40} as {where}, but must hold {_WORDS[kind]}."
        )


def _check_recipe(path: Path, recipe: dict[str, Any]) -> None:
    """Holds what the card reads of a recipe to its kinds; any of it may be missing."""
    for section, kinds in _RECIPE_KINDS.items():
        _expect(path, section, recipe.get(section) or {}, dict)
        for key, kind in kinds.items():
            if (value := (recipe.get(section) or {}).get(key)) is not None:
                _expect(path, f"{section}.{key}", value, kind)
    _expect(path, "heads", recipe.get("heads") or [], list)
    for i, head in enumerate(recipe.get("heads") or []):
        _expect(path, f"heads[{i}]", head, dict)
        _expect(path, f"heads[{i}].dead_after_tokens", head.get("dead_after_tokens") or 0, int)
