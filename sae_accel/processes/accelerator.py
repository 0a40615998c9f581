"""
The Accelerator of a run, made from the Accelerate config. On CPUs this file also turns on DeepSpeed or FSDP, which
Accelerate would not use there, so that tests can run each way without a GPU.
"""

import os
from contextlib import nullcontext

from accelerate import Accelerator, DistributedType
from accelerate.utils import (
    DistributedDataParallelKwargs,
    FullyShardedDataParallelPlugin,
    ProjectConfiguration,
    patch_environment,
)

from ..common.errors import InputError
from ..recipe.arguments import SaeTrainingArguments
from .agreement import this_process
from .trackers import wanted_trackers


def make_accelerator(args: SaeTrainingArguments) -> Accelerator:
    """
    Makes the Accelerator of a run, as the user's `accelerate config` or the environment decides.

    Raises:
        `InputError`: if the config asks for version 1 of FSDP, or a tracker is not installed.
    """
    # On CPUs Accelerate by itself uses neither DeepSpeed nor FSDP, though both work there.
    on_cpus = this_process().distributed_type == DistributedType.MULTI_CPU
    with patch_environment(ACCELERATE_USE_CPU=not is_set("ACCELERATE_USE_DEEPSPEED")) if on_cpus else nullcontext():
        accelerator = Accelerator(
            log_with=wanted_trackers(args.report_to),
            project_config=ProjectConfiguration(
                project_dir=args.output_dir, logging_dir=os.path.join(args.output_dir, "logs")
            ),
            step_scheduler_with_optimizer=False,
            # Without the view, DDP holds gradients twice.
            kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
        )
    if is_set("ACCELERATE_USE_FSDP") and accelerator.num_processes > 1:
        plugin = getattr(accelerator.state, "fsdp_plugin", None) or FullyShardedDataParallelPlugin()
        if plugin.fsdp_version != 2:
            raise InputError("The Accelerate config asks for version 1 of FSDP. Set fsdp_version: 2 in it.")
        if on_cpus:
            accelerator.state.fsdp_plugin, accelerator.state.distributed_type = plugin, DistributedType.FSDP
    return accelerator


def is_set(variable: str) -> bool:
    """Whether an environment variable is "true", in any case."""
    return os.environ.get(variable, "false").lower() == "true"
