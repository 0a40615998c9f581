"""
Whole heads that are dealt to processes (`distribute_modules`).

Each process trains its own heads on the tokens of all processes. Activations travel to the process that holds the
head; gradients never travel. Each process needs memory for its own heads only.
"""

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ..activations.exchanged import ExchangedActivations
from ..activations.running_lm import ActivationSource, RunningLM
from ..bank.bank import SaeBank
from ..bank.plans import HeadPlan, site_widths
from ..processes.agreement import gather_objects
from .base import Spread
from .placement import place_heads, placement_table


class SpreadModules(Spread):
    """
    Every process holds some of the heads whole, and trains them on the tokens of all processes (`distribute_modules`).

    Activations are sent to the process that holds the head; gradients are not sent.

    Args:
        accelerator (`Accelerator`): Knows this process.
        plans (`list[HeadPlan]`): All heads of the run.
        tokens (`int`): Tokens per batch, over all processes.

    Raises:
        `InputError`: if there are fewer heads than processes.
    """

    def __init__(self, accelerator: Accelerator, plans: list[HeadPlan], tokens: int):
        self.placed = place_heads(plans, accelerator.num_processes, tokens)
        super().__init__(accelerator, self.placed[accelerator.process_index])
        self.gradient_factor = 1

    @property
    def description(self) -> str:
        """A table of the heads of each process."""
        return placement_table(self.placed)

    def source(self, lm: RunningLM) -> ActivationSource:
        """The activations of all processes' tokens, at this process's hookpoints."""
        needs = [list(site_widths(plans)) for plans in self.placed]
        return ExchangedActivations(lm, needs, self.accelerator, at_once=True)

    def prepare(self, bank: SaeBank, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, torch.optim.Optimizer]:
        """Heads and optimizer, ready to train: with mixed precision, without any reduction of gradients."""
        bank = self.accelerator.prepare_model(bank, evaluation_mode=True)
        return bank, self.accelerator.prepare_optimizer(optimizer)

    def anywhere(self, flags: Tensor) -> Tensor:
        """Flags summed over all processes, since each process holds its own heads."""
        return self.accelerator.reduce(flags, "sum")

    def sum(self, tensors: list[Tensor]) -> list[Tensor]:
        """The tensors unchanged, because this process has seen the tokens of all processes."""
        return tensors

    def merged(self, values: dict[str, float]) -> dict[str, float]:
        """The measurements of the heads of every process."""
        return {key: value for one in gather_objects(values) for key, value in one.items()}

    def writes(self, name: str) -> bool:
        """True: each process writes the files of its own heads."""
        return True
