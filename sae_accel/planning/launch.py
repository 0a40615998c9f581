import json
import os
from pathlib import Path
from typing import NamedTuple

from ..processes.accelerator import is_set
from ..recipe.arguments import SaeTrainingArguments


class Launch(NamedTuple):
    """
    How a run will be started.

    Args:
        processes (`int`): The number of processes.
        way (`str`): How heads are spread over the processes: `""` for one process, `"DDP"`, `"FSDP"`, `"ZeRO-1"` to
            `"ZeRO-3"`, `"distribute_modules"` or `"distribute_latents"`.
        bf16 (`bool`, defaults to `False`): Whether heads compute in bfloat16.
    """

    processes: int
    way: str
    bf16: bool = False

    @classmethod
    def of(cls, training: SaeTrainingArguments, processes: int | None = None) -> "Launch":
        """
        Reads the launch from the recipe and the Accelerate config, which `accelerate launch` puts into environment
        variables.

        Args:
            training (`SaeTrainingArguments`): Whether to distribute modules or latents.
            processes (`int`, *optional*): The number of processes; if not given, the number that was started.
        """
        processes = processes or int(os.environ.get("WORLD_SIZE", 1))
        bf16 = os.environ.get("ACCELERATE_MIXED_PRECISION") == "bf16"
        if is_set("ACCELERATE_USE_DEEPSPEED"):
            return cls(processes, f"ZeRO-{_zero_stage()}", bf16)
        if processes == 1:
            return cls(1, "", bf16)
        if is_set("ACCELERATE_USE_FSDP"):
            return cls(processes, "FSDP", bf16)
        own_ways = [name for name in ("distribute_modules", "distribute_latents") if getattr(training, name)]
        return cls(processes, own_ways[0] if own_ways else "DDP", bf16)


def _zero_stage() -> int:
    if file := os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE"):
        return json.loads(Path(file).read_text())["zero_optimization"]["stage"]
    return int(os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", 2))
