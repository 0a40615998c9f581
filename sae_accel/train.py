import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

# First, since the other imports take time, and a signal is answered during them.
from .common.reports import reports
from .common.signals import signals


if TYPE_CHECKING:
    from .recipe.recipe import Recipe


def main(argv: list[str] | None = None) -> int:
    """
    Runs the command `python -m sae_accel.train`.

    Returns:
        `int`: the exit status: 0 if all went well; 1 if something was not saved, a process died, or something failed
        that no other input would mend; 2 for bad input; 130 after Ctrl-C, 143 after SIGTERM, 129 after SIGHUP, and 141
        if the reader of the output has gone.
    """
    words = sys.argv[1:] if argv is None else argv
    return signals.command(lambda: reports.command("train", words, _train), owns_process=argv is None)


def _train(words: list[str]) -> int:
    from .recipe.command_line import answer, split_dry_run

    # Before torch is imported, which takes seconds.
    if (text := answer(words)) is not None:
        print(text)
        return 0
    from .recipe.extras import check_launch_extras

    # Before Accelerate looks for other processes, which takes DeepSpeed.
    check_launch_extras()
    from transformers.utils import logging as transformers_logging

    from .processes.agreement import raise_together, say

    transformers_logging.disable_progress_bar()
    reports.memory_advice = (
        "Lower --training.per_device_train_batch_size, --data.ctx_len or --heads.expansion_factor, or raise "
        "--training.micro_batches; --dry-run prints how much memory a run needs."
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
        say(f"Something was not saved: {trainer.saver.unsaved}")
        return 1
    return 0


def _recipe(words: list[str]) -> "Recipe":
    from .processes.agreement import say
    from .recipe.command_line import parse_command_line
    from .recipe.packaged import check_made_by_quickstart, with_packaged

    words, note = with_packaged(words)
    recipe = parse_command_line(words)
    if note:
        say(note)
    check_made_by_quickstart(recipe)
    reports.know(recipe.to_dict(), Path(recipe.training.output_dir), asdict(recipe))
    return recipe


if __name__ == "__main__":
    sys.exit(main())
