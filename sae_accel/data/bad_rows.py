"""
Finds and counts the rows that cannot become a sequence, such as a null text or ids that the LM does not know.

Almost every block of rows is good, so a block is checked at once, and row by row only if it holds a bad row. Bad rows
are left out of the data. The run reports how many it left out: before training for data with a length, at its end for
a stream. It stops if there are more than `data.max_bad_rows`.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from ..common.errors import InputError
from ..processes.agreement import say


# Column in which a reader says why a row cannot be used; null for every row that can.
WHY = "_why_left_out"
# Key of a block that was cut: its left-out rows, as pairs of an index in the block and a reason.
LEFT_OUT = "_left_out"


class Tally(NamedTuple):
    """
    The number of rows that were checked and that were left out, with the first bad row.

    Args:
        seen (`int`): Rows that were checked.
        bad (`int`): Rows that were left out.
        row (`str`): The first row that was left out, in words.
        why (`str`): Why that row was left out, as a clause that follows `row`.
    """

    seen: int = 0
    bad: int = 0
    row: str = ""
    why: str = ""

    def plus(self, other: "Tally") -> "Tally":
        """Returns the sum of this tally and a later one."""
        first = self if self.bad else other
        return Tally(self.seen + other.seen, self.bad + other.bad, first.row, first.why)


class BadRows:
    """
    Counts the rows that a run leaves out, and stops the run if there are too many.

    Args:
        policy (`str`, defaults to `"skip"`): `data.bad_rows`: `"skip"` or `"stop"`.
        most (`float`, defaults to 0.01): `data.max_bad_rows`: a share of the rows if it is below 1, else a number of
            rows.
        whole (`bool`, defaults to `False`): Whether the counts cover all rows. If not, they cover the rows that were
            read so far.

    Attributes:
        tally ([`Tally`]): The counts.
        passed (`int`): Bad rows at which the run has already stopped. A run that resumes does not stop there again.
    """

    def __init__(self, policy: str = "skip", most: float = 0.01, whole: bool = False):
        self.policy, self.most, self.whole = policy, most, whole
        self.tally, self.passed = Tally(), 0

    def add(self, tally: Tally) -> None:
        """
        Adds the tally of new rows.

        Raises:
            `InputError`: if the data has too many bad rows now. The new rows are not counted in this case, so that
                they are checked again after somebody has mended them.
        """
        self.settle(self.tally.plus(tally), tally)

    def settle(self, tally: Tally, newest: Tally | None = None) -> None:
        """
        Replaces the tally by a total that was counted elsewhere. The run does not stop again at bad rows at which it
        has already stopped.

        Args:
            tally ([`Tally`]): The total over all rows.
            newest ([`Tally`], *optional*): The part of the total that is new, if it is known.

        Raises:
            `InputError`: if too many rows are bad.
        """
        if tally.bad > max(self.passed, self.tally.bad):
            self._check(tally, newest or tally)
        self.tally = tally

    def _check(self, tally: Tally, newest: Tally) -> None:
        if self.policy == "stop":
            self.passed = tally.bad
            raise InputError(
                f"data.bad_rows: it is stop, and {newest.row} of the data cannot be used, {newest.why}. Mend the row, "
                "or set --data.bad_rows skip to leave bad rows out."
            )
        # A stream is checked a thousand rows at a time, so one bad row at its start does not end the run.
        is_part = self.most < 1
        if tally.bad > (self.most * tally.seen if is_part else self.most):
            self.passed = tally.bad
            more = f"which is {_percent(tally.bad / tally.seen)}, more than {_percent(self.most)}" if is_part else None
            raise InputError(
                f"data.max_bad_rows: {tally.bad:,} of {tally.seen:,} rows of the data cannot be used, "
                f"{more or f'more than {self.most:g}'}; the first is {tally.row}, {tally.why}. Mend them, use other "
                "data, or raise data.max_bad_rows."
            )

    def tell(self) -> None:
        """Reports the rows that were left out, if there are any."""
        tally = self.tally
        if tally.bad:
            rows = "1 row" if tally.bad == 1 else f"{tally.bad:,} rows"
            were, first = ("was", "it") if tally.bad == 1 else ("were", "the first")
            of = "the data" if self.whole else f"the {tally.seen:,} that were read"
            share = _percent(tally.bad / tally.seen)
            say(f"{rows} of {of} {were} left out ({share}): {first} is {tally.row}, {tally.why}.")

    def state_dict(self) -> dict[str, Any]:
        """Returns the counts for a checkpoint."""
        return {"tally": list(self.tally), "passed": self.passed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores the counts from a checkpoint."""
        self.tally, self.passed = Tally(*state["tally"]), state["passed"]


def left_out(block: Iterable[tuple[int, str]], start: int, seen: int, whose: str = "") -> Tally:
    """
    Returns the tally of one block of rows.

    Args:
        block (`Iterable[tuple[int, str]]`): Index in the block of each row that was left out, with the reason.
        start (`int`): Rows before the block.
        seen (`int`): Rows in the block.
        whose (`str`): Words that follow a row's number and say among which rows it is counted.
    """
    found = list(block)
    if not found:
        return Tally(seen)
    place, why = found[0]
    return Tally(seen, len(found), f"row {start + place}{whose}", why)


def bad_texts(texts: Sequence[Any], column: str, whys: Sequence[str | None] | None = None) -> list[tuple[int, str]]:
    """Returns the index of each value that is not a text for a tokenizer, with the reason."""
    if set(map(type, texts)) <= {str} and _all_unicode(texts):
        return []
    return _found(lambda i: (whys[i] if whys else None) or why_no_text(texts[i], column), len(texts))


def bad_ids(
    rows: Sequence[Any], masks: Sequence[Any] | None, vocab_size: int, whys: Sequence[str | None] | None = None
) -> list[tuple[int, str]]:
    """Returns the index of each row whose ids the LM does not know or whose mask does not fit, with the reason."""
    if all(_are_ids(ids, vocab_size) for ids in rows) and (
        masks is None or all(_is_mask(mask, ids) for mask, ids in zip(masks, rows, strict=True))
    ):
        return []

    def why(i: int) -> str | None:
        told = (whys[i] if whys else None) or why_no_ids(rows[i], vocab_size)
        return told or (None if masks is None else why_no_mask(masks[i], rows[i]))

    return _found(why, len(rows))


def why_no_text(text: Any, column: str) -> str | None:
    """Returns why a value is not a text, as a clause that follows a row's name; None if it is a text."""
    if text is None:
        return f"whose {column} is null"
    if not isinstance(text, str):
        return f"whose {column} is {_kind(text)}, not text"
    if not _all_unicode([text]):
        return f"whose {column} holds half of a surrogate pair, or bytes that are not UTF-8"
    return None


def why_no_ids(ids: Any, vocab_size: int | None = None) -> str | None:
    """Returns why a value is not a list of ids, as a clause that follows a row's name; None if it is one."""
    if ids is None:
        return "whose input_ids are null"
    if not isinstance(ids, list):
        return f"whose input_ids are {_kind(ids)}, not a list"
    if (wrong := next((one for one in ids if type(one) is not int), ids)) is not ids:
        return f"whose input_ids hold {_kind(wrong)}, not only whole numbers"
    if vocab_size is not None and not _are_ids(ids, vocab_size):
        return f"whose input_ids go from {min(ids)} to {max(ids)}, but the LM knows {vocab_size} ids, from 0"
    return None


def why_no_mask(mask: Any, ids: list[int]) -> str | None:
    """Returns why a value is not a mask of these ids, as a clause that follows a row's name; None if it is one."""
    if mask is None:
        return "whose attention_mask is null"
    if not isinstance(mask, list):
        return f"whose attention_mask is {_kind(mask)}, not a list"
    if len(mask) != len(ids):
        return f"which has {len(ids)} input_ids, but an attention_mask of {len(mask)}"
    return None if _is_mask(mask, ids) else "whose attention_mask holds values other than 0 and 1"


def _percent(share: float) -> str:
    return f"{100 * share:.{2 if share < 0.1 else 3}g} %"


def _found(why: Callable[[int], str | None], count: int) -> list[tuple[int, str]]:
    reasons = ((i, why(i)) for i in range(count))
    return [(i, reason) for i, reason in reasons if reason]


def _all_unicode(texts: Sequence[str]) -> bool:
    try:
        for text in texts:
            # `isascii` takes no time: Python stores this fact with each text.
            if not text.isascii():
                text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _are_ids(ids: Any, vocab_size: int) -> bool:
    # In Python a bool is an int, but it is not an id.
    whole = isinstance(ids, list) and set(map(type, ids)) <= {int}
    return whole and (not ids or (min(ids) >= 0 and max(ids) < vocab_size))


def _is_mask(mask: Any, ids: Any) -> bool:
    right = isinstance(mask, list) and len(mask) == len(ids) and set(map(type, mask)) <= {int, bool}
    return right and set(mask) <= {0, 1}


def _kind(value: Any) -> str:
    names = {type(None): "null", bool: "true or false", int: "a number", float: "a number with a point"}
    names |= {str: "text", list: "a list", dict: "an object"}
    return names.get(type(value), type(value).__name__)
