"""
Heads under FSDP, version 2. Each process holds some rows of each parameter, and the rows of a head are gathered while
the head computes.
"""

import torch
from torch import Tensor, nn
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from torch.distributed.tensor import DTensor, distribute_tensor

from ..bank.bank import SaeBank
from ..models import HeadModel
from ..processes.agreement import gather_to_main
from .base import Spread


class FullyShardedHeads(Spread):
    """FSDP, version 2: every process holds some rows of each parameter, gathered while a head computes."""

    @property
    def starting_device(self) -> torch.device:
        """The CPU, so that no device holds all heads whole; they move to it head by head, in parts."""
        return torch.device("cpu")

    def prepare(self, bank: SaeBank, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, torch.optim.Optimizer]:
        """Heads and optimizer, ready to train."""
        plugin = self.accelerator.state.fsdp_plugin
        plugin.auto_wrap_policy = transformer_auto_wrap_policy
        plugin.transformer_cls_names_to_wrap = sorted({type(head).__name__ for _, head in bank.named_heads()})
        bank, prepared = self.accelerator.prepare(bank, optimizer)
        for group in optimizer.param_groups:
            group["role"].is_part = True
        return bank, prepared

    def anywhere(self, flags: Tensor) -> Tensor:
        """Flags summed over all processes, since each process holds its own part of the gradients."""
        return self.accelerator.reduce(flags, "sum")

    def whole(self, head: HeadModel, name: str, part: Tensor) -> Tensor:
        """The whole tensor, with the rows that other processes hold. See [`Spread.whole`]."""
        pieces = gather_to_main(part.to_local()) if isinstance(part, DTensor) else None
        return part if pieces is None else torch.cat(pieces)

    def own_state(self, head: HeadModel | None, group: dict, whole: Tensor, parameter: Tensor) -> Tensor:
        """This process's rows of a tensor of the optimizer's state."""
        assert isinstance(parameter, DTensor), "FSDP shards every parameter"
        return distribute_tensor(whole.to(parameter.device), parameter.device_mesh, parameter.placements)
