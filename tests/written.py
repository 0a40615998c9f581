"""What a reader may copy out of the project's texts: blocks of code, and the command lines in them."""

import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


ROOT = Path(__file__).parent.parent
FENCE = re.compile(r"^( *)```([^\n`]*)\n(.*?)^\1```", re.DOTALL | re.MULTILINE)
COMMANDS = ("accelerate", "torchrun", "python", "sae-accel", "make", "pip", "sbatch")


@dataclass
class Block:
    """
    A fenced block.

    Attributes:
        language (`str`): The fence's first word; `marks` are the others.
        text (`str`): What is inside, without the fence's indentation.
        line (`int`): Where it begins in its file, from 1.
    """

    language: str
    marks: list[str]
    text: str
    line: int


def blocks(text: str) -> Iterator[Block]:
    """The fenced blocks of a Markdown text or a docstring, in order."""
    for match in FENCE.finditer(text):
        indent, info, inside = match.groups()
        language, *marks = info.split() or [""]
        lines = [line.removeprefix(indent) for line in inside.splitlines(keepends=True)]
        yield Block(language, marks, "".join(lines), text[: match.start()].count("\n") + 1)


def pages() -> list[Path]:
    """All Markdown files that people read."""
    top = [path for path in sorted(ROOT.glob("*.md")) if path.name != "LICENSE.md"]
    return [*top, *sorted((ROOT / "docs").rglob("*.md"))]


def recipes() -> list[Path]:
    """All recipes, Accelerate configurations and scripts beside them, with their comments."""
    return [path for path in sorted((ROOT / "recipes").rglob("*")) if path.suffix in (".yaml", ".slurm")]


def notebooks() -> list[Path]:
    """All notebooks."""
    return sorted((ROOT / "examples").glob("*.ipynb"))


def prose(path: Path) -> str:
    """A file as Markdown: of a notebook its text cells, of a recipe its comments."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "markdown"]
        return "\n\n".join("".join(cell["source"]) for cell in cells)
    if path.suffix in (".yaml", ".slurm"):
        return "\n".join(line.strip()[1:] for line in text.splitlines() if line.strip().startswith("#"))
    return text


def command_lines(path: Path) -> Iterator[str]:
    """
    Each command line that a file tells a reader to type.

    In Markdown, each line of the blocks fenced as `bash`; in comments of recipes, each indented line that begins with
    a command; in a script each line that does.
    """
    text = prose(path)
    if path.suffix in (".yaml", ".slurm"):
        source = path.read_text(encoding="utf-8") if path.suffix == ".slurm" else text
        text = "\n".join([text, source])
        lines = [line.strip() for line in _joined(text) if line.strip().split(" ")[0] in COMMANDS]
        yield from lines
        return
    for block in blocks(text):
        if block.language == "bash":
            for line in _joined(block.text):
                if line.strip() and not line.lstrip().startswith("#"):
                    yield line.strip()


def _joined(text: str) -> list[str]:
    return text.replace("\\\n", " ").splitlines()


def words_of(line: str) -> list[str]:
    """A command line as words, without the variables that are set before it."""
    words = shlex.split(line, comments=True)
    while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words = words[1:]
    return words
