import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


if TYPE_CHECKING:
    from .pretrained_head import PreTrainedHead


# Bounds what one token may take of a batch's latents in training, where tokens of huge norm would take thousands.
BATCHTOPK_MOST = 8
# Tokens of more times the median norm have no say in where thresholds begin.
OUTLIER_NORM = 5


class LatentSelection(NamedTuple):
    """
    An activation: how latents are selected, and what their pre-activations become. Its functions are given the head,
    for the numbers that it keeps by latent.

    Args:
        select (`Callable`): From the head, pre-activations `(num_tokens, num_latents)` and `k` to values and indices,
            each `(num_tokens, n)`. What is not selected is `-inf`.
        activate (`Callable`): From the head, selected pre-activations and their indices to activations.
        settle (`Callable`, *optional*): From the head, the values and indices of a whole batch, and `k`, to those that
            stay. `select` sees a part of the tokens at a time.
        parameters (`tuple[str, ...]`): Parameters of one number a latent, beside the encoder's bias.
        buffers (`tuple[str, ...]`): The same for numbers that are observed and not learnt.
        nests (`bool`): Whether the selection at k is part, in front, of the one at 4k, as Multi-TopK asks.
        counts (`bool`): Whether `k` latents are selected for each token, neither more nor less.
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
    The k largest, in descending order. See arXiv:2406.04093, section 2.3. Of fewer latents than k, as a process may
    hold of a head, each is given, and then -inf.
    """
    missing = max(0, k - pre_activations.shape[-1])
    values, indices = pre_activations.topk(k - missing, dim=-1)
    return (
        (F.pad(values, (0, missing), value=-math.inf), F.pad(indices, (0, missing))) if missing else (values, indices)
    )


def groupmax(pre_activations: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The largest of each of k contiguous groups of equal size."""
    values, indices = pre_activations.unflatten(-1, (k, -1)).max(-1)
    group_size = pre_activations.shape[-1] // k
    return values, indices + group_size * indices.new_ones(k).cumsum(0) - group_size


def signed_topk(pre_activations: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest by magnitude, which keep their sign. Found in sparsify's files of June to August 2024."""
    indices = pre_activations.abs().topk(k, dim=-1).indices
    return pre_activations.gather(-1, indices), indices


def above(pre_activations: Tensor, threshold: Tensor | float) -> tuple[Tensor, Tensor]:
    """All that lie above a threshold, in descending order; as many columns as the token with the most has."""
    active = pre_activations > threshold
    most = int(active.sum(-1, dtype=torch.int32).max()) if len(active) else 0
    return pre_activations.masked_fill(~active, -math.inf).topk(max(most, 1), dim=-1)


def batch_topk(values: Tensor, indices: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """
    Of each token's candidates in descending order, `(num_tokens, n)`, the `k * num_tokens` largest of all that are
    above zero; as many columns as the token with the most has. See arXiv:2412.06410.
    """
    if not values.numel():
        return values, indices
    most = min(k * len(values), values.numel())
    least = values.flatten().topk(most, sorted=False).values.min()
    kept = (values >= least) & (values > 0)
    width = max(int(kept.sum(-1).max()), 1)
    return values.masked_fill(~kept, -math.inf)[:, :width], indices[:, :width]


def jump_relu(values: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
    """
    `z` where it is above its threshold, and 0 elsewhere. See arXiv:2407.14435, section 3.

    The threshold's gradient is the paper's straight-through estimate with a rectangular kernel. Its width is
    `bandwidth` times the threshold, where the paper has one width for all latents and inputs of unit norm.

    Args:
        values (`torch.Tensor`): Pre-activations `z`.
        threshold (`torch.Tensor`): Of each, in the same shape.
        bandwidth (`float`): Width of the kernel, as a part of the threshold.
    """
    return _JumpReLU.apply(values, threshold, bandwidth)


def step_function(values: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
    """1 above the threshold and 0 elsewhere, with a gradient for the threshold as in `jump_relu`."""
    return _Step.apply(values, threshold, bandwidth)


def first_thresholds(tokens: Tensor, weight: Tensor, bias: Tensor, part: float) -> Tensor:
    """
    The threshold of each latent that a part of the tokens comes above.

    Args:
        tokens (`torch.Tensor` of shape `(num_tokens, d_in)`): What the encoder reads.
        weight (`torch.Tensor` of shape `(num_latents, d_in)`): The encoder's.
        bias (`torch.Tensor` of shape `(num_latents,)`): The encoder's.
        part (`float`): Of the tokens, `k / num_latents` for k latents a token.

    Returns:
        `torch.Tensor` of shape `(num_latents,)`: above zero.
    """
    # By tokens of huge norm, such as an LM's first, half of the latents would begin where no other token comes.
    norms = tokens.norm(dim=-1)
    tokens = tokens[norms <= OUTLIER_NORM * norms.median()]
    uses = max(1, round(len(tokens) * part))
    parts = zip(weight.split(1024), bias.split(1024), strict=True)
    largest = [torch.addmm(b[:, None], w, tokens.t()).topk(uses, dim=1).values[:, -1] for w, b in parts]
    # Thresholds move by a part of themselves, and so must not begin at zero: a tenth of what is usual is the least.
    usual = weight.norm(dim=-1) * norms.median() / tokens.shape[1] ** 0.5
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
        # The paper's theta / epsilon, with an epsilon that is a part of theta.
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
    # ReLU comes after the selection: it is exact, and touches k values for each token instead of num_latents.
    return F.relu(values)


def _above_threshold(head: "PreTrainedHead", pre_activations: Tensor, k: int) -> tuple[Tensor, Tensor]:
    threshold = head.threshold.clamp_min(0).to(pre_activations.dtype)
    if head.training:
        # What lies within the kernel moves the threshold, though it is not active.
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
    Where the gate is open, a magnitude whose weights are the gate's times `exp(r_mag)`. See arXiv:2404.16014, section
    3.
    """
    is_open = values > 0
    # What fills up a token's columns is -inf: its product with a gradient of 0 would be no number.
    gates = values.masked_fill(~is_open, 0)
    magnitudes = head.r_mag.exp()[indices] * (gates - head.encoder.bias[indices]) + head.b_mag[indices]
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
