"""Runs of the command, and what can be seen of each from outside: its files, what it prints, what its modules get."""

import json
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from io import StringIO
from itertools import takewhile
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from hub_server import HubServer
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import command_words
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import PreTrainedModel

from sae_accel import train
from sae_accel.loading.auto import AutoSae
from sae_accel.models import HeadModel


class Runs:
    """Runs by what is changed in them, each run once; a change to None leaves the field out."""

    def __init__(self, place: Path, hub: HubServer, root: Path):
        self.place, self.hub, self.root = place, hub, root
        self.done: dict[str, Run] = {}

    def __call__(self, changes: dict[str, Any] | None = None) -> "Run":
        key = repr(sorted((changes or {}).items()))
        if key not in self.done:
            self.done[key] = self.inside(f"run{len(self.done)}", changes or {})
        return self.done[key]

    def inside(self, folder: str, changes: dict[str, Any]) -> "Run":
        """A run in a folder that may hold another."""
        changes = {"training.output_dir": self.root / folder} | changes
        words = command_words(self.place, self.root, **changes)
        pairs = zip(words[::2], words[1::2], strict=True)
        kept = [word for pair in pairs if pair[1] != "None" for word in pair]
        return Run(kept, Path(changes["training.output_dir"]), self.hub)


class Run:
    """
    One run at its end.

    Attributes:
        status (`int`): What the command gave back; `out` and `err` are what it printed.
        lm (`PreTrainedModel`): The LM that ran.
        batches (`list[torch.Tensor]`): The token ids of each pass of it.
        rows (`list[int]`): The number of activations in each pass of a head.
        optimizers (`list[torch.optim.Optimizer]`): The optimizer of each step; `norms` are the gradient's in these.
        requests (`list[str]`): What was asked of the Hub; `headers` are those of each request.
    """

    def __init__(self, words: list[str], folder: Path, hub: HubServer):
        self.folder, self.hub = folder, hub
        self.lm: Any = None
        self.batches: list[Tensor] = []
        self.rows: list[int] = []
        self.optimizers: list[torch.optim.Optimizer] = []
        self.norms: list[float] = []
        out, err, asked = StringIO(), StringIO(), len(hub.requests)
        with redirect_stdout(out), redirect_stderr(err), self._watched():
            self.status = train.main(words)
        self.out, self.err = out.getvalue(), err.getvalue()
        self.requests, self.headers = hub.requests[asked:], hub.headers[asked:]

    @contextmanager
    def _watched(self) -> Iterator[None]:
        models: list[PreTrainedModel] = []

        def enters(module: nn.Module, args: tuple) -> None:
            if isinstance(module, HeadModel):
                self.rows.append(len(args[0]))
            elif isinstance(module, PreTrainedModel):
                models.append(module)
            # Not where there are no values; and the LM is tried on sequences of odd lengths first.
            elif isinstance(module, nn.Embedding) and type(args[0]) is Tensor and args[0].shape[1] % 2 == 0:
                self.batches.append(args[0].clone())
                self.lm = models[-1]

        def steps(optimizer: torch.optim.Optimizer, *_: object) -> None:
            gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            self.norms.append(torch.cat([gradient.flatten() for gradient in gradients]).norm().item())
            self.optimizers.append(optimizer)

        # What is kept of the data of other runs would hide how this one reads its own.
        with ExitStack() as stack:
            stack.callback(register_module_forward_pre_hook(enters).remove)
            stack.callback(register_optimizer_step_post_hook(steps).remove)
            stack.enter_context(patch("datasets.config.HF_DATASETS_CACHE", self.kept_data))
            # Half of a run's time, and no field says what is drawn.
            stack.enter_context(patch("matplotlib.figure.Figure.savefig", lambda figure, path, **_: path.touch()))
            yield

    @property
    def words(self) -> list[int]:
        """The token ids that were read, but for EOS."""
        return sorted({int(token) for batch in self.batches for token in batch.flatten()} - {0})

    @property
    def trained(self) -> list[Tensor]:
        """The token ids of each batch that trained: the first was read before, for the biases."""
        return self.batches[1 : 1 + self.steps]

    @property
    def sequences(self) -> list[int]:
        """The first token of each sequence, in the order in which they trained."""
        return [int(row[0]) for batch in self.trained for row in batch]

    @property
    def steps(self) -> int:
        return self.read("trainer_state.json")["global_step"]

    @property
    def kept_data(self) -> Path:
        """Where data is kept that was downloaded or tokenised."""
        return self.folder.with_name(f"{self.folder.name}-data")

    @property
    def metrics(self) -> dict[str, float]:
        return self.read("metrics.json")

    @property
    def names(self) -> list[str]:
        return list(AutoSae.open(self.folder))

    @property
    def checkpoints(self) -> list[str]:
        return sorted(path.name for path in self.folder.glob("checkpoint-*"))

    @property
    def refusal(self) -> str | None:
        """The line with which the command ended, if it did no work."""
        return None if self.status == 0 else self.err.splitlines()[-1]

    def read(self, file: str) -> Any:
        return json.loads((self.folder / file).read_text())

    def log(self, key: str) -> list[Any]:
        """A logged value, wherever it was logged."""
        lines = (self.folder / "log_history.jsonl").read_text().splitlines()
        return [entry[key] for entry in map(json.loads, lines) if key in entry]

    @property
    def rates(self) -> list[float]:
        """The learning rates that were logged."""
        return self.log("learning_rate/layers.1")

    def events(self, key: str) -> list[Any]:
        """What TensorBoard was given: a step and a value each time."""
        events = EventAccumulator(str(next(self.folder.glob("logs/*"))))
        events.Reload()
        return events.Scalars(key)

    def column(self, title: str) -> list[str]:
        """Of the table that a dry run prints, by process."""
        _, _, head, _, *rows = self.out.splitlines()
        start = head.index(title)
        # What comes after the table is about the disk.
        return [row[start:].split("  ")[0] for row in takewhile(bool, rows)]

    def config(self, key: str, head: str = "layers.1") -> Any:
        return self.read(f"{head}/config.json").get(key)

    def weights(self, head: str = "layers.1") -> dict[str, Tensor]:
        return load_file(self.folder / head / "model.safetensors")

    def head(self, name: str = "layers.1") -> HeadModel:
        return AutoSae.from_pretrained(self.folder, hookpoint=name)

    @property
    def lora(self) -> dict[str, Tensor]:
        """A LoRA's matrices by module."""
        saved = load_file(self.folder / "adapter" / "adapter_model.safetensors")
        return {re.sub(r"^base_model\.model\.model\.|\.weight$", "", name): part for name, part in saved.items()}

    @property
    def repo(self) -> str:
        """Where it is released to, if no repo is named."""
        return f"user/{self.folder.name}"

    @property
    def pushed_to(self) -> list[str]:
        """The repos to which commits were made."""
        commits = (re.fullmatch(r"POST /api/models/(.+)/commit/main", line) for line in self.requests)
        return sorted({match[1].replace(self.repo, "user/FOLDER") for match in commits if match})

    @property
    def messages(self) -> list[str]:
        """Of the commits that the run made."""
        return [message for _, message, _ in self.hub.commits(self.repo)[1:]]
