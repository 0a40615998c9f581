import inspect
from collections.abc import Mapping
from types import MappingProxyType
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..data.collate import token_mask
from ..lm.hooks import Site, base_of, capture, capture_pieces, is_sharded, token_model
from ..lm.positions import without_unknown_positions
from .trained_rows import Activations, Wanted, trained_rows


class ActivationSource(Protocol):
    """Where activations come from: a batch of tokens goes in."""

    def __call__(self, batch: dict[str, Tensor], careful: bool = True) -> Activations: ...


class RunningLM:
    """
    Activations that are computed as tokens come, by an LM that stops after the deepest hookpoint.

    Args:
        model (`PreTrainedModel`): The LM. It is put in evaluation mode and its parameters are frozen; its own head, if
            it has one, is never run.
        sites (`list[Site]`): What to read.
        exclude_tokens (`list[int]`): Token ids that train nothing.
        widths (`dict[Site, int]`, *optional*): Width of the activation at each site whose module a batch may not
            reach, such as an expert of a mixture.

    Examples:
        ```python
        activations = RunningLM(lm, [Site("layers.2", "output")], exclude_tokens=[])(batch)
        activations.by_site[Site("layers.2", "output")]  # (num_tokens, d)
        ```
    """

    def __init__(
        self,
        model: PreTrainedModel,
        sites: list[Site],
        exclude_tokens: list[int],
        widths: Mapping[Site, int] = MappingProxyType({}),
    ):
        model.requires_grad_(False)
        # Dropout would make a noise of the activations.
        model.eval()
        self.base_model = base_of(model)
        self.sites = sites
        self.exclude_tokens = exclude_tokens
        self.widths = widths
        self.reader = token_model(self.base_model)
        self.options = without_cache(self.reader)
        self.sharded = is_sharded(self.base_model)

    def __call__(self, batch: dict[str, Tensor], careful: bool = True) -> Activations:
        """
        The activations of the tokens that train: those that are not padding, not excluded, and finite at every site.
        Rows of a module that runs on some tokens only, such as an expert's, are looked at by themselves.

        Args:
            batch (`dict[str, torch.Tensor]`): `input_ids` and `attention_mask`, each `(batch, ctx_len)`, or
                `pixel_values`.
            careful (`bool`, defaults to `True`): Whether those that are not finite are left out, for which the host
                waits for the device; else they may be among them, and `unsure` says so.

        Raises:
            `InputError`: if it cannot be told which of a site's rows are of tokens that are left out.
        """
        device = next(iter(batch.values())).device
        if not len(next(iter(batch.values()))):
            if self.sharded:
                # Other processes, which have rows, cannot gather the layers without this one.
                row = {name: value.new_ones(1, *value.shape[1:]) for name, value in batch.items()}
                capture(self.base_model, self.sites, {**row, **self.options})
            return Activations({site: self._none(site, device) for site in self.sites}, 0)
        # Before the LM runs, so that the host waits for as little as can be.
        wanted = Wanted.of(token_mask(batch, self.exclude_tokens))
        pieces = capture_pieces(
            self.base_model, self.sites, {**without_unknown_positions(self.reader, batch), **self.options}
        )
        # An LM may be spread over devices; its activations meet where the tokens are.
        here = {site: [piece.to(device) for piece in pieces[site]] for site in self.sites if site in pieces}
        found = trained_rows(here, wanted, careful)
        found.by_site |= {site: self._none(site, device) for site in self.sites if site not in pieces}
        return found

    def _none(self, site: Site, device: torch.device) -> Tensor:
        return torch.empty(0, self.widths[site], dtype=self.base_model.dtype, device=device)


def without_cache(module: nn.Module) -> dict[str, bool]:
    """Options of a forward pass without caches of keys and values, memory for tokens that are never generated."""
    return {"use_cache": False} if "use_cache" in inspect.signature(module.forward).parameters else {}
