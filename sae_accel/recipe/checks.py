"""
Checks of a recipe that need neither the LM nor the data: fields that do not go together are refused.

Each check raises an `InputError` that names the field, what was found, what is allowed and what to do. They run when a
recipe is made, so that a run that cannot work ends before anything is loaded.
"""

import re
from collections.abc import Mapping
from typing import get_args, get_type_hints

from ..common.errors import InputError, near
from ..common.run_files import NOT_HEADS
from .arguments import KINDS, HeadArguments, LoraArguments, ModelArguments, SaeTrainingArguments


TRAINABLE = get_args(get_type_hints(HeadArguments)["activation"])
# The schedules of transformers that need no arguments except a warm-up and a length.
SCHEDULES = (
    "linear",
    "cosine",
    "cosine_with_restarts",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
    "polynomial",
)

_NAME = re.compile(r"[^/\\:*?\[\]]+")


def check_latents(k: int, num_latents: int | None, activation: str, multi_topk: bool, where: str) -> None:
    """
    Checks that a head can select its latents.

    Args:
        k (`int`): Latents to select per token.
        num_latents (`int`, *optional*): Number of latents of the head. If not given, only the checks that hold for any
            number run.
        activation (`str`): The activation.
        multi_topk (`bool`): Whether the head also selects `4 * k` latents.
        where (`str`): The entry, with which the error begins.

    Raises:
        `InputError`: if it cannot.
    """
    if activation not in TRAINABLE:
        raise InputError(
            f"{where}.activation: found {activation!r}, which cannot train. Allowed are {', '.join(TRAINABLE)}."
        )
    if multi_topk and activation != "topk":
        raise InputError(
            f"{where}.multi_topk: it needs activation topk, found {activation}. Remove it, or set --heads.activation "
            "topk."
        )
    if num_latents is None:
        return
    if k > num_latents:
        raise InputError(f"{where}: k is {k}, but the head has {num_latents} latents. Lower k or raise num_latents.")
    if activation == "groupmax" and num_latents % k:
        raise InputError(
            f"{where}: groupmax cuts the latents into k equal groups, but {num_latents} latents is not a multiple of "
            f"k = {k}. Change k or num_latents."
        )
    if multi_topk and 4 * k > num_latents:
        raise InputError(
            f"{where}: multi_topk selects 4 * k = {4 * k} latents, but the head has {num_latents}. Lower k, raise "
            "num_latents or remove multi_topk."
        )


def check_objective(training: SaeTrainingArguments, heads: list[HeadArguments], lora: LoraArguments | None) -> None:
    """
    Checks that the loss, the heads and a LoRA go together.

    Args:
        training ([`SaeTrainingArguments`]): The section `training`.
        heads (`list[HeadArguments]`): The entries of `heads`.
        lora ([`LoraArguments`], *optional*): The section `lora`.

    Raises:
        `InputError`: if they do not.
    """
    local = training.loss == "fvu"
    ways = [name for name in ("distribute_modules", "distribute_latents") if getattr(training, name)]
    if len(ways) > 1:
        raise InputError(
            "training.distribute_latents: it cannot be combined with distribute_modules. Remove one of the two."
        )
    if ways and not local:
        raise InputError(
            f"training.{ways[0]}: with loss {training.loss} each process needs every head whole, for its own pass of "
            f"the LM. Remove it, or set --training.loss fvu."
        )
    if local and training.fvu_weight:
        raise InputError("training.fvu_weight: it needs loss ce or kl. Remove it, or set --training.loss kl.")
    for i, entry in enumerate(heads):
        if not local and entry.activation == "jumprelu" and not training.fvu_weight:
            raise InputError(
                f"heads[{i}].activation: jumprelu needs a head's own loss to keep L0 at k, but training.loss is "
                f"{training.loss} alone. Set --training.fvu_weight 0.1, or --heads.activation batchtopk."
            )
        if not local and not training.fvu_weight and (entry.auxk_alpha or entry.multi_topk):
            raise InputError(
                f"heads[{i}].{'auxk_alpha' if entry.auxk_alpha else 'multi_topk'}: it is a part of a head's own loss, "
                f"but training.loss is {training.loss} alone. Remove it, or set --training.fvu_weight 0.1."
            )
    if not local and training.micro_batches > training.per_device_train_batch_size:
        raise InputError(
            f"training.micro_batches: with loss {training.loss} a batch is cut by sequences, and it has "
            f"{training.per_device_train_batch_size}. Lower micro_batches, or raise per_device_train_batch_size."
        )
    if lora is None:
        return
    if local:
        raise InputError("lora: it needs loss ce or kl, found fvu. Set --training.loss kl, or remove lora.")
    if not lora.train_heads and training.init_from is None:
        raise InputError(
            "lora.train_heads: it is false, but the heads are new and untrained. Set --training.init_from to the "
            "folder or repo of trained heads, or set --lora.train_heads true."
        )
    if not lora.train_heads and training.fvu_weight:
        raise InputError(
            "training.fvu_weight: it trains heads, and lora.train_heads is false. Remove it, or set "
            "--lora.train_heads true."
        )


def check_entry(entry: HeadArguments, where: str) -> None:
    """
    Checks one entry of `heads`.

    Args:
        entry ([`HeadArguments`]): The entry.
        where (`str`): Its name, with which the error begins.

    Raises:
        `InputError`: if its fields do not go together.
    """
    if entry.hookpoints and entry.layers:
        raise InputError(f"{where}: hookpoints and layers are two ways to name the same modules. Keep one of the two.")
    for name, reason in KINDS.get(entry.type, {}).items():
        if getattr(entry, name):
            raise InputError(f"{where}.{name}: {reason}")
    # The name becomes a folder, and read as a glob it must match itself.
    if entry.name is not None and (not _NAME.fullmatch(entry.name) or NOT_HEADS.fullmatch(entry.name)):
        raise InputError(
            f"{where}.name: {entry.name!r} cannot be the name of a head's folder. Use letters and digits, such as "
            "wide."
        )
    if entry.activation == "jumprelu" and entry.k_decay_steps:
        raise InputError(f"{where}.k_decay_steps: jumprelu starts at L0 = k, so k cannot decay. Remove it.")
    if entry.activation != "jumprelu" and entry.sparsity_weight != HeadArguments.sparsity_weight:
        raise InputError(
            f"{where}.sparsity_weight: it needs activation jumprelu, found {entry.activation}. Remove it, or set "
            "--heads.activation jumprelu."
        )
    check_latents(entry.k, entry.num_latents, entry.activation, entry.multi_topk, where)


def check_hub(training: SaeTrainingArguments) -> None:
    """
    Checks that the `hub_` fields are set only if `push_to_hub` is set.

    Args:
        training ([`SaeTrainingArguments`]): The section `training`.

    Raises:
        `InputError`: if one is set without it.
    """
    for name in ("hub_model_id", "hub_private_repo", "hub_strategy", "hub_timeout"):
        if not training.push_to_hub and getattr(training, name) != getattr(SaeTrainingArguments, name):
            raise InputError(f"training.{name}: nothing is pushed. Set --training.push_to_hub, or remove it.")


def check_model(model: ModelArguments) -> None:
    """
    Checks the fields that say how to load the LM.

    Args:
        model ([`ModelArguments`]): The section `model`.

    Raises:
        `InputError`: if they do not go together.
    """
    if model.max_memory is not None and model.device_map is None:
        raise InputError("model.max_memory: it needs model.device_map. Set --model.device_map auto, or remove it.")
    if model.quantization is not None and model.gguf_file is not None:
        raise InputError(
            "model.quantization: it cannot be combined with model.gguf_file, whose weights are dequantised. Remove "
            "one of the two."
        )
    if model.shard and model.quantization is not None:
        raise InputError("model.shard: quantised weights cannot be cut. Remove it, or remove model.quantization.")
    if model.shard and model.device_map is not None:
        raise InputError(
            "model.shard: it puts a part of every layer on each process's device, and model.device_map whole modules "
            "on several devices. Remove one of the two."
        )


def check_sharding(*, with_lm_head: bool, processes: int) -> None:
    """
    Checks whether this run can shard the LM over its processes.

    Args:
        with_lm_head (`bool`): Whether the LM runs with its own head, as the losses ce and kl need.
        processes (`int`): Number of processes.

    Raises:
        `InputError`: if gradients flow through the LM, or there is one process.
    """
    if with_lm_head:
        raise InputError(
            "model.shard: with loss ce or kl, and so with a lora, gradients flow through the LM, and each process "
            "needs all of it. Remove it, or set --training.loss fvu."
        )
    if processes == 1:
        raise InputError(
            "model.shard: there is one process, so no other can share the LM. Start several, for example with "
            "accelerate launch --num_processes 2, or remove it."
        )


def check_schedule(training: SaeTrainingArguments) -> None:
    """
    Checks the learning rate schedule and the clipping of gradients.

    Args:
        training ([`SaeTrainingArguments`]): The section `training`.

    Raises:
        `InputError`: if the schedule does not exist, or the schedule or the clipping does not fit the optimizer.
    """
    schedule = training.lr_scheduler_type
    if schedule is not None and schedule not in SCHEDULES:
        from transformers import SchedulerType

        known = schedule in set(SchedulerType)
        reason = "needs arguments that a recipe does not have" if known else "is no schedule of transformers"
        raise InputError(
            f"training.lr_scheduler_type: {schedule!r} {reason}.{near(schedule, SCHEDULES)} Allowed are "
            f"{', '.join(SCHEDULES)}."
        )
    if training.optim == "signum" and schedule not in (None, "constant", "constant_with_warmup"):
        raise InputError(
            f"training.lr_scheduler_type: found {schedule}, but signum is schedule-free and needs no decay. Remove "
            "it, set constant or constant_with_warmup, or set --training.optim adam."
        )
    if training.optim == "signum" and training.max_grad_norm is not None:
        raise InputError(
            "training.max_grad_norm: signum steps by the sign of the gradient, which clipping does not change. Remove "
            "it, or set --training.optim adam."
        )


def check_steps(training: SaeTrainingArguments, entries: Mapping[str, HeadArguments], steps: int) -> None:
    """
    Checks that the warm-up and the decay of k end within the run.

    Args:
        training (`SaeTrainingArguments`): The section `training`, with the warm-up.
        entries (`Mapping[str, HeadArguments]`): The entries of `heads`, by the name with which an error begins.
        steps (`int`): Optimizer steps of the run.

    Raises:
        `InputError`: if the run ends before one of them.
    """
    warmup = training.warmup_steps
    # Below 1, warmup_steps is a fraction of the run.
    if warmup is not None and warmup >= max(1, steps):
        raise InputError(
            f"training.warmup_steps: {warmup:g} is not below the {steps} steps of the run. Lower it, or train longer."
        )
    for where, entry in entries.items():
        if entry.k_decay_steps > steps:
            raise InputError(
                f"{where}.k_decay_steps: {entry.k_decay_steps} is more than the {steps} steps of the run, so k would "
                f"not reach {entry.k}. Lower it, or train longer."
            )


def check_trackers(report_to: list[str]) -> None:
    """
    Checks the names of trackers, not whether they are installed.

    Args:
        report_to (`list[str]`): `training.report_to`.

    Raises:
        `InputError`: if a name is unknown, or `none` stands beside other names.
    """
    # Imported here, so that `--help` does not wait for Accelerate.
    from accelerate.utils import LoggerType

    trackers = [*(tracker.value for tracker in LoggerType), "none"]
    for tracker in report_to:
        if tracker not in trackers:
            raise InputError(
                f"training.report_to: {tracker!r} is no tracker of Accelerate.{near(tracker, trackers)} Allowed "
                f"are {', '.join(trackers)}."
            )
    if "none" in report_to and len(report_to) > 1:
        raise InputError("training.report_to: none does not go with other trackers. Keep one or the other.")
