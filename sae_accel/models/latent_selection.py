"""
The activations of heads: rules that select a few latents per token from dense pre-activations.

Each rule is a [`LatentSelection`] in the table `SELECTIONS` at the end of this file. `select` runs on dense
pre-activations, piece by piece, without gradients; `settle` sees all tokens of a batch, if a rule needs them together
(`batchtopk`); `activate` turns the few selected pre-activations into activations, with gradients. Tokens may select
different numbers of latents; `-inf` then fills the shorter rows.
"""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


if TYPE_CHECKING:
    from .pretrained_head import PreTrainedHead


# With batchtopk a token selects at most this many times k latents: one of huge norm would select thousands.
BATCHTOPK_MOST = 8
# Tokens with more than this many times the median norm do not count for initial thresholds.
OUTLIER_NORM = 5


class LatentSelection(NamedTuple):
    """
    An activation: the rule that selects latents, and the function that their pre-activations pass. Its functions get
    the head, because some rules keep one number per latent in it.

    Args:
        select (`Callable`): Takes the head, pre-activations `(num_tokens, num_latents)` and `k`; returns values and
            indices, each `(num_tokens, n)`, with values of `-inf` where a token selects fewer than n latents.
        activate (`Callable`): Takes the head, selected pre-activations and their indices; returns activations.
        settle (`Callable`, *optional*): Takes the head, the values and indices of a whole batch, and `k`; returns the
            values and indices to keep. `select` sees only some of the tokens at a time.
        parameters (`tuple[str, ...]`): Names of learnt parameters with one number per latent, besides the encoder's
            bias.
        buffers (`tuple[str, ...]`): Names of buffers with one number per latent, which training observes and does not
            learn.
        nests (`bool`): Whether the first k columns of a selection at `4 * k` are the selection at k. Multi-TopK needs
            this.
        counts (`bool`): Whether exactly `k` latents are selected per token.
    """

    select: Callable[["PreTrainedHead", Tensor, int], tuple[Tensor, Tensor]]
    activate: Callable[["PreTrainedHead", Tensor, Tensor], Tensor]
    settle: Callable[["PreTrainedHead", Tensor, Tensor, int], tuple[Tensor, Tensor]] | None = None
    parameters: tuple[str, ...] = ()
    buffers: tuple[str, ...] = ()
    nests: bool = False
    counts: bool = True


def topk(pre_activations: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """
    The k largest per token, in descending order. See arXiv:2406.04093, section 2.3.

    A process that holds only some latents of a head may hold fewer than k. It selects all of them, and `-inf` fills
    the rest.

    Args:
        pre_activations (`torch.Tensor` of shape `(num_tokens, num_latents)`): Dense pre-activations.
        k (`int`): Latents to select per token.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: values and indices, each `(num_tokens, k)`.
    """
    missing = max(0, k - pre_activations.shape[-1])
    values, indices = pre_activations.topk(k - missing, dim=-1)  # (num_tokens, k - missing) each
    return (
        (F.pad(values, (0, missing), value=-math.inf), F.pad(indices, (0, missing))) if missing else (values, indices)
    )


def groupmax(pre_activations: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """
    The largest latent of each of k contiguous groups of equal size.

    Args:
        pre_activations (`torch.Tensor` of shape `(num_tokens, num_latents)`): Dense pre-activations.
        k (`int`): Number of groups.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: values and indices, each `(num_tokens, k)`.
    """
    values, indices = pre_activations.unflatten(-1, (k, -1)).max(-1)  # (num_tokens, k) each
    group_size = pre_activations.shape[-1] // k
    return values, indices + group_size * indices.new_ones(k).cumsum(0) - group_size


def signed_topk(pre_activations: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """
    The k largest per token by magnitude, with their sign. Files that sparsify wrote from June to August 2024 use this.

    Args:
        pre_activations (`torch.Tensor` of shape `(num_tokens, num_latents)`): Dense pre-activations.
        k (`int`): Latents to select per token.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: values and indices, each `(num_tokens, k)`.
    """
    indices = pre_activations.abs().topk(k, dim=-1).indices  # (num_tokens, k)
    return pre_activations.gather(-1, indices), indices


def above(pre_activations: Tensor, threshold: Tensor | float) -> tuple[Tensor, Tensor]:
    """
    All latents above a threshold, per token in descending order.

    Args:
        pre_activations (`torch.Tensor` of shape `(num_tokens, num_latents)`): Dense pre-activations.
        threshold (`torch.Tensor` of shape `(num_latents,)` or `float`): The threshold of each latent, or of all.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: values and indices, each `(num_tokens, n)`, where n is the largest number
        of latents that a token selects. `-inf` fills the rest.
    """
    active = pre_activations > threshold  # (num_tokens, num_latents)
    most = int(active.sum(-1, dtype=torch.int32).max()) if len(active) else 0
    return pre_activations.masked_fill(~active, -math.inf).topk(max(most, 1), dim=-1)


def batch_topk(values: Tensor, indices: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """
    The `k * num_tokens` largest candidates of all tokens together, as far as they are above zero. See
    arXiv:2412.06410.

    Args:
        values (`torch.Tensor` of shape `(num_tokens, n)`): Each token's candidates, in descending order.
        indices (`torch.LongTensor` of shape `(num_tokens, n)`): Their latents.
        k (`int`): Latents to select per token, on average.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: values and indices, each `(num_tokens, m)`, where m is the largest number
        of latents that a token keeps. `-inf` fills the rest.
    """
    if not values.numel():
        return values, indices
    most = min(k * len(values), values.numel())
    least = values.flatten().topk(most, sorted=False).values.min()
    kept = (values >= least) & (values > 0)  # (num_tokens, n)
    width = max(int(kept.sum(-1).max()), 1)
    return values.masked_fill(~kept, -math.inf)[:, :width], indices[:, :width]


def jump_relu(values: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
    """
    JumpReLU: a pre-activation above its threshold passes unchanged, and any other becomes 0. See arXiv:2407.14435,
    section 3.

    The threshold gets the paper's straight-through gradient with a rectangular kernel. The kernel's width is
    `bandwidth` times the threshold. The paper instead uses one width for all latents, and inputs of norm 1.

    Args:
        values (`torch.Tensor` of shape `(num_pairs,)`): Pre-activations.
        threshold (`torch.Tensor` of shape `(num_pairs,)`): The threshold of each pre-activation.
        bandwidth (`float`): Width of the kernel, as a fraction of the threshold.
    """
    return _JumpReLU.apply(values, threshold, bandwidth)


def step_function(values: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
    """
    1 above the threshold and 0 elsewhere, with the threshold's gradient of `jump_relu`. Its sum per token is L0.

    Args:
        values (`torch.Tensor` of shape `(num_pairs,)`): Pre-activations.
        threshold (`torch.Tensor` of shape `(num_pairs,)`): The threshold of each pre-activation.
        bandwidth (`float`): Width of the kernel, as a fraction of the threshold.
    """
    return _Step.apply(values, threshold, bandwidth)


def smallest_active(acts: Tensor) -> Tensor:
    """The smallest activation above zero of a batch, `()` in float32; 0 if no latent is active."""
    if not acts.numel():
        return acts.new_zeros((), dtype=torch.float32)
    # Without a count of positive values, for which the host would wait for the device.
    smallest = torch.where(acts.gt(0), acts, torch.inf).min().detach().float()  # ()
    return torch.where(smallest.isfinite(), smallest, 0.0)


def first_thresholds(tokens: Tensor, weight: Tensor, bias: Tensor, part: float) -> Tensor:
    """
    Initial thresholds: each latent's pre-activation exceeds its threshold on a given fraction of the tokens.

    Args:
        tokens (`torch.Tensor` of shape `(num_tokens, d_in)`): The encoder's input.
        weight (`torch.Tensor` of shape `(num_latents, d_in)`): The encoder.
        bias (`torch.Tensor` of shape `(num_latents,)`): The encoder's bias.
        part (`float`): The fraction of the tokens; `k / num_latents` gives k latents per token on average.

    Returns:
        `torch.Tensor` of shape `(num_latents,)`: above zero.
    """
    # Tokens of huge norm, such as an LM's first, would lift half of the thresholds out of all other tokens' reach.
    norms = tokens.norm(dim=-1)  # (num_tokens,)
    tokens = tokens[norms <= OUTLIER_NORM * norms.median()]
    uses = max(1, round(len(tokens) * part))
    parts = zip(weight.split(1024), bias.split(1024), strict=True)  # (1024, d_in), (1024,)
    largest = [torch.addmm(b[:, None], w, tokens.t()).topk(uses, dim=1).values[:, -1] for w, b in parts]
    # Updates scale with the threshold, so none may start at zero: a tenth of a usual value is the least.
    usual = weight.norm(dim=-1) * norms.median() / tokens.shape[1] ** 0.5  # (num_latents,)
    return torch.maximum(torch.cat(largest), usual / 10)


class _JumpReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(values, threshold)
        ctx.bandwidth = bandwidth
        return _passed(values, threshold)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        values, threshold = ctx.saved_tensors
        near = _near(values, threshold, ctx.bandwidth)
        # The paper's theta / epsilon, with epsilon = bandwidth * theta.
        return grad * (values > threshold.clamp_min(0)), -grad * near / ctx.bandwidth, None


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(values, threshold)
        ctx.bandwidth = bandwidth
        return (values > threshold.clamp_min(0)).to(threshold.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        values, threshold = ctx.saved_tensors
        near = _near(values, threshold, ctx.bandwidth)
        return None, -grad * near / (ctx.bandwidth * threshold).where(near, 1), None


def _passed(values: Tensor, threshold: Tensor) -> Tensor:
    return torch.where(values > threshold.clamp_min(0), values, 0)


def _near(values: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
    return ((values - threshold).abs() < bandwidth * threshold / 2) & (threshold > 0)


def _relu(head: "PreTrainedHead", values: Tensor, indices: Tensor) -> Tensor:
    # ReLU after the selection gives the same result, and touches k values per token instead of num_latents.
    return F.relu(values)


def _above_threshold(head: "PreTrainedHead", pre_activations: Tensor, k: int) -> tuple[Tensor, Tensor]:
    threshold = head.threshold.clamp_min(0).to(pre_activations.dtype)
    if head.training:
        # A value within the kernel moves the threshold, even if it is not active.
        threshold = threshold * (1 - head.config.bandwidth / 2)
    return above(pre_activations, threshold)


def _jump(head: "PreTrainedHead", values: Tensor, indices: Tensor) -> Tensor:
    return jump_relu(values, head.threshold[indices], head.config.bandwidth)


def _batch_candidates(head: "PreTrainedHead", pre_activations: Tensor, k: int) -> tuple[Tensor, Tensor]:
    if head.training:
        return topk(pre_activations, min(BATCHTOPK_MOST * k, pre_activations.shape[-1]))
    return above(pre_activations, head.threshold.clamp_min(0).to(pre_activations.dtype))


def _batch_settle(head: "PreTrainedHead", values: Tensor, indices: Tensor, k: int) -> tuple[Tensor, Tensor]:
    return batch_topk(values, indices, k) if head.training else (values, indices)


def _gated(head: "PreTrainedHead", values: Tensor, indices: Tensor) -> Tensor:
    """
    A magnitude where the gate is open, else 0. The magnitude's weights are the gate's times `exp(r_mag)`. See
    arXiv:2404.16014, section 3.
    """
    is_open = values > 0  # (num_pairs,)
    # Shorter rows are filled with -inf, whose product with a gradient of 0 would be NaN.
    gates = values.masked_fill(~is_open, 0)
    magnitudes = head.r_mag.exp()[indices] * (gates - head.encoder.bias[indices]) + head.b_mag[indices]  # (num_pairs,)
    return F.relu(magnitudes) * is_open


SELECTIONS = {
    "topk": LatentSelection(lambda head, pre, k: topk(pre, k), _relu, nests=True),
    "groupmax": LatentSelection(lambda head, pre, k: groupmax(pre, k), _relu),
    "signed_topk": LatentSelection(
        lambda head, pre, k: signed_topk(pre, k), lambda head, values, indices: values, nests=True
    ),
    "batchtopk": LatentSelection(_batch_candidates, _relu, settle=_batch_settle, buffers=("threshold",), counts=False),
    "jumprelu": LatentSelection(_above_threshold, _jump, parameters=("threshold",), counts=False),
    "relu": LatentSelection(lambda head, pre, k: above(pre, 0.0), _relu, counts=False),
    "gated": LatentSelection(
        lambda head, pre, k: above(pre, 0.0), _gated, parameters=("b_mag", "r_mag"), counts=False
    ),
}
