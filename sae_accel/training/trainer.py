import time
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

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
from ..data.batches import Batches, Position, Window, fingerprint, sequence_length
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
from .lora import add_lora, lora_targets
from .run_state import RunState
from .saving import Saver


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
            raise InputError("training.save_best: there are no held-out sequences. Give eval_dataset.")
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
        # What takes a step, made when the run begins.
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
        # What was measured last, with its step.
        self._measured: tuple[int, dict[str, float]] | None = None

    def add_callback(self, callback: TrainerCallback | type[TrainerCallback]) -> None:
        """Adds a `transformers.TrainerCallback`, or makes one of the class given."""
        self.callback_handler.add_callback(callback)

    @property
    def plans(self) -> dict[str, HeadPlan]:
        """All heads of the run by name: where they read, what they predict and how they train."""
        return self.run_state.plans

    @property
    def bank(self) -> nn.Module:
        """The module that holds the heads of this process, as it was prepared by Accelerate."""
        return self.run_state.prepared_bank

    @property
    def heads(self) -> dict[str, HeadModel]:
        """The heads of this process by name; under FSDP, DeepSpeed and `distribute_latents` the part that it holds."""
        return self.run_state.heads

    @property
    def state(self) -> TrainerState:
        """Steps, tokens and logged values."""
        return self.run_state.progress

    @property
    def tokens_since_fired(self) -> dict[str, Tensor]:
        """By head of this process, for each latent the tokens since it was last active, `(num_latents,)`."""
        return self.run_state.tokens_since_fired

    @property
    def adapter(self) -> nn.Module | None:
        """The LM with the LoRA that is trained around the heads."""
        return self.run_state.adapter

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
            `NotFinite`: on every process, if ten steps in a row could not be taken, or weights are not finite.
            `KeyboardInterrupt`: on Ctrl-C, after a checkpoint has been saved.
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
        signals.words = lambda: f"The heads are saved in {self.output_dir}, their card is not. {GO_ON}"
        self.run_state.save_report(metrics, self.counters.frequencies)
        signals.words = lambda: f"All is saved in {self.output_dir}."
        # Not end_training, which would part the processes, so that nothing could be evaluated after.
        with_trackers(self.accelerator, lambda tracker: tracker.finish())
        self.metrics = metrics
        if self.args.push_to_hub:
            self.push_to_hub()
        return TrainOutput(self.state.global_step, self.counters.last_loss(), metrics)

    def training_step(self, window: list[dict[str, Tensor]]) -> None:
        """One optimizer step on the batches of an accumulation window, from tokens to new weights."""
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
        self.counters.frequencies = dict(self.objective.frequencies)
        self.saver.show(metrics)
        self._tell("on_evaluate", metrics)
        return metrics

    def save_model(self, output_dir: str | None = None) -> None:
        """
        Writes the heads, a LoRA that was trained around them as a PEFT adapter in `adapter`, and the recipe if there
        is one, into `output_dir`, by default that of the arguments.

        Raises:
            `NotFinite`: on every process, if weights are not finite.
        """
        self.finite_steps.check_weights()
        self.run_state.save_heads(Path(output_dir or self.args.output_dir))
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
            return push_run(self.args, self.publisher, list(self.plans), commit_message, **kwargs)

        self.pushed = raise_together(push)
        return self.pushed

    def dead_fractions(self) -> dict[str, float]:
        """By head, the part of latents that have not been active for the entry's `dead_after_tokens`."""
        return self.counters.dead_fractions()

    def _tell(self, event: str, *values: dict[str, float]) -> None:
        """Calls the callbacks, which transformers types for arguments of its own class."""
        call = getattr(self.callback_handler, event)
        self.control = call(self.args, self.state, self.control, *values)

    def _batches(self, dataset: Rows | None) -> Batches:
        return Batches(dataset, self.args, self.accelerator, self.pad_token_id)

    def _windows(self, batches: Batches) -> Iterator[Window]:
        """The batches of each step. The first is read now: to find it in a stream is not training."""
        windows = self.saver.saved_before_errors(batches.windows(self._position), partial(self._saved, anew=True))
        first = islice(windows, 1) if self.state.global_step < self.state.max_steps else ()
        return chain(list(first), windows)

    def _take_steps(self, windows: Iterator[Window]) -> dict[str, float]:
        """Trains to the end, and evaluates. A signal to any process ends it with `Abandoned` on all."""
        if self.run_state.owes_evaluation and self.eval_dataset is not None:
            self._evaluate_and_keep_best()
        while self.state.global_step < self.state.max_steps and not self.control.should_training_stop:
            self._interruption.check()
            window, after = next(windows)
            self.training_step(window)
            self._position = after
            self._tell("on_step_end")
            self._act_on_control()
        self._tell("on_train_end")
        step, metrics = self._measured or (None, {})
        if step != self.state.global_step and self.eval_dataset is not None:
            metrics = self._evaluate_and_keep_best()
        self._interruption.check()
        return metrics

    def _act_on_control(self) -> None:
        """Logs, evaluates and saves where callbacks asked for it."""
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
        """Saves what is not saved yet, or all `anew`, and says so."""
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
            return self.objective.evaluate(self.bank, self._interruption.watched(batches))

    def _measure_start(self, batches: Batches) -> None:
        """The LM's losses before the first step, on held-out rows, or else on those of that step."""
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
        self.run_state.lowest.observe(metrics, self.state.global_step)
        if self.args.save_best:
            self.finite_steps.check_weights()
            self.saver.keep_best(metrics)
        self.run_state.owes_evaluation = False
        self._measured = self.state.global_step, metrics
        return metrics
