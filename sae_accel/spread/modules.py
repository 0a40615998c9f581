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
    Activations go to the process that holds the head; gradients go nowhere.

    Args:
        accelerator (`Accelerator`): Which process this is.
        plans (`list[HeadPlan]`): All heads of the run.
        tokens (`int`): Tokens of a batch, over all processes.

    Raises:
        `InputError`: if there are fewer heads than processes.
    """

    def __init__(self, accelerator: Accelerator, plans: list[HeadPlan], tokens: int):
        self.placed = place_heads(plans, accelerator.num_processes, tokens)
        super().__init__(accelerator, self.placed[accelerator.process_index])
        self.gradient_factor = 1

    @property
    def description(self) -> str:
        """Which process holds which heads."""
        return placement_table(self.placed)

    def source(self, lm: RunningLM) -> ActivationSource:
        """Activations of all processes' tokens, at this process's hookpoints."""
        needs = [list(site_widths(plans)) for plans in self.placed]
        return ExchangedActivations(lm, needs, self.accelerator, at_once=True)

    def prepare(self, bank: SaeBank, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, torch.optim.Optimizer]:
        """Heads that are this process's own need mixed precision, and nothing that meets."""
        bank = self.accelerator.prepare_model(bank, evaluation_mode=True)
        return bank, self.accelerator.prepare_optimizer(optimizer)

    def anywhere(self, flags: Tensor) -> Tensor:
        """Summed over all processes, each of which holds what is its own."""
        return self.accelerator.reduce(flags, "sum")

    def sum(self, tensors: list[Tensor]) -> list[Tensor]:
        """As they are: this process has seen all tokens."""
        return tensors

    def merged(self, values: dict[str, float]) -> dict[str, float]:
        """Of the heads of every process."""
        return {key: value for one in gather_objects(values) for key, value in one.items()}

    def writes(self, name: str) -> bool:
        """Each its own."""
        return True
