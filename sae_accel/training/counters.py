import math

from torch import Tensor

from .run_state import RunState
from .step import StepResult


class Counters:
    """
    What is counted and averaged from one log to the next.

    Args:
        run ([`RunState`]): The run, whose steps, tokens and silent latents are counted.

    Attributes:
        frequencies (`dict[str, torch.Tensor]`): By head, the part of the tokens of the last log or evaluation on which
            each latent was active, `(num_latents,)`.
        silent (`dict[str, float]`): By `train/silent/<head>`, the part of all latents that were active on none of the
            tokens between the last two logs.
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
            result ([`StepResult`]): What it was taken on.
            k (`dict[str, int]`): By head, latents that were active for each token.
            num_tokens (`int`): Tokens of all processes that trained.
        """
        for name, uses in result.uses.items():
            self.run.tokens_since_fired[name].add_(result.head_tokens[name].long()).masked_fill_(uses > 0, 0)
        self.run.means.add(result.values)
        self.run.firing.add(result.uses, result.head_tokens)
        self.run.progress.global_step += 1
        self.run.progress.num_input_tokens_seen += num_tokens
        self._k = k

    def skip(self) -> None:
        """Counts a step that was passed over, as one of the run's that trained nothing."""
        self.run.progress.global_step += 1

    def flush(self) -> dict[str, float]:
        """The values to log, which are means over the steps since the last log; what comes after is counted anew."""
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
        What a run has come to at its end.

        Args:
            tokens_before (`int`): Tokens that had trained when this session began.
            seconds (`float`): How long it took.
        """
        tokens = self.run.progress.num_input_tokens_seen
        totals: dict[str, float] = {"train/tokens": tokens}
        if tokens > tokens_before:
            totals["train/tokens_per_second"] = (tokens - tokens_before) / seconds
        # A run that goes on from its last step logs nothing of its own.
        latest = self.run.progress.log_history[-1:]
        silent = self.silent or {k: v for log in latest for k, v in log.items() if k.startswith("train/silent/")}
        return totals | {f"train/dead/{name}": part for name, part in self.dead_fractions().items()} | silent

    def dead_fractions(self) -> dict[str, float]:
        """By head, the part of latents that have not been active for the entry's `dead_after_tokens`."""
        spread, plans = self.run.spread, self.run.plans
        dead = {name: spread.over_latents(self._silent(name).sum()).item() for name in self.run.tokens_since_fired}
        return spread.merged({name: count / plans[name].config.num_latents for name, count in dead.items()})

    def dead_masks(self) -> dict[str, Tensor]:
        """Dead latents of the heads that have AuxK and some of them dead, on this process or another."""
        counted = self.run.tokens_since_fired
        masks = {name: self._silent(name) for name in counted if self.run.plans[name].arguments.auxk_alpha}
        return {name: mask for name, mask in masks.items() if self.run.spread.over_latents(mask.sum()) > 0}

    def _silent_fractions(self) -> dict[str, float]:
        spread, plans = self.run.spread, self.run.plans
        counts = {name: spread.over_latents((uses == 0).sum()).item() for name, uses in self.frequencies.items()}
        return {f"train/silent/{name}": count / plans[name].config.num_latents for name, count in counts.items()}

    def last_loss(self) -> float:
        """In the latest log, the LM's loss, or the mean FVU over the heads."""
        history, loss = self.run.progress.log_history, self.run.args.loss
        prefix = "train/fvu/" if loss == "fvu" else f"train/{loss}"
        losses = [value for key, value in (history[-1] if history else {}).items() if key.startswith(prefix)]
        return sum(losses) / len(losses) if losses else math.nan

    def _silent(self, name: str) -> Tensor:
        """The latents of a head of this process that have been silent for long enough to count as dead."""
        return self.run.tokens_since_fired[name] > self.run.plans[name].arguments.dead_after_tokens

    def _groups(self) -> list[dict]:
        return [] if self.run.optimizer is None else self.run.optimizer.param_groups
