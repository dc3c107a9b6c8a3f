# SPDX-License-Identifier: Apache-2.0
"""Bits for the modules of a model under a size: the choice, as a table and a plot."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.table import Table

from ..specs import QuantizationSpec


@dataclass(frozen=True)
class BitAllocation:
    """Bits of weights that fit into a budget, and the sensitivities they were chosen by.

    Made by [`suggest_bits`]. Of modules that share their weights, `sensitivity` and `sizes` have the first alone.

    Attributes:
        bits (`dict`): bits of the weights of every module, by name.
        sensitivity (`dict`): how far the outputs move when this module alone is quantized, by name and bits.
        sizes (`dict`): bytes of the weights with their scales, by name and bits.
        budget (`int`): the most bytes there could be.
        float_bytes (`int`): what the same weights take in float32.
        spec (`QuantizationSpec`): the spec with these bits, for [`quantize`] and [`QATCallback`].
        measure (`str`): what a sensitivity is: `"KL divergence"`, `"relative squared error"`, or their sum.
    """

    bits: dict[str, int]
    sensitivity: dict[str, dict[int, float]]
    sizes: dict[str, dict[int, int]]
    budget: int
    float_bytes: int
    spec: QuantizationSpec
    measure: str

    @property
    def bytes(self) -> int:
        """Bytes of the weights with the chosen bits."""
        return sum(sizes[self.bits[name]] for name, sizes in self.sizes.items())

    @property
    def predicted(self) -> float:
        """The sum of the sensitivities at the chosen bits: to first order, how far the outputs move in all."""
        return sum(found[self.bits[name]] for name, found in self.sensitivity.items())

    @property
    def widths(self) -> tuple[int, ...]:
        """All numbers of bits that were measured, the largest first."""
        return tuple(sorted({width for found in self.sizes.values() for width in found}, reverse=True))

    def uniform(self, bits: int) -> tuple[int, float]:
        """Bytes and predicted change if all modules but those that the spec sets had one number of bits.

        Raises:
            ValueError: bits that were not measured.
        """
        if bits not in self.widths:
            raise ValueError(f"{bits} bits were not measured; there are {', '.join(map(str, self.widths))}.")
        at = {name: bits if bits in found else self.bits[name] for name, found in self.sizes.items()}
        return sum(self.sizes[n][b] for n, b in at.items()), sum(self.sensitivity[n][b] for n, b in at.items())

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON-ready data; bits that are keys become strings."""
        return {
            "bits": dict(self.bits), "bytes": self.bytes, "budget": self.budget, "float_bytes": self.float_bytes,
            "predicted": self.predicted, "measure": self.measure,
            "sensitivity": {n: {str(b): value for b, value in found.items()} for n, found in self.sensitivity.items()},
            "sizes": {name: {str(b): value for b, value in found.items()} for name, found in self.sizes.items()},
            "spec": self.spec.to_dict(),
        }  # fmt: skip

    def table(self) -> Table:
        """Sensitivities, bits and size of every module, for the terminal: `rich.print(allocation.table())`.

        The last rows have the predicted change and the bytes, for the same bits everywhere and for the chosen ones.
        """
        widths = self.widths
        table = Table(box=box.SIMPLE_HEAD, title=f"Sensitivity: {self.measure}", title_style="bold", padding=0)
        table.add_column("Module", overflow="fold")
        for name in (*(f"{width} bits" for width in widths), "Chosen", "Bytes"):
            table.add_column(name, justify="right", no_wrap=True)
        shorter = short_names(list(self.sensitivity))
        for name, found in self.sensitivity.items():
            chosen = self.bits[name]
            cells = [f"{found[width]:.1e}" if width in found else "" for width in widths]
            cells = [f"[bold]{c}[/]" if width == chosen else c for width, c in zip(widths, cells, strict=True)]
            table.add_row(shorter[name], *cells, f"[bold]{chosen}[/]", f"{self.sizes[name][chosen]:,}")
        table.add_section()
        uniform = [self.uniform(width) for width in widths]
        moved = [f"{change:.1e}" for _, change in uniform]
        table.add_row("all, predicted", *moved, f"[bold]{self.predicted:.1e}[/]", "")
        table.add_row("all, bytes", *(f"{size:,}" for size, _ in uniform), f"[bold]{self.bytes:,}[/]", "")
        share = [f"{100 * size / self.float_bytes:.1f} %" for size in (*(size for size, _ in uniform), self.bytes)]
        table.add_row("share of float32", *share[:-1], f"[bold]{share[-1]}[/]", "")
        return table

    def plot(self, path: str | Path) -> Path:
        """Draws sensitivity and size of every module, with the chosen bits marked, into a PNG file.

        Raises:
            ImportError: matplotlib is not installed.
        """
        draw_allocation(self, Path(path))
        return Path(path)


def choose_bits(
    sizes: Mapping[str, Mapping[int, int]],
    sensitivity: Mapping[str, Mapping[int, float]],
    budget: int,
    states: int = 1 << 16,
) -> dict[str, int]:
    """The bits of least summed sensitivity whose sizes fit into a budget, by dynamic programming.

    Module by module it keeps every total size at which no smaller one has as low a sum (Nemhauser and Ullmann, "Discrete
    Dynamic Programming and Capital Allocation", 1969). The result is exact while there are at most `states` of them, as
    for models whose layers are alike. Above, sizes within `budget / states` of each other are taken as one, that of the
    lowest sum; then the sum is no higher than the best for a budget smaller by `modules / states` of it, and the sizes
    still fit.

    `sizes` and `sensitivity` are by name and bits, `budget` is the most bytes in all. Returns bits by name; of equal sums
    those of the smallest size. Raises `ValueError`: the fewest bits do not fit.

    Example:
        ```python
        >>> from hfkdq.quantization.allocation import choose_bits
        >>> sizes = {"a": {8: 80, 4: 40}, "b": {8: 80, 4: 40}}
        >>> choose_bits(sizes, {"a": {8: 0.0, 4: 0.5}, "b": {8: 0.1, 4: 0.9}}, budget=120)
        {'a': 4, 'b': 8}

        ```
    """
    still = np.cumsum([min(found.values()) for found in reversed(list(sizes.values()))])[::-1]
    if still[0] > budget:
        raise ValueError(f"The fewest bits take {still[0]:,} bytes, more than the budget of {budget:,}.")
    total, cost = np.zeros(1, dtype=np.int64), np.zeros(1)
    trail = []
    for name, least in zip(sizes, [*still[1:], 0], strict=True):
        added = np.array(list(sizes[name].values()), dtype=np.int64)
        moved = np.array([sensitivity[name][width] for width in sizes[name]])
        totals, costs = (total[:, None] + added).ravel(), (cost[:, None] + moved).ravel()
        order = np.lexsort((costs, totals))
        order = order[totals[order] + least <= budget]
        lowest = np.minimum.accumulate(costs[order])
        kept = order[np.append(True, costs[order][1:] < lowest[:-1])]
        if len(kept) > states:
            place = totals[kept] * states // (budget + 1)
            kept = kept[np.append(place[1:] != place[:-1], True)]
        trail.append(kept)
        total, cost = totals[kept], costs[kept]
    state, widths = len(cost) - 1, {}
    for name, kept in zip(reversed(list(sizes)), reversed(trail), strict=True):
        state, choice = divmod(int(kept[state]), len(sizes[name]))
        widths[name] = list(sizes[name])[choice]
    return {name: widths[name] for name in sizes}


# From wide to narrow: cold to warm.
_COLORS = {16: "#5b4b9a", 8: "#3b7dc4", 6: "#3fa7a0", 4: "#7fae3f", 3: "#d9a92b", 2: "#e0793a", 1: "#c43b4e"}
_INK, _FAINT, _RULE = "#22262d", "#6b7280", "#e5e7eb"
_LABEL: dict[str, Any] = {"loc": "left", "fontsize": 8.5, "color": _FAINT, "pad": 6}
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
        label = f"{width} bits: {len(picked)} of {len(found)}"
        axis.scatter(*_columns(picked), s=34, color=color, zorder=3, label=label)
    axis.set_title(f"{allocation.measure}, this module alone quantized; filled: chosen", **_LABEL)
    if any(value < floor for row in found for value in row.values()):
        axis.set_xlabel("The left end stands for all that is less.", loc="left", fontsize=7, color=_FAINT)


def _draw_sizes(axis: Any, allocation: BitAllocation) -> None:
    widths = [allocation.bits[name] for name in allocation.sizes]
    sizes = [allocation.sizes[name][width] / 1e3 for name, width in zip(allocation.sizes, widths, strict=True)]
    axis.barh(range(len(sizes)), sizes, height=0.6, color=[_COLORS[width] for width in widths])
    axis.set_title("size at these bits (kB)", **_LABEL)


def _columns(points: list[tuple[float, int]]) -> tuple[list[float], list[int]]:
    return [value for value, _ in points], [place for _, place in points]
