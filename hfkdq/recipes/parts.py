# SPDX-License-Identifier: Apache-2.0
"""The objects of Python that the sections of a recipe are written for: objectives, schedules, callbacks, arguments.

A class and its arguments are written as its name, or as `Name: {argument: value}`."""

from __future__ import annotations

import collections.abc
import inspect
import math
import types
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields
from functools import cache
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

from transformers import Seq2SeqTrainingArguments, TrainingArguments

from .. import losses, objectives, schedules
from ..losses import Divergence
from ..objectives import ByAgreement, ByGradientNorm, Objective
from ..pruning import PruningCallback
from ..quantization import QATCallback
from ..schema import brief, check, check_depth
from ..specs import PruningSpec, QuantizationSpec
from .reading import refuse_unknown
from .recipe import Recipe

OBJECTIVES = {
    name: getattr(objectives, name)
    for name in objectives.__all__
    if inspect.isclass(getattr(objectives, name)) and issubclass(getattr(objectives, name), Objective)
    if name != "Objective"
}
DIVERGENCES = {
    name: getattr(losses, name)
    for name in losses.__all__
    if inspect.isclass(getattr(losses, name))
    and issubclass(getattr(losses, name), Divergence)
    and name != "Divergence"
}
SCHEDULES = {
    kind.__name__: kind
    for kind in (
        schedules.Linear, schedules.Cosine, schedules.Cubic, schedules.Exponential, schedules.Step, schedules.Piecewise,
        ByAgreement, ByGradientNorm,
    )
}  # fmt: skip
LAYER_SCHEDULES = {kind.__name__: kind for kind in (schedules.BottomUp, schedules.TopDown)}
# What the command itself decides, and where it is said instead.
OWNED = {
    "output_dir": "--output-dir", "overwrite_output_dir": "--output-dir", "resume_from_checkpoint": "the same command again",
    "push_to_hub": "the section push", "hub_model_id": "push.repo_id", "hub_strategy": "the section push",
    "hub_token": "`hf auth login`", "hub_private_repo": "push.private", "hub_revision": "push.revision",
    "hub_always_push": "the section push", "push_to_hub_model_id": "push.repo_id", "push_to_hub_token": "`hf auth login`",
    "push_to_hub_organization": "push.repo_id", "do_train": "nothing", "do_eval": "data.eval", "do_predict": "data.eval",
    "remove_unused_columns": "nothing", "eval_do_concat_batches": "nothing", "predict_with_generate": "nothing",
    "label_names": "nothing",
}  # fmt: skip
# What the Trainer would find out late, or never: the least and the largest value of a number.
_BOUNDS: dict[str, tuple[float, float]] = {
    **dict.fromkeys(("seed", "data_seed"), (0, 2**32 - 1)),
    **dict.fromkeys(("adam_beta1", "adam_beta2", "label_smoothing_factor"), (0, 1)),
    **dict.fromkeys(
        ("learning_rate", "weight_decay", "adam_epsilon", "max_grad_norm", "dataloader_num_workers", "logging_steps", "save_steps",
         "eval_steps", "eval_delay", "save_total_limit", "neftune_noise_alpha"), (0, math.inf),
    ),
    **dict.fromkeys(
        ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps", "eval_accumulation_steps",
         "generation_max_length", "generation_num_beams"), (1, math.inf),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Parts:
    """What a recipe stands for in Python, as far as it needs neither a model nor data.

    Args:
        objectives (list of [`Objective`]): empty for the task loss alone.
        training (`dict`): arguments of `TrainingArguments`.
        pruning (list of `tuple`): a [`PruningSpec`] and the other arguments of [`PruningCallback`], for each structure.
        quantization (`tuple`, *optional*): a [`QuantizationSpec`] and the other arguments of [`QATCallback`].
    """

    objectives: list[Objective]
    training: dict[str, Any]
    pruning: list[tuple[PruningSpec, dict[str, Any]]]
    quantization: tuple[QuantizationSpec, dict[str, Any]] | None

    @property
    def uses_teacher(self) -> bool:
        """Whether an objective learns from a teacher."""
        return any(objective.uses_teacher for objective in self.objectives)


def parts_of(recipe: Recipe, source: str = "the recipe") -> Parts:
    """The parts of a recipe.

    Raises:
        ValueError: a class, an argument or a field that is not known, which is told with the nearest known one, or a value
            that its class refuses; one line says where.
    """
    try:
        entries = recipe.objectives or []
        check_depth(vars(recipe)["objectives"] or [])
        made = [_made(entry, OBJECTIVES, f"objectives[{number}]") for number, entry in enumerate(entries)]
        for number, objective in enumerate(made):
            refusing(objective.check_settings, f"objectives[{number}]")
        pruning, quantization = _pruning(recipe.pruning), None
        if recipe.quantization is not None:
            quantization = _spec_and_rest(recipe.quantization, QuantizationSpec, QATCallback, "quantization")
            refusing(lambda: QATCallback(quantization[0], **quantization[1]), "quantization")
        _check_training(recipe.training)
    except ValueError as error:
        raise ValueError(f"{source}: {brief(error).rstrip('.')}.") from None
    return Parts(made, dict(recipe.training), pruning, quantization)


def training_arguments(parts: Parts, output_dir: str, generates: bool = False, **more: Any) -> TrainingArguments:
    """`TrainingArguments` of the section training; of its two classes the one for models whose answers are `generates`.

    Raises:
        ValueError: what they refuse, in one line.
    """
    cls = Seq2SeqTrainingArguments if generates else TrainingArguments
    settings = {"report_to": "none", **parts.training, **more}
    if others := sorted(
        {item.name for item in fields(Seq2SeqTrainingArguments)} - {item.name for item in fields(cls)}
    ):
        refused = [name for name in others if name in settings]
        if refused:
            raise ValueError(
                f"training.{refused[0]} is for models that write their answers, and this one does not. Leave it out."
            )
    if generates:
        settings["predict_with_generate"] = True
    return refusing(lambda: cls(output_dir=output_dir, **settings), "training")


@cache
def training_fields() -> dict[str, Any]:
    """The fields of training arguments that a recipe may have, and their types."""
    hints = get_type_hints(Seq2SeqTrainingArguments)
    return {
        item.name: hints[item.name]
        for item in fields(Seq2SeqTrainingArguments)
        if item.init and item.name not in OWNED
    }


def arguments_of(kind: type) -> dict[str, tuple[Any, Any]]:
    """The arguments of a class that a recipe can write, each with its type and its default (`MISSING` without one)."""
    hints = get_type_hints(kind, include_extras=True)
    return {
        item.name: (hints[item.name], item.default if item.default_factory is MISSING else None)
        for item in fields(kind)
        if item.init
    }


def callback_arguments(kind: type) -> dict[str, tuple[Any, Any]]:
    """The same of a callback, beside its spec: those that are no objects of a program."""
    hints = get_type_hints(inspect.getattr_static(kind, "__init__"), include_extras=True)
    parameters = inspect.signature(kind).parameters.items()
    others = ("spec", "strict_resume", "example_inputs")  # a folder belongs to one recipe, and has its data
    return {
        name: (hints[name], item.default) for name, item in parameters if name not in others and _is_data(hints[name])
    }


def classes_for(hint: Any) -> dict[str, type]:
    """The classes that an argument of this type may be made of, by name."""
    found: dict[str, type] = {}
    for kind in _members(hint):
        if inspect.isclass(kind) and issubclass(kind, Objective):
            found |= {name: cls for name, cls in OBJECTIVES.items() if issubclass(cls, kind)}
        elif kind is Divergence:
            found |= DIVERGENCES
        elif get_origin(kind) is collections.abc.Callable:
            found |= SCHEDULES if len(get_args(kind)[0]) == 1 else LAYER_SCHEDULES
    return found


def data_hint(hint: Any) -> Any:
    """The types of YAML that an argument of this type may have besides; `None` for none."""
    kinds = [_as_yaml(kind) for kind in _members(hint) if not classes_for(kind)]
    return Union[tuple(kinds)] if kinds else None  # noqa: UP007  (from a tuple)


def _as_yaml(kind: Any) -> Any:
    origin, inner = get_origin(kind), tuple(_as_yaml(item) for item in get_args(kind))
    if origin is collections.abc.Mapping:
        return types.GenericAlias(dict, inner)
    if origin in (collections.abc.Sequence, tuple):
        return types.GenericAlias(list, inner[:1])
    return kind


def _members(hint: Any) -> tuple[Any, ...]:
    hint = get_args(hint)[0] if get_origin(hint) is Annotated else hint
    if get_origin(hint) not in (Union, types.UnionType):
        return (hint,)
    return tuple(member for kind in get_args(hint) for member in _members(kind))


def _is_data(hint: Any) -> bool:
    """Whether YAML can say all values of a type."""
    return all(
        kind in (int, float, str, bool, type(None))
        or get_origin(kind) in (collections.abc.Mapping, collections.abc.Sequence)
        for kind in _members(hint)
    )


def _made(entry: Any, known: Mapping[str, type], where: str) -> Any:
    """The object that a name, or a name with its arguments, stands for."""
    single = isinstance(entry, dict) and len(entry) == 1
    name, given = next(iter(entry.items())) if single else (entry, {})
    if not isinstance(name, str):
        raise ValueError(
            f"{where} is {brief(ValueError(repr(entry)))[:80]}, expected the name of a class, or that name with its arguments, as "
            f"{next(iter(known))}: {{}}"
        )
    refuse_unknown([name], known, where)
    where = f"{where}.{name}"
    given = {} if given is None else given
    if not isinstance(given, dict):
        raise ValueError(f"{where} is {brief(ValueError(repr(given)))[:80]}, expected its arguments with their names")
    arguments = arguments_of(known[name])
    refuse_unknown(given, arguments, where)
    values = {key: _value(value, arguments[key][0], f"{where}.{key}") for key, value in given.items()}
    return refusing(lambda: known[name](**values), where)


def _value(value: Any, hint: Any, where: str) -> Any:
    """The value of an argument: an object of a class that fits, or what YAML says."""
    classes, plain = classes_for(hint), data_hint(hint)
    is_named = isinstance(value, dict) and len(value) == 1 and isinstance(next(iter(value)), str)
    if classes and (
        (is_named and not _takes_dict(plain))
        or plain is None
        or (value in classes if isinstance(value, str) else False)
    ):
        return _made(value, classes, where)
    if classes and isinstance(value, dict):
        raise ValueError(f"{where} has {len(value)} keys, expected one, the name of a class: {', '.join(classes)}")
    check(value, plain, where)
    return value


def _takes_dict(hint: Any) -> bool:
    return any(get_origin(kind) is dict for kind in _members(hint))


def _spec_and_rest(given: dict[str, Any], spec: type, callback: type, where: str) -> tuple[Any, dict[str, Any]]:
    """The spec, and the arguments of the callback, which have other names."""
    own, others = arguments_of(spec), callback_arguments(callback)
    refuse_unknown(given, [*own, *others], where)
    for name, value in given.items():
        check(value, data_hint((own.get(name) or others[name])[0]), f"{where}.{name}")
    made = refusing(lambda: spec(**{name: value for name, value in given.items() if name in own}), where)
    return made, {name: value for name, value in given.items() if name not in own}


def _pruning(given: dict[str, Any] | list[dict[str, Any]] | None) -> list[tuple[PruningSpec, dict[str, Any]]]:
    """The specs of a section, which has one or a list of them, with the arguments of their callbacks."""
    if not isinstance(given, list):
        return [] if given is None else [_spec_and_rest(given, PruningSpec, PruningCallback, "pruning")]
    found = [_spec_and_rest(one, PruningSpec, PruningCallback, f"pruning[{i}]") for i, one in enumerate(given)]
    specs = [spec for spec, _ in found]
    vocabularies = sum(spec.structure == "vocab" for spec in specs)
    if not found or vocabularies > 1 or any(spec in specs[:i] for i, spec in enumerate(specs)):
        raise ValueError(
            "pruning is a list that is empty or says the same twice. Give every structure once, or leave it out"
        )
    return found


def _check_training(given: dict[str, Any]) -> None:
    known = training_fields()
    for name in given:
        if name in OWNED:
            instead = OWNED[name]
            advice = "the command says it itself" if instead == "nothing" else f"use {instead} instead"
            raise ValueError(f"training.{name} is not for a recipe; {advice}")
    refuse_unknown(given, known, "training")
    choices = {item.name: item.metadata.get("choices") for item in fields(Seq2SeqTrainingArguments)}
    for name, value in given.items():
        check(value, known[name], f"training.{name}")
        if value is None:
            continue
        if (allowed := choices[name]) and value not in allowed:
            raise ValueError(f"training.{name} is {value!r:.80}, expected one of {', '.join(map(str, allowed))}")
        least, most = _BOUNDS.get(name, (-math.inf, math.inf))
        if name in _BOUNDS and not least <= value <= most:
            bounds = f"{least} or more" if most == math.inf else f"in [{least}, {most}]"
            raise ValueError(f"training.{name} must be {bounds}, got {value!r}")
    if given.get("num_train_epochs", 1) <= 0 and given.get("max_steps", -1) <= 0:
        raise ValueError(f"training.num_train_epochs must be larger than 0, got {given['num_train_epochs']!r}")


def refusing(make: Callable[[], Any], where: str) -> Any:
    """What `make` returns; whatever it raises as a `ValueError` of one line."""
    try:
        return make()
    except Exception as error:  # libraries raise what they like for a wrong setting
        raise ValueError(f"{where}: {brief(error) or type(error).__name__}") from error
