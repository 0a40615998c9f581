"""
The exchange of activations between processes that hold different heads, or different latents of the same heads.

Every process runs the LM on its own tokens. It then sends the activations of each site only to the processes that need
this site. So each process ends with the activations of all tokens at its own sites. First a small header goes round,
with the numbers of rows; then one all-to-all message carries the rows as bytes, so that sites of different precision
share it.
"""

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
    Activations of the tokens of all processes, at the sites that each process needs.

    Every process runs the LM on its own tokens, and sends each activation only to the processes that need it, in the
    LM's precision. For a site of width `d` that one process of `n` needs, `d * (n - 1) / n` values per token are sent.
    Gathering all activations on every process would send `d * (n - 1)`. Each process also sends 8 bytes per site, and
    16 more, to each other process.

    Args:
        activations ([`RunningLM`]): The LM that computes activations of this process's tokens.
        needs (`list[list[Site]]`): The sites that each process needs.
        accelerator (`Accelerator`): Knows this process and its device.
        at_once (`bool`): Whether to send all sites in one message, which takes memory for a second copy of everything
            that is sent. If false, sites are sent one after the other.

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
        The activations of all processes' tokens, in the order of the processes, at the sites that this process needs.

        Args:
            batch (`dict[str, torch.Tensor]`): This process's batch, as in [`RunningLM`].
            careful (`bool`, defaults to `True`): Not used. Rows that are not finite are always left out, because the
                host waits for the sizes of the messages anyway.
        """
        own = self.activations(batch)
        counts, dtypes, num_tokens, non_finite = self._headers(own)
        by_site: dict[Site, Tensor] = {}
        for sites in self.rounds:
            by_site |= self._exchange(own.by_site, sites, counts, dtypes)
        return Activations(by_site, num_tokens, non_finite, own.non_finite_at)

    def _headers(self, own: Activations) -> tuple[dict[Site, list[int]], dict[Site, torch.dtype], int, int]:
        """
        The number of rows of each process and the dtype, by site; and the tokens that train and that were left out
        because they are not finite, over all processes.
        """
        sites = self.activations.sites
        header = [own.num_tokens, own.non_finite]
        for site in sites:
            tensor = own.by_site[site]
            # One number holds rows and dtype. A tensor without rows sends dtype 0, which the maximum below ignores.
            header.append(len(tensor) * len(_DTYPES) + (_DTYPES.index(tensor.dtype) if len(tensor) else 0))
        # everyone: (processes, 2 + sites)
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
        """Sends and receives the rows of some sites: `(rows of all processes, d)` by needed site."""
        me, device = self.accelerator.process_index, self.accelerator.device
        wanted = [[site for site in sites if site in needed] for needed in self.needs]
        # Bytes per row.
        sizes = {site: self.activations.widths[site] * dtypes[site].itemsize for site in sites}
        # By receiver and site, as bytes so that dtypes can share a message: (rows * d * itemsize,).
        pieces = [[_as_bytes(by_site[site].to(dtypes[site])) for site in needed] for needed in wanted]
        outgoing = [sum(piece.numel() for piece in to) for to in pieces]
        incoming = [sum(counts[site][source] * sizes[site] for site in wanted[me]) for source in range(len(wanted))]
        received = torch.empty(sum(incoming), dtype=torch.uint8, device=device)  # (bytes,)
        flat = [piece for to in pieces for piece in to]
        sent = torch.cat(flat) if flat else received.new_empty(0)  # (bytes,)
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
    # Joined as bytes, because a piece may begin at an address at which its dtype is not aligned.
    return torch.cat(pieces).view(dtype).view(-1, width)  # (rows, d)
