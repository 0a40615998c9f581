import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

# Before all that takes time, so that a signal is answered.
from .common.reports import reports
from .common.signals import signals


if TYPE_CHECKING:
    import argparse


LAYOUTS = ("sparsify", "saelens", "sae_accel")
_TOLD = ("k", "input_scale", "apply_b_dec_to_input")


def main(argv: Sequence[str] | None = None) -> int:
    """
    The command `python -m sae_accel.convert`: 0 if all went well, 1 if something failed that no input would
    mend, 2 for bad input; 130 after Ctrl-C, 143 after SIGTERM, 129 after SIGHUP, 141 after the reader of its output
    has gone.
    """
    words = sys.argv[1:] if argv is None else argv
    return signals.command(lambda: reports.command("convert", words, _convert), owns_process=argv is None)


def _convert(words: list[str]) -> int:
    signals.words = lambda: "Nothing was written: start again with the same command."
    reports.memory_advice = "Convert fewer heads at once by --include."
    options = _parser().parse_args(words)
    # Only now, since the help need not wait for torch.
    from .common.tables import aligned
    from .loading.convert import convert

    told = {name: value for name in _TOLD if (value := getattr(options, name)) is not None}
    written = convert(options.source, options.target, options.to, options.include, **told)
    signals.words = lambda: f"All is written in {options.target}."
    rows = [("head", "activation", "d_in -> latents -> d_out")]
    rows += [(name or ".", config.activation, config.widths) for name, config in written]
    print("\n".join([*aligned(rows), f"Written for {options.to} in {options.target}."]))
    return 0


def _parser() -> "argparse.ArgumentParser":
    from .common.parser import CommandParser

    parser = CommandParser(
        prog="python -m sae_accel.convert",
        description="Writes SAEs and transcoders, of any library that AutoSae reads, as another library reads them.",
    )
    parser.add_argument("source", metavar="SRC", help="a folder, a file, or a repo on the Hub")
    parser.add_argument("target", metavar="DST", help="a folder that does not exist yet, or is empty")
    parser.add_argument("--to", required=True, choices=LAYOUTS, help="the layout to write")
    parser.add_argument(
        "--include",
        action="append",
        default=[],
        metavar="GLOB",
        help="heads, such as 'layers.*'; may recur",
    )
    told = parser.add_argument_group("what the files of SRC may not tell")
    told.add_argument("--k", type=int, help="latents a token, for a file of Qwen Scope outside of its repo")
    told.add_argument("--input-scale", type=float, help="what inputs of SAELens heads were multiplied by")
    told.add_argument(
        "--apply-b-dec-to-input",
        action="store_true",
        default=None,
        help="for transcoders that sparsify trained before February 2025",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
