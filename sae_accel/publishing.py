import os
import shutil
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from accelerate.logging import get_logger
from transformers import TrainerCallback, TrainerControl, TrainerState

from .arguments import SaeTrainingArguments
from .errors import InputError
from .hub import AGAIN, Release, open_repo


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
        self.strategy = args.hub_strategy
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="push")
        self._pushes: list[Future] = []

    def on_save(self, args: SaeTrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """
        Begins to push a checkpoint's heads. While an earlier push is at work, one that is not the last is left out,
        unless every checkpoint is to be pushed.
        """
        last = control.should_training_stop
        if self.strategy == "end" or last and not self._pushes_checkpoints:
            return
        busy = bool(self._pushes) and not self._pushes[-1].done()
        if busy and not last and self.strategy != "all_checkpoints":
            return
        name = f"checkpoint-{state.global_step}"
        place = Path(args.output_dir) / f".{name}.pushing"
        shutil.rmtree(place, ignore_errors=True)
        # Links, since the checkpoint may be deleted before it has arrived.
        shutil.copytree(Path(args.output_dir) / name, place, copy_function=_link)
        self._pushes.append(self._worker.submit(self._push, place, name, state.global_step))

    def finish(self) -> None:
        """Waits for pushes that are at work."""
        wait(self._pushes)
        for push in self._pushes:
            if (error := push.exception()) is not None:
                logger.warning(f"A push ended with {type(error).__name__}: {error}")
        self._pushes = []

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


def _link(source: str, target: str) -> None:
    # Not every file system has links.
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def hub_repo(args: SaeTrainingArguments) -> str:
    """The repo that a run pushes to."""
    return args.hub_model_id or Path(args.output_dir).resolve().name
