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
    Every process holds some latents of each head, and all work on the tokens of all processes (`distribute_latents`),
    for heads that are larger than a device. Each token's latents are chosen among those of all processes, exactly,
    and the parts of its reconstruction are added up.

    Args:
        accelerator (`Accelerator`): Which process this is.
        plans (`list[HeadPlan]`): All heads of the run.

    Raises:
        `InputError`: if a head cannot be cut so.
    """

    def __init__(self, accelerator: Accelerator, plans: list[HeadPlan]):
        super().__init__(accelerator, plans)
        self.gradient_factor = 1
        self.bounds = {plan.name: latent_bounds(plan, accelerator.num_processes) for plan in plans}

    @property
    def description(self) -> str:
        """That every head is cut."""
        return f"Each of {self.accelerator.num_processes} processes holds its part of the latents of every head."

    def build(self, plan: HeadPlan) -> HeadModel:
        """This process's latents of a fresh head, which is the same whatever the number of processes."""
        head = build_head(plan)
        head.keep_latents(LatentSlice(self.bounds[plan.name], self.accelerator.process_index))
        return head

    def source(self, lm: RunningLM) -> ActivationSource:
        """Activations of all processes' tokens, at every hookpoint."""
        return ExchangedActivations(lm, [lm.sites] * self.accelerator.num_processes, self.accelerator, at_once=False)

    def prepare(self, bank: SaeBank, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, torch.optim.Optimizer]:
        """Latents that are this process's own need mixed precision, and nothing that meets."""
        for group in optimizer.param_groups:
            group["role"].is_part = group["role"].whole_shape != group["params"][0].shape
        bank = self.accelerator.prepare_model(bank, evaluation_mode=True)
        return bank, self.accelerator.prepare_optimizer(optimizer)

    def anywhere(self, flags: Tensor) -> Tensor:
        """Summed over all processes, each of which holds what is its own."""
        return self.accelerator.reduce(flags, "sum")

    def sum(self, tensors: list[Tensor]) -> list[Tensor]:
        """As they are: this process has seen all tokens."""
        return tensors

    def over_latents(self, count: Tensor) -> Tensor:
        """Over the latents of all processes."""
        return self.accelerator.reduce(count, "sum")

    def whole(self, head: HeadModel, name: str, part: Tensor) -> Tensor:
        """With the rows of the latents that other processes hold."""
        pieces = gather_to_main(part) if name in BY_LATENT else None
        return part if pieces is None else torch.cat(pieces)

    def own_state(self, head: HeadModel | None, group: dict, whole: Tensor, parameter: Tensor) -> Tensor:
        """The rows of this process's latents."""
        own = head.own_rows(whole) if head is not None and group["role"].parameter in BY_LATENT else whole
        return own.to(parameter.device, copy=True)


def latent_bounds(plan: HeadPlan, processes: int) -> list[int]:
    """
    Where the latents of each process begin in a head, and the end of the last.

    Raises:
        `InputError`: if the head cannot be cut so.
    """
    config, entry = plan.config, plan.arguments
    if config.activation == "batchtopk":
        raise InputError(
            f"training.distribute_latents: head {plan.name!r} has batchtopk, whose latents compete over a whole "
            "batch. Use topk or jumprelu, or distribute_modules."
        )
    groups = config.trained_k if config.activation == "groupmax" else config.num_latents
    if config.activation == "groupmax" and entry.k_decay_steps:
        raise InputError(
            f"training.distribute_latents: head {plan.name!r} has groupmax with k_decay_steps, whose groups change "
            "and would not stay on one process. Remove one of the three."
        )
    if groups < processes:
        what = "groups" if config.activation == "groupmax" else "latents"
        raise InputError(
            f"training.distribute_latents: head {plan.name!r} has {groups} {what}, fewer than the {processes} "
            "processes. Start fewer, or use a wider head."
        )
    size = config.num_latents // groups
    return [index * groups // processes * size for index in range(processes + 1)]
