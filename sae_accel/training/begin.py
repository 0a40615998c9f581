"""
The start of a run: new heads or a checkpoint, the output folder, the optimizer and the trackers, in this order.

Everything that can fail without harm comes first: the output folder changes only after heads or checkpoint are loaded.
"""

from pathlib import Path
from typing import Any

from torch.optim import Optimizer

from ..bank.init_from import load_into, match_heads, open_pretrained
from ..data.batches import Batches, Position
from ..processes.agreement import raise_together, say
from ..processes.trackers import start_trackers
from ..recipe.checks import check_steps
from ..runs.checkpoint import damage_told
from ..runs.output_folder import OutputFolder
from ..runs.writing import written_together
from .assembly import Assembly
from .initialization import start_heads
from .optim import build_scheduler
from .run_state import RunState


def begin(
    run: RunState, assembly: Assembly, folder: OutputFolder, batches: Batches, checkpoint: Path | None
) -> tuple[Optimizer, Position]:
    """
    Makes a run ready to take its first step, from the start or from a checkpoint.

    Args:
        run ([`RunState`]): The run.
        assembly ([`Assembly`]): The parts that take its steps.
        folder ([`OutputFolder`]): The output folder. Files that the run must not keep are deleted.
        batches ([`Batches`]): The training data.
        checkpoint (`Path`, *optional*): The checkpoint that the run goes on from.

    Returns:
        `tuple`: the prepared optimizer, and the place in the data where the next step begins.

    Raises:
        `InputError`: if the checkpoint or the heads of `init_from` cannot be used, or no token of the data trains.
        `NotFinite`: if heads cannot be initialised because no activation is finite.
    """
    args, main = run.args, run.accelerator.is_main_process
    run.progress.max_steps = batches.max_steps()
    entries = {f"head {name!r}: heads": plan.arguments for name, plan in run.plans.items()}
    check_steps(args, entries, run.progress.max_steps)
    saved = {} if checkpoint is None else raise_together(lambda: _load_weights(run, checkpoint))
    if checkpoint is None:
        _new_heads(run, assembly, batches)
    with written_together(folder.path) as write:
        if main:
            write(lambda: folder.begin(checkpoint))
    optimizer = assembly.optimizer()
    prepared = run.prepare(optimizer, build_scheduler(optimizer, args, run.progress.max_steps))
    position = Position() if checkpoint is None else _restore(run, checkpoint, saved)
    with written_together(folder.path) as write:
        if main:
            write(lambda: run.begin_history(checkpoint))
    name = args.run_name or folder.path.resolve().name
    raise_together(lambda: start_trackers(run.accelerator, name, args))
    if checkpoint is not None and run.progress.global_step >= run.progress.max_steps:
        say(f"Checkpoint {str(checkpoint)!r} is at step {run.progress.global_step}, so nothing is left to train.")
    return prepared, position


def _load_weights(run: RunState, checkpoint: Path) -> dict[str, Any]:
    with damage_told(checkpoint):
        return run.load_weights(checkpoint)


def _restore(run: RunState, checkpoint: Path, saved: dict[str, Any]) -> Position:
    with damage_told(checkpoint):
        return run.restore(checkpoint, saved)


def _new_heads(run: RunState, assembly: Assembly, batches: Batches) -> None:
    if (source := run.args.init_from) is None:
        start_heads(run.bank, run.spread, assembly.activations, batches)
        return
    heads = open_pretrained(source, None if run.recipe is None else run.recipe.model.token)
    raise_together(lambda: load_into(run.bank, match_heads(run.plans.values(), heads), heads))
