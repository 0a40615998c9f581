from dataclasses import asdict
from typing import Any

from accelerate.tracking import get_available_trackers

from ..common.errors import InputError
from ..recipe.arguments import SaeTrainingArguments, secret_fields


def wanted_trackers(report_to: list[str]) -> list[str] | None:
    """
    What Accelerate is to log with; None is nothing. It leaves out a tracker that is not installed, but a run without
    the logs that were asked for is no use.

    Raises:
        `InputError`: if one is not installed.
    """
    wanted = [tracker for tracker in report_to if tracker != "none"]
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
