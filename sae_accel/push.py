import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

# Before all that takes time, so that a signal is answered.
from .common.reports import reports
from .common.signals import signals


if TYPE_CHECKING:
    import argparse


def main(argv: Sequence[str] | None = None) -> int:
    """
    The command `python -m sae_accel.push`: 0 if all went well, 1 if something failed that no input would mend, 2 for
    bad input; 130 after Ctrl-C, 143 after SIGTERM, 129 after SIGHUP, 141 after the reader of its output has gone.
    """
    words = sys.argv[1:] if argv is None else argv
    return signals.command(lambda: reports.command("push", words, _push), owns_process=argv is None)


def _push(words: list[str]) -> int:
    from .common.errors import AGAIN

    signals.words = lambda: AGAIN
    reports.memory_advice = "Release fewer heads at once by --include."
    options = _parser().parse_args(words)
    if options.dry_run:
        signals.words = lambda: "Nothing was sent."
    # Only now, since the help need not wait for torch.
    from .hub.release import Release

    release = Release(options.folder, options.repo_id, options.include, options.license)
    if options.dry_run:
        table = release.table(options.revision)
        print(f"{table}\nNothing was sent. Without --dry-run, this goes to {options.repo_id}.")
        return 0
    pushed = release.push(private=options.private, revision=options.revision, message=options.message)
    signals.words = lambda: f"All is sent: {pushed.url}."
    what = "Pushed" if pushed.is_new else "There was nothing new to push"
    print(f"{what}: {pushed.url}, commit {pushed.commit[:8]}.{pushed.about_left()}")
    return 0


def _parser() -> "argparse.ArgumentParser":
    from .common.parser import CommandParser

    parser = CommandParser(
        prog="python -m sae_accel.push",
        description="Releases the heads of a run to the Hub, with a model card, in one commit. What the repo has "
        "already is not sent again.",
    )
    parser.add_argument("folder", metavar="RUN_FOLDER", help="the run's output_dir, or another folder with heads")
    parser.add_argument("repo_id", metavar="REPO_ID", help="name or user/name; made if there is none")
    parser.add_argument("--private", action="store_true", default=None, help="make the repo private, if it is made")
    parser.add_argument("--revision", help="branch to commit to, made if there is none; main if not given")
    parser.add_argument(
        "--include",
        action="append",
        default=[],
        metavar="GLOB",
        help="heads to release, such as 'layers.*'; may recur",
    )
    parser.add_argument("--license", help="the Hub's identifier of a license, for the card, such as mit")
    parser.add_argument("--message", default="Upload heads", help="of the commit")
    parser.add_argument("--dry-run", action="store_true", help="list files and sizes, and send nothing")
    return parser


if __name__ == "__main__":
    sys.exit(main())
