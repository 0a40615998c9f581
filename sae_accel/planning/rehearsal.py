"""
A rehearsal of training for the memory plan: one optimizer step and one evaluation of a process, on fake tensors.

The same code runs as in a real run: `assemble`, the objective, the optimizer. Only the other processes are missing, so
small stand-ins take the place of the Accelerator and of exchanges, and allocate the same memory.
"""

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
    The heads and tokens of one process of a run.

    Args:
        plans (`list[HeadPlan]`): The process's heads.
        widths (`dict[Site, int]`): Every site that a head of the run reads or predicts, with its width.
        needs (`list[list[Site]]`, *optional*): By process, the sites whose activations it gets for all tokens; if not
            given, each process sees only its own tokens.
        index (`int`, defaults to 0): The index of this process.
        bounds (`dict[str, list[int]]`, *optional*): By head, the first latent of each process, and the end of the
            last; if not given, heads are whole.
        keeps_gradients (`bool`, defaults to `False`): Whether gradients keep their memory between steps, as with DDP.
    """

    plans: list[HeadPlan]
    widths: dict[Site, int]
    needs: list[list[Site]] | None = None
    index: int = 0
    bounds: dict[str, list[int]] | None = None
    keeps_gradients: bool = False


class Rehearsal(NamedTuple):
    """
    The bytes that a process needs, without the LM's weights and libraries.

    Args:
        parameters (`int`): The parameters of heads and of a LoRA.
        gradients (`int`): The gradients of the parameters.
        optimizer (`int`): The optimizer's state.
        copies (`int`): Copies of parameters while an evaluation uses averaged ones.
        training (`int`): The total at the peak of an optimizer step.
        evaluation (`int`): The total at the peak of an evaluation.
    """

    parameters: int
    gradients: int
    optimizer: int
    copies: int
    training: int
    evaluation: int


def rehearse(recipe: Recipe, lm: PreTrainedModel, adapter: "PeftModel | None", share: Share, bf16: bool) -> Rehearsal:
    """
    Trains and evaluates a process's heads on tensors without memory, and counts the bytes. Call it within
    `FakeTensorMode`.

    Args:
        recipe (`Recipe`): The run.
        lm (`PreTrainedModel`): The run's LM, of fake tensors.
        adapter (`PeftModel`, *optional*): The LM with a LoRA that trains.
        share ([`Share`]): The heads and tokens of the process.
        bf16 (`bool`): Whether heads compute in bfloat16.
    """
    peak = PeakMemory([*lm.parameters(), *lm.buffers()])
    device = next(lm.parameters()).device
    with peak, device:
        stage = _Stage(recipe, lm, adapter, share, bf16, device)
        parameters, gradients = stage.sizes()
        # The LoRA was made with the LM, before the count began.
        peak.live += sum(parameter.numel() * parameter.itemsize for parameter in stage.bank.adapter)
        if share.keeps_gradients:
            stage.allot_gradients()
        training = max(peak.of(work) for work in (stage.backward, stage.step, stage.backward))
        stage.optimizer.zero_grad(set_to_none=not share.keeps_gradients)
        optimizer = peak.live - parameters - (gradients if share.keeps_gradients else 0)
        copies = gradients if isinstance(stage.optimizer, Signum) else 0
        return Rehearsal(parameters, gradients, optimizer, copies, training, peak.of(stage.evaluate))


class _Stage:
    """One batch and the heads, optimizer and objective of a process, put together as in the trainer."""

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
        # Few slices: a slice's tensors take little memory, but each operation takes time even on fake tensors.
        with few_slices(max(p.numel() for p in self.bank.parameters()) // 64):
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=not self.keeps_gradients)

    def evaluate(self) -> None:
        averaged = self.optimizer.averaged() if isinstance(self.optimizer, Signum) else nullcontext()
        with averaged, self.precision:
            self.objective.evaluate(self.bank, [self.batch])


class _RehearsedSpread(Replicated):
    """The spread of heads on one process of a run, while the other processes do not exist."""

    def __init__(self, device: torch.device, share: Share):
        super().__init__(_Alone(device), share.plans)
        self.share = share

    def settle(self, bank: SaeBank) -> SaeBank:
        """Returns the bank as it is, since fake tensors need no move."""
        return bank

    def build(self, plan: HeadPlan) -> HeadModel:
        """Makes a head, whole or with only the latents that the process holds."""
        head = build_head(plan)
        if self.share.bounds is not None:
            head.keep_latents(_SliceAlone(self.share.bounds[plan.name], self.share.index))
        return head

    def source(self, lm: RunningLM) -> ActivationSource:
        """The source of activations; if processes exchange them, copies stand in for the other processes' ones."""
        needs, index = self.share.needs, self.share.index
        return lm if needs is None else lambda batch, careful=True: _exchanged(lm(batch, careful), needs, index)


class _Alone(SimpleNamespace):
    """Stands in for the `Accelerator` of a single process, with the few methods that an objective calls."""

    def __init__(self, device: torch.device):
        super().__init__(device=device, num_processes=1, process_index=0, is_main_process=True)

    def unwrap_model(self, model: nn.Module) -> nn.Module:
        return model

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def no_sync(self, model: nn.Module) -> AbstractContextManager[None]:
        return nullcontext()


class _SliceAlone(LatentSlice):
    """A slice of latents without its other processes; it uses the same memory as with them."""

    def sum(self, part: Tensor) -> Tensor:
        return part.clone()

    def shared(self, tensor: Tensor) -> Tensor:
        return tensor

    def largest(self, values: Tensor) -> Tensor:
        # (tokens, k * processes)
        candidates = values.detach().repeat(1, len(self.bounds) - 1)
        candidates.topk(values.shape[1], dim=1)
        return values.clone()


def _exchanged(own: Activations, needs: list[list[Site]], index: int) -> Activations:
    """The activations of all processes' tokens, made through send and receive buffers as in the exchange."""
    sent = torch.cat([own.by_site[site].flatten() for sites in needs for site in sites])
    received = torch.cat([own.by_site[site].flatten() for _ in needs for site in needs[index]])
    # (tokens * processes, width) each
    by_site = {site: own.by_site[site].repeat(len(needs), 1) for site in needs[index]}
    del sent, received
    return Activations(by_site, own.num_tokens * len(needs))
