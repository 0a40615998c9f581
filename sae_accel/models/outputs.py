from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor
from transformers.utils import ModelOutput


class Latents(NamedTuple):
    """
    The active latents of each token.

    Args:
        top_acts (`torch.Tensor` of shape `(..., k)`): Their activations. Where tokens differ in how many they have, k
            is that of the token with the most, and the others have zeros behind theirs.
        top_indices (`torch.LongTensor` of shape `(..., k)`): Which they are.
    """

    top_acts: Tensor
    top_indices: Tensor

    def to_dense(self, num_latents: int) -> Tensor:
        """
        The activations of all latents, with zeros for those that are not active.

        Args:
            num_latents (`int`): Latents of the head.

        Returns:
            `torch.Tensor` of shape `(..., num_latents)`.

        Examples:
            ```python
            sae.encode(hidden).to_dense(sae.num_latents)
            ```
        """
        shape = (*self.top_acts.shape[:-1], num_latents)
        # Added up, since what fills up a token's columns may name a latent that is active.
        return self.top_acts.new_zeros(shape).scatter_add_(-1, self.top_indices, self.top_acts)


@dataclass
class HeadOutput(ModelOutput):
    """
    What a head's forward pass gives.

    Args:
        loss (`torch.Tensor` of shape `()`): `fvu + auxk_alpha * auxk_loss + multi_topk_fvu / 8 +
            sparsity_weight * sparsity_loss`. Float32.
        reconstruction (`torch.Tensor` of shape `(..., d_out)`): What the head makes of its input.
        top_acts (`torch.Tensor` of shape `(..., k)`): Activations of the selected latents.
        top_indices (`torch.LongTensor` of shape `(..., k)`): Which they are.
        fvu (`torch.Tensor` of shape `()`): Squared error over the target's total variance.
        auxk_loss (`torch.Tensor` of shape `()`, *optional*): With a `dead_mask`.
        multi_topk_fvu (`torch.Tensor` of shape `()`, *optional*): With `multi_topk`.
        sparsity_loss (`torch.Tensor` of shape `()`, *optional*): With `jumprelu`, in training: `(L0 / k - 1)^2`.
        smallest_act (`torch.Tensor` of shape `()`, *optional*): With `batchtopk`, in training: the smallest activation
            of the batch that is above zero.
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
