from collections.abc import Callable

from torch import Tensor


LAYER_NORM_EPS = 1e-5


def normalize(tokens: Tensor, kind: str | None) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """
    What a head encodes of its input, and what brings a reconstruction of that back.

    Args:
        tokens (`torch.Tensor` of shape `(num_tokens, d_in)`): What the head reads.
        kind (`str`, *optional*): `"layer_norm"`, to mean 0 and standard deviation 1 with `1e-5` added, as in
            arXiv:2406.04093; `"constant_norm"`, to the norm `sqrt(d_in)`; nothing if not given.
    """
    if kind is None:
        return tokens, lambda reconstruction: reconstruction
    if kind == "constant_norm":
        scale = tokens.shape[-1] ** 0.5 / tokens.norm(dim=-1, keepdim=True)
        return tokens * scale, lambda reconstruction: reconstruction / scale
    mean = tokens.mean(-1, keepdim=True)
    std = (tokens - mean).std(-1, keepdim=True)
    return (tokens - mean) / (std + LAYER_NORM_EPS), lambda reconstruction: reconstruction * std + mean
