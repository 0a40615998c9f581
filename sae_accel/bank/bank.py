"""
The bank: all heads of a process in one module.

DeepSpeed prepares one module per Accelerator, so all heads lie in one. They share nothing else: each head has its own
loss on the same tokens, and the gradient of one head never depends on another.
"""

import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TypeVar, cast

import torch
from torch import Tensor, nn

from ..lm.hooks import Site
from ..models import HeadModel, HeadOutput
from ..models.registry import model_of
from ..ops import Selection
from .plans import HeadPlan


T = TypeVar("T")
# The terms of a head's loss.
LOSSES = ("fvu", "auxk_loss", "multi_topk_fvu", "sparsity_loss")


class SaeBank(nn.Module):
    """
    All heads that a process trains, as one module, because DeepSpeed prepares only one module per Accelerator.

    Args:
        plans (`list[HeadPlan]`): The heads. They start from the seeds of their entries.
        adapter (`Iterable[nn.Parameter]`): Parameters of a LoRA in the LM that train together with the heads.
        build (`Callable[[HeadPlan], HeadModel]`, *optional*): Makes a head; `build_head` if not given.
    """

    def __init__(
        self,
        plans: list[HeadPlan],
        adapter: Iterable[nn.Parameter] = (),
        build: Callable[[HeadPlan], HeadModel] | None = None,
    ):
        super().__init__()
        self.adapter = nn.ParameterList(adapter)
        self.plans = {plan.name: plan for plan in plans}
        self.heads = nn.ModuleDict({_key(plan.name): (build or build_head)(plan) for plan in plans})

    def named_heads(self) -> Iterator[tuple[str, HeadModel]]:
        """The name and the head of each plan, in the order of the plans."""
        for name in self.plans:
            yield name, cast(HeadModel, self.heads[_key(name)])

    def forward(self, work: Callable[["SaeBank"], T]) -> T:
        """
        Calls `work` with this bank. All training runs inside this call, so that DDP and FSDP see it.

        Args:
            work (`Callable[[SaeBank], T]`): A forward pass, such as `local_losses` of a batch.
        """
        return work(self)

    def local_losses(
        self,
        by_site: dict[Site, Tensor],
        total_variance: dict[str, Tensor],
        k: dict[str, int],
        dead_masks: dict[str, Tensor],
    ) -> dict:
        """
        The loss of every head on the same tokens. No head's loss depends on another's.

        Args:
            by_site (`dict[Site, torch.Tensor]`): Activations `(num_tokens, d)` by site.
            total_variance (`dict[str, torch.Tensor]`): By head, the number `()` that squared errors are divided by.
            k (`dict[str, int]`): By head, active latents per token.
            dead_masks (`dict[str, torch.Tensor]`): By head, dead latents `(num_latents,)`. Heads without AuxK are
                missing.

        Returns:
            `dict`: `loss`, the sum of all losses, `()`; and `heads`, the result of `measured` by head.
        """
        losses, heads = [], {}
        for name, head in self.named_heads():
            plan = self.plans[name]
            device = head.b_dec.device
            output = head(
                joined(by_site, plan.reads).to(device),
                joined(by_site, plan.predicts).to(device),
                k=k[name],
                total_variance=total_variance[name],
                dead_mask=dead_masks.get(name),
                **plan.arguments.loss_terms,
            )
            losses.append(output.loss)
            heads[name] = measured(output, head)
        return {"loss": torch.stack(losses).sum(), "heads": heads}


def joined(by_site: Mapping[Site, Tensor], sites: Sequence[Site]) -> Tensor:
    """
    The activations at some sites, joined along the last dimension: `(num_tokens, d)`.

    Args:
        by_site (`Mapping[Site, torch.Tensor]`): Activations `(num_tokens, d)` by site.
        sites (`Sequence[Site]`): The sites, in order.
    """
    tensors = [by_site[site] for site in sites]
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, -1)


def measured(output: HeadOutput, head: HeadModel) -> dict[str, Tensor]:
    """
    The measurements of a head's forward pass.

    Args:
        output ([`HeadOutput`]): The result of the forward pass.
        head ([`HeadModel`]): The head.

    Returns:
        `dict[str, torch.Tensor]`: the losses that the head has; `active`, the number of activations above zero;
        `uses`, this number by latent, `(num_latents,)`; and with `batchtopk` `smallest_act`, the smallest activation
        times the number of tokens.
    """
    assert output.top_acts is not None and output.top_indices is not None, "a forward pass sets both"
    indices = output.top_indices.reshape(-1, output.top_indices.shape[-1])
    uses = Selection(indices, head.num_latents).scatter(output.top_acts.gt(0).float())
    values = {part: output[part].detach() for part in LOSSES if output.get(part) is not None}
    if output.smallest_act is not None:
        values["smallest_act"] = output.smallest_act * len(indices)
    active = uses.sum() if head.latent_slice is None else head.latent_slice.sum(uses.sum())
    return values | {"active": active, "uses": uses}


def build_head(plan: HeadPlan) -> HeadModel:
    """
    A new head. Its entry's seed and its hookpoint determine its weights: heads at different hookpoints start from
    different weights, and heads of a sweep at one hookpoint start from the same.

    Args:
        plan ([`HeadPlan`]): The head.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(zlib.crc32(f"{plan.arguments.seed}:{plan.hookpoint}".encode()))
        return model_of(plan.config)(plan.config)


def _key(name: str) -> str:
    """A head's name with colons for dots, which `nn.ModuleDict` refuses. No module name contains a colon."""
    return name.replace(".", ":")
