import argparse
import os
import sys
from collections.abc import Sequence

from .common.errors import InputError


def main(argv: Sequence[str] | None = None) -> int:
    """The command `python -m sae_accel.push`: 0 if all went well, 2 for bad input, 130 after Ctrl-C."""
    options = _parser().parse_args(argv)
    # Only now, since the help need not wait for torch.
    from .hub.refusals import AGAIN
    from .hub.release import Release

    try:
        release = Release(options.folder, options.repo_id, options.include, options.license)
        if options.dry_run:
            table = release.table(options.revision)
            _say(f"{table}\nNothing was sent. Without --dry-run, this goes to {options.repo_id}.")
            return 0
        pushed = release.push(private=options.private, revision=options.revision, message=options.message)
    except InputError as error:
        print(f"sae_accel: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"sae_accel: Stopped. {AGAIN}", file=sys.stderr)
        return 130
    what = "Pushed" if pushed.is_new else "There was nothing new to push"
    _say(f"{what}: {pushed.url}, commit {pushed.commit[:8]}.{pushed.about_left()}")
    return 0


def _say(text: str) -> None:
    try:
        print(text, flush=True)
    except BrokenPipeError:
        # Whoever read this, such as `head`, has enough. At exit Python would write what is left once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
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
