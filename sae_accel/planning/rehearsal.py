from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..activations.running_lm import ActivationSource, RunningLM
from ..activations.trained_rows import Activations
from ..bank.bank import SaeBank, build_head
from ..bank.plans import HeadPlan
from ..lm.hooks import Site
from ..models import HeadModel, LatentSlice
from ..ops.rows import few_slices
from ..recipe.recipe import Recipe
from ..spread.replicated import Replicated
from ..training.assembly import assemble
from ..training.k_schedule import k_at
from ..training.optim import Signum
from .peak_memory import PeakMemory


if TYPE_CHECKING:
    from peft import PeftModel


@dataclass(frozen=True)
class Share:
    """
    What one process of a run holds and sees.

    Args:
        plans (`list[HeadPlan]`): Its heads.
        widths (`dict[Site, int]`): Every site that some head of the run reads or predicts, with its width.
        needs (`list[list[Site]]`, *optional*): By process, the sites whose activations it gets of all tokens; if not
            given, each sees its own tokens alone.
        index (`int`, defaults to 0): Which process this is.
        bounds (`dict[str, list[int]]`, *optional*): By head, where the latents of each process begin, and the end of
            the last; if not given, heads are whole.
        keeps_gradients (`bool`, defaults to `False`): Whether gradients have memory of their own all the time, as DDP
            gives them.
    """

    plans: list[HeadPlan]
    widths: dict[Site, int]
    needs: list[list[Site]] | None = None
    index: int = 0
    bounds: dict[str, list[int]] | None = None
    keeps_gradients: bool = False


class Rehearsal(NamedTuple):
    """
    Bytes that a process needs beside the LM's weights and what libraries take.

    Args:
        parameters (`int`): Of heads, and of a LoRA.
        gradients (`int`): Of those.
        optimizer (`int`): Its state.
        copies (`int`): Of parameters, while evaluation has others in their place.
        training (`int`): All of it at the peak of an optimizer step.
        evaluation (`int`): All of it at the peak of an evaluation.
    """

    parameters: int
    gradients: int
    optimizer: int
    copies: int
    training: int
    evaluation: int


def rehearse(recipe: Recipe, lm: PreTrainedModel, adapter: "PeftModel | None", share: Share, bf16: bool) -> Rehearsal:
    """
    Trains and evaluates a process's heads on tensors without memory, and notes what they would take.

    Args:
        recipe (`Recipe`): The run.
        lm (`PreTrainedModel`): Its LM, of fake tensors. Must be called within their mode.
        adapter (`PeftModel`, *optional*): The LM with a LoRA that trains.
        share ([`Share`]): What the process holds.
        bf16 (`bool`): Whether heads compute in bfloat16.
    """
    peak = PeakMemory([*lm.parameters(), *lm.buffers()])
    device = next(lm.parameters()).device
    with peak, device:
        stage = _Stage(recipe, lm, adapter, share, bf16, device)
        parameters, gradients = stage.sizes()
        # A LoRA came with the LM.
        peak.live += sum(parameter.numel() * parameter.itemsize for parameter in stage.bank.adapter)
        if share.keeps_gradients:
            stage.allot_gradients()
        training = max(peak.of(work) for work in (stage.backward, stage.step, stage.backward))
        stage.optimizer.zero_grad(set_to_none=not share.keeps_gradients)
        optimizer = peak.live - parameters - (gradients if share.keeps_gradients else 0)
        copies = gradients if isinstance(stage.optimizer, Signum) else 0
        return Rehearsal(parameters, gradients, optimizer, copies, training, peak.of(stage.evaluate))


class _Stage:
    """Heads, optimizer and objective of a process, put together as the trainer does it, and one batch."""

    def __init__(
        self,
        recipe: Recipe,
        lm: PreTrainedModel,
        adapter: "PeftModel | None",
        share: Share,
        bf16: bool,
        device: torch.device,
    ):
        training, exclude = recipe.training, list(recipe.data.exclude_tokens)
        spread = _RehearsedSpread(device, share)
        assembly = assemble(lm, training, spread, share.widths, exclude, recipe.lora, adapter)
        self.bank, self.objective, self.optimizer = assembly.bank, assembly.objective, assembly.optimizer()
        ids = torch.zeros(training.per_device_train_batch_size, recipe.data.sequence_length, dtype=torch.long)
        self.batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        self.window = [self.batch] * min(2, training.gradient_accumulation_steps)
        self.keeps_gradients = share.keeps_gradients
        self.precision = torch.autocast(device.type, torch.bfloat16) if bf16 else nullcontext()

    def sizes(self) -> tuple[int, int]:
        sizes = [(p.numel() * p.itemsize, p.requires_grad) for p in self.bank.parameters()]
        return sum(size for size, _ in sizes), sum(size for size, trains in sizes if trains)

    def allot_gradients(self) -> None:
        for parameter in self.bank.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None

    def backward(self) -> None:
        entries = {plan.name: plan.arguments for plan in self.bank.plans.values()}
        heads = dict(self.bank.named_heads())
        k = {name: k_at(0, head.config, entries[name]) for name, head in heads.items()}
        dead = {
            name: torch.zeros(head.num_latents, dtype=torch.bool)
            for name, head in heads.items()
            if entries[name].auxk_alpha
        }
        with self.precision:
            self.objective.gradients(self.bank, self.window, k, dead, careful=False)

    def step(self) -> None:
        # A slice's tensors count little beside the whole, and each costs as much time as a real one.
        with few_slices(max(p.numel() for p in self.bank.parameters()) // 64):
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=not self.keeps_gradients)

    def evaluate(self) -> None:
        averaged = self.optimizer.averaged() if isinstance(self.optimizer, Signum) else nullcontext()
        with averaged, self.precision:
            self.objective.evaluate(self.bank, [self.batch])


class _RehearsedSpread(Replicated):
    """How heads lie on a process whose others are not there."""

    def __init__(self, device: torch.device, share: Share):
        super().__init__(_Alone(device), share.plans)
        self.share = share

    def settle(self, bank: SaeBank) -> SaeBank:
        """Fake tensors stay where they were made."""
        return bank

    def build(self, plan: HeadPlan) -> HeadModel:
        """A fresh head, or the latents of it that the process holds."""
        head = build_head(plan)
        if self.share.bounds is not None:
            head.keep_latents(_SliceAlone(self.share.bounds[plan.name], self.share.index))
        return head

    def source(self, lm: RunningLM) -> ActivationSource:
        """Activations of this process's tokens, or with a copy for each process that they would come from."""
        needs, index = self.share.needs, self.share.index
        return lm if needs is None else lambda batch, careful=True: _exchanged(lm(batch, careful), needs, index)


class _Alone(SimpleNamespace):
    """What an objective asks of an `Accelerator`, of a process without others."""

    def __init__(self, device: torch.device):
        super().__init__(device=device, num_processes=1, process_index=0, is_main_process=True)

    def unwrap_model(self, model: nn.Module) -> nn.Module:
        return model

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def no_sync(self, model: nn.Module) -> AbstractContextManager[None]:
        return nullcontext()


class _SliceAlone(LatentSlice):
    """A slice of latents whose other processes are not there, but take the memory that they would."""

    def sum(self, part: Tensor) -> Tensor:
        return part.clone()

    def shared(self, tensor: Tensor) -> Tensor:
        return tensor

    def largest(self, values: Tensor) -> Tensor:
        candidates = values.detach().repeat(1, len(self.bounds) - 1)
        candidates.topk(values.shape[1], dim=1)
        return values.clone()


def _exchanged(own: Activations, needs: list[list[Site]], index: int) -> Activations:
    """Activations of all processes' tokens, with what is sent and received on the way."""
    sent = torch.cat([own.by_site[site].flatten() for sites in needs for site in sites])
    received = torch.cat([own.by_site[site].flatten() for _ in needs for site in needs[index]])
    by_site = {site: own.by_site[site].repeat(len(needs), 1) for site in needs[index]}
    del sent, received
    return Activations(by_site, own.num_tokens * len(needs))
