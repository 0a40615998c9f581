"""
The choice of a strategy from the recipe (`distribute_modules`, `distribute_latents`) and the Accelerate config (DDP,
FSDP, DeepSpeed).
"""

from accelerate import Accelerator, DistributedType

from ..bank.plans import HeadPlan
from ..common.errors import InputError
from ..recipe.arguments import SaeTrainingArguments
from .base import Spread
from .fsdp import FullyShardedHeads
from .latents import SpreadLatents
from .modules import SpreadModules
from .replicated import Replicated


def spread_heads(
    args: SaeTrainingArguments, accelerator: Accelerator, plans: list[HeadPlan], ctx_len: int, with_lora: bool = False
) -> Spread:
    """
    The strategy that the recipe and the Accelerate config ask for.

    Args:
        args (`SaeTrainingArguments`): Says whether to distribute modules or latents.
        accelerator (`Accelerator`): Says whether FSDP or DeepSpeed is used.
        plans (`list[HeadPlan]`): All heads of the run.
        ctx_len (`int`): Tokens per sequence.
        with_lora (`bool`, defaults to `False`): Whether a LoRA in the LM trains together with the heads.

    Raises:
        `InputError`: if recipe and config cannot be combined.
    """
    kind = accelerator.distributed_type
    own_way = next((name for name in ("distribute_modules", "distribute_latents") if getattr(args, name)), None)
    by_accelerate = {DistributedType.FSDP: "FSDP", DistributedType.DEEPSPEED: "DeepSpeed"}.get(kind)
    if own_way and by_accelerate:
        raise InputError(
            f"training.{own_way}: the Accelerate config asks for {by_accelerate}. Use a config with several processes "
            f"and without {by_accelerate}, or remove {own_way}."
        )
    if with_lora and by_accelerate:
        raise InputError(
            f"lora: the Accelerate config asks for {by_accelerate}, which would cut up a LoRA that every process "
            f"needs whole. Use a config with several processes and without {by_accelerate} (DDP), or remove lora."
        )
    _check_optimizer(args, by_accelerate or own_way)
    if accelerator.num_processes == 1 and not by_accelerate:
        return Replicated(accelerator, plans)
    if args.distribute_modules:
        return SpreadModules(
            accelerator, plans, args.per_device_train_batch_size * ctx_len * accelerator.num_processes
        )
    if args.distribute_latents:
        return SpreadLatents(accelerator, plans)
    if kind == DistributedType.FSDP:
        return FullyShardedHeads(accelerator, plans)
    if kind == DistributedType.DEEPSPEED:
        from .zero import ZeroHeads

        return ZeroHeads(accelerator, plans, args.per_device_train_batch_size)
    return Replicated(accelerator, plans)


def _check_optimizer(args: SaeTrainingArguments, way: str | None) -> None:
    if way in ("FSDP", "DeepSpeed", "distribute_latents") and args.optim in ("muon", "adam8bit"):
        raise InputError(
            f"training.optim: {args.optim} works on whole matrices, and {way} gives each process a part of each. Set "
            "--training.optim adam or signum, or use DDP or --training.distribute_modules."
        )
    if way == "DeepSpeed" and args.max_grad_norm is not None:
        raise InputError(
            "training.max_grad_norm: DeepSpeed updates a head's parameters one by one, so the norm of the head's "
            "gradient is not known. Remove it, or use FSDP, DDP or --training.distribute_modules."
        )
