import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from ..bank import SaeBank
from ..models import HeadModel
from .replicated import Replicated


class FullyShardedHeads(Replicated):
    """FSDP, version 2: every process holds some rows of each parameter, which meet while a head is at work."""

    def prepare(self, bank: SaeBank, optimizer: torch.optim.Optimizer) -> tuple[SaeBank, torch.optim.Optimizer]:
        """Heads and optimizer, ready to train."""
        bank, prepared = self.accelerator.prepare(bank, optimizer)
        for group in optimizer.param_groups:
            group["is_part"] = True
        return bank, prepared

    def whole(self, head: HeadModel, name: str, part: Tensor) -> Tensor:
        """All rows of it."""
        return part.full_tensor() if isinstance(part, DTensor) else part

    def own_state(self, head: HeadModel | None, group: dict, whole: Tensor, parameter: Tensor) -> Tensor:
        """The rows of this process."""
        return distribute_tensor(whole.to(parameter.device), parameter.device_mesh, parameter.placements)
