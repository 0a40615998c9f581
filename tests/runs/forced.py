"""
Runs that are killed, or whose disk fails, and are started again with the same command until they end.

    python tests/runs/forced.py FOLDER kills COUNT     kills at random moments
    python tests/runs/forced.py FOLDER faults EVERY    a kill, and a failure, at every file operation, or each n-th

Each run is forked from this process, which has imported all that it needs, so that one takes a second. What was found
is printed as JSON: `tried`, `survived`, and `lost`, which tells of each run that did not end as one that was never
stopped.
"""

import errno
import json
import os
import random
import shutil
import signal
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[1]))

import safetensors.torch
import torch
from matplotlib.figure import Figure
from safetensors.torch import load_file
from tiny import command_words, write_place

import sae_accel.training.run  # noqa: F401  So that children need not import it.
from sae_accel.runs.checkpoint import newest_complete
from sae_accel.train import main


CHANGES = {
    "training.max_steps": 7,
    "training.save_steps": 2,
    "training.eval_steps": 3,
    "training.save_best": "true",
    "training.save_total_limit": 2,
    "training.report_to": "tensorboard",
    "training.resume_from_checkpoint": "true",
    "training.logging_steps": 1,
}
# What opens, renames, makes or deletes files, as Python tells those that audit it.
OPERATIONS = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree", "os.link"}


def start(folder: Path, before=lambda: None) -> int:
    """Starts the command in a child, which does `before` first; gives its number."""
    if child := os.fork():
        return child
    status = 70
    try:
        before()
        words = command_words(folder.parent / "place", folder, **CHANGES | {"training.output_dir": folder / "run"})
        with open(folder / "said.txt", "a") as said, redirect_stdout(said), redirect_stderr(said):
            status = main(words)
    finally:
        os._exit(status)


def ended(child: int) -> int:
    """The status with which a child ended; below zero by a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def result(folder: Path) -> dict:
    """What a run that has ended leaves, but for what tells of time."""
    heads = {str(file): load_file(folder / file) for file in sorted(_weights(folder))}
    steps = [json.loads(line)["step"] for line in (folder / "run/log_history.jsonl").read_text().splitlines()]
    # What could not be deleted is left beside, under a hidden name.
    left = sorted(path.name for path in (folder / "run").glob("[!.]*"))
    return {"heads": heads, "steps": steps, "left": left}


def _weights(folder: Path):
    return [path.relative_to(folder) for path in (folder / "run").rglob("model.safetensors")]


def same(one: dict, other: dict, whole: bool = True) -> bool:
    """Whether two runs left the same; of one that could not save all, `whole` being false, the same final heads."""
    if whole and one != other | {"heads": one["heads"]}:
        return False
    if whole and one["heads"].keys() != other["heads"].keys():
        return False
    return all(
        torch.equal(tensor, other["heads"][file][name])
        for file, head in one["heads"].items()
        if whole or "checkpoint" not in file
        for name, tensor in head.items()
    )


def kill_at_random(folder: Path, count: int) -> dict:
    """Kills runs, each again and again, until as many kills are done."""
    whole = folder / "whole"
    whole.mkdir()
    began = time.monotonic()
    assert ended(start(whole)) == 0, (whole / "said.txt").read_text()
    expected, took = result(whole), time.monotonic() - began
    dice, kills, lost = random.Random(0), 0, []
    while kills < count:
        place = folder / f"killed{kills}"
        place.mkdir()
        first = kills
        for _ in range(50):
            child = start(place)
            # The later tries are left alone for longer, so that each run comes to its end.
            time.sleep(dice.uniform(0, took * (1 + (kills - first) / 4)))
            if os.waitpid(child, os.WNOHANG) == (0, 0):
                os.kill(child, signal.SIGKILL)
                ended(child)
                kills += 1
                continue
            break
        status = ended(start(place)) if not (place / "run" / "metrics.json").exists() else 0
        if status or not same(result(place), expected):
            lost.append(f"{place.name}: status {status}: {(place / 'said.txt').read_text()[-300:]}")
        else:
            shutil.rmtree(place)
    return {"tried": kills, "survived": kills if not lost else 0, "lost": lost}


class Fault:
    """Kills the process, or lets an operation fail, at the n-th operation on files below a folder."""

    def __init__(self, folder: Path, at: int | None, kills: bool):
        self.folder, self.at, self.kills = str(folder), at, kills
        self.count = 0

    def install(self) -> None:
        sys.addaudithook(self.audit)
        # What writes without Python's knowledge.
        for module, name in ((safetensors.torch, "save_file"), (torch, "save"), (os, "fsync")):
            setattr(module, name, partial(self.around, getattr(module, name)))
        for name in ("sae_accel.training.run_state", "transformers.modeling_utils"):
            for function in ("save_file", "safe_save_file"):
                if hasattr(sys.modules[name], function):
                    setattr(sys.modules[name], function, safetensors.torch.save_file)

    def audit(self, event: str, args: tuple) -> None:
        if event in OPERATIONS and isinstance(args[0], str | bytes | os.PathLike):
            writes = event != "open" or (isinstance(args[1], str) and set(args[1]) & set("wax+")) or args[2] & 3
            if writes and os.fsdecode(args[0]).startswith(self.folder):
                self.happens(event)

    def around(self, function, *args, **kwargs):
        self.happens(function.__name__)
        return function(*args, **kwargs)

    def happens(self, what: str) -> None:
        self.count += 1
        if self.at is None:
            # Told to the parent as it comes, since the child ends at no moment that is known.
            with open("/dev/shm/forced.count", "w") as file:
                file.write(str(self.count))
        elif self.count == self.at:
            if self.kills:
                os.kill(os.getpid(), signal.SIGKILL)
            raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)} (at {what})")


def fail_everywhere(folder: Path, every: int) -> dict:
    """At every file operation of a run, or each `every`-th: a kill, and a failure."""
    whole = folder / "whole"
    whole.mkdir()
    counter = Fault(whole / "run", None, False)
    assert ended(start(whole, counter.install)) == 0, (whole / "said.txt").read_text()
    expected = result(whole)
    operations, tried, lost = int(Path("/dev/shm/forced.count").read_text()), 0, []
    for at in range(1, operations + 1, every):
        for kills in (True, False):
            place = folder / f"fault{at}{'kill' if kills else 'fail'}"
            place.mkdir()
            status = ended(start(place, Fault(place / "run", at, kills).install))
            said = (place / "said.txt").read_text()
            newest = newest_complete(place / "run")
            tried += 1
            fine = kills or (status in (0, 1, 2) and "Traceback" not in said)
            if not kills and status == 0:
                # What failed is told, or nothing is missing.
                fine = fine and same(result(place), expected, whole="No space" not in said)
            again = 0 if status == 0 else ended(start(place))
            if not fine or again or not same(result(place), expected, whole=kills):
                again_said = (place / "said.txt").read_text()[len(said) :][-600:]
                lost.append(
                    f"{place.name}: status {status}: {said[-600:]}\nagain from {newest}: {again}: {again_said}"
                )
            else:
                shutil.rmtree(place)
    return {"operations": operations, "tried": tried, "survived": tried - len(lost), "lost": lost}


if __name__ == "__main__":
    torch.set_num_threads(1)
    # Drawing would take three quarters of the time.
    Figure.savefig = lambda figure, path, **_: Path(path).touch()
    folder, mode, count = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    (folder / "place").mkdir(parents=True)
    write_place(folder / "place")
    found = kill_at_random(folder, count) if mode == "kills" else fail_everywhere(folder, count)
    print(json.dumps(found))
