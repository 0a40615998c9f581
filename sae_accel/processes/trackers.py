import threading
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import GeneralTracker, get_available_trackers

from ..common.errors import InputError, one_line
from ..common.extras import require_extra
from ..recipe.arguments import SaeTrainingArguments, secret_fields
from .agreement import say


def wanted_trackers(report_to: list[str]) -> list[str] | None:
    """
    Returns the trackers that Accelerate should use, or None.

    Accelerate by itself ignores a tracker that is not installed; here it is an error, because the user wants its logs.

    Raises:
        `InputError`: if a tracker is not installed.
    """
    wanted = [tracker for tracker in report_to if tracker != "none"]
    if "tensorboard" in wanted:
        require_extra("training.report_to tensorboard", "tensorboard")
    available = [tracker.value for tracker in get_available_trackers()]
    if missing := [tracker for tracker in wanted if tracker not in [*available, "all"]]:
        raise InputError(
            f"training.report_to: {missing[0]} is not installed. Install it, or choose from "
            f"{', '.join([*available, 'none'])}."
        )
    return wanted or None


def shown_settings(args: SaeTrainingArguments) -> dict[str, Any]:
    """Returns the settings that a tracker can show: no lists, no secrets."""
    hidden = secret_fields(args)
    return {
        key: value
        for key, value in asdict(args).items()
        if key not in hidden and isinstance(value, (int, float, str, bool))
    }


def start_trackers(accelerator: Accelerator, name: str, args: SaeTrainingArguments) -> None:
    """
    Starts the trackers of a run.

    Args:
        accelerator (`Accelerator`): Holds the trackers.
        name (`str`): The name of the run in the trackers.
        args (`SaeTrainingArguments`): The settings, which the trackers show.

    Raises:
        `InputError`: if a tracker cannot write.
    """
    threading.excepthook = _quiet_for_writers
    try:
        accelerator.init_trackers(name, config=shown_settings(args))
    except OSError as error:
        raise InputError(
            f"training.report_to: {', '.join(args.report_to)} cannot write its logs: {one_line(error)}. Set another "
            "training.output_dir, or --training.report_to none."
        ) from error


def with_trackers(accelerator: Accelerator, work: Callable[[GeneralTracker], object]) -> None:
    """Calls `work` with each tracker. If a tracker cannot write, the run prints a line and goes on without it."""
    for tracker in list(accelerator.trackers):
        try:
            work(tracker)
        except OSError as error:
            accelerator.trackers.remove(tracker)
            say(f"{tracker.name} can no longer log: {one_line(error)}. Training goes on without it.")


def _quiet_for_writers(args: threading.ExceptHookArgs) -> None:
    """Hides the traceback of TensorBoard's writer thread; the run prints one line when it next uses the tracker."""
    if not (isinstance(args.exc_value, OSError) and type(args.thread).__module__.startswith("tensorboard")):
        threading.__excepthook__(args)
