"""
A run takes only optimizer steps from finite numbers; this file decides which steps it takes.

A step first runs fast: it assumes that every number is finite, and checks that with a few sums on the device. If a
check fails, the step's gradients are computed again with care, without the tokens that are not finite. If too many
tokens are left out, or a loss or gradient is still not finite, the step is skipped. After ten skipped steps in a row
the run ends, since it would not recover. All processes decide alike, because they join their findings first.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..activations.trained_rows import NonFiniteAt
from ..bank.bank import LOSSES
from ..common.errors import NotFinite
from ..ops.finite import count_non_finite, first_non_finite
from ..ops.rows import own_part
from ..processes.agreement import gather_objects, say
from ..runs.checkpoint import newest_complete
from .run_state import RunState
from .step import StepResult


# The run ends after this many skipped steps in a row.
MOST_IN_A_ROW = 10


class Verdict(NamedTuple):
    """
    The decision about an optimizer step, the same on every process.

    Args:
        taken (`bool`): Whether the step is taken.
        num_tokens (`int`): The step's trained tokens, over all processes.
        overflows (`bool`): Whether the step is skipped because a gradient is not finite.
        is_sure (`bool`, defaults to `True`): Whether the decision is final; if not, the gradients are computed again
            with care.
    """

    taken: bool
    num_tokens: int
    overflows: bool
    is_sure: bool = True


@dataclass
class _Reason:
    """Why a step is skipped, in words, and the likely cause."""

    found: str
    cause: str


class FiniteSteps:
    """
    Takes or skips optimizer steps. A step is skipped if more than `training.max_non_finite` of its tokens are left
    out because an activation is NaN or infinite, or if a loss or a gradient is not finite. A skipped step changes no
    weight, optimizer state, learning rate, threshold or count of silent latents. It still counts as one of the run's
    steps, so that the run ends, and resumes from a checkpoint as if it had never stopped.

    If everything is finite, the check costs the host no further wait for the device: the findings arrive together with
    the step's number of tokens.

    Args:
        run ([`RunState`]): The run, which counts the skipped steps.
    """

    def __init__(self, run: RunState):
        self.run = run
        self._told = False
        self._has_lost = False

    def take(
        self, gradients: Callable[[bool], StepResult], optimizer: torch.optim.Optimizer
    ) -> tuple[StepResult, Verdict]:
        """
        Takes an optimizer step, or skips it.

        Args:
            gradients (`Callable[[bool], StepResult]`): Computes the step's gradients; with True, from finite numbers
                only.
            optimizer (`torch.optim.Optimizer`): The prepared optimizer.

        Returns:
            `tuple`: the measurements of the step, and the decision about it.

        Raises:
            `NotFinite`: on every process, at the tenth skipped step in a row.
        """
        # If the last step had numbers that are not finite, this one is likely to have some too: take care at once.
        for careful in (self._has_lost, True):
            result = gradients(careful)
            verdict = self.judge(result, optimizer)
            self.run.spread.step(optimizer, verdict.taken, verdict.overflows)
            if verdict.is_sure:
                break
        return result, verdict

    def judge(self, result: StepResult, optimizer: torch.optim.Optimizer) -> Verdict:
        """
        Decides whether to take a step whose gradients lie in the heads, and counts the tokens that were left out.

        Args:
            result ([`StepResult`]): The measurements of the step.
            optimizer (`torch.optim.Optimizer`): The prepared optimizer.

        Raises:
            `NotFinite`: on every process, at the tenth skipped step in a row.
        """
        run, spread = self.run, self.run.spread
        gradient, loss = spread.anywhere(  # () each, above zero if not finite on some process
            torch.stack([spread.non_finite_gradients(optimizer).float(), self._bad_loss(result)])
        )
        # The only place of a step where the host waits for the device.
        trained, lost, unsure, bad_gradient, bad_loss = torch.stack(
            [result.num_tokens, result.non_finite, result.unsure, gradient, loss]
        ).tolist()
        if unsure:
            return Verdict(False, int(trained), False, is_sure=False)
        run.skips.non_finite_tokens += int(lost)
        self._has_lost = bool(lost)
        bad = next((at for at in gather_objects(result.non_finite_at) if at is not None), None) if lost else None
        share = lost / max(1.0, trained + lost)
        if bad is not None and not self._told:
            self._told = True
            say(
                f"Step {run.progress.global_step + 1}: {int(lost):,} of {int(trained + lost):,} tokens are not finite "
                f"at {bad.place}. The run leaves them out, and counts them in train/non_finite_tokens."
            )
        if share <= run.args.max_non_finite and not bad_loss and not bad_gradient:
            run.skips.in_a_row = 0
            return Verdict(True, int(trained), False)
        scaler = run.accelerator.scaler
        if share <= run.args.max_non_finite and not bad_loss and scaler is not None and scaler.get_scale() > 1:
            # Float16 scales losses up until a gradient overflows: then it skips the step, and scales less.
            run.skips.steps += 1
            return Verdict(False, int(trained), True)
        if share > run.args.max_non_finite:
            self._pass_over(self._too_many(share, bad))
        else:
            self._pass_over(self._diverged(result, bool(bad_loss)))
        return Verdict(False, int(trained), bool(bad_gradient))

    def check_weights(self) -> None:
        """
        Checks every parameter that trains, before weights are saved.

        Raises:
            `NotFinite`: on every process, if one is not finite.
        """
        words = next((words for words in gather_objects(self._bad_weights()) if words is not None), None)
        if words is not None:
            head, found = words
            raise NotFinite(
                f"Step {self.run.progress.global_step}: {found}. {self._learning_rate(head)} {self._what_is_left()}"
            )

    def _bad_weights(self) -> tuple[str, str] | None:
        """The first head of this process with weights that are not finite, and a description of them; or None."""
        run = self.run
        optimized = [] if run.optimizer is None else run.spread.optimized(run.optimizer)
        weights = [(group["role"].head, group["role"].parameter, own_part(held.detach())) for group, held in optimized]
        weights += [(name, key, held) for name, head in run.heads.items() for key, held in head.named_buffers()]
        sums = [held.sum(dtype=torch.float32).to(run.accelerator.device) for _, _, held in weights]
        if not sums or bool(torch.stack(sums).isfinite().all()):
            return None
        for head, key, held in weights:
            if words := first_non_finite([(f"{key} of head {head!r}", held)]):
                return head, words
        return None

    def _bad_loss(self, result: StepResult) -> Tensor:
        """1 if a loss is not finite, otherwise 0, `()`."""
        losses = [value for key, value in result.values.items() if _is_loss(key)]
        return 1.0 - torch.stack(losses).isfinite().all().float() if losses else result.num_tokens.new_zeros(())

    def _pass_over(self, reason: _Reason) -> None:
        skips, step = self.run.skips, self.run.progress.global_step + 1
        skips.in_a_row += 1
        skips.steps += 1
        if skips.in_a_row >= MOST_IN_A_ROW:
            raise NotFinite(
                f"Step {step}: {MOST_IN_A_ROW} optimizer steps in a row were skipped. The last one: {reason.found}. "
                f"{reason.cause} {self._what_is_left()}"
            )
        if skips.in_a_row == 1:
            say(f"Step {step} is skipped: {reason.found}.")

    def _too_many(self, share: float, at: NonFiniteAt | None) -> _Reason:
        place, cause = ("a hookpoint", "") if at is None else (at.place, at.cause)
        allowed = self.run.args.max_non_finite
        return _Reason(
            f"{share:.1%} of its tokens are not finite at {place}, but training.max_non_finite allows {allowed:.4g}",
            cause,
        )

    def _diverged(self, result: StepResult, bad_loss: bool) -> _Reason:
        what = self._bad_loss_of(result) if bad_loss else self._bad_gradient_of()
        name, words = next((found for found in gather_objects(what) if found is not None), ("", "a gradient"))
        return _Reason(f"{words} is not finite, although the activations are", self._learning_rate(name))

    def _bad_loss_of(self, result: StepResult) -> tuple[str, str] | None:
        """The first head of this process with a loss that is not finite, and the loss's name; or None."""
        for key, value in result.values.items():
            if _is_loss(key) and not bool(value.isfinite()):
                _, part, *head = key.split("/", 2)
                return (head[0], f"{part} of head {head[0]!r}") if head else ("", f"the LM's {part}")
        return None

    def _bad_gradient_of(self) -> tuple[str, str] | None:
        assert self.run.optimizer is not None, "the run has begun"
        for role, gradient in self.run.spread.gradients(self.run.optimizer):
            if count_non_finite(gradient):
                return role.head, f"the gradient of {role.parameter} of head {role.head!r}"
        return None

    def _learning_rate(self, head: str) -> str:
        groups = [] if self.run.optimizer is None else self.run.optimizer.param_groups
        rates = [group.get("initial_lr", group["lr"]) for group in groups if group["role"].head == head]
        rates = rates or [group.get("initial_lr", group["lr"]) for group in groups]
        rate = f": it is {float(max(rates)):.3g}" if rates else ""
        return (
            f"The learning rate is probably too high{rate}. Set a lower --training.learning_rate, or a lower "
            "learning_rate in the head's entry."
        )

    def _what_is_left(self) -> str:
        newest = newest_complete(Path(self.run.args.output_dir))
        if newest is None:
            return "There is no checkpoint yet."
        return f"The newest complete checkpoint is {newest}."


def _is_loss(key: str) -> bool:
    """Whether a logged value is a loss that training minimises."""
    _, part, *_ = key.split("/")
    return part in (*LOSSES, "ce", "kl")
