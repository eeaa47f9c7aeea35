"""The pictures of a report, made from the files of an output directory.

Colours are those of M. Okabe and K. Ito ("Color Universal Design", 2008), told apart by people
who are colour blind; line styles and hatches tell them apart in black and white.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from cobre_shm.sddp.errors import require
from cobre_shm.sddp.training_result import CONFIDENCE

try:
    from matplotlib.figure import Figure
    from matplotlib.text import Text
    from matplotlib.ticker import MaxNLocator
except ImportError as _error:
    raise require("matplotlib", extra="report") from _error

Table = Mapping[str, npt.NDArray[Any]]
Floats = npt.NDArray[np.float64]

_BLUE, _ORANGE, _GREEN, _RED, _SKY, _PINK, _YELLOW, _GREY = (
    *("#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7", "#F0E442"),
    "#999999",
)
_QUANTILES = (0.1, 0.5, 0.9)
_COLUMNS = 4
_TIME_PARTS = (
    ("forward_ms", "LP, forward", _BLUE, ""),
    ("backward_ms", "LP, backward", _SKY, "//"),
    ("bound_ms", "LP, lower bound", _GREEN, "\\\\"),
    ("gather_states_ms", "allgatherv of states", _ORANGE, ".."),
    ("gather_cuts_ms", "allgatherv of cuts", _RED, "xx"),
    ("share_bound_ms", "exchange of the bound", _YELLOW, "++"),
    ("share_counters_ms", "allreduce of counters", _PINK, "oo"),
)


def png(figure: Figure) -> bytes:
    """Return a figure as a PNG file; a dollar sign in its texts stands for itself."""
    for text in figure.findobj(Text):
        text.set_parse_math(False)
    data = io.BytesIO()
    figure.savefig(data, format="png", metadata={"Software": None})
    return data.getvalue()


def _axes(width: float = 8.0, height: float = 4.5) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, height), layout="constrained", dpi=110)
    return figure, figure.add_subplot()


def _tidy(axes: Any, x_label: str, y_label: str, *, counts: bool = True) -> None:
    """Label axes; ``counts`` says that the horizontal one has whole numbers only."""
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(visible=True, color="0.88", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if counts:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def _unit(values: Floats) -> tuple[float, str]:
    """Return a divisor that makes costs readable, and the unit that remains."""
    largest = float(np.max(np.abs(values), initial=0.0))
    for divisor, unit in ((1e9, "10⁹ $"), (1e6, "10⁶ $"), (1e3, "10³ $")):
        if largest >= divisor:
            return divisor, unit
    return 1.0, "$"


def convergence(table: Table) -> Figure:
    """Lower bound, and mean of the upper bound with its 95 % band, over iterations."""
    figure, axes = _axes()
    mean, iteration = table["upper_bound_mean"], table["iteration"]
    half = CONFIDENCE * table["upper_bound_std"] / np.sqrt(table["forward_passes"])
    divisor, unit = _unit(mean)
    axes.fill_between(
        iteration,
        (mean - half) / divisor,
        (mean + half) / divisor,
        color=_ORANGE,
        alpha=0.3,
        linewidth=0,
        label="95 % confidence of the mean",
    )
    marker = "." if len(iteration) < 50 else ""
    axes.plot(
        iteration, mean / divisor, "--", color=_ORANGE, marker=marker, label="upper bound, mean"
    )
    axes.plot(
        iteration,
        table["lower_bound"] / divisor,
        color=_BLUE,
        linewidth=2,
        marker=marker,
        label="lower bound",
    )
    _tidy(axes, "iteration", f"discounted cost [{unit}]")
    axes.legend(frameon=False)
    return figure


def by_stage(keys: npt.NDArray[Any], values: Floats, scenarios: int) -> tuple[Any, Floats]:
    """Return the stage ids in order, and the values as (stages, scenarios)."""
    stages, place = np.unique(keys, return_inverse=True)
    order = np.argsort(place, kind="stable")
    return stages, values[order].reshape(len(stages), scenarios)


def fans(
    table: Table, key: str, value: str, names: Mapping[int, str], label: str, start: str = ""
) -> Figure:
    """Draw the 10, 50 and 90 % quantiles over scenarios, one panel for each entity.

    Args:
        table: Rows of a simulation with ``key``, ``stage_id``, ``scenario_id`` and ``value``.
        key: Column of the entity's id.
        value: Column to draw.
        names: Name of each entity.
        label: What it is, with its unit.
        start: Column with the value before the first stage, if there is one.
    """
    ids = np.unique(table[key])
    scenarios = len(np.unique(table["scenario_id"]))
    columns = min(_COLUMNS, len(ids))
    rows = -(-len(ids) // columns)
    height = 2.6 * rows + 0.7
    # A picture has less than 2**16 points in height.
    figure = Figure(figsize=(max(5.0, 3.2 * columns), height), dpi=min(110, 65000 / height))
    figure.set_layout_engine("constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for panel, entity in zip(panels, ids, strict=False):
        mine = table[key] == entity
        stages, values = by_stage(table["stage_id"][mine], table[value][mine], scenarios)
        if start:
            _, before = by_stage(table["stage_id"][mine], table[start][mine], scenarios)
            stages, values = np.append(stages[0] - 1, stages), np.vstack([before[:1], values])
        low, middle, high = np.quantile(values, _QUANTILES, axis=1)
        panel.fill_between(
            stages, low, high, color=_SKY, alpha=0.5, linewidth=0, label="10 to 90 %"
        )
        panel.plot(stages, middle, color=_BLUE, linewidth=1.8, label="median")
        panel.plot(stages, values.mean(axis=1), ":", color="black", linewidth=1.2, label="mean")
        panel.set_title(names.get(int(entity), f"{key} {entity}"), fontsize=10)
        _tidy(panel, "stage", label)
        panel.set_ylim(bottom=min(0.0, float(low.min()) * 1.05))
    for panel in panels[len(ids) :]:
        panel.set_visible(False)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    return figure


def generation(stages: npt.NDArray[Any], parts: Mapping[str, Floats], load: Floats) -> Figure:
    """Draw the mean generation of each kind by stage, stacked, and the load; in MW."""
    figure, axes = _axes()
    styles = zip((_BLUE, _ORANGE, _GREEN, _RED), ("", "//", "..", "xx"), strict=True)
    bottom = np.zeros(len(stages))
    for (name, values), (colour, hatch) in zip(parts.items(), styles, strict=False):
        axes.bar(
            stages, values, 0.8, bottom=bottom, color=colour, hatch=hatch, label=name,
            edgecolor="white", linewidth=0.4,
        )  # fmt: skip
        bottom = bottom + values
    axes.hlines(load, stages - 0.48, stages + 0.48, color="black", linewidth=1.8, label="load")
    axes.set_ylim(0.0, 1.05 * max(float(np.max(load)), float(np.max(bottom)), 1.0))
    _tidy(axes, "stage", "mean over scenarios and hours [MW]")
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


def time_split(totals: Mapping[str, Floats]) -> Figure:
    """Draw how long each rank spent in what; ``totals`` is in seconds, by part and rank."""
    ranks = np.arange(len(next(iter(totals.values()))))
    figure, axes = _axes(8.0, 1.8 + 0.45 * len(ranks))
    left = np.zeros(len(ranks))
    for key, name, colour, hatch in _TIME_PARTS:
        axes.barh(
            ranks, totals[key], 0.7, left=left, color=colour, hatch=hatch, label=name,
            edgecolor="white", linewidth=0.4,
        )  # fmt: skip
        left = left + totals[key]
    label = "time [s]; a collective includes the wait for the other ranks"
    _tidy(axes, label, "rank", counts=False)
    axes.set_yticks(ranks)
    axes.invert_yaxis()
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=9)
    return figure


def time_parts() -> Sequence[tuple[str, str]]:
    """Return column and name of each part of a rank's time."""
    return [(key, name) for key, name, _, _ in _TIME_PARTS]


def speed_up(runs: Mapping[str, Sequence[tuple[int, float]]]) -> Figure:
    """Draw speed-ups over ranks.

    Args:
        runs: For each backend (ranks, speed-up in problems per second), sorted by ranks.
    """
    figure, axes = _axes(6.0, 4.5)
    most = max(ranks for points in runs.values() for ranks, _ in points)
    axes.plot([1, most], [1, most], ":", color=_GREY, label="ideal")
    styles = ((_BLUE, "o-"), (_ORANGE, "s--"), (_GREEN, "^-."), (_RED, "d:"))
    for (backend, points), (colour, style) in zip(runs.items(), styles, strict=False):
        axes.plot(*zip(*points, strict=True), style, color=colour, label=backend)
    _tidy(axes, "ranks", "speed-up (LPs per second)")
    axes.set_ylim(bottom=0.0)
    axes.legend(frameon=False)
    return figure
