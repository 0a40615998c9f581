import json
import re
from collections.abc import Iterable, Sequence


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table. Columns without any value are left out, and an empty cell shows a dash."""
    kept = [i for i in range(len(header)) if any(row[i] for row in rows)]
    lines = [header, ["---"] * len(header), *([cell or "-" for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line[i] for i in kept)} |" for line in lines)


def code(text: str) -> str:
    """Text as inline code, which Markdown and its tables show unchanged, whatever characters it has."""
    ticks = _longer_than_any(text, 1)
    blank = " " if "`" in text else ""
    return f"{ticks}{blank}{text}{blank}{ticks}".replace("|", "\\|")


def fenced(text: str, language: str) -> str:
    """Text as a block of code in a language."""
    ticks = _longer_than_any(text, 3)
    return f"{ticks}{language}\n{text.rstrip()}\n{ticks}"


def folded(summary: str, text: str) -> str:
    """Text that a page shows after a click on its summary."""
    return f"<details><summary>{summary}</summary>\n\n{text}\n\n</details>"


def _longer_than_any(text: str, least: int) -> str:
    return "`" * max(least, 1 + max(map(len, re.findall("`+", text)), default=0))


def listed(words: Iterable[str]) -> str:
    """Words as in a sentence: `a, b and c`."""
    *most, last = words
    return f"{', '.join(most)} and {last}" if most else last


def quoted(text: str) -> str:
    """Text as a string of Python, in double quotes."""
    return json.dumps(text, ensure_ascii=False)


def number(value: float | None, form: str) -> str:
    """A number in a format of Python; empty if there is none."""
    return "" if value is None else format(value, form)
