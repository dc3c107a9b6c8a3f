# SPDX-License-Identifier: Apache-2.0
"""Carries out a recipe: training with checkpoints, then the files, the report and the card, which appear at the end."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from shlex import quote
from typing import Any

import accelerate
import datasets
import torch
import transformers
from accelerate.state import AcceleratorState
from transformers import TrainerCallback

from .. import CompressionReport, export_onnx, push_to_hub
from ..export.record import read_export
from ..files import COMPRESSED, replacing, workspace
from ..recipes import Recipe, dump, load, read
from ..report import Candidate, DatasetInfo
from ..report.curves import settings_of
from ..report.data import row_name
from ..trainer.checkpoints import newest_complete
from ..version import __version__
from .checkpoint import load_model
from .compress_setup import Setup
from .data import CALIBRATION
from .interruption import Interruption
from .names import check_data, split_name

RECIPE, CHECKPOINTS = "recipe.yaml", "checkpoints"


class _KeepTheLast(TrainerCallback):
    """Saves a checkpoint of the last step where the recipe wants none, as files and report can fail; it goes once they are done."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_save |= state.global_step >= state.max_steps


def carry_out(setup: Setup, folder: Path, *callbacks: TrainerCallback) -> CompressionReport | None:
    """Trains the student and writes everything into `folder`. A run that was ended goes on from its last checkpoint.

    Args:
        setup ([`Setup`]): models and data.
        folder (`Path`): new, or that of an earlier run of the same recipe.
        callbacks (`TrainerCallback`): of the training, beside those of the recipe.

    Returns:
        [`CompressionReport`]: what was measured; `None` if nothing was to be, or in other processes than the first.

    Raises:
        FileExistsError: `folder` is finished, holds another run, or files that no run wrote.
        KeyboardInterrupt: the training was ended, and its checkpoint is there; or `SystemExit`, after a signal.
    """
    checkpoints, interruption = folder / CHECKPOINTS, Interruption()
    is_first = os.environ.get("RANK", "0") == "0"
    text = _text(setup.recipe, _digest(setup.train, setup.evaluation)) if is_first else ""
    with _begun(setup.recipe, text, folder) if is_first else contextlib.nullcontext(checkpoints) as made:
        trainer = setup.trainer(checkpoints, interruption, *callbacks)
        wants_none = trainer.args.save_strategy == "no"
        if wants_none:
            trainer.add_callback(_KeepTheLast())
        trainer.accelerator.wait_for_everyone()
        with interruption.watching():
            trainer.train(resume_from_checkpoint=newest_complete(str(checkpoints)))
        interruption.raise_if_over()
        trainer.save_model(str(made / "new" / "student"))  # of a sharded model every process has a part
        _leave_group(trainer)
        if not is_first:
            return None
        report = _write(setup, made / "new", text, trainer)
        COMPRESSED.mark(made / "new", __version__)
        COMPRESSED.check(folder, overwrite=True)
        COMPRESSED.swap_in(made / "new", folder, made / "old")
        if wants_none:
            shutil.rmtree(checkpoints / f"checkpoint-{trainer.state.global_step}", ignore_errors=True)
    send(setup.recipe, folder, report)
    return report


def send(recipe: Recipe, folder: Path, report: CompressionReport | None) -> None:
    """Pushes the file of a finished run to where its recipe says, if anywhere.

    Raises:
        RuntimeError: it was not sent; says why, and the command that sends it without another run.
    """
    if recipe.push is None:
        return
    settings = asdict(recipe.push)
    repo_id = settings.pop("repo_id")
    try:
        push_to_hub(folder / "onnx", repo_id, report=report, **settings)
    except (ValueError, RuntimeError, OSError) as error:
        told = "" if report is None else f" --report {quote(str(folder / 'report.json'))}"
        again = f"hfkdq push {quote(str(folder / 'onnx'))} {quote(repo_id)}{told}"
        raise RuntimeError(f"{str(error).rstrip('.')}. The run is finished; to send its file: {again}") from error


def check_folder(folder: Path, earlier: str = RECIPE) -> None:
    """Refuses a folder with files that no run wrote, and one whose run is finished; before anything is loaded. What an
    earlier run of the same kind left is called `earlier`.

    Raises:
        FileExistsError: saying which it is.
        NotADirectoryError: it is a file, or lies below one.
        PermissionError: it cannot be written to.
    """
    COMPRESSED.check(folder, overwrite=True)
    if COMPRESSED.is_finished(folder):
        raise FileExistsError(
            f"{folder} holds the result of a finished run. Name another folder with --output-dir, or remove this one."
        )
    if folder.is_dir() and any(folder.iterdir()) and not (folder / earlier).exists():
        raise FileExistsError(
            f"{folder} holds files and no {earlier} of an earlier run. Name another folder with --output-dir."
        )


@contextlib.contextmanager
def _begun(recipe: Recipe, text: str, folder: Path) -> Iterator[Path]:
    """A workspace beside the recipe of a run, which is written into its folder, or found there. A run that ends without a
    checkpoint leaves none behind, so that the next one may have other settings.

    Raises:
        FileExistsError: the run that was begun there has another recipe, or other rows.
    """
    path, checkpoints = folder / RECIPE, folder / CHECKPOINTS
    with workspace(folder / "result") as made:
        is_new = not path.exists()
        if is_new:
            folder.mkdir(parents=True, exist_ok=True)
            with replacing(path) as temporary:
                temporary.write_text(text, encoding="utf-8")
        else:
            _check_same(recipe, text, path)
        try:
            yield made
        except BaseException:
            if is_new:
                with contextlib.suppress(OSError):  # it holds checkpoints
                    checkpoints.rmdir()
                if not checkpoints.exists():
                    path.unlink(missing_ok=True)
            raise


def _check_same(recipe: Recipe, text: str, path: Path) -> None:
    then = read(load(path), str(path))
    changed = [name for name, value in vars(then).items() if value != getattr(recipe, name)]
    if changed:
        own = f"hfkdq compress {quote(str(path))} --output-dir {quote(str(path.parent))}"
        raise FileExistsError(
            f"{path.parent} holds a run with other settings in {', '.join(changed)}. Name another folder with --output-dir, or "
            f"go on with its own: {own}"
        )
    rows, others = (
        re.search(r"^# rows (\w+)$", said, re.MULTILINE) for said in (text, path.read_text(encoding="utf-8"))
    )
    if rows and others and rows[1] != others[1]:
        raise FileExistsError(
            f"The data that the run in {path.parent} began with have changed since. Name another folder with --output-dir, or "
            "bring the rows back that it was begun with."
        )


def _text(recipe: Recipe, rows: str) -> str:
    """The recipe, with what else a run that equals it bit for bit must have."""
    versions = {"torch": torch, "transformers": transformers, "accelerate": accelerate, "datasets": datasets}
    told = ", ".join(f"{name} {module.__version__}" for name, module in versions.items())
    header = f"hfkdq compress {RECIPE}\nhfkdq {__version__}, {told}, {torch.get_num_threads()} threads\nrows {rows}"
    return dump(recipe, header)


def _digest(*tables: datasets.Dataset) -> str:
    """What tells rows from others: the SHA-256 of their columns, as they are stored."""
    digest = hashlib.sha256()
    for table in tables:
        for rows in table.with_format("arrow").iter(1000):
            for name, column in zip(rows.column_names, rows.columns, strict=True):
                digest.update(f"{name} {column.type} ".encode())
                digest.update(repr(column.to_pylist()).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def _write(setup: Setup, new: Path, text: str, trainer: Any) -> CompressionReport | None:
    """The exported file, the report, its page, its plot and the card, beside the student."""
    recipe = setup.recipe
    (new / "student" / RECIPE).write_text(text, encoding="utf-8")
    (new / "student" / "training_args.bin").unlink(missing_ok=True)  # a pickle, which nothing here reads
    student, quantization = load_model(str(new / "student"), None, calibrated=True)
    onnx, own = None, setup
    if setup.loses_tokens:
        own = setup.without_tokens(student)
        for part in (student, own.processor):
            part.save_pretrained(new / "smaller")
        for file in (new / "student").glob("*.safetensors*"):  # which the student may still be read from
            file.unlink()
        for file in (new / "smaller").iterdir():
            file.replace(new / "student" / file.name)
        (new / "smaller").rmdir()
    if recipe.export is not None:
        settings = {**asdict(recipe.export)}
        precision = settings.pop("quantization")
        data = recipe.data.calibration or recipe.data.train
        calibration = own.reader.batches(data, CALIBRATION, recipe.data.calibration_samples)
        evaluated = settings["max_drop"] is not None or settings["metric"] is not None or precision == "auto"
        labelled = {"eval_dataset": own.evaluation, "data_collator": own.collate} if evaluated else {}
        onnx = export_onnx(
            student, new / "onnx", quantization=precision or quantization, processing_class=own.processor,
            calibration=calibration, **labelled, **settings,
        )  # fmt: skip
    return _measured(setup, own, student, onnx, new, trainer)


def _measured(
    setup: Setup, own: Setup, student: Any, onnx: Path | None, new: Path, trainer: Any
) -> CompressionReport | None:
    """The report, whose student has the examples of `own`."""
    section = setup.recipe.report
    if section is None or onnx is None:
        return None
    told = asdict(section)
    told |= {"dataset": _dataset(setup.recipe, told["dataset"]), "log_history": trainer.state.log_history}
    teacher = setup.teacher or setup.original
    if own is setup:
        report = CompressionReport.measure(
            student=student, teacher=teacher, onnx=onnx, eval_dataset=setup.evaluation, data_collator=setup.collate,
            processing_class=setup.processor, training_args=trainer.args, **told,
        )  # fmt: skip
    else:
        facts = {name: told.pop(name) for name in ("license", "language", "base_model")}
        rows: list[tuple[str, Any, Setup, Path | None]]
        rows = [("teacher", teacher, setup, None), ("student", student, own, None)]
        rows.append((row_name(read_export(onnx)), student, own, onnx))
        report = CompressionReport.compare(
            [
                Candidate(
                    name=name, model=model, path=path, eval_dataset=of.evaluation, data_collator=of.collate,
                    processing_class=of.processor,
                ) for name, model, of, path in rows
            ], **told,
        )  # fmt: skip
        facts |= {"base_model": facts["base_model"] or report.base_model}
        report = replace(report, training=settings_of(trainer.args, trainer.state.log_history), **facts)
    report.save_all(new, None if setup.recipe.push is None else setup.recipe.push.repo_id)
    return report


def _dataset(recipe: Recipe, named: str | None) -> DatasetInfo:
    """The data of evaluation for the card; of a file or folder its last name alone."""
    path, config, split = split_name(recipe.data.eval or recipe.data.train)
    is_local = check_data(path) is not None
    name = named or (Path(path).expanduser().resolve().stem if is_local else path)
    return DatasetInfo(
        name=name, id=None if is_local else path, config=config, split=split if recipe.data.eval is not None else None
    )


def _leave_group(trainer: Any) -> None:
    """Ends what joins several processes, so that the first can go on alone and the others can leave."""
    if trainer.args.world_size == 1:
        return
    trainer.accelerator.wait_for_everyone()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    AcceleratorState._reset_state(reset_partial_state=True)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)
