import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import TrainerState

from . import checkpoint as files
from ..data.batches import Position
from ..common.errors import InputError
from ..common.run_files import ADAPTER, FREQUENCIES, METRICS, RECIPE, TRAINER_STATE
from ..cards.model_card import write_card


class Saver:
    """
    Writes a run's heads and checkpoints, and goes on from these. A checkpoint holds each head whole, with the
    optimizer's state for it, so that a run may go on from it on another number of processes or spread in another way.

    Args:
        trainer ([`SaeTrainer`]): The run.
    """

    def __init__(self, trainer: Any):
        self.trainer = trainer
        self.spread, self.accelerator = trainer.spread, trainer.accelerator

    def save_into(self, folder: Path, names: Iterable[str] | None = None) -> None:
        """
        Writes heads as they are at present, a LoRA that was trained around them, and the recipe.

        Args:
            folder (`Path`): Where.
            names (`Iterable[str]`, *optional*): Which heads; all if not given.
        """
        names = set(self.trainer.plans if names is None else names)
        for name, head in self.trainer.heads.items():
            if name in names:
                weights = self.spread.weights(head)
                if self.spread.writes(name):
                    files.save_head(head, weights, folder / name, self.accelerator.process_index)
        if not self.accelerator.is_main_process:
            return
        if self.trainer.adapter is not None:
            from ..training.lora import save_lora

            save_lora(self.trainer.adapter, folder / ADAPTER)
        if self.trainer.recipe is not None:
            self.trainer.recipe.save(folder / RECIPE)

    def save_report(self, metrics: dict[str, float], frequencies: dict[str, Tensor]) -> None:
        """
        Writes what the model card is made of, and the card.

        Args:
            metrics (`dict[str, float]`): Of the run.
            frequencies (`dict[str, torch.Tensor]`): By head of this process, how often each latent is active,
                `(num_latents,)`.
        """
        trainer, folder = self.trainer, self.trainer.output_dir
        own = {
            name: self.spread.whole(head, "encoder.bias", frequencies[name]).float().cpu().contiguous()
            for name, head in trainer.heads.items()
            if name in frequencies
        }
        # Of the processes that hold a head, the first writes it, and so has got all of it.
        everyone = {name: part for one in reversed(gather_object([own])) for name, part in one.items()}
        if self.accelerator.is_main_process:
            (folder / METRICS).write_text(json.dumps(metrics, indent=2) + "\n")
            trainer.state.save_to_json(str(folder / TRAINER_STATE))
            save_file(everyone, folder / FREQUENCIES)
            # Other models may lie in the folder.
            write_card(folder, include=list(trainer.plans))

    def save_checkpoint(self, position: Position) -> Path:
        """Everything that going on needs, complete or absent."""
        trainer = self.trainer
        folder = trainer.output_dir / f"checkpoint-{trainer.state.global_step}"
        everyone = gather_object([files.random_state()])
        with files.staged(folder, self.accelerator) as staging:
            with trainer.evaluated_weights():
                self.save_into(staging)
            self._save_states(staging)
            if self.accelerator.is_main_process:
                trainer.state.save_to_json(str(staging / TRAINER_STATE))
                state = {
                    "identity": self.identity(),
                    "sequences": position.batches * self._sequences(),
                    "epoch": position.epoch,
                    "initial_metrics": trainer.initial_metrics,
                    "best": trainer.best,
                    "random": everyone,
                }
                torch.save(state, staging / files.STATE_FILE)
        if self.accelerator.is_main_process:
            files.drop_old(trainer.output_dir, trainer.args.save_total_limit)
        self.accelerator.wait_for_everyone()
        return folder

    def load_weights(self, checkpoint: Path) -> dict[str, Any]:
        """
        Puts a checkpoint's weights into heads that are not yet prepared, and returns what else it holds of the run.

        Raises:
            `InputError`: if it does not exist, is not whole, or is of another recipe.
        """
        state = files.load_state(checkpoint)
        files.check_fits(checkpoint, state, self.identity())
        state["parts"] = {name: self._load_part(checkpoint, name) for name in self._parts()}
        for name, head in self.trainer.heads.items():
            # The heads on disk may hold an average; training goes on from where the gradient is taken.
            weights = state["parts"][name]["weights"] or load_file(checkpoint / name / files.WEIGHTS)
            head.load_whole(weights)
        if self.trainer.adapter is not None:
            weights = state["parts"][ADAPTER]["weights"]
            for parameter, value in zip(self.trainer.bank.adapter, weights.values(), strict=True):
                parameter.data.copy_(value)
        return state

    def restore(self, checkpoint: Path, state: dict[str, Any]) -> Position:
        """Brings a prepared run to where a checkpoint was written, and says where in the data that was."""
        trainer = self.trainer
        # The optimizer knows a LoRA's parameters by another name than its folder.
        states = {name: part["optimizer"] for name, part in state["parts"].items()}
        states["lora"] = states.get(ADAPTER, {})
        self.spread.load_states(trainer.heads, trainer.own_optimizer, states)
        saved = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE))
        trainer.state.global_step, trainer.state.num_input_tokens_seen = saved.global_step, saved.num_input_tokens_seen
        trainer.state.log_history = saved.log_history
        _bring_to(trainer.lr_scheduler, saved.global_step)
        for name, head in trainer.heads.items():
            count = head.own_rows(state["parts"][name]["tokens_since_fired"])
            trainer.tokens_since_fired[name] = count.to(self.accelerator.device)
        trainer.initial_metrics, trainer.best = state["initial_metrics"], state["best"]
        if self.accelerator.num_processes == len(state["random"]):
            files.restore_random_state(state["random"][self.accelerator.process_index])
        # What is left of a batch on another number of processes is passed over, so that nothing trains twice.
        return Position(state["epoch"], -(-state["sequences"] // self._sequences()))

    def identity(self) -> dict[str, Any]:
        """What a checkpoint must have in common with a run that goes on from it."""
        trainer = self.trainer
        return {
            "heads and latents": {name: plan.config.num_latents for name, plan in trainer.plans.items()},
            "training.optim": trainer.args.optim,
            "heads that train": []
            if trainer.lora is not None and not trainer.lora.train_heads
            else list(trainer.plans),
            "shapes of a LoRA": [
                list(parameter.shape) for parameter in self.accelerator.unwrap_model(trainer.bank).adapter
            ],
        }

    def _sequences(self) -> int:
        """In a batch, over all processes."""
        return self.trainer.args.per_device_train_batch_size * self.accelerator.num_processes

    def _parts(self) -> list[str]:
        """What has parameters of its own on this process: heads, and a LoRA."""
        return [*self.trainer.heads, *([ADAPTER] if self.trainer.adapter is not None else [])]

    def _save_states(self, staging: Path) -> None:
        """Beside each head, what training it needs and using it does not."""
        trainer = self.trainer
        for name, head in trainer.heads.items():
            part = {
                "weights": self.spread.weights(head) if trainer.args.optim == "signum" else None,
                "optimizer": self.spread.states(name, head, trainer.own_optimizer),
                "tokens_since_fired": self.spread.whole(head, "encoder.bias", trainer.tokens_since_fired[name]),
            }
            if self.spread.writes(name):
                torch.save(part, staging / name / files.STATE_FILE)
        if trainer.adapter is not None and self.accelerator.is_main_process:
            adapter = self.accelerator.unwrap_model(trainer.bank).adapter
            weights = {str(i): parameter.detach() for i, parameter in enumerate(adapter)}
            part = {"weights": weights, "optimizer": self.spread.states("lora", None, trainer.own_optimizer)}
            torch.save(part, staging / ADAPTER / files.STATE_FILE)

    def _load_part(self, checkpoint: Path, name: str) -> dict[str, Any]:
        path = checkpoint / name / files.STATE_FILE
        if not path.is_file():
            raise InputError(
                f"Checkpoint {str(checkpoint)!r} has no {name}/{files.STATE_FILE}. Resume from another one."
            )
        # Mapped, not read: of a head that is cut up a process takes its own rows alone.
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def _bring_to(scheduler: Any, step: int) -> None:
    """A schedule's learning rates follow from its step alone, and its base rates from the recipe."""
    if step:
        scheduler.last_epoch, scheduler._step_count = step - 1, step + 1
        scheduler.step()
