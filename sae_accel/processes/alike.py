import hashlib
import importlib.metadata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..common.errors import InputError
from .agreement import gather_objects


PACKAGES = ("torch", "transformers", "accelerate", "datasets")


def check_alike(settings: dict[str, Any]) -> None:
    """
    Checks that all processes have the same settings, code and package versions.

    Args:
        settings (`dict[str, Any]`): The settings of this process, as values that can be compared, nested or not.

    Raises:
        `InputError`: on every process, with the first difference.
    """
    versions = {f"package {name}": importlib.metadata.version(name) for name in PACKAGES}
    code = b"".join(path.read_bytes() for path in sorted(Path(__file__).parents[1].rglob("*.py")))
    versions["code of sae_accel"] = hashlib.sha256(code).hexdigest()[:12]
    everyone = gather_objects(versions | dict(_flat(settings)))
    for index, other in enumerate(everyone):
        for key in everyone[0] | other:
            if everyone[0].get(key) != other.get(key):
                raise InputError(
                    f"{key}: process 0 has {everyone[0].get(key)!r}, but process {index} has {other.get(key)!r}. "
                    "Start all processes with one recipe and one installation."
                )


def _flat(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yields each value in nested mappings and lists, with its dotted path."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if pairs is None:
        yield path, value
    else:
        for key, inside in pairs:
            name = f"[{key}]" if isinstance(value, list) else f".{key}"
            yield from _flat(inside, (path + name).removeprefix("."))
