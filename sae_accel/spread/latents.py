"""
Heads whose latents are spread over processes (`distribute_latents`), for heads that are larger than one device.

Each process holds a slice of the latents of every head, and sees the tokens of all processes. The selection of latents
is exactly that of a whole head, because processes compare their candidates; `models/latent_slice.py` says how. Each
process updates only its own rows, so no gradients of the encoder or decoder are sent.
"""

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ..activations.exchanged import ExchangedActivations
from ..activations.running_lm import ActivationSource, RunningLM
from ..bank.bank import SaeBank, build_head
from ..bank.plans import HeadPlan
from ..common.errors import InputError
from ..models import BY_LATENT, HeadModel, LatentSlice
from ..processes.agreement import gather_to_main
from .base import Spread


class SpreadLatents(Spread):
    """
    Every process holds some latents of each head, and all processes work on the tokens of all (`distribute_latents`).

    This is for heads that are larger than one device. Each token's latents are selected among the latents of all
    processes, exactly as in a whole head, and the parts of the reconstruction are added up.

    Args:
        accelerator (`Accelerator`): Knows this process.
        plans (`list[HeadPlan]`): All heads of the run.

    Raises:
        `InputError`: if the latents of a head cannot be spread.
    """

    def __init__(self, accelerator: Accelerator, plans: list[HeadPlan]):
        super().__init__(accelerator, plans)
        self.gradient_factor = 1
        self.bounds = {plan.name: latent_bounds(plan, accelerator.num_processes) for plan in plans}

    @property
    def description(self) -> str:
        """A sentence that says that every head is spread over the processes."""
        return f"Each of {self.accelerator.num_processes} processes holds its part of the latents of every head."

    def build(self, plan: HeadPlan) -> HeadModel:
        """This process's latents of a new head. The head is the same for any number of processes."""
        head = build_head(plan)  # W_dec: (num_latents, d_out)
        # W_dec: (bounds[i + 1] - bounds[i], d_out), i the process
        head.keep_latents(LatentSlice(self.bounds[plan.name], self.accelerator.process_index))
        return head

    def source(self, lm: RunningLM) -> ActivationSource:
        """The activations of all processes' tokens, at every hookpoint."""
        return ExchangedActivations(lm, [lm.sites] * self.accelerator.num_processes, self.accelerator, at_once=False)

    def prepare(self, bank: SaeBank, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, torch.optim.Optimizer]:
        """Heads and optimizer, ready to train: with mixed precision, without any reduction of gradients."""
        for group in optimizer.param_groups:
            group["role"].is_part = group["role"].whole_shape != group["params"][0].shape
        bank = self.accelerator.prepare_model(bank, evaluation_mode=True)
        return bank, self.accelerator.prepare_optimizer(optimizer)

    def anywhere(self, flags: Tensor) -> Tensor:
        """Flags summed over all processes, since each process holds its own part of the gradients."""
        return self.accelerator.reduce(flags, "sum")

    def sum(self, tensors: list[Tensor]) -> list[Tensor]:
        """The tensors unchanged, because this process has seen the tokens of all processes."""
        return tensors

    def over_latents(self, count: Tensor) -> Tensor:
        """A count of latents, summed over all processes."""
        return self.accelerator.reduce(count, "sum")

    def whole(self, head: HeadModel, name: str, part: Tensor) -> Tensor:
        """The whole tensor, with the rows of latents that other processes hold. See [`Spread.whole`]."""
        pieces = gather_to_main(part) if name in BY_LATENT else None
        return part if pieces is None else torch.cat(pieces)  # (num_latents, ...)

    def own_state(self, head: HeadModel | None, group: dict, whole: Tensor, parameter: Tensor) -> Tensor:
        """The rows of this process's latents in a tensor of the optimizer's state."""
        own = head.own_rows(whole) if head is not None and group["role"].parameter in BY_LATENT else whole
        return own.to(parameter.device, copy=True)


def latent_bounds(plan: HeadPlan, processes: int) -> list[int]:
    """
    The first latent of each process, and the number of latents at the end.

    Args:
        plan ([`HeadPlan`]): The head.
        processes (`int`): Number of processes.

    Raises:
        `InputError`: if the latents of the head cannot be spread.
    """
    config, entry = plan.config, plan.arguments
    if config.activation == "batchtopk":
        raise InputError(
            f"training.distribute_latents: head {plan.name!r} has batchtopk, whose latents compete over a whole "
            "batch. Set --heads.activation topk, or use --training.distribute_modules."
        )
    groups = config.trained_k if config.activation == "groupmax" else config.num_latents
    if config.activation == "groupmax" and entry.k_decay_steps:
        raise InputError(
            f"training.distribute_latents: head {plan.name!r} has groupmax with k_decay_steps, whose groups change "
            "and would not stay on one process. Remove one of the three settings."
        )
    if groups < processes:
        what = "groups" if config.activation == "groupmax" else "latents"
        raise InputError(
            f"training.distribute_latents: head {plan.name!r} has {groups} {what}, fewer than the {processes} "
            "processes. Start fewer, or use a wider head."
        )
    # Latents per group; 1 without groupmax. A group stays on one process.
    size = config.num_latents // groups
    return [index * groups // processes * size for index in range(processes + 1)]
