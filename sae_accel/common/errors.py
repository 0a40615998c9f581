"""
Errors with a message that a user can act on. A command prints the message as one line, without a traceback, and the
class decides the status with which it ends.
"""

import difflib
import errno
from collections.abc import Iterable


# The advice after a push that did not come to its end.
AGAIN = "Push again to go on: no file that has arrived is sent twice."
# Words of torch and its libraries that mean a lack of memory, where the error's type does not tell.
_NO_MEMORY = ("DefaultCPUAllocator", "can't allocate memory", "out of memory", "ALLOC_FAILED")


class InputError(ValueError):
    """
    Something that a user gave cannot be used: a recipe, a path, a model, a dataset or a checkpoint.

    The message is one line. It names the thing, says what was found, what is allowed, and what to do. The commands
    print this line alone and end with status 2. In Python, catch it as this class or as a `ValueError`.

    Examples:
        ```python
        from sae_accel import AutoSae, InputError

        try:
            head = AutoSae.from_pretrained("runs/quickstart", hookpoint="layers.99")
        except InputError as error:
            print(error)  # one line, with the names that are there
        ```
    """


class RunEnded(RuntimeError):
    """
    A command cannot go on, although its input is right and there is no defect. The message is one line that gives the
    reason. The commands print this line alone and end with status 1.
    """


class NotSaved(RunEnded):
    """
    A file could not be written, such as a checkpoint to a full disk. The message is one line that names the file, the
    reason, and the free space. Every process of a run raises it.
    """


class NotFinite(RunEnded):
    """
    A run cannot go on, or its heads cannot be saved, since numbers are NaN or infinite. The message is one line that
    names the place of the numbers, the likely cause, and the files that are left. Every process of a run raises it.
    """


def near(value: object, choices: Iterable[str]) -> str:
    """A blank and a question that names the nearest of `choices`; empty if none is near."""
    closest = difflib.get_close_matches(str(value), list(choices), n=1, cutoff=0.5)
    return f" Did you mean {closest[0]}?" if closest else ""


def one_line(reason: object) -> str:
    """The message of an error, in one line."""
    return " ".join(str(reason).split())


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a machine or a device has no memory left."""
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    # The type is compared by name, so that torch need not be imported.
    return isinstance(error, RuntimeError) and (
        type(error).__name__ == "OutOfMemoryError" or any(words in str(error) for words in _NO_MEMORY)
    )
