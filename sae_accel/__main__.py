"""The commands of the package: `sae-accel COMMAND ...`, or `python -m sae_accel COMMAND ...`."""

import sys
from importlib import import_module

from .common.signals import signals


COMMANDS = {
    "train": "Train SAEs and transcoders as a recipe says. On several processes: accelerate launch -m sae_accel.train",
    "push": "Release the heads of a run to the Hub, with a model card.",
    "convert": "Write heads of any library that AutoSae reads as another library reads them.",
}


def main(argv: list[str] | None = None) -> int:
    """Runs the command that the first word names, and lists all of them where there is none."""
    command, *words = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if command in COMMANDS:
        return signals.command(lambda: import_module(f"sae_accel.{command}").main(words), owns_process=argv is None)
    lines = [f"  {name:<8} {meaning}" for name, meaning in COMMANDS.items()]
    listing = "\n".join(["Usage: sae-accel COMMAND ...", "", *lines, "", "Each has a --help of its own."])
    if command in ("-h", "--help"):
        print(listing)
        return 0
    print(f"sae_accel: there is no command {command!r}.\n\n{listing}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
