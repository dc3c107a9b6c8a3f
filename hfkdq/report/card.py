# SPDX-License-Identifier: Apache-2.0
"""Renders a report as a model card: recorded and measured facts, and nothing that is not in the report."""

from __future__ import annotations

import json
import re
from functools import cache
from typing import TYPE_CHECKING, Any

import jinja2
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # exported there, without __all__

from ..facts import Facts
from ..schema import check
from ..secrets import redact
from .markdown import Markdown, code, escape, one_line, plain, told
from .schema import Export, Timing
from .table import count, markdown_table, metric_names

if TYPE_CHECKING:
    from .compression import CompressionReport, Engine

# Title, factor and format of what an export records.
_PARITY = {
    "max_abs_diff": ("Largest difference", 1, "{:.2e}"),
    "mean_abs_diff": ("Mean difference", 1, "{:.2e}"),
    "max_abs_logit": ("Largest logit", 1, "{:.3g}"),
    "top1_agreement": ("Same top class (%)", 100, "{:.2f}"),
    "samples": ("Examples", 1, "{:,}"),
    "tolerance": ("Bound (% of largest logit)", 100, "{:g}"),
}
_PIPELINE_ARGUMENT = {
    "AutoTokenizer": "tokenizer",
    "AutoImageProcessor": "image_processor",
    "AutoFeatureExtractor": "feature_extractor",
    "AutoProcessor": "processor",
}


def check_renderable(report: CompressionReport) -> None:
    """Refuses a report whose fields no code, table or plot can be made of.

    Raises:
        ValueError: it has such a field; one line names it.
    """
    for name, value in (("architecture", report.architecture), ("processor", report.processor)):
        if value is not None and not (isinstance(value, str) and value.isidentifier() and value.isascii()):
            raise ValueError(f"{name} is {_short(value)}, expected the name of a class")
    for number, engine in enumerate(report.engines):
        _check_engine(engine, f"engines[{number}]")
    if report.samples < 0:
        raise ValueError(f"samples is {report.samples}, expected 0 or more")
    check(report.facts, Facts, "facts")
    check(report.timing, Timing, "timing")
    if report.timing and not {"threads", "rounds", "inputs"} <= set(report.timing):
        raise ValueError("timing lacks threads, rounds or inputs")


def _check_engine(engine: Engine, where: str) -> None:
    latency = engine.latency
    wrong = {
        "kind": engine.kind not in ("torch", "onnx"),
        "size": engine.size <= 0,
        "parameters": engine.parameters is not None and engine.parameters < 0,
        "sparsity": engine.sparsity is not None and not 0 <= engine.sparsity <= 1,
        "latency": latency is not None and not (0 < latency.min_ms <= latency.median_ms and latency.calls > 0),
    }
    for name, is_wrong in wrong.items():
        if is_wrong:
            raise ValueError(f"{where}.{name} is {_short(getattr(engine, name))}, which nothing can be measured as")
    if engine.parity is not None:
        check(engine.parity, Export, f"{where}.parity")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("hfkdq", "templates"),
        undefined=jinja2.StrictUndefined,
        autoescape=False,
        finalize=escape,  # whatever is no Markdown of ours is text
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["code"] = code
    return environment.get_template("model_card.md.j2")


def render_card(report: CompressionReport, repo_id: str | None) -> str:
    """The complete `README.md` of the report; `repo_id` is where the code in it loads the model from."""
    check_renderable(report)
    if repo_id is not None and not _is_hub_id(repo_id):
        raise ValueError(
            f"repo_id is {_short(repo_id)}; a Repo id of the Hub is 'user/name', or 'name' for one of your own."
        )
    body = _template().render(
        report=report,
        title=_title(report),
        origin=_origin(report.base_model),
        table=Markdown(report.to_markdown()),
        done=_done(report),
        parity=_parity(report),
        quantized="quantization" in report.facts,
        zeroed=_zeroed(report),
        usage=_usage(report, repo_id),
    )
    return redact(str(ModelCard(f"---\n{_metadata(report).to_yaml()}\n---\n\n{body}")))


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
    """What is written into the metadata, whose texts have one line, and no tags for readers that take it for Markdown."""
    if isinstance(value, list):
        return [_plain_text(item) for item in value]
    return re.sub(r"[<>]", "", one_line(value)) if isinstance(value, str) else value


def _title(report: CompressionReport) -> str:
    origin = report.base_model.split("/")[-1] if report.base_model else report.architecture
    return f"{origin}, compressed with hfkdq"


def _metadata(report: CompressionReport) -> ModelCardData:
    results = _eval_results(report)
    data = report.dataset.id if report.dataset is not None else None
    datasets = [data] if data is not None and _is_hub_id(data) else None
    return ModelCardData(
        base_model=report.base_model if _is_hub_id(report.base_model) else None,
        datasets=datasets,
        language=_plain_text(report.language),
        library_name="transformers",
        license=_plain_text(report.license),
        metrics=_plain_text(metric_names(report)) or None,
        pipeline_tag=_plain_text(report.task),
        tags=_tags(report),
        model_name=_plain_text(_title(report)) if results else None,
        eval_results=results or None,
    )


def _tags(report: CompressionReport) -> list[str]:
    facts, last = report.facts, report.engines[-1]
    dynamic = (last.parity or {}).get("kind") == "dynamic"
    bits = facts.get("quantization", {}).get("spec", {}).get("weight_bits", 8)
    done = {
        "distillation": "teacher" in facts.get("distillation", {}),
        "pruning": "pruning" in facts or "student" in facts,
        "quantization": "quantization" in facts or dynamic,
        f"int{8 if dynamic else bits}": dynamic or ("quantization" in facts and bits < 16),
        "onnx": last.kind == "onnx",
    }
    return ["hfkdq", *(tag for tag, is_done in done.items() if is_done)]


def _eval_results(report: CompressionReport) -> list[EvalResult]:
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


def _done(report: CompressionReport) -> list[Markdown]:
    """A line for every recorded step, in the order in which the steps follow one another."""
    facts = told(report.facts)
    steps = [
        _layers(facts.get("student", {})),
        _distillation(facts.get("distillation", {})),
        *(_pruning(fact) for fact in facts.get("pruning", {}).get("earlier", [])),
        _pruning(facts.get("pruning", {})),
        _quantization(facts.get("quantization", {})),
        _export(report.engines[-1]),
    ]
    return [Markdown(step) for step in steps if step]


def _layers(fact: dict[str, Any]) -> str:
    if not fact.get("layers") or "teacher_layers" not in fact:
        return ""
    kept = ", ".join(map(str, fact["layers"]))
    return (
        f"**Layers**: {len(fact['layers'])} of the teacher's {fact['teacher_layers']} layers, copied from it "
        f"(numbers {kept}, counted from 1)."
    )


def _distillation(fact: dict[str, Any]) -> str:
    objectives = ", ".join(code(_call(plain(objective))) for objective in fact.get("objectives", []))
    if not objectives:
        return ""
    verb = f"**Distillation** from a {code(fact['teacher'])}" if "teacher" in fact else "**Training**"
    steps = f", {fact['steps']:,} optimizer steps" if "steps" in fact else ""
    return f"{verb}{steps}: {objectives}."


def _call(objective: dict[str, Any]) -> str:
    def setting(value: Any) -> Any:
        return _call(value) if isinstance(value, dict) and "name" in value else value

    settings = ", ".join(f"{key}={setting(value)}" for key, value in objective.items() if key != "name")
    return f"{objective.get('name', 'objective')}({settings})"


def _pruning(fact: dict[str, Any]) -> str:
    spec = fact.get("spec", {})
    what = {
        "neuron": "of the feed-forward neurons of every layer are removed, so the layers are smaller",
        "head": "of the attention heads are removed",
        "channel": "of the inner channels of convolutional blocks are removed",
        "layer": "of the layers are removed",
        "hidden": "of the hidden width is removed, in all layers",
        "vocab": "of the vocabulary, which a corpus did not use, is removed",
        "weight": "of the weights of the pruned layers are zero; their shapes are unchanged",
        "block": f"of the weights of the pruned layers are zero, in blocks of {spec.get('pattern')}; shapes are unchanged",
        "n:m": f"of the weights of the pruned layers are zero, {spec.get('pattern')}; their shapes are unchanged",
    }.get(spec.get("structure", ""))
    if spec.get("cut") == "mask" and what is not None:
        what = what.split(" are removed")[0] + " are zero; shapes are unchanged"
    if what is None or "achieved_sparsity" not in fact:
        return ""
    line = f"**Pruning**: {fact['achieved_sparsity']:.1%} {what}"
    if "criterion" in spec and spec.get("structure") != "vocab":
        line += f"; chosen by {spec['criterion']}"
    if fact.get("parameters_before", 0) > fact.get("parameters_after", 0) > 0:
        line += f". Parameters: {count(fact['parameters_before'])} before, {count(fact['parameters_after'])} after"
    return f"{line}."


def _quantization(fact: dict[str, Any]) -> str:
    spec = fact.get("spec", {})
    if "weight_bits" not in spec:
        return ""
    line = f"**Quantization**: {_weights(spec)}"
    if spec.get("activation_bits"):
        ranges = str(spec.get("range_estimator", "")).replace("_", " ")
        kind = "symmetric" if spec.get("activation_symmetric") else "affine"
        kind += ", power law" if spec.get("activation_mapping") == "power_law" else ""
        where = ", inside attention too" if spec.get("attention") else ""
        line += f", {spec['activation_bits']}-bit activations{where} ({kind}, per tensor{f', ranges: {ranges}' if ranges else ''})"
    own = len(spec.get("overrides") or {})
    if own:
        line += f"; {count(own)} {'setting' if own == 1 else 'settings'} for single modules"
    left_out = spec.get("exclude_modules")
    if left_out:
        names = [left_out] if isinstance(left_out, str) else list(left_out)
        line += f"; in floating point: {', '.join(map(code, names))}"
    return f"{line}."


def _weights(spec: dict[str, Any]) -> str:
    """The weights of a quantization spec, in words."""
    bits = spec["weight_bits"]
    if bits == 16:
        return f"{spec.get('storage_dtype', '16-bit')} weights"
    group = spec.get("group_size")
    scale = (
        "per tensor" if spec.get("per_channel") is False else f"per {group} inputs" if group else "per output channel"
    )
    kind = "affine" if spec.get("symmetric") is False else "symmetric"
    mapping = {"power_law": ", power law", "power_of_two": ", powers of two", "kmeans": ", k-means codebook"}
    text = f"{bits}-bit weights ({'ternary, ' if bits == 2 and kind == 'symmetric' else ''}{kind}"
    text += f"{mapping.get(str(spec.get('weight_mapping')), '')}, scales {scale})"
    others = {"embeddings": spec.get("embedding_bits"), "head": spec.get("head_bits")}
    wider = {name: max(8, bits) if width is None else width for name, width in others.items()}
    told = [f"{name} {width}-bit" for name, width in wider.items() if width != bits]
    return f"{text}{''.join(f', {part}' for part in told)}"


def _export(engine: Engine) -> str:
    if engine.parity is None:
        return ""
    parity = told(engine.parity)
    how = {
        "float": "in floating point",
        "dynamic": "with 8-bit weights; the ranges of activations are found while it runs",
        "int8": "with the quantization above",
    }.get(str(parity.get("kind")))
    opset = f", opset {parity['opset']}" if "opset" in parity else ""
    line = f"**Export** to ONNX{opset}{f', {how}' if how else ''}"
    if "fused_linears" in parity and "quantized_linears" in parity:
        line += (
            f". Of its {parity['quantized_linears']} quantized layers that are matrix products, ONNX Runtime ran "
            f"{parity['fused_linears']} on integers where it was exported"
        )
    return f"{line}."


def _parity(report: CompressionReport) -> Markdown | None:
    """How far the logits of every exported file are from the model's, as a table."""
    engines = [engine for engine in report.engines if engine.parity is not None]
    keys = [key for key in _PARITY if any((engine.parity or {}).get(key) is not None for engine in engines)]
    if "max_abs_diff" not in keys:
        return None

    def cell(engine: Engine, key: str) -> str:
        value = (engine.parity or {}).get(key)
        _, factor, form = _PARITY[key]
        return "" if value is None else form.format(factor * value)

    rows = [[engine.name, *(cell(engine, key) for key in keys)] for engine in engines]
    return Markdown(markdown_table(["File", *(_PARITY[key][0] for key in keys)], rows))


def _zeroed(report: CompressionReport) -> bool:
    spec = report.facts.get("pruning", {}).get("spec", {})
    return spec.get("structure") in ("weight", "n:m", "block") or spec.get("cut") == "mask"


def _usage(report: CompressionReport, repo_id: str | None) -> dict[str, Any]:
    """The names that the code in the card is made of."""
    head = re.search(r"For[A-Z]\w*$", report.architecture)
    known = head is not None and report.task is not None and re.fullmatch(r"[a-z0-9-]+", report.task)
    return {
        "source": Markdown(json.dumps(repo_id or ".")),  # Python takes it for the same text
        "comment": Markdown("" if repo_id else "  # the folder of this file"),
        "auto": f"AutoModel{head.group()}" if known and head else report.architecture,
        "ort": f"ORTModel{head.group()}" if known and head else "",
        "processor": report.processor or "",
        "shaped": "shapes" in report.facts,
        "task": Markdown(json.dumps(one_line(report.task))),
        "argument": _PIPELINE_ARGUMENT.get(report.processor or "", ""),
    }
