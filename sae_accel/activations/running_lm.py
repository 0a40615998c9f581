"""
Activations that the LM computes while the heads train, with nothing cached on disk.

The LM runs on a batch and stops after the deepest hookpoint. Hooks record each activation on the way. The rows of
tokens that should not train, such as padding, are then left out.
"""

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
    """A function from a batch of tokens to [`Activations`]."""

    def __call__(self, batch: dict[str, Tensor], careful: bool = True) -> Activations: ...


class RunningLM:
    """
    An LM that computes activations on demand. Each forward pass stops after the deepest hookpoint.

    Args:
        model (`PreTrainedModel`): The LM. It is put in evaluation mode, and its parameters are frozen. Its own head
            never runs.
        sites (`list[Site]`): The places to read: the input or output of modules of the LM's base model.
        exclude_tokens (`list[int]`): Token ids that train no head.
        widths (`dict[Site, int]`, *optional*): Width of the activation at each site. Required for sites whose module
            may not run in a batch, such as an expert of a mixture.

    Examples:
        ```python
        from sae_accel import RunningLM
        from sae_accel.lm.hooks import Site

        site = Site("layers.2", "output")
        activations = RunningLM(lm, [site], exclude_tokens=[])(inputs)
        activations.by_site[site]  # (num_tokens, d)
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
        # Dropout would add noise to the activations.
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
        The activations of the tokens that train: tokens that are not padding, not excluded, and finite at every site.

        A module that runs on some tokens only, such as an expert, has its own rows, which are checked separately.

        Args:
            batch (`dict[str, torch.Tensor]`): `input_ids` and `attention_mask`, each `(batch, ctx_len)`, or
                `pixel_values`.
            careful (`bool`, defaults to `True`): Whether to leave out rows that are not finite. The host has to wait
                for the device to do so. If false, such rows stay, and `unsure` says whether there may be some.

        Returns:
            [`Activations`].

        Raises:
            `InputError`: if the rows of a site cannot be matched with tokens, so that rows of padding or excluded
            tokens cannot be left out.

        Examples:
            ```python
            from sae_accel import RunningLM
            from sae_accel.lm.hooks import Site

            source = RunningLM(lm, [Site("layers.1", "output"), Site("layers.2", "input")], exclude_tokens=[0])
            source(inputs).num_tokens
            ```
        """
        device = next(iter(batch.values())).device
        if not len(next(iter(batch.values()))):
            if self.sharded:
                # Processes with rows gather each layer from all processes, so this one must run the LM, too.
                row = {name: value.new_ones(1, *value.shape[1:]) for name, value in batch.items()}
                capture(self.base_model, self.sites, {**row, **self.options})
            return Activations({site: self._none(site, device) for site in self.sites}, 0)
        # Computed before the LM runs, because the host waits for it.
        wanted = Wanted.of(token_mask(batch, self.exclude_tokens))
        pieces = capture_pieces(
            self.base_model, self.sites, {**without_unknown_positions(self.reader, batch), **self.options}
        )
        # An LM may lie on several devices; its activations move to the device of the tokens.
        # Each piece: (rows of one run of the module, d).
        here = {site: [piece.to(device) for piece in pieces[site]] for site in self.sites if site in pieces}
        found = trained_rows(here, wanted, careful)
        found.by_site |= {site: self._none(site, device) for site in self.sites if site not in pieces}
        return found

    def _none(self, site: Site, device: torch.device) -> Tensor:
        return torch.empty(0, self.widths[site], dtype=self.base_model.dtype, device=device)


def without_cache(module: nn.Module) -> dict[str, bool]:
    """
    Options of a forward pass without a cache of keys and values, which only generation needs.

    Args:
        module (`nn.Module`): The LM, or its encoder.
    """
    return {"use_cache": False} if "use_cache" in inspect.signature(module.forward).parameters else {}
