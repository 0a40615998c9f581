"""
The state of a run: everything that changes while it trains, and how a checkpoint saves and restores it.

The trainer and its helpers read and change one `RunState`. A checkpoint holds each head whole, with its part of
the optimizer's state, so that a run can go on with another number of processes, or with its heads spread differently.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from transformers import TrainerState

from ..bank.bank import SaeBank
from ..bank.plans import HeadPlan
from ..cards.model_card import write_card
from ..common.errors import InputError
from ..common.files import write_json, write_tensors
from ..common.run_files import ADAPTER, FREQUENCIES, METRICS, RECIPE, TRAINER_STATE
from ..data.batches import Position
from ..data.sequence_stream import SequenceStream
from ..models import HeadModel
from ..recipe.arguments import SaeTrainingArguments
from ..recipe.recipe import Recipe
from ..runs import checkpoint as files
from ..runs.differences import Differences
from ..runs.history import LogHistory
from ..runs.writing import WEIGHTS, Writing, save_head, save_state, staged, written_together
from ..spread.base import Spread
from .lora import save_lora
from .lowest_losses import LowestLosses
from .optim import Signum, bring_to
from .sizes import checkpoint_bytes
from .skips import Skips
from .sums import FiringCounts, RunningMeans


if TYPE_CHECKING:
    from peft import PeftModel


class RunState:
    """
    Everything that changes while a run trains: heads, a LoRA, optimizer, schedule and counters.

    Args:
        args (`SaeTrainingArguments`): How the run trains.
        plans (`dict[str, HeadPlan]`): All heads of the run by name.
        bank (`SaeBank`): The heads of this process, not yet prepared.
        spread ([`Spread`]): How heads lie on processes.
        adapter (`PeftModel`, *optional*): The LM with the LoRA that trains around the heads.
        recipe ([`Recipe`], *optional*): The recipe of the run, saved beside the heads.
        identity (`dict[str, Any]`, *optional*): The result of `identity_of`; checkpoints must match it.

    Attributes:
        prepared_bank (`nn.Module`): The bank, with what Accelerate has wrapped around it once the run begins.
        optimizer (`torch.optim.Optimizer`, *optional*): Without Accelerate's wrapper. It and `lr_scheduler` are made
            when the run begins.
        progress (`TrainerState`): Steps, tokens and logged values.
        tokens_since_fired (`dict[str, torch.LongTensor]`): Tokens since each latent was active, `(num_latents,)`.
        initial_metrics (`dict[str, float]`): The metrics before the first step.
        best (`dict[str, float]`): The losses of the heads that `save_best` keeps.
        lowest ([`LowestLosses`]): The lowest value of each loss, with its step.
        skips ([`Skips`]): Skipped steps and left-out tokens.
        owes_evaluation (`bool`): Whether the present step still needs its evaluation, which a signal may interrupt.
        history ([`LogHistory`]): All logged values; `progress` holds the latest of them.
        means ([`RunningMeans`]), firing ([`FiringCounts`]): The values and firings since the last log.
        stream ([`SequenceStream`], *optional*): The training data, if they are streamed; it knows its own position.
    """

    def __init__(
        self,
        args: SaeTrainingArguments,
        plans: dict[str, HeadPlan],
        bank: SaeBank,
        spread: Spread,
        adapter: "PeftModel | None" = None,
        recipe: Recipe | None = None,
        identity: dict[str, Any] | None = None,
    ):
        self.args, self.plans, self.spread = args, plans, spread
        self.identity = identity or {}
        self.history = LogHistory(Path(args.output_dir))
        self.prepared_bank: nn.Module = bank
        self.adapter, self.recipe = adapter, recipe
        self.accelerator = spread.accelerator
        self.optimizer: torch.optim.Optimizer | None = None
        self.lr_scheduler: LRScheduler | None = None
        self.progress = TrainerState(
            is_local_process_zero=self.accelerator.is_local_main_process,
            is_world_process_zero=self.accelerator.is_main_process,
        )
        self.tokens_since_fired = {
            name: torch.zeros(head.num_latents, dtype=torch.long, device=self.accelerator.device)
            for name, head in bank.named_heads()
        }
        self.initial_metrics: dict[str, float] = {}
        self.best: dict[str, float] = {}
        self.skips, self.lowest = Skips(), LowestLosses(args.loss, plans)
        self.owes_evaluation = False
        self.stream: SequenceStream | None = None
        self.means, self.firing = RunningMeans(), FiringCounts()

    @property
    def bank(self) -> SaeBank:
        """The heads of this process and the parameters of a LoRA, without Accelerate's wrapper."""
        return self.accelerator.unwrap_model(self.prepared_bank)

    @property
    def heads(self) -> dict[str, HeadModel]:
        """The heads of this process by name."""
        return dict(self.bank.named_heads())

    def prepare(self, optimizer: torch.optim.Optimizer, lr_scheduler: LRScheduler) -> torch.optim.Optimizer:
        """
        Makes heads and optimizer ready to train.

        Returns:
            `torch.optim.Optimizer`: the optimizer in Accelerate's wrapper, whose `step` takes a step.
        """
        self.optimizer, self.lr_scheduler = optimizer, lr_scheduler
        self.prepared_bank, prepared = self.spread.prepare(self.bank, optimizer)
        return prepared

    @contextmanager
    def evaluated_weights(self) -> Iterator[None]:
        """While open, heads hold the weights to evaluate and save: with signum, the averaged weights."""
        self.prepared_bank.eval()
        try:
            if not isinstance(self.optimizer, Signum):
                yield
                return
            with self.optimizer.averaged(self.spread.optimized(self.optimizer)):
                self.spread.renew()
                yield
        finally:
            if isinstance(self.optimizer, Signum):
                self.spread.renew()
            self.prepared_bank.train()

    def save_heads(self, folder: Path, names: Iterable[str] | None = None) -> None:
        """
        Writes heads with the weights to evaluate, the LoRA if there is one, and the recipe.

        Args:
            folder (`Path`): The folder to write into.
            names (`Iterable[str]`, *optional*): Which heads; all if not given.

        Raises:
            `NotSaved`: on every process, if one could not write.
        """
        with written_together(folder) as write:
            self._write_heads(folder, write, names)

    def save_best(self, folder: Path, names: list[str]) -> None:
        """
        Keeps heads as the best so far: with `loss: fvu` each head alone, otherwise all heads as one set.

        Raises:
            `NotSaved`: on every process, if one could not write.
        """
        if self.args.loss == "fvu":
            self.save_heads(folder, names)
            return
        with staged(folder, self.accelerator) as (staging, write):
            self._write_heads(staging, write, names)

    def _write_heads(self, folder: Path, write: Writing, names: Iterable[str] | None = None) -> None:
        names = set(self.plans if names is None else names)
        index, adapter, recipe = self.accelerator.process_index, self.adapter, self.recipe
        with self.evaluated_weights():
            for name, head in self.heads.items():
                if name in names:
                    weights = self.spread.weights(head)
                    if self.spread.writes(name):
                        write(partial(save_head, head, weights, folder / name, index))
        if not self.accelerator.is_main_process:
            return
        if adapter is not None:
            write(lambda: save_lora(adapter, folder / ADAPTER))
        if recipe is not None:
            write(lambda: recipe.save(folder / RECIPE))

    def save_report(self, metrics: dict[str, float], frequencies: dict[str, Tensor]) -> None:
        """
        Writes the metrics, the latents' frequencies and the model card.

        Args:
            metrics (`dict[str, float]`): The final metrics of the run.
            frequencies (`dict[str, torch.Tensor]`): For each head of this process, the fraction of tokens on which
                each latent is active, `(num_latents,)`.

        Raises:
            `NotSaved`: on every process, if the main process could not write.
        """
        folder = Path(self.args.output_dir)
        own = {
            name: self.spread.whole(head, "encoder.bias", frequencies[name]).float().cpu().contiguous()
            for name, head in self.heads.items()
            if name in frequencies
        }
        # Reversed, so that the entry of the first process that holds a head wins: only that one has the whole tensor.
        everyone = {name: part for one in reversed(gather_object([own])) for name, part in one.items()}
        with written_together(folder) as write:
            if self.accelerator.is_main_process:
                write(lambda: write_json(folder / METRICS, metrics))
                write(lambda: self._save_progress(folder))
                write(lambda: write_tensors(folder / FREQUENCIES, everyone))
                # `include`, because the folder may hold other models.
                write(lambda: write_card(folder, include=list(self.plans)))

    def save_checkpoint(self, position: Position) -> Path:
        """
        Writes a checkpoint with everything that a run needs to go on; a kill leaves it complete or absent.

        Args:
            position ([`Position`]): The place in the data where the next step begins.

        Returns:
            `Path`: the checkpoint's folder.

        Raises:
            `NotSaved`: on every process, if one could not write.
        """
        output_dir = Path(self.args.output_dir)
        folder = output_dir / f"checkpoint-{self.progress.global_step}"
        everyone = gather_object([files.random_state()])
        sums = self.spread.merged({key: value.item() for key, value in self.means.sums.items()})
        with written_together(folder) as write:
            if self.accelerator.is_main_process:
                write(lambda: files.claim(output_dir, folder))
        with staged(folder, self.accelerator, self._checkpoint_bytes()) as (staging, write):
            self._write_heads(staging, write)
            self._write_parts(staging, write)
            if self.accelerator.is_main_process:
                write(lambda: self._save_progress(staging))
                state = {
                    "format": files.FORMAT,
                    "identity": self.identity,
                    "sequences": position.batches * self._sequences(),
                    "epoch": position.epoch,
                    "stream": None if self.stream is None else self.stream.state_dict(),
                    "since_log": {"sums": sums, "steps": self.means.steps},
                    "initial_metrics": self.initial_metrics,
                    "best": self.best,
                    "skips": asdict(self.skips),
                    "owes_evaluation": self.owes_evaluation,
                    "lowest": self.lowest.state_dict(),
                    "random": everyone,
                }
                write(lambda: save_state(state, staging / files.STATE_FILE))
        return folder

    def _checkpoint_bytes(self) -> int:
        trains_heads = any(parameter.requires_grad for parameter in self.bank.heads.parameters())
        shapes = [parameter.shape for parameter in self.bank.adapter]
        return checkpoint_bytes(self.plans.values(), self.args, shapes, trains_heads)

    def _save_progress(self, folder: Path) -> None:
        """Writes `progress` without the logged values, which have a file of their own."""
        replace(self.progress, log_history=[]).save_to_json(str(folder / TRAINER_STATE))

    def load_weights(self, checkpoint: Path) -> dict[str, Any]:
        """
        Puts a checkpoint's weights into heads that are not yet prepared.

        Returns:
            `dict[str, Any]`: the rest of the checkpoint, for `restore`.

        Raises:
            `InputError`: if the checkpoint does not exist, is incomplete, or comes from another recipe.
        """
        saved = files.load_state(checkpoint)
        differences = Differences.between(saved["identity"], self.identity, self.args.allow_changes)
        differences.refuse(checkpoint)
        saved["differences"] = differences
        saved["parts"] = {name: self._load_part(checkpoint, name) for name in self._parts()}
        for name, head in self.heads.items():
            # With signum the heads on disk hold the average, but training goes on from the weights of the gradient.
            weights = saved["parts"][name]["weights"] or load_file(checkpoint / name / WEIGHTS)
            head.load_whole(weights)
        if self.adapter is not None:
            weights = saved["parts"][ADAPTER]["weights"]
            for parameter, value in zip(self.bank.adapter, weights.values(), strict=True):
                parameter.data.copy_(value)
        return saved

    def restore(self, checkpoint: Path, saved: dict[str, Any]) -> Position:
        """
        Brings a prepared run to the state of a checkpoint.

        Args:
            checkpoint (`Path`): The checkpoint's folder.
            saved (`dict[str, Any]`): The result of `load_weights`.

        Returns:
            [`Position`]: the checkpoint's place in the data.
        """
        # The optimizer names a LoRA "lora", while its folder is `adapter`.
        states = {name: part["optimizer"] for name, part in saved["parts"].items()}
        states["lora"] = states.get(ADAPTER, {})
        optimizer, lr_scheduler = self._begun()
        self.spread.load_states(self.heads, optimizer, states)
        progress = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE))
        self.progress.global_step = progress.global_step
        self.progress.num_input_tokens_seen = progress.num_input_tokens_seen
        # A skipped step does not move the schedule.
        bring_to(lr_scheduler, progress.global_step - saved["skips"]["steps"])
        for name, head in self.heads.items():
            count = head.own_rows(saved["parts"][name]["tokens_since_fired"])
            self.tokens_since_fired[name] = count.to(self.accelerator.device)
            if (uses := saved["parts"][name]["uses"]) is not None:
                tokens = saved["parts"][name]["uses_tokens"].to(self.accelerator.device)
                self.firing.load(name, head.own_rows(uses).to(self.accelerator.device), tokens)
        self.means.load(**saved["since_log"], heads=self.heads, device=self.accelerator.device)
        self.initial_metrics.update(saved["initial_metrics"])
        self.best.update(saved["best"])
        self.skips = Skips(**saved["skips"])
        self.owes_evaluation = saved["owes_evaluation"]
        self.lowest.load_state_dict(saved["lowest"])
        if self.accelerator.num_processes == len(saved["random"]):
            files.restore_random_state(saved["random"][self.accelerator.process_index])
        saved["differences"].tell(checkpoint)
        if saved["differences"].moves:
            return Position()
        # Another tokenizer cuts the documents into other sequences, so the stream's position means nothing.
        is_same = not any(field.startswith("model.") for field in saved["differences"].changed)
        if is_same and self.stream is not None and saved["stream"] is not None:
            self.stream.load_state_dict(saved["stream"])
        # Rounded up: on another number of processes the rest of a batch is skipped, so that no row trains twice.
        return Position(saved["epoch"], -(-saved["sequences"] // self._sequences()))

    def tell_left_out(self) -> None:
        """Prints which rows of a stream were left out; other data report their rows while they are read."""
        if self.stream is not None:
            self.stream.bad_rows.tell()

    def begin_history(self, checkpoint: Path | None) -> None:
        """Takes over the log up to a checkpoint, which may come from another run; without one, begins an empty log."""
        output_dir = Path(self.args.output_dir)
        # Again, because a kill may have come between the last save and its deletion of old checkpoints.
        files.drop_old(output_dir, self.args.save_total_limit, but_aside=True)
        source = output_dir if checkpoint is None else checkpoint.parent
        self.progress.log_history = self.history.begin(self.progress.global_step, source)
        for entry in self.progress.log_history:
            self.lowest.observe(entry, int(entry["step"]))

    def _begun(self) -> tuple[torch.optim.Optimizer, LRScheduler]:
        assert self.optimizer is not None and self.lr_scheduler is not None, "the run has not begun"
        return self.optimizer, self.lr_scheduler

    def _sequences(self) -> int:
        """The number of sequences in a batch over all processes."""
        return self.args.per_device_train_batch_size * self.accelerator.num_processes

    def _parts(self) -> list[str]:
        """The names of everything with parameters on this process: the heads, and the LoRA."""
        return [*self.heads, *([ADAPTER] if self.adapter is not None else [])]

    def _write_parts(self, staging: Path, write: Writing) -> None:
        """Writes a file beside each head with everything that only training needs."""
        optimizer, _ = self._begun()
        for name, head in self.heads.items():
            part = {
                "weights": self.spread.weights(head) if self.args.optim == "signum" else None,
                "optimizer": self.spread.states(name, head, optimizer),
                "tokens_since_fired": self.spread.whole(head, "encoder.bias", self.tokens_since_fired[name]),
                "uses": None,
            }
            if name in self.firing.uses:
                part["uses"] = self.spread.whole(head, "encoder.bias", self.firing.uses[name])
                part["uses_tokens"] = self.firing.tokens[name]
            if self.spread.writes(name):
                write(partial(save_state, part, staging / name / files.STATE_FILE))
        if self.adapter is not None and self.accelerator.is_main_process:
            weights = {str(i): parameter.detach() for i, parameter in enumerate(self.bank.adapter)}
            lora = {"weights": weights, "optimizer": self.spread.states("lora", None, optimizer)}
            write(lambda: save_state(lora, staging / ADAPTER / files.STATE_FILE))

    def _load_part(self, checkpoint: Path, name: str) -> dict[str, Any]:
        path = checkpoint / name / files.STATE_FILE
        if not path.is_file():
            raise InputError(
                f"Checkpoint {str(checkpoint)!r} has no {name}/{files.STATE_FILE}. Resume from another checkpoint."
            )
        # Memory-mapped, because a process reads only its own rows of a head that is cut up.
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
