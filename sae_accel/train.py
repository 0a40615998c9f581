import os
import sys
from pathlib import Path

from transformers.utils import logging as transformers_logging

from .bank.init_from import match_heads, matches_table, open_pretrained
from .bank.plans import HeadPlan, plan_heads
from .common.errors import InputError
from .data.tokens import load_tokens
from .hub.publisher import hub_repo
from .hub.release import open_repo
from .lm.bitsandbytes_backend import require_bitsandbytes
from .lm.load import load_architecture, load_lm, load_tokenizer
from .lm.probe import ProbeFailed
from .processes.agreement import (
    ProcessDied,
    Watch,
    agreed,
    check_alike,
    check_launched,
    first_on_node,
    this_process,
)
from .recipe.command_line import parse_command_line, split_dry_run
from .recipe.recipe import Recipe
from .runs.checkpoint import newest_complete
from .runs.closing_message import closing_message
from .runs.output_folder import OutputFolder, written_places
from .spread import place_heads
from .training.end_to_end_objective import check_end_to_end
from .training.trainer import SaeTrainer


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
        trainer = _trainer(recipe)
        try:
            trainer.train()
        finally:
            # A push that fails comes after all that is to be told of the run.
            if trainer.metrics and trainer.accelerator.is_main_process:
                print(closing_message(trainer, trainer.metrics))
        if trainer.pushed is not None:
            print(f"Released: {trainer.pushed.url}{trainer.pushed.about_left()}")
    return trainer


def _trainer(recipe: Recipe) -> SaeTrainer:
    training = recipe.training
    plans = agreed(lambda: _plans_before_loading(recipe))
    checkpoint = agreed(lambda: _where_to_begin(recipe, plans))
    if training.push_to_hub:
        agreed(lambda: this_process().is_main_process and open_repo(hub_repo(training), training.hub_private_repo))
    starts_anew = training.init_from is not None and checkpoint is None
    if plans is not None and starts_anew:
        agreed(lambda: _show_matches(plans, training.init_from))
    tokenizer = agreed(lambda: load_tokenizer(recipe.model))
    lm = agreed(lambda: load_lm(recipe.model, predicts=training.loss != "fvu", device=this_process().device))
    vocab_size = lm.get_input_embeddings().num_embeddings
    train_dataset, eval_dataset = first_on_node(
        lambda: load_tokens(recipe.data, tokenizer, vocab_size=vocab_size), "the data to be tokenised"
    )
    trainer = agreed(
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
    if plans is None and starts_anew:
        agreed(lambda: _show_matches(list(trainer.plans.values()), training.init_from))
    if trainer.spread.description and trainer.accelerator.is_main_process:
        print(trainer.spread.description)
    return trainer


def _plans_before_loading(recipe: Recipe) -> list[HeadPlan] | None:
    """Finds, before the LM's weights are read, what would end the run after that. None if it runs on values only."""
    training = recipe.training
    if training.optim == "adam8bit":
        require_bitsandbytes("training.optim", training.optim)
    architecture = load_architecture(recipe.model, predicts=training.loss != "fvu")
    try:
        plans = plan_heads(architecture, recipe.heads)
    except ProbeFailed:
        # The same checks come once the LM is loaded.
        return None
    if training.loss != "fvu":
        check_end_to_end(plans)
    if training.distribute_modules:
        place_heads(plans, this_process().num_processes, recipe.data.ctx_len)
    if recipe.lora is not None:
        from .lm.adapter import lora_targets

        lora_targets(architecture.base_model, plans, recipe.lora)
    return plans


def _where_to_begin(recipe: Recipe, plans: list[HeadPlan] | None) -> Path | None:
    """The checkpoint that the run goes on from, if any; refuses before the LM is read what the trainer would."""
    training = recipe.training
    places = written_places([plan.name for plan in plans or ()], training, recipe.lora)
    folder = OutputFolder(Path(training.output_dir), places, training.run_name, writes_recipe=True)
    return folder.where_to_begin(training.resume_from_checkpoint, training.overwrite_output_dir)


def _show_matches(plans: list[HeadPlan], init_from: str) -> None:
    heads = open_pretrained(init_from)
    matches = match_heads(plans, heads)
    if this_process().is_main_process:
        print(matches_table(matches, heads))


def show_plan(recipe: Recipe, processes: int | None = None) -> None:
    """
    Prints what each process of a run would hold and need of memory.

    Args:
        recipe ([`Recipe`]): The run.
        processes (`int`, *optional*): How many processes; as many as were started if not given.

    Raises:
        `InputError`: if the run would be refused for its LM, its heads or the number of processes.
    """
    # Nothing else would make use of this, and those who train need not wait for it to be imported.
    from .planning.memory import Launch, memory_table, plan_memory

    launch = Launch.of(recipe.training, processes)
    plan = plan_memory(recipe, launch)
    if int(os.environ.get("RANK", 0)) == 0:
        print(memory_table(plan, launch))


def _what_is_left(output_dir: Path) -> str:
    newest = newest_complete(output_dir)
    return f"The newest whole checkpoint is {newest}." if newest else "There is no checkpoint yet."


def main(argv: list[str] | None = None) -> int:
    """The command `python -m sae_accel.train`: 0 if all went well, 2 for bad input, 130 after Ctrl-C."""
    transformers_logging.disable_progress_bar()
    words = sys.argv[1:] if argv is None else argv
    try:
        words, planned = split_dry_run(words)
        if planned is not None:
            show_plan(parse_command_line(words), planned or None)
            return 0
        run(agreed(lambda: parse_command_line(words)))
    except (InputError, ProcessDied) as error:
        _say(error)
        return 2 if isinstance(error, InputError) else 1
    except KeyboardInterrupt as interrupt:
        _say(f"{interrupt or 'Stopped.'} Go on with --training.resume_from_checkpoint true.")
        return 130
    return 0


def _say(message: object) -> None:
    """One line for all processes."""
    if this_process().is_main_process:
        print(f"sae_accel: {message}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
