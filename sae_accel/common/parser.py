import argparse
from typing import NoReturn

from .errors import InputError
from .reports import DEBUG, DEBUG_HELP


class CommandParser(argparse.ArgumentParser):
    """
    Reads a command line, and refuses an unknown option in one line.

    Args:
        prog (`str`): The words that a user types to run the command.
        description (`str`): A sentence that says what the command does.
    """

    def __init__(self, prog: str, description: str):
        # No abbreviations: a new option could change the meaning of one.
        super().__init__(prog=prog, description=description, allow_abbrev=False)
        # `Reports.command` reads this option.
        self.add_argument(DEBUG, action="store_true", help=DEBUG_HELP)

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}. `{self.prog} --help` lists the options.")
