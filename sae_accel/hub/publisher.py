"""
Pushes a run's heads to the Hub while training goes on, and releases the run at its end.

A push can take minutes, and training must not wait for it. So each push runs in a thread, on hard links of the
checkpoint's files. Pushes run one after the other, and a checkpoint is skipped while an older one is on its way. At
the end the run waits for at most `hub_timeout`. No failure on the Hub costs a trained head: all of them are on disk.
"""

import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from pathlib import Path
from queue import SimpleQueue
from typing import Any, TypeVar

from accelerate.logging import get_logger
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers import TrainerCallback, TrainerControl, TrainerState

from ..common.errors import AGAIN, InputError, one_line
from ..common.hub_requests import seconds_unanswered
from ..common.signals import signals
from ..recipe.arguments import SaeTrainingArguments
from .release import Pushed, Release, open_repo


T = TypeVar("T")
logger = get_logger(__name__)
# After Ctrl-C, a Hub that is silent for this many seconds is not waited for.
ANSWER_AFTER_CTRL_C = 1.5


class Publisher(TrainerCallback):
    """
    Pushes heads as they are saved, while training goes on. A push that fails is one line of warning; the run goes on.

    Args:
        args (`SaeTrainingArguments`): The run's settings, with the repo and `hub_strategy`.

    Raises:
        `InputError`: if the repo cannot be made or written to.
    """

    def __init__(self, args: SaeTrainingArguments):
        self.repo_id = open_repo(hub_repo(args), private=args.hub_private_repo)
        self.strategy, self.output_dir = args.hub_strategy, Path(args.output_dir)
        self.timeout = args.hub_timeout
        self._line = _Line()
        self._pushes: list[Future] = []
        # The step of the newest checkpoint, if it was not pushed.
        self._left_out: int | None = None

    def on_save(  # type: ignore[override]
        self, args: SaeTrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """
        Starts to push a checkpoint's heads. If an earlier push still runs, this checkpoint is skipped, unless it is
        the last one or `hub_strategy` is `"all_checkpoints"`.
        """
        last = control.should_training_stop
        if self.strategy == "end":
            return
        busy = bool(self._pushes) and not self._pushes[-1].done()
        if (busy and not last and self.strategy != "all_checkpoints") or (last and not self._pushes_checkpoints):
            self._left_out = state.global_step
        else:
            self._begin(state.global_step)

    def finish(
        self, release_follows: bool = True, signal_number: int | None = None, deadline: float | None = None
    ) -> None:
        """
        Waits for the pushes that still run, for at most `hub_timeout`.

        Args:
            release_follows (`bool`, defaults to `True`): Whether the run is released afterwards. If not, the newest
                checkpoint is pushed here, should it have been skipped.
            signal_number (`int`, *optional*): The signal that has ended the run. After Ctrl-C a Hub that gives no
                answer is not waited for.
            deadline (`float`, *optional*): Latest end, on the clock of `time.monotonic`.
        """
        deadline = time.monotonic() + self.timeout if deadline is None else deadline
        if not release_follows and not all(push.done() for push in self._pushes):
            logger.warning("Waiting until the last checkpoint has been pushed. A second Ctrl-C stops at once.")
        all_arrived = self._wait(deadline, signal_number)
        if all_arrived and not release_follows and self._left_out is not None:
            self._begin(self._left_out)
            self._wait(deadline, signal_number)
        for push in self._pushes:
            if push.done() and (error := push.exception()) is not None:
                logger.warning(f"A push ended with {type(error).__name__}: {error}")
        self._pushes = []

    def _wait(self, deadline: float, signal_number: int | None) -> bool:
        """Waits, and returns whether all pushes have ended. If not, a line gives the reason."""
        while pending := wait(self._pushes, timeout=0.2).not_done:
            silent = seconds_unanswered()
            gives_up = signal_number == signal.SIGINT and silent > ANSWER_AFTER_CTRL_C
            if gives_up or time.monotonic() > deadline:
                reason = f"the Hub has not answered for {silent:.0f} s" if gives_up else f"{self._limit} have passed"
                logger.warning(
                    f"{len(pending)} of the pushes of checkpoints did not arrive: {reason}. "
                    f"To push a checkpoint by hand: python -m sae_accel.push CHECKPOINT_FOLDER {self.repo_id}."
                )
                return False
        return True

    @property
    def _limit(self) -> str:
        return f"the {self.timeout:g} s of training.hub_timeout"

    def _begin(self, step: int) -> None:
        name = f"checkpoint-{step}"
        place = self.output_dir / f".{name}.pushing"
        shutil.rmtree(place, ignore_errors=True)
        self._left_out = step
        try:
            # The push sends hard links, since the checkpoint may be deleted before it has arrived.
            shutil.copytree(self.output_dir / name, place, copy_function=_link)
        except OSError as error:
            shutil.rmtree(place, ignore_errors=True)
            logger.warning(f"Step {step} was not pushed: {one_line(error)}. Training goes on.")
            return
        self._left_out = None
        self._pushes.append(self._line.submit(lambda: self._push(place, name, step)))

    @property
    def _pushes_checkpoints(self) -> bool:
        return self.strategy in ("checkpoint", "all_checkpoints")

    def _push(self, place: Path, name: str, step: int) -> None:
        folder = "last-checkpoint" if self.strategy == "checkpoint" else name
        files = sorted(path for path in place.rglob("*") if path.is_file()) if self._pushes_checkpoints else []
        extra = {f"{folder}/{path.relative_to(place)}": path for path in files}
        try:
            Release(place, self.repo_id).push(
                message=f"Training in progress, step {step}", extra=extra, was_opened=True
            )
        except InputError as error:
            # The advice to push again is dropped: the next save does it.
            reason = str(error).removesuffix(AGAIN).rstrip()
            logger.warning(f"Step {step} was not pushed: {reason} Training goes on.")
        finally:
            shutil.rmtree(place, ignore_errors=True)


def push_run(
    args: SaeTrainingArguments, publisher: Publisher | None, heads: list[str], message: str, **kwargs: Any
) -> Pushed:
    """
    Releases a run's folder, after the pushes of its checkpoints, within `hub_timeout`.

    Args:
        args (`SaeTrainingArguments`): The run's settings.
        publisher ([`Publisher`], *optional*): The publisher that pushed during the run, if there was one.
        heads (`list[str]`): Names of the run's heads.
        message (`str`): Message of the commit.
        kwargs (*optional*): `revision` and `token`, as in [`Release.push`].

    Raises:
        `InputError`: if the Hub refuses, fails, cannot be reached or takes too long.
    """
    repo_id = hub_repo(args) if publisher is None else publisher.repo_id
    by_hand = f"python -m sae_accel.push {args.output_dir} {repo_id}"
    signals.words = lambda: f"Everything is saved in {args.output_dir}, but the push was stopped. To go on: {by_hand}"
    deadline = time.monotonic() + args.hub_timeout
    if publisher is not None:
        publisher.finish(deadline=deadline)
    try:
        release = Release(Path(args.output_dir), repo_id, include=heads)
        was_opened = publisher is not None
        push = _Line().submit(
            lambda: release.push(private=args.hub_private_repo, message=message, was_opened=was_opened, **kwargs)
        )
        if wait([push], timeout=max(0.0, deadline - time.monotonic())).not_done:
            raise InputError(f"{repo_id!r}: the push was stopped after training.hub_timeout = {args.hub_timeout:g} s.")
        return push.result()
    except InputError as error:
        raise InputError(f"{error} The heads are in {args.output_dir}. To push them: {by_hand}") from error


class _Line:
    """Runs functions one after the other in a daemon thread, which does not hold up the end of the process."""

    def __init__(self) -> None:
        self._waiting: SimpleQueue[tuple[Callable[[], Any], Future]] = SimpleQueue()
        self._is_at_work = False

    def submit(self, work: Callable[[], T]) -> "Future[T]":
        """Runs `work` after all earlier functions, and returns its future, as in `concurrent.futures`."""
        future: Future[T] = Future()
        self._waiting.put((work, future))
        if not self._is_at_work:
            self._is_at_work = True
            threading.Thread(target=self._do, name="push", daemon=True).start()
        return future

    def _do(self) -> None:
        while True:
            work, future = self._waiting.get()
            try:
                future.set_result(work())
            except Exception as error:
                future.set_exception(error)


def _link(source: str, target: str) -> None:
    # Not every file system has hard links.
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def hub_repo(args: SaeTrainingArguments) -> str:
    """
    The repo that a run pushes to.

    Raises:
        `InputError`: if no `hub_model_id` is given, and no repo can have the name of `output_dir`.
    """
    if args.hub_model_id:
        return args.hub_model_id
    name = Path(args.output_dir).resolve().name
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise InputError(
            f"No repo on the Hub can have the name of training.output_dir, {name!r}. Set --training.hub_model_id."
        ) from error
    return name
