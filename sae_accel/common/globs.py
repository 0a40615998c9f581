import re

from .errors import InputError


def glob_to_regex(pattern: str) -> str:
    """
    Translates a glob over dotted names to a regular expression. `*`, `?` and `[012]` stay within one component, and
    `**` crosses dots. Each wildcard becomes a group, which holds the text that the wildcard stood for.

    Raises:
        `InputError`: if brackets hold no set of characters.
    """
    pieces = re.split(r"(\*\*|\*|\?|\[[^\]]*\])", pattern)
    wild = {"**": "(.*)", "*": "([^.]*)", "?": "([^.])"}
    return "".join(
        wild.get(piece) or (_character_set(piece) if piece[:1] == "[" else re.escape(piece)) for piece in pieces
    )


def _character_set(piece: str) -> str:
    # Escaped, since a later Python may read these as operators within a set.
    inside = re.sub(r"([\\\[&|~])", r"\\\1", piece[1:-1])
    regex = f"([^{inside[1:]}])" if inside.startswith("!") else f"([{inside}])"
    try:
        re.compile(regex)
    except re.error as error:
        raise InputError(f"{piece!r} in a glob is no set of characters. Write [03], [0-3] or [!0-3].") from error
    return regex
