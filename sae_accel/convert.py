import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

# First, since the other imports take time, and a signal is answered during them.
from .common.reports import reports
from .common.signals import signals


if TYPE_CHECKING:
    import argparse


LAYOUTS = ("sparsify", "saelens", "sae_accel")
_TOLD = ("k", "input_scale", "apply_b_dec_to_input")


def main(argv: Sequence[str] | None = None) -> int:
    """
    Runs the command `python -m sae_accel.convert`.

    Returns:
        `int`: the exit status: 0 if all went well; 1 if something failed that no other input would mend; 2 for bad
        input; 130 after Ctrl-C, 143 after SIGTERM, 129 after SIGHUP, and 141 if the reader of the output has gone.
    """
    words = sys.argv[1:] if argv is None else argv
    return signals.command(lambda: reports.command("convert", words, _convert), owns_process=argv is None)


def _convert(words: list[str]) -> int:
    signals.words = lambda: "Nothing was written. Start again with the same command."
    reports.memory_advice = "Convert fewer heads at once, with --include."
    options = _parser().parse_args(words)
    # Here, since --help does not wait for torch.
    from .common.tables import aligned
    from .loading.convert import convert

    told = {name: value for name in _TOLD if (value := getattr(options, name)) is not None}
    written = convert(options.source, options.target, options.to, options.include, **told)
    signals.words = lambda: f"Everything is written, in {options.target}."
    rows = [("head", "activation", "d_in -> latents -> d_out")]
    rows += [(name or ".", config.activation, config.widths) for name, config in written]
    print("\n".join([*aligned(rows), f"Written for {options.to} in {options.target}."]))
    return 0


def _parser() -> "argparse.ArgumentParser":
    from .common.parser import CommandParser

    parser = CommandParser(
        prog="python -m sae_accel.convert",
        description="Reads SAEs and transcoders of any library that AutoSae knows, and writes them in the layout of "
        "another library.",
    )
    parser.add_argument("source", metavar="SRC", help="a folder, a file, or a repo on the Hub")
    parser.add_argument("target", metavar="DST", help="a folder that does not exist yet, or is empty")
    parser.add_argument("--to", required=True, choices=LAYOUTS, help="the library whose layout is written")
    parser.add_argument(
        "--include",
        action="append",
        default=[],
        metavar="GLOB",
        help="heads to convert, such as 'layers.*'; all if not given. Repeat it for more globs",
    )
    told = parser.add_argument_group("facts that the files of SRC may lack")
    told.add_argument("--k", type=int, help="latents per token, for a file of Qwen Scope outside of its repo")
    told.add_argument("--input-scale", type=float, help="number by which inputs of SAELens heads were multiplied")
    told.add_argument(
        "--apply-b-dec-to-input",
        action="store_true",
        default=None,
        help="for transcoders that sparsify trained before February 2025",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
