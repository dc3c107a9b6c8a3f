# SPDX-License-Identifier: Apache-2.0
"""Draws sensitivity, chosen bits and size of each module."""

from __future__ import annotations

from pathlib import Path
from typing import Any

BitAllocation = Any  # of allocation.py, whose `plot` comes here

# From wide to narrow: cold to warm.
_COLORS = {16: "#5b4b9a", 8: "#3b7dc4", 6: "#3fa7a0", 4: "#7fae3f", 3: "#d9a92b", 2: "#e0793a", 1: "#c43b4e"}
_INK = "#22262d"
_FAINT = "#6b7280"
_RULE = "#e5e7eb"
_SPAN = 1e7  # of the axis; some modules are many powers of ten below anything that matters


def draw_allocation(allocation: BitAllocation, path: Path) -> None:
    """Writes the plot of an allocation to `path` as PNG: sensitivities at all bits, and bytes at the chosen one."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
    except ImportError as error:
        raise ImportError('The plot needs matplotlib: pip install "hfkdq[plots]".') from error
    rows = len(allocation.sensitivity)
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.08)
    figure = Figure(figsize=(9.5, 0.17 * rows + 2.0), dpi=150, layout=layout)
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=[2.2, 1.0])
    for axis in (left, right):
        _prepare(axis, rows)
    _draw_sensitivities(left, allocation)
    _draw_sizes(right, allocation)
    left.set_yticks(range(rows), short_names(list(allocation.sensitivity)).values())
    # The title belongs to the legend, so that neither lies over the other.
    legend = figure.legend(
        *left.get_legend_handles_labels(), loc="outside upper left", ncols=7, fontsize=8, frameon=False, alignment="left",
        title=_title(allocation), title_fontproperties={"size": 10.5, "weight": "bold"}, labelcolor=_INK, handletextpad=0.2,
    )  # fmt: skip
    legend.get_title().set_color(_INK)
    figure.savefig(path, format="png", facecolor="white")


def _title(allocation: BitAllocation) -> str:
    share = 100 * allocation.bytes / allocation.float_bytes
    size = f"{allocation.bytes / 1e6:.3g} MB" if allocation.bytes >= 1e6 else f"{allocation.bytes / 1e3:.3g} kB"
    return f"{size}, {share:.1f} % of float32; predicted {allocation.measure}: {allocation.predicted:.2g}"


def short_names(names: list[str]) -> dict[str, str]:
    """Names without the first part that most of them share, such as `bert.`; all as they are if two would be alike."""
    starts = [name.partition(".")[0] for name in names]
    most = max(starts, key=starts.count)
    short = {name: name.removeprefix(f"{most}.") for name in names}
    whole = starts.count(most) <= len(names) // 2 or len(set(short.values())) < len(names)
    return {name: name for name in names} if whole else short


def _prepare(axis: Any, rows: int) -> None:
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)
    axis.spines["bottom"].set_color(_RULE)
    axis.tick_params(axis="y", length=0, labelsize=7, labelcolor=_INK)
    axis.tick_params(axis="x", labelsize=7, color=_RULE, labelcolor=_FAINT, which="both")
    axis.set_ylim(rows - 0.4, -0.6)
    axis.grid(axis="x", color=_RULE, linewidth=0.6)
    axis.set_axisbelow(True)


def _draw_sensitivities(axis: Any, allocation: BitAllocation) -> None:
    """A dot for every number of bits, the chosen one large; on a logarithmic axis, whose left end stands for all that is less."""
    found = list(allocation.sensitivity.values())
    positive = [value for row in found for value in row.values() if value > 0] or [1.0]
    floor = max(min(positive) / 2, max(positive) / _SPAN)
    axis.set_xscale("log")
    axis.set_xlim(floor / 1.3, 2 * max(positive))
    for place, row in enumerate(found):
        values = [max(value, floor) for value in row.values()]
        axis.plot([min(values), max(values)], [place, place], color=_RULE, linewidth=1, zorder=1)
    chosen = [allocation.bits[name] for name in allocation.sensitivity]
    for width in allocation.widths:
        points = [(max(row[width], floor), place) for place, row in enumerate(found) if width in row]
        picked = [point for point in points if chosen[point[1]] == width]
        color = _COLORS[width]
        axis.scatter(*_columns(points), s=11, facecolor="white", edgecolor=color, linewidth=0.9, zorder=2)
        axis.scatter(
            *_columns(picked), s=34, color=color, zorder=3, label=f"{width} bits: {len(picked)} of {len(found)}"
        )
    axis.set_title(f"{allocation.measure}, this module alone quantized; filled: chosen", **_LABEL)
    if any(value < floor for row in found for value in row.values()):
        axis.set_xlabel("The left end stands for all that is less.", loc="left", fontsize=7, color=_FAINT)


def _draw_sizes(axis: Any, allocation: BitAllocation) -> None:
    """A bar for the bytes at the chosen bits, from 0."""
    widths = [allocation.bits[name] for name in allocation.sizes]
    sizes = [allocation.sizes[name][width] / 1e3 for name, width in zip(allocation.sizes, widths, strict=True)]
    axis.barh(range(len(sizes)), sizes, height=0.6, color=[_COLORS[width] for width in widths])
    axis.set_title("size at these bits (kB)", **_LABEL)


def _columns(points: list[tuple[float, int]]) -> tuple[list[float], list[int]]:
    return [value for value, _ in points], [place for _, place in points]


_LABEL: dict[str, Any] = {"loc": "left", "fontsize": 8.5, "color": _FAINT, "pad": 6}
