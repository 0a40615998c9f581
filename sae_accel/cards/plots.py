"""
Draws the two plots of a model card: the FVU of each head over training, and a histogram of how often its latents fire.

A run may have one head or a hundred, so the plots adapt: a legend becomes a colour scale, and stairs become curves.
The same data gives the same bytes, so that a release with nothing new sends no image. matplotlib is imported only
here, when a plot is drawn.
"""

import math
from collections.abc import Mapping, Sequence
from functools import cache
from os.path import commonprefix
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..common.extras import how_to_install, is_installed
from ..processes.agreement import say


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


PLOTS = "plots"
FVU_PLOT = f"{PLOTS}/fvu.png"
FREQUENCY_PLOT = f"{PLOTS}/firing_frequency.png"

_INCHES, _DPI = (8.0, 4.5), 100
# More colours than these look alike, so more heads than these get a colour scale in their order.
_MOST_IN_LEGEND = 10
_LONGEST_NAME = 30
# More histograms than these are drawn as curves, since stairs would hide each other.
_MOST_STAIRS = 3
_BINS = 40
# If the highest FVU is more than this many times the lowest, the axis is logarithmic.
_LINEAR_SPAN = 20
# Beyond this ratio, a logarithmic axis has room only for powers of ten.
_DENSE_SPAN = 10_000


def draw_plots(
    folder: Path,
    names: Sequence[str],
    log_history: Sequence[Mapping[str, Any]] = (),
    frequencies: Mapping[str, np.ndarray] | None = None,
) -> list[Path]:
    """
    Draws the FVU of heads over training, and how often their latents fire. Equal inputs give equal bytes.

    Args:
        folder (`Path`): Folder of the images, which are `plots/fvu.png` and `plots/firing_frequency.png`.
        names (`Sequence[str]`): Names of the heads, in the order in which they are shown.
        log_history (`Sequence[Mapping[str, Any]]`): The log of a `TrainerState`, with `train/fvu/<head>` and
            `train/tokens`.
        frequencies (`Mapping[str, np.ndarray]`, *optional*): For each head, the share of tokens on which each latent
            is active, `(num_latents,)`.

    Without matplotlib nothing is drawn, and a line says so.

    Returns:
        `list[Path]`: the images that were drawn. An image without data is not drawn.
    """
    if not is_installed("matplotlib"):
        _say_that_there_are_no_plots()
        return []
    curves = {name: _curve(name, log_history) for name in names}
    curves = {name: curve for name, curve in curves.items() if curve}
    known = frequencies or {}
    known = {name: known[name] for name in names if name in known and len(known[name])}
    drawn = []
    if curves:
        drawn.append(_save(_draw_fvu(curves), folder / FVU_PLOT))
    if known:
        drawn.append(_save(_draw_frequencies(known), folder / FREQUENCY_PLOT))
    return drawn


@cache
def _say_that_there_are_no_plots() -> None:
    """Once in a process, since a run writes its card at each save."""
    say(f"The model card has no plots, since they need matplotlib. {how_to_install('matplotlib')}")


def _curve(name: str, log_history: Sequence[Mapping[str, Any]]) -> list[tuple[float, float]]:
    key = f"train/fvu/{name}"
    points = [(entry["train/tokens"], entry[key]) for entry in log_history if key in entry and "train/tokens" in entry]
    return [(tokens, fvu) for tokens, fvu in points if math.isfinite(fvu) and fvu > 0]


def _draw_fvu(curves: Mapping[str, list[tuple[float, float]]]) -> "Figure":
    from matplotlib.ticker import LogLocator, NullLocator

    figure, axes = _axes("training tokens", "FVU on training tokens")
    colors, labels = _colors(len(curves)), _labels(list(curves))
    for (name, curve), color in zip(curves.items(), colors, strict=True):
        marker = "o" if len(curve) == 1 else None
        axes.plot(*zip(*curve, strict=True), color=color, marker=marker, linewidth=1.6, label=labels[name])
    values = [fvu for curve in curves.values() for _, fvu in curve]
    axes.xaxis.set_major_formatter(_tokens_label)
    span = max(values) / min(values)
    if span > _LINEAR_SPAN:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if span < _DENSE_SPAN else (1,)))
        axes.yaxis.set_major_formatter(lambda fvu, _: f"{fvu:,g}")
        axes.yaxis.set_minor_locator(NullLocator())
    else:
        axes.set_ylim(bottom=0)
    _explain_colors(figure, axes, list(curves), colors)
    return figure


def _draw_frequencies(frequencies: Mapping[str, np.ndarray]) -> "Figure":
    figure, axes = _axes(
        "log₁₀ of firing frequency (share of tokens on which a latent is active)", "share of the head's latents"
    )
    logs = {name: np.log10(values[values > 0]) for name, values in frequencies.items()}
    lowest = min((values.min() for values in logs.values() if len(values)), default=-1.0)
    edges = np.linspace(min(math.floor(lowest), -1), 0, _BINS + 1)
    colors, labels = _colors(len(logs)), _labels(list(logs))
    for (name, values), color in zip(logs.items(), colors, strict=True):
        total = len(frequencies[name])
        share = np.histogram(values, edges)[0] / total
        label = f"{labels[name]}\n{_never_fired(total - len(values), total)}"
        if len(logs) == 1:
            axes.stairs(share, edges, color=color, alpha=0.2, fill=True)
        if len(logs) <= _MOST_STAIRS:
            axes.stairs(share, edges, color=color, linewidth=1.5, label=label)
        else:
            axes.plot((edges[1:] + edges[:-1]) / 2, share, color=color, linewidth=1.3, label=label)
    axes.yaxis.set_major_formatter(lambda part, _: f"{100 * part:g}%")
    axes.set_xlim(edges[0], 0)
    axes.set_ylim(bottom=0)
    _explain_colors(figure, axes, list(logs), colors)
    if len(logs) > _MOST_IN_LEGEND:
        total, fired = sum(map(len, frequencies.values())), sum(map(len, logs.values()))
        axes.set_title(_never_fired(total - fired, total), loc="left", fontsize=9)
    return figure


def _never_fired(count: int, total: int) -> str:
    return f"{count:,} of {total:,} latents never fired"


def _axes(x_label: str, y_label: str) -> tuple["Figure", "Axes"]:
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1)
    figure = Figure(figsize=_INCHES, dpi=_DPI, layout=layout, facecolor="white")
    axes = figure.subplots()
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _colors(count: int) -> np.ndarray:
    """A colour for each head, `(count, 4)`."""
    from matplotlib import colormaps

    if count <= _MOST_IN_LEGEND:
        return colormaps["tab10"](np.arange(count))
    # The end of the scale is too light on white.
    return colormaps["viridis"](np.linspace(0, 0.92, count))


def _explain_colors(figure: "Figure", axes: "Axes", names: list[str], colors: np.ndarray) -> None:
    """Adds a legend for a few heads, or a colour scale with some of the names for many."""
    if len(names) <= _MOST_IN_LEGEND:
        place: Any = "outside upper left" if len(names) == 1 else "outside right upper"
        figure.legend(loc=place, frameon=False, fontsize=8.5, labelspacing=0.8)
        return
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import BoundaryNorm, ListedColormap

    norm = BoundaryNorm(np.arange(len(names) + 1) - 0.5, len(names))
    shown = range(0, len(names), math.ceil(len(names) / _MOST_IN_LEGEND))
    scale = figure.colorbar(ScalarMappable(norm, ListedColormap(colors)), ax=axes, ticks=list(shown), aspect=30)
    labels = list(_labels(names).values())
    scale.ax.set_yticklabels([labels[i] for i in shown], fontsize=8.5)
    scale.ax.minorticks_off()
    scale.ax.invert_yaxis()
    scale.outline.set_visible(False)


def _save(figure: "Figure", path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    # Without the version of matplotlib, the same image has the same bytes.
    figure.savefig(path, format="png", metadata={"Software": None})
    return path


def _labels(names: Sequence[str]) -> dict[str, str]:
    """Short labels for heads: long names lose the start that all share, and then their middle."""
    shared = commonprefix(list(names)) if len(names) > 1 and max(map(len, names)) > _LONGEST_NAME else ""
    start = shared.rfind(".") + 1
    return {name: _short(f"…{name[start:]}" if start else name) for name in names}


def _short(name: str) -> str:
    half = _LONGEST_NAME // 2
    name = name if len(name) <= _LONGEST_NAME else f"{name[: half - 1]}…{name[-half:]}"
    # matplotlib leaves labels with a leading underscore out of a legend, and reads dollar signs as formulas.
    name = (name or "head").replace("$", r"\$")
    return f" {name}" if name.startswith("_") else name


def _tokens_label(tokens: float, _: float) -> str:
    for unit, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(tokens) >= unit:
            return f"{tokens / unit:g}{letter}"
    return f"{tokens:g}"
