from pathlib import Path
from typing import cast

from torch import nn
from transformers import PreTrainedModel

from ..bank.init_from import match_heads, matches_table, open_pretrained
from ..bank.plans import HeadPlan, plan_heads
from ..data.tokens import load_tokens
from ..hub.publisher import hub_repo
from ..hub.release import open_repo
from ..lm.bitsandbytes_backend import require_bitsandbytes
from ..lm.hooks import base_of
from ..lm.load import load_architecture, load_lm, load_tokenizer
from ..lm.probe import ProbeFailed
from ..processes.agreement import first_on_node, raise_together, this_process
from ..processes.alike import check_alike
from ..processes.launched import check_launched
from ..processes.watch import Watch
from ..recipe.arguments import SaeTrainingArguments
from ..recipe.recipe import Recipe
from ..runs.checkpoint import load_state, newest_complete
from ..runs.closing_message import closing_message
from ..runs.differences import Differences
from ..runs.lock import locked_together
from ..runs.output_folder import OutputFolder, written_places
from ..spread.placement import place_heads
from .identity import identity_of
from .lora import lora_targets
from .trainer import SaeTrainer


def run(recipe: Recipe) -> SaeTrainer:
    """
    Trains what a recipe says, from LM to saved heads.

    Args:
        recipe ([`Recipe`]): The run.

    Raises:
        `InputError`: if something in the recipe cannot be used; what can be known before the LM's weights are read is
            found before. On several processes it is raised on all, if it is on one.
    """
    training = recipe.training
    check_launched()
    check_alike(recipe.to_dict())
    with Watch(lambda: _what_is_left(Path(training.output_dir))):
        with locked_together(Path(training.output_dir)):
            trainer = _trainer(recipe)
            try:
                trainer.train()
            finally:
                # A push that fails comes after all that is to be told of the run.
                if trainer.metrics and trainer.accelerator.is_main_process:
                    with_lora = trainer.adapter is not None
                    rises = trainer.run_state.lowest.rises()
                    print(closing_message(training.output_dir, trainer.heads, trainer.metrics, with_lora, rises))
            if trainer.pushed is not None:
                print(f"Released: {trainer.pushed.url}{trainer.pushed.about_left()}")
    return trainer


def _trainer(recipe: Recipe) -> SaeTrainer:
    training = recipe.training
    architecture = raise_together(lambda: _architecture(recipe))
    plans = raise_together(lambda: _plans_before_loading(recipe, architecture))
    checkpoint = raise_together(lambda: _where_to_begin(recipe, plans, architecture))
    if training.push_to_hub:
        raise_together(lambda: _open_repo(training))
    init_from = training.init_from if checkpoint is None else None
    if plans is not None and init_from is not None:
        raise_together(lambda: _show_matches(plans, init_from))
    tokenizer = raise_together(lambda: load_tokenizer(recipe.model))
    device, with_lm_head = this_process().device, training.loss != "fvu"
    lm = raise_together(lambda: load_lm(recipe.model, with_lm_head=with_lm_head, device=device))
    vocab_size = cast(nn.Embedding, lm.get_input_embeddings()).num_embeddings
    train_dataset, eval_dataset = first_on_node(
        lambda: load_tokens(recipe.data, tokenizer, vocab_size=vocab_size), "the data to be tokenised"
    )
    trainer = raise_together(
        lambda: SaeTrainer(
            lm,
            recipe.training,
            recipe.heads,
            train_dataset,
            eval_dataset,
            exclude_tokens=recipe.data.exclude_tokens,
            processing_class=tokenizer,
            lora=recipe.lora,
            recipe=recipe,
        )
    )
    if plans is None and init_from is not None:
        raise_together(lambda: _show_matches(list(trainer.plans.values()), init_from))
    if trainer.spread.description and trainer.accelerator.is_main_process:
        print(trainer.spread.description)
    return trainer


def _open_repo(training: SaeTrainingArguments) -> None:
    if this_process().is_main_process:
        open_repo(hub_repo(training), training.hub_private_repo)


def _architecture(recipe: Recipe) -> PreTrainedModel:
    if recipe.training.optim == "adam8bit":
        require_bitsandbytes("training.optim", recipe.training.optim)
    return load_architecture(recipe.model, with_lm_head=recipe.training.loss != "fvu")


def _plans_before_loading(recipe: Recipe, architecture: PreTrainedModel) -> list[HeadPlan] | None:
    """Finds, before the LM's weights are read, what would end the run after that. None if it runs on values only."""
    training = recipe.training
    try:
        plans = plan_heads(architecture, recipe.heads, spliced=training.loss != "fvu")
    except ProbeFailed:
        # The same checks come once the LM is loaded.
        return None
    if training.distribute_modules:
        place_heads(plans, this_process().num_processes, recipe.data.ctx_len)
    if recipe.lora is not None:
        lora_targets(base_of(architecture), plans, recipe.lora)
    return plans


def _where_to_begin(recipe: Recipe, plans: list[HeadPlan] | None, architecture: PreTrainedModel) -> Path | None:
    """The checkpoint that the run goes on from, if any; refuses before the LM is read what the trainer would."""
    training = recipe.training
    places = written_places([plan.name for plan in plans or ()], training, recipe.lora)
    identity = {} if plans is None else identity_of(plans, training, recipe.lora, architecture, recipe)
    folder = OutputFolder(Path(training.output_dir), places, training.run_name, writes_recipe=True, identity=identity)
    checkpoint = folder.where_to_begin(training.resume_from_checkpoint, training.overwrite_output_dir)
    if checkpoint is not None:
        theirs = load_state(checkpoint)["identity"]
        Differences.between(theirs, identity, training.allow_changes).refuse(checkpoint)
    return checkpoint


def _show_matches(plans: list[HeadPlan], init_from: str) -> None:
    heads = open_pretrained(init_from)
    matches = match_heads(plans, heads)
    if this_process().is_main_process:
        print(matches_table(matches, heads))


def _what_is_left(output_dir: Path) -> str:
    newest = newest_complete(output_dir)
    return f"The newest whole checkpoint is {newest}." if newest else "There is no checkpoint yet."
