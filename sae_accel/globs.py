import re


def glob_to_regex(pattern: str) -> str:
    """
    A regular expression for a glob over dotted names, in which `*`, `?` and `[012]` stay within one component and `**`
    crosses dots. It has a group for each wildcard, which tells what that stood for.
    """
    pieces = re.split(r"(\*\*|\*|\?|\[[^\]]*\])", pattern)
    wild = {"**": "(.*)", "*": "([^.]*)", "?": "([^.])"}
    return "".join(
        wild.get(piece) or (_character_set(piece) if piece[:1] == "[" else re.escape(piece)) for piece in pieces
    )


def _character_set(piece: str) -> str:
    inside = piece[1:-1].replace("\\", r"\\")
    return f"([^{inside[1:]}])" if inside.startswith("!") else f"([{inside}])"
