# SPDX-License-Identifier: Apache-2.0
"""Renders the rows of a report as a table, for the terminal and in Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.table import Table
from rich.text import Text

from ..facts import short_count, three_digits
from ..measuring.latency import BUSY
from ..metrics.tasks import LOWER_IS_BETTER
from .data import Engine, ReportData
from .markdown import Markdown, escape, one_line

SHARES = ("accuracy", "f1", "precision", "recall", "exact_match", "auc")
NONE = "–"  # noqa: RUF001 - the sign for a cell without a value


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
        "Model", *(f"{name} (%)" if is_share(report, name) else name for name in metrics), *("Drop" for _ in metrics[:1]),
        "Params", "Zeros (%)", "Size (MB)", "Size ratio", "Latency (ms)", "Fastest (ms)", "Speed-up",
    ]  # fmt: skip
    rows = [
        [one.name, *_metrics(report, one, metrics), *_drop(report, one, metrics[:1]), *_numbers(report, one)]
        for one in report.engines
    ]
    # Hardly any dense model is without a zero; a column of zeros is for those that were pruned.
    if all((engine.sparsity or 0.0) < 0.01 for engine in report.engines):
        for row in rows:
            row[header.index("Zeros (%)")] = NONE
    used = [index for index in range(len(header)) if any(row[index] != NONE for row in rows)]
    return [header[index] for index in used], [[row[index] for index in used] for row in rows]


def _metrics(report: ReportData, engine: Engine, names: list[str]) -> list[str]:
    def text(name: str) -> str:
        if name not in engine.metrics:
            return NONE
        share = is_share(report, name)
        return with_interval(metric_text(engine.metrics[name], share), engine.intervals.get(name), share)

    return [text(name) for name in names]


def _drop(report: ReportData, engine: Engine, names: list[str]) -> list[str]:
    """How much worse than the first row the engine is, by the first metric, where the interval of that is known."""
    metrics = (engine.changes, engine.metrics, report.engines[0].metrics)
    if not all(name in values for name in names for values in metrics):
        return [NONE] * len(names)
    if not names:
        return []
    sign, share = (-1 if higher_is_better(names[0]) else 1), is_share(report, names[0])
    drop = sign * (engine.metrics[names[0]] - report.engines[0].metrics[names[0]])
    return [with_interval(metric_text(drop, share), sorted(sign * bound for bound in engine.changes[names[0]]), share)]


def metric_text(value: float, share: bool) -> str:
    """A metric with the digits that it is read with, in percent if it is a share."""
    value = round(100 * value, 2) if share else value
    return f"{value + 0.0:.2f}" if share else f"{value + 0.0:.4g}"  # no zero has a sign


def with_interval(text: str, bounds: Sequence[float] | None, share: bool) -> str:
    """A number in words and, in brackets, its bounds, if there are any."""
    return text if bounds is None else f"{text} [{', '.join(metric_text(bound, share) for bound in bounds)}]"


def higher_is_better(metric: str) -> bool:
    """Whether a model is better with more of a metric, as with all but those that are errors by their names."""
    return metric.removeprefix("eval_") not in (*LOWER_IS_BETTER, "loss")


def told_doubts(report: ReportData) -> list[str]:
    """What is to be known of the intervals and of ratios that are not given, a sentence each."""
    told = []
    if any(engine.intervals for engine in report.engines):
        told.append(
            f"Drop: how much worse {metric_names(report)[0]} is than that of {report.engines[0].name}, on the same rows. Brackets after a metric: its 95 % interval over other rows of the same kind (Wilson's for shares of rows, else a "
            "bootstrap over rows)."
        )
    confidence = report.rounds_confidence
    if confidence is not None and any(report.speedup_interval(engine) for engine in report.engines):
        told.append(
            f"Brackets after a speed-up: the lowest and the highest of {report.timing.get('rounds', 'all')} paired rounds, which hold "
            f"the median in {100 * confidence:.0f} of 100 such measurements."
        )
    busy = [engine.name for engine in report.engines if report.is_busy(engine)]
    if busy:
        told.append(
            f"No speed-up is given for {', '.join(busy)}: the machine was too busy to tell, as two estimates of the ratio (medians "
            f"and fastest calls, or two rounds) differ by more than a factor of {BUSY:g}. Measure again on a quiet machine."
        )
    return told


def _numbers(report: ReportData, engine: Engine) -> list[str]:
    latency = engine.latency
    return [
        NONE if engine.parameters is None else short_count(engine.parameters),
        NONE if engine.sparsity is None else f"{100 * engine.sparsity:.1f}",
        megabytes(engine.size),
        f"{report.size_ratio(engine):.2f}",
        NONE if latency is None else three_digits(latency.median_ms),
        NONE if latency is None else three_digits(latency.min_ms),
        speedup_text(report.speedup(engine), report.speedup_interval(engine)),
    ]


def speedup_text(speedup: float | None, bounds: Sequence[float] | None) -> str:
    """A ratio of times and, in brackets, its bounds; a dash where it is not known."""
    ratio = NONE if speedup is None else f"{three_digits(speedup)}x"
    return ratio if bounds is None else f"{ratio} [{', '.join(map(three_digits, bounds))}]"


def render_table(report: ReportData) -> Table:
    """The rows for the terminal; latency is the median, the fastest call beside it in dim print where intervals leave it room."""
    header, rows = cells(report)
    if any(engine.intervals for engine in report.engines) and "Fastest (ms)" in header:
        place = header.index("Fastest (ms)")
        header, *rows = ([*line[:place], *line[place + 1 :]] for line in (header, *rows))
    title = Text(one_line(f"{report.architecture}, {report.samples:,} examples"))
    table = Table(box=box.SIMPLE_HEAD, title=title, title_style="bold", padding=0)
    for name in header:
        add_column(table, name, left=name == "Model", style="dim" if name.startswith("Fastest") else None)
    for row in rows:
        table.add_row(*(Text(one_line(cell).replace(" [", "\n[")) for cell in row))
    table.caption_justify = "left"
    table.caption = Text(" ".join(map(one_line, told_doubts(report)))) if told_doubts(report) else None
    return table


def add_column(table: Table, name: str, left: bool = False, style: str | None = None) -> None:
    """Adds a column whose name is on two lines: rich shrinks wide columns in proportion, into words."""
    title = Text(one_line(name).replace(" ", "\n", 1))
    width = min(12, max(map(len, title.plain.split("\n"))))
    table.add_column(title, justify="left" if left else "right", style=style, no_wrap=left, min_width=width)


def render_markdown(report: ReportData) -> str:
    """The rows as a table in Markdown and what is to be known of them, without a line break at the end."""
    told = "\n".join(f"\n{escape(sentence)}" for sentence in told_doubts(report))
    return markdown_table(*cells(report)) + (f"\n{told}" if told else "")


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown: first column to the left, the others to the right."""
    rules: list[str] = [Markdown("---"), *[Markdown("---:")] * (len(header) - 1)]
    escaped = [[escape(cell) for cell in line] for line in [header, rules, *rows]]
    return "\n".join(f"| {' | '.join(line)} |" for line in escaped)
