"""
The rows of an LM's activations that train the heads: rows of tokens that are wanted and finite.

A row is one token's activation at one site. Padding and excluded tokens are not wanted. An activation with a NaN or an
infinity would spoil every weight of a head, so such a token trains nothing, at any site. Sites whose modules run on
the same rows form a group, and a row is left out at all sites of its group or at none. An expert of a mixture runs on
some tokens only, so it is a group of its own. The check costs one sum per row, and where every token trains, nothing
is copied.
"""

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
    The place in the LM at which an activation was NaN or infinite.

    Args:
        place (`str`): The module, in words that follow "at".
        dtype (`str`): The LM's precision there.
    """

    place: str
    dtype: str

    @classmethod
    def of(cls, site: Site, dtype: torch.dtype) -> "NonFiniteAt":
        """The place of a site, with the precision there."""
        place = site.module if site.side == "output" else f"the input of {site.module}"
        return cls(place, str(dtype).removeprefix("torch."))

    @property
    def cause(self) -> str:
        """The likely cause, and what to do about it, in a sentence."""
        if self.dtype == "float16":
            return "The LM runs in float16, which overflows above 65,504: set --model.dtype bfloat16."
        return (
            f"The LM, in {self.dtype}, gives them: its weights may be damaged. Use another LM or hookpoint, exclude "
            "the tokens with data.exclude_tokens, or allow more of them with training.max_non_finite."
        )


@dataclass
class Activations:
    """
    The activations of a batch, without the tokens that do not train.

    Args:
        by_site (`dict[Site, torch.Tensor]`): Activations `(num_tokens, d)` at each site, in the LM's precision.
        num_tokens (`int`): Tokens that train. Each site has this number of rows, unless its module runs on some tokens
            only.
        non_finite (`int`, defaults to 0): Tokens that were left out because an activation is NaN or infinite.
        non_finite_at ([`NonFiniteAt`], *optional*): The first place at which this process found one.
        unsure (`torch.BoolTensor` of shape `()`, *optional*): Whether some number may be NaN or infinite. None if all
            rows were checked and the bad ones left out.

    Examples:
        ```python
        from sae_accel import Activations
        from sae_accel.lm.hooks import Site

        tokens = hidden.flatten(0, -2)  # (num_tokens, d)
        activations = Activations({Site("layers.1", "output"): tokens}, num_tokens=len(tokens))
        ```
    """

    by_site: dict[Site, Tensor]
    num_tokens: int
    non_finite: int = 0
    non_finite_at: NonFiniteAt | None = None
    unsure: Tensor | None = None

    def split(self, parts: int) -> Iterator["Activations"]:
        """
        Cuts the activations into consecutive pieces. Some pieces may be empty, so that every process has the same
        number.

        Args:
            parts (`int`): Number of pieces.

        Examples:
            ```python
            from sae_accel import Activations
            from sae_accel.lm.hooks import Site

            tokens = hidden.flatten(0, -2)  # (num_tokens, d)
            activations = Activations({Site("layers.1", "output"): tokens}, num_tokens=len(tokens))
            [piece.num_tokens for piece in activations.split(2)]
            ```
        """
        pieces = {site: tensor.tensor_split(parts) for site, tensor in self.by_site.items()}
        for i in range(parts):
            by_site = {site: tensors[i] for site, tensors in pieces.items()}
            yield Activations(by_site, max(map(len, by_site.values())))


class Wanted(NamedTuple):
    """
    The tokens of a batch that train, if their activations are finite.

    Args:
        mask (`torch.BoolTensor` of shape `(batch, ctx_len)`, *optional*): True for tokens that are neither padding nor
            excluded. None for images, where every patch trains.
        places (`torch.LongTensor` of shape `(num_tokens,)`, *optional*): Positions of these tokens in the flattened
            mask. None if all tokens train.
    """

    mask: Tensor | None
    places: Tensor | None

    @classmethod
    def of(cls, mask: Tensor | None) -> "Wanted":
        """The tokens that a mask selects. The host waits for the device here."""
        whole = mask is None or bool(mask.all())
        return cls(mask, None if mask is None or whole else mask.flatten().nonzero().squeeze(-1))


@dataclass
class _Group:
    """
    Sites with the same rows. A row that is left out at one of them is left out at all.

    Args:
        lengths (`tuple[int, ...]`): Number of rows of each run of their modules.
        rows (`dict[Site, torch.Tensor]`): Activations `(sum(lengths), d)` by site.
        wanted (`torch.BoolTensor` of shape `(sum(lengths),)`, *optional*): True for rows that are neither padding nor
            excluded. None if all are wanted.
        places (`torch.LongTensor`, *optional*): Positions of the wanted rows. None if all are wanted.
    """

    lengths: tuple[int, ...]
    rows: dict[Site, Tensor]
    wanted: Tensor | None
    places: Tensor | None

    def kept(self, check: Callable[[Tensor], Tensor]) -> Tensor:
        """Whether each row is wanted and, by `check`, finite at every site: `(sum(lengths),)`."""
        finite = [check(rows) for rows in self.rows.values()]  # per site (sum(lengths),)
        return torch.stack(finite if self.wanted is None else [*finite, self.wanted]).all(0)

    def at(self, places: Tensor) -> dict[Site, Tensor]:
        """The rows at the given positions, by site."""
        return {site: rows[places] for site, rows in self.rows.items()}

    def lost(self, kept: Tensor) -> Tensor:
        """Whether each row is wanted but not kept: `(sum(lengths),)`."""
        return ~kept if self.wanted is None else self.wanted & ~kept

    def first_non_finite(self) -> NonFiniteAt:
        """The first site with a row that is wanted and not finite."""
        site = next(site for site, rows in self.rows.items() if bool(self.lost(finite_rows(rows)).any()))
        return NonFiniteAt.of(site, self.rows[site].dtype)


def trained_rows(pieces: Mapping[Site, list[Tensor]], wanted: Wanted, careful: bool) -> Activations:
    """
    The activations of a batch without the rows that do not train. If every token trains, nothing is copied.

    Args:
        pieces (`Mapping[Site, list[torch.Tensor]]`): By site, the activations of each run of its module, `(rows, d)`.
        wanted ([`Wanted`]): The tokens that train if they are finite.
        careful (`bool`): Whether to wait for the check of finite numbers and leave out the rows that fail it. If
            false, `unsure` holds the result of the check, and the host does not wait.

    Returns:
        [`Activations`].

    Raises:
        `InputError`: if the rows of a site cannot be matched with tokens, so that unwanted rows cannot be left out.
    """
    groups = list(_groups(pieces, wanted))
    if wanted.places is not None and wanted.mask is not None:
        _refuse_unknown_rows(groups, wanted.mask)
    found = Activations({}, 0)
    for group in groups:
        found.by_site |= group.rows if group.places is None else group.at(group.places)
    checks = [surely_finite(rows).all() for rows in found.by_site.values()]  # per site ()
    finite = torch.stack(checks).all() if checks else None
    if not careful:
        found.unsure = None if finite is None else ~finite
    elif finite is not None and not bool(finite):
        for group in groups:
            _leave_out(group, found)
    found.num_tokens = _num_tokens(groups, found, wanted)
    return found


def _num_tokens(groups: list[_Group], found: Activations, wanted: Wanted) -> int:
    """The number of tokens that train, from a site that has a row for every token if there is one."""
    if wanted.mask is not None:
        of_all = [group for group in groups if group.lengths == (wanted.mask.numel(),)]
        if of_all:
            return len(found.by_site[next(iter(of_all[0].rows))])
        return wanted.mask.numel() if wanted.places is None else len(wanted.places)
    return max(map(len, found.by_site.values()), default=0)


def _leave_out(group: _Group, found: Activations) -> None:
    """Replaces a group's rows in `found` by the rows that are finite at each of its sites."""
    kept = group.kept(surely_finite)  # (rows,)
    if bool(group.lost(kept).any()):
        # The sum of finite numbers may overflow, so the exact check decides.
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
        # Two experts that run on equal numbers of tokens still run on different tokens.
        of_all = all(length == tokens for length in lengths)
        alike.setdefault((lengths, None if of_all else site.module), []).append(site)
    for (lengths, _), sites in alike.items():
        # rows: per site (sum(lengths), d)
        rows = {site: pieces[site][0] if len(lengths) == 1 else torch.cat(pieces[site]) for site in sites}
        wanted, places = None, None
        if mask is not None and all(length == mask.numel() for length in lengths):
            wanted = mask.flatten().repeat(len(lengths))  # (sum(lengths),)
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
        f"Module {module!r} gives {length} activations for {mask.numel()} tokens, so the rows of padding and of "
        "data.exclude_tokens cannot be found. Use full sequences and no data.exclude_tokens, or another hookpoint."
    )
