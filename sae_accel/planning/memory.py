"""What each process of a run will need of memory, found before it starts by its own code, on tensors without any."""

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


# Bytes of a weight of a linear layer that bitsandbytes holds, with the scales of its rows or of blocks of 64.
_QUANTIZED_BYTES = {"8bit": 1.0, "4bit": 0.5 + 4 / 64}
# Copies of the largest head that FSDP and ZeRO-3 make of their parts: while they train and while they evaluate.
# Measured with gloo, whose collectives copy; on GPUs it is less.
_GATHERED = {"FSDP": (6.2, 3.0), "ZeRO-3": (7.5, 1.5)}
# Bytes that data, trackers and threads of a run take of a CPU's memory after this.
_YET_TO_LOAD = 80_000_000
# Ways in which heads lie in parts, with the stage of those that are DeepSpeed's.
_IN_PARTS = {"FSDP": 0, "ZeRO-1": 1, "ZeRO-2": 2, "ZeRO-3": 3}


@dataclass(frozen=True)
class ProcessMemory:
    """
    Memory of a process at its peak, in bytes.

    Args:
        heads (`list[str]`): Heads that it holds, or holds a part of.
        parameters (`int`): Of heads, and of a LoRA.
        gradients (`int`): Of those.
        optimizer (`int`): Its state.
        lm (`int`): The LM's weights.
        work (`int`): Whatever else lives at the peak: activations, gathered parts, and copies while it evaluates.
        libraries (`int`): On a CPU, Python and what it has loaded.
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
        """All of it."""
        return self.parameters + self.gradients + self.optimizer + self.lm + self.work + self.libraries


def show_plan(recipe: Recipe, processes: int | None = None) -> None:
    """
    Prints what each process of a run would hold and need of memory, and what its checkpoints need of the disk.

    Args:
        recipe ([`Recipe`]): The run.
        processes (`int`, *optional*): How many processes; as many as were started if not given.

    Raises:
        `InputError`: if the run would be refused.
    """
    launch = Launch.of(recipe.training, processes)
    first = int(os.environ.get("RANK", 0)) == 0
    if recipe.model.shard:
        check_sharding(with_lm_head=recipe.training.loss != "fvu", processes=launch.processes)
    # Whether it is sharded is nothing to the process that plans, which may be alone.
    whole = replace(recipe, model=replace(recipe.model, shard=False))
    ahead = look_ahead(whole, launch.processes, writes=first)
    plan = plan_memory(replace(recipe, data=ahead.recipe.data), launch)
    if first:
        deletes = ahead.deletes and f"In {recipe.training.output_dir!r} the run would delete {ahead.deletes}."
        print("\n\n".join(part for part in (memory_table(plan, launch), ahead.room, deletes) if part))


def plan_memory(recipe: Recipe, launch: Launch) -> list[ProcessMemory]:
    """
    What each process will need. The LM's weights are not read.

    Args:
        recipe (`Recipe`): The run.
        launch ([`Launch`]): How it is to be started.

    Raises:
        `InputError`: if the run would be refused for its LM, its heads or the number of processes.
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
    # With all that a run imports, which a process that only plans would not have loaded.
    import_module("sae_accel.training.run")
    libraries = 0 if torch.cuda.is_available() else psutil.Process().memory_info().rss + _YET_TO_LOAD
    found: dict[tuple, Rehearsal] = {}
    rows: list[ProcessMemory] = []
    with FakeTensorMode(allow_non_fake_inputs=True):
        whole = lm if adapter is None else adapter
        whole.to_empty(device="cuda" if torch.cuda.is_available() else "cpu")
        for share in _shares(recipe, plans, launch):
            # Processes that hold as much need as much.
            if (size := _size(share)) not in found:
                found[size] = rehearse(recipe, lm, adapter, share, launch.bf16)
            names = [plan.name for plan in share.plans]
            parameters, gradients, optimizer, work = _spread_out(found[size], plans, launch)
            one = ProcessMemory(names, parameters, gradients, optimizer, lm_bytes, work, libraries)
            writes = libraries and (not rows or launch.way == "distribute_modules")
            rows.append(_with_saving(one, found[size], share.plans, launch) if writes else one)
    return rows


def memory_table(processes: list[ProcessMemory], launch: Launch) -> str:
    """One line for each process, in GB of 10^9 bytes, as `nvidia-smi` and `free` nearly count."""
    head = ("process", "heads", "parameters", "gradients", "optimizer", "LM", "activations", "Python", "in all")
    rows: list[tuple[str, ...]] = [head]
    for index, one in enumerate(processes):
        sizes = (one.parameters, one.gradients, one.optimizer, one.lm, one.work, one.libraries, one.total)
        rows.append((str(index), _some(one.heads), *(f"{size / 1e9:.2f}" for size in sizes)))
    if not processes[0].libraries:
        rows = [row[:7] + row[8:] for row in rows]
    how = f"{launch.processes} processes, {launch.way}" if launch.way else "1 process"
    title, *lines = aligned(rows)
    return "\n".join(
        [f"Memory at the peak, in GB, on {how}:", "", title, "-" * max(map(len, [title, *lines])), *lines]
    )


def _countable(plan: HeadPlan) -> HeadPlan:
    """Where the data decide how many latents are selected, topk of as many as the widest token may have."""
    config = plan.config
    if SELECTIONS[config.activation].counts:
        return plan
    config = copy(config)
    config.k, config.activation = min(BATCHTOPK_MOST * config.trained_k, config.num_latents), "topk"
    return replace(plan, config=config)


def _with_lora(lm: PreTrainedModel, plans: list[HeadPlan], lora: LoraArguments) -> "PeftModel":
    return add_lora(lm, lora_targets(base_of(lm), plans, lora), lora)


def _shares(recipe: Recipe, plans: list[HeadPlan], launch: Launch) -> list[Share]:
    """What each process holds."""
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
    """What a share's memory follows from."""
    sizes = []
    for plan in share.plans:
        bounds = None if share.bounds is None else share.bounds[plan.name]
        latents = plan.config.num_latents if bounds is None else bounds[share.index + 1] - bounds[share.index]
        sizes.append((type(plan.config), plan.config.d_in, plan.config.d_out, latents, repr(plan.arguments)))
    return tuple(sizes)


def _spread_out(rehearsal: Rehearsal, plans: list[HeadPlan], launch: Launch) -> tuple[int, int, int, int]:
    """Of a process: parameters, gradients, the optimizer's state, and all else, where these may lie in parts."""
    parameters, gradients, optimizer, copies = rehearsal[:4]
    if launch.way not in _IN_PARTS:
        held = parameters + gradients + optimizer
        return parameters, gradients, optimizer, max(rehearsal.training, rehearsal.evaluation) - held
    stage, n = _IN_PARTS[launch.way], launch.processes
    largest = 4 * max(num_parameters([plan]) for plan in plans)
    working = rehearsal.training - parameters - gradients - optimizer
    measuring = rehearsal.evaluation - parameters - optimizer - copies
    bucket = min(gradients, 4 * LEAN["reduce_bucket_size"]) if stage else 0
    # Under ZeRO what is optimized is a copy of its own.
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
    A process that writes heads, on a CPU, where what is written is copied: one head at a time, which if it lies in
    parts is gathered in the same memory first.
    """
    in_parts = launch.way == "distribute_latents" or launch.way in _IN_PARTS
    largest = 4 * max(num_parameters([plan]) for plan in plans)
    copies = rehearsal.copies // (launch.processes if launch.way in _IN_PARTS else 1)
    kept = one.gradients if launch.way == "DDP" else 0
    saving = kept + copies + (3 if in_parts else 1) * largest - one.gradients
    return replace(one, work=max(one.work, saving))


def _lm_bytes(lm: PreTrainedModel, recipe: Recipe, launch: Launch) -> int:
    """The LM's weights and buffers as they are loaded, or where it is sharded a process's part and one layer."""
    quantized = _quantized_weights(lm) if recipe.model.quantization else set()
    small = _QUANTIZED_BYTES.get(recipe.model.quantization or "", 0.0)

    def size(module: nn.Module) -> int:
        tensors = {*module.parameters(), *module.buffers()}
        return int(sum(t.numel() * (small if t in quantized else t.itemsize) for t in tensors))

    if not recipe.model.shard:
        return size(lm)
    cut = [size(module) for module in modules_to_shard(lm)]
    # A layer is gathered into a buffer, which lives beside it.
    return size(lm) - sum(cut) + sum(cut) // launch.processes + 2 * max(cut)


def _quantized_weights(lm: PreTrainedModel) -> set[Tensor]:
    """Those of the linear layers, but for the LM's head."""
    head = lm.get_output_embeddings()
    return {m.weight for m in lm.modules() if isinstance(m, nn.Linear | Conv1D) and m is not head}


def _dtype_of(recipe: Recipe, lm: PreTrainedModel) -> torch.dtype:
    """In which the LM's weights that are not quantised are loaded."""
    if recipe.model.dtype != "auto":
        return getattr(torch, recipe.model.dtype)
    kept = lm.config.dtype
    return kept if isinstance(kept, torch.dtype) else torch.float32


def _some(names: list[str]) -> str:
    return ", ".join(names) if len(names) < 4 else f"{names[0]}, ..., {names[-1]} ({len(names)})"
