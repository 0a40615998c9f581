import inspect
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedModel

from .data import token_mask
from .hooks import Site, capture


@dataclass
class Activations:
    """
    What an LM computed for a batch, without the tokens that do not train.

    Args:
        by_site (`dict[Site, torch.Tensor]`): Activations `(num_tokens, d)` at each site, in the LM's precision.
        num_tokens (`int`): Rows of each.
    """

    by_site: dict[Site, Tensor]
    num_tokens: int

    def split(self, parts: int) -> Iterator["Activations"]:
        """Exactly `parts` consecutive pieces, the same on every process, of which some may be empty."""
        pieces = {site: tensor.tensor_split(parts) for site, tensor in self.by_site.items()}
        for i in range(parts):
            by_site = {site: tensors[i] for site, tensors in pieces.items()}
            yield Activations(by_site, next(iter(by_site.values())).shape[0])


class RunningLM:
    """
    Activations that are computed as tokens come, by an LM that stops after the deepest hookpoint.

    Args:
        model (`PreTrainedModel`): The LM. It is put in evaluation mode and its parameters are frozen; its own head, if
            it has one, is never run.
        sites (`list[Site]`): What to read.
        exclude_tokens (`list[int]`): Token ids that train nothing.

    Examples:
        ```python
        activations = RunningLM(lm, [Site("layers.2", "output")], exclude_tokens=[])(batch)
        activations.by_site[Site("layers.2", "output")]  # (num_tokens, d)
        ```
    """

    def __init__(self, model: PreTrainedModel, sites: list[Site], exclude_tokens: list[int]):
        model.requires_grad_(False)
        # Dropout would make a noise of the activations.
        model.eval()
        self.base_model = model.base_model
        self.sites = sites
        self.exclude_tokens = exclude_tokens
        # Caches of keys and values cost memory for tokens that are never generated.
        has_cache = "use_cache" in inspect.signature(self.base_model.forward).parameters
        self.options = {"use_cache": False} if has_cache else {}

    def __call__(self, batch: dict[str, Tensor]) -> Activations:
        """
        Args:
            batch (`dict[str, torch.Tensor]`): `input_ids` and `attention_mask`, each `(batch, ctx_len)`.
        """
        mask = token_mask(batch, self.exclude_tokens)
        tokens = None if mask.all() else mask.flatten().nonzero().squeeze(-1)
        by_site = capture(self.base_model, self.sites, {**batch, **self.options}, tokens)
        return Activations(by_site, mask.numel() if tokens is None else len(tokens))
