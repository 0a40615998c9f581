"""
Saves during a run. A failed save never ends the run: it prints a line, and the next save tries again.
"""

import math
from collections.abc import Callable, Iterator
from pathlib import Path

from ..common.errors import InputError, NotSaved, one_line
from ..common.run_files import BEST, HISTORY
from ..data.batches import Position, Window
from ..processes.agreement import say
from ..processes.trackers import with_trackers
from ..runs import checkpoint as files
from ..runs.history import KEPT_IN_MEMORY
from ..runs.writing import Writing
from .run_state import RunState


class Saver:
    """
    Saves checkpoints, best heads and logs while a run trains. If a save fails, for instance on a full disk, the run
    prints one line and trains on; earlier saves stay, and the next save tries again.

    Args:
        run ([`RunState`]): The run to save.
    """

    def __init__(self, run: RunState):
        self.run = run
        self.args = run.args
        # The error of the latest save, for "checkpoint" and for "best"; no entry if it succeeded.
        self._missing: dict[str, str] = {}
        # The step and the folder of this run's newest checkpoint.
        self._newest: tuple[int, Path] | None = None

    @property
    def unsaved(self) -> str | None:
        """Why the latest checkpoint or the best heads could not be saved; None if both are saved."""
        return next(iter(self._missing.values()), None)

    @property
    def newest(self) -> Path | None:
        """The checkpoint of the present step; None if there is none."""
        step, folder = self._newest or (None, None)
        return folder if step == self.run.progress.global_step else None

    def checkpoint(self, position: Position) -> Path | None:
        """
        Writes a checkpoint.

        Args:
            position ([`Position`]): The place in the data where the next step begins.

        Returns:
            `Path`: the checkpoint's folder; None if it could not be written.
        """
        try:
            folder = self.run.save_checkpoint(position)
        except NotSaved as error:
            self._tell("checkpoint", error)
            if self.args.save_total_limit is not None and self.args.save_total_limit > 1:
                # Room for the next try; but checkpoints that were put aside stay until a newer one is complete.
                self._drop_old(self.args.save_total_limit - 1, but_aside=True)
            return None
        self._missing.pop("checkpoint", None)
        self._newest = self.run.progress.global_step, folder
        self._drop_old(self.args.save_total_limit)
        return folder

    def where(self, what_is_left: Callable[[], str]) -> str:
        """A sentence that says where the present step is saved; if nowhere, why not, followed by `what_is_left`."""
        folder = self.newest
        return f"{self.unsaved} {what_is_left()}" if folder is None else f"Saved {folder}. {files.GO_ON}"

    def saved_before_errors(self, windows: Iterator[Window], save: Callable[[], str]) -> Iterator[Window]:
        """
        Yields windows of the data. If the data cannot be read further, it saves a checkpoint before it raises.

        Args:
            windows (`Iterator[Window]`): The windows; every process must have the same number.
            save (`Callable[[], str]`): Saves a checkpoint and returns the sentence that says where.

        Raises:
            `InputError`: on every process, with the reason and the sentence of `save`.
        """
        while True:
            try:
                window = next(windows)
            except InputError as error:
                # Before the first step there is nothing to save.
                raise InputError(f"{error} {save()}" if self.run.progress.global_step else str(error)) from error
            yield window

    def keep_best(self, metrics: dict[str, float]) -> None:
        """
        Keeps the heads with the lowest loss so far: with `loss: fvu` each head by its own FVU, otherwise all heads by
        the loss that they share.

        Args:
            metrics (`dict[str, float]`): The metrics of an evaluation.
        """
        run, loss = self.run, self.args.loss
        losses = {name: f"eval/fvu/{name}" for name in run.plans} if loss == "fvu" else {loss: f"eval/{loss}"}
        for name, key in losses.items():
            # `not <` rather than `>=`: NaN never counts as the best.
            if not metrics[key] < run.best.get(name, math.inf):
                continue
            try:
                run.save_best(Path(self.args.output_dir) / BEST, [name] if loss == "fvu" else list(run.plans))
            except NotSaved as error:
                self._tell("best", error)
                return
            self._missing.pop("best", None)
            run.best[name] = metrics[key]

    def log(self, values: dict[str, float]) -> None:
        """Gives values to the trackers, and adds them to the run's history."""
        progress = self.run.progress
        self.run.lowest.observe(values, progress.global_step)
        entry = {**values, "step": progress.global_step}
        progress.log_history = [*progress.log_history, entry][-KEPT_IN_MEMORY:]
        self.show(values)
        if not self.run.accelerator.is_main_process:
            return
        try:
            self.run.history.append(entry)
        except OSError as error:
            say(f"Step {progress.global_step} could not be added to {HISTORY}: {one_line(error)}. Training goes on.")

    def show(self, values: dict[str, float]) -> None:
        """Gives values to the trackers."""
        step = self.run.progress.global_step
        with_trackers(self.run.accelerator, lambda tracker: tracker.log(values, step=step))

    def _tell(self, what: str, error: NotSaved) -> None:
        self._missing[what] = str(error)
        say(f"{error} Training goes on, and the next save tries again.")

    def _drop_old(self, keep: int | None, but_aside: bool = False) -> None:
        """Deletes all checkpoints except the last `keep`."""
        write = Writing()
        if self.run.accelerator.is_main_process:
            write(lambda: files.drop_old(Path(self.args.output_dir), keep, but_aside))
        if (reason := write.failed_anywhere()) is not None:
            say(f"An older checkpoint could not be deleted: {reason}. Training goes on.")
