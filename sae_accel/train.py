import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

# Before all that takes time, so that a signal is answered.
from .common.reports import reports
from .common.signals import signals


if TYPE_CHECKING:
    from .recipe.recipe import Recipe


def main(argv: list[str] | None = None) -> int:
    """
    The command `python -m sae_accel.train`: 0 if all went well, 1 if not all was saved, a process died or something
    failed that no input would mend, 2 for bad input; 130 after Ctrl-C, 143 after SIGTERM, 129 after SIGHUP, 141 after
    the reader of its output has gone.
    """
    words = sys.argv[1:] if argv is None else argv
    return signals.command(lambda: reports.command("train", words, _train), owns_process=argv is None)


def _train(words: list[str]) -> int:
    from .recipe.command_line import parse_command_line, split_dry_run

    if {"-h", "--help"} & set(words):
        # Prints the help and ends, before what trains is imported.
        parse_command_line(words)
    from transformers.utils import logging as transformers_logging

    from .processes.agreement import raise_together, say

    transformers_logging.disable_progress_bar()
    reports.memory_advice = (
        "Set less for training.per_device_train_batch_size, data.ctx_len or heads.expansion_factor, or more for "
        "training.micro_batches; --dry-run prints what a run needs."
    )
    words, planned = split_dry_run(words)
    if planned is not None:
        from .planning.memory import show_plan

        show_plan(_recipe(words), planned or None)
        return 0
    recipe = raise_together(lambda: _recipe(words))
    from .training.run import run

    trainer = run(recipe)
    if trainer.saver.unsaved is not None:
        say(f"Not all was saved: {trainer.saver.unsaved}")
        return 1
    return 0


def _recipe(words: list[str]) -> "Recipe":
    from .recipe.command_line import parse_command_line

    recipe = parse_command_line(words)
    reports.know(recipe.to_dict(), Path(recipe.training.output_dir), asdict(recipe))
    return recipe


if __name__ == "__main__":
    sys.exit(main())
