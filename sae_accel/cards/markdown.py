import json
import re
from collections.abc import Iterable, Sequence


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table of the columns in which some cell says something."""
    kept = [i for i in range(len(header)) if any(row[i] for row in rows)]
    lines = [header, ["---"] * len(header), *([cell or "-" for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line[i] for i in kept)} |" for line in lines)


def code(text: str) -> str:
    """Text as it is, in Markdown and in its tables, whatever characters it has."""
    ticks = _longer_than_any(text, 1)
    blank = " " if "`" in text else ""
    return f"{ticks}{blank}{text}{blank}{ticks}".replace("|", "\\|")


def fenced(text: str, language: str) -> str:
    ticks = _longer_than_any(text, 3)
    return f"{ticks}{language}\n{text.rstrip()}\n{ticks}"


def folded(summary: str, text: str) -> str:
    """Text that a reader of the page sees once he asks for it."""
    return f"<details><summary>{summary}</summary>\n\n{text}\n\n</details>"


def _longer_than_any(text: str, least: int) -> str:
    return "`" * max(least, 1 + max(map(len, re.findall("`+", text)), default=0))


def listed(words: Iterable[str]) -> str:
    *most, last = words
    return f"{', '.join(most)} and {last}" if most else last


def quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
