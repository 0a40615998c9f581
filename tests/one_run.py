"""Does runs of the command, and shows their results: files, printed lines, and inputs of modules."""

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
    """Runs by their changes to the usual recipe. Each is done once. A change to None leaves the field out."""

    def __init__(self, place: Path, hub: HubServer, root: Path):
        self.place, self.hub, self.root = place, hub, root
        self.done: dict[str, Run] = {}

    def __call__(self, changes: dict[str, Any] | None = None) -> "Run":
        key = repr(sorted((changes or {}).items()))
        if key not in self.done:
            self.done[key] = self.inside(f"run{len(self.done)}", changes or {})
        return self.done[key]

    def inside(self, folder: str, changes: dict[str, Any]) -> "Run":
        """Does a run in a folder that may already hold another run."""
        changes = {"training.output_dir": self.root / folder} | changes
        words = command_words(self.place, self.root, **changes)
        pairs = zip(words[::2], words[1::2], strict=True)
        kept = [word for pair in pairs if pair[1] != "None" for word in pair]
        return Run(kept, Path(changes["training.output_dir"]), self.hub)


class Run:
    """
    A finished run.

    Attributes:
        status (`int`): The status of the command; `out` and `err` are its printed lines.
        lm (`PreTrainedModel`): The LM that ran.
        batches (`list[torch.Tensor]`): The token ids of each forward pass of the LM, `(batch, ctx_len)`.
        rows (`list[int]`): The number of activations in each forward pass of a head.
        optimizers (`list[torch.optim.Optimizer]`): The optimizer of each step; `norms` has the norm of its gradient.
        requests (`list[str]`): The requests to the Hub; `headers` has the headers of each.
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
            # Passes on the meta device do not count, nor the trial passes, whose sequences have odd lengths.
            elif isinstance(module, nn.Embedding) and type(args[0]) is Tensor and args[0].shape[1] % 2 == 0:
                self.batches.append(args[0].clone())
                self.lm = models[-1]

        def steps(optimizer: torch.optim.Optimizer, *_: object) -> None:
            gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            self.norms.append(torch.cat([gradient.flatten() for gradient in gradients]).norm().item())
            self.optimizers.append(optimizer)

        # A cache of its own: the data of another run would hide how this run reads its data.
        with ExitStack() as stack:
            stack.callback(register_module_forward_pre_hook(enters).remove)
            stack.callback(register_optimizer_step_post_hook(steps).remove)
            stack.enter_context(patch("datasets.config.HF_DATASETS_CACHE", self.kept_data))
            # Drawing takes half of a run's time, and no field changes the plots.
            stack.enter_context(patch("matplotlib.figure.Figure.savefig", lambda figure, path, **_: path.touch()))
            yield

    @property
    def words(self) -> list[int]:
        """The token ids that were read, without EOS."""
        return sorted({int(token) for batch in self.batches for token in batch.flatten()} - {0})

    @property
    def trained(self) -> list[Tensor]:
        """The token ids of each training batch. The batch before them only sets the biases."""
        return self.batches[1 : 1 + self.steps]

    @property
    def sequences(self) -> list[int]:
        """The first token of each training sequence, in order."""
        return [int(row[0]) for batch in self.trained for row in batch]

    @property
    def steps(self) -> int:
        return self.read("trainer_state.json")["global_step"]

    @property
    def kept_data(self) -> Path:
        """The cache of downloaded or tokenised data."""
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
        """The last line of a command that was refused; None if it worked."""
        return None if self.status == 0 else self.err.splitlines()[-1]

    def read(self, file: str) -> Any:
        return json.loads((self.folder / file).read_text())

    def log(self, key: str) -> list[Any]:
        """All logged values of a key."""
        lines = (self.folder / "log_history.jsonl").read_text().splitlines()
        return [entry[key] for entry in map(json.loads, lines) if key in entry]

    @property
    def rates(self) -> list[float]:
        """The learning rates that were logged."""
        return self.log("learning_rate/layers.1")

    def events(self, key: str) -> list[Any]:
        """The events that TensorBoard received for a key, each with a step and a value."""
        events = EventAccumulator(str(next(self.folder.glob("logs/*"))))
        events.Reload()
        return events.Scalars(key)

    def column(self, title: str) -> list[str]:
        """A column of the table that a dry run prints, with one cell per process."""
        _, _, head, _, *rows = self.out.splitlines()
        start = head.index(title)
        # The lines after the table are about the disk.
        return [row[start:].split("  ")[0] for row in takewhile(bool, rows)]

    def config(self, key: str, head: str = "layers.1") -> Any:
        return self.read(f"{head}/config.json").get(key)

    def weights(self, head: str = "layers.1") -> dict[str, Tensor]:
        return load_file(self.folder / head / "model.safetensors")

    def head(self, name: str = "layers.1") -> HeadModel:
        return AutoSae.from_pretrained(self.folder, hookpoint=name)

    @property
    def lora(self) -> dict[str, Tensor]:
        """The matrices of the LoRA, by module."""
        saved = load_file(self.folder / "adapter" / "adapter_model.safetensors")
        return {re.sub(r"^base_model\.model\.model\.|\.weight$", "", name): part for name, part in saved.items()}

    @property
    def repo(self) -> str:
        """The repo of the release, if the recipe names none."""
        return f"user/{self.folder.name}"

    @property
    def pushed_to(self) -> list[str]:
        """The repos that received commits."""
        commits = (re.fullmatch(r"POST /api/models/(.+)/commit/main", line) for line in self.requests)
        return sorted({match[1].replace(self.repo, "user/FOLDER") for match in commits if match})

    @property
    def messages(self) -> list[str]:
        """The messages of the run's commits."""
        return [message for _, message, _ in self.hub.commits(self.repo)[1:]]
