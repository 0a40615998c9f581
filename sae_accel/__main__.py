"""The commands of the package: `sae-accel COMMAND ...`, or `python -m sae_accel COMMAND ...`."""

import sys
from importlib import import_module

from .common.reports import DEBUG, DEBUG_HELP
from .common.signals import signals


COMMANDS = {
    "train": "Train SAEs and transcoders as a recipe says. On several processes: accelerate launch -m sae_accel.train",
    "push": "Release the heads of a run to the Hub, with a model card.",
    "convert": "Write heads of any library that AutoSae reads as another library reads them.",
}


def main(argv: list[str] | None = None) -> int:
    """Runs the command that the first word names, and lists all of them where there is none."""
    given = list(sys.argv[1:] if argv is None else argv)
    # It may stand before the command as well.
    debug = [DEBUG] if DEBUG in given else []
    command, *words = [word for word in given if word != DEBUG] or ["--help"]
    if command in COMMANDS:
        words += debug
        return signals.command(lambda: import_module(f"sae_accel.{command}").main(words), owns_process=argv is None)
    lines = [f"  {name:<8} {meaning}" for name, meaning in COMMANDS.items()]
    closing = f"Each has a --help of its own, and takes {DEBUG}, to\n{DEBUG_HELP}."
    listing = "\n".join(["Usage: sae-accel COMMAND ...", "", *lines, "", closing])
    if command in ("-h", "--help"):
        print(listing)
        return 0
    print(f"sae_accel: there is no command {command!r}.\n\n{listing}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
