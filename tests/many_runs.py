"""Does several runs, one after the other, in one launch of torchrun, since a launch takes longer than these runs."""

import json
import os
import resource
import sys
from pathlib import Path

from accelerate.state import AcceleratorState, GradientState

from sae_accel.activations.exchanged import ExchangedActivations
from sae_accel.cards import model_card
from sae_accel.common.errors import InputError, NotFinite
from sae_accel.processes.agreement import this_process
from sae_accel.recipe.command_line import parse_command_line
from sae_accel.training.run import run


# Drawing is off, since it takes longer than these runs.
model_card.draw_plots = lambda *args, **kwargs: []


def main(folder: Path) -> None:
    for name, one in json.loads((folder / "runs.json").read_text()).items():
        one = {"environment": {}} | one
        kind = this_process().distributed_type
        os.environ.update(one["environment"])
        found = {}
        try:
            words = [word.replace("{process}", str(this_process().process_index)) for word in one["words"]]
            trainer = run(parse_command_line(words))
            found = {"spread": type(trainer.spread).__name__, "heads": list(trainer.heads)}
            found["peak_memory"] = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            found["tokens"] = trainer.state.num_input_tokens_seen
            found["skips"] = vars(trainer.run_state.skips)
            stream = trainer.run_state.stream
            found["left_out"] = None if stream is None else list(stream.bad_rows.tally)
            lm = getattr(trainer.activations, "activations", trainer.activations).base_model
            found["lm_parameters"] = sum(getattr(p, "_local_tensor", p).numel() for p in lm.parameters())
            if isinstance(trainer.activations, ExchangedActivations):
                found["bytes_sent"] = trainer.activations.bytes_sent
        except (InputError, NotFinite) as error:
            found = {"refused": str(error)}
        (folder / f"{name}.{this_process().process_index}.json").write_text(json.dumps(found))
        for variable in one["environment"]:
            del os.environ[variable]
        AcceleratorState._reset_state()
        GradientState._reset_state()
        this_process().distributed_type = kind


if __name__ == "__main__":
    main(Path(sys.argv[1]))
