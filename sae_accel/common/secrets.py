"""
Keeps secrets out of reports.

A report about a defect shows the command line, the recipe and the traceback, and each of them may hold a token. Two
nets catch tokens: values whose name says that they are secret, and words that look like a token wherever they stand.
"""

import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any


HIDDEN = "***"
# Names of options, keys and variables with secret values. `tokens` is none of them, since it is a count.
_NAME = r"(?:[\w.-]*[_.-])?(?:token|password|passwd|secret|credentials?|api_?key|access_?key|secret_?key)"
_NAMED = re.compile(_NAME, re.IGNORECASE)
# The value after a secret's name, in JSON, YAML, Python, a URL or a header.
_VALUE = re.compile(
    rf"(?i)(?<![\w.-])(['\"]?{_NAME}['\"]?\s*[=:]\s*)(['\"]?)(?!null\b|None\b|\*\*\*)[^\s'\",;&}}\])]+\2"
)
_SHAPES = (
    (re.compile(r"\b(?:hf_|api_org_|gh[pousr]_|glpat-|sk-|AKIA)[A-Za-z0-9]{16,}"), HIDDEN),
    (re.compile(r"(?i)\b(bearer|basic)\s+[\w.~+/=-]{8,}"), rf"\1 {HIDDEN}"),
    (re.compile(r"(\w://)[^\s/@'\"]+@"), rf"\1{HIDDEN}@"),
    (re.compile(r"(?i)([?&][\w-]*(?:sig|signature|key|credential|policy|auth)[\w-]*=)[^\s&'\"]+"), rf"\1{HIDDEN}"),
)
# A shorter secret is not replaced, since it may be part of harmless words.
_LEAST = 4


def without_secrets(text: str, known: Iterable[str] = ()) -> str:
    """
    Replaces every possible secret in a text with `***`: values of environment variables, options and keys whose name
    is a secret's, the stored login of the Hub, and words with the shape of a token or of a password in a URL.

    Args:
        text (`str`): The text.
        known (`Iterable[str]`): Further secrets, such as tokens on a command line.
    """
    for secret in sorted({*known, *_of_the_environment(), *_stored_login()}, key=len, reverse=True):
        if len(secret) >= _LEAST:
            text = text.replace(secret, HIDDEN)
    for pattern, kept in _SHAPES:
        text = pattern.sub(kept, text)
    return _VALUE.sub(rf"\1\2{HIDDEN}\2", text)


def secrets_in_words(words: Iterable[str]) -> Iterator[str]:
    """Yields the values of options that are named like a secret, such as `--model.token`, on a command line."""
    is_secret = False
    for word in words:
        name, equals, value = word.partition("=")
        if word.startswith("--"):
            is_secret = _NAMED.fullmatch(name[2:]) is not None
            if is_secret and equals:
                yield value
        elif is_secret:
            yield word


def secrets_in(content: Any) -> Iterator[str]:
    """Yields the values under keys that are named like a secret, in nested mappings and lists."""
    if isinstance(content, Mapping):
        for key, value in content.items():
            if isinstance(value, str) and _NAMED.fullmatch(str(key)):
                yield value
            yield from secrets_in(value)
    elif isinstance(content, list):
        for value in content:
            yield from secrets_in(value)


def without_secret_keys(content: Any) -> Any:
    """A copy of nested mappings and lists without the keys that are named like a secret."""
    if isinstance(content, Mapping):
        return {k: without_secret_keys(value) for k, value in content.items() if not _NAMED.fullmatch(str(k))}
    return [without_secret_keys(value) for value in content] if isinstance(content, list) else content


def _of_the_environment() -> Iterator[str]:
    for name, value in os.environ.items():
        if _NAMED.fullmatch(name):
            yield value


def _stored_login() -> Iterator[str]:
    # A command that never imported the Hub's client cannot have used the login.
    hub = sys.modules.get("huggingface_hub")
    token = hub.get_token() if hub is not None else None
    if token:
        yield token
