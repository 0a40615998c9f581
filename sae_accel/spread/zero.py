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


# Elements that DeepSpeed may hold beside its parts, where the configuration does not say. Its own choices, made for
# models of many small layers, are a bucket of 2 GB, and 4 GB of parameters that stay whole after use.
LEAN = {"reduce_bucket_size": 2**26, "stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0}


class ZeroHeads(Spread):
    """
    DeepSpeed's ZeRO, stages 1 to 3: every process holds an equal piece of the optimizer's state, and in stage 3 of the
    parameters. The pieces are flat, with no regard to rows.

    Args:
        accelerator (`Accelerator`): With a DeepSpeed configuration, whose batch sizes are set here.
        plans (`list[HeadPlan]`): All heads of the run.
        batch_size (`int`): Sequences in a batch.

    Raises:
        `InputError`: if something in the configuration cannot be had.
    """

    def __init__(self, accelerator: Accelerator, plans: list[HeadPlan], batch_size: int):
        super().__init__(accelerator, plans)
        # For stage 3 Accelerate has transformers cut up whatever it loads; here DeepSpeed is for the heads that train.
        unset_hf_deepspeed_config()
        config = accelerator.state.deepspeed_plugin.deepspeed_config
        zero = config.get("zero_optimization", {})
        self.stage = zero.get("stage", 0)
        if self.stage == 0:
            raise InputError(
                "The DeepSpeed configuration has ZeRO stage 0, which is plain DDP. Use stage 1, 2 or 3, or DDP."
            )
        if zero.get("offload_optimizer", {}).get("device", "none") != "none":
            raise InputError(
                "The DeepSpeed configuration has offload_optimizer, which puts DeepSpeed's own Adam in the place of "
                "the optimizers here. Remove it, or use distribute_modules or distribute_latents to spend less memory."
            )
        if config.get("gradient_clipping", 0) not in (0, "auto"):
            raise InputError(
                "The DeepSpeed configuration has gradient_clipping, which would clip all heads as one. Remove it."
            )
        if config.get("gradient_accumulation_steps", 1) not in (1, "auto"):
            raise InputError(
                "The DeepSpeed configuration has gradient_accumulation_steps. Set them in the recipe; here, 1 or auto"
            )
        zero |= LEAN | zero
        # Accumulation and clipping are the run's own; DeepSpeed is told of single batches.
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
        """Without the step, which Accelerate would have DeepSpeed take at once."""
        self.engine.set_gradient_accumulation_boundary(is_boundary=self.accelerator.sync_gradients)
        self.engine.backward(loss)

    def gradients(self, optimizer: torch.optim.Optimizer) -> Iterator[tuple[ParameterRole, Tensor]]:
        """What this process holds of each gradient."""
        for index, pieces in self.zero.averaged_gradients.items():
            group = optimizer.param_groups[index if self.stage < 3 else self.zero.sub_group_to_group_id[index]]
            for piece in pieces or []:
                if piece is not None:
                    yield group["role"], piece

    def anywhere(self, flags: Tensor) -> Tensor:
        """Summed over all processes, each of which holds pieces of the gradients."""
        return self.accelerator.reduce(flags, "sum")

    def step(self, optimizer: torch.optim.Optimizer, taken: bool, overflows: bool) -> None:
        """Takes an optimizer step, or has DeepSpeed let go of its gradients alone."""
        with nullcontext() if taken else _unmoved(self.zero.optimizer):
            self.engine.step()

    def optimized(self, optimizer: torch.optim.Optimizer) -> Iterator[tuple[dict, Tensor]]:
        """Each group, and the flat piece that is optimized here. Stage 3 puts it there for the time of a step only."""
        if self.stage < 3:
            yield from super().optimized(optimizer)
            return
        # Private to DeepSpeed, here and in `renew`; tests/spread/test_spread.py compares stage 3 with one process.
        for index, flat in enumerate(self.zero.fp32_partitioned_groups_flat):
            yield optimizer.param_groups[self.zero.sub_group_to_group_id[index]], flat

    def weights(self, head: HeadModel) -> dict[str, Tensor]:
        """The parameters of a whole head by name, for the main process; of one at a time a device holds all."""
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
        """Takes what was changed in the optimizer's pieces over into the parameters."""
        if self.stage < 3:
            self.zero.update_lp_params()
            return
        for index, flat in enumerate(self.zero.fp32_partitioned_groups_flat):
            self.zero.fp16_partitioned_groups_flat[index].data.copy_(flat.data)
            self.zero._unflatten_partitioned_parameters(index)

    def whole_state(self, head: HeadModel | None, group: dict, part: Tensor) -> Tensor:
        """All pieces, in the parameter's shape."""
        pieces = gather_to_main(part)
        shape = torch.Size(group["role"].whole_shape)
        return part if pieces is None else torch.cat(pieces)[: shape.numel()].view(shape)

    def own_state(self, head: HeadModel | None, group: dict, whole: Tensor, parameter: Tensor) -> Tensor:
        """The piece of this process, filled up with zeros."""
        start = self.accelerator.process_index * parameter.numel()
        own = torch.zeros_like(parameter)
        piece = whole.flatten()[start : start + parameter.numel()]
        own[: piece.numel()] = piece
        return own


@contextmanager
def _unmoved(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """While open, the optimizer's steps do nothing."""
    step = optimizer.step
    optimizer.step = lambda *args, **kwargs: None  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        optimizer.step = step  # type: ignore[method-assign]


def _gather_encoders_with_heads(bank: SaeBank) -> None:
    """A head uses its encoder's parameters without running that module, and stage 3 gathers what a module runs on."""
    import deepspeed

    for _, head in bank.named_heads():
        for parameter in head.encoder.parameters():
            deepspeed.zero.register_external_parameter(head, parameter)
