import sys
import time
from typing import Any

from tqdm.auto import tqdm
from transformers import DefaultFlowCallback, TrainerCallback, TrainerControl, TrainerState

from ..recipe.arguments import SaeTrainingArguments


# The overrides are typed with our own arguments, which transformers does not know: hence `type: ignore`.
class FlowCallback(DefaultFlowCallback):
    """Decides after each step whether to log, evaluate, save or stop, by `logging_steps`, `save_steps` and so on."""

    def on_step_end(  # type: ignore[override]
        self, args: SaeTrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Sets the control's flags; the run always logs and saves its last step."""
        step = state.global_step
        last = step >= state.max_steps
        control.should_log = control.should_log or step % args.logging_steps == 0 or last
        control.should_save = control.should_save or step % args.save_steps == 0 or last
        if args.eval_steps and step % args.eval_steps == 0:
            control.should_evaluate = True
        if last:
            control.should_training_stop = True
        return control


class ProgressBar(TrainerCallback):
    """Shows a progress bar on a terminal, and elsewhere one line per log, with tokens/s and the time left."""

    def __init__(self) -> None:
        self.bar: tqdm | None = None

    def on_train_begin(  # type: ignore[override]
        self, args: SaeTrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Opens the bar."""
        if not state.is_world_process_zero:
            return
        self.started, self.tokens_before, self.steps_before = (
            time.monotonic(),
            state.num_input_tokens_seen,
            state.global_step,
        )
        if sys.stderr.isatty():
            self.bar = tqdm(
                total=state.max_steps, initial=state.global_step, desc="Training", unit="step", dynamic_ncols=True
            )

    def on_step_end(  # type: ignore[override]
        self, args: SaeTrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Moves the bar."""
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)
            self.bar.set_postfix_str(f"{self._speed(state):,.0f} tokens/s", refresh=False)

    def on_log(  # type: ignore[override]
        self,
        args: SaeTrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict | None = None,
        **kwargs: Any,
    ) -> None:
        """Shows the LM's loss, or the mean FVU of the heads."""
        if not logs or not state.is_world_process_zero:
            return
        if "initial/ce" in logs:
            before = f"cross-entropy {logs['initial/ce']:.4f} with the heads, {logs['initial/ce_clean']:.4f} without"
            tqdm.write(f"step 0/{state.max_steps}  {before}", file=sys.stderr)
            return
        loss = _headline(logs)
        if loss is None:
            return
        if self.bar is not None:
            self.bar.set_description(f"Training, {loss}")
            return
        left = (time.monotonic() - self.started) / (state.global_step - self.steps_before)
        left *= state.max_steps - state.global_step
        print(
            f"step {state.global_step}/{state.max_steps}  {loss}  {self._speed(state):,.0f} tokens/s  "
            f"{left:.0f} s left",
            file=sys.stderr,
            flush=True,
        )

    def on_train_end(  # type: ignore[override]
        self, args: SaeTrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Closes the bar."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def _speed(self, state: TrainerState) -> float:
        return (state.num_input_tokens_seen - self.tokens_before) / (time.monotonic() - self.started)


def _headline(logs: dict[str, float]) -> str | None:
    """The name and value of the loss that a run trains with; None if the logs do not hold it."""
    for key, name in (("train/kl", "KL"), ("train/ce", "CE")):
        if key in logs:
            return f"{name} {logs[key]:.4f}"
    fvus = [value for key, value in logs.items() if key.startswith("train/fvu/")]
    return f"FVU {sum(fvus) / len(fvus):.4f}" if fvus else None
