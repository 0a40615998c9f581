import argparse
from typing import NoReturn

from .errors import InputError
from .reports import DEBUG, DEBUG_HELP


class CommandParser(argparse.ArgumentParser):
    """
    Reads a command line, and refuses what it does not know in one line.

    Args:
        prog (`str`): What is typed to run the command.
        description (`str`): What it does.
    """

    def __init__(self, prog: str, description: str):
        # An option that is cut short would be another once there is a new one.
        super().__init__(prog=prog, description=description, allow_abbrev=False)
        # Read by `Reports.command`.
        self.add_argument(DEBUG, action="store_true", help=DEBUG_HELP)

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}. --help shows what {self.prog} takes.")
