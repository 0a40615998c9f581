import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

# First, since the other imports take time, and a signal is answered during them.
from .common.reports import reports
from .common.signals import signals


if TYPE_CHECKING:
    import argparse


def main(argv: Sequence[str] | None = None) -> int:
    """
    Runs the command `python -m sae_accel.push`.

    Returns:
        `int`: the exit status: 0 if all went well; 1 if something failed that no other input would mend; 2 for bad
        input; 130 after Ctrl-C, 143 after SIGTERM, 129 after SIGHUP, and 141 if the reader of the output has gone.
    """
    words = sys.argv[1:] if argv is None else argv
    return signals.command(lambda: reports.command("push", words, _push), owns_process=argv is None)


def _push(words: list[str]) -> int:
    from .common.errors import AGAIN

    signals.words = lambda: AGAIN
    reports.memory_advice = "Release fewer heads at once, with --include."
    options = _parser().parse_args(words)
    if options.dry_run:
        signals.words = lambda: "Nothing was sent."
    # Here, since --help does not wait for torch.
    from .hub.release import Release

    release = Release(options.folder, options.repo_id, options.include, options.license)
    if options.dry_run:
        table = release.table(options.revision)
        print(f"{table}\nNothing was sent. Without --dry-run, these files go to {options.repo_id}.")
        return 0
    pushed = release.push(private=options.private, revision=options.revision, message=options.message)
    signals.words = lambda: f"Everything is sent: {pushed.url}."
    what = "Pushed" if pushed.is_new else "There was nothing new to push"
    print(f"{what}: {pushed.url}, commit {pushed.commit[:8]}.{pushed.about_left()}")
    return 0


def _parser() -> "argparse.ArgumentParser":
    from .common.parser import CommandParser

    parser = CommandParser(
        prog="python -m sae_accel.push",
        description="Releases the heads of a run to the Hub, with a model card, in one commit. Files that the repo "
        "already has are not sent again.",
    )
    parser.add_argument("folder", metavar="RUN_FOLDER", help="the run's output_dir, or another folder with heads")
    parser.add_argument(
        "repo_id", metavar="REPO_ID", help="name or user/name of the repo, which is made if there is none"
    )
    parser.add_argument("--private", action="store_true", default=None, help="make a new repo private")
    parser.add_argument("--revision", help="branch to commit to, which is made if there is none; main if not given")
    parser.add_argument(
        "--include",
        action="append",
        default=[],
        metavar="GLOB",
        help="heads to release, such as 'layers.*'; all if not given. Repeat it for more globs",
    )
    parser.add_argument("--license", help="the Hub's identifier of the heads' license, such as mit, for the card")
    parser.add_argument("--message", default="Upload heads", help="message of the commit; 'Upload heads' if not given")
    parser.add_argument("--dry-run", action="store_true", help="list the files and their sizes, and send nothing")
    return parser


if __name__ == "__main__":
    sys.exit(main())
