# SPDX-License-Identifier: Apache-2.0
"""Searches layers, widths, vocabulary, bits and runtime for a model that meets goals, with Optuna: every trial is a recipe that is carried out."""

from __future__ import annotations

import contextlib
import copy
import math
import shutil
import statistics
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from transformers import TrainerCallback

from .. import CompressionReport, PruningSpec, prune
from ..export.backends import load_backend
from ..export.checks import check_openvino, resolve_task
from ..export.choices import ONNXRUNTIME, OPENVINO
from ..files import COMPRESSED, replacing, workspace
from ..metrics.tasks import LOWER_IS_BETTER
from ..recipes import Recipe
from ..recipes.defaults import layer_counts
from ..recipes.goals import Goals, Outcome
from ..report.table import megabytes
from ..schema import brief
from ..version import __version__
from .compress_run import RECIPE, carry_out, check_folder, send
from .compress_setup import Setup, set_up

SEARCH = "search"
_STUDY = "hfkdq compress"
_BITS = {"8 bits": (8, "8"), "4-bit weights": (4, "null")}  # codes of 4 bits are stored as such beside floats alone
_SPARSITIES = (0.25, 0.5, 0.75)
_VOCAB = "vocab"
_LEFT, _LARGE, _PLACE = "parameters that are left", "too large to be trained", "folder"
# Four looks at every training: the pruner ends those that are behind at one of them.
_WATCHED = ("training.eval_strategy=steps", "training.eval_steps=0.25", "training.save_strategy=no")


def search(
    recipe: Recipe, changes: list[str], goals: Goals, folder: Path, trials: int, storage: str | None, source: str
) -> CompressionReport:
    """Tries recipes until there were `trials` of them, and puts the best that meets all goals into `folder`.

    Args:
        recipe ([`Recipe`]): a model and its data.
        changes (list of `str`): `key=value` for all recipes.
        goals ([`Goals`]): what is to be met.
        folder (`Path`): where to write; trials and study are in `search/` below it.
        trials (`int`): that are trained, in all processes that share the study.
        storage (`str`, *optional*): Optuna's URL of it; a file of SQLite in `search/` by default.
        source (`str`): what errors call the recipes.

    Returns:
        [`CompressionReport`]: that of the best.

    Raises:
        ImportError: Optuna is missing.
        RuntimeError: no trial meets all goals; says which bound is missed, and by how much.
    """
    optuna = _optuna()
    first = set_up(recipe, changes, source)  # what no trial could do is refused before there is a study
    layers = {
        name: most for name, most in layer_counts(first.original).items()
        if not _is_said(changes, f"student.{name}", f"student.{name.removeprefix('num_')}")
    }  # fmt: skip
    structures = [] if _is_said(changes, "pruning") else _structures(first)
    bits = [*_BITS][:1] if first.recipe.export is None or first.recipe.export.integer_convolutions else [*_BITS]
    bits = [] if _is_said(changes, "quantization.weight_bits", "quantization.activation_bits") else bits
    runtimes = [] if goals.max_latency is None else _runtimes(first, changes)
    if goals.max_size is not None:
        least = 0.0
        with contextlib.suppress(ValueError, RuntimeError):  # a trial would tell
            smallest = _choose(_Smallest(), layers, structures, runtimes, bits)
            _, least = _least_size(set_up(recipe, [*smallest, *changes, "push=null"], source))
        if least > goals.max_size:
            raise RuntimeError(
                f"No trial came to its end, nor could one: the weights alone of the smallest model of this search are "
                f"{megabytes(math.ceil(least))} MB, and --max-size is {megabytes(math.ceil(goals.max_size))} MB."
            )
    if storage is None:
        (folder / SEARCH).mkdir(parents=True, exist_ok=True)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = _study(optuna, storage or f"sqlite:///{folder / SEARCH / 'study.db'}")
    study.sampler = optuna.samplers.TPESampler(seed=len(study.trials), constant_liar=True)
    of = {"model": recipe.model, "train": recipe.data.train, "eval": recipe.data.eval, "changes": changes}
    _check_same(study, {**of, "--max-latency": goals.max_latency is not None}, storage)

    def attempt(trial: Any) -> float:
        chosen = _choose(trial, layers, structures, runtimes, bits)
        try:
            return _carried_out(
                optuna, trial, recipe, [*_WATCHED, *chosen, *changes, "push=null"], goals, folder, source
            )
        except (ValueError, RuntimeError) as error:
            trial.set_user_attr("error", brief(error))
            raise

    def show(study: Any, trial: Any) -> None:
        if found := outcomes_of(study):
            Console().print(frontier(found, study, goals))

    def end(study: Any, _: Any) -> None:
        if are_enough(study, trials):
            study.stop()

    if not are_enough(study, trials):
        study.optimize(attempt, callbacks=[show, end], catch=(ValueError, RuntimeError))
    found = outcomes_of(study)
    best = goals.best(found)
    if best is None:
        raise RuntimeError(f"{goals.explain(found)} All trials are in {folder / SEARCH}.{_reason(study)}")
    place = study.trials[best].user_attrs.get(_PLACE, folder / SEARCH / f"trial-{best}")  # studies of before have none
    report = _put_in_place(folder, Path(place))
    send(recipe, folder, report)  # of all trials the best alone
    return report


def _study(optuna: Any, storage: str) -> Any:
    try:
        return optuna.create_study(
            study_name=_STUDY, storage=storage, direction="maximize", pruner=Halving(), load_if_exists=True
        )
    except Exception as error:  # of a database anything
        raise ValueError(
            f"The study cannot be kept in {storage.rpartition('@')[2]}: {brief(error)}. Name another --storage, a URL such as sqlite:///study.db."
        ) from None


def are_enough(study: Any, trials: int) -> bool:
    """Whether a study has its trials. One that is too large to be trained takes a second and counts a tenth, and one that
    was interrupted, which Optuna takes for a failed one, is still missing."""
    told = {"error", "outcome"}  # which a failed one has, such as one without a number for its metric
    ended = [
        t for t in study.trials if t.state.is_finished() and (t.state.name != "FAIL" or told & t.user_attrs.keys())
    ]
    finished = [_LARGE in trial.user_attrs for trial in ended]
    return 10 * finished.count(False) + finished.count(True) >= 10 * trials


def outcomes_of(study: Any) -> dict[int, Outcome]:
    """What came of every trial that was carried out to its end, by its number."""
    return {t.number: Outcome(**t.user_attrs["outcome"]) for t in study.trials if "outcome" in t.user_attrs}


class Halving:
    """Ends a training that is in the worse half of those that came as far, of models that are no larger: a small one is behind
    most large ones, and may be the only one that meets a bound."""

    def prune(self, study: Any, trial: Any) -> bool:
        """Whether to end a trial at its last look."""
        look, size = trial.last_step, trial.user_attrs.get(_LEFT, 0)
        others = [
            other.intermediate_values[look]
            for other in study.get_trials(deepcopy=False)
            if other.number != trial.number and look in other.intermediate_values
            if other.user_attrs.get(_LEFT, 0) <= size
        ]
        return bool(others) and not trial.intermediate_values[look] >= statistics.median(others)


class Watch(TrainerCallback):
    """Tells a trial how far a training is, and ends the training where others were further."""

    def __init__(self, trial: Any, metric: str, pruned: type[Exception]) -> None:
        self._trial, self._metric, self._pruned, self._looks = trial, metric, pruned, 0

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        name = f"eval_{self._metric}"
        value = (metrics or {}).get(name, (metrics or {}).get("eval_loss"))
        if value is None:
            return
        self._looks += 1
        falls = name not in metrics or self._metric in LOWER_IS_BETTER
        self._trial.report(-value if falls else value, self._looks)
        if self._trial.should_prune():
            raise self._pruned


def _is_said(changes: list[str], *keys: str) -> bool:
    """Whether changes give one of the keys a value, or a key above or below it."""
    names = [f"{text.partition('=')[0]}." for text in changes]
    return any(name.startswith(f"{key}.") or f"{key}.".startswith(name) for name in names for key in keys)


def _choose(
    trial: Any, layers: dict[str, int], structures: list[str], runtimes: list[str], bits: Sequence[str] = tuple(_BITS)
) -> list[str]:
    """The changes of a trial: layers, what is pruned and the share of it, bits, and the runtime; of each where there are several."""
    changes = [f"student.{name}={trial.suggest_int(name, 1, most)}" for name, most in layers.items()]
    if structures:
        beside = [f"{name} and {_VOCAB}" for name in structures if name != _VOCAB and _VOCAB in structures]
        width, _, tokens = trial.suggest_categorical("pruning", ["none", *structures, *beside]).partition(" and ")
        pruned = [f"{{structure: {_VOCAB}}}"] if _VOCAB in (width, tokens) else []
        if width not in ("none", _VOCAB):
            share = trial.suggest_categorical("sparsity", _SPARSITIES)
            pruned.insert(0, f"{{structure: {width}, sparsity: {share}}}")
        if pruned:
            changes.append(f"pruning={pruned[0] if len(pruned) == 1 else '[' + ', '.join(pruned) + ']'}")
    if bits:
        weights, activations = _BITS[trial.suggest_categorical("bits", bits)]
        changes.append(f"quantization={{weight_bits: {weights}, activation_bits: {activations}}}")
    if runtimes:
        changes.append(f"export.target={trial.suggest_categorical('runtime', runtimes)}")
    return changes


def _runtimes(setup: Setup, changes: list[str]) -> list[str]:
    """The runtimes to choose from: none where one is given, or OpenVINO is not installed or does not run such models."""
    if find_spec("openvino") is None or _is_said(changes, "export.target"):
        return []
    try:
        check_openvino(
            setup.student, resolve_task(load_backend(), setup.student, getattr(setup.recipe.export, "task", None))
        )
    except ValueError:
        return []
    return [ONNXRUNTIME, OPENVINO]


def _structures(setup: Setup) -> list[str]:
    """The widths that the model can lose, and tokens: what a copy lost."""
    found = []
    for structure in ("neuron", "head", "hidden", _VOCAB):
        model = copy.deepcopy(setup.original)
        try:
            if structure == _VOCAB:
                if not setup.metrics.generates and model.get_output_embeddings() is not None:
                    continue  # of fewer tokens the right one is likelier, which says nothing
                setup.prune_tokens_(model)
            else:
                prune(model, PruningSpec(structure=structure, sparsity=_SPARSITIES[-1]))
            found.append(structure)
        except (ValueError, TypeError, RuntimeError):
            continue
    return found


def _carried_out(
    optuna: Any, trial: Any, recipe: Recipe, changes: list[str], goals: Goals, folder: Path, source: str
) -> float:
    place = folder / SEARCH / f"trial-{trial.number}"
    if goals.max_latency is None:
        changes = ["report.latency_rounds=0", *changes]
    setup = set_up(recipe, changes, source)
    _refuse_too_large(optuna, trial, setup, goals)
    check_folder(place)  # what goes at the end is this trial's own
    metric = setup.metrics.metric
    try:
        report = carry_out(setup, place, Watch(trial, metric, optuna.TrialPruned))
        assert report is not None  # noqa: S101  (recipes that are chosen have a report, and there is one process)
    finally:
        shutil.rmtree(place / "checkpoints", ignore_errors=True)
        if not COMPRESSED.is_finished(place):
            shutil.rmtree(place, ignore_errors=True)
    outcome = outcome_of(report, metric)
    trial.set_user_attr("outcome", vars(outcome))
    trial.set_user_attr(_PLACE, str(place.resolve()))
    return goals.score(outcome)


def outcome_of(report: CompressionReport, metric: str) -> Outcome:
    """What a report says of its file, held against its first row."""
    model, file = report.engines[0], report.engines[-1]
    kept, before = file.metrics[metric], model.metrics[metric]
    if metric in LOWER_IS_BETTER:
        kept, before = before, kept
    return Outcome(
        kept=kept / before if before > 0 else float(kept >= before), size=file.size,
        latency=None if file.latency is None else file.latency.median_ms,
    )  # fmt: skip


class _Smallest:
    """Chooses, in the place of a trial, what makes a model smallest: the options are in the order of their sizes."""

    def suggest_int(self, name: str, least: int, most: int) -> int:
        return least

    def suggest_categorical(self, name: str, options: Sequence[Any]) -> Any:
        return options[-1]


def _least_size(setup: Setup) -> tuple[float, float]:
    """The parameters that are left of a student, and the bytes that its weights have at least."""
    bits = setup.parts.quantization[0].weight_bits if setup.parts.quantization else 32
    share = math.prod(1.0 - (spec.sparsity or 0.0) for spec, _ in setup.parts.pruning if spec.structure != _VOCAB)
    numbers = sum(p.numel() for p in setup.student.parameters())
    if setup.loses_tokens:
        table: Any = setup.student.get_input_embeddings()
        numbers -= table.weight.numel()
    least = numbers * bits / 8 * share**2  # of hidden width both axes go
    return numbers * share, least


def _refuse_too_large(optuna: Any, trial: Any, setup: Setup, goals: Goals) -> None:
    """Ends a trial whose weights alone are larger than the bound, before anything is trained."""
    left, least = _least_size(setup)
    trial.set_user_attr(_LEFT, left)
    if goals.max_size is not None and least > goals.max_size:
        trial.set_user_attr(_LARGE, True)
        raise optuna.TrialPruned(f"at least {megabytes(int(least))} MB")


def settings_of(trial: Any) -> str:
    """What was chosen for a trial, in one line."""
    return ", ".join(str(value) if name == "bits" else f"{name} {value}" for name, value in trial.params.items())


def frontier(found: dict[int, Outcome], study: Any, goals: Goals) -> Table:
    """The trials that none beats in all of quality, size and time."""
    large = sum(_LARGE in trial.user_attrs for trial in study.trials)
    more = f"; {large} more too large to be trained" if large else ""
    table = Table(title=f"{len(study.trials) - large} trials, the best of them{more}", box=None)
    for name in ("trial", "settings", "kept", "MB", "ms", "bounds"):
        table.add_column(name, justify="left" if name in ("settings", "bounds") else "right")
    trials = {trial.number: trial for trial in study.trials}
    for number, outcome in sorted(found.items(), key=lambda item: -item[1].kept):
        if any(outcome.is_beaten_by(other) for other in found.values()):
            continue
        latency = "-" if outcome.latency is None else f"{outcome.latency:.3g}"
        verdict = ", ".join(f"{name} by {share:.0%}" for name, share in goals.missed(outcome).items())
        table.add_row(
            str(number), settings_of(trials[number]), f"{outcome.kept:.4f}", megabytes(int(outcome.size)), latency,
            f"misses {verdict}" if verdict else "met",
        )  # fmt: skip
    return table


def _put_in_place(folder: Path, place: Path) -> CompressionReport:
    """Copies what the best trial wrote, which may be one of another process, into the folder of the search."""
    if not COMPRESSED.is_finished(place):
        raise FileNotFoundError(
            f"What the best trial wrote is not in {place} on this machine. Bring it there, or start the command where it is."
        )
    with workspace(folder / "result") as made:
        new = made / "new"
        new.mkdir()
        for name in COMPRESSED.names:
            if (place / name).is_dir():
                shutil.copytree(place / name, new / name)
            elif (place / name).is_file():
                shutil.copyfile(place / name, new / name)
        COMPRESSED.mark(new, __version__)
        COMPRESSED.check(folder, overwrite=True)
        COMPRESSED.swap_in(new, folder, made / "old")
    with replacing(folder / RECIPE) as temporary:
        shutil.copyfile(place / RECIPE, temporary)
    return CompressionReport.load(folder / "report.json")


def _check_same(study: Any, now: dict[str, Any], storage: str | None) -> None:
    """Refuses a study that was begun for another model, other data or other changes, or whose files were not timed."""
    then = study.user_attrs.get("of")
    if then is None:
        study.set_user_attr("of", now)
    elif then != now:
        changed = ", ".join(name for name in now if then.get(name) != now[name])
        place = "folder with --output-dir" if storage is None else "--storage"
        raise ValueError(f"The study that is there has another {changed}. Name another {place}.")


def _reason(study: Any) -> str:
    """How many trials failed, and why the last of them did."""
    errors = [trial.user_attrs["error"] for trial in study.trials if "error" in trial.user_attrs]
    return f" {len(errors)} failed, the last with: {errors[-1]}" if errors else ""


def _optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise ImportError('Goals are searched with Optuna: pip install "hfkdq[search]".') from error
    return optuna
