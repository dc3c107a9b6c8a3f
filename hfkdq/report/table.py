# SPDX-License-Identifier: Apache-2.0
"""Renders the rows of a report as a table, for the terminal and in Markdown."""

from __future__ import annotations

from rich import box
from rich.table import Table
from rich.text import Text

from ..facts import short_count, three_digits
from .data import Engine, ReportData
from .markdown import Markdown, escape, one_line

SHARES = ("accuracy", "f1", "precision", "recall", "exact_match", "auc")
_NONE = "–"  # noqa: RUF001 - the sign for a cell without a value


def metric_names(report: ReportData) -> list[str]:
    """All metrics of the report, in the order in which they first occur."""
    return list(dict.fromkeys(name for engine in report.engines for name in engine.metrics))


def is_share(report: ReportData, metric: str) -> bool:
    """Whether a metric reads best in percent: one of the known shares, and in [0, 1] in every row."""
    values = [engine.metrics[metric] for engine in report.engines if metric in engine.metrics]
    return any(part in metric for part in SHARES) and all(0.0 <= value <= 1.0 for value in values)


def megabytes(size: int) -> str:
    """Bytes in MB of a million, with three digits."""
    return three_digits(size / 1e6)


def cells(report: ReportData) -> tuple[list[str], list[list[str]]]:
    """Header and rows as text; columns that no row has a value for are left out."""
    metrics = metric_names(report)
    header = [
        "Model",
        *(f"{name} (%)" if is_share(report, name) else name for name in metrics),
        "Params",
        "Zeros (%)",
        "Size (MB)",
        "Size ratio",
        "Latency (ms)",
        "Fastest (ms)",
        "Speed-up",
    ]
    rows = [[engine.name, *_metrics(report, engine, metrics), *_numbers(report, engine)] for engine in report.engines]
    # Hardly any dense model is without a zero; a column of zeros is for those that were pruned.
    if all((engine.sparsity or 0.0) < 0.01 for engine in report.engines):
        for row in rows:
            row[header.index("Zeros (%)")] = _NONE
    used = [index for index in range(len(header)) if any(row[index] != _NONE for row in rows)]
    return [header[index] for index in used], [[row[index] for index in used] for row in rows]


def _metrics(report: ReportData, engine: Engine, names: list[str]) -> list[str]:
    def text(name: str) -> str:
        if name not in engine.metrics:
            return _NONE
        value = engine.metrics[name]
        return f"{100 * value:.2f}" if is_share(report, name) else f"{value:.4g}"

    return [text(name) for name in names]


def _numbers(report: ReportData, engine: Engine) -> list[str]:
    latency, speedup = engine.latency, report.speedup(engine)
    return [
        _NONE if engine.parameters is None else short_count(engine.parameters),
        _NONE if engine.sparsity is None else f"{100 * engine.sparsity:.1f}",
        megabytes(engine.size),
        f"{report.size_ratio(engine):.2f}",
        _NONE if latency is None else three_digits(latency.median_ms),
        _NONE if latency is None else three_digits(latency.min_ms),
        _NONE if speedup is None else f"{three_digits(speedup)}x",
    ]


def render_table(report: ReportData) -> Table:
    """The rows for the terminal; latency is the median, the fastest call beside it in dim print."""
    header, rows = cells(report)
    title = Text(one_line(f"{report.architecture}, {report.samples:,} examples"))
    table = Table(box=box.SIMPLE_HEAD, title=title, title_style="bold", padding=0)
    for name in header:
        left = name == "Model"
        style = "dim" if name.startswith("Fastest") else None
        # rich shrinks wide columns in proportion, into words; with two lines to a name none is wide.
        table.add_column(
            Text(one_line(name).replace(" ", "\n", 1)), justify="left" if left else "right", style=style, no_wrap=left
        )
    for row in rows:
        table.add_row(*(Text(one_line(cell)) for cell in row))
    return table


def render_markdown(report: ReportData) -> str:
    """The rows as a table in Markdown, without a line break at the end."""
    return markdown_table(*cells(report))


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown: first column to the left, the others to the right."""
    rules: list[str] = [Markdown("---"), *[Markdown("---:")] * (len(header) - 1)]
    escaped = [[escape(cell) for cell in line] for line in [header, rules, *rows]]
    return "\n".join(f"| {' | '.join(line)} |" for line in escaped)
