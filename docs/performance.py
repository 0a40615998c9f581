"""
Writes `docs/performance.md` from the figures in `benchmarks/results/`, so that no table is typed.

    python docs/performance.py
"""

import json
from pathlib import Path
from typing import Any


PAGE = Path(__file__).with_name("performance.md")
RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"
OPENING = """\
# Performance

This page is for readers who want to know how fast training is, on which machine, and compared with which
library. `python docs/performance.py` writes its tables from the files in `benchmarks/results/`; each table names its
file.

Every figure here was measured on CPUs. Compare figures within a table only: processors differ, and so does the load on
a machine that others use as well. `make benchmark` prints the first table for your machine.

## Where the time goes

The LM stops after the deepest hookpoint, so a head on an early layer costs a fraction of a whole forward pass, and
logits are never computed. A step of a head then spends most of its time in one dense product, the encoder. Everything
after the encoder works on the k active latents of each token: the decoder gathers k rows, and both weight gradients
are sums over the tokens that use a latent.

At the LM's last layer little of the first saving is left. The heads' own forward and backward pass is 1.1 to 1.5 times
as fast as sparsify's; most of the gain is memory that is not written and read. With
`THP_MEM_ALLOC_ENABLE=1`, torch backs memory with huge pages, and both packages run faster on a CPU.
"""
LM_LOSS_NOTE = """\
With `training.loss: ce` the whole LM runs forward and back in both packages, so the early stop saves nothing.
"""
SCALING_NOTE = """\
Within one machine, where the heads fit, DDP is the fastest strategy. The other strategies are for heads that do not
fit, or for slow networks. [Many processes](distributed.md) says what each of them sends.
"""
SOUNDNESS_NOTE = """\
A run checks every batch for numbers that are not finite. A run that resumes on a stream skips the documents
that it has already used, without tokenising them; `skip` of `datasets` is the alternative.
"""


def page() -> str:
    """The page in Markdown."""
    parts = [OPENING, "## Training speed beside sparsify", *_throughput("epyc-2-cores.json")]
    parts += ["### By the LM's own loss", LM_LOSS_NOTE, *_throughput("epyc-2-cores-ce.json")]
    parts += ["## Two processes", *_scaling("epyc-2-cores-scaling.json"), SCALING_NOTE]
    parts += ["## What soundness costs", SOUNDNESS_NOTE, *_soundness("xeon-2-cores-soundness.json")]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _throughput(name: str) -> list[str]:
    found = _read(name)
    setting = found["setting"]
    tokens = int(setting["batch_size"]) * int(setting["ctx_len"])
    told = (
        f"{setting['model']}, hookpoint `{setting['hookpoint']}`, expansion factor {setting['expansion_factor']}, "
        f"k {setting['k']}, {tokens:,} tokens per step, signum, float32, {setting['machine']}, torch "
        f"{setting['torch']}. Each package runs through its own trainer, in one process and in turns "
        f"({setting['turns']} turns of {setting['steps']} steps). File: `benchmarks/results/{name}`."
    )
    rows = [
        (_package(package), f"{speed:,.0f}", "{:,.0f} to {:,.0f}".format(*found["spread"][package]))
        for package, speed in found["tokens_per_second"].items()
    ]
    return [told, _table(("", "tokens/s, median of all steps", "slowest and fastest step"), rows)]


def _scaling(name: str) -> list[str]:
    found = _read(name)
    setting = found["setting"]
    tokens = setting["batch_size"] * setting["ctx_len"]
    told = (
        f"{setting['model']}, SAEs on {len(setting['hookpoints'])} layers, expansion factor "
        f"{setting['expansion_factor']}, k {setting['k']}, {tokens:,} tokens per step, one thread per process, "
        f"{setting['machine']}. `python benchmarks/scaling.py` prints it. File: `benchmarks/results/{name}`."
    )
    rows = [
        (
            f"{_package(row['package'])}, {row['way']}",
            str(row["processes"]),
            f"{row['tokens_per_second']:,.0f}",
            f"{row['speed_up']:.2f}",
            f"{row['bytes_per_token']:,.0f}",
        )
        for row in found["rows"]
    ]
    heads = ("", "processes", "tokens/s", "times one process", "bytes sent per token")
    return [told, _table(heads, rows)]


def _soundness(name: str) -> list[str]:
    found = _read(name)
    told = (
        f"{found['processor']}, {found['threads']} threads, torch {found['torch']}. `python benchmarks/soundness.py` "
        f"prints it. File: `benchmarks/results/{name}`."
    )
    rows = [
        (
            "a step of a head: 2,048 tokens, 18,432 latents",
            f"{found['step, 2,048 tokens, 18,432 latents (ms)']:.0f} ms",
        ),
        ("the checks in that step", f"{found['checks in it (ms)']:.1f} ms, {found['part']:.1%}"),
        ("skipping in a stream, sae_accel", _passed(found, "sae_accel")),
        ("skipping in a stream, `skip` of `datasets`", _passed(found, "datasets' skip")),
    ]
    return [told, _table(("", "measured"), rows)]


def _passed(found: dict[str, Any], who: str) -> str:
    return f"{found[f'{who}: documents/s']:,.0f} documents/s, {found[f'{who}: tokens/s'] / 1e6:.1f} million tokens/s"


def _package(name: str) -> str:
    return "sparsify 1.3.3" if name == "sparsify" else name


def _table(heads: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [heads, tuple("---" for _ in heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _read(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / name).read_text())


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
