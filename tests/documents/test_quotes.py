"""A message that a page quotes is one that the program prints: each of its words is in the package's source."""

import ast
import re
from collections.abc import Iterator

import pytest
from written import ROOT, blocks, pages


# How fences begin that show no message.
OTHER = ("planning  training", "SAE:  ", "FVU = ", "sbatch ", "torchrun ", "runs/quickstart/")
# The help texts there are compared as a whole, by `test_written_pages.py`.
WRITTEN = "command-line.md"
FOREIGN = (
    "CUDA out of memory. Tried to allocate 2.00 GiB",  # torch
    "[Errno 28] No space left on device",  # the operating system
    "[Errno 111] Connection refused",  # the operating system
)
# What stands in a message for a value: a text in quotes, or a word that no English sentence has.
VALUE = re.compile(r"'[^']*'|\S*[\d_./*\\]\S*|\w+Error\b|LlamaModel|[kMG]?B\b|[^\w']+|'")


def _texts(tree: ast.AST) -> Iterator[list[str]]:
    """Yields the constant parts of each text in a module, without docstrings; a value stands between two parts."""
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    inside = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    no_texts = docstrings | inside
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(part.value if isinstance(part, ast.Constant) else "\0" for part in node.values).split("\0")
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in no_texts:
            yield node.value.replace("{}", "\0").split("\0")


def _sentences() -> tuple[list[list[str]], set[str]]:
    """The sentences with two words or more that the package can print, each in its parts, and all its single words."""
    sentences, words = set(), set()
    for path in sorted((ROOT / "sae_accel").rglob("*.py")):
        for parts in _texts(ast.parse(path.read_text(encoding="utf-8"))):
            text = " ".join("\0".join(parts).split())
            for sentence in re.split(r"(?<=[.?]) ", text):
                (sentences if re.search(r"\W", sentence) else words).add(sentence.strip("\0 ."))
    return [sentence.split("\0") for sentence in sentences if re.search("[A-Za-z]", sentence)], words


SENTENCES, WORDS = _sentences()
QUOTES = {
    f"{path.name}:{block.line}": " ".join(block.text.split())
    for path in pages()
    if path.name != WRITTEN
    for block in blocks(path.read_text(encoding="utf-8"))
    if block.language == "text" and not block.text.startswith(OTHER)
}
# In the text, where `...` may stand for a value.
QUOTES |= {
    f"{path.name}: {quote}": quote
    for path in pages()
    if path.name != WRITTEN
    for quote in re.findall(r"`([A-Z][a-z]+ [^`\n]+)`", path.read_text(encoding="utf-8"))
}


def not_printed(quote: str) -> list[str]:
    """The words of a quote that are neither in a sentence of the package, found there as a whole, nor a value."""
    left = quote.removeprefix("sae_accel: ")
    for foreign in FOREIGN:
        left = left.replace(foreign, " ")
    known = [False] * len(left)
    for parts in SENTENCES:
        if all(part in left for part in parts):
            # Not inside of a word, at either end.
            pattern = r"(?!(?<=\w)\w)" + "(.+?)".join(map(re.escape, parts)) + r"(?!(?<=\w)\w)"
            for match in re.finditer(pattern, left):
                values = [place for group in range(1, len(parts)) for place in range(*match.span(group))]
                for place in {*range(*match.span())} - {*values}:
                    known[place] = True
    rest = "".join(" " if known[place] else letter for place, letter in enumerate(left))
    return [word for word in re.findall(r"[A-Za-z]+", VALUE.sub(" ", rest)) if word not in WORDS]


@pytest.mark.parametrize("where", QUOTES)
def test_a_quoted_message_is_what_the_program_prints(where):
    assert not not_printed(QUOTES[where])


def test_a_changed_word_is_noticed():
    quote = next(quote for quote in QUOTES.values() if "holds another run" in quote)
    assert not_printed(quote.replace("holds another", "has another"))
    assert not_printed(quote.replace("to delete it", "to remove it"))
