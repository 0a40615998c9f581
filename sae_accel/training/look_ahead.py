"""
Checks of a run before the LM's weights are read, because these mistakes should cost seconds, not minutes.

The LM's architecture is built without memory; from it come the hookpoints, the sizes of heads and checkpoints, and the
context length. With them the output folder, the checkpoint to go on from and the free disk space are checked.
"""

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from transformers import PreTrainedModel

from ..bank.plans import HeadPlan, plan_heads
from ..common.errors import InputError
from ..lm.bitsandbytes_backend import require_bitsandbytes
from ..lm.hooks import base_of
from ..lm.load import load_architecture
from ..lm.positions import settled_ctx_len
from ..lm.probe import ProbeFailed
from ..recipe.extras import check_extras
from ..recipe.recipe import Recipe
from ..runs.checkpoint import load_state
from ..runs.differences import Differences
from ..runs.output_folder import OutputFolder, written_places
from ..runs.room import check_room, check_writable
from ..spread.placement import place_heads
from .identity import identity_of
from .lora import lora_targets
from .sizes import adapter_shapes, checkpoint_bytes, head_bytes


class Prospect(NamedTuple):
    """
    The facts about a run that are known before it begins.

    Args:
        recipe ([`Recipe`]): The recipe, with the values that the LM decides, for instance `data.ctx_len`.
        plans (`list[HeadPlan]`, *optional*): The run's heads; None if only the loaded LM can tell them.
        checkpoint (`Path`, *optional*): The checkpoint that the run goes on from.
        deletes (`str`): Names and sizes of the files that the run deletes first; empty if none.
        room (`str`): A sentence about the disk space of checkpoints; empty if their size is unknown.
    """

    recipe: Recipe
    plans: list[HeadPlan] | None
    checkpoint: Path | None
    deletes: str
    room: str


def look_ahead(recipe: Recipe, processes: int, writes: bool, only_plans: bool = False) -> Prospect:
    """
    Checks everything that would otherwise end a run later.

    Args:
        recipe ([`Recipe`]): The run.
        processes (`int`): The number of processes that train.
        writes (`bool`): Whether this process checks the output folder by writing into it; one process does.
        only_plans (`bool`, defaults to `False`): Whether no run follows. Too little disk space is then a fact of
            `Prospect.room`, and no error: the run may be meant for another machine.

    Raises:
        `InputError`: if a setting of the recipe cannot be used.
    """
    training, output_dir = recipe.training, Path(recipe.training.output_dir)
    check_extras(recipe)
    if writes:
        check_writable(output_dir, [])
    if training.optim == "adam8bit":
        require_bitsandbytes("training.optim", training.optim)
    architecture = load_architecture(recipe.model, with_lm_head=training.loss != "fvu")
    ctx_len = settled_ctx_len(recipe.data.ctx_len, architecture)
    recipe = replace(recipe, data=replace(recipe.data, ctx_len=ctx_len))
    plans = _plans(recipe, architecture, processes)
    folder = _folder(recipe, plans, architecture)
    checkpoint = folder.where_to_begin(training.resume_from_checkpoint, training.overwrite_output_dir)
    if checkpoint is not None:
        theirs = load_state(checkpoint)["identity"]
        Differences.between(theirs, folder.identity, training.allow_changes).refuse(checkpoint)
    room = ""
    if writes and plans is not None:
        check_writable(output_dir, folder.places)
        shapes = adapter_shapes(architecture, plans, recipe.lora)
        takes = checkpoint_bytes(plans, training, shapes, recipe.lora is None or recipe.lora.train_heads)
        freed, held = folder.bytes_freed(checkpoint), folder.bytes_held(checkpoint)
        try:
            room = check_room(output_dir, takes, head_bytes(plans), training.save_total_limit, freed, held)
        except InputError as error:
            if not only_plans:
                raise
            room = f"Here the run would be refused. {error}"
    return Prospect(recipe, plans, checkpoint, folder.to_delete(checkpoint), room)


def _plans(recipe: Recipe, architecture: PreTrainedModel, processes: int) -> list[HeadPlan] | None:
    training = recipe.training
    try:
        plans = plan_heads(architecture, recipe.heads, spliced=training.loss != "fvu")
    except ProbeFailed:
        return None
    if training.distribute_modules:
        place_heads(plans, processes, recipe.data.sequence_length)
    if recipe.lora is not None:
        lora_targets(base_of(architecture), plans, recipe.lora)
    return plans


def _folder(recipe: Recipe, plans: list[HeadPlan] | None, architecture: PreTrainedModel) -> OutputFolder:
    """The output folder, described as the trainer describes it; if `plans` is None, the trainer checks the rest."""
    training = recipe.training
    places = written_places([plan.name for plan in plans or ()], training, recipe.lora)
    identity = {} if plans is None else identity_of(plans, training, recipe.lora, architecture, recipe)
    tracks = training.report_to != ["none"]
    return OutputFolder(Path(training.output_dir), places, training.run_name, tracks, True, identity)
