from torch import Tensor


def squared_error(target: Tensor, reconstruction: Tensor) -> Tensor:
    """
    Squared error, summed over tokens and dimensions in float32 (float64 stays float64).

    Args:
        target (`torch.Tensor` of shape `(num_tokens, d_out)`): What the head should reproduce.
        reconstruction (`torch.Tensor` of shape `(num_tokens, d_out)`): What it produced.

    Returns:
        `torch.Tensor` of shape `()`.
    """
    return (_wide(target) - _wide(reconstruction)).pow(2).sum()


def total_variance(target: Tensor) -> Tensor:
    """
    Squared distance of `target` `(num_tokens, d_out)` from its mean over tokens, summed: `()`. Float32 or float64.
    """
    target = _wide(target)
    return (target - target.mean(0)).pow(2).sum()


def fvu(target: Tensor, reconstruction: Tensor) -> Tensor:
    """
    Fraction of variance unexplained: squared error over the target's total variance about its mean.

    Args:
        target (`torch.Tensor` of shape `(num_tokens, d_out)`): What the head should reproduce.
        reconstruction (`torch.Tensor` of shape `(num_tokens, d_out)`): What it produced.

    Returns:
        `torch.Tensor` of shape `()`: 0 is perfect, 1 is no better than the mean. Float32.

    Raises:
        `ValueError`: if fewer than two tokens are given (no variance to explain).
    """
    if target.shape[0] < 2:
        raise ValueError(f"FVU needs at least two tokens, but {target.shape[0]} was given. Use a larger batch.")
    return squared_error(target, reconstruction) / total_variance(target)


def l0(acts: Tensor) -> Tensor:
    """Mean number of latents above zero for a token, from activations `(num_tokens, k)`: `()`."""
    return (acts > 0).sum(-1).float().mean()


def _wide(tensor: Tensor) -> Tensor:
    """Half precisions overflow or lose the mean in a sum over a batch, so they become float32."""
    return tensor if tensor.dtype.itemsize >= 4 else tensor.float()
