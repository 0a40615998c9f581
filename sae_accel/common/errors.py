import difflib
import errno
from collections.abc import Iterable


# What helps where a push has not come to its end.
AGAIN = "Push again to go on: what has arrived is not sent twice."
# What torch and its libraries say where no memory is left and the error's type does not tell.
_NO_MEMORY = ("DefaultCPUAllocator", "can't allocate memory", "out of memory", "ALLOC_FAILED")


class InputError(ValueError):
    """
    Something a user gave cannot be used: a recipe, a path, a model, a dataset, a checkpoint.

    Its message is one line that names the thing, what was found, what is allowed and what to do. The commands print
    that line alone and end with status 2.
    """


class RunEnded(RuntimeError):
    """
    A command cannot go on, for a reason that is neither its input nor a defect. Its message is one line that says
    which. The commands print that line alone and end with status 1.
    """


class NotSaved(RunEnded):
    """
    Something could not be written, such as a checkpoint to a disk that is full. Its message is one line that names it,
    the reason, and the room that there is. It is raised on every process of a run alike.
    """


class NotFinite(RunEnded):
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


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a machine or a device has no memory left."""
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    # By its name, since torch may not be imported for this.
    return isinstance(error, RuntimeError) and (
        type(error).__name__ == "OutOfMemoryError" or any(words in str(error) for words in _NO_MEMORY)
    )
