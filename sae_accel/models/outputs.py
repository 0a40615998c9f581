from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor
from transformers.utils import ModelOutput


class Latents(NamedTuple):
    """
    The active latents of each token: a tuple of activations and indices.

    Args:
        top_acts (`torch.Tensor` of shape `(..., k)`): Activations of the latents. If tokens have different numbers of
            active latents, k is the largest number, and zeros fill the shorter rows.
        top_indices (`torch.LongTensor` of shape `(..., k)`): Indices of the latents.

    Examples:
        ```python
        latents = sae.encode(hidden)
        latents.top_acts.shape, latents.top_indices.shape  # (1, num_tokens, k) each
        top_acts, top_indices = latents
        ```
    """

    top_acts: Tensor
    top_indices: Tensor

    def to_dense(self, num_latents: int) -> Tensor:
        """
        The activations of all latents, with zeros for latents that are not active.

        Args:
            num_latents (`int`): Number of latents of the head.

        Returns:
            `torch.Tensor` of shape `(..., num_latents)`.

        Examples:
            ```python
            dense = sae.encode(hidden).to_dense(sae.num_latents)  # (1, num_tokens, num_latents)
            (dense > 0).sum(-1)  # active latents per token
            ```
        """
        shape = (*self.top_acts.shape[:-1], num_latents)
        # scatter_add, not scatter: the index of a zero that fills a row may be that of an active latent.
        return self.top_acts.new_zeros(shape).scatter_add_(-1, self.top_indices, self.top_acts)


@dataclass
class HeadOutput(ModelOutput):
    """
    The result of a head's forward pass. Fields that do not apply are None.

    Args:
        loss (`torch.Tensor` of shape `()`): `fvu + auxk_alpha * auxk_loss + multi_topk_fvu / 8 + sparsity_weight *
            sparsity_loss`. Float32.
        reconstruction (`torch.Tensor` of shape `(..., d_out)`): The head's reconstruction of its target.
        top_acts (`torch.Tensor` of shape `(..., k)`): Activations of the selected latents.
        top_indices (`torch.LongTensor` of shape `(..., k)`): Indices of the selected latents.
        fvu (`torch.Tensor` of shape `()`): Squared error over the target's total variance.
        auxk_loss (`torch.Tensor` of shape `()`, *optional*): With `dead_mask`: the error of the residual's fit by dead
            latents.
        multi_topk_fvu (`torch.Tensor` of shape `()`, *optional*): With `multi_topk`: FVU at `4 * k` latents.
        sparsity_loss (`torch.Tensor` of shape `()`, *optional*): With `jumprelu` in training: `(L0 / k - 1)^2`.
        smallest_act (`torch.Tensor` of shape `()`, *optional*): With `batchtopk` in training: the smallest activation
            of the batch above zero.

    Examples:
        ```python
        output = sae(hidden)
        output.fvu, output.loss
        output.reconstruction.shape  # (1, num_tokens, d_in)
        ```
    """

    loss: Tensor | None = None
    reconstruction: Tensor | None = None
    top_acts: Tensor | None = None
    top_indices: Tensor | None = None
    fvu: Tensor | None = None
    auxk_loss: Tensor | None = None
    multi_topk_fvu: Tensor | None = None
    sparsity_loss: Tensor | None = None
    smallest_act: Tensor | None = None
