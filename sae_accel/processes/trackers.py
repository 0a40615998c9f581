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
    What Accelerate is to log with; None is nothing. It leaves out a tracker that is not installed, but a run without
    the logs that were asked for is no use.

    Raises:
        `InputError`: if one is not installed.
    """
    wanted = [tracker for tracker in report_to if tracker != "none"]
    if "tensorboard" in wanted:
        require_extra("training.report_to tensorboard", "tensorboard")
    available = [tracker.value for tracker in get_available_trackers()]
    if missing := [tracker for tracker in wanted if tracker not in [*available, "all"]]:
        raise InputError(
            f"training.report_to: {missing[0]} is not installed. Install it, or choose from {', '.join(available)} "
            "or none."
        )
    return wanted or None


def shown_settings(args: SaeTrainingArguments) -> dict[str, Any]:
    """The settings that a tracker can show: no lists, no secrets."""
    hidden = secret_fields(args)
    return {
        key: value
        for key, value in asdict(args).items()
        if key not in hidden and isinstance(value, (int, float, str, bool))
    }


def start_trackers(accelerator: Accelerator, name: str, args: SaeTrainingArguments) -> None:
    """
    Begins to log with what the run is to log with.

    Args:
        accelerator (`Accelerator`): Keeps the trackers.
        name (`str`): The run's name in them.
        args (`SaeTrainingArguments`): Shown by them as the run's settings.

    Raises:
        `InputError`: if they cannot write.
    """
    threading.excepthook = _quiet_for_writers
    try:
        accelerator.init_trackers(name, config=shown_settings(args))
    except OSError as error:
        raise InputError(
            f"training.report_to: {', '.join(args.report_to)} cannot write its logs: {one_line(error)}. Set another "
            "training.output_dir, or none."
        ) from error


def with_trackers(accelerator: Accelerator, work: Callable[[GeneralTracker], object]) -> None:
    """Does `work` with each tracker. One that cannot write is left out from then on, and costs its logs alone."""
    for tracker in list(accelerator.trackers):
        try:
            work(tracker)
        except OSError as error:
            accelerator.trackers.remove(tracker)
            say(f"{tracker.name} can log no more: {one_line(error)}. Training goes on without it.")


def _quiet_for_writers(args: threading.ExceptHookArgs) -> None:
    """TensorBoard writes from a thread, whose end is told in one line once the run uses it again."""
    if not (isinstance(args.exc_value, OSError) and type(args.thread).__module__.startswith("tensorboard")):
        threading.__excepthook__(args)
