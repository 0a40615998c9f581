"""The commands of the package: `sae-accel COMMAND ...`, or `python -m sae_accel COMMAND ...`."""

import sys
from importlib import import_module

from .common.reports import DEBUG, DEBUG_HELP
from .common.signals import signals


COMMANDS = {
    "train": "Train SAEs and transcoders from a recipe. On several devices: accelerate launch -m sae_accel.train",
    "push": "Release the heads of a run to the Hub, with a model card.",
    "convert": "Write heads in the layout of another library.",
}


def main(argv: list[str] | None = None) -> int:
    """Runs the command that the first word names. Without a word it lists the commands."""
    given = list(sys.argv[1:] if argv is None else argv)
    # --debug may stand before the command too.
    debug = [DEBUG] if DEBUG in given else []
    command, *words = [word for word in given if word != DEBUG] or ["--help"]
    if command in COMMANDS:
        words += debug
        return signals.command(lambda: import_module(f"sae_accel.{command}").main(words), owns_process=argv is None)
    lines = [f"  {name:<8} {meaning}" for name, meaning in COMMANDS.items()]
    closing = f"Each command has its own --help. Each takes {DEBUG}:\n{DEBUG_HELP}."
    listing = "\n".join(["Usage: sae-accel COMMAND ...", "", *lines, "", closing])
    if command in ("-h", "--help"):
        print(listing)
        return 0
    print(f"sae_accel: there is no command {command!r}.\n\n{listing}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
