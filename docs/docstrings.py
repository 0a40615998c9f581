"""
Reads docstrings in the style of transformers, so that mkdocstrings, which knows Google's, shows them right.

Types stand in backticks there, and a name in brackets and backticks is a link to that name.
"""

import re
from pathlib import Path

import griffe


# An argument, an attribute, a returned value or an error at the beginning of an indented line.
ENTRY = re.compile(r"^( {4,}(?:\*{0,2}\w+ )?)(\(.+\)|\[?`[^`]+`\]?)(?=:(?: |$))", re.MULTILINE)
LINK = re.compile(r"\[`([\w.]+)`\](?!\[|\()")
MARKS = re.compile(r"`|\*(?=\w)|(?<=\w)\*")
PAGE = Path(__file__).with_name("api.md").read_text(encoding="utf-8")
SHOWN = set(re.findall(r"^::: sae_accel\.(\w+)", PAGE, re.MULTILINE))


class TransformersDocstrings(griffe.Extension):
    """Turns each docstring into Google's style before it is parsed."""

    def on_object(self, *, obj: griffe.Object, **kwargs) -> None:
        if obj.docstring is not None:
            text = ENTRY.sub(lambda entry: entry[1] + _plain_type(entry[2]), obj.docstring.value)
            obj.docstring.value = LINK.sub(_link, text)


def _plain_type(words: str) -> str:
    return MARKS.sub("", LINK.sub(r"\1", words))


def _link(match: re.Match) -> str:
    """A name that the page of the API shows becomes a link; another stays a name."""
    name = match[1]
    return f"[`{name}`][sae_accel.{name}]" if name.split(".")[0] in SHOWN else f"`{name}`"
