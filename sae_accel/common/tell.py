import sys

from .signals import is_first, line


def tell(message: object) -> None:
    """Prints a line on standard error, on the first process of a launch; from any thread."""
    if is_first():
        print(line(message), file=sys.stderr)
