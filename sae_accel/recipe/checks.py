import re
from collections.abc import Mapping
from typing import get_args, get_type_hints

from ..common.errors import InputError, near
from ..common.run_files import NOT_HEADS
from .arguments import KINDS, HeadArguments, LoraArguments, ModelArguments, SaeTrainingArguments


TRAINABLE = get_args(get_type_hints(HeadArguments)["activation"])
# The schedules that need nothing but a warm-up and a length.
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
        k (`int`): Latents to select for each token.
        num_latents (`int`, *optional*): Latents of the head; without it, only what holds for any number is checked.
        activation (`str`): How they are selected.
        multi_topk (`bool`): Whether 4k are selected as well.
        where (`str`): The entry, with which an error begins.

    Raises:
        `InputError`: if it cannot.
    """
    if activation not in TRAINABLE:
        raise InputError(f"{where}.activation: {activation!r} does not train. Allowed are {', '.join(TRAINABLE)}.")
    if multi_topk and activation != "topk":
        raise InputError(
            f"{where}.multi_topk: it goes with activation topk, not with {activation}. Remove one of them."
        )
    if num_latents is None:
        return
    if k > num_latents:
        raise InputError(f"{where}: k is {k}, but the head has {num_latents} latents. Lower k or raise num_latents.")
    if activation == "groupmax" and num_latents % k:
        raise InputError(
            f"{where}: groupmax cuts {num_latents} latents into k = {k} equal groups, which does not divide. Change k "
            "or num_latents."
        )
    if multi_topk and 4 * k > num_latents:
        raise InputError(
            f"{where}: multi_topk selects 4 * k = {4 * k} latents, but the head has {num_latents}. Lower k, raise "
            "num_latents or remove multi_topk."
        )


def check_objective(training: SaeTrainingArguments, heads: list[HeadArguments], lora: LoraArguments | None) -> None:
    """
    Checks that the loss, the heads and a LoRA go together.

    Raises:
        `InputError`: if they do not.
    """
    local = training.loss == "fvu"
    ways = [name for name in ("distribute_modules", "distribute_latents") if getattr(training, name)]
    if len(ways) > 1:
        raise InputError("training.distribute_latents: it does not go with distribute_modules. Remove one of them.")
    if ways and not local:
        raise InputError(
            f"training.{ways[0]}: with loss {training.loss} each process needs every head whole, in its own pass of "
            f"the LM. Remove it, or set loss: fvu."
        )
    if local and training.fvu_weight:
        raise InputError("training.fvu_weight: it goes with loss ce or kl. Remove it, or set training.loss.")
    for i, entry in enumerate(heads):
        if not local and entry.activation == "jumprelu" and not training.fvu_weight:
            raise InputError(
                f"heads[{i}].activation: jumprelu keeps L0 at k by a head's own loss, and training.loss is "
                f"{training.loss} alone. Set training.fvu_weight, or use batchtopk."
            )
        if not local and not training.fvu_weight and (entry.auxk_alpha or entry.multi_topk):
            raise InputError(
                f"heads[{i}].{'auxk_alpha' if entry.auxk_alpha else 'multi_topk'}: it is a part of a head's own loss, "
                f"and training.loss is {training.loss} alone. Remove it, or set training.fvu_weight."
            )
    if not local and training.micro_batches > training.per_device_train_batch_size:
        raise InputError(
            f"training.micro_batches: with loss {training.loss} a batch is cut by sequences, and it has "
            f"{training.per_device_train_batch_size}. Lower micro_batches, or raise per_device_train_batch_size."
        )
    if lora is None:
        return
    if local:
        raise InputError("lora: it trains by the LM's loss. Set training.loss to ce or kl, or remove lora.")
    if not lora.train_heads and training.init_from is None:
        raise InputError(
            "lora.train_heads: it is false, but the heads are new. Set training.init_from to trained heads, or "
            "lora.train_heads to true."
        )
    if not lora.train_heads and training.fvu_weight:
        raise InputError(
            "training.fvu_weight: it trains heads, and lora.train_heads is false. Remove it, or set that."
        )


def check_entry(entry: HeadArguments, where: str) -> None:
    """
    Checks one entry of `heads`, which `where` names.

    Raises:
        `InputError`: if its fields do not go together.
    """
    if entry.hookpoints and entry.layers:
        raise InputError(f"{where}: hookpoints and layers are two ways to say one thing. Keep one.")
    for name, reason in KINDS.get(entry.type, {}).items():
        if getattr(entry, name):
            raise InputError(f"{where}.{name}: {reason}")
    # A name must be a folder's, and match itself as a glob.
    if entry.name is not None and (not _NAME.fullmatch(entry.name) or NOT_HEADS.fullmatch(entry.name)):
        raise InputError(f"{where}.name: {entry.name!r} cannot be the name of a head's folder.")
    if entry.activation == "jumprelu" and entry.k_decay_steps:
        raise InputError(f"{where}.k_decay_steps: jumprelu starts at L0 = k by its thresholds. Remove it.")
    if entry.activation != "jumprelu" and entry.sparsity_weight != HeadArguments.sparsity_weight:
        raise InputError(f"{where}.sparsity_weight: it goes with activation jumprelu. Set that, or remove it.")
    check_latents(entry.k, entry.num_latents, entry.activation, entry.multi_topk, where)


def check_hub(training: SaeTrainingArguments) -> None:
    """
    Checks that what says how to push goes with pushing.

    Raises:
        `InputError`: if it does not.
    """
    for name in ("hub_model_id", "hub_private_repo", "hub_strategy", "hub_timeout"):
        if not training.push_to_hub and getattr(training, name) != getattr(SaeTrainingArguments, name):
            raise InputError(f"training.{name}: nothing is pushed. Set training.push_to_hub, or remove it.")


def check_model(model: ModelArguments) -> None:
    """
    Checks how an LM is to be loaded.

    Raises:
        `InputError`: if the fields do not go together.
    """
    if model.max_memory is not None and model.device_map is None:
        raise InputError("model.max_memory: it goes with model.device_map. Set that, to auto for example.")
    if model.quantization is not None and model.gguf_file is not None:
        raise InputError(
            "model.quantization: the weights of a gguf_file are dequantised when they are read. Remove one of the two."
        )
    if model.shard and model.quantization is not None:
        raise InputError("model.shard: quantised weights cannot be cut. Remove shard or model.quantization.")
    if model.shard and model.device_map is not None:
        raise InputError(
            "model.shard: it puts a part of every layer on each process's device, and model.device_map whole modules "
            "on devices of its own. Remove one of the two."
        )


def check_sharding(*, with_lm_head: bool, processes: int) -> None:
    """
    Checks whether this run can share an LM out over its processes.

    Args:
        with_lm_head (`bool`): Whether the LM is to run with its head, for an end-to-end loss.
        processes (`int`): How many there are.

    Raises:
        `InputError`: if gradients are to flow through the LM, or there is one process.
    """
    if with_lm_head:
        raise InputError(
            "model.shard: with loss ce or kl, and so with a lora, gradients flow through the LM, and a process needs "
            "all of it. Remove shard, or set training.loss to fvu."
        )
    if processes == 1:
        raise InputError(
            "model.shard: there is one process, so there is nothing to share the LM with. Start several, or remove it."
        )


def check_schedule(training: SaeTrainingArguments) -> None:
    """
    Checks the learning rate's schedule, and clipping.

    Raises:
        `InputError`: if there is no such schedule, or it or clipping does not fit the optimizer or the run.
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
            f"training.lr_scheduler_type: signum is schedule-free, so {schedule} would count twice. Remove it, set "
            "constant or constant_with_warmup, or use adam."
        )
    if training.optim == "signum" and training.max_grad_norm is not None:
        raise InputError(
            "training.max_grad_norm: signum steps by the sign of the gradient, which clipping leaves as it is. Remove "
            "it, or use another training.optim."
        )


def check_steps(training: SaeTrainingArguments, entries: Mapping[str, HeadArguments], steps: int) -> None:
    """
    Checks that what changes with the steps of a run comes to its end within it.

    Args:
        training (`SaeTrainingArguments`): With the warm-up.
        entries (`Mapping[str, HeadArguments]`): With the steps over which k falls, each by its name for a user.
        steps (`int`): Optimizer steps of the run.

    Raises:
        `InputError`: if the run ends before.
    """
    warmup = training.warmup_steps
    # Below 1, warmup_steps is a part of the run.
    if warmup is not None and warmup >= max(1, steps):
        raise InputError(
            f"training.warmup_steps: {warmup:g} is not below the {steps} steps of the run. Lower it, or train for "
            "longer."
        )
    for where, entry in entries.items():
        if entry.k_decay_steps > steps:
            raise InputError(
                f"{where}.k_decay_steps: {entry.k_decay_steps} is more than the {steps} steps of the run, which would "
                f"end before k has come down to {entry.k}. Lower it, or train for longer."
            )


def check_trackers(report_to: list[str]) -> None:
    """
    Checks names of trackers, not whether they are installed.

    Raises:
        `InputError`: if one is unknown, or none stands beside others.
    """
    # Here, because `--help` and readers of recipes need not wait for Accelerate.
    from accelerate.utils import LoggerType

    trackers = [*(tracker.value for tracker in LoggerType), "none"]
    for tracker in report_to:
        if tracker not in trackers:
            raise InputError(
                f"training.report_to: {tracker!r} is no tracker of Accelerate.{near(tracker, trackers)} Allowed are "
                f"{', '.join(trackers)}."
            )
    if "none" in report_to and len(report_to) > 1:
        raise InputError("training.report_to: none does not go with other trackers. Keep one or the other.")
