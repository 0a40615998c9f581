"""
Heads under DeepSpeed's ZeRO, stages 1 to 3.

DeepSpeed flattens the parameters and gives each process an equal piece, which may begin in the middle of a row. The
piece's position ([`Cut`]) lets the optimizer keep rows at norm 1 all the same. DeepSpeed has no public access to its
pieces, so this file reads some of its private attributes; tests compare each stage with one process.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from ..bank.bank import SaeBank
from ..bank.parameter_role import ParameterRole
from ..bank.plans import HeadPlan
from ..common.errors import InputError
from ..models import HeadModel
from ..ops.rows import Cut
from ..processes.agreement import gather_to_main
from .base import Spread


# Elements that DeepSpeed may hold besides its pieces, if the config does not say. DeepSpeed's own defaults suit models
# of many small layers: a bucket of 2 GB, and 4 GB of parameters that stay whole after use.
LEAN = {"reduce_bucket_size": 2**26, "stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0}


class ZeroHeads(Spread):
    """
    DeepSpeed's ZeRO, stages 1 to 3: every process holds an equal piece of the optimizer's state, and in stage 3 also
    of the parameters. Pieces are flat and may cut rows.

    Args:
        accelerator (`Accelerator`): Has a DeepSpeed config, in which this class sets the batch sizes.
        plans (`list[HeadPlan]`): All heads of the run.
        batch_size (`int`): Sequences per batch.

    Raises:
        `InputError`: if the DeepSpeed config has a setting that is not supported.
    """

    def __init__(self, accelerator: Accelerator, plans: list[HeadPlan], batch_size: int):
        super().__init__(accelerator, plans)
        # With stage 3, transformers would shard the LM when it loads it; here DeepSpeed serves only the heads.
        unset_hf_deepspeed_config()
        config = accelerator.state.deepspeed_plugin.deepspeed_config
        zero = config.get("zero_optimization", {})
        self.stage = zero.get("stage", 0)
        if self.stage == 0:
            raise InputError("The DeepSpeed config has ZeRO stage 0, which equals DDP. Use stage 1, 2 or 3, or DDP.")
        if zero.get("offload_optimizer", {}).get("device", "none") != "none":
            raise InputError(
                "The DeepSpeed config has offload_optimizer, which replaces the optimizer of the run by DeepSpeed's "
                "own Adam. Remove it, or use --training.distribute_modules or --training.distribute_latents to save "
                "memory."
            )
        if config.get("gradient_clipping", 0) not in (0, "auto"):
            raise InputError(
                "The DeepSpeed config has gradient_clipping, which would clip all heads as one. Remove it, or set it "
                "to auto."
            )
        if config.get("gradient_accumulation_steps", 1) not in (1, "auto"):
            raise InputError(
                "The DeepSpeed config has gradient_accumulation_steps, but only 1 and auto are allowed there. Set "
                "--training.gradient_accumulation_steps instead."
            )
        zero |= LEAN | zero
        # The run itself accumulates and clips gradients; DeepSpeed sees single batches.
        config |= {
            "train_micro_batch_size_per_gpu": batch_size,
            "train_batch_size": batch_size * accelerator.num_processes,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": 0.0,
        }

    def prepare(self, bank: SaeBank, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, torch.optim.Optimizer]:
        """Heads and optimizer, ready to train."""
        engine, prepared = self.accelerator.prepare(bank, optimizer)
        self.engine, self.zero = engine, engine.optimizer
        if self.stage == 3:
            _gather_encoders_with_heads(bank)
        for group, flat in self.optimized(optimizer):
            group["role"].is_part = True
            if group["role"].unit_norm:
                group["role"].cut = Cut(self.accelerator.process_index * flat.numel(), *group["role"].whole_shape)
        return engine, prepared

    def backward(self, loss: Tensor) -> None:
        """Adds the gradient of a loss, without the optimizer step that Accelerate would have DeepSpeed take."""
        self.engine.set_gradient_accumulation_boundary(is_boundary=self.accelerator.sync_gradients)
        self.engine.backward(loss)

    def gradients(self, optimizer: torch.optim.Optimizer) -> Iterator[tuple[ParameterRole, Tensor]]:
        """This process's piece of each gradient."""
        for index, pieces in self.zero.averaged_gradients.items():
            group = optimizer.param_groups[index if self.stage < 3 else self.zero.sub_group_to_group_id[index]]
            for piece in pieces or []:
                if piece is not None:
                    yield group["role"], piece

    def anywhere(self, flags: Tensor) -> Tensor:
        """Flags summed over all processes, since each process holds its own pieces of the gradients."""
        return self.accelerator.reduce(flags, "sum")

    def step(self, optimizer: torch.optim.Optimizer, taken: bool, overflows: bool) -> None:
        """Takes an optimizer step; or only lets DeepSpeed clear its gradients."""
        with nullcontext() if taken else _unmoved(self.zero.optimizer):
            self.engine.step()

    def optimized(self, optimizer: torch.optim.Optimizer) -> Iterator[tuple[dict, Tensor]]:
        """Each group with the flat piece that is optimized here. Stage 3 sets it only during a step."""
        if self.stage < 3:
            yield from super().optimized(optimizer)
            return
        # These attributes are private to DeepSpeed; tests/spread/test_spread.py compares stage 3 with one process.
        for index, flat in enumerate(self.zero.fp32_partitioned_groups_flat):
            yield optimizer.param_groups[self.zero.sub_group_to_group_id[index]], flat

    def weights(self, head: HeadModel) -> dict[str, Tensor]:
        """
        The parameters of a whole head by name, for the main process. A device holds only one of them whole at a time.
        """
        if self.stage < 3:
            return super().weights(head)
        import deepspeed

        weights = dict(head.named_buffers())
        for name, parameter in head.named_parameters():
            with deepspeed.zero.GatheredParameters([parameter]):
                if self.accelerator.is_main_process:
                    weights[name] = parameter.detach().to("cpu", copy=True)
        return weights

    def renew(self) -> None:
        """Copies changes of the optimizer's pieces into the parameters."""
        if self.stage < 3:
            self.zero.update_lp_params()
            return
        for index, flat in enumerate(self.zero.fp32_partitioned_groups_flat):
            self.zero.fp16_partitioned_groups_flat[index].data.copy_(flat.data)
            self.zero._unflatten_partitioned_parameters(index)

    def whole_state(self, head: HeadModel | None, group: dict, part: Tensor) -> Tensor:
        """The pieces of all processes, in the parameter's shape."""
        pieces = gather_to_main(part)
        shape = torch.Size(group["role"].whole_shape)
        return part if pieces is None else torch.cat(pieces)[: shape.numel()].view(shape)

    def own_state(self, head: HeadModel | None, group: dict, whole: Tensor, parameter: Tensor) -> Tensor:
        """This process's piece, padded with zeros."""
        start = self.accelerator.process_index * parameter.numel()
        own = torch.zeros_like(parameter)
        piece = whole.flatten()[start : start + parameter.numel()]
        own[: piece.numel()] = piece
        return own


@contextmanager
def _unmoved(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Makes the optimizer's steps do nothing while the context is open."""
    step = optimizer.step
    optimizer.step = lambda *args, **kwargs: None  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        optimizer.step = step  # type: ignore[method-assign]


def _gather_encoders_with_heads(bank: SaeBank) -> None:
    """
    Tells DeepSpeed that a head uses its encoder's parameters without calling the encoder. Stage 3 gathers parameters
    only for the module that is called.
    """
    import deepspeed

    for _, head in bank.named_heads():
        for parameter in head.encoder.parameters():
            deepspeed.zero.register_external_parameter(head, parameter)
