"""
One run, as the command `train` starts it: check, load, train, and print the closing message.

Every process calls `run`. The checks that need no weights come first, then tokenizer, LM and data, then the trainer.
A watch over the processes ends all of them if one dies, and a lock keeps other runs out of the output folder.
"""

from dataclasses import replace
from pathlib import Path
from typing import cast

from torch import nn

from ..bank.init_from import at_its_commit, match_heads, matches_table, open_pretrained
from ..bank.plans import HeadPlan
from ..common.signals import signals
from ..data.tokens import load_tokens
from ..hub.publisher import hub_repo
from ..hub.release import open_repo
from ..lm.load import load_lm, load_tokenizer
from ..processes.agreement import first_on_node, raise_together, say, this_process
from ..processes.alike import check_alike
from ..processes.launched import check_launched
from ..processes.watch import Watch
from ..recipe.arguments import SaeTrainingArguments
from ..recipe.recipe import Recipe
from ..runs.checkpoint import what_is_left
from ..runs.closing_message import closing_message
from ..runs.lock import locked_together
from .look_ahead import look_ahead
from .trainer import SaeTrainer


def run(recipe: Recipe) -> SaeTrainer:
    """
    Trains a recipe, from the LM to saved heads.

    Args:
        recipe ([`Recipe`]): The run.

    Raises:
        `InputError`: on every process, if a setting of the recipe cannot be used on one. Most errors are found before
            the LM's weights are read.

    Returns:
        [`SaeTrainer`]: the trainer after its training.
    """
    training = recipe.training
    check_launched()
    check_alike(recipe.to_dict())
    output_dir = Path(training.output_dir)
    if training.resume_from_checkpoint:
        # Without `resume` the folder's checkpoints are another run's, until this run begins.
        signals.words = lambda: what_is_left(output_dir)
    with Watch():
        with locked_together(output_dir):
            trainer = _trainer(recipe)
            try:
                trainer.train()
            finally:
                # In `finally`, so that the message comes also if the push fails at the end.
                if trainer.metrics and trainer.accelerator.is_main_process:
                    with_lora = trainer.adapter is not None
                    rises = trainer.run_state.lowest.rises()
                    print(closing_message(training.output_dir, trainer.heads, trainer.metrics, with_lora, rises))
            if trainer.pushed is not None:
                print(f"Released: {trainer.pushed.url}{trainer.pushed.about_left()}")
    return trainer


def _trainer(asked: Recipe) -> SaeTrainer:
    process = this_process()
    ahead = raise_together(lambda: look_ahead(asked, process.num_processes, process.is_main_process))
    recipe, plans, checkpoint, training = ahead.recipe, ahead.plans, ahead.checkpoint, ahead.recipe.training
    if checkpoint is not None and training.init_from is not None:
        say(f"This run goes on from {str(checkpoint)!r}, so it does not use training.init_from.")
    if process.is_main_process and ahead.room:
        print(ahead.room)
    if training.push_to_hub:
        raise_together(lambda: _open_repo(training))
    # A copy, because `init_from` gets a commit that the recipe does not name.
    args = replace(training)
    starts_from_heads = training.init_from is not None and checkpoint is None
    if plans is not None and starts_from_heads:
        _show_matches(plans, args, recipe.model.token)
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
            args,
            recipe.heads,
            train_dataset,
            eval_dataset,
            exclude_tokens=recipe.data.exclude_tokens,
            processing_class=tokenizer,
            lora=recipe.lora,
            recipe=recipe,
        )
    )
    if plans is None and starts_from_heads:
        _show_matches(list(trainer.plans.values()), args, recipe.model.token)
    if trainer.spread.description and trainer.accelerator.is_main_process:
        print(trainer.spread.description)
    return trainer


def _open_repo(training: SaeTrainingArguments) -> None:
    if this_process().is_main_process:
        open_repo(hub_repo(training), training.hub_private_repo)


def _show_matches(plans: list[HeadPlan], args: SaeTrainingArguments, token: str | None) -> None:
    """Prints which pretrained head each head starts from, and pins `args.init_from` to its present commit."""
    assert args.init_from is not None, "asked for only where it is set"
    heads = open_pretrained(args.init_from, token)
    matches = raise_together(lambda: match_heads(plans, heads))
    args.init_from = at_its_commit(heads)
    if this_process().is_main_process:
        print(matches_table(matches, heads))
