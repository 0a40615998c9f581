import math
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from torch import Tensor
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_callback import CallbackHandler
from transformers.trainer_utils import TrainOutput

from ..activations.running_lm import RunningLM
from ..bank.bank import SaeBank, joined
from ..bank.init_from import load_into, match_heads, open_pretrained
from ..bank.moments import Moments
from ..bank.plans import HeadPlan, plan_heads, site_widths
from ..common.errors import InputError
from ..data.batches import Batches, Position
from ..hub.publisher import Publisher, hub_repo
from ..hub.release import Pushed, Release
from ..lm.hooks import Site
from ..models import HeadModel
from ..processes.accelerator import make_accelerator
from ..processes.agreement import agreed, gathered
from ..processes.trackers import shown_settings
from ..recipe.arguments import HeadArguments, LoraArguments, SaeTrainingArguments
from ..recipe.checks import check_objective
from ..runs import checkpoint as files
from ..runs.output_folder import OutputFolder, written_places
from ..runs.saver import Saver
from ..spread.choose import spread_heads
from .callbacks import FlowCallback, ProgressBar
from .end_to_end_objective import EndToEndObjective, check_end_to_end
from .interruption import Interruption
from .k_schedule import k_at
from .local_objective import LocalObjective
from .optim import Signum, build_optimizer, build_scheduler
from .spliced_lm import SplicedLM
from .step import StepResult, over_processes
from .sums import FiringCounts, RunningMeans


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
        self.accelerator = make_accelerator(args)
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
        self.plans = {plan.name: plan for plan in plans}
        self.spread = spread_heads(
            args, self.accelerator, plans, ctx_len=_sequence_length(train_dataset), with_lora=lora is not None
        )
        self.bank = SaeBank(self.spread.plans, build=self.spread.build).to(self.spread.starting_device)
        widths = site_widths(plans)
        self.activations = self.spread.source(RunningLM(model, list(widths), list(exclude_tokens), widths))
        self.lora, self.adapter = lora, None if lora is None else self._add_lora(model, plans, lora)
        self.objective = self._objective(model, list(exclude_tokens))
        self.saver = Saver(self)
        self._folder = OutputFolder(
            self.output_dir, written_places(self.plans, args, lora), args.run_name, writes_recipe=recipe is not None
        )
        self.pad_token_id = getattr(processing_class, "pad_token_id", None) or 0
        self.optimizer = self.own_optimizer = self.lr_scheduler = None
        self.state = TrainerState(
            is_local_process_zero=self.accelerator.is_local_main_process,
            is_world_process_zero=self.accelerator.is_main_process,
        )
        self.control = TrainerControl()
        self.publisher = agreed(self._publisher) if args.push_to_hub else None
        policies = [FlowCallback(), *([] if self.publisher is None else [self.publisher])]
        self.callback_handler = CallbackHandler(
            [*policies, *(callbacks or []), ProgressBar()], self.bank, processing_class, None, None
        )
        self.tokens_since_fired = {
            name: torch.zeros(head.num_latents, dtype=torch.long, device=self.accelerator.device)
            for name, head in self.bank.named_heads()
        }
        self.initial_metrics: dict[str, float] = {}
        self.best: dict[str, float] = {}
        self.metrics: dict[str, float] = {}
        self.pushed: Pushed | None = None
        self._log, self._firing = RunningMeans(), FiringCounts()
        self._frequencies: dict[str, Tensor] = {}
        self._interruption = Interruption()

    def add_callback(self, callback: TrainerCallback | type[TrainerCallback]) -> None:
        """Adds a `transformers.TrainerCallback`, or makes one of the class given."""
        self.callback_handler.add_callback(callback)

    @property
    def heads(self) -> dict[str, HeadModel]:
        """The heads of this process by name; under FSDP, DeepSpeed and `distribute_latents` what it holds of them."""
        return dict(self.accelerator.unwrap_model(self.bank).named_heads())

    @contextmanager
    def evaluated_weights(self) -> Iterator[None]:
        """While open, heads are as they are evaluated and saved: with signum, the weights are the averaged ones."""
        self.bank.eval()
        try:
            if not isinstance(self.own_optimizer, Signum):
                yield
                return
            with self.own_optimizer.averaged(self.spread.optimized(self.own_optimizer)):
                self.spread.renew()
                yield
        finally:
            if isinstance(self.own_optimizer, Signum):
                self.spread.renew()
            self.bank.train()

    def train(self, resume_from_checkpoint: bool | str | None = None) -> TrainOutput:
        """
        Trains, evaluates on the held-out rows, saves the heads, `metrics.json` and the model card in
        `args.output_dir`, and with `args.push_to_hub` releases them.

        Args:
            resume_from_checkpoint (`bool` or `str`, *optional*): A checkpoint folder to go on from; `True` is the
                newest whole one of `args.output_dir`; `args.resume_from_checkpoint` if not given.

        Returns:
            `transformers.trainer_utils.TrainOutput`: steps done, mean loss since the last log, and the metrics.

        Raises:
            `InputError`: if the output folder holds another run, the data cannot fill a batch, or the checkpoint
                cannot be used; or after all is saved, if it cannot be pushed.
            `KeyboardInterrupt`: on Ctrl-C, after a checkpoint has been saved.
        """
        resume = self.args.resume_from_checkpoint if resume_from_checkpoint is None else resume_from_checkpoint
        checkpoint = self._folder.where_to_begin(resume, self.args.overwrite_output_dir)
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
        self.saver.save_report(metrics, self._frequencies)
        # Not end_training, which would part the processes, so that nothing could be evaluated after.
        for tracker in self.accelerator.trackers:
            tracker.finish()
        self.metrics = metrics
        if self.args.push_to_hub:
            self.push_to_hub()
        return TrainOutput(self.state.global_step, self._last_loss(), metrics)

    def training_step(self, window: list[dict[str, Tensor]]) -> None:
        """One optimizer step on the batches of an accumulation window, from tokens to new weights."""
        bank = self.accelerator.unwrap_model(self.bank)
        k = {
            name: k_at(self.state.global_step, head.config, bank.plans[name].arguments)
            for name, head in bank.named_heads()
        }
        result = self.objective.gradients(self.bank, window, k, self._dead_masks())
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
        self._frequencies = dict(self.objective.frequencies)
        self.accelerator.log(metrics, step=self.state.global_step)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def save_model(self, output_dir: str | None = None) -> None:
        """
        Writes the heads, a LoRA that was trained around them as a PEFT adapter in `adapter`, and the recipe if there
        is one, into `output_dir`, by default that of the arguments.
        """
        with self.evaluated_weights():
            self.saver.save_into(Path(output_dir or self.args.output_dir))
        self.accelerator.wait_for_everyone()

    def push_to_hub(self, commit_message: str = "End of training", **kwargs: Any) -> Pushed | None:
        """
        Releases what `train` saved in `args.output_dir`, in one commit.

        Args:
            commit_message (`str`, *optional*): Of the commit.
            kwargs (*optional*): `revision` and `token`, as of [`Release.push`].

        Returns:
            [`Pushed`], on the main process.

        Raises:
            `InputError`: on every process, if the Hub refuses or cannot be reached. What was saved is there still.
        """

        def push() -> Pushed | None:
            if not self.accelerator.is_main_process:
                return None
            if self.publisher is not None:
                self.publisher.finish()
            repo_id = hub_repo(self.args) if self.publisher is None else self.publisher.repo_id
            try:
                release = Release(self.output_dir, repo_id, include=list(self.plans))
                return release.push(private=self.args.hub_private_repo, message=commit_message, **kwargs)
            except InputError as error:
                by_hand = f"python -m sae_accel.push {self.output_dir} {repo_id}"
                raise InputError(f"{error} The heads are in {self.output_dir}: {by_hand} pushes them.") from error

        self.pushed = agreed(push)
        return self.pushed

    def dead_fractions(self) -> dict[str, float]:
        """By head, the part of latents that have not been active for the entry's `dead_after_tokens`."""
        dead = {
            name: self.spread.over_latents((count > self.plans[name].arguments.dead_after_tokens).sum()).item()
            for name, count in self.tokens_since_fired.items()
        }
        return self.spread.merged({name: count / self.plans[name].config.num_latents for name, count in dead.items()})

    def _publisher(self) -> Publisher | None:
        """On the main process, what pushes."""
        return Publisher(self.args) if self.accelerator.is_main_process else None

    def _add_lora(self, model: PreTrainedModel, plans: list[HeadPlan], lora: LoraArguments) -> Any:
        from .lora import add_lora, lora_targets

        adapter = add_lora(model, lora_targets(model.base_model, plans, lora), lora)
        self.bank.adapter.extend(parameter for parameter in adapter.parameters() if parameter.requires_grad)
        if not lora.train_heads:
            self.bank.heads.requires_grad_(False)
        return adapter

    def _objective(self, model: PreTrainedModel, exclude_tokens: list[int]) -> LocalObjective | EndToEndObjective:
        local = LocalObjective(self.activations, self.accelerator, self.spread, self.args.micro_batches)
        if self.args.loss == "fvu":
            return local
        lm = SplicedLM(model, exclude_tokens, self.adapter)
        return EndToEndObjective(lm, local, self.args.loss, self.args.fvu_weight)

    def _begin(self, batches: Batches, checkpoint: Path | None) -> Position:
        """Makes everything ready, from the start or from a checkpoint, and says where in the data to go on."""
        self.state.max_steps = batches.max_steps()
        state = None
        if checkpoint is not None:
            state = agreed(lambda: self.saver.load_weights(checkpoint))
        elif self.args.init_from is not None:
            heads = agreed(lambda: open_pretrained(self.args.init_from))
            load_into(self.bank, match_heads(self.plans.values(), heads), heads)
        else:
            self._initialize_biases(batches)
        if checkpoint is None and self.accelerator.is_main_process:
            self._folder.delete_leftovers()
        self.own_optimizer = build_optimizer(self.bank, self.args, self.lora, self.objective.scale)
        self.lr_scheduler = build_scheduler(self.own_optimizer, self.args, self.state.max_steps)
        self.bank, self.optimizer = self.spread.prepare(self.bank, self.own_optimizer)
        self.callback_handler.optimizer, self.callback_handler.lr_scheduler = self.optimizer, self.lr_scheduler
        position = Position() if state is None else self.saver.restore(checkpoint, state)
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
                new = {site: Moments.of(rows) for site, rows in self.activations(batch).by_site.items()}
                for site, one in over_processes(self.spread, new).items():
                    moments[site] = moments[site].merge(one) if site in moments else one
            # An expert that no token reaches starts where it is.
            if any(gathered(any(m.count > 0 for m in moments.values()))):
                break
        for name, head in self.bank.named_heads():
            plan = self.bank.plans[name]
            read, predicted = (
                Moments.joined([moments[site] for site in part]) for part in (plan.reads, plan.predicts)
            )
            head.initialize_biases(read.mean, predicted.mean)
        self._initialize_thresholds(window[0])

    def _initialize_thresholds(self, batch: dict[str, Tensor]) -> None:
        """Of heads that learn them: the mean over processes of where each begins on one batch."""
        learnt = {name: head for name, head in self.bank.named_heads() if head.learns_threshold}
        if not any(gathered(bool(learnt))):
            return
        by_site = self.activations(batch).by_site
        for name, head in learnt.items():
            tokens = joined(by_site, self.bank.plans[name].reads)
            head.initialize_threshold(tokens)
            share, count = self.spread.sum([head.threshold.detach() * len(tokens), tokens.new_tensor(len(tokens))])
            head.threshold.data.copy_(share / count.clamp_min(1))

    def _dead_masks(self) -> dict[str, Tensor]:
        """Dead latents of the heads that have AuxK and some of them dead, on this process or another."""
        masks = {
            name: count > self.plans[name].arguments.dead_after_tokens
            for name, count in self.tokens_since_fired.items()
            if self.plans[name].arguments.auxk_alpha
        }
        return {name: mask for name, mask in masks.items() if self.spread.over_latents(mask.sum()) > 0}

    def _count(self, result: StepResult, k: dict[str, int]) -> None:
        """Counts steps, tokens and silent latents, and keeps what will be logged."""
        for name, uses in result.uses.items():
            self.tokens_since_fired[name].add_(result.head_tokens[name].long()).masked_fill_(uses > 0, 0)
        for name, smallest in result.smallest_acts.items():
            self.heads[name].observe_smallest(smallest)
        self._log.add(result.values)
        self._firing.add(result.uses, result.head_tokens)
        self.state.global_step += 1
        self.state.num_input_tokens_seen += int(result.num_tokens)
        self._k = k

    def _act_on_control(self, position: Position) -> None:
        """Logs, evaluates and saves where callbacks asked for it; after a signal to any process, saves and stops."""
        stops = any(gathered(self._interruption.requested))
        if self.control.should_log:
            self._write_log()
        if self.control.should_evaluate and self.eval_dataset is not None:
            self._evaluate_and_keep_best()
        if self.control.should_save or stops:
            folder = self.saver.save_checkpoint(position)
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)
        if stops:
            if self.publisher is not None:
                self.publisher.finish(interrupted=True)
            raise KeyboardInterrupt(f"Stopped after step {self.state.global_step}. Saved {folder}.")

    def _write_log(self) -> None:
        values = self._log.flush()
        self._frequencies = self._firing.flush()
        values |= {f"train/k/{name}": float(value) for name, value in self._k.items()}
        values |= {f"learning_rate/{group['head']}": float(group["lr"]) for group in self.own_optimizer.param_groups}
        values = self.spread.merged(values)
        values |= {f"train/dead/{name}": value for name, value in self.dead_fractions().items()}
        values["train/tokens"] = self.state.num_input_tokens_seen
        self.accelerator.log(values, step=self.state.global_step)
        self.state.log_history.append({**values, "step": self.state.global_step})
        self.control = self.callback_handler.on_log(self.args, self.state, self.control, values)

    def _measure(self, batches: Iterable[dict[str, Tensor]]) -> dict[str, float]:
        with self.evaluated_weights():
            return self.objective.evaluate(self.bank, batches)

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
            {name: f"eval/fvu/{name}" for name in self.plans} if local else {self.args.loss: f"eval/{self.args.loss}"}
        )
        for name, key in losses.items():
            value = metrics[key]
            if value < self.best.get(name, math.inf):
                self.best[name] = value
                self._save_best([name] if local else list(self.plans))
        return metrics

    def _save_best(self, names: list[str]) -> None:
        folder = self.output_dir / "best"
        with self.evaluated_weights():
            if self.args.loss == "fvu":
                self.saver.save_into(folder, names)
            else:
                # Heads that were trained together are of use only together.
                with files.staged(folder, self.accelerator) as staging:
                    self.saver.save_into(staging, names)

    def _last_loss(self) -> float:
        """In the latest log, the LM's loss, or the mean FVU over the heads."""
        latest = self.state.log_history[-1] if self.state.log_history else {}
        prefix = "train/fvu/" if self.args.loss == "fvu" else f"train/{self.args.loss}"
        losses = [value for key, value in latest.items() if key.startswith(prefix)]
        return sum(losses) / len(losses) if losses else math.nan


def _without_wrapper(model: PreTrainedModel) -> PreTrainedModel:
    """An adapter lies in the LM's own modules; what PEFT wraps around the LM is not needed."""
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        raise InputError("The LM's adapter changes what the LM reads and not its modules. Use one such as LoRA.")
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _sequence_length(dataset: Any) -> int:
    """Tokens of a row, to weigh heads by; a usual number where rows have none, or are those of a stream."""
    if not hasattr(dataset, "__len__") or not len(dataset):
        return 2048
    return len(dataset[0].get("input_ids", [0]))
