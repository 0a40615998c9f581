import os
import sys

from transformers.utils import logging as transformers_logging

from .common.errors import InputError
from .processes.agreement import agreed, this_process
from .processes.watch import ProcessDied
from .recipe.command_line import parse_command_line, split_dry_run
from .recipe.recipe import Recipe
from .training.run import run


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
    from .planning.launch import Launch
    from .planning.memory import memory_table, plan_memory

    launch = Launch.of(recipe.training, processes)
    plan = plan_memory(recipe, launch)
    if int(os.environ.get("RANK", 0)) == 0:
        print(memory_table(plan, launch))


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
