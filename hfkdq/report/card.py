# SPDX-License-Identifier: Apache-2.0
"""Renders a report as a model card: recorded and measured facts, and nothing that is not in the report."""

from __future__ import annotations

import json
import re
from functools import cache
from typing import Any
from urllib.parse import quote

import jinja2
import transformers
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # exported there, without __all__

from ..export.choices import OPENVINO
from ..export.precisions import DYNAMIC, recorded_precision
from ..export.record import MADE_UP
from ..export.sample import CALLS, EXPORTERS, GREY, LOADERS, OPTIMUM, TEXT, channels, file_name, is_grey, optimum_class
from ..facts import describe_facts
from ..modeling.tasks import task_of
from ..schema import shortened
from ..secrets import redact
from ..specs import QuantizationSpec
from .citations import citations
from .data import RUNTIMES, Engine, ReportData, check_renderable
from .markdown import Markdown, code, escape, escaping, is_unsafe, one_line, unwrapped
from .table import markdown_table, metric_names, render_markdown

# Title, factor and format of what an export records.
_PARITY = {
    "max_abs_diff": ("Largest difference", 1, "{:.2e}"),
    "mean_abs_diff": ("Mean difference", 1, "{:.2e}"),
    "max_abs_logit": ("Largest logit", 1, "{:.3g}"),
    "top1_agreement": ("Same top class (%)", 100, "{:.2f}"),
    "samples": ("Examples", 1, "{:,}"),
    "tolerance": ("Bound (% of largest logit)", 100, "{:g}"),
}
# The classes that optimum-intel has for files without a cache.
_IN_OPTIMUM_INTEL = {
    f"AutoModelFor{name}" for name in (
        "AudioClassification", "AudioFrameClassification", "CTC", "ImageClassification", "MaskedLM", "QuestionAnswering",
        "SequenceClassification", "TokenClassification",
    )
}  # fmt: skip


def templates(**settings: Any) -> jinja2.Environment:
    """What reads the templates of cards and pages."""
    loader = jinja2.PackageLoader("hfkdq", "templates")
    return jinja2.Environment(
        loader=loader, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, **settings
    )


@cache
def _template() -> jinja2.Template:
    # Whatever is no Markdown of ours is text.
    environment = templates(autoescape=False, finalize=escape, keep_trailing_newline=True)
    environment.filters["code"] = code
    return environment.get_template("model_card.md.j2")


def render_card(report: ReportData, repo_id: str | None, plot: str | None = None, place: str = ".") -> str:
    """The complete `README.md` of the report; `repo_id` is where the code in it loads the model from, or else `place`, seen from
    the card, `plot` the picture that lies beside it."""
    check_renderable(report)
    if repo_id is not None and not _is_hub_id(repo_id):
        told = shortened(repo_id)
        raise ValueError(f"repo_id is {told}; a Repo id of the Hub is 'user/name', or 'name' for one of your own.")
    parity = parity_cells(report)
    body = _template().render(
        report=report,
        title=_title(report),
        origin=_origin(report.base_model),
        table=Markdown(render_markdown(report)),
        done=_done(report),
        parity=None if parity is None else Markdown(markdown_table(*parity)),
        format=_file(report.engines[-1])[0],
        compared=" and ".join(
            dict.fromkeys("the {} file in {}".format(*_file(one)) for one in report.engines if one.parity is not None)
        ),
        quantized="quantization" in report.facts,
        zeroed=_zeroed(report),
        usage=_usage(report, repo_id, place),
        plot=None if plot is None else Markdown(quote(plot)),
        curves=_curves(report),
        papers=citations(report.facts),
    )
    return redact(str(ModelCard(f"---\n{_metadata(report).to_yaml()}\n---\n\n{body}")))


def _file(engine: Engine) -> tuple[str, str]:
    """What a file is called, and what runs it."""
    return RUNTIMES.get(engine.kind, RUNTIMES["onnx"])


def _origin(base_model: str | None) -> Markdown | None:
    """The model that the student comes from, with a link if it can be one on the Hub."""
    if not base_model:
        return None
    if not _is_hub_id(base_model):
        return escape(base_model)
    return Markdown(f"[{base_model}](https://huggingface.co/{base_model})")


def _is_hub_id(name: Any) -> bool:
    try:
        validate_repo_id(name)
    except ValueError:
        return False
    return isinstance(name, str) and name.isprintable()


def _plain_text(value: Any) -> Any:
    """Text for the metadata: one line, without tags for readers that take it for Markdown."""
    if isinstance(value, list):
        return [_plain_text(item) for item in value]
    return re.sub(r"[<>]", "", one_line(value)) if isinstance(value, str) else value


def _title(report: ReportData) -> str:
    origin = report.base_model.split("/")[-1] if report.base_model else report.architecture
    return f"{origin}, compressed with hfkdq"


def _metadata(report: ReportData) -> ModelCardData:
    results = _eval_results(report)
    data = report.dataset.id if report.dataset is not None else None
    datasets = [data] if data is not None and _is_hub_id(data) else None
    base = report.base_model if _is_hub_id(report.base_model) else None
    tags = _tags(report)
    # The Hub draws its tree of models by this word.
    relation: dict[str, Any] = (
        {} if base is None else {"base_model_relation": "quantized" if "quantization" in tags else "finetune"}
    )
    return ModelCardData(
        base_model=base,
        datasets=datasets,
        language=_plain_text(report.language),
        library_name="transformers",
        license=_plain_text(report.license),
        metrics=_plain_text(metric_names(report)) or None,
        pipeline_tag=_plain_text(report.task),
        tags=tags,
        **relation,
        model_name=_plain_text(_title(report)) if results else None,
        eval_results=results or None,
    )


def _tags(report: ReportData) -> list[str]:
    facts, last = report.facts, report.engines[-1]
    parity = last.parity or {}
    precision = recorded_precision(parity) or recorded_precision(facts.get("quantization", {}))
    known = bool(parity.get("spec")) or "quantization" in facts
    is_quantized = precision is not None and (precision.name == DYNAMIC or (precision.has_integers and known))
    done = {
        "distillation": "teacher" in facts.get("distillation", {}),
        "pruning": "pruning" in facts or "student" in facts,
        "quantization": "quantization" in facts or is_quantized,
        precision.name if precision is not None else "": is_quantized,
        last.kind: last.kind != "torch",
    }
    return ["hfkdq", *(tag for tag, is_done in done.items() if is_done)]


def _eval_results(report: ReportData) -> list[EvalResult]:
    """The metrics of the last row, which is the exported file, if it is known what they were measured on."""
    if report.task is None or report.dataset is None:
        return []
    data = report.dataset
    return [
        EvalResult(
            task_type=_plain_text(report.task),
            dataset_type=_plain_text(data.id) or re.sub(r"[^\w.-]+", "-", data.name).strip("-").lower() or "data",
            dataset_name=_plain_text(data.name) or "data",
            dataset_config=_plain_text(data.config),
            dataset_split=_plain_text(data.split),
            dataset_revision=_plain_text(data.revision),
            metric_type=_plain_text(metric),
            metric_value=round(value, 6),
            metric_name=_plain_text(f"{metric} ({report.engines[-1].name})"),
        )
        for metric, value in report.engines[-1].metrics.items()
    ]


def _done(report: ReportData) -> list[Markdown]:
    """A line for every recorded step, and one for the export."""
    steps = [*describe_facts(escaping(report.facts), _as_code), _export(report)]
    return [Markdown(re.sub(r"^\w+", r"**\g<0>**", step)) for step in steps if step]


def _as_code(*parts: Any) -> Markdown:
    return code("".join(str(unwrapped(part)) for part in parts))


def _export(report: ReportData) -> str:
    if report.engines[-1].parity is None:
        return ""
    parity, precision = escaping(report.engines[-1].parity), recorded_precision(report.engines[-1].parity)
    how = "" if precision is None else precision.description
    if precision is not None and precision.has_integers and "quantization" not in report.facts:
        how = f"with {QuantizationSpec.describe(parity['spec'], _as_code)}" if parity.get("spec") else ""
    how = f", {how}" if how else ""
    (name, _), is_onnx = _file(report.engines[-1]), report.engines[-1].kind == "onnx"
    opset = f", opset {parity['opset']}" if "opset" in parity and is_onnx else ""
    line = f"Export to {name}{opset}{how}"
    if "fused_linears" in parity and "quantized_linears" in parity:
        line += (
            f". Of its {parity['quantized_linears']} quantized layers that are matrix products, ONNX Runtime ran "
            f"{parity['fused_linears']} on integers where it was exported"
        )
    if left := parity.get("top_k", {}).get("left_in_float"):
        names = ", ".join(_as_code(name) for name in left)
        line += f". Integers changed which of many it keeps as the best, so what scores them stays in floating point: {names}"
    if parity.get("compared_on") == MADE_UP:
        line += ". It was compared with the model on made-up inputs, as there were no data"
    return f"{line}."


def _curves(report: ReportData) -> Markdown | None:
    """The first and the last value of everything that the training logged more than once."""
    rows = [
        [escape(name), *(f"{value:.4g} (step {step:,.0f})" for step, value in (points[0], points[-1]))]
        for name, points in report.curves.items()
    ]
    return Markdown(markdown_table(["Logged", "First", "Last"], rows)) if rows else None


def parity_cells(report: ReportData) -> tuple[list[str], list[list[str]]] | None:
    """The differences between the logits of every exported file and of its model: header and rows; `None` without any."""
    engines = [engine for engine in report.engines if engine.parity is not None]
    keys = [key for key in _PARITY if any((engine.parity or {}).get(key) is not None for engine in engines)]
    if "max_abs_diff" not in keys:
        return None

    def cell(engine: Engine, key: str) -> str:
        value = (engine.parity or {}).get(key)
        _, factor, form = _PARITY[key]
        return "" if value is None else form.format(factor * value)

    rows = [[engine.name, *(cell(engine, key) for key in keys)] for engine in engines]
    return ["File", *(_PARITY[key][0] for key in keys)], rows


def _zeroed(report: ReportData) -> bool:
    last = report.facts.get("pruning", {})
    specs = [fact.get("spec", {}) for fact in (*last.get("earlier", ()), last)]
    return any(spec.get("structure") in ("weight", "n:m", "block") or spec.get("cut") == "mask" for spec in specs)


def _printed(report: ReportData, runner: str) -> Markdown:
    """What the sample call printed where this ran it, as a block of code; nothing where it could be taken for markup."""
    if report.sample is None or report.sample.runner != runner or is_unsafe(report.sample.printed):
        return Markdown("")
    return Markdown(f"```text\n{one_line(report.sample.printed)}\n```")


def _loader(kind: str, auto: str, suffix: str) -> dict[str, Any]:
    """The names in the code that loads the exported file; no class where there is none."""
    if kind == OPENVINO:
        loader, package, module = "Optimum Intel", "optimum-intel[openvino]", "optimum.intel"
        name = auto.replace("AutoModel", "OVModel") * (auto in _IN_OPTIMUM_INTEL)
        more = ', ov_config={"EXECUTION_MODE_HINT": "ACCURACY"}'
    else:
        loader, package, module = "Optimum", "optimum-onnx[onnxruntime]", "optimum.onnxruntime"
        name, more = optimum_class(auto) * (kind == "onnx"), f', file_name="{file_name(suffix)}"' if suffix else ""
    return {
        "loader": loader, "package": Markdown(json.dumps(package)), "module": module, "file": Markdown(more),
        "file_class": name,
    }  # fmt: skip


def _usage(report: ReportData, repo_id: str | None, place: str) -> dict[str, Any]:
    """The names that the code in the card is made of."""
    task = task_of(report.architecture)
    auto = task.auto if task is not None and task.name == report.task else None
    argument = LOADERS.get(report.processor or "", "")
    files = [name for name in report.engines[-1].files or () if name.endswith(".onnx")]
    suffix = (report.engines[-1].parity or {}).get("suffix", "")
    # Files made with Transformers 5 load by its own exporters.
    made_with = re.fullmatch(r"[5-9]\.\d+(\.\d+)?", str(report.environment.get("transformers", "")))
    return {
        "source": Markdown(json.dumps(repo_id or place)),  # Python takes it for the same text
        "comment": Markdown("" if repo_id else f"  # {'the folder of' if place == '.' else 'beside'} this file"),
        "auto": auto or report.architecture,
        "own": auto is None and not hasattr(transformers, report.architecture),
        "session": Markdown(json.dumps(f"/{files[0]}")) if len(files) == 1 else "",
        "hub": repo_id is not None,
        **_loader(report.engines[-1].kind, auto or "", suffix),
        "runner": Markdown(made_with[0]) if made_with and report.engines[-1].kind == "onnx" else "",
        "processor": report.processor or "",
        "shaped": "shapes" in report.facts,
        "task": Markdown(json.dumps(one_line(report.task))),
        "argument": argument,
        "given": "tokenizer=processor.tokenizer, feature_extractor=processor.feature_extractor"
        if argument == "processor"
        else f"{argument}={argument}",
        "grey": Markdown(GREY if is_grey(report.engines[-1].parity or {}) and argument == "image_processor" else ""),
        # A pipeline makes three channels of every image.
        "called_with": Markdown(
            CALLS.get(report.task or "", "") if channels(report.engines[-1].parity or {}) in (None, 3) else ""
        ),
        "text": Markdown(json.dumps(TEXT)) if argument == "tokenizer" and task and not task.generates else "",
        "printed": {runner: _printed(report, runner) for runner in (OPTIMUM, EXPORTERS)},
        "shown": report.sample is not None and report.task == "image-classification",
    }
