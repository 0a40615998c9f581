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
    """

    by_site: dict[Site, Tensor]
    num_tokens: int
    non_finite: int = 0
    non_finite_at: NonFiniteAt | None = None

    def split(self, parts: int) -> Iterator["Activations"]:
        """Exactly `parts` consecutive pieces, the same on every process, of which some may be empty."""
        pieces = {site: tensor.tensor_split(parts) for site, tensor in self.by_site.items()}
        for i in range(parts):
            by_site = {site: tensors[i] for site, tensors in pieces.items()}
            yield Activations(by_site, max(map(len, by_site.values())))


@dataclass
class _Group:
    """
    Sites at which the same rows lie, so that what is left out of one is left out of all.

    Args:
        lengths (`tuple[int, ...]`): Rows of each run of their modules.
        rows (`dict[Site, torch.Tensor]`): `(sum(lengths), d)` by site.
        wanted (`torch.BoolTensor`, *optional*): The rows that are neither padding nor excluded; all if None.
    """

    lengths: tuple[int, ...]
    rows: dict[Site, Tensor]
    wanted: Tensor | None

    def kept(self, check: Callable[[Tensor], Tensor]) -> Tensor:
        """The rows that are wanted and, by `check`, finite at every site."""
        finite = [check(rows) for rows in self.rows.values()]
        return torch.stack(finite if self.wanted is None else [*finite, self.wanted]).all(0)

    def lost(self, kept: Tensor) -> Tensor:
        """The rows that would be kept, were they finite."""
        return ~kept if self.wanted is None else self.wanted & ~kept

    def first_non_finite(self) -> NonFiniteAt:
        """The first site with a row that is wanted and not finite."""
        site = next(site for site, rows in self.rows.items() if bool(self.lost(finite_rows(rows)).any()))
        return NonFiniteAt.of(site, self.rows[site].dtype)


def trained_rows(pieces: Mapping[Site, list[Tensor]], mask: Tensor | None) -> Activations:
    """
    Leaves out what does not train. Where everything does, the host waits for the device once, and nothing is copied.

    Args:
        pieces (`Mapping[Site, list[torch.Tensor]]`): By site, what each run of its module gave, `(rows, d)`.
        mask (`torch.BoolTensor` of shape `(batch, ctx_len)`, *optional*): Tokens that are wanted; all if not given.

    Raises:
        `InputError`: if it cannot be told which of a site's rows are of the tokens that `mask` leaves out.
    """
    groups = list(_groups(pieces, mask))
    kept = [group.kept(surely_finite) for group in groups]
    checks = [*(rows.all() for rows in kept), *([] if mask is None else [mask.all()])]
    if not checks or bool(torch.stack(checks).all()):
        by_site = {site: rows for group in groups for site, rows in group.rows.items()}
        return Activations(by_site, _most_rows(by_site) if mask is None else mask.numel())
    if mask is not None:
        _refuse_unknown_rows(groups, mask)
    found = Activations({}, 0)
    for group, rows in zip(groups, kept, strict=True):
        _keep(group, rows, found)
    tokens = [group for group in groups if mask is not None and group.lengths == (mask.numel(),)]
    if tokens:
        found.num_tokens = len(found.by_site[next(iter(tokens[0].rows))])
    else:
        found.num_tokens = _most_rows(found.by_site) if mask is None else int(mask.sum())
    return found


def _keep(group: _Group, kept: Tensor, found: Activations) -> None:
    """Adds to `found` the rows of a group that `kept` names, which may lack rows of finite numbers."""
    if bool(group.lost(kept).any()):
        # A sum may be too large although each number is finite.
        kept = group.kept(finite_rows)
        lost = int(group.lost(kept).sum())
        found.non_finite += lost
        if lost and found.non_finite_at is None:
            found.non_finite_at = group.first_non_finite()
    indices = kept.nonzero().squeeze(-1)
    found.by_site |= {site: rows[indices] for site, rows in group.rows.items()}


def _groups(pieces: Mapping[Site, list[Tensor]], mask: Tensor | None) -> Iterator[_Group]:
    tokens = max((len(parts[0]) for parts in pieces.values() if parts), default=0) if mask is None else mask.numel()
    alike: dict[tuple[tuple[int, ...], str | None], list[Site]] = {}
    for site, parts in pieces.items():
        lengths = tuple(map(len, parts))
        # Two experts that run on equally many tokens do not run on the same.
        of_all = all(length == tokens for length in lengths)
        alike.setdefault((lengths, None if of_all else site.module), []).append(site)
    for (lengths, _), sites in alike.items():
        rows = {site: pieces[site][0] if len(lengths) == 1 else torch.cat(pieces[site]) for site in sites}
        wanted = None
        if mask is not None and all(length == mask.numel() for length in lengths):
            wanted = mask.flatten().repeat(len(lengths))
        yield _Group(lengths, rows, wanted)


def _refuse_unknown_rows(groups: Iterable[_Group], mask: Tensor) -> None:
    unknown = next((group for group in groups if group.wanted is None), None)
    if unknown is None or bool(mask.all()):
        return
    module = next(iter(unknown.rows)).module
    length = next(length for length in unknown.lengths if length != mask.numel())
    raise InputError(
        f"Module {module!r} gives {length} activations for {mask.numel()} tokens, so that those of padding and of "
        "data.exclude_tokens cannot be told from others. Use full sequences and no data.exclude_tokens, or another "
        "hookpoint."
    )


def _most_rows(by_site: Mapping[Site, Tensor]) -> int:
    return max(map(len, by_site.values()), default=0)
