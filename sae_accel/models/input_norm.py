"""
Normalisation of a head's input, for heads that other libraries trained on normalised activations.

The head sees the normalised activation. Its reconstruction is scaled back, so that callers always get activations of
the LM's own scale.
"""

from collections.abc import Callable

from torch import Tensor


LAYER_NORM_EPS = 1e-5


def normalize(tokens: Tensor, kind: str | None) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """
    Normalises each token's activation, and returns the function that scales a reconstruction back.

    Args:
        tokens (`torch.Tensor` of shape `(num_tokens, d_in)`): The head's input.
        kind (`str`, *optional*): `"layer_norm"` gives mean 0 and standard deviation 1 (`1e-5` is added to the standard
            deviation, as in arXiv:2406.04093); `"constant_norm"` gives the norm `sqrt(d_in)`; nothing changes if not
            given.

    Returns:
        `tuple[torch.Tensor, Callable]`: the normalised input, `(num_tokens, d_in)`, and a function of a reconstruction
        `(num_tokens, d_out)`.
    """
    if kind is None:
        return tokens, lambda reconstruction: reconstruction
    if kind == "constant_norm":
        scale = tokens.shape[-1] ** 0.5 / tokens.norm(dim=-1, keepdim=True)  # (num_tokens, 1)
        return tokens * scale, lambda reconstruction: reconstruction / scale
    mean = tokens.mean(-1, keepdim=True)  # (num_tokens, 1)
    std = (tokens - mean).std(-1, keepdim=True)  # (num_tokens, 1)
    return (tokens - mean) / (std + LAYER_NORM_EPS), lambda reconstruction: reconstruction * std + mean
