"""
The trainer: it builds a run from an LM, data and arguments, trains the heads and saves them.

The trainer checks the arguments first, because a mistake should cost no hours. Then it puts together the parts of a
run, each from a file of its own: heads and LM (`assembly.py`), the run's state (`run_state.py`), the output folder
(`runs/`), the callbacks. `train` takes the optimizer steps in `loop.py`, and saves heads, metrics and card at the end.
Each process of a run builds the same trainer; an error on one process is raised on all.
"""

import time
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate.utils import set_seed
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_callback import CallbackHandler
from transformers.trainer_utils import TrainOutput

from ..bank.plans import HeadPlan, plan_heads, site_widths
from ..common.errors import InputError
from ..common.signals import Stopped, signals
from ..data.batches import Position, fingerprint, sequence_length
from ..data.collate import Rows
from ..data.sequence_stream import SequenceStream
from ..hub.publisher import Publisher, push_run
from ..hub.release import Pushed
from ..lm.adapter import unwrapped
from ..lm.hooks import base_of
from ..models import HeadModel
from ..processes.accelerator import make_accelerator
from ..processes.agreement import raise_together
from ..processes.trackers import with_trackers
from ..recipe.arguments import HeadArguments, LoraArguments, SaeTrainingArguments
from ..recipe.checks import check_objective
from ..recipe.recipe import Recipe
from ..runs.checkpoint import GO_ON, what_is_left
from ..runs.lock import locked_together
from ..runs.output_folder import OutputFolder, written_places
from ..spread.choose import spread_heads
from .assembly import assemble
from .begin import begin
from .callbacks import FlowCallback, ProgressBar
from .counters import Counters
from .finite_steps import FiniteSteps
from .identity import identity_of
from .interruption import Abandoned, Interruption
from .k_schedule import k_at
from .loop import TrainingLoop
from .lora import add_lora, lora_targets
from .run_state import RunState
from .saving import Saver


if TYPE_CHECKING:
    from peft import PeftModel


class SaeTrainer(TrainingLoop):
    """
    Trains SAEs and transcoders on the activations of a frozen LM, in the style of `transformers.Trainer`.

    Args:
        model (`PreTrainedModel`): The LM, which may carry a PEFT adapter. The trainer freezes it. With `loss: fvu` the
            LM runs only up to the deepest hookpoint; `ce` and `kl` need an LM with its LM head.
        args (`SaeTrainingArguments`): How to train.
        heads (`list[HeadArguments]`, *optional*): Which heads to train; if not given, an SAE on each layer's output.
        train_dataset (`datasets.Dataset` or `datasets.IterableDataset`): Rows with `input_ids`, for instance from
            `chunk_and_tokenize`.
        eval_dataset (*optional*): Held-out rows of the same kind.
        exclude_tokens (`list[int]`, *optional*): Token ids that train nothing and count in no metric.
        processing_class (*optional*): The tokenizer, which callbacks get.
        callbacks (`list[transformers.TrainerCallback]`, *optional*): Further callbacks.
        lora ([`LoraArguments`], *optional*): A LoRA of the LM, trained together with the heads.
        recipe (`Recipe`, *optional*): The recipe of the run, saved beside the heads.

    Raises:
        `InputError`: if a hookpoint does not exist, sizes disagree, or the data cannot fill a batch.

    Examples:
        ```python
        from sae_accel import HeadArguments, SaeTrainer, SaeTrainingArguments

        args = SaeTrainingArguments(output_dir="runs/smollm2", max_steps=1000)
        trainer = SaeTrainer(lm, args, [HeadArguments(hookpoints="layers.1")], tokenized)
        trainer.train()
        ```
    """

    def __init__(
        self,
        model: PreTrainedModel,
        args: SaeTrainingArguments,
        heads: list[HeadArguments] | None = None,
        train_dataset: Rows | None = None,
        eval_dataset: Rows | None = None,
        *,
        exclude_tokens: Iterable[int] = (),
        processing_class: PreTrainedTokenizerBase | None = None,
        callbacks: list[TrainerCallback] | None = None,
        lora: LoraArguments | None = None,
        recipe: Recipe | None = None,
    ):
        heads = heads or [HeadArguments()]
        check_objective(args, heads, lora)
        if args.save_best and eval_dataset is None:
            raise InputError("training.save_best: there are no held-out sequences. Give the trainer an eval_dataset.")
        self.args = args
        self.train_dataset, self.eval_dataset = train_dataset, eval_dataset
        self.output_dir = Path(args.output_dir)
        self.pad_token_id = getattr(processing_class, "pad_token_id", None) or 0
        self.accelerator = make_accelerator(args)
        set_seed(args.seed)
        model = unwrapped(model)
        plans = plan_heads(model, heads, spliced=args.loss != "fvu")
        if not hasattr(model, "hf_device_map") and not getattr(model, "is_quantized", False):
            model.to(self.accelerator.device)
        self.spread = spread_heads(
            args, self.accelerator, plans, ctx_len=sequence_length(train_dataset), with_lora=lora is not None
        )
        adapter = None if lora is None else add_lora(model, lora_targets(base_of(model), plans, lora), lora)
        self.assembly = assemble(model, args, self.spread, site_widths(plans), list(exclude_tokens), lora, adapter)
        self.activations, self.objective = self.assembly.activations, self.assembly.objective
        identity = identity_of(plans, args, lora, model, recipe, fingerprint(train_dataset))
        by_name = {plan.name: plan for plan in plans}
        self.run_state = RunState(args, by_name, self.assembly.bank, self.spread, adapter, recipe, identity)
        self.run_state.stream = train_dataset if isinstance(train_dataset, SequenceStream) else None
        self.saver = Saver(self.run_state)
        places = written_places(self.plans, args, lora)
        tracks = args.report_to != ["none"]
        self.folder = OutputFolder(self.output_dir, places, args.run_name, tracks, recipe is not None, identity)
        # Both are made when the run begins.
        self.optimizer: Optimizer | None = None
        self.lr_scheduler: LRScheduler | None = None
        self.control = TrainerControl()
        pushes = args.push_to_hub and self.accelerator.is_main_process
        self.publisher = raise_together(lambda: Publisher(args) if pushes else None)
        policies = [FlowCallback(), *([] if self.publisher is None else [self.publisher])]
        self.callback_handler = CallbackHandler(
            [*policies, *(callbacks or []), ProgressBar()], self.bank, processing_class, None, None
        )
        self.metrics: dict[str, float] = {}
        self.pushed: Pushed | None = None
        self.counters, self.finite_steps = Counters(self.run_state), FiniteSteps(self.run_state)
        self._interruption = Interruption()
        self.objective.between_batches = self._interruption.check
        self._position = Position()
        self._measured = None

    def add_callback(self, callback: TrainerCallback | type[TrainerCallback]) -> None:
        """
        Adds a callback to the run.

        Args:
            callback (`transformers.TrainerCallback`, or a class of it): The callback, or a class that is called
                without arguments to make one.

        Examples:
            ```python
            from transformers import TrainerCallback

            class Stop(TrainerCallback):
                def on_step_end(self, args, state, control, **kwargs):
                    control.should_training_stop = state.num_input_tokens_seen > 10_000_000

            trainer.add_callback(Stop)
            ```
        """
        self.callback_handler.add_callback(callback)

    @property
    def plans(self) -> dict[str, HeadPlan]:
        """All heads of the run by name: where each reads, what it predicts and how it trains."""
        return self.run_state.plans

    @property
    def bank(self) -> nn.Module:
        """The module with the heads of this process, as Accelerate has prepared it."""
        return self.run_state.prepared_bank

    @property
    def heads(self) -> dict[str, HeadModel]:
        """The heads of this process by name; with FSDP, DeepSpeed and `distribute_latents`, its part of each head."""
        return self.run_state.heads

    @property
    def state(self) -> TrainerState:
        """The steps, tokens and logged values so far."""
        return self.run_state.progress

    @property
    def tokens_since_fired(self) -> dict[str, Tensor]:
        """Tokens since each latent was last active, `(num_latents,)`, for each head of this process."""
        return self.run_state.tokens_since_fired

    @property
    def adapter(self) -> "PeftModel | None":
        """The LM with the LoRA that trains around the heads; None without a LoRA."""
        return self.run_state.adapter

    def train(self, resume_from_checkpoint: bool | str | None = None) -> TrainOutput:
        """
        Trains the heads, evaluates them on the held-out rows, and saves them in `args.output_dir` with `metrics.json`
        and a model card. With `args.push_to_hub` it then pushes them to the Hub.

        Args:
            resume_from_checkpoint (`bool` or `str`, *optional*): The checkpoint folder to go on from; `True` is the
                newest complete checkpoint in `args.output_dir`. If not given, `args.resume_from_checkpoint` decides.

        Returns:
            `transformers.trainer_utils.TrainOutput`: steps done, mean loss since the last log, and the metrics.

        Raises:
            `InputError`: if the output folder holds another run, the data cannot fill a batch, or the checkpoint
                cannot be used; or after everything is saved, if the push fails.
            `NotFinite`: on every process, if ten steps in a row were skipped, or weights are not finite.
            `KeyboardInterrupt`: on Ctrl-C, after a checkpoint has been saved.

        Examples:
            ```python
            output = trainer.train()
            output.metrics["train/tokens"]
            trainer.heads["layers.1"].encode(hidden)
            ```
        """
        with locked_together(self.output_dir):
            return self._train(resume_from_checkpoint)

    def _train(self, resume_from_checkpoint: bool | str | None) -> TrainOutput:
        resume = self.args.resume_from_checkpoint if resume_from_checkpoint is None else resume_from_checkpoint
        checkpoint = raise_together(lambda: self.folder.where_to_begin(resume, self.args.overwrite_output_dir))
        batches = self._batches(self.train_dataset)
        self.optimizer, self._position = begin(self.run_state, self.assembly, self.folder, batches, checkpoint)
        self.lr_scheduler = self.run_state.lr_scheduler
        self.callback_handler.optimizer, self.callback_handler.lr_scheduler = self.optimizer, self.lr_scheduler
        signals.words = lambda: what_is_left(self.output_dir)
        if checkpoint is None and self.args.loss != "fvu":
            self._measure_start(batches)
        windows = self._windows(batches)
        started, tokens_before = time.monotonic(), self.state.num_input_tokens_seen
        self._tell("on_train_begin")
        with self._interruption:
            try:
                metrics = self._take_steps(windows)
            except Abandoned as signal:
                words = f"Stopped after step {self.state.global_step}. {self._saved(signal.number)}"
                raise Stopped(signal.number, words) from None
        self.run_state.tell_left_out()
        metrics |= self.run_state.initial_metrics | self.counters.totals(tokens_before, time.monotonic() - started)
        self.save_model()
        signals.words = lambda: f"The heads are saved in {self.output_dir}, but not their model card. {GO_ON}"
        self.run_state.save_report(metrics, self.counters.frequencies)
        signals.words = lambda: f"Everything is saved in {self.output_dir}."
        # Accelerate's `end_training` also closes the process group, and then nobody could evaluate afterwards.
        with_trackers(self.accelerator, lambda tracker: tracker.finish())
        self.metrics = metrics
        if self.args.push_to_hub:
            self.push_to_hub()
        return TrainOutput(self.state.global_step, self.counters.last_loss(), metrics)

    def training_step(self, window: list[dict[str, Tensor]]) -> None:
        """
        Takes one optimizer step on the batches of an accumulation window, from tokens to new weights.

        `train` calls it. A subclass may override it, as with `transformers.Trainer`.

        Args:
            window (`list[dict[str, torch.Tensor]]`): The batches, each with `input_ids` and `attention_mask` of shape
                `(batch, ctx_len)`.

        Examples:
            ```python
            import time
            from sae_accel import SaeTrainer

            class TimedTrainer(SaeTrainer):
                def training_step(self, window):
                    start = time.monotonic()
                    super().training_step(window)
                    print(time.monotonic() - start, "s")
            ```
        """
        heads, step = self.heads, self.state.global_step
        k = {name: k_at(step, head.config, self.plans[name].arguments) for name, head in heads.items()}
        assert self.optimizer is not None and self.lr_scheduler is not None, "a run has begun"
        gradients = partial(self.objective.gradients, self.bank, window, k, self.counters.dead_masks())
        with self._interruption.whole_step(self.optimizer):
            result, verdict = self.finite_steps.take(gradients, self.optimizer)
        if not verdict.taken:
            self.counters.skip()
            return
        self.lr_scheduler.step()
        for name, smallest in result.smallest_acts.items():
            heads[name].observe_smallest(smallest)
        self.counters.add(result, k, verdict.num_tokens)

    def evaluate(self, eval_dataset: Rows | None = None) -> dict[str, float]:
        """
        Measures each head on held-out rows, with the weights that the trainer saves: FVU, L0 and the fraction of
        latents that stay silent. With loss `ce` or `kl` it also measures the LM's losses, in nats per token.

        Args:
            eval_dataset (*optional*): Rows to use instead of the trainer's.

        Returns:
            `dict[str, float]`: `eval/fvu/<head>`, `eval/l0/<head>`, `eval/silent/<head>`, and `eval/tokens`; with
            loss `ce` or `kl` also `eval/ce_clean` without heads, `eval/ce` with all heads spliced in, and `eval/kl`
            between the two.

        Raises:
            `InputError`: if there are no held-out rows.

        Examples:
            ```python
            trainer.train()
            metrics = trainer.evaluate(tokenized)
            print(metrics["eval/fvu/layers.1"], metrics["eval/l0/layers.1"])
            ```
        """
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if dataset is None:
            raise InputError(
                "There are no held-out sequences to evaluate on. Give eval_dataset, or set --data.eval_examples 256."
            )
        metrics = self._measure(self._batches(dataset).one_pass(drop_last=False))
        self.counters.frequencies = dict(self.objective.frequencies)
        self.saver.show(metrics)
        self._tell("on_evaluate", metrics)
        return metrics

    def save_model(self, output_dir: str | None = None) -> None:
        """
        Writes the heads, each into a folder with its name. A LoRA goes into `adapter` as a PEFT adapter, and the
        recipe, if there is one, into `recipe.yaml`.

        Args:
            output_dir (`str`, *optional*): The folder to write into; `args.output_dir` if not given.

        Raises:
            `NotFinite`: on every process, if weights are not finite.

        Examples:
            ```python
            from sae_accel import AutoSae

            trainer.train()
            trainer.save_model("runs/smollm2-copy")
            sae = AutoSae.from_pretrained("runs/smollm2-copy", subfolder="layers.1")
            ```
        """
        self.finite_steps.check_weights()
        self.run_state.save_heads(Path(output_dir or self.args.output_dir))
        self.accelerator.wait_for_everyone()

    def push_to_hub(self, commit_message: str = "End of training", **kwargs: Any) -> Pushed | None:
        """
        Pushes the files that `train` saved in `args.output_dir` to the Hub, in one commit.

        Args:
            commit_message (`str`, *optional*): The commit's message.
            kwargs (*optional*): `revision` and `token`, as in [`Release.push`].

        Returns:
            [`Pushed`] on the main process, None on the others.

        Raises:
            `InputError`: on every process, if the Hub refuses or cannot be reached. The local files stay.

        Examples:
            ```python { no-run }
            trainer.train()
            pushed = trainer.push_to_hub("SAEs of SmolLM2, 10M tokens")
            print(pushed.url)
            ```
        """

        def push() -> Pushed | None:
            if not self.accelerator.is_main_process:
                return None
            return push_run(self.args, self.publisher, list(self.plans), commit_message, **kwargs)

        self.pushed = raise_together(push)
        return self.pushed

    def dead_fractions(self) -> dict[str, float]:
        """
        The fraction of dead latents of each head: latents not active for the last `dead_after_tokens` tokens.

        Examples:
            ```python
            trainer.train()
            trainer.dead_fractions()  # {"layers.1": 0.0}
            ```
        """
        return self.counters.dead_fractions()
