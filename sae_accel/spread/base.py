"""
The interface between training and the strategies that spread heads over processes.

The training loop calls the methods of a [`Spread`] wherever several processes matter: to prepare heads, to take
gradients and steps, to sum counts, to save and load. It never asks which strategy runs. The base class is correct when
every process holds every head whole and trains it on its own tokens; each strategy overrides the methods in which it
differs.
"""

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
    A strategy that spreads the heads of a run over its processes.

    The base class is correct if every process holds every head whole and trains it on its own tokens. Each strategy is
    a subclass that overrides the methods in which it differs.

    Args:
        accelerator (`Accelerator`): Prepares heads and optimizer, and reduces over processes.
        plans (`list[HeadPlan]`): All heads of the run.

    Attributes:
        plans (`list[HeadPlan]`): The heads of this process.
        gradient_factor (`int`): Factor for a loss that is a sum over the tokens of all processes. It undoes the mean
            that is taken of gradients over processes.
    """

    def __init__(self, accelerator: Accelerator, plans: list[HeadPlan]):
        self.accelerator = accelerator
        self.plans = plans
        self.gradient_factor = accelerator.num_processes

    @property
    def description(self) -> str:
        """The strategy in words for the user; empty if there is nothing to say."""
        return ""

    @property
    def starting_device(self) -> torch.device:
        """The device of heads before they are prepared."""
        return self.accelerator.device

    def settle(self, bank: SaeBank) -> SaeBank:
        """Moves new heads to their device before they are prepared."""
        return bank.to(self.starting_device)

    def build(self, plan: HeadPlan) -> HeadModel:
        """A new head, or this process's part of it."""
        return build_head(plan)

    def source(self, lm: RunningLM) -> ActivationSource:
        """The source of activations for the heads of this process."""
        return lm

    def prepare(self, bank: SaeBank, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, torch.optim.Optimizer]:
        """Heads and optimizer, ready to train."""
        # A LoRA's parameters stay where the LM lies, which may be on several devices.
        return self.accelerator.prepare(bank, optimizer, device_placement=[not len(bank.adapter), True])

    def synchronized(self, bank: nn.Module, last: bool) -> AbstractContextManager[None]:
        """
        A context for a backward pass. Gradients are reduced over processes only in the last pass of a step.

        Args:
            bank (`nn.Module`): The prepared heads.
            last (`bool`): Whether this is the last pass of the step.
        """
        self.accelerator.sync_gradients = last
        return nullcontext() if last else self.accelerator.no_sync(bank)

    def backward(self, loss: Tensor) -> None:
        """Adds the gradient of a loss to the heads' gradients; the last pass of a step reduces them."""
        self.accelerator.backward(loss)

    def gradients(self, optimizer: torch.optim.Optimizer) -> Iterator[tuple[ParameterRole, Tensor]]:
        """This process's part of each gradient, after the last backward pass of a step."""
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    yield group["role"], own_part(parameter.grad)

    @torch.no_grad()
    def non_finite_gradients(self, optimizer: torch.optim.Optimizer) -> Tensor:
        """Whether this process holds a gradient with a NaN or an infinity, `()`."""
        device = self.accelerator.device
        sums = [gradient.sum(dtype=torch.float32).to(device) for _, gradient in self.gradients(optimizer)]
        return ~torch.stack(sums).isfinite().all() if sums else torch.zeros((), dtype=torch.bool, device=device)

    def anywhere(self, flags: Tensor) -> Tensor:
        """
        Flags that are above zero if they are above zero on any process. In the base class gradients and losses are the
        same on every process, so the flags are, too.
        """
        return flags

    def step(self, optimizer: torch.optim.Optimizer, taken: bool, overflows: bool) -> None:
        """
        Takes an optimizer step, or skips it.

        Args:
            optimizer (`torch.optim.Optimizer`): The prepared optimizer.
            taken (`bool`): Whether to take the step.
            overflows (`bool`): Whether the step is skipped because a gradient is not finite.
        """
        # The float16 scaler skips a step that overflows by itself, and only then lowers its scale.
        if taken or (overflows and self.accelerator.scaler is not None):
            optimizer.step()
        optimizer.zero_grad()

    def sum(self, tensors: list[Tensor]) -> list[Tensor]:
        """
        The sums of tensors, in float32, over the processes that train the same heads on other tokens. One message
        carries all.

        Args:
            tensors (`list[torch.Tensor]`): Tensors of any shapes, the same on every process.
        """
        if self.accelerator.num_processes == 1 or not tensors:
            return tensors
        flat = self.accelerator.reduce(torch.cat([tensor.float().reshape(-1) for tensor in tensors]), "sum")
        pieces = flat.split([tensor.numel() for tensor in tensors])
        return [piece.view(tensor.shape) for piece, tensor in zip(pieces, tensors, strict=True)]

    def over_latents(self, count: Tensor) -> Tensor:
        """The sum of a count of latents over all processes that hold latents of the head."""
        return count

    def merged(self, values: dict[str, float]) -> dict[str, float]:
        """The measurements of all heads of the run, on every process."""
        return values

    def writes(self, name: str) -> bool:
        """Whether this process writes a head's files."""
        return self.accelerator.is_main_process

    def renew(self) -> None:
        """Copies changes of the optimizer's own parameters into the heads, if the two are not the same tensors."""

    def weights(self, head: HeadModel) -> dict[str, Tensor]:
        """
        The parameters of a whole head by name, for the process that writes it. Every process that holds a part must
        call this.
        """
        parts = head.state_dict(keep_vars=True).items()
        return {name: self.whole(head, name, part.detach()) for name, part in parts}

    def whole(self, head: HeadModel, name: str, part: Tensor) -> Tensor:
        """
        A whole parameter, or a whole tensor with one element per element or per row of the parameter.

        The process that writes the head gets all of it, on the CPU if this process holds only a part. The result on
        other processes has no meaning.

        Args:
            head (`HeadModel`): The head, or this process's part of it.
            name (`str`): The name of the parameter.
            part (`torch.Tensor`): This process's part of the tensor.
        """
        return part

    def optimized(self, optimizer: torch.optim.Optimizer) -> Iterator[tuple[dict, Tensor]]:
        """Each group of an optimizer, with its parameter or the tensor that the optimizer uses in its place."""
        for group in optimizer.param_groups:
            yield group, group["params"][0]

    def states(self, name: str, head: HeadModel | None, optimizer: torch.optim.Optimizer) -> dict[str, dict]:
        """
        The optimizer's state for a head or for a LoRA, by parameter, whole for the process that writes it, as in
        `whole`.

        Args:
            name (`str`): The name of the head, or `"lora"`.
            head ([`HeadModel`], *optional*): The head, or this process's part of it. None for a LoRA.
            optimizer (`torch.optim.Optimizer`): The prepared optimizer.
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
        """
        Loads states into a prepared optimizer.

        Args:
            heads (`dict[str, HeadModel]`): The heads of this process by name.
            optimizer (`torch.optim.Optimizer`): The prepared optimizer.
            states (`dict[str, dict[str, dict]]`): Whole states, by head and parameter.
        """
        for group, parameter in self.optimized(optimizer):
            state = states[group["role"].head][group["role"].parameter]
            optimizer.state[parameter] = {
                key: self.own_state(heads.get(group["role"].head), group, value, parameter)
                if isinstance(value, Tensor) and tuple(value.shape) == group["role"].whole_shape
                else value
                for key, value in state.items()
            }

    def whole_state(self, head: HeadModel | None, group: dict, part: Tensor) -> Tensor:
        """The whole tensor of an optimizer's state, from this process's part of it."""
        return part if head is None else self.whole(head, group["role"].parameter, part)

    def own_state(self, head: HeadModel | None, group: dict, whole: Tensor, parameter: Tensor) -> Tensor:
        """This process's part of a tensor of the optimizer's state."""
        return whole.to(parameter.device, copy=True)


def _belongs(value: object, parameter: Tensor) -> bool:
    """Whether an entry of a parameter's state has one element per element of the parameter."""
    return isinstance(value, Tensor) and value.shape == parameter.shape
