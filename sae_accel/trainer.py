import json
import math
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, ProjectConfiguration, gather_object, set_seed
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_callback import CallbackHandler
from transformers.trainer_utils import TrainOutput

from . import checkpoint as files
from .activations import RunningLM
from .arguments import HeadArguments, LoraArguments, SaeTrainingArguments
from .bank import Moments, SaeBank
from .batches import Batches, Position
from .callbacks import FlowCallback, ProgressBar, k_at
from .checks import check_objective
from .end_to_end import EndToEndObjective, check_end_to_end
from .errors import InputError
from .hookpoints import HeadPlan, plan_heads
from .hooks import Site
from .interruption import Interruption
from .local import LocalObjective, StepResult, reduced
from .models import HeadModel
from .optim import Signum, build_optimizer, build_scheduler
from .pretrained import load_into, match_heads, open_pretrained
from .running_means import RunningMeans
from .spliced_lm import SplicedLM
from .trackers import shown_settings, wanted_trackers


class SaeTrainer:
    """
    Trains SAEs and transcoders on the activations of a frozen LM, with the feel of `transformers.Trainer`.

    Args:
        model (`PreTrainedModel`): The LM, which may carry a PEFT adapter. It is frozen, and under the local loss stops
            after the deepest hookpoint. Losses `ce` and `kl` need its own head.
        args (`SaeTrainingArguments`): How to train.
        heads (`list[HeadArguments]`): What to train; a head for every layer's output if not given.
        train_dataset (`datasets.Dataset` or `datasets.IterableDataset`): Rows with `input_ids`, such as
            `chunk_and_tokenize` gives.
        eval_dataset (*optional*): Held-out rows of the same kind.
        exclude_tokens (`list[int]`, *optional*): Token ids that train nothing and count in no metric.
        processing_class (*optional*): The tokenizer, handed to callbacks.
        callbacks (`list[transformers.TrainerCallback]`, *optional*): Further callbacks.
        lora ([`LoraArguments`], *optional*): A LoRA of the LM to train around the heads.
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
        lora: LoraArguments | None = None,
        recipe: Any = None,
    ):
        heads = heads or [HeadArguments()]
        check_objective(args, heads, lora)
        if args.save_best and eval_dataset is None:
            raise InputError("training.save_best: there are no held-out sequences. Give eval_dataset.")
        self.args = args
        self.train_dataset, self.eval_dataset = train_dataset, eval_dataset
        self.recipe = recipe
        self.output_dir = Path(args.output_dir)
        self.accelerator = Accelerator(
            log_with=wanted_trackers(args.report_to),
            project_config=ProjectConfiguration(
                project_dir=args.output_dir, logging_dir=str(self.output_dir / "logs")
            ),
            dataloader_config=DataLoaderConfiguration(even_batches=False),
            step_scheduler_with_optimizer=False,
        )
        set_seed(args.seed)
        model = _without_wrapper(model)
        plans = plan_heads(model, heads)
        if args.loss != "fvu":
            check_end_to_end(plans)
        for plan in plans:
            plan.config.base_model_name_or_path = model.config.name_or_path or None
            plan.config.base_model_revision = getattr(model.config, "_commit_hash", None)
        if not hasattr(model, "hf_device_map") and not getattr(model, "is_quantized", False):
            model.to(self.accelerator.device)
        self.bank = SaeBank(plans).to(self.accelerator.device)
        self.activations = RunningLM(model, list(self.bank.widths), list(exclude_tokens), self.bank.widths)
        self.lora, self.adapter = lora, None if lora is None else self._add_lora(model, plans, lora)
        self.objective = self._objective(model, list(exclude_tokens))
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
        self.initial_metrics: dict[str, float] = {}
        self.best: dict[str, float] = {}
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
            `transformers.trainer_utils.TrainOutput`: steps done, mean loss since the last log, and the metrics.

        Raises:
            `InputError`: if the output folder holds another run, the data cannot fill a batch, or the checkpoint
                cannot be used.
            `KeyboardInterrupt`: on Ctrl-C, after a checkpoint has been saved.
        """
        resume = self.args.resume_from_checkpoint if resume_from_checkpoint is None else resume_from_checkpoint
        checkpoint = files.where_to_begin(self.output_dir, resume, self.args.overwrite_output_dir)
        batches = self._batches(self.train_dataset)
        position = self._begin(batches, checkpoint)
        if checkpoint is None and self.args.loss != "fvu":
            self._measure_start(batches)
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
        metrics = self._evaluate_and_keep_best() if self.eval_dataset is not None else {}
        metrics |= self.initial_metrics
        trained = self.state.num_input_tokens_seen - tokens_before
        metrics["train/tokens"] = self.state.num_input_tokens_seen
        metrics["train/tokens_per_second"] = trained / (time.monotonic() - started)
        metrics |= {f"train/dead/{name}": value for name, value in self.dead_fractions().items()}
        self.save_model()
        self._save_metrics(metrics)
        self.accelerator.end_training()
        return TrainOutput(self.state.global_step, self._last_loss(), metrics)

    def training_step(self, window: list[dict[str, Tensor]]) -> None:
        """One optimizer step on the batches of an accumulation window, from tokens to new weights."""
        bank = self.accelerator.unwrap_model(self.bank)
        k = {
            name: k_at(self.state.global_step, head.config, bank.plans[name].arguments)
            for name, head in bank.named_heads()
        }
        result = self.objective.gradients(self.bank, window, k, self._dead_masks())
        self._clip_gradients()
        self.optimizer.step()
        self.lr_scheduler.step()
        self.optimizer.zero_grad()
        self._count(result, k)

    def evaluate(self, eval_dataset: Any = None) -> dict[str, float]:
        """
        FVU, L0 and the part of latents that stay silent, by head, on held-out rows, with the weights that are saved.
        With loss `ce` or `kl` also the LM's own losses, in nats, by token.

        Args:
            eval_dataset (*optional*): Rows to use instead of the trainer's.

        Returns:
            `dict[str, float]`: `eval/fvu/<head>`, `eval/l0/<head>`, `eval/silent/<head>`, and `eval/tokens`; and
            `eval/ce_clean` without heads, `eval/ce` with all of them spliced in, and `eval/kl` between the two.

        Raises:
            `InputError`: if there are no held-out rows.
        """
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if dataset is None:
            raise InputError(
                "There are no held-out sequences to evaluate on. Give eval_dataset, or set data.eval_examples."
            )
        metrics = self._measure(self._batches(dataset).one_pass(drop_last=False))
        self.accelerator.log(metrics, step=self.state.global_step)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def save_model(self, output_dir: str | None = None) -> None:
        """
        Writes the heads, a LoRA that was trained around them as a PEFT adapter in `adapter`, and the recipe if there
        is one, into `output_dir`, by default that of the arguments.
        """
        with self.evaluated_weights():
            if self.accelerator.is_main_process:
                self._save_into(Path(output_dir or self.args.output_dir), self.heads)
        self.accelerator.wait_for_everyone()

    def dead_fractions(self) -> dict[str, float]:
        """By head, the part of latents that have not been active for the entry's `dead_after_tokens`."""
        plans = self.accelerator.unwrap_model(self.bank).plans
        return {
            name: (count > plans[name].arguments.dead_after_tokens).float().mean().item()
            for name, count in self.tokens_since_fired.items()
        }

    def _add_lora(self, model: PreTrainedModel, plans: list[HeadPlan], lora: LoraArguments) -> Any:
        from .adapters import add_lora, lora_targets

        adapter = add_lora(model, lora_targets(model.base_model, plans, lora), lora)
        self.bank.adapter.extend(parameter for parameter in adapter.parameters() if parameter.requires_grad)
        if not lora.train_heads:
            self.bank.heads.requires_grad_(False)
        return adapter

    def _objective(self, model: PreTrainedModel, exclude_tokens: list[int]) -> LocalObjective | EndToEndObjective:
        local = LocalObjective(self.activations, self.accelerator, self.args.micro_batches)
        if self.args.loss == "fvu":
            return local
        lm = SplicedLM(model, exclude_tokens, self.adapter)
        return EndToEndObjective(lm, local, self.args.loss, self.args.fvu_weight)

    def _begin(self, batches: Batches, checkpoint: Path | None) -> Position:
        """Makes everything ready, from the start or from a checkpoint, and says where in the data to go on."""
        state = None if checkpoint is None else files.load_state(checkpoint, self.accelerator.device)
        self.state.max_steps = batches.max_steps()
        if state is not None:
            files.check_fits(checkpoint, state, self._identity())
        elif self.args.init_from is not None:
            heads = open_pretrained(self.args.init_from)
            load_into(self.bank, match_heads(self.bank.plans.values(), heads), heads)
        else:
            self._initialize_biases(batches)
        if checkpoint is None and self.accelerator.is_main_process:
            files.delete_run(self.output_dir)
        self.optimizer = build_optimizer(self.bank, self.args, self.lora)
        self.lr_scheduler = build_scheduler(self.optimizer, self.args, self.state.max_steps)
        # A LoRA's parameters stay where the LM lies, which may be on several devices.
        self.bank, self.optimizer = self.accelerator.prepare(
            self.bank, self.optimizer, device_placement=[self.adapter is None, True]
        )
        self.callback_handler.optimizer, self.callback_handler.lr_scheduler = self.optimizer, self.lr_scheduler
        position = Position() if state is None else self._restore(checkpoint, state)
        name = self.args.run_name or self.output_dir.resolve().name
        self.accelerator.init_trackers(name, config=shown_settings(self.args))
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
                    new = reduced(self.accelerator, Moments.of(rows))
                    moments[site] = moments[site].merge(new) if site in moments else new
            # An expert that no token reaches starts where it is.
            if any(m.count > 0 for m in moments.values()):
                break
        for name, head in self.bank.named_heads():
            plan = self.bank.plans[name]
            head.initialize_biases(moments[plan.reads].mean, moments[plan.predicts].mean)

    def _dead_masks(self) -> dict[str, Tensor]:
        """Dead latents of the heads that have AuxK and some of them dead."""
        plans = self.accelerator.unwrap_model(self.bank).plans
        masks = {
            name: count > plans[name].arguments.dead_after_tokens
            for name, count in self.tokens_since_fired.items()
            if plans[name].arguments.auxk_alpha
        }
        return {name: mask for name, mask in masks.items() if mask.any()}

    def _clip_gradients(self) -> None:
        """Head by head, so that one head's update never depends on another's."""
        if self.args.max_grad_norm is not None:
            for part in (*self.heads.values(), self.accelerator.unwrap_model(self.bank).adapter):
                self.accelerator.clip_grad_norm_(part.parameters(), self.args.max_grad_norm)

    def _count(self, result: StepResult, k: dict[str, int]) -> None:
        """Counts steps, tokens and silent latents, and keeps what will be logged."""
        for name, uses in result.uses.items():
            self.tokens_since_fired[name].add_(result.head_tokens[name].long()).masked_fill_(uses > 0, 0)
        self._log.add(result.values)
        self.state.global_step += 1
        self.state.num_input_tokens_seen += int(result.num_tokens)
        self._k = k

    def _act_on_control(self, position: Position) -> None:
        """Logs, evaluates and saves where callbacks asked for it; after a signal, saves and stops."""
        if self.control.should_log:
            self._write_log()
        if self.control.should_evaluate and self.eval_dataset is not None:
            self._evaluate_and_keep_best()
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

    def _measure(self, batches: Iterable[dict[str, Tensor]]) -> dict[str, float]:
        with self.evaluated_weights():
            return self.objective.evaluate(self.accelerator.unwrap_model(self.bank), batches)

    def _measure_start(self, batches: Batches) -> None:
        """The LM's losses before the first step, on held-out rows, or else on those of that step."""
        if self.eval_dataset is None:
            rows, _ = next(batches.windows(Position()))
        else:
            rows = self._batches(self.eval_dataset).one_pass(drop_last=False)
        metrics = self._measure(rows)
        self.initial_metrics = {key.replace("eval/", "initial/"): value for key, value in metrics.items()}
        self.accelerator.log(self.initial_metrics, step=0)
        self.control = self.callback_handler.on_log(self.args, self.state, self.control, self.initial_metrics)

    def _evaluate_and_keep_best(self) -> dict[str, float]:
        """Each head is kept by its own FVU; heads that were trained together by the loss that they share."""
        metrics = self.evaluate()
        if not self.args.save_best:
            return metrics
        local = self.args.loss == "fvu"
        losses = (
            {name: f"eval/fvu/{name}" for name in self.heads} if local else {self.args.loss: f"eval/{self.args.loss}"}
        )
        for name, key in losses.items():
            value = metrics[key]
            if value < self.best.get(name, math.inf):
                self.best[name] = value
                self._save_best([name] if local else list(self.heads))
        return metrics

    def _save_best(self, names: list[str]) -> None:
        folder = self.output_dir / "best"
        heads = {name: self.heads[name] for name in names}
        with self.evaluated_weights():
            if self.accelerator.is_main_process and self.args.loss == "fvu":
                self._save_into(folder, heads)
            elif self.accelerator.is_main_process:
                # Heads that were trained together are of use only together.
                with files.staged(folder) as staging:
                    self._save_into(staging, heads)
        self.accelerator.wait_for_everyone()

    def _last_loss(self) -> float:
        """In the latest log, the LM's loss, or the mean FVU over the heads."""
        latest = self.state.log_history[-1] if self.state.log_history else {}
        prefix = "train/fvu/" if self.args.loss == "fvu" else f"train/{self.args.loss}"
        losses = [value for key, value in latest.items() if key.startswith(prefix)]
        return sum(losses) / len(losses) if losses else math.nan

    def _save_metrics(self, metrics: dict[str, float]) -> None:
        if self.accelerator.is_main_process:
            (self.output_dir / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")

    def _save_checkpoint(self, position: Position) -> Path:
        """Everything that going on needs, complete or absent."""
        folder = self.output_dir / f"checkpoint-{self.state.global_step}"
        everyone = gather_object([files.random_state()])
        if self.accelerator.is_main_process:
            state = {
                "identity": self._identity(),
                "optimizer": self.optimizer.state_dict(),
                "scheduler": self.lr_scheduler.state_dict(),
                "weights": None,
                "adapter": [parameter.detach() for parameter in self.accelerator.unwrap_model(self.bank).adapter],
                "tokens_since_fired": self.tokens_since_fired,
                "initial_metrics": self.initial_metrics,
                "best": self.best,
                "position": list(position),
                "random": everyone,
            }
            with files.staged(folder) as staging:
                self.state.save_to_json(str(staging / "trainer_state.json"))
                with self.evaluated_weights():
                    self._save_into(staging, self.heads)
                if self.args.optim == "signum":
                    # The heads on disk hold the average; training goes on from where the gradient is taken.
                    state["weights"] = {name: head.state_dict() for name, head in self.heads.items()}
                torch.save(state, staging / files.STATE_FILE)
            files.drop_old(self.output_dir, self.args.save_total_limit)
        self.accelerator.wait_for_everyone()
        self.control = self.callback_handler.on_save(self.args, self.state, self.control)
        return folder

    def _identity(self) -> dict[str, Any]:
        """What a checkpoint must have in common with a run that goes on from it."""
        bank = self.accelerator.unwrap_model(self.bank)
        return {
            "heads and latents": {name: head.num_latents for name, head in bank.named_heads()},
            "training.optim": self.args.optim,
            "heads that train": [name for name, head in bank.named_heads() if head.W_dec.requires_grad],
            "shapes of a LoRA": [list(parameter.shape) for parameter in bank.adapter],
        }

    def _save_into(self, folder: Path, heads: dict[str, HeadModel]) -> None:
        files.save_heads(heads, folder)
        if self.adapter is not None:
            from .adapters import save_lora

            save_lora(self.adapter, folder / files.ADAPTER)
        if self.recipe is not None:
            self.recipe.save(folder / "recipe.yaml")

    def _restore(self, checkpoint: Path, state: dict[str, Any]) -> Position:
        for name, head in self.heads.items():
            weights = state["weights"]
            head.load_state_dict(weights[name] if weights else load_file(checkpoint / name / "model.safetensors"))
        for parameter, weights in zip(self.accelerator.unwrap_model(self.bank).adapter, state["adapter"], strict=True):
            parameter.data.copy_(weights)
        self.optimizer.load_state_dict(state["optimizer"])
        self.lr_scheduler.load_state_dict(state["scheduler"])
        self.tokens_since_fired = state["tokens_since_fired"]
        self.initial_metrics, self.best = state["initial_metrics"], state["best"]
        saved = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        self.state.global_step, self.state.num_input_tokens_seen = saved.global_step, saved.num_input_tokens_seen
        self.state.log_history = saved.log_history
        if self.accelerator.process_index < len(state["random"]):
            files.restore_random_state(state["random"][self.accelerator.process_index])
        return Position(*state["position"])


def _without_wrapper(model: PreTrainedModel) -> PreTrainedModel:
    """An adapter lies in the LM's own modules; what PEFT wraps around the LM is not needed."""
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        raise InputError("The LM's adapter changes what the LM reads and not its modules. Use one such as LoRA.")
    return model.get_base_model() if hasattr(model, "get_base_model") else model
