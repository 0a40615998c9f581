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
    Saves while a run goes on. What cannot be saved, such as on a disk that is full, is told in one line, and costs
    neither the run nor what was saved before: the next save tries again.

    Args:
        run ([`RunState`]): What is saved.
    """

    def __init__(self, run: RunState):
        self.run = run
        self.args = run.args
        # Why the latest checkpoint, and why the best heads, could not be saved.
        self._missing: dict[str, str] = {}
        # The newest checkpoint that this run has written, with its step.
        self._newest: tuple[int, Path] | None = None

    @property
    def unsaved(self) -> str | None:
        """Why the latest checkpoint, or the best heads, could not be saved; None if they were."""
        return next(iter(self._missing.values()), None)

    @property
    def newest(self) -> Path | None:
        """The checkpoint of the present step, if there is one."""
        step, folder = self._newest or (None, None)
        return folder if step == self.run.progress.global_step else None

    def checkpoint(self, position: Position) -> Path | None:
        """
        Writes a checkpoint; None if it could not.

        Args:
            position ([`Position`]): Where in the data the next step begins.
        """
        try:
            folder = self.run.save_checkpoint(position)
        except NotSaved as error:
            self._tell("checkpoint", error)
            if self.args.save_total_limit is not None and self.args.save_total_limit > 1:
                # What was put aside goes only once there is a newer one.
                self._drop_old(self.args.save_total_limit - 1, but_aside=True)
            return None
        self._missing.pop("checkpoint", None)
        self._newest = self.run.progress.global_step, folder
        self._drop_old(self.args.save_total_limit)
        return folder

    def where(self, what_is_left: Callable[[], str]) -> str:
        """Where the present step is saved, in words; if it could not be, why, and `what_is_left`."""
        folder = self.newest
        return f"{self.unsaved} {what_is_left()}" if folder is None else f"Saved {folder}. {files.GO_ON}"

    def saved_before_errors(self, windows: Iterator[Window], save: Callable[[], str]) -> Iterator[Window]:
        """
        Windows of the data. Where it cannot be read on, what has trained is saved first.

        Args:
            windows (`Iterator[Window]`): As many on every process.
            save (`Callable[[], str]`): Saves, and says where.

        Raises:
            `InputError`: on every process, with the reason and what is saved.
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
        Keeps heads whose loss is the lowest so far: each by its own FVU; heads that were trained together by the loss
        that they share.

        Args:
            metrics (`dict[str, float]`): Of an evaluation.
        """
        run, loss = self.run, self.args.loss
        losses = {name: f"eval/fvu/{name}" for name in run.plans} if loss == "fvu" else {loss: f"eval/{loss}"}
        for name, key in losses.items():
            # What is no number is not below any.
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
        """Hands values to the trackers, and adds them to the run's history."""
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
        """Hands values to the trackers."""
        step = self.run.progress.global_step
        with_trackers(self.run.accelerator, lambda tracker: tracker.log(values, step=step))

    def _tell(self, what: str, error: NotSaved) -> None:
        self._missing[what] = str(error)
        say(f"{error} Training goes on, and the next save tries again.")

    def _drop_old(self, keep: int | None, but_aside: bool = False) -> None:
        """Deletes older checkpoints than the last `keep`."""
        write = Writing()
        if self.run.accelerator.is_main_process:
            write(lambda: files.drop_old(Path(self.args.output_dir), keep, but_aside))
        if (reason := write.failed_anywhere()) is not None:
            say(f"An older checkpoint could not be deleted: {reason}. Training goes on.")
