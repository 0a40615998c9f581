from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ..activations.running_lm import ActivationSource, RunningLM
from ..bank.bank import SaeBank, build_head
from ..bank.parameter_role import ParameterRole
from ..bank.plans import HeadPlan
from ..models import HeadModel
from ..ops.rows import own_part


class Spread:
    """
    How the heads of a run are spread over its processes. Each way is a class that overrides what it does otherwise;
    what stands here is right where every process holds every head whole, and trains it on tokens of its own.

    Args:
        accelerator (`Accelerator`): Prepares heads and optimizer, and reduces over processes.
        plans (`list[HeadPlan]`): All heads of the run.

    Attributes:
        plans (`list[HeadPlan]`): The heads of this process.
        gradient_factor (`int`): What a loss that is a sum over the tokens of all processes is multiplied by before its
            gradient is taken, because the mean over processes is taken of that.
    """

    def __init__(self, accelerator: Accelerator, plans: list[HeadPlan]):
        self.accelerator = accelerator
        self.plans = plans
        self.gradient_factor = accelerator.num_processes

    @property
    def description(self) -> str:
        """The plan in words, for the user; empty if there is nothing to say."""
        return ""

    @property
    def starting_device(self) -> torch.device:
        """Where heads lie until they are prepared."""
        return self.accelerator.device

    def settle(self, bank: SaeBank) -> SaeBank:
        """New heads, where they lie until they are prepared."""
        return bank.to(self.starting_device)

    def build(self, plan: HeadPlan) -> HeadModel:
        """A fresh head, or what this process holds of it."""
        return build_head(plan)

    def source(self, lm: RunningLM) -> ActivationSource:
        """Where the heads of this process get their activations from."""
        return lm

    def prepare(self, bank: SaeBank, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, torch.optim.Optimizer]:
        """Heads and optimizer, ready to train."""
        # A LoRA's parameters stay where the LM lies, which may be on several devices.
        return self.accelerator.prepare(bank, optimizer, device_placement=[not len(bank.adapter), True])

    def synchronized(self, bank: nn.Module, last: bool) -> AbstractContextManager[None]:
        """Gradients meet across processes in the last backward pass of a step only."""
        self.accelerator.sync_gradients = last
        return nullcontext() if last else self.accelerator.no_sync(bank)

    def backward(self, loss: Tensor) -> None:
        """Adds the gradient of a loss to those of the heads; in the last pass of a step they meet."""
        self.accelerator.backward(loss)

    def gradients(self, optimizer: torch.optim.Optimizer) -> Iterator[tuple[ParameterRole, Tensor]]:
        """What this process holds of each gradient, after the last backward pass of a step."""
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    yield group["role"], own_part(parameter.grad)

    @torch.no_grad()
    def non_finite_gradients(self, optimizer: torch.optim.Optimizer) -> Tensor:
        """Whether some gradient that this process holds is not finite, `()`."""
        device = self.accelerator.device
        sums = [gradient.sum(dtype=torch.float32).to(device) for _, gradient in self.gradients(optimizer)]
        return ~torch.stack(sums).isfinite().all() if sums else torch.zeros((), dtype=torch.bool, device=device)

    def anywhere(self, flags: Tensor) -> Tensor:
        """Above zero where a process has a flag above zero; here gradients and losses are the same on each."""
        return flags

    def step(self, optimizer: torch.optim.Optimizer, taken: bool, overflows: bool) -> None:
        """
        Takes an optimizer step, or passes it over.

        Args:
            optimizer (`torch.optim.Optimizer`): As it was prepared.
            taken (`bool`): Whether it is taken.
            overflows (`bool`): Whether it is not taken because a gradient is not finite.
        """
        # By a step that it passes over itself, the scaler of float16 learns that it scales too far.
        if taken or (overflows and self.accelerator.scaler is not None):
            optimizer.step()
        optimizer.zero_grad()

    def sum(self, tensors: list[Tensor]) -> list[Tensor]:
        """Sums, of float32, over the processes that train the same heads on other tokens, in one message."""
        if self.accelerator.num_processes == 1 or not tensors:
            return tensors
        flat = self.accelerator.reduce(torch.cat([tensor.float().reshape(-1) for tensor in tensors]), "sum")
        pieces = flat.split([tensor.numel() for tensor in tensors])
        return [piece.view(tensor.shape) for piece, tensor in zip(pieces, tensors, strict=True)]

    def over_latents(self, count: Tensor) -> Tensor:
        """A count of latents of a head, over all processes that hold some of them."""
        return count

    def merged(self, values: dict[str, float]) -> dict[str, float]:
        """What was measured of all heads of the run, on every process."""
        return values

    def writes(self, name: str) -> bool:
        """Whether this process is the one that writes a head's files."""
        return self.accelerator.is_main_process

    def renew(self) -> None:
        """Takes what was changed in what is optimized over into the parameters, where these are not the same."""

    def weights(self, head: HeadModel) -> dict[str, Tensor]:
        """Parameters of a whole head by name, for the process that writes it. Every one that holds some must ask."""
        parts = head.state_dict(keep_vars=True).items()
        return {name: self.whole(head, name, part.detach()) for name, part in parts}

    def whole(self, head: HeadModel, name: str, part: Tensor) -> Tensor:
        """
        A parameter, or a tensor that has an element for each of its own or each of its rows. The process that writes
        the head gets all, on the CPU if it does not hold all of it; what others get is of no use.

        Args:
            head (`HeadModel`): The head, or what this process holds of it.
            name (`str`): The parameter.
            part (`torch.Tensor`): What this process holds of it.
        """
        return part

    def optimized(self, optimizer: torch.optim.Optimizer) -> Iterator[tuple[dict, Tensor]]:
        """Each group of an optimizer, and the parameter in it, or what the optimizer has in its place."""
        for group in optimizer.param_groups:
            yield group, group["params"][0]

    def states(self, name: str, head: HeadModel | None, optimizer: torch.optim.Optimizer) -> dict[str, dict]:
        """
        The optimizer's state for a head, or for a LoRA, by parameter: whole for the process that writes it, as in
        `whole`.
        """
        return {
            group["role"].parameter: {
                key: self.whole_state(head, group, value) if _belongs(value, parameter) else value
                for key, value in optimizer.state[parameter].items()
            }
            for group, parameter in self.optimized(optimizer)
            if group["role"].head == name
        }

    def load_states(
        self, heads: dict[str, HeadModel], optimizer: torch.optim.Optimizer, states: dict[str, dict[str, dict]]
    ) -> None:
        """Puts the state of `states`, by head and parameter, into a prepared optimizer."""
        for group, parameter in self.optimized(optimizer):
            state = states[group["role"].head][group["role"].parameter]
            optimizer.state[parameter] = {
                key: self.own_state(heads.get(group["role"].head), group, value, parameter)
                if isinstance(value, Tensor) and tuple(value.shape) == group["role"].whole_shape
                else value
                for key, value in state.items()
            }

    def whole_state(self, head: HeadModel | None, group: dict, part: Tensor) -> Tensor:
        """Of a tensor of the optimizer's state, all."""
        return part if head is None else self.whole(head, group["role"].parameter, part)

    def own_state(self, head: HeadModel | None, group: dict, whole: Tensor, parameter: Tensor) -> Tensor:
        """Of a tensor of the optimizer's state, what this process holds."""
        return whole.to(parameter.device, copy=True)


def _belongs(value: object, parameter: Tensor) -> bool:
    """Whether an entry of a parameter's state has an element for each of the parameter's."""
    return isinstance(value, Tensor) and value.shape == parameter.shape
