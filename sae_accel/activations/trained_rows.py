"""Which rows of what an LM gave train: those of tokens that are wanted and whose activations are finite."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..common.errors import InputError
from ..lm.hooks import Site
from ..ops.finite import finite_rows, surely_finite


class NonFiniteAt(NamedTuple):
    """
    Where an activation was NaN or infinite.

    Args:
        place (`str`): The module, in words that follow "at".
        dtype (`str`): The LM's precision there.
    """

    place: str
    dtype: str

    @classmethod
    def of(cls, site: Site, dtype: torch.dtype) -> "NonFiniteAt":
        """At a site of the LM."""
        place = site.module if site.side == "output" else f"the input of {site.module}"
        return cls(place, str(dtype).removeprefix("torch."))

    @property
    def cause(self) -> str:
        """What is likely to be the matter, and what to do."""
        if self.dtype == "float16":
            return "The LM runs in float16, which overflows above 65,504: set model.dtype to bfloat16."
        return (
            f"The LM, in {self.dtype}, gives them: its weights may be damaged. Use another LM or hookpoint, leave "
            "such tokens out by data.exclude_tokens, or let more pass by training.max_non_finite."
        )


@dataclass
class Activations:
    """
    What an LM computed for a batch, without the tokens that do not train.

    Args:
        by_site (`dict[Site, torch.Tensor]`): Activations `(num_tokens, d)` at each site, in the LM's precision.
        num_tokens (`int`): Tokens that train; rows of each, but for sites whose module does not run on every token.
        non_finite (`int`, defaults to 0): Tokens that were left out because an activation is NaN or infinite.
        non_finite_at ([`NonFiniteAt`], *optional*): Where this process found the first such activation.
        unsure (`torch.BoolTensor` of shape `()`, *optional*): Whether some number may not be finite; None if each that
            is not was left out.
    """

    by_site: dict[Site, Tensor]
    num_tokens: int
    non_finite: int = 0
    non_finite_at: NonFiniteAt | None = None
    unsure: Tensor | None = None

    def split(self, parts: int) -> Iterator["Activations"]:
        """Exactly `parts` consecutive pieces, as many on every process; some may be empty."""
        pieces = {site: tensor.tensor_split(parts) for site, tensor in self.by_site.items()}
        for i in range(parts):
            by_site = {site: tensors[i] for site, tensors in pieces.items()}
            yield Activations(by_site, max(map(len, by_site.values())))


class Wanted(NamedTuple):
    """
    The tokens of a batch that train, if their activations are finite.

    Args:
        mask (`torch.BoolTensor` of shape `(batch, ctx_len)`, *optional*): Those that are neither padding nor excluded;
            None for images, where every patch trains.
        places (`torch.LongTensor` of shape `(num_tokens,)`, *optional*): Where they lie in the flattened mask; None if
            all do train.
    """

    mask: Tensor | None
    places: Tensor | None

    @classmethod
    def of(cls, mask: Tensor | None) -> "Wanted":
        """By a mask, for which the host waits."""
        whole = mask is None or bool(mask.all())
        return cls(mask, None if mask is None or whole else mask.flatten().nonzero().squeeze(-1))


@dataclass
class _Group:
    """
    Sites at which the same rows lie, so that what is left out of one is left out of all.

    Args:
        lengths (`tuple[int, ...]`): Rows of each run of their modules.
        rows (`dict[Site, torch.Tensor]`): `(sum(lengths), d)` by site.
        wanted (`torch.BoolTensor`, *optional*): The rows that are neither padding nor excluded; all if None.
        places (`torch.LongTensor`, *optional*): Where those lie; None if `wanted` is, or all are.
    """

    lengths: tuple[int, ...]
    rows: dict[Site, Tensor]
    wanted: Tensor | None
    places: Tensor | None

    def kept(self, check: Callable[[Tensor], Tensor]) -> Tensor:
        """The rows that are wanted and, by `check`, finite at every site."""
        finite = [check(rows) for rows in self.rows.values()]
        return torch.stack(finite if self.wanted is None else [*finite, self.wanted]).all(0)

    def at(self, places: Tensor) -> dict[Site, Tensor]:
        """The rows that lie at some places, by site."""
        return {site: rows[places] for site, rows in self.rows.items()}

    def lost(self, kept: Tensor) -> Tensor:
        """The rows that would be kept, were they finite."""
        return ~kept if self.wanted is None else self.wanted & ~kept

    def first_non_finite(self) -> NonFiniteAt:
        """The first site with a row that is wanted and not finite."""
        site = next(site for site, rows in self.rows.items() if bool(self.lost(finite_rows(rows)).any()))
        return NonFiniteAt.of(site, self.rows[site].dtype)


def trained_rows(pieces: Mapping[Site, list[Tensor]], wanted: Wanted, careful: bool) -> Activations:
    """
    Leaves out what does not train. Where every token trains, nothing is copied.

    Args:
        pieces (`Mapping[Site, list[torch.Tensor]]`): By site, what each run of its module gave, `(rows, d)`.
        wanted ([`Wanted`]): The tokens that train if they are finite.
        careful (`bool`): Whether the host waits until it is known if all are finite, and leaves out those that are
            not. Else that may be found in `unsure`, for which it need not wait.

    Raises:
        `InputError`: if it cannot be told which of a site's rows are of tokens that are not wanted.
    """
    groups = list(_groups(pieces, wanted))
    if wanted.places is not None and wanted.mask is not None:
        _refuse_unknown_rows(groups, wanted.mask)
    found = Activations({}, 0)
    for group in groups:
        found.by_site |= group.rows if group.places is None else group.at(group.places)
    checks = [surely_finite(rows).all() for rows in found.by_site.values()]
    finite = torch.stack(checks).all() if checks else None
    if not careful:
        found.unsure = None if finite is None else ~finite
    elif finite is not None and not bool(finite):
        for group in groups:
            _leave_out(group, found)
    found.num_tokens = _num_tokens(groups, found, wanted)
    return found


def _num_tokens(groups: list[_Group], found: Activations, wanted: Wanted) -> int:
    """Tokens that train, as far as some site has a row for each."""
    if wanted.mask is not None:
        of_all = [group for group in groups if group.lengths == (wanted.mask.numel(),)]
        if of_all:
            return len(found.by_site[next(iter(of_all[0].rows))])
        return wanted.mask.numel() if wanted.places is None else len(wanted.places)
    return max(map(len, found.by_site.values()), default=0)


def _leave_out(group: _Group, found: Activations) -> None:
    """Puts, in the place of a group's rows, those that are finite at each of its sites."""
    kept = group.kept(surely_finite)
    if bool(group.lost(kept).any()):
        # A sum may be too large although each number is finite.
        kept = group.kept(finite_rows)
        lost = int(group.lost(kept).sum())
        found.non_finite += lost
        if lost and found.non_finite_at is None:
            found.non_finite_at = group.first_non_finite()
    found.by_site |= group.at(kept.nonzero().squeeze(-1))


def _groups(pieces: Mapping[Site, list[Tensor]], tokens_wanted: Wanted) -> Iterator[_Group]:
    mask = tokens_wanted.mask
    tokens = max((len(parts[0]) for parts in pieces.values() if parts), default=0) if mask is None else mask.numel()
    alike: dict[tuple[tuple[int, ...], str | None], list[Site]] = {}
    for site, parts in pieces.items():
        lengths = tuple(map(len, parts))
        # Two experts that run on equally many tokens do not run on the same.
        of_all = all(length == tokens for length in lengths)
        alike.setdefault((lengths, None if of_all else site.module), []).append(site)
    for (lengths, _), sites in alike.items():
        rows = {site: pieces[site][0] if len(lengths) == 1 else torch.cat(pieces[site]) for site in sites}
        wanted, places = None, None
        if mask is not None and all(length == mask.numel() for length in lengths):
            wanted = mask.flatten().repeat(len(lengths))
            if tokens_wanted.places is not None:
                places = torch.cat([tokens_wanted.places + run * mask.numel() for run in range(len(lengths))])
        yield _Group(lengths, rows, wanted, places)


def _refuse_unknown_rows(groups: Iterable[_Group], mask: Tensor) -> None:
    unknown = next((group for group in groups if group.wanted is None), None)
    if unknown is None:
        return
    module = next(iter(unknown.rows)).module
    length = next(length for length in unknown.lengths if length != mask.numel())
    raise InputError(
        f"Module {module!r} gives {length} activations for {mask.numel()} tokens, so that those of padding and of "
        "data.exclude_tokens cannot be told from others. Use full sequences and no data.exclude_tokens, or another "
        "hookpoint."
    )
