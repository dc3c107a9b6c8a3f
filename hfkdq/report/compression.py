# SPDX-License-Identifier: Apache-2.0
"""`CompressionReport`: the measured facts as data, in memory and as JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import EvalPrediction, PreTrainedModel, TrainingArguments
from transformers.utils import logging

from ..files import replacing
from ..measuring.latency import Latency
from ..schema import build, read_file, read_json
from .card import render_card
from .curves import curves_of, settings_of
from .data import DatasetInfo, Engine, Layer, Mistake, ReportData, Sample, check_renderable
from .environment import hide_secrets
from .files import check_beside, check_engine, fields_of_export
from .plots import PLOT, draw_plot
from .table import render_markdown, render_table

if TYPE_CHECKING:
    from datasets import Dataset
    from rich.table import Table

    from .measure import Candidate

__all__ = ["CompressionReport", "DatasetInfo", "Engine", "Latency", "Layer", "Mistake", "Sample"]

logger = logging.get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class CompressionReport(ReportData):
    """Measured facts about a compressed model; [`~CompressionReport.measure`] makes one.

    Args:
        engines (`tuple` of [`Engine`]): the rows, the reference of all ratios first.
        architecture (`str`): class of the student, such as `"BertForSequenceClassification"`.
        samples (`int`): number of examples that the metrics were measured on.
        task (`str`, *optional*): pipeline tag of the Hub, such as `"text-classification"`.
        processor (`str`, *optional*): the Auto class that loads the tokenizer or processor.
        facts (`dict`): what was done to the student, from its `config.hfkdq`.
        timing (`dict`): how latency was measured: `device`, `threads`, `rounds`, `inputs` (name to shape).
        environment (`dict[str, str]`): processor, platform and versions.
        dataset ([`DatasetInfo`], *optional*): what the metrics were measured on.
        base_model (`str`, *optional*): Hub id of the model that the student comes from.
        license (`str`, *optional*): license of the student, in the Hub's spelling.
        language (`str` or `list[str]`, *optional*): language of the data, as an ISO 639 code.
        curves (`dict[str, list[list[float]]]`): step and value of every loss term and metric of the training.
        mistakes (`tuple` of [`Mistake`]): rows that the first engine gets right and the last one wrong.
        training (`dict`): the settings of the training, by their names in words.
        sample ([`Sample`], *optional*): what the sample call of the card printed on the last file.
    """

    @classmethod
    def measure(
        cls,
        *,
        student: PreTrainedModel,
        onnx: str | Path | Mapping[str, str | Path],
        eval_dataset: Dataset,
        compute_metrics: Callable[[EvalPrediction], Mapping[str, Any]] | None = None,
        preprocess_logits_for_metrics: Callable[[Any, Any], Any] | None = None,
        concat_batches: bool = True,
        teacher: PreTrainedModel | None = None,
        processing_class: Any = None,
        data_collator: Callable[[list[Any]], Any] | None = None,
        batch_size: int = 32,
        latency_rounds: int = 3,
        threads: int | None = None,
        dataset: DatasetInfo | None = None,
        base_model: str | None = None,
        license: str | None = None,
        language: str | list[str] | None = None,
        resamples: int | None = None,
        examples: int = 12,
        log_history: Iterable[Mapping[str, Any]] = (),
        training_args: TrainingArguments | None = None,
        rows: Dataset | None = None,
    ) -> CompressionReport:
        """Measures teacher, student and ONNX files on the same examples.

        All metrics come from `Trainer.predict` with the same collator and the same `compute_metrics`; for an ONNX file
        the Trainer runs it in ONNX Runtime, and for one of OpenVINO in OpenVINO, in place of the student. A student that carries fake quantizers is measured
        with them; its latency is that of its checkpoint, in floating point. Latency is that of the first example
        alone, on the CPU.

        Args:
            student ([`PreTrainedModel`]): the compressed model.
            onnx (`str`, `Path` or mapping of row names to them): folders that `export_onnx` wrote. The last one is
                the file that the model card is about.
            eval_dataset (`datasets.Dataset`): examples with labels, ready for the collator. A teacher with a tokenizer of its own
                reads the columns that begin with `teacher_`, which a [`TeacherCollator`] makes batches of. Columns that the model does
                not take are left out, unless the data set has a transform of its own (`with_transform`).
            compute_metrics (`Callable`, *optional*): as for `Trainer`. By default the usual metrics of the student's task
                ([`metrics_for`]). Values that are not numbers are left out.
            preprocess_logits_for_metrics (`Callable`, *optional*): as for `Trainer`: from the logits and labels of a batch
                to what is kept for `compute_metrics`, such as the likeliest tokens.
            teacher ([`PreTrainedModel`], *optional*): the model that the ratios refer to; the student without one.
            processing_class (*optional*): tokenizer or processor, as for `Trainer`.
            data_collator (`Callable`, *optional*): as for `Trainer`, with the same default.
            batch_size (`int`, defaults to 32): examples in a batch for the metrics.
            concat_batches (`bool`, defaults to `True`): whether `compute_metrics` gets one array of all batches, or a list
                with what each gave, as `TrainingArguments(eval_do_concat_batches=False)` hands over for detectors.
            latency_rounds (`int`, defaults to 3): how often each engine has its turn of about half a second; 0 leaves
                latency out.
            threads (`int`, *optional*): threads of each engine while it is timed. As many as PyTorch uses by default.
            dataset ([`DatasetInfo`], *optional*): what `eval_dataset` is.
            base_model (`str`, *optional*): Hub id of the model that the student comes from. Taken from the student's
                configuration by default, if that names one.
            license (`str`, *optional*): license of the student, such as `"apache-2.0"`.
            language (`str` or `list[str]`, *optional*): language of the data, such as `"en"`.
            resamples (`int`, *optional*): how often rows are drawn anew for the 95 % intervals of the metrics and of their drops; 0
                for those of shares of rows alone, which need no draws. By default 1,000 with the metrics of hfkdq, and 0 with a
                `compute_metrics` of your own, which is then called once for each row of the table.
            examples (`int`, defaults to 12): how many rows to show at most that the first engine gets right and the last one
                wrong. They are part of the report and of its page; [`push_to_hub`] leaves them out.
            log_history (`Iterable[Mapping]`, *optional*): `trainer.state.log_history`, for the curves of the training.
            training_args (`TrainingArguments`, *optional*): `trainer.args`, for the settings of the training.
            rows (`datasets.Dataset`, *optional*): the examples as people read them, for what is shown of them; by default those of
                `eval_dataset` without their transform.

        Returns:
            [`CompressionReport`]: the report.

        Raises:
            ValueError: a folder without `model.onnx` or `openvino_model.xml`, an empty or unlabelled data set, a metric that is not finite.
            TypeError: an argument of the wrong type.
            RuntimeError: a process that timed an engine died, or this is one of several distributed processes.
        """
        from .measure import hub_id, measure

        if dataset is not None and not isinstance(dataset, DatasetInfo):
            raise TypeError(f"dataset must be a DatasetInfo, got {dataset!r}. For a dict: DatasetInfo(**dataset).")
        measured = measure(
            {name: model for name, model in (("teacher", teacher), ("student", student)) if model is not None}, onnx,
            eval_dataset, compute_metrics, processing_class, data_collator, batch_size, latency_rounds, threads,
            preprocess_logits_for_metrics, concat_batches, resamples, examples, rows,
        )  # fmt: skip
        report = cls(
            **measured, dataset=dataset, base_model=base_model or hub_id(student), license=license, language=language,
            curves=curves_of(log_history := [*log_history]),
            training={} if training_args is None else settings_of(training_args, log_history),
        )  # fmt: skip
        return _warned(report)

    @classmethod
    def compare(
        cls,
        candidates: Sequence[Candidate],
        *,
        compute_metrics: Callable[[EvalPrediction], Mapping[str, Any]] | None = None,
        batch_size: int = 32,
        latency_rounds: int = 6,
        threads: int | None = None,
        resamples: int | None = None,
        examples: int = 12,
        rows: Dataset | None = None,
        log_history: Iterable[Mapping[str, Any]] = (),
        dataset: DatasetInfo | None = None,
    ) -> CompressionReport:
        """Measures models and ONNX files of any origin on the same rows; the first one is what all ratios and drops refer to.

        Args:
            candidates (`Sequence` of [`Candidate`]): what to measure, the reference first, what the report is about last.
            compute_metrics (`Callable`, *optional*): as for `Trainer`. By default the usual metrics of each one's task
                ([`metrics_for`]).
            batch_size (`int`, defaults to 32): examples in a batch for the metrics.
            latency_rounds (`int`, defaults to 6): turns of half a second of each; 0 leaves latency out. Six hold the ratio in 97 of
                100 measurements.
            threads (`int`, *optional*): threads of each while it is timed. As many as PyTorch uses by default.
            resamples (`int`, *optional*): as for [`~CompressionReport.measure`].
            examples (`int`, defaults to 12): as for [`~CompressionReport.measure`].
            rows (`datasets.Dataset`, *optional*): the examples as people read them, for what is shown of mistakes; by default the
                rows of the first candidate without their transform.
            log_history (`Iterable[Mapping]`, *optional*): as for [`~CompressionReport.measure`].
            dataset ([`DatasetInfo`], *optional*): what was measured on.

        Returns:
            [`CompressionReport`]: the report, with a row for each candidate.

        Raises:
            ValueError: no candidates, two of one name, files that changed since their export, rows without labels.
            FileNotFoundError: there is no such file.
            RuntimeError: a process that timed one died.
        """
        from .measure import compare, hub_id

        measured = compare(candidates, compute_metrics, batch_size, latency_rounds, threads, resamples, examples, rows)
        model = candidates[-1].model
        return _warned(cls(**measured, dataset=dataset, base_model=hub_id(model), curves=curves_of(log_history)))

    @classmethod
    def from_export(cls, folder: str | Path) -> CompressionReport:
        """The report of what `export_onnx` recorded in its folder; nothing is measured, and what is not recorded is left out.

        Raises:
            OSError: there is no such record.
            ValueError: it is damaged or of an early release; one line names it and says why.
        """
        return cls(**fields_of_export(Path(folder)))

    def to_json(self) -> str:
        """The report as JSON; `from_json` gives the equal report back."""
        return json.dumps(hide_secrets(asdict(self)), indent=2, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> CompressionReport:
        """The report that `to_json` wrote.

        Raises:
            ValueError: text that is no such report.
        """
        try:
            return _checked(read_json(text))
        except ValueError as error:
            raise ValueError(f"This JSON is no compression report: {_sentence(error)} `to_json` writes one.") from None

    def save(self, path: str | Path) -> Path:
        """Writes the report as JSON; whoever reads `path` sees the old file or the whole new one."""
        return _write(path, self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> CompressionReport:
        """The report that `save` wrote.

        Raises:
            OSError: there is no such file.
            ValueError: it is no such report; one line names it and says why.
        """
        try:
            return _checked(read_file(path))
        except ValueError as error:
            raise ValueError(f"{path} is no compression report: {_sentence(error)} `save` writes one.") from None

    def table(self) -> Table:
        """The rows as a table for the terminal: `rich.print(report.table())`."""
        return render_table(self)

    def to_markdown(self) -> str:
        """The rows as a table in Markdown."""
        return render_markdown(self)

    def to_card(self, repo_id: str | None = None, folder: str | Path | None = None, plot: str | None = None) -> str:
        """The model card, a complete `README.md` with its metadata; a fact that is missing leaves no line.

        Args:
            repo_id (`str`, *optional*): Hub id that the model will have, for the code that loads it.
            folder (`str` or `Path`, *optional*): where the card goes; its files must be those of the last row of a file.
            plot (`str`, *optional*): name of the picture of [`save_plot`] that lies beside the card, to be shown in it.

        Returns:
            `str`: Markdown that starts with a YAML block which `huggingface_hub.ModelCard` reads. Text from a
            checkpoint or a data set stands in it as text, whatever it holds.

        Raises:
            ValueError: `folder` has other files, `repo_id` is none, or a field is not what code can be written with.
        """
        if folder is not None:
            check_engine(self, Path(folder))
        return render_card(self, repo_id, plot)

    def to_html(self) -> str:
        """The report as one HTML page, which needs no network, no script and no other file: table, charts of quality, size and
        latency, mistakes, curves, bits and zeros, parity, recipe, environment. What came from data stands in it as text.

        Raises:
            ImportError: matplotlib is not installed.
        """
        from .page import render_page

        return render_page(CompressionReport.from_json(self.to_json()))  # without secrets

    def save_html(self, path: str | Path) -> Path:
        """Writes [`~CompressionReport.to_html`] to a file.

        Raises:
            ImportError: matplotlib is not installed.
        """
        return _write(path, self.to_html())

    def save_plot(self, path: str | Path) -> Path:
        """Draws metric, size and latency of every row into a PNG file.

        Raises:
            ImportError: matplotlib is not installed.
        """
        with replacing(Path(path)) as temporary:
            draw_plot(self, temporary)
        return Path(path)

    def save_all(self, folder: str | Path, repo_id: str | None = None) -> Path:
        """Writes `report.json`, the page `report.html`, the plot `report.png` and the card `README.md`, which shows it.

        Args:
            folder (`str` or `Path`): where to; it is there. Where the files that were measured lie in it, or in a folder of it, the code
                of the card loads them from there, unless there is a `repo_id`.
            repo_id (`str`, *optional*): as of [`~CompressionReport.to_card`].

        Raises:
            ImportError: matplotlib is not installed.
            ValueError: as of [`~CompressionReport.to_card`], or other files of the same names lie there.
        """
        folder = Path(folder)
        card = render_card(self, repo_id, PLOT, check_beside(self, folder / "report.json"))
        self.save_html(folder / "report.html")
        self.save_plot(folder / PLOT)
        _write(folder / "README.md", card)
        self.save(folder / "report.json")
        return folder


def _warned(report: CompressionReport) -> CompressionReport:
    if report.is_noisy:
        logger.warning("Latencies are rough: a median is more than twice the fastest call. Is the machine busy?")
    return report


def _checked(data: dict[str, Any]) -> CompressionReport:
    """The report in JSON whose fields have the right types and possible values."""
    if "engines" not in data:
        raise ValueError("it has no list `engines`")
    report = build(CompressionReport, data, "CompressionReport")
    if not report.engines:
        raise ValueError("it has no list `engines` with something in it")
    check_renderable(report)
    return report


def _sentence(error: ValueError) -> str:
    text = str(error)
    return text if text.endswith((".", "?")) else f"{text}."


def _write(path: str | Path, text: str) -> Path:
    with replacing(Path(path)) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return Path(path)
