import sys
from pathlib import Path

from transformers.utils import logging as transformers_logging

from .checkpoint import where_to_begin
from .command_line import parse_command_line
from .data import load_tokens
from .errors import InputError
from .hookpoints import plan_heads
from .lm import load_architecture, load_lm, load_tokenizer
from .recipe import Recipe
from .report import closing_message
from .trainer import SaeTrainer


def run(recipe: Recipe) -> SaeTrainer:
    """
    Trains what a recipe says, from LM to saved heads.

    Args:
        recipe ([`Recipe`]): The run.

    Raises:
        `InputError`: if something in the recipe cannot be used; everything that can be known before is, before the
        LM's
            weights are read.
    """
    training = recipe.training
    where_to_begin(Path(training.output_dir), training.resume_from_checkpoint, training.overwrite_output_dir)
    plan_heads(load_architecture(recipe.model), recipe.heads)
    tokenizer = load_tokenizer(recipe.model)
    lm = load_lm(recipe.model)
    vocab_size = lm.get_input_embeddings().num_embeddings
    train_dataset, eval_dataset = load_tokens(recipe.data, tokenizer, vocab_size=vocab_size)
    trainer = SaeTrainer(
        lm,
        recipe.training,
        recipe.heads,
        train_dataset,
        eval_dataset,
        exclude_tokens=recipe.data.exclude_tokens,
        processing_class=tokenizer,
        recipe=recipe,
    )
    result = trainer.train()
    if trainer.accelerator.is_main_process:
        print(closing_message(trainer, result.metrics))
    return trainer


def main(argv: list[str] | None = None) -> int:
    """The command `python -m sae_accel.train`: 0 if all went well, 2 for bad input, 130 after Ctrl-C."""
    transformers_logging.disable_progress_bar()
    try:
        run(parse_command_line(sys.argv[1:] if argv is None else argv))
    except InputError as error:
        print(f"sae_accel: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interrupt:
        print(
            f"sae_accel: {interrupt or 'Stopped.'} Go on with --training.resume_from_checkpoint true.", file=sys.stderr
        )
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
