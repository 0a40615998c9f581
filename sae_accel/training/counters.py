"""
The numbers between two logs: steps, tokens, means of the logged values, and how often each latent is active.

A latent is silent if it is active on no token of a log; it is dead if it is not active for `dead_after_tokens` tokens.
"""

import math

from torch import Tensor

from .run_state import RunState
from .step import StepResult


class Counters:
    """
    Counts steps, tokens and active latents, and averages values between two logs.

    Args:
        run ([`RunState`]): The run, whose counts are updated.

    Attributes:
        frequencies (`dict[str, torch.Tensor]`): By head, the fraction of the tokens of the last log or evaluation on
            which each latent was active, `(num_latents,)`.
        silent (`dict[str, float]`): By `train/silent/<head>`, the fraction of latents that were active on no token
            between the last two logs.
    """

    def __init__(self, run: RunState):
        self.run = run
        self.frequencies: dict[str, Tensor] = {}
        self.silent: dict[str, float] = {}
        self._k: dict[str, int] = {}

    def add(self, result: StepResult, k: dict[str, int], num_tokens: int) -> None:
        """
        Counts a step that was taken.

        Args:
            result ([`StepResult`]): The measurements of the step.
            k (`dict[str, int]`): By head, the number of active latents per token.
            num_tokens (`int`): Trained tokens of all processes.
        """
        for name, uses in result.uses.items():  # (num_latents,)
            self.run.tokens_since_fired[name].add_(result.head_tokens[name].long()).masked_fill_(uses > 0, 0)
        self.run.means.add(result.values)
        self.run.firing.add(result.uses, result.head_tokens)
        self.run.progress.global_step += 1
        self.run.progress.num_input_tokens_seen += num_tokens
        self._k = k

    def skip(self) -> None:
        """Counts a skipped step: a step of the run that trained nothing."""
        self.run.progress.global_step += 1

    def flush(self) -> dict[str, float]:
        """Returns the values to log, as means over the steps since the last log, and starts new means."""
        values = self.run.means.flush()
        self.frequencies = self.run.firing.flush()
        values |= {f"train/k/{name}": float(value) for name, value in self._k.items()}
        values |= {f"learning_rate/{group['role'].head}": float(group["lr"]) for group in self._groups()}
        self.silent = self.run.spread.merged(self._silent_fractions())
        values = self.run.spread.merged(values) | self.silent
        values |= {f"train/dead/{name}": value for name, value in self.dead_fractions().items()}
        values["train/tokens"] = self.run.progress.num_input_tokens_seen
        values["train/non_finite_tokens"] = self.run.skips.non_finite_tokens
        if self.run.skips.steps:
            values["train/skipped_steps"] = self.run.skips.steps
        return values

    def totals(self, tokens_before: int, seconds: float) -> dict[str, float]:
        """
        The totals of a run at its end.

        Args:
            tokens_before (`int`): Tokens that had trained before this session, with an earlier checkpoint.
            seconds (`float`): Duration of this session.
        """
        tokens = self.run.progress.num_input_tokens_seen
        totals: dict[str, float] = {"train/tokens": tokens}
        if tokens > tokens_before:
            totals["train/tokens_per_second"] = (tokens - tokens_before) / seconds
        # A run that resumes from its last step logs nothing itself, so the checkpoint's log counts.
        latest = self.run.progress.log_history[-1:]
        silent = self.silent or {k: v for log in latest for k, v in log.items() if k.startswith("train/silent/")}
        return totals | {f"train/dead/{name}": part for name, part in self.dead_fractions().items()} | silent

    def dead_fractions(self) -> dict[str, float]:
        """The fraction of dead latents of each head: latents not active for the last `dead_after_tokens` tokens."""
        spread, plans = self.run.spread, self.run.plans
        dead = {name: spread.over_latents(self._silent(name).sum()).item() for name in self.run.tokens_since_fired}
        return spread.merged({name: count / plans[name].config.num_latents for name, count in dead.items()})

    def dead_masks(self) -> dict[str, Tensor]:
        """Masks of dead latents, `(num_latents,)`, of each head that has AuxK and a dead latent on any process."""
        counted = self.run.tokens_since_fired
        masks = {name: self._silent(name) for name in counted if self.run.plans[name].arguments.auxk_alpha}
        return {name: mask for name, mask in masks.items() if self.run.spread.over_latents(mask.sum()) > 0}

    def _silent_fractions(self) -> dict[str, float]:
        spread, plans = self.run.spread, self.run.plans
        counts = {name: spread.over_latents((uses == 0).sum()).item() for name, uses in self.frequencies.items()}
        return {f"train/silent/{name}": count / plans[name].config.num_latents for name, count in counts.items()}

    def last_loss(self) -> float:
        """The loss in the latest log: the LM's loss, or the mean FVU over the heads."""
        history, loss = self.run.progress.log_history, self.run.args.loss
        prefix = "train/fvu/" if loss == "fvu" else f"train/{loss}"
        losses = [value for key, value in (history[-1] if history else {}).items() if key.startswith(prefix)]
        return sum(losses) / len(losses) if losses else math.nan

    def _silent(self, name: str) -> Tensor:
        """A mask, `(num_latents,)`, of the latents that have been silent long enough to count as dead."""
        return self.run.tokens_since_fired[name] > self.run.plans[name].arguments.dead_after_tokens

    def _groups(self) -> list[dict]:
        return [] if self.run.optimizer is None else self.run.optimizer.param_groups
