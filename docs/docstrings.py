"""
Reads docstrings in the style of transformers, so that mkdocstrings, which knows Google's, shows them right.

Types stand in backticks there, and a name in brackets and backticks is a link to that name.
"""

import re

import griffe


# An argument, an attribute, a returned value or an error at the beginning of an indented line.
ENTRY = re.compile(r"^( {4,}(?:\*{0,2}\w+ )?)(\(.+\)|\[?`[^`]+`\]?)(?=:(?: |$))", re.MULTILINE)
MARKS = re.compile(r"[`\[\]]|\*(?=\w)|(?<=\w)\*")
LINK = re.compile(r"\[`([A-Z]\w+)`\](?!\[|\()")


class TransformersDocstrings(griffe.Extension):
    """Turns each docstring into Google's style before it is parsed."""

    def on_object(self, *, obj: griffe.Object, **kwargs) -> None:
        if obj.docstring is not None:
            text = ENTRY.sub(lambda entry: entry[1] + MARKS.sub("", entry[2]), obj.docstring.value)
            obj.docstring.value = LINK.sub(r"[`\1`][sae_accel.\1]", text)
