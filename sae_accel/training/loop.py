"""
The loop of optimizer steps, between a run's first step and its last.

[`SaeTrainer`] inherits this loop: the trainer builds the parts and has the public methods, and this file calls them in
order. After each step the callbacks say whether to log, evaluate or save. A signal ends the loop only at points where
all processes look for it together, so that all save the same step.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import chain, islice

from accelerate import Accelerator
from torch import Tensor
from transformers import TrainerControl
from transformers.trainer_callback import CallbackHandler

from ..common.signals import signals
from ..data.batches import Batches, Position, Window
from ..data.collate import Rows
from ..hub.publisher import Publisher
from ..recipe.arguments import SaeTrainingArguments
from .assembly import Objective
from .counters import Counters
from .finite_steps import FiniteSteps
from .interruption import Interruption
from .run_state import RunState
from .saving import Saver


class TrainingLoop(ABC):
    """The loop of a trainer: it takes steps, logs, evaluates and saves. The trainer sets every attribute."""

    args: SaeTrainingArguments
    accelerator: Accelerator
    run_state: RunState
    objective: Objective
    saver: Saver
    counters: Counters
    finite_steps: FiniteSteps
    callback_handler: CallbackHandler
    control: TrainerControl
    publisher: Publisher | None
    eval_dataset: Rows | None
    pad_token_id: int
    _interruption: Interruption
    _position: Position
    # The step and the metrics of the latest evaluation.
    _measured: tuple[int, dict[str, float]] | None

    @abstractmethod
    def training_step(self, window: list[dict[str, Tensor]]) -> None:
        """Takes one optimizer step on the batches of an accumulation window."""

    @abstractmethod
    def evaluate(self, eval_dataset: Rows | None = None) -> dict[str, float]:
        """Measures the heads on held-out rows."""

    def _tell(self, event: str, *values: dict[str, float]) -> None:
        """Calls an event of the callbacks."""
        # By name, because transformers types the arguments as its own class.
        call = getattr(self.callback_handler, event)
        self.control = call(self.args, self.run_state.progress, self.control, *values)

    def _batches(self, dataset: Rows | None) -> Batches:
        return Batches(dataset, self.args, self.accelerator, self.pad_token_id)

    def _windows(self, batches: Batches) -> Iterator[Window]:
        """The batches of each step. The first window is read at once, before the clock of the training time starts."""
        progress = self.run_state.progress
        windows = self.saver.saved_before_errors(batches.windows(self._position), partial(self._saved, anew=True))
        first = islice(windows, 1) if progress.global_step < progress.max_steps else ()
        return chain(list(first), windows)

    def _take_steps(self, windows: Iterator[Window]) -> dict[str, float]:
        """Trains to the end and evaluates. A signal to one process raises `Abandoned` on all."""
        progress = self.run_state.progress
        if self.run_state.owes_evaluation and self.eval_dataset is not None:
            self._evaluate_and_keep_best()
        while progress.global_step < progress.max_steps and not self.control.should_training_stop:
            self._interruption.check()
            window, after = next(windows)
            self.training_step(window)
            self._position = after
            self._tell("on_step_end")
            self._act_on_control()
        self._tell("on_train_end")
        step, metrics = self._measured or (None, {})
        if step != progress.global_step and self.eval_dataset is not None:
            metrics = self._evaluate_and_keep_best()
        self._interruption.check()
        return metrics

    def _act_on_control(self) -> None:
        """Logs, evaluates and saves if the callbacks asked for it."""
        if self.control.should_log or self.control.should_save:
            self.finite_steps.check_weights()
        if self.control.should_log:
            self._write_log()
        if self.control.should_evaluate and self.eval_dataset is not None:
            self.run_state.owes_evaluation = True
            self._evaluate_and_keep_best()
        if self.control.should_save:
            self._interruption.check()
            self._save_checkpoint()

    def _save_checkpoint(self) -> None:
        folder = self.saver.checkpoint(self._position)
        self.control.should_save = False
        if folder is not None:
            self._tell("on_save")

    def _saved(self, signal_number: int | None = None, anew: bool = False) -> str:
        """Saves the present step if it is not saved yet, or `anew`. Returns the sentence that says where."""
        if anew or self.saver.newest is None:
            self.finite_steps.check_weights()
            self._save_checkpoint()
        if self.publisher:
            self.publisher.finish(release_follows=False, signal_number=signal_number)
        return self.saver.where(signals.words)

    def _write_log(self) -> None:
        values = self.counters.flush()
        self.saver.log(values)
        self._tell("on_log", values)

    def _measure(self, batches: Iterable[dict[str, Tensor]]) -> dict[str, float]:
        with self.run_state.evaluated_weights():
            return self.objective.evaluate(self.run_state.prepared_bank, self._interruption.watched(batches))

    def _measure_start(self, batches: Batches) -> None:
        """Measures the LM's losses before training: on held-out rows, or without them on the first step's rows."""
        rows: Iterable[dict[str, Tensor]]
        if self.eval_dataset is None:
            rows, _ = next(batches.windows(Position()))
        else:
            rows = self._batches(self.eval_dataset).one_pass(drop_last=False)
        metrics = self._measure(rows)
        initial = {key.replace("eval/", "initial/"): value for key, value in metrics.items()}
        self.run_state.initial_metrics.update(initial)
        self.saver.show(initial)
        self._tell("on_log", initial)

    def _evaluate_and_keep_best(self) -> dict[str, float]:
        metrics = self.evaluate()
        self.run_state.lowest.observe(metrics, self.run_state.progress.global_step)
        if self.args.save_best:
            self.finite_steps.check_weights()
            self.saver.keep_best(metrics)
        self.run_state.owes_evaluation = False
        self._measured = self.run_state.progress.global_step, metrics
        return metrics
