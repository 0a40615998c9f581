import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any


HIDDEN = "***"
# Names of options, keys and variables whose values are for nobody else. A plain `tokens` counts something.
_NAME = r"(?:[\w.-]*[_.-])?(?:token|password|passwd|secret|credentials?|api_?key|access_?key|secret_?key)"
_NAMED = re.compile(_NAME, re.IGNORECASE)
# What follows such a name in JSON, YAML, Python, a URL or a header.
_VALUE = re.compile(
    rf"(?i)(?<![\w.-])(['\"]?{_NAME}['\"]?\s*[=:]\s*)(['\"]?)(?!null\b|None\b|\*\*\*)[^\s'\",;&}}\])]+\2"
)
_SHAPES = (
    (re.compile(r"\b(?:hf_|api_org_|gh[pousr]_|glpat-|sk-|AKIA)[A-Za-z0-9]{16,}"), HIDDEN),
    (re.compile(r"(?i)\b(bearer|basic)\s+[\w.~+/=-]{8,}"), rf"\1 {HIDDEN}"),
    (re.compile(r"(\w://)[^\s/@'\"]+@"), rf"\1{HIDDEN}@"),
    (re.compile(r"(?i)([?&][\w-]*(?:sig|signature|key|credential|policy|auth)[\w-]*=)[^\s&'\"]+"), rf"\1{HIDDEN}"),
)
# A shorter one would take away words that have nothing to do with it.
_LEAST = 4


def without_secrets(text: str, known: Iterable[str] = ()) -> str:
    """
    A text in which what may be a secret is replaced by `***`: values of environment variables, options and keys that
    are named like one, the stored login of the Hub, and whatever has the shape of a token or of a URL's password.

    Args:
        text (`str`): The text.
        known (`Iterable[str]`): Further secrets, such as those on a command line.
    """
    for secret in sorted({*known, *_of_the_environment(), *_stored_login()}, key=len, reverse=True):
        if len(secret) >= _LEAST:
            text = text.replace(secret, HIDDEN)
    for pattern, kept in _SHAPES:
        text = pattern.sub(kept, text)
    return _VALUE.sub(rf"\1\2{HIDDEN}\2", text)


def secrets_in_words(words: Iterable[str]) -> Iterator[str]:
    """What follows an option on a command line that is named like a secret, such as `--model.token`."""
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
    """Values under keys that are named like a secret, in nested mappings and lists."""
    if isinstance(content, Mapping):
        for key, value in content.items():
            if isinstance(value, str) and _NAMED.fullmatch(str(key)):
                yield value
            yield from secrets_in(value)
    elif isinstance(content, list):
        for value in content:
            yield from secrets_in(value)


def without_secret_keys(content: Any) -> Any:
    """Nested mappings and lists without the keys that are named like a secret."""
    if isinstance(content, Mapping):
        return {k: without_secret_keys(value) for k, value in content.items() if not _NAMED.fullmatch(str(k))}
    return [without_secret_keys(value) for value in content] if isinstance(content, list) else content


def _of_the_environment() -> Iterator[str]:
    for name, value in os.environ.items():
        if _NAMED.fullmatch(name):
            yield value


def _stored_login() -> Iterator[str]:
    # Only a command that has imported the Hub's client can have used it.
    hub = sys.modules.get("huggingface_hub")
    token = hub.get_token() if hub is not None else None
    if token:
        yield token
