import os

from ..common.errors import InputError
from .agreement import this_process


def check_launched() -> None:
    """
    Checks that all started processes train together, and that `accelerate launch` started as many as the user wants.
    On CPUs it starts only one per machine.

    Raises:
        `InputError`: if there are fewer.
    """
    here, asked = int(os.environ.get("WORLD_SIZE", 1)), _asked_processes()
    if this_process().num_processes < here:
        raise InputError(
            f"{here} processes were started, but there is no device for each, so Accelerate runs each of them alone. "
            "Start one process per device, or set ACCELERATE_USE_CPU=true to train on CPUs."
        )
    if asked is not None and here < asked:
        raise InputError(
            f"accelerate launch should start {asked} processes, but it started {here}: on CPUs it starts one per "
            f"machine. Start them with ACCELERATE_USE_CPU=true torchrun --nproc_per_node {asked} -m sae_accel.train "
            "..., or set --num_processes 1."
        )


def _asked_processes() -> int | None:
    """The number of processes that `accelerate launch` should start, if it started this process; otherwise None."""
    import psutil
    from accelerate.commands.config.config_args import default_config_file, load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    try:
        parent = psutil.Process().parent()
        words = [] if parent is None else parent.cmdline()
    except psutil.Error:
        return None
    if "launch" not in words[:4] or not any("accelerate" in word for word in words[:3]):
        return None
    options, _ = launch_command_parser().parse_known_args(words[words.index("launch") + 1 :])
    if options.num_processes is None and (options.config_file or os.path.isfile(default_config_file)):
        return load_config_from_file(options.config_file).num_processes
    return options.num_processes
