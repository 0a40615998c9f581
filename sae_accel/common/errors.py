import difflib
from collections.abc import Iterable


# What helps where a push has not come to its end.
AGAIN = "Push again to go on: what has arrived is not sent twice."


class InputError(ValueError):
    """
    Something a user gave cannot be used: a recipe, a path, a model, a dataset, a checkpoint.

    Its message is one line that names the thing, what was found, what is allowed and what to do. The commands print
    that line alone and end with status 2; any other exception is a defect of this package and keeps its traceback.
    """


class NotSaved(RuntimeError):
    """
    Something could not be written, such as a checkpoint to a disk that is full. Its message is one line that names it,
    the reason, and the room that there is. It is raised on every process of a run alike.
    """


class NotFinite(RuntimeError):
    """
    A run cannot go on, or its heads cannot be saved, since numbers are NaN or infinite. Its message is one line that
    names where they arose, the likely cause, and what is left. It is raised on every process of a run alike.
    """


def near(value: object, choices: Iterable[str]) -> str:
    """A question that names the nearest of `choices`, after a blank; empty if none is near."""
    closest = difflib.get_close_matches(str(value), list(choices), n=1, cutoff=0.5)
    return f" Did you mean {closest[0]}?" if closest else ""


def one_line(reason: object) -> str:
    """What an error says, in one line."""
    return " ".join(str(reason).split())
