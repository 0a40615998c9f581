from collections.abc import Callable
from typing import Any

import torch


class MuonWithAdam(torch.optim.Optimizer):
    """
    `torch.optim.Muon` for matrices, with the update scaled to Adam's size (arXiv:2502.16982), and Adam for vectors.

    Args:
        groups (`list[dict]`): Parameter groups, each with only matrices or only vectors.
    """

    def __init__(self, groups: list[dict]):
        super().__init__(groups, {})
        matrices, vectors = self._split()
        self._parts: list[torch.optim.Optimizer] = [torch.optim.Muon(matrices, adjust_lr_fn="match_rms_adamw")]
        # A LoRA around frozen heads has no vectors.
        self._parts += [torch.optim.Adam(vectors)] if vectors else []
        self._share()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Updates the parameters from their gradients."""
        loss = None if closure is None else closure()
        for part in self._parts:
            part.step()
        return loss

    def load_state_dict(self, state_dict: dict) -> None:
        """Loads a state as in torch, and gives the two inner optimizers the new groups and state."""
        super().load_state_dict(state_dict)
        self._share()

    def _split(self) -> tuple[list[dict], list[dict]]:
        matrices = [group for group in self.param_groups if group["params"][0].ndim == 2]
        return matrices, [group for group in self.param_groups if group["params"][0].ndim != 2]

    def _share(self) -> None:
        for part, groups in zip(self._parts, self._split(), strict=False):
            part.param_groups, part.state = groups, self.state
