import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from transformers import TrainerState

from ..bank.bank import SaeBank
from ..bank.plans import HeadPlan
from ..cards.model_card import write_card
from ..common.errors import InputError
from ..common.run_files import ADAPTER, FREQUENCIES, METRICS, RECIPE, TRAINER_STATE
from ..data.batches import Position
from ..models import HeadModel
from ..recipe.arguments import SaeTrainingArguments
from ..recipe.recipe import Recipe
from ..runs import checkpoint as files
from ..spread.base import Spread
from .lora import save_lora
from .optim import Signum


class RunState:
    """
    What a run is in the midst of: heads, a LoRA, optimizer, schedule and counters. It writes itself into a checkpoint,
    and goes on from one. A checkpoint holds each head whole, with the optimizer's state for it, so that a run may go
    on from it on another number of processes, or spread in another way.

    Args:
        args (`SaeTrainingArguments`): How the run trains.
        plans (`dict[str, HeadPlan]`): All heads of the run by name.
        bank (`SaeBank`): The heads of this process, not yet prepared.
        spread ([`Spread`]): How heads lie on processes.
        adapter (`PeftModel`, *optional*): The LM with the LoRA that is trained around the heads.
        recipe ([`Recipe`], *optional*): What is run, saved beside the heads.

    Attributes:
        prepared_bank (`nn.Module`): The bank, with what Accelerate has wrapped around it once the run begins.
        optimizer (`torch.optim.Optimizer`, *optional*): The one that holds the state, and not what Accelerate wraps
            around it; like `lr_scheduler`, made when the run begins.
        progress (`TrainerState`): Steps, tokens and what was logged.
        tokens_since_fired (`dict[str, torch.LongTensor]`): By head of this process, for each latent the tokens since
            it was last active, `(num_latents,)`.
        initial_metrics (`dict[str, float]`): What was measured before the first step.
        best (`dict[str, float]`): The lowest losses at which heads were kept.
    """

    def __init__(
        self,
        args: SaeTrainingArguments,
        plans: dict[str, HeadPlan],
        bank: SaeBank,
        spread: Spread,
        adapter: PeftModel | None = None,
        recipe: Recipe | None = None,
    ):
        self.args, self.plans, self.spread = args, plans, spread
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
        self._trains_heads = any(parameter.requires_grad for parameter in bank.heads.parameters())

    @property
    def bank(self) -> SaeBank:
        """The heads of this process, and the parameters of a LoRA, without what is wrapped around them."""
        return self.accelerator.unwrap_model(self.prepared_bank)

    @property
    def heads(self) -> dict[str, HeadModel]:
        """The heads of this process by name."""
        return dict(self.bank.named_heads())

    def prepare(self, optimizer: torch.optim.Optimizer, lr_scheduler: LRScheduler) -> torch.optim.Optimizer:
        """
        Makes heads and optimizer ready to train.

        Returns:
            `torch.optim.Optimizer`: what takes a step, with what Accelerate has wrapped around it.
        """
        self.optimizer, self.lr_scheduler = optimizer, lr_scheduler
        self.prepared_bank, prepared = self.spread.prepare(self.bank, optimizer)
        return prepared

    @contextmanager
    def evaluated_weights(self) -> Iterator[None]:
        """While open, heads are as they are evaluated and saved: with signum, the weights are the averaged ones."""
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

    def save_into(self, folder: Path, names: Iterable[str] | None = None) -> None:
        """
        Writes heads as they are evaluated, a LoRA that was trained around them, and the recipe.

        Args:
            folder (`Path`): Where.
            names (`Iterable[str]`, *optional*): Which heads; all if not given.
        """
        names = set(self.plans if names is None else names)
        with self.evaluated_weights():
            for name, head in self.heads.items():
                if name in names:
                    weights = self.spread.weights(head)
                    if self.spread.writes(name):
                        files.save_head(head, weights, folder / name, self.accelerator.process_index)
            if not self.accelerator.is_main_process:
                return
            if self.adapter is not None:
                save_lora(self.adapter, folder / ADAPTER)
            if self.recipe is not None:
                self.recipe.save(folder / RECIPE)

    def save_report(self, metrics: dict[str, float], frequencies: dict[str, Tensor]) -> None:
        """
        Writes what the model card is made of, and the card.

        Args:
            metrics (`dict[str, float]`): What the run came to.
            frequencies (`dict[str, torch.Tensor]`): By head of this process, how often each latent is active,
                `(num_latents,)`.
        """
        folder = Path(self.args.output_dir)
        own = {
            name: self.spread.whole(head, "encoder.bias", frequencies[name]).float().cpu().contiguous()
            for name, head in self.heads.items()
            if name in frequencies
        }
        # Of the processes that hold a head, the first writes it, and so has got all of it.
        everyone = {name: part for one in reversed(gather_object([own])) for name, part in one.items()}
        if self.accelerator.is_main_process:
            (folder / METRICS).write_text(json.dumps(metrics, indent=2) + "\n")
            self.progress.save_to_json(str(folder / TRAINER_STATE))
            save_file(everyone, folder / FREQUENCIES)
            # Other models may lie in the folder.
            write_card(folder, include=list(self.plans))

    def save_checkpoint(self, position: Position) -> Path:
        """
        Writes everything that going on needs, complete or absent.

        Args:
            position ([`Position`]): Where in the data the next step begins.

        Returns:
            `Path`: the checkpoint's folder.
        """
        output_dir = Path(self.args.output_dir)
        folder = output_dir / f"checkpoint-{self.progress.global_step}"
        everyone = gather_object([files.random_state()])
        with files.staged(folder, self.accelerator) as staging:
            self.save_into(staging)
            self._save_parts(staging)
            if self.accelerator.is_main_process:
                self.progress.save_to_json(str(staging / TRAINER_STATE))
                state = {
                    "identity": self.identity(),
                    "sequences": position.batches * self._sequences(),
                    "epoch": position.epoch,
                    "initial_metrics": self.initial_metrics,
                    "best": self.best,
                    "random": everyone,
                }
                torch.save(state, staging / files.STATE_FILE)
        if self.accelerator.is_main_process:
            files.drop_old(output_dir, self.args.save_total_limit)
        self.accelerator.wait_for_everyone()
        return folder

    def load_weights(self, checkpoint: Path) -> dict[str, Any]:
        """
        Puts a checkpoint's weights into heads that are not yet prepared.

        Returns:
            `dict[str, Any]`: what else the checkpoint holds of the run, for `restore`.

        Raises:
            `InputError`: if it does not exist, is not whole, or is of another recipe.
        """
        saved = files.load_state(checkpoint)
        files.check_fits(checkpoint, saved, self.identity())
        saved["parts"] = {name: self._load_part(checkpoint, name) for name in self._parts()}
        for name, head in self.heads.items():
            # The heads on disk may hold an average; training goes on from where the gradient is taken.
            weights = saved["parts"][name]["weights"] or load_file(checkpoint / name / files.WEIGHTS)
            head.load_whole(weights)
        if self.adapter is not None:
            weights = saved["parts"][ADAPTER]["weights"]
            for parameter, value in zip(self.bank.adapter, weights.values(), strict=True):
                parameter.data.copy_(value)
        return saved

    def restore(self, checkpoint: Path, saved: dict[str, Any]) -> Position:
        """
        Brings a prepared run to where a checkpoint was written.

        Args:
            checkpoint (`Path`): Its folder.
            saved (`dict[str, Any]`): As `load_weights` gave it.

        Returns:
            [`Position`]: where in the data that was.
        """
        # The optimizer knows a LoRA's parameters by another name than its folder.
        states = {name: part["optimizer"] for name, part in saved["parts"].items()}
        states["lora"] = states.get(ADAPTER, {})
        optimizer, lr_scheduler = self._begun()
        self.spread.load_states(self.heads, optimizer, states)
        progress = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE))
        self.progress.global_step = progress.global_step
        self.progress.num_input_tokens_seen = progress.num_input_tokens_seen
        self.progress.log_history = progress.log_history
        _bring_to(lr_scheduler, progress.global_step)
        for name, head in self.heads.items():
            count = head.own_rows(saved["parts"][name]["tokens_since_fired"])
            self.tokens_since_fired[name] = count.to(self.accelerator.device)
        self.initial_metrics.update(saved["initial_metrics"])
        self.best.update(saved["best"])
        if self.accelerator.num_processes == len(saved["random"]):
            files.restore_random_state(saved["random"][self.accelerator.process_index])
        # What is left of a batch on another number of processes is passed over, so that nothing trains twice.
        return Position(saved["epoch"], -(-saved["sequences"] // self._sequences()))

    def identity(self) -> dict[str, Any]:
        """What a checkpoint must have in common with a run that goes on from it, by its name in words."""
        return {
            "heads and latents": {name: plan.config.num_latents for name, plan in self.plans.items()},
            "training.optim": self.args.optim,
            "heads that train": list(self.plans) if self._trains_heads else [],
            "shapes of a LoRA": [list(parameter.shape) for parameter in self.bank.adapter],
        }

    def _begun(self) -> tuple[torch.optim.Optimizer, LRScheduler]:
        assert self.optimizer is not None and self.lr_scheduler is not None, "the run has not begun"
        return self.optimizer, self.lr_scheduler

    def _sequences(self) -> int:
        """Sequences in a batch, over all processes."""
        return self.args.per_device_train_batch_size * self.accelerator.num_processes

    def _parts(self) -> list[str]:
        """What has parameters of its own on this process: heads, and a LoRA."""
        return [*self.heads, *([ADAPTER] if self.adapter is not None else [])]

    def _save_parts(self, staging: Path) -> None:
        """Writes beside each head what training it needs and using it does not."""
        optimizer, _ = self._begun()
        for name, head in self.heads.items():
            part = {
                "weights": self.spread.weights(head) if self.args.optim == "signum" else None,
                "optimizer": self.spread.states(name, head, optimizer),
                "tokens_since_fired": self.spread.whole(head, "encoder.bias", self.tokens_since_fired[name]),
            }
            if self.spread.writes(name):
                torch.save(part, staging / name / files.STATE_FILE)
        if self.adapter is not None and self.accelerator.is_main_process:
            weights = {str(i): parameter.detach() for i, parameter in enumerate(self.bank.adapter)}
            part = {"weights": weights, "optimizer": self.spread.states("lora", None, optimizer)}
            torch.save(part, staging / ADAPTER / files.STATE_FILE)

    def _load_part(self, checkpoint: Path, name: str) -> dict[str, Any]:
        path = checkpoint / name / files.STATE_FILE
        if not path.is_file():
            raise InputError(
                f"Checkpoint {str(checkpoint)!r} has no {name}/{files.STATE_FILE}. Resume from another one."
            )
        # Mapped, not read: of a head that is cut up a process takes its own rows alone.
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def _bring_to(scheduler: LRScheduler, step: int) -> None:
    """A schedule's learning rates follow from its step alone, and its base rates from the recipe."""
    if step:
        # The count is private to torch, which warns if it does not fit; the tests that resume make warnings errors.
        scheduler.last_epoch, scheduler._step_count = step - 1, step + 1
        scheduler.step()
