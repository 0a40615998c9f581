import json
import math
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import DataLoaderConfiguration, ProjectConfiguration, gather_object, set_seed
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_callback import CallbackHandler
from transformers.trainer_utils import TrainOutput

from . import checkpoint as files
from .activations import Activations, RunningLM
from .arguments import HeadArguments, SaeTrainingArguments, secret_fields
from .bank import Moments, SaeBank
from .batches import Batches, Position
from .callbacks import FlowCallback, ProgressBar, k_at
from .errors import InputError
from .hookpoints import plan_heads
from .hooks import Site
from .interruption import Interruption
from .models import HeadModel
from .optim import Signum, build_optimizer, build_scheduler
from .running_means import RunningMeans, StepSums


class SaeTrainer:
    """
    Trains SAEs and transcoders on the activations of a frozen LM, with the feel of `transformers.Trainer`.

    Args:
        model (`PreTrainedModel`): The LM. It is frozen, and stops after the deepest hookpoint.
        args (`SaeTrainingArguments`): How to train.
        heads (`list[HeadArguments]`): What to train; a head for every layer's output if not given.
        train_dataset (`datasets.Dataset` or `datasets.IterableDataset`): Rows with `input_ids`, such as
            `chunk_and_tokenize` gives.
        eval_dataset (*optional*): Held-out rows of the same kind.
        exclude_tokens (`list[int]`, *optional*): Token ids that train nothing and count in no metric.
        processing_class (*optional*): The tokenizer, handed to callbacks.
        callbacks (`list[transformers.TrainerCallback]`, *optional*): Further callbacks.
        recipe (`Recipe`, *optional*): What is run, saved beside the heads.

    Raises:
        `InputError`: if a hookpoint does not exist, sizes disagree, or the data cannot fill a batch.

    Examples:
        ```python
        args = SaeTrainingArguments(output_dir="runs/gpt2")
        trainer = SaeTrainer(lm, args, [HeadArguments(hookpoints="h.*")], tokens)
        trainer.train()
        ```
    """

    def __init__(
        self,
        model: PreTrainedModel,
        args: SaeTrainingArguments,
        heads: list[HeadArguments] | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        *,
        exclude_tokens: Iterable[int] = (),
        processing_class: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        recipe: Any = None,
    ):
        self.args = args
        self.train_dataset, self.eval_dataset = train_dataset, eval_dataset
        self.recipe = recipe
        self.output_dir = Path(args.output_dir)
        self.accelerator = Accelerator(
            log_with=_trackers(args.report_to),
            project_config=ProjectConfiguration(
                project_dir=args.output_dir, logging_dir=str(self.output_dir / "logs")
            ),
            dataloader_config=DataLoaderConfiguration(even_batches=False),
            step_scheduler_with_optimizer=False,
        )
        set_seed(args.seed)
        plans = plan_heads(model, heads or [HeadArguments()])
        for plan in plans:
            plan.config.base_model_name_or_path = model.config.name_or_path or None
            plan.config.base_model_revision = getattr(model.config, "_commit_hash", None)
        if not hasattr(model, "hf_device_map") and not getattr(model, "is_quantized", False):
            model.to(self.accelerator.device)
        self.bank = SaeBank(plans)
        self.activations = RunningLM(model, self.bank.sites, list(exclude_tokens))
        self.pad_token_id = getattr(processing_class, "pad_token_id", None) or 0
        self.optimizer = self.lr_scheduler = None
        self.state = TrainerState(
            is_local_process_zero=self.accelerator.is_local_main_process,
            is_world_process_zero=self.accelerator.is_main_process,
        )
        self.control = TrainerControl()
        self.callback_handler = CallbackHandler(
            [FlowCallback(), *(callbacks or []), ProgressBar()], self.bank, processing_class, None, None
        )
        self.tokens_since_fired = {
            name: torch.zeros(head.num_latents, dtype=torch.long, device=self.accelerator.device)
            for name, head in self.bank.named_heads()
        }
        self._log = RunningMeans()
        self._interruption = Interruption()

    def add_callback(self, callback: TrainerCallback | type[TrainerCallback]) -> None:
        """Adds a `transformers.TrainerCallback`, or makes one of the class given."""
        self.callback_handler.add_callback(callback)

    @property
    def heads(self) -> dict[str, HeadModel]:
        """The heads by name."""
        return dict(self.accelerator.unwrap_model(self.bank).named_heads())

    @contextmanager
    def evaluated_weights(self) -> Iterator[None]:
        """While open, heads hold the weights that are evaluated and saved: with signum the averaged ones."""
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        with optimizer.averaged() if isinstance(optimizer, Signum) else nullcontext():
            yield

    def train(self, resume_from_checkpoint: bool | str | None = None) -> TrainOutput:
        """
        Trains, evaluates on the held-out rows, and saves the heads and `metrics.json` in `args.output_dir`.

        Args:
            resume_from_checkpoint (`bool` or `str`, *optional*): A checkpoint folder to go on from; `True` is the
                newest whole one of `args.output_dir`; `args.resume_from_checkpoint` if not given.

        Returns:
            `transformers.trainer_utils.TrainOutput`: steps done, mean FVU since the last log, and the metrics.

        Raises:
            `InputError`: if the output folder holds another run, the data cannot fill a batch, or the checkpoint
                cannot be used.
            `KeyboardInterrupt`: on Ctrl-C, after a checkpoint has been saved.
        """
        resume = self.args.resume_from_checkpoint if resume_from_checkpoint is None else resume_from_checkpoint
        checkpoint = files.where_to_begin(self.output_dir, resume, self.args.overwrite_output_dir)
        batches = self._batches(self.train_dataset)
        position = self._begin(batches, checkpoint)
        started, tokens_before = time.monotonic(), self.state.num_input_tokens_seen
        self.control = self.callback_handler.on_train_begin(self.args, self.state, self.control)
        with Interruption() as self._interruption:
            windows = batches.windows(position)
            while self.state.global_step < self.state.max_steps and not self.control.should_training_stop:
                window, position = next(windows)
                self.training_step(window)
                self.control = self.callback_handler.on_step_end(self.args, self.state, self.control)
                self._act_on_control(position)
        self.control = self.callback_handler.on_train_end(self.args, self.state, self.control)
        metrics = self.evaluate() if self.eval_dataset is not None else {}
        fvu = self._last_fvu()
        trained = self.state.num_input_tokens_seen - tokens_before
        metrics["train/tokens"] = self.state.num_input_tokens_seen
        metrics["train/tokens_per_second"] = trained / (time.monotonic() - started)
        metrics |= {f"train/dead/{name}": value for name, value in self.dead_fractions().items()}
        self.save_model()
        self._save_metrics(metrics)
        self.accelerator.end_training()
        return TrainOutput(self.state.global_step, fvu, metrics)

    def training_step(self, window: list[dict[str, Tensor]]) -> None:
        """
        One optimizer step on the batches of an accumulation window, from tokens to new weights.

        Every squared error is divided by the target's variance over the whole window and all processes. That is known
        only at its end, so gradients are taken with the first batch's variance and then scaled, which is exact.
        """
        bank = self.accelerator.unwrap_model(self.bank)
        k = {
            name: k_at(self.state.global_step, head.config, bank.plans[name].arguments)
            for name, head in bank.named_heads()
        }
        dead_masks = self._dead_masks()
        moments: dict[str, Moments] = {}
        reference: dict[str, Tensor] = {}
        step = StepSums()
        for i, batch in enumerate(window):
            activations = self.activations(batch)
            for name, new in self._target_moments(activations).items():
                moments[name] = moments[name].merge(new) if i else new
            reference = reference or {name: _positive(m.variance) for name, m in moments.items()}
            for j, part in enumerate(activations.split(self.args.micro_batches)):
                with self._synchronize(i == len(window) - 1 and j == self.args.micro_batches - 1):
                    output = self.bank(part.by_site, reference, k, dead_masks)
                    # DDP takes the mean over processes, where the loss is a sum over all their tokens.
                    self.accelerator.backward(output["loss"] * self.accelerator.num_processes)
                step.add(output["heads"])
        scale = {name: reference[name] / _positive(m.variance) for name, m in moments.items()}
        if len(window) > 1:
            self._scale_gradients(scale)
        self._clip_gradients()
        self.optimizer.step()
        self.lr_scheduler.step()
        self.optimizer.zero_grad()
        self._count(step, scale, moments, k)

    def evaluate(self, eval_dataset: Any = None) -> dict[str, float]:
        """
        FVU, L0 and the part of latents that stay silent, by head, on held-out rows, with the weights that are saved.

        Args:
            eval_dataset (*optional*): Rows to use instead of the trainer's.

        Returns:
            `dict[str, float]`: `eval/fvu/<head>`, `eval/l0/<head>`, `eval/silent/<head>`, and `eval/tokens`.

        Raises:
            `InputError`: if there are no held-out rows.
        """
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if dataset is None:
            raise InputError(
                "There are no held-out sequences to evaluate on. Give eval_dataset, or set data.eval_examples."
            )
        bank = self.accelerator.unwrap_model(self.bank)
        k = {name: head.config.k for name, head in bank.named_heads()}
        unit = {name: torch.ones((), device=self.accelerator.device) for name in k}
        moments: dict[str, Moments] = {}
        sums = StepSums()
        with torch.no_grad(), self.evaluated_weights():
            for i, batch in enumerate(self._batches(dataset).one_pass(drop_last=False)):
                activations = self.activations(batch)
                for name, new in self._target_moments(activations).items():
                    moments[name] = moments[name].merge(new) if i else new
                for part in activations.split(self.args.micro_batches):
                    sums.add(bank(part.by_site, unit, k, {})["heads"])
        metrics = self._evaluation(sums, moments)
        self.accelerator.log(metrics, step=self.state.global_step)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def save_model(self, output_dir: str | None = None) -> None:
        """Writes the heads, and the recipe if there is one, into `output_dir`, by default that of the arguments."""
        folder = Path(output_dir or self.args.output_dir)
        with self.evaluated_weights():
            if self.accelerator.is_main_process:
                files.save_heads(self.heads, folder)
                if self.recipe is not None:
                    self.recipe.save(folder / "recipe.yaml")
        self.accelerator.wait_for_everyone()

    def dead_fractions(self) -> dict[str, float]:
        """By head, the part of latents that have not been active for the entry's `dead_after_tokens`."""
        plans = self.accelerator.unwrap_model(self.bank).plans
        return {
            name: (count > plans[name].arguments.dead_after_tokens).float().mean().item()
            for name, count in self.tokens_since_fired.items()
        }

    def _begin(self, batches: Batches, checkpoint: Path | None) -> Position:
        """Makes everything ready, from the start or from a checkpoint, and says where in the data to go on."""
        state = None if checkpoint is None else files.load_state(checkpoint, self.accelerator.device)
        self.state.max_steps = batches.max_steps()
        if state is None:
            self._initialize_biases(batches)
        else:
            self._check_fits(checkpoint, state)
        if checkpoint is None and self.accelerator.is_main_process:
            files.delete_run(self.output_dir)
        self.optimizer = build_optimizer(self.bank, self.args)
        self.lr_scheduler = build_scheduler(self.optimizer, self.args, self.state.max_steps)
        self.bank, self.optimizer = self.accelerator.prepare(self.bank, self.optimizer)
        self.callback_handler.optimizer, self.callback_handler.lr_scheduler = self.optimizer, self.lr_scheduler
        position = Position() if state is None else self._restore(checkpoint, state)
        self._start_trackers()
        return position

    def _batches(self, dataset: Any) -> Batches:
        return Batches(dataset, self.args, self.accelerator, self.pad_token_id)

    def _initialize_biases(self, batches: Batches) -> None:
        """From the first step's batches in which some token trains, over all processes."""
        moments: dict[Site, Moments] = {}
        for window, position in batches.windows(Position()):
            if position.epoch:
                raise InputError("No token of the training data trains: padding and data.exclude_tokens leave none.")
            for batch in window:
                for site, rows in self.activations(batch).by_site.items():
                    new = self._reduce(Moments.of(rows))
                    moments[site] = moments[site].merge(new) if site in moments else new
            if all(m.count > 0 for m in moments.values()):
                break
        for name, head in self.bank.named_heads():
            plan = self.bank.plans[name]
            head.to(self.accelerator.device)
            head.initialize_biases(moments[plan.reads].mean, moments[plan.predicts].mean)

    def _target_moments(self, activations: Activations) -> dict[str, Moments]:
        """By head, of its target over all processes; heads at one site share the work."""
        plans = self.accelerator.unwrap_model(self.bank).plans
        targets = dict.fromkeys(plan.predicts for plan in plans.values())
        moments = {site: self._reduce(Moments.of(activations.by_site[site])) for site in targets}
        return {name: moments[plan.predicts] for name, plan in plans.items()}

    def _reduce(self, moments: Moments) -> Moments:
        if self.accelerator.num_processes == 1:
            return moments
        count = self.accelerator.reduce(moments.count, "sum")
        mean = self.accelerator.reduce(moments.mean * moments.count, "sum") / count.clamp_min(1)
        between = moments.count * (moments.mean - mean).pow(2).sum()
        return Moments(count, mean, self.accelerator.reduce(moments.variance + between, "sum"))

    def _dead_masks(self) -> dict[str, Tensor]:
        """Dead latents of the heads that have AuxK and some of them dead."""
        plans = self.accelerator.unwrap_model(self.bank).plans
        masks = {
            name: count > plans[name].arguments.dead_after_tokens
            for name, count in self.tokens_since_fired.items()
            if plans[name].arguments.auxk_alpha
        }
        return {name: mask for name, mask in masks.items() if mask.any()}

    def _synchronize(self, last: bool) -> Any:
        """Gradients meet across processes in the last backward pass of a step only."""
        self.accelerator.sync_gradients = last
        return nullcontext() if last else self.accelerator.no_sync(self.bank)

    def _scale_gradients(self, scale: dict[str, Tensor]) -> None:
        for name, head in self.heads.items():
            for parameter in head.parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(scale[name])

    def _clip_gradients(self) -> None:
        """Head by head, so that one head's update never depends on another's."""
        if self.args.max_grad_norm is not None:
            for head in self.heads.values():
                self.accelerator.clip_grad_norm_(head.parameters(), self.args.max_grad_norm)

    def _count(self, step: StepSums, scale: dict[str, Tensor], moments: dict[str, Moments], k: dict[str, int]) -> None:
        """Counts steps, tokens and silent latents, and keeps what will be logged."""
        step.reduce(self.accelerator)
        values: dict[str, Tensor] = {}
        for name, sums in step.by_head.items():
            tokens = moments[name].count
            for part in ("fvu", "auxk_loss", "multi_topk_fvu"):
                if part in sums:
                    values[f"train/{part}/{name}"] = sums[part] * scale[name]
            values[f"train/l0/{name}"] = sums["active"] / tokens.clamp_min(1)
            since = self.tokens_since_fired[name]
            since.add_(tokens.long()).masked_fill_(sums["uses"] > 0, 0)
        self._log.add(values)
        self.state.global_step += 1
        self.state.num_input_tokens_seen += int(tokens)
        self._k = k

    def _act_on_control(self, position: Position) -> None:
        """Logs, evaluates and saves where callbacks asked for it; after a signal, saves and stops."""
        if self.control.should_log:
            self._write_log()
        if self.control.should_evaluate and self.eval_dataset is not None:
            self.evaluate()
        if self.control.should_save or self._interruption.requested:
            folder = self._save_checkpoint(position)
        if self._interruption.requested:
            raise KeyboardInterrupt(f"Stopped after step {self.state.global_step}. Saved {folder}.")

    def _write_log(self) -> None:
        values = self._log.flush()
        values |= {f"train/dead/{name}": value for name, value in self.dead_fractions().items()}
        values |= {f"train/k/{name}": float(value) for name, value in self._k.items()}
        values |= {f"learning_rate/{group['head']}": float(group["lr"]) for group in self.optimizer.param_groups}
        values["train/tokens"] = self.state.num_input_tokens_seen
        self.accelerator.log(values, step=self.state.global_step)
        self.state.log_history.append({**values, "step": self.state.global_step})
        self.control = self.callback_handler.on_log(self.args, self.state, self.control, values)

    def _evaluation(self, sums: StepSums, moments: dict[str, Moments]) -> dict[str, float]:
        sums.reduce(self.accelerator)
        metrics = {}
        for name, values in sums.by_head.items():
            metrics[f"eval/fvu/{name}"] = (values["fvu"] / _positive(moments[name].variance)).item()
            metrics[f"eval/l0/{name}"] = (values["active"] / moments[name].count).item()
            metrics[f"eval/silent/{name}"] = (values["uses"] == 0).float().mean().item()
            metrics["eval/tokens"] = int(moments[name].count)
        return metrics

    def _last_fvu(self) -> float:
        """Mean FVU over the heads in the latest log."""
        latest = self.state.log_history[-1] if self.state.log_history else {}
        fvus = [value for key, value in latest.items() if key.startswith("train/fvu/")]
        return sum(fvus) / len(fvus) if fvus else math.nan

    def _save_metrics(self, metrics: dict[str, float]) -> None:
        if self.accelerator.is_main_process:
            (self.output_dir / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")

    def _start_trackers(self) -> None:
        hidden = secret_fields(self.args)
        config = {
            key: value
            for key, value in asdict(self.args).items()
            if key not in hidden and isinstance(value, (int, float, str, bool))
        }
        self.accelerator.init_trackers(self.args.run_name or self.output_dir.resolve().name, config=config)

    def _save_checkpoint(self, position: Position) -> Path:
        """Everything that going on needs, complete or absent."""
        folder = self.output_dir / f"checkpoint-{self.state.global_step}"
        everyone = gather_object([files.random_state()])
        if self.accelerator.is_main_process:
            state = {
                "optim": self.args.optim,
                "optimizer": self.optimizer.state_dict(),
                "scheduler": self.lr_scheduler.state_dict(),
                "weights": None,
                "tokens_since_fired": self.tokens_since_fired,
                "position": list(position),
                "random": everyone,
            }
            with files.staged(folder) as staging:
                self.state.save_to_json(str(staging / "trainer_state.json"))
                with self.evaluated_weights():
                    files.save_heads(self.heads, staging)
                if self.args.optim == "signum":
                    # The heads on disk hold the average; training goes on from where the gradient is taken.
                    state["weights"] = {name: head.state_dict() for name, head in self.heads.items()}
                torch.save(state, staging / files.STATE_FILE)
                if self.recipe is not None:
                    self.recipe.save(staging / "recipe.yaml")
            files.drop_old(self.output_dir, self.args.save_total_limit)
        self.accelerator.wait_for_everyone()
        self.control = self.callback_handler.on_save(self.args, self.state, self.control)
        return folder

    def _check_fits(self, checkpoint: Path, state: dict[str, Any]) -> None:
        """That a checkpoint is one of this run's heads and optimizer."""
        saved = {name: len(count) for name, count in state["tokens_since_fired"].items()}
        ours = {name: head.num_latents for name, head in self.bank.named_heads()}
        if saved != ours:
            raise InputError(
                f"Checkpoint {str(checkpoint)!r} is of another recipe: it holds heads and latents {saved}, this run "
                f"has {ours}."
            )
        if state["optim"] != self.args.optim:
            raise InputError(
                f"Checkpoint {str(checkpoint)!r} was written with training.optim {state['optim']}, this run has "
                f"{self.args.optim}. Use the same."
            )

    def _restore(self, checkpoint: Path, state: dict[str, Any]) -> Position:
        for name, head in self.heads.items():
            weights = state["weights"]
            head.load_state_dict(weights[name] if weights else load_file(checkpoint / name / "model.safetensors"))
        self.optimizer.load_state_dict(state["optimizer"])
        self.lr_scheduler.load_state_dict(state["scheduler"])
        self.tokens_since_fired = state["tokens_since_fired"]
        saved = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        self.state.global_step, self.state.num_input_tokens_seen = saved.global_step, saved.num_input_tokens_seen
        self.state.log_history = saved.log_history
        if self.accelerator.process_index < len(state["random"]):
            files.restore_random_state(state["random"][self.accelerator.process_index])
        return Position(*state["position"])


def _trackers(report_to: list[str]) -> list[str] | None:
    """Accelerate leaves out a tracker that is not installed; a run without the logs that were asked for is no use."""
    wanted = [tracker for tracker in report_to if tracker != "none"]
    available = [tracker.value for tracker in get_available_trackers()]
    if missing := [tracker for tracker in wanted if tracker not in [*available, "all"]]:
        raise InputError(
            f"training.report_to: {missing[0]} is not installed. Install it, or choose from {', '.join(available)} "
            "or none."
        )
    return wanted or None


def _positive(variance: Tensor) -> Tensor:
    """A variance that can be divided by: tokens that are all alike, or none at all, have nothing to explain."""
    return torch.where(variance > 0, variance, 1.0)
