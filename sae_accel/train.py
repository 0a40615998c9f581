import sys

from .common.signals import signals


def main(argv: list[str] | None = None) -> int:
    """
    The command `python -m sae_accel.train`: 0 if all went well, 1 if not all was saved or a process died, 2 for bad
    input; 130 after Ctrl-C, 143 after SIGTERM, 129 after SIGHUP, 141 after the reader of its output has gone.
    """
    words = sys.argv[1:] if argv is None else argv
    return signals.command(lambda: _train(words), owns_process=argv is None)


def _train(words: list[str]) -> int:
    from .common.errors import InputError, NotFinite, NotSaved
    from .recipe.command_line import parse_command_line, split_dry_run

    if {"-h", "--help"} & set(words):
        # Prints the help and ends, before what trains is imported.
        parse_command_line(words)
    from transformers.utils import logging as transformers_logging

    from .processes.agreement import raise_together, say
    from .processes.watch import ProcessDied

    transformers_logging.disable_progress_bar()
    try:
        words, planned = split_dry_run(words)
        if planned is not None:
            from .planning.memory import show_plan

            show_plan(parse_command_line(words), planned or None)
            return 0
        recipe = raise_together(lambda: parse_command_line(words))
        from .training.run import run

        trainer = run(recipe)
        if trainer.saver.unsaved is not None:
            say(f"Not all was saved: {trainer.saver.unsaved}")
            return 1
    except (InputError, NotFinite, NotSaved, ProcessDied) as error:
        say(error)
        return 2 if isinstance(error, InputError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
