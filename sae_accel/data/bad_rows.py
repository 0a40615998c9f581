"""
Rows of which no sequence can be made. They are looked for in a block of rows at once, and one by one only in a block
that has some; they are left out, counted, and told of at the end, up to `data.max_bad_rows`.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from ..common.errors import InputError
from ..processes.agreement import say


# A column in which a reader says why a row is not what it should be; null for all others.
WHY = "_why_left_out"
# Of a block that was cut: what was left out, as pairs of a place in the block and a reason.
LEFT_OUT = "_left_out"


class Tally(NamedTuple):
    """
    What was left out.

    Args:
        seen (`int`): Rows that were looked at.
        bad (`int`): How many of them were left out.
        row (`str`): The first of those, in words.
        why (`str`): The reason, as a clause that follows on the row.
    """

    seen: int = 0
    bad: int = 0
    row: str = ""
    why: str = ""

    def plus(self, other: "Tally") -> "Tally":
        """Both together, of which this is the first."""
        first = self if self.bad else other
        return Tally(self.seen + other.seen, self.bad + other.bad, first.row, first.why)


class BadRows:
    """
    What a run has left out of its data, and whether that is too much.

    Args:
        policy (`str`, defaults to `"skip"`): `data.bad_rows`.
        most (`float`, defaults to 0.01): `data.max_bad_rows`.
        whole (`bool`, defaults to `False`): Whether it is of all rows; else of those that have been read so far.

    Attributes:
        tally ([`Tally`]): Counts.
        passed (`int`): Rows at which the run has stopped already: one that goes on does not stop there again.
    """

    def __init__(self, policy: str = "skip", most: float = 0.01, whole: bool = False):
        self.policy, self.most, self.whole = policy, most, whole
        self.tally, self.passed = Tally(), 0

    def add(self, tally: Tally) -> None:
        """
        Counts more rows.

        Raises:
            `InputError`: if there are too many bad ones among all. These are not counted then: whoever mends them
                finds them as they are.
        """
        self.settle(self.tally.plus(tally), tally)

    def settle(self, tally: Tally, newest: Tally | None = None) -> None:
        """
        Counts what has been counted elsewhere. Rows at which the run has stopped before are not held against it again.

        Args:
            tally ([`Tally`]): Of all rows.
            newest ([`Tally`], *optional*): Of those that are new in it, where they are known.

        Raises:
            `InputError`: if too many of them are bad.
        """
        if tally.bad > max(self.passed, self.tally.bad):
            self._check(tally, newest or tally)
        self.tally = tally

    def _check(self, tally: Tally, newest: Tally) -> None:
        if self.policy == "stop":
            self.passed = tally.bad
            raise InputError(
                f"data.bad_rows: it is stop, and {newest.row} of the data cannot be used, {newest.why}. Mend it, or "
                "set skip, which leaves such rows out."
            )
        # A stream is looked at a thousand rows at a time, so that one bad row at its start ends nothing.
        is_part = self.most < 1
        if tally.bad > (self.most * tally.seen if is_part else self.most):
            self.passed = tally.bad
            more = f"which is {_percent(tally.bad / tally.seen)}, more than {_percent(self.most)}" if is_part else None
            raise InputError(
                f"data.max_bad_rows: {tally.bad:,} of {tally.seen:,} rows of the data cannot be used, "
                f"{more or f'more than {self.most:g}'}; the first is {tally.row}, {tally.why}. Mend them, use other "
                "data, or raise it."
            )

    def tell(self) -> None:
        """Says what was left out, if there is something."""
        tally = self.tally
        if tally.bad:
            rows = "1 row" if tally.bad == 1 else f"{tally.bad:,} rows"
            were, first = ("was", "it") if tally.bad == 1 else ("were", "the first")
            of = "the data" if self.whole else f"the {tally.seen:,} that were read"
            share = _percent(tally.bad / tally.seen)
            say(f"{rows} of {of} {were} left out ({share}): {first} is {tally.row}, {tally.why}.")

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"tally": list(self.tally), "passed": self.passed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from what a checkpoint has kept."""
        self.tally, self.passed = Tally(*state["tally"]), state["passed"]


def left_out(block: Iterable[tuple[int, str]], start: int, seen: int, whose: str = "") -> Tally:
    """
    What was left out of a block.

    Args:
        block (`Iterable[tuple[int, str]]`): Places in the block, with reasons.
        start (`int`): Rows before it.
        seen (`int`): Rows in it.
        whose (`str`): What the rows are counted in, in words that follow on a row's number.
    """
    found = list(block)
    if not found:
        return Tally(seen)
    place, why = found[0]
    return Tally(seen, len(found), f"row {start + place}{whose}", why)


def bad_texts(texts: Sequence[Any], column: str, whys: Sequence[str | None] | None = None) -> list[tuple[int, str]]:
    """The places of what is no text that a tokenizer takes, with reasons."""
    if set(map(type, texts)) <= {str} and _all_unicode(texts):
        return []
    return _found(lambda i: (whys[i] if whys else None) or why_no_text(texts[i], column), len(texts))


def bad_ids(
    rows: Sequence[Any], masks: Sequence[Any] | None, vocab_size: int, whys: Sequence[str | None] | None = None
) -> list[tuple[int, str]]:
    """The places of rows that are no sequences of ids that the LM knows, or whose mask is none of theirs."""
    if all(_are_ids(ids, vocab_size) for ids in rows) and (
        masks is None or all(_is_mask(mask, ids) for mask, ids in zip(masks, rows, strict=True))
    ):
        return []

    def why(i: int) -> str | None:
        told = (whys[i] if whys else None) or why_no_ids(rows[i], vocab_size)
        return told or (None if masks is None else why_no_mask(masks[i], rows[i]))

    return _found(why, len(rows))


def why_no_text(text: Any, column: str) -> str | None:
    """Why something is no text, as a clause that follows on a row; None if it is."""
    if text is None:
        return f"whose {column} is null"
    if not isinstance(text, str):
        return f"whose {column} is {_kind(text)}, not text"
    if not _all_unicode([text]):
        return f"whose {column} holds half of a surrogate pair, or bytes that are no UTF-8"
    return None


def why_no_ids(ids: Any, vocab_size: int | None = None) -> str | None:
    """Why something is no list of ids, as a clause that follows on a row; None if it is."""
    if ids is None:
        return "whose input_ids are null"
    if not isinstance(ids, list):
        return f"whose input_ids are {_kind(ids)}, not a list"
    if (wrong := next((one for one in ids if type(one) is not int), ids)) is not ids:
        return f"whose input_ids hold {_kind(wrong)}, not whole numbers alone"
    if vocab_size is not None and not _are_ids(ids, vocab_size):
        return f"whose input_ids go from {min(ids)} to {max(ids)}, but the LM knows {vocab_size} ids, from 0"
    return None


def why_no_mask(mask: Any, ids: list[int]) -> str | None:
    """Why something is no mask of some ids, as a clause that follows on a row; None if it is."""
    if mask is None:
        return "whose attention_mask is null"
    if not isinstance(mask, list):
        return f"whose attention_mask is {_kind(mask)}, not a list"
    if len(mask) != len(ids):
        return f"which has {len(ids)} input_ids, but an attention_mask of {len(mask)}"
    return None if _is_mask(mask, ids) else "whose attention_mask holds something else than 0 and 1"


def _percent(share: float) -> str:
    return f"{100 * share:.{2 if share < 0.1 else 3}g} %"


def _found(why: Callable[[int], str | None], count: int) -> list[tuple[int, str]]:
    reasons = ((i, why(i)) for i in range(count))
    return [(i, reason) for i, reason in reasons if reason]


def _all_unicode(texts: Sequence[str]) -> bool:
    try:
        for text in texts:
            # That it is ASCII, a text knows of itself.
            if not text.isascii():
                text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _are_ids(ids: Any, vocab_size: int) -> bool:
    # A bool is an int by another name, and no id.
    whole = isinstance(ids, list) and set(map(type, ids)) <= {int}
    return whole and (not ids or (min(ids) >= 0 and max(ids) < vocab_size))


def _is_mask(mask: Any, ids: Any) -> bool:
    right = isinstance(mask, list) and len(mask) == len(ids) and set(map(type, mask)) <= {int, bool}
    return right and set(mask) <= {0, 1}


def _kind(value: Any) -> str:
    names = {type(None): "null", bool: "true or false", int: "a number", float: "a number with a point"}
    names |= {str: "text", list: "a list", dict: "an object"}
    return names.get(type(value), type(value).__name__)
