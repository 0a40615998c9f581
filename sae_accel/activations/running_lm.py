import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..data.collate import token_mask
from ..lm.hooks import Site, base_of, capture, is_sharded, token_model


@dataclass
class Activations:
    """
    What an LM computed for a batch, without the tokens that do not train.

    Args:
        by_site (`dict[Site, torch.Tensor]`): Activations `(num_tokens, d)` at each site, in the LM's precision.
        num_tokens (`int`): Tokens that train; rows of each, but for sites whose module does not run on every token.
    """

    by_site: dict[Site, Tensor]
    num_tokens: int

    def split(self, parts: int) -> Iterator["Activations"]:
        """Exactly `parts` consecutive pieces, the same on every process, of which some may be empty."""
        pieces = {site: tensor.tensor_split(parts) for site, tensor in self.by_site.items()}
        for i in range(parts):
            by_site = {site: tensors[i] for site, tensors in pieces.items()}
            yield Activations(by_site, max(map(len, by_site.values())))


# Where activations come from: a batch of tokens goes in.
ActivationSource = Callable[[dict[str, Tensor]], Activations]


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
        self.options = without_cache(token_model(self.base_model))
        self.sharded = is_sharded(self.base_model)

    def __call__(self, batch: dict[str, Tensor]) -> Activations:
        """
        Args:
            batch (`dict[str, torch.Tensor]`): `input_ids` and `attention_mask`, each `(batch, ctx_len)`, or
                `pixel_values`.
        """
        mask = token_mask(batch, self.exclude_tokens)
        device = next(iter(batch.values())).device
        if not len(next(iter(batch.values()))):
            if self.sharded:
                # Other processes, which have rows, cannot gather the layers without this one.
                row = {name: value.new_ones(1, *value.shape[1:]) for name, value in batch.items()}
                capture(self.base_model, self.sites, {**row, **self.options})
            return Activations({site: self._none(site, device) for site in self.sites}, 0)
        part = None if mask is None or mask.all() else mask
        by_site = capture(self.base_model, self.sites, {**batch, **self.options}, part)
        # An LM may be spread over devices; its activations meet where the tokens are.
        by_site = {
            site: by_site[site].to(device) if site in by_site else self._none(site, device) for site in self.sites
        }
        if mask is None:
            return Activations(by_site, max(map(len, by_site.values())))
        return Activations(by_site, mask.numel() if part is None else int(mask.sum()))

    def _none(self, site: Site, device: torch.device) -> Tensor:
        return torch.empty(0, self.widths[site], dtype=self.base_model.dtype, device=device)


def without_cache(module: nn.Module) -> dict[str, bool]:
    """Options of a forward pass without caches of keys and values, memory for tokens that are never generated."""
    return {"use_cache": False} if "use_cache" in inspect.signature(module.forward).parameters else {}
