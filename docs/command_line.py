"""
Writes `docs/command-line.md` from the help of the commands, so that the page and `--help` are never two.

    python docs/command_line.py
"""

import os
from dataclasses import fields
from pathlib import Path

import yaml

from sae_accel import convert, push
from sae_accel.recipe.arguments import SECTIONS
from sae_accel.recipe.command_line import NOTES, USAGE, range_of
from sae_accel.recipe.schema import default_of, field_hints, type_name


PAGE = Path(__file__).with_name("command-line.md")
OPENING = """\
# Command line

This page is for readers who look up an option. `python docs/command_line.py` writes it from the text that `--help`
prints. [Training](training.md) explains the fields by subject.

| command | the same on one process | effect |
|---|---|---|
| `accelerate launch -m sae_accel.train` | `sae-accel train` | trains heads as a recipe says |
| `python -m sae_accel.push` | `sae-accel push` | releases the heads of a run to the Hub |
| `python -m sae_accel.convert` | `sae-accel convert` | writes heads in the layout of another library |

| exit status | meaning |
|---|---|
| 0 | The command did everything. |
| 1 | An error that other input cannot fix, or a file is missing at the end. One line says what. |
| 2 | The command refused its input. One line says what is wrong and what is allowed. |
| 129 | SIGHUP ended the command. |
| 130 | Ctrl-C ended the command. |
| 141 | The reader of its output was gone (`\\| head`). |
| 143 | SIGTERM ended the command. |
"""


def page() -> str:
    """The page in Markdown."""
    # Both are read where argparse prints its help.
    os.environ |= {"COLUMNS": "80", "NO_COLOR": "1"}
    parts = [OPENING, "## train", _fenced(USAGE), NOTES]
    for section, arguments in SECTIONS.items():
        meaning = (arguments.__doc__ or "").strip().splitlines()[0]
        rows = ["| field | type | default | meaning |", "|---|---|---|---|"]
        hints = field_hints(arguments)
        for option in fields(arguments):
            kind = type_name(hints[option.name]) + range_of(option.metadata["help"])
            default = yaml.safe_dump(default_of(option), default_flow_style=True).splitlines()[0]
            cells = (f"`{option.name}`", kind, f"`{default}`", option.metadata["help"])
            rows.append("| " + " | ".join(_cell(cell) for cell in cells) + " |")
        parts += [f"### {section}", meaning, "\n".join(rows)]
    for name, command in {"push": push, "convert": convert}.items():
        parts += [f"## {name}", _fenced(command._parser().format_help())]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;") if "`" not in text else text.replace("|", "\\|")


def _fenced(text: str) -> str:
    return f"```text\n{text.strip()}\n```"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
