import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor

from ..lm.hooks import Site
from .running_lm import RunningLM
from .trained_rows import Activations


_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class ExchangedActivations:
    """
    Activations of the tokens of all processes, at the sites that each process asks for: every process runs the LM on
    its own tokens and sends each activation to those processes alone that need it, in the precision that it has.

    For a site of width `d` that one process of `n` needs, `d * (n - 1) / n` values a token are sent, where gathering
    all on every process would send `d * (n - 1)`. Beside that go 8 bytes a site and 16 more, from each process to each
    other.

    Args:
        activations ([`RunningLM`]): Those of this process's tokens.
        needs (`list[list[Site]]`): By process, the sites that it needs.
        accelerator (`Accelerator`): Which process this is.
        at_once (`bool`): Send all sites together, which takes memory for a second copy of what is sent; else one
            after the other.

    Attributes:
        bytes_sent (`int`): Bytes of activations that this process has sent to others.
    """

    def __init__(self, activations: RunningLM, needs: list[list[Site]], accelerator: Accelerator, at_once: bool):
        self.activations = activations
        self.needs = needs
        self.accelerator = accelerator
        sites = activations.sites
        self.rounds = [sites] if at_once else [[site] for site in sites]
        self.bytes_sent = 0

    def __call__(self, batch: dict[str, Tensor], careful: bool = True) -> Activations:
        """
        As of [`RunningLM`], but of all processes' tokens, in their order, and only for the sites that are needed here.
        It is careful always, since the host waits for the sizes of what is exchanged.
        """
        own = self.activations(batch)
        counts, dtypes, num_tokens, non_finite = self._headers(own)
        by_site: dict[Site, Tensor] = {}
        for sites in self.rounds:
            by_site |= self._exchange(own.by_site, sites, counts, dtypes)
        return Activations(by_site, num_tokens, non_finite, own.non_finite_at)

    def _headers(self, own: Activations) -> tuple[dict[Site, list[int]], dict[Site, torch.dtype], int, int]:
        """
        For each site how many tokens each process has, and their type; and how many tokens there are in all, and
        were left out since they are not finite.
        """
        sites = self.activations.sites
        header = [own.num_tokens, own.non_finite]
        for site in sites:
            tensor = own.by_site[site]
            # What has no rows does not know its type; a type that is there is larger.
            header.append(len(tensor) * len(_DTYPES) + (_DTYPES.index(tensor.dtype) if len(tensor) else 0))
        everyone = self.accelerator.gather(torch.tensor([header], device=self.accelerator.device)).tolist()
        counts = {site: [row[i] // len(_DTYPES) for row in everyone] for i, site in enumerate(sites, 2)}
        kinds = {site: max(row[i] % len(_DTYPES) for row in everyone) for i, site in enumerate(sites, 2)}
        num_tokens, non_finite = (sum(row[i] for row in everyone) for i in range(2))
        return counts, {site: _DTYPES[kind] for site, kind in kinds.items()}, num_tokens, non_finite

    def _exchange(
        self,
        by_site: dict[Site, Tensor],
        sites: list[Site],
        counts: dict[Site, list[int]],
        dtypes: dict[Site, torch.dtype],
    ) -> dict[Site, Tensor]:
        me, device = self.accelerator.process_index, self.accelerator.device
        wanted = [[site for site in sites if site in needed] for needed in self.needs]
        sizes = {site: self.activations.widths[site] * dtypes[site].itemsize for site in sites}
        # As bytes, so that types can share a message.
        pieces = [[_as_bytes(by_site[site].to(dtypes[site])) for site in needed] for needed in wanted]
        outgoing = [sum(piece.numel() for piece in to) for to in pieces]
        incoming = [sum(counts[site][source] * sizes[site] for site in wanted[me]) for source in range(len(wanted))]
        received = torch.empty(sum(incoming), dtype=torch.uint8, device=device)
        flat = [piece for to in pieces for piece in to]
        sent = torch.cat(flat) if flat else received.new_empty(0)
        dist.all_to_all_single(received, sent, incoming, outgoing)
        self.bytes_sent += sum(outgoing) - outgoing[me]
        found: dict[Site, list[Tensor]] = {site: [] for site in wanted[me]}
        lengths = [counts[site][source] * sizes[site] for source in range(len(wanted)) for site in wanted[me]]
        for site, piece in zip(wanted[me] * len(wanted), received.split(lengths), strict=True):
            found[site].append(piece)
        return {site: _as_rows(pieces, dtypes[site], self.activations.widths[site]) for site, pieces in found.items()}


def _as_bytes(rows: Tensor) -> Tensor:
    return rows.contiguous().view(-1).view(torch.uint8)


def _as_rows(pieces: list[Tensor], dtype: torch.dtype, width: int) -> Tensor:
    # Joined as bytes: a piece may begin where no value of the type may.
    return torch.cat(pieces).view(dtype).view(-1, width)
