"""Reads a recipe's YAML file, and says in one line what is wrong with it: the file, the line and the reason."""

from pathlib import Path
from typing import Any

import yaml

from ..common.errors import InputError
from .arguments import SECTIONS


class StrictLoader(yaml.SafeLoader):
    """A YAML loader that refuses a key that stands twice. PyYAML alone would take the last."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in seen:
                    raise yaml.composer.ComposerError(None, None, f"key {key.value!r} stands twice", key.start_mark)
                seen.add((key.tag, key.value))
        return node


def read_yaml(path: Path) -> dict[str, Any]:
    """
    The nested mappings of a recipe's file.

    Args:
        path (`Path`): The file.

    Raises:
        `InputError`: if the file is missing, is not YAML, or holds no mapping.
    """
    text = _read_text(path)
    try:
        content = yaml.load(text, Loader=StrictLoader)
    except yaml.YAMLError as error:
        raise InputError(f"Recipe {str(path)!r} is not YAML{_fault(error, text)}.") from error
    except RecursionError as error:
        raise InputError(f"Recipe {str(path)!r} is nested too deeply to be a recipe.") from error
    except ValueError as error:
        # PyYAML passes on Python's own error for a date that does not exist, such as 2020-13-45.
        raise InputError(f"Recipe {str(path)!r} holds a value that cannot be read: {error}.") from error
    if content is None:
        raise InputError(f"Recipe {str(path)!r} is empty. Its sections are {', '.join(SECTIONS)}.")
    if not isinstance(content, dict):
        raise InputError(
            f"Recipe {str(path)!r} must be a mapping with the keys {', '.join(SECTIONS)}, but it is not one."
        )
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
    """The position and the reason of an error in YAML."""
    if isinstance(error, yaml.reader.ReaderError):
        before = text[: error.position]
        line, column = before.count("\n") + 1, len(before) - before.rfind("\n")
        return f", line {line}, column {column}: it holds the character {chr(error.character)!r}"
    assert isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None, "PyYAML says where"
    mark = error.problem_mark
    reason = ", ".join(part for part in (error.context, error.problem) if part)
    return f", line {mark.line + 1}, column {mark.column + 1}: {reason}"
