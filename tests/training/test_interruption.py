"""Signals at every moment of a run, each to a run of its own."""

import signal

import pytest
import torch
from safetensors.torch import load_file
from signalled import at, lines_of_ours, run, send
from tiny import command_words


NOTHING = "Nothing was saved yet: start again with the same command."
GO_ON = "Go on with --training.resume_from_checkpoint true."
RESUME = ["--training.resume_from_checkpoint", "true"]
STEPS = {
    "training.max_steps": 5,
    "training.save_steps": 2,
    "training.eval_steps": 2,
    "training.save_best": "true",
    "training.gradient_accumulation_steps": 2,
    "training.per_device_train_batch_size": 2,
    "training.logging_steps": 1,
}
LONG = 60.0
# By name: what is called when the signal comes, for which time, what the process then would do for long, and what it
# is to say.
MOMENTS = {
    "tokenisation": ("training.run:load_tokens", 1, LONG, NOTHING),
    "loading": ("training.run:load_lm", 1, LONG, NOTHING),
    "start": ("training.trainer:start_heads", 1, LONG, NOTHING),
    "step": ("training.trainer:SaeTrainer.training_step", 2, 0, "Stopped after step {1}. Saved {run}/checkpoint-{1}"),
    "between batches": ("training.local_objective:merge_moments", 5, 0, "Saved {run}/checkpoint-2. " + GO_ON),
    "evaluation": ("training.local_objective:LocalObjective.evaluate", 1, 0, "Saved {run}/checkpoint-2. " + GO_ON),
    "save": ("training.run_state:RunState._write_parts", 1, 0, "Saved {run}/checkpoint-2. " + GO_ON),
    "last evaluation": ("training.local_objective:LocalObjective.evaluate", 3, 0, "Saved {run}/checkpoint-5. " + GO_ON),
    "last save": ("training.trainer:SaeTrainer.save_model", 1, LONG, "checkpoint is {run}/checkpoint-5. " + GO_ON),
    "card": ("training.run_state:write_card", 1, LONG, "The heads are saved in {run}, their card is not. " + GO_ON),
}
