import os
import shutil
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from accelerate.logging import get_logger
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers import TrainerCallback, TrainerControl, TrainerState

from ..common.errors import AGAIN, InputError, one_line
from ..common.signals import signals
from ..recipe.arguments import SaeTrainingArguments
from .release import Pushed, Release, open_repo


logger = get_logger(__name__)


class Publisher(TrainerCallback):
    """
    Pushes heads as they are saved, while training goes on. A push that fails is said in one line, and costs nothing.

    Args:
        args (`SaeTrainingArguments`): Where to push, and what when.

    Raises:
        `InputError`: if the repo cannot be made or written to.
    """

    def __init__(self, args: SaeTrainingArguments):
        self.repo_id = open_repo(hub_repo(args), private=args.hub_private_repo)
        self.strategy, self.output_dir = args.hub_strategy, Path(args.output_dir)
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="push")
        self._pushes: list[Future] = []
        # The step of the newest checkpoint, if that was left out.
        self._left_out: int | None = None

    def on_save(  # type: ignore[override]
        self, args: SaeTrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """
        Begins to push a checkpoint's heads. While an earlier push is at work, one that is not the last is left out,
        unless every checkpoint is to be pushed.
        """
        last = control.should_training_stop
        if self.strategy == "end":
            return
        busy = bool(self._pushes) and not self._pushes[-1].done()
        if (busy and not last and self.strategy != "all_checkpoints") or (last and not self._pushes_checkpoints):
            self._left_out = state.global_step
        else:
            self._begin(state.global_step)

    def finish(self, interrupted: bool = False) -> None:
        """
        Waits for pushes that are at work.

        Args:
            interrupted (`bool`): Whether no release follows, so that the newest checkpoint has to be pushed even if it
                was left out.
        """
        if interrupted and not all(push.done() for push in self._pushes):
            logger.warning("Waiting until the last checkpoint has been pushed. Once more to stop at once.")
        wait(self._pushes)
        if interrupted and self._left_out is not None:
            self._begin(self._left_out)
            wait(self._pushes)
        for push in self._pushes:
            if (error := push.exception()) is not None:
                logger.warning(f"A push ended with {type(error).__name__}: {error}")
        self._pushes = []

    def _begin(self, step: int) -> None:
        name = f"checkpoint-{step}"
        place = self.output_dir / f".{name}.pushing"
        shutil.rmtree(place, ignore_errors=True)
        self._left_out = step
        try:
            # Links, since the checkpoint may be deleted before it has arrived.
            shutil.copytree(self.output_dir / name, place, copy_function=_link)
        except OSError as error:
            shutil.rmtree(place, ignore_errors=True)
            logger.warning(f"Step {step} was not pushed: {one_line(error)}. Training goes on.")
            return
        self._left_out = None
        self._pushes.append(self._worker.submit(self._push, place, name, step))

    @property
    def _pushes_checkpoints(self) -> bool:
        return self.strategy in ("checkpoint", "all_checkpoints")

    def _push(self, place: Path, name: str, step: int) -> None:
        folder = "last-checkpoint" if self.strategy == "checkpoint" else name
        files = sorted(path for path in place.rglob("*") if path.is_file()) if self._pushes_checkpoints else []
        extra = {f"{folder}/{path.relative_to(place)}": path for path in files}
        try:
            Release(place, self.repo_id).push(message=f"Training in progress, step {step}", extra=extra)
        except InputError as error:
            # Nobody need push again: the next save does.
            reason = str(error).removesuffix(AGAIN).rstrip()
            logger.warning(f"Step {step} was not pushed: {reason} Training goes on.")
        finally:
            shutil.rmtree(place, ignore_errors=True)


def push_run(
    args: SaeTrainingArguments, publisher: Publisher | None, heads: list[str], message: str, **kwargs: Any
) -> Pushed:
    """
    Releases what a run has saved in its folder, after the pushes that are at work.

    Args:
        args (`SaeTrainingArguments`): The run's.
        publisher ([`Publisher`], *optional*): What pushed while it went on.
        heads (`list[str]`): The run's heads.
        message (`str`): Of the commit.
        kwargs (*optional*): `revision` and `token`, as of [`Release.push`].

    Raises:
        `InputError`: if the Hub refuses or cannot be reached.
    """
    repo_id = hub_repo(args) if publisher is None else publisher.repo_id
    by_hand = f"python -m sae_accel.push {args.output_dir} {repo_id}"
    signals.words = lambda: f"All is saved in {args.output_dir}, but the push was stopped: {by_hand} goes on."
    if publisher is not None:
        publisher.finish()
    try:
        release = Release(Path(args.output_dir), repo_id, include=heads)
        return release.push(private=args.hub_private_repo, message=message, **kwargs)
    except InputError as error:
        raise InputError(f"{error} The heads are in {args.output_dir}: {by_hand} pushes them.") from error


def _link(source: str, target: str) -> None:
    # Not every file system has links.
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def hub_repo(args: SaeTrainingArguments) -> str:
    """
    The repo that a run pushes to.

    Raises:
        `InputError`: if it is to have the name of `output_dir`, and no repo can have that.
    """
    if args.hub_model_id:
        return args.hub_model_id
    name = Path(args.output_dir).resolve().name
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise InputError(
            f"No repo on the Hub can have the name of training.output_dir, {name!r}. Set training.hub_model_id."
        ) from error
    return name
