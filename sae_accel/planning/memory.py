"""
The memory that each process of a run will need, before the run starts.

The plan builds the LM's architecture without weights, and trains and evaluates the heads for a step on fake tensors,
which have shapes but no memory (`rehearsal.py`). It counts the bytes of all tensors that live at one time. FSDP, ZeRO
and quantisation cannot run on fake tensors: there the plan divides the counts, with factors that were measured.
"""

import os
from copy import copy
from dataclasses import dataclass, replace
from importlib import import_module
from typing import TYPE_CHECKING

import psutil
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..bank.plans import HeadPlan, plan_heads, site_widths
from ..common.tables import aligned
from ..lm.hooks import base_of
from ..lm.load import load_architecture
from ..lm.sharding import modules_to_shard
from ..models.latent_selection import BATCHTOPK_MOST, SELECTIONS
from ..recipe.arguments import LoraArguments
from ..recipe.checks import check_sharding
from ..recipe.recipe import Recipe
from ..spread.latents import latent_bounds
from ..spread.placement import num_parameters, place_heads
from ..spread.zero import LEAN
from ..training.look_ahead import look_ahead
from ..training.lora import add_lora, lora_targets
from .launch import Launch
from .rehearsal import Rehearsal, Share, rehearse


if TYPE_CHECKING:
    from peft import PeftModel


# Bytes per weight of a linear layer that bitsandbytes quantises; with 4 bits also one scale per block of 64.
_QUANTIZED_BYTES = {"8bit": 1.0, "4bit": 0.5 + 4 / 64}
# Copies of the largest head that FSDP and ZeRO-3 gather from their parts, in training and in evaluation. Measured with
# gloo, whose collectives copy; on GPUs it is less.
_GATHERED = {"FSDP": (6.2, 3.0), "ZeRO-3": (7.5, 1.5)}
# Bytes of CPU memory that the run's data, trackers and threads take after the plan is made.
_YET_TO_LOAD = 80_000_000
# Ways that cut heads into parts, with their ZeRO stage; 0 for FSDP.
_IN_PARTS = {"FSDP": 0, "ZeRO-1": 1, "ZeRO-2": 2, "ZeRO-3": 3}


@dataclass(frozen=True)
class ProcessMemory:
    """
    The peak memory of a process, in bytes.

    Args:
        heads (`list[str]`): The heads that the process holds, whole or in part.
        parameters (`int`): The parameters of heads and of a LoRA.
        gradients (`int`): The gradients of the parameters.
        optimizer (`int`): The optimizer's state.
        lm (`int`): The LM's weights.
        work (`int`): Everything else at the peak: activations, gathered parts, and copies in an evaluation.
        libraries (`int`): On a CPU, Python with its loaded libraries; 0 with a GPU.
    """

    heads: list[str]
    parameters: int
    gradients: int
    optimizer: int
    lm: int
    work: int
    libraries: int

    @property
    def total(self) -> int:
        """The sum of all parts, in bytes."""
        return self.parameters + self.gradients + self.optimizer + self.lm + self.work + self.libraries


def show_plan(recipe: Recipe, processes: int | None = None) -> None:
    """
    Prints the heads and the memory of each process of a run, and the disk space of its checkpoints.

    Args:
        recipe ([`Recipe`]): The run.
        processes (`int`, *optional*): The number of processes; if not given, the number that was started.

    Raises:
        `InputError`: if the run would be refused.
    """
    launch = Launch.of(recipe.training, processes)
    first = int(os.environ.get("RANK", 0)) == 0
    if recipe.model.shard:
        check_sharding(with_lm_head=recipe.training.loss != "fvu", processes=launch.processes)
    # The plan itself may run on a single process, which cannot shard the LM.
    whole = replace(recipe, model=replace(recipe.model, shard=False))
    ahead = look_ahead(whole, launch.processes, writes=first, only_plans=True)
    plan = plan_memory(replace(recipe, data=ahead.recipe.data), launch)
    if first:
        deletes = ahead.deletes and f"In {recipe.training.output_dir!r} the run would delete {ahead.deletes}."
        print("\n\n".join(part for part in (memory_table(plan, launch), ahead.room, deletes) if part))


def plan_memory(recipe: Recipe, launch: Launch) -> list[ProcessMemory]:
    """
    Computes the memory of each process. It does not read the LM's weights.

    Args:
        recipe (`Recipe`): The run.
        launch ([`Launch`]): How the run will be started.

    Returns:
        `list[ProcessMemory]`: one entry per process.

    Raises:
        `InputError`: if the run would be refused because of its LM, its heads or the number of processes.
    """
    training = recipe.training
    with_lm_head = training.loss != "fvu"
    if recipe.model.shard:
        check_sharding(with_lm_head=with_lm_head, processes=launch.processes)
    lm = load_architecture(replace(recipe.model, shard=False), with_lm_head=with_lm_head)
    plans = [_countable(plan) for plan in plan_heads(lm, recipe.heads, spliced=with_lm_head)]
    nn.Module.to(lm, _dtype_of(recipe, lm))
    lm_bytes = _lm_bytes(lm, recipe, launch)
    adapter = None if recipe.lora is None else _with_lora(lm, plans, recipe.lora)
    # Imported only so that its memory counts: a run loads these modules, a plan does not.
    import_module("sae_accel.training.run")
    libraries = 0 if torch.cuda.is_available() else psutil.Process().memory_info().rss + _YET_TO_LOAD
    found: dict[tuple, Rehearsal] = {}
    rows: list[ProcessMemory] = []
    with FakeTensorMode(allow_non_fake_inputs=True):
        whole = lm if adapter is None else adapter
        whole.to_empty(device="cuda" if torch.cuda.is_available() else "cpu")
        for share in _shares(recipe, plans, launch):
            # Processes with shares of equal size need the same memory: rehearse once per size.
            if (size := _size(share)) not in found:
                found[size] = rehearse(recipe, lm, adapter, share, launch.bf16)
            names = [plan.name for plan in share.plans]
            parameters, gradients, optimizer, work = _spread_out(found[size], plans, launch)
            one = ProcessMemory(names, parameters, gradients, optimizer, lm_bytes, work, libraries)
            writes = libraries and (not rows or launch.way == "distribute_modules")
            rows.append(_with_saving(one, found[size], share.plans, launch) if writes else one)
    return rows


def memory_table(processes: list[ProcessMemory], launch: Launch) -> str:
    """A table with one line per process, in GB of 10^9 bytes."""
    head = ("process", "heads", "parameters", "gradients", "optimizer", "LM", "activations", "Python", "total")
    rows: list[tuple[str, ...]] = [head]
    for index, one in enumerate(processes):
        sizes = (one.parameters, one.gradients, one.optimizer, one.lm, one.work, one.libraries, one.total)
        rows.append((str(index), _some(one.heads), *(f"{size / 1e9:.2f}" for size in sizes)))
    if not processes[0].libraries:
        rows = [row[:7] + row[8:] for row in rows]
    how = f"{launch.processes} processes, {launch.way}" if launch.way else "1 process"
    title, *lines = aligned(rows)
    return "\n".join(
        [f"Peak memory per process, in GB, on {how}:", "", title, "-" * max(map(len, [title, *lines])), *lines]
    )


def _countable(plan: HeadPlan) -> HeadPlan:
    """Replaces a selection whose count depends on the data by topk, with the largest `k` that a token may have."""
    config = plan.config
    if SELECTIONS[config.activation].counts:
        return plan
    config = copy(config)
    config.k, config.activation = min(BATCHTOPK_MOST * config.trained_k, config.num_latents), "topk"
    return replace(plan, config=config)


def _with_lora(lm: PreTrainedModel, plans: list[HeadPlan], lora: LoraArguments) -> "PeftModel":
    return add_lora(lm, lora_targets(base_of(lm), plans, lora), lora)


def _shares(recipe: Recipe, plans: list[HeadPlan], launch: Launch) -> list[Share]:
    """The share of each process."""
    count, widths = launch.processes, site_widths(plans)
    if launch.way == "distribute_modules":
        training = recipe.training
        tokens = training.per_device_train_batch_size * recipe.data.sequence_length * count
        placed = place_heads(plans, count, tokens)
        needs = [list(site_widths(own)) for own in placed]
        return [Share(own, widths, needs, index) for index, own in enumerate(placed)]
    if launch.way == "distribute_latents":
        needs = [list(widths)] * count
        bounds = {plan.name: latent_bounds(plan, count) for plan in plans}
        return [Share(plans, widths, needs, index, bounds) for index in range(count)]
    return [Share(plans, widths, keeps_gradients=launch.way == "DDP")] * count


def _size(share: Share) -> tuple:
    """A key for a share: shares with equal keys need equal memory."""
    sizes = []
    for plan in share.plans:
        bounds = None if share.bounds is None else share.bounds[plan.name]
        latents = plan.config.num_latents if bounds is None else bounds[share.index + 1] - bounds[share.index]
        sizes.append((type(plan.config), plan.config.d_in, plan.config.d_out, latents, repr(plan.arguments)))
    return tuple(sizes)


def _spread_out(rehearsal: Rehearsal, plans: list[HeadPlan], launch: Launch) -> tuple[int, int, int, int]:
    """A process's bytes of parameters, gradients, optimizer state and work, after FSDP or ZeRO has cut them up."""
    parameters, gradients, optimizer, copies = rehearsal[:4]
    if launch.way not in _IN_PARTS:
        held = parameters + gradients + optimizer
        return parameters, gradients, optimizer, max(rehearsal.training, rehearsal.evaluation) - held
    stage, n = _IN_PARTS[launch.way], launch.processes
    largest = 4 * max(num_parameters([plan]) for plan in plans)
    working = rehearsal.training - parameters - gradients - optimizer
    measuring = rehearsal.evaluation - parameters - optimizer - copies
    bucket = min(gradients, 4 * LEAN["reduce_bucket_size"]) if stage else 0
    # ZeRO trains a copy of the parameters.
    optimizer = (optimizer + (parameters if stage else 0)) // n
    parameters = parameters if stage in (1, 2) else parameters // n
    whole, gradients = gradients, gradients if stage == 1 else gradients // n
    waiting = min(whole - gradients, bucket + largest // 2) if stage == 2 else 0
    at_work, at_rest = (int(times * largest) for times in _GATHERED.get(launch.way, (0, 0)))
    training = working + bucket + waiting + at_work
    evaluation = measuring + bucket + copies // n + at_rest - (0 if stage == 3 else gradients)
    return parameters, gradients, optimizer, max(training, evaluation)


def _with_saving(one: ProcessMemory, rehearsal: Rehearsal, plans: list[HeadPlan], launch: Launch) -> ProcessMemory:
    """
    The memory of a process that saves heads, on a CPU. Saving copies one head at a time; a head in parts is first
    gathered in the same memory.
    """
    in_parts = launch.way == "distribute_latents" or launch.way in _IN_PARTS
    largest = 4 * max(num_parameters([plan]) for plan in plans)
    copies = rehearsal.copies // (launch.processes if launch.way in _IN_PARTS else 1)
    kept = one.gradients if launch.way == "DDP" else 0
    saving = kept + copies + (3 if in_parts else 1) * largest - one.gradients
    return replace(one, work=max(one.work, saving))


def _lm_bytes(lm: PreTrainedModel, recipe: Recipe, launch: Launch) -> int:
    """The bytes of the LM's weights and buffers; if it is sharded, of this process's part and two gathered layers."""
    quantized = _quantized_weights(lm) if recipe.model.quantization else set()
    small = _QUANTIZED_BYTES.get(recipe.model.quantization or "", 0.0)

    def size(module: nn.Module) -> int:
        tensors = {*module.parameters(), *module.buffers()}
        return int(sum(t.numel() * (small if t in quantized else t.itemsize) for t in tensors))

    if not recipe.model.shard:
        return size(lm)
    cut = [size(module) for module in modules_to_shard(lm)]
    # Twice: a layer is gathered into a buffer, and both live at the same time.
    return size(lm) - sum(cut) + sum(cut) // launch.processes + 2 * max(cut)


def _quantized_weights(lm: PreTrainedModel) -> set[Tensor]:
    """The weights of all linear layers except the LM head."""
    head = lm.get_output_embeddings()
    return {m.weight for m in lm.modules() if isinstance(m, nn.Linear | Conv1D) and m is not head}


def _dtype_of(recipe: Recipe, lm: PreTrainedModel) -> torch.dtype:
    """The dtype of the LM's weights that are not quantised."""
    if recipe.model.dtype != "auto":
        return getattr(torch, recipe.model.dtype)
    kept = lm.config.dtype
    return kept if isinstance(kept, torch.dtype) else torch.float32


def _some(names: list[str]) -> str:
    return ", ".join(names) if len(names) < 4 else f"{names[0]}, ..., {names[-1]} ({len(names)})"
