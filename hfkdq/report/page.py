# SPDX-License-Identifier: Apache-2.0
"""Renders a report as one HTML page that holds all it shows, so that it opens without a network."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

from jinja2 import Template
from markupsafe import Markup

from ..export.record import MADE_UP
from ..facts import describe_facts, three_digits
from .card import parity_cells, templates
from .charts import Chart, curve_chart, layer_charts, pareto_charts, with_prefix
from .data import ReportData
from .markdown import one_line
from .table import cells, is_share, metric_names, metric_text, told_doubts


@cache
def _template() -> Template:
    return templates(autoescape=True, finalize=_plain).get_template("report.html.j2")


def _plain(value: Any) -> Any:
    """Texts from elsewhere without what turns their direction round; what is HTML of ours stays."""
    return one_line(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def render_page(report: ReportData) -> str:
    """The page of a report that holds no secrets."""
    header, rows = cells(report)
    return _template().render(
        report=report,
        title=_title(report),
        summary=_summary(report),
        header=header,
        rows=[[_split(cell) for cell in row] for row in rows],
        doubts=told_doubts(report),
        pareto=_marked(pareto_charts(report), "pareto"),
        curves=_marked([curve_chart(*curve) for curve in report.curves.items()], "curve"),
        layers=[
            (engine, _marked(layer_charts(engine), f"layers-{number}"))
            for number, engine in enumerate(report.engines)
            if engine.layers
        ],
        parity=parity_cells(report),
        is_compared=any((e.parity or {}).get("compared_on") for e in report.engines),
        made_up=[e.name for e in report.engines if (e.parity or {}).get("compared_on") == MADE_UP],
        recipe=describe_facts(report.facts),
        facts=json.dumps(report.facts, indent=2, ensure_ascii=False),
    )


def _title(report: ReportData) -> str:
    first, last = report.engines[0].name, report.engines[-1].name
    return last if len(report.engines) == 1 else f"{last} against {first}"


def _summary(report: ReportData) -> str:
    """What the last row is beside the first, in a sentence; empty where there is one row alone."""
    first, last = report.engines[0], report.engines[-1]
    if last is first:
        return ""
    told = [f"{last.name} takes {report.size_ratio(last):.0%} of the bytes of {first.name}"]
    speedup = report.speedup(last)
    told += [] if speedup is None else [f"is {three_digits(speedup)} times as fast"]
    metric = next((name for name in metric_names(report) if name in first.metrics and name in last.metrics), None)
    if metric is not None:
        share, unit = is_share(report, metric), " %" if is_share(report, metric) else ""
        values = [metric_text(engine.metrics[metric], share) + unit for engine in (last, first)]
        told.append(f"has {values[0]} {metric} instead of {values[1]}")
    return f"{', '.join(told[:-1])}{' and ' if told[1:] else ''}{told[-1]}."


def _split(cell: str) -> tuple[str, str]:
    """A number and its interval."""
    number, bracket, bounds = cell.partition(" [")
    return (number, f"[{bounds}") if bracket and bounds.endswith("]") else (cell, "")


def _marked(charts: list[Chart], prefix: str) -> list[dict[str, Any]]:
    """Charts whose elements, in which matplotlib has escaped all texts, are HTML already."""
    return [
        {**one._asdict(), "svg": Markup(with_prefix(one.svg, f"{prefix}-{number}"))}
        for number, one in enumerate(charts)
    ]
