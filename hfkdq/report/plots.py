# SPDX-License-Identifier: Apache-2.0
"""Draws metric, size and latency of every row side by side."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..facts import three_digits
from ..secrets import redact
from .data import ReportData, check_renderable
from .markdown import one_line
from .table import is_share, megabytes, metric_names

EXTRA = 'pip install "hfkdq[plots]"'
PLOT = "report.png"
"""The plot of a report, as it lies beside its card."""
_COLORS = {"torch": "#9aa7b8", "onnx": "#3b7dc4", "openvino": "#2f9e77"}
_LAST, _INK, _FAINT, _RULE = "#e0793a", "#22262d", "#6b7280", "#e5e7eb"


def check_plots() -> None:
    """Raises `ImportError`: matplotlib is not installed. For whoever draws only after long work."""
    if find_spec("matplotlib") is None:
        raise ImportError(f"The page and the plot of the report need matplotlib: {EXTRA}.")


def draw_plot(report: ReportData, path: Path) -> None:
    """Writes the plot of the report to `path` as PNG: the first metric, size and latency, a row per engine."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
    except ImportError as error:
        raise ImportError(f"The plot needs matplotlib: {EXTRA}.") from error
    check_renderable(report)
    timed = all(engine.latency is not None for engine in report.engines)
    wanted = {_draw_metric: bool(metric_names(report)), _draw_size: True, _draw_latency: timed}
    panels = [draw for draw, is_wanted in wanted.items() if is_wanted]
    rows = len(report.engines)
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.08)
    figure = Figure(figsize=(3.0 * len(panels) + 1.4, 0.5 * rows + 1.5), dpi=160, layout=layout)
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axis, draw in zip(axes, panels, strict=True):
        _prepare(axis, rows)
        draw(axis, report)
    axes[0].set_yticks(range(rows), [plain_text(engine.name) for engine in report.engines])
    where = "" if report.dataset is None else f" on {report.dataset.name}"
    title = plain_text(f"{report.architecture}{where}, {report.samples:,} examples")
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold", color=_INK)
    if timed:
        shapes = ", ".join(f"{name} {tuple(shape)}" for name, shape in report.timing["inputs"].items())
        timing = plain_text(f"Latency: {report.timing['threads']} CPU threads, {shapes}. Dark mark: the fastest call.")
        figure.supxlabel(timing, x=0.01, ha="left", fontsize=7.5, color=_FAINT)
    figure.savefig(path, format="png", facecolor="white")


def plain_text(value: str) -> str:
    """A text as matplotlib draws it letter by letter, without secrets."""
    return one_line(redact(value)).replace("$", r"\$")


def _prepare(axis: Any, rows: int) -> None:
    for side in ("top", "right", "bottom", "left"):
        axis.spines[side].set_visible(False)
    axis.tick_params(axis="y", length=0, labelsize=9, labelcolor=_INK)
    axis.set_xticks([])
    axis.set_ylim(rows - 0.4, -0.6)


def _colors(report: ReportData) -> list[str]:
    return [*(_COLORS[engine.kind] for engine in report.engines[:-1]), _LAST]


def _name_panel(axis: Any, title: str) -> None:
    axis.set_title(title, loc="left", fontsize=9, color=_FAINT, pad=6)


def _draw_metric(axis: Any, report: ReportData) -> None:
    """Dots of the first metric on an axis around its values: bars from zero would hide the differences."""
    metric = metric_names(report)[0]
    share = is_share(report, metric)
    points = [
        (row, engine.metrics[metric] * (100 if share else 1), color)
        for row, (engine, color) in enumerate(zip(report.engines, _colors(report), strict=True))
        if metric in engine.metrics
    ]
    values = [value for _, value, _ in points]
    spread = max(max(values) - min(values), 1.0 if share else abs(max(values)) * 0.01, 1e-9)
    left, right = min(values) - 0.35 * spread, max(values) + 0.65 * spread
    axis.set_xlim(left, right)
    for row, value, color in points:
        axis.plot([left, right], [row, row], color=_RULE, linewidth=1, zorder=1)
        axis.scatter([value], [row], s=55, color=color, zorder=2)
        text = f"{value:.2f} %" if share else f"{value:.4g}"
        axis.annotate(text, (value, row), (7, 0), textcoords="offset points", va="center", fontsize=8.5, color=_INK,
                      bbox=dict(facecolor="white", edgecolor="none", pad=1.0), zorder=3)  # fmt: skip
    _name_panel(axis, f"{plain_text(metric).replace('_', ' ')} (axis does not start at 0)")


def _draw_size(axis: Any, report: ReportData) -> None:
    sizes = [float(engine.size) for engine in report.engines]
    ratios = [f"{megabytes(engine.size)} MB  ({report.size_ratio(engine):.2f}x)" for engine in report.engines]
    _draw_bars(axis, sizes, ratios, _colors(report))
    _name_panel(axis, "size on disk")


def _draw_latency(axis: Any, report: ReportData) -> None:
    latencies = [engine.latency for engine in report.engines if engine.latency is not None]
    speedups = [report.speedup(engine) for engine in report.engines]
    labels = [
        f"{three_digits(latency.median_ms)} ms" + ("" if speedup is None else f"  ({three_digits(speedup)}x)")
        for latency, speedup in zip(latencies, speedups, strict=True)
    ]
    _draw_bars(axis, [latency.median_ms for latency in latencies], labels, _colors(report))
    for row, latency in enumerate(latencies):
        axis.plot([latency.min_ms] * 2, [row - 0.33, row + 0.33], color=_INK, linewidth=1.2)
    _name_panel(axis, "latency, median (speed-up)")


def _draw_bars(axis: Any, values: list[float], labels: list[str], colors: list[str]) -> None:
    axis.barh(range(len(values)), values, height=0.54, color=colors)
    axis.set_xlim(0, 1.75 * max(values))
    for row, (value, label) in enumerate(zip(values, labels, strict=True)):
        axis.annotate(label, (value, row), (5, 0), textcoords="offset points", va="center", fontsize=8.5, color=_INK)
