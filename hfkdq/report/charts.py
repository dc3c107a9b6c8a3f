# SPDX-License-Identifier: Apache-2.0
"""Charts for the page of a report, each an SVG element that takes the colours of the page."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from ..facts import three_digits
from .data import Engine, ReportData
from .plots import EXTRA, plain_text
from .table import higher_is_better, is_share, metric_names

# Stand-ins, in place of which the page puts its own colours.
_INK, _FAINT, _RULE, _LAST = "#010203", "#040506", "#070809", "#0a0b0c"
_KINDS = {"torch": "#0d0e0f", "onnx": "#101112", "openvino": "#131415"}
_IN_CSS = {
    _INK: "var(--ink)", _FAINT: "var(--faint)", _RULE: "var(--rule)", _LAST: "var(--last)",
    _KINDS["torch"]: "var(--torch)", _KINDS["onnx"]: "var(--onnx)", _KINDS["openvino"]: "var(--openvino)",
}  # fmt: skip
_LONGEST = 28  # letters of a name


class Chart(NamedTuple):
    """A chart: what it is called, what is to be seen in it, for those who do not see it, and the SVG element."""

    title: str
    description: str
    svg: str


def pareto_charts(report: ReportData) -> list[Chart]:
    """The first metric of the rows by their sizes, and by their latencies where all were timed; a line joins the rows that none
    beats in both. None where no row has a metric."""
    metric = next(iter(metric_names(report)), "")
    rows = [engine for engine in report.engines if metric in engine.metrics]
    costs = {"size in MB": [engine.size / 1e6 for engine in rows]}
    latencies = [engine.latency.median_ms for engine in rows if engine.latency is not None]
    costs |= {"latency in ms": latencies} if len(latencies) == len(rows) else {}
    return [_pareto(report, rows, metric, cost, values) for cost, values in costs.items() if rows]


def layer_charts(engine: Engine) -> list[Chart]:
    """Bits and share of zeros of every weight of a row, in the order of the model."""
    values = {"bits": [float(layer.bits) for layer in engine.layers]}
    zeros = [100 * layer.sparsity for layer in engine.layers if layer.sparsity is not None]
    if len(zeros) == len(engine.layers):
        values["zeros in percent"] = zeros
    return [_bars(engine.name, what, heights) for what, heights in values.items() if heights]


def front(costs: Sequence[float], values: Sequence[float]) -> list[int]:
    """The places that no other beats: none is as cheap and better, or as good and cheaper; the cheapest first."""
    best: list[int] = []
    for place in sorted(range(len(costs)), key=lambda place: (costs[place], -values[place])):
        if not best or values[place] > values[best[-1]]:
            best.append(place)
    return best


def _label(name: str) -> str:
    """A name as it fits into a chart."""
    return plain_text(name if len(name) <= _LONGEST else f"{name[: _LONGEST - 1]}…")


def _pareto(report: ReportData, rows: Sequence[Engine], metric: str, cost: str, costs: Sequence[float]) -> Chart:
    factor = 100 if is_share(report, metric) else 1
    unit = " in percent" if factor == 100 else ""
    values = [factor * engine.metrics[metric] for engine in rows]
    best = front(costs, values if higher_is_better(metric) else [-value for value in values])

    def draw(axis: Any) -> None:
        axis.set_xscale("log")
        axis.plot([costs[i] for i in best], [values[i] for i in best], color=_RULE, linewidth=1.5, zorder=1)
        middle = sorted(values)[len(values) // 2]
        for engine, x, y in zip(rows, costs, values, strict=True):
            color = _LAST if engine is report.engines[-1] else _KINDS[engine.kind]
            if metric in engine.intervals:
                axis.plot([x, x], [factor * bound for bound in engine.intervals[metric]], color=color, zorder=2)
            axis.scatter([x], [y], s=42, color=color, zorder=3)
            above = (5, 6) if y >= middle else (5, -13)
            axis.annotate(_label(engine.name), (x, y), above, textcoords="offset points", fontsize=9, color=_INK)
        axis.set_xlim(min(costs) / 1.4, max(costs) * 3)
        axis.set_xlabel(f"{cost}, on a logarithmic axis", fontsize=8.5, color=_FAINT)
        axis.set_ylabel(_label(metric) + unit, fontsize=8.5, color=_FAINT)
        ends = sorted({min(costs), max(costs)} if max(costs) > 1.3 * min(costs) else {max(costs)})
        axis.minorticks_off()
        axis.set_xticks(ends, [three_digits(end) for end in ends])

    told = "; ".join(
        f"{engine.name}: {metric} {three_digits(abs(y)) if y else 0}{unit}, {cost} {three_digits(x)}"
        for engine, x, y in zip(rows, costs, values, strict=True)
    )
    unbeaten = ", ".join(rows[i].name for i in best)
    return Chart(f"{metric} by {cost}", f"{told}. Not beaten in both: {unbeaten}.", _svg(draw))


def curve_chart(name: str, points: Sequence[Sequence[float]]) -> Chart:
    """A curve of the training, of pairs of step and value."""
    steps, values = zip(*points, strict=True)

    def draw(axis: Any) -> None:
        axis.plot(steps, values, color=_LAST, linewidth=1.5)
        axis.set_xlabel("optimizer step", fontsize=8.5, color=_FAINT)
        axis.locator_params(axis="x", integer=True, min_n_ticks=1)

    told = f"From {values[0]:.4g} at step {steps[0]:g} to {values[-1]:.4g} at step {steps[-1]:g}; lowest {min(values):.4g}."
    return Chart(name, told, _svg(draw))


def _bars(name: str, what: str, heights: Sequence[float]) -> Chart:
    def draw(axis: Any) -> None:
        axis.bar(range(1, len(heights) + 1), heights, color=_KINDS["onnx"], width=0.8)
        axis.set_xlabel("weights, the first to the last", fontsize=8.5, color=_FAINT)
        axis.locator_params(axis="x", integer=True, min_n_ticks=1)
        axis.set_ylim(0, 1.1 * max(1.0, *heights))

    told = f"{what} of {len(heights)} weights of {name}: from {min(heights):.3g} to {max(heights):.3g}."
    return Chart(f"{name}: {what}", told, _svg(draw))


def with_prefix(svg: str, prefix: str) -> str:
    """The element with `prefix` before all its names, which are those of the whole page."""
    return re.sub(r'(?<=\bid=")|(?<=url\(#)|(?<=href="#)', f"{prefix}-", svg)


def _svg(draw: Callable[[Any], None]) -> str:
    """An SVG element with one pair of axes."""
    try:
        import matplotlib
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
    except ImportError as error:
        raise ImportError(f"The page has charts, which need matplotlib: {EXTRA}.") from error
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "hfkdq"}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # the browser has other letters
        figure = Figure(figsize=(4.6, 3.0), layout=ConstrainedLayoutEngine())
        FigureCanvasSVG(figure)
        axis = figure.subplots()
        axis.set_facecolor("none")
        axis.tick_params(which="both", labelsize=8.5, colors=_FAINT, length=2)
        for side, spine in axis.spines.items():
            spine.set_visible(side in ("left", "bottom"))
            spine.set_color(_RULE)
        draw(axis)
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = file.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font: \1px system-ui, sans-serif", text)
    head, rest = text.split(">", 1)
    head = re.sub(r' (?:height|width|xmlns:xlink)="[^"]*"', "", head)
    for color, css in _IN_CSS.items():
        rest = rest.replace(color, css)
    return f'{head} aria-hidden="true">{rest}'
