"""
Measures of a reconstruction: squared error, total variance, FVU and L0.

Sums over a batch are taken in float32, whatever the precision of the activations: bfloat16 would lose the mean, and
float16 would overflow.
"""

from torch import Tensor


def squared_error(target: Tensor, reconstruction: Tensor) -> Tensor:
    """
    Squared error, summed over tokens and dimensions in float32 (float64 stays float64).

    Args:
        target (`torch.Tensor` of shape `(num_tokens, d_out)`): The activations that the head should reproduce.
        reconstruction (`torch.Tensor` of shape `(num_tokens, d_out)`): The activations that the head gives.

    Returns:
        `torch.Tensor` of shape `()`.
    """
    return (_wide(target) - _wide(reconstruction)).pow(2).sum()


def total_variance(target: Tensor) -> Tensor:
    """
    Squared distance from the mean over tokens, summed over tokens and dimensions.

    Args:
        target (`torch.Tensor` of shape `(num_tokens, d_out)`): Activations.

    Returns:
        `torch.Tensor` of shape `()`. Float32; float64 for float64.
    """
    target = _wide(target)
    return (target - target.mean(0)).pow(2).sum()


def fvu(target: Tensor, reconstruction: Tensor) -> Tensor:
    """
    Fraction of variance unexplained: squared error over the target's total variance about its mean.

    Args:
        target (`torch.Tensor` of shape `(num_tokens, d_out)`): The activations that the head should reproduce.
        reconstruction (`torch.Tensor` of shape `(num_tokens, d_out)`): The activations that the head gives.

    Returns:
        `torch.Tensor` of shape `()`: 0 is perfect, 1 is no better than the mean. Float32.

    Raises:
        `ValueError`: if fewer than two tokens are given (no variance to explain).
    """
    if target.shape[0] < 2:
        raise ValueError(f"FVU needs at least two tokens, but {target.shape[0]} was given. Use a larger batch.")
    return squared_error(target, reconstruction) / total_variance(target)


def l0(acts: Tensor) -> Tensor:
    """
    L0: the mean number of latents above zero per token.

    Args:
        acts (`torch.Tensor` of shape `(num_tokens, k)`): Activations of the selected latents.

    Returns:
        `torch.Tensor` of shape `()`.
    """
    return (acts > 0).sum(-1).float().mean()


def _wide(tensor: Tensor) -> Tensor:
    """The tensor in float32 if it is in half precision, which overflows or loses the mean in a sum over a batch."""
    return tensor if tensor.dtype.itemsize >= 4 else tensor.float()
