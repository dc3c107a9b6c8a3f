# SPDX-License-Identifier: Apache-2.0
"""`hfkdq compress`: the product's main job on the user's own model and data, from one YAML recipe."""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

from ..files import looks_local, refuse_missing
from ..recipes.goals import Goals, parse_size, parse_time
from ..recipes.reading import load, override, read
from .export import default_folder
from .names import check_data

if TYPE_CHECKING:
    from ..report import CompressionReport

HELP = "distil, prune, quantize and export a model on your own data, from one recipe"
DESCRIPTION = (
    "Makes a model smaller by a recipe: trains a student on the data, exports it to ONNX, measures both beside the model, and "
    "writes report and card. Of a MODEL with --data the recipe is chosen by the model's task: half of its layers, distilled, "
    "with 8-bit integers."
)
EPILOG = """every field of transformers.TrainingArguments is an option too, as --num_train_epochs 1 or --learning_rate 1e-4.
Examples: hfkdq compress recipe.yaml training.num_train_epochs=1; hfkdq compress MODEL --data DATA --dry-run;
accelerate launch -m hfkdq compress recipe.yaml"""
# What an interruption leaves.
LEFT = "The output folder keeps what was finished and the checkpoints of the training; the same command goes on from there."
_USAGE = "hfkdq compress RECIPE [KEY=VALUE ...] [options]\n       hfkdq compress MODEL --data DATA [KEY=VALUE ...] [options]"
_TRIALS = 20
_SUFFIXES = (".yaml", ".yml", ".json")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the command to `parser`."""
    parser.epilog = " ".join(EPILOG.split())
    parser.add_argument(
        "source",
        metavar="RECIPE|MODEL",
        nargs="?",
        help="a YAML recipe; or, with --data, folder or Hub id of a checkpoint",
    )
    parser.add_argument(
        "changes",
        metavar="KEY=VALUE",
        nargs="*",
        help="values of the recipe, as student.num_layers=3 or quantization=null",
    )
    parser.add_argument(
        "--data", help="rows to train and measure on: a file, a folder or a Hub id; a split may follow a colon"
    )
    parser.add_argument(
        "--unlabelled", metavar="DATA", help="more rows to train on, beside --data: the teacher alone teaches them"
    )
    parser.add_argument(
        "--output-dir", "--output_dir", metavar="FOLDER",
        help="where to write (default: the model's name and -compressed, beside it)",
    )  # fmt: skip
    parser.add_argument(
        "--dry-run",
        "--dry_run",
        action="store_true",
        help="print the plan, with sizes and an estimate of the time, and stop",
    )
    goals = parser.add_argument_group("goals in the place of settings, for a MODEL with --data")
    goals.add_argument("--keep", type=float, metavar="SHARE", help="least share of the model's metric, such as 0.99")
    goals.add_argument("--max-size", "--max_size", metavar="SIZE", help="of the file at most, such as 10MB")
    goals.add_argument("--max-latency", "--max_latency", metavar="TIME", help="of a call at most, such as 5ms")
    goals.add_argument(
        "--trials",
        type=int,
        metavar="N",
        help=f"recipes that are trained, in all processes together (default: {_TRIALS})",
    )
    goals.add_argument(
        "--storage", metavar="URL", help="Optuna's storage of the study (default: a file in the output folder)"
    )
    parser.add_argument(
        "--schema", action="store_true", help="print the JSON Schema of recipes, for editors, and stop"
    )


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options of the command; those of `TrainingArguments` are in `training`, only where they were given."""
    said: dict[str, Any] = dict(prog="hfkdq compress", description=DESCRIPTION, usage=_USAGE, allow_abbrev=False)
    parser = argparse.ArgumentParser(**said)
    add_arguments(parser)
    known = {option for action in parser._actions for option in action.option_strings}
    theirs: list[str] = []
    if any(word.startswith("--") and word.partition("=")[0] not in known for word in arguments):
        from ..recipes.options import training_parser

        others = training_parser()
        theirs = [action.dest for action in others._actions]
        switches = {option for action in others._actions if action.nargs == "?" for option in action.option_strings}
        arguments = [
            f"{word}=true" if word in switches and "=" in after and not after.startswith("-") else word
            for word, after in zip(arguments, [*arguments[1:], ""], strict=True)
        ]  # a switch takes no change of the recipe for its value
        parser = argparse.ArgumentParser(**said, parents=[others], conflict_handler="resolve")
        add_arguments(parser)
    options = parser.parse_intermixed_args(arguments)
    own = ("output_dir", "data", "unlabelled")
    options.training = {name: vars(options)[name] for name in theirs if name in vars(options) and name not in own}
    return options


def run(options: argparse.Namespace) -> None:
    """Carries out a recipe, or prints its plan."""
    if options.schema:
        from ..recipes.editors import json_schema

        sys.stdout.write(json.dumps(json_schema(), indent=2) + "\n")
        return
    data, source = _data_of(options)
    goals = _goals_of(options)
    changes = [*options.changes, *_as_changes(options.training)]
    recipe = read(override(data, changes if options.data is None else _early(changes)), source)
    folder = Path(options.output_dir) if options.output_dir else default_folder(recipe.model, "-compressed")
    for name in filter(None, (recipe.model, recipe.teacher)):
        refuse_missing(name)
        if Path(name).is_file():
            raise ValueError(f"{name} is a file. Name the folder of a checkpoint, or a model on the Hub.")
    for where in filter(None, (recipe.data.train, recipe.data.eval, recipe.data.unlabelled, recipe.data.calibration)):
        check_data(where)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # read when torch is imported
    from ..recipes.parts import parts_of, training_arguments
    from ..recipes.trying import try_training
    from .compress_run import RECIPE, carry_out, check_folder
    from .compress_search import SEARCH, search
    from .compress_setup import check_means, set_up
    from .summary import quietly

    is_first = os.environ.get("RANK", "0") == "0"  # of several processes it alone tells
    check_folder(folder, RECIPE if goals is None else SEARCH)
    with quietly():
        with tempfile.TemporaryDirectory() as scratch:
            try_training(
                training_arguments(parts_of(recipe, source), scratch, generates=True)
            )  # those of both classes
        check_means(recipe)
        if goals is not None and not options.dry_run:
            found = search(recipe, changes, goals, folder, options.trials or _TRIALS, options.storage, source)
            _print(found, folder)
            return
        setup = set_up(recipe, None if options.data is None else changes, source)
        if options.dry_run:
            from .compress_plan import print_plan

            print_plan(setup, folder, sys.stdout if is_first else io.StringIO())
            return
        report = carry_out(setup, folder)
    if is_first:
        _print(report, folder)


def _print(report: CompressionReport | None, folder: Path) -> None:
    if report is not None:
        from rich.console import Console

        Console().print(report.table())
    sys.stdout.write(f"{folder}\n")


def _goals_of(options: argparse.Namespace) -> Goals | None:
    """The goals that were given, if any were."""
    given = {"keep": options.keep}
    for name, parse_amount in (("max_size", parse_size), ("max_latency", parse_time)):
        text = getattr(options, name)
        try:
            given[name] = None if text is None else parse_amount(text)
        except ValueError as error:
            raise ValueError(f"--{name.replace('_', '-')}: {error}.") from None
    if all(value is None for value in given.values()):
        if options.trials is not None or options.storage is not None:
            raise ValueError("--trials and --storage are those of a search. Name a goal too, such as --keep 0.99.")
        return None
    if options.data is None:
        raise ValueError("--keep, --max-size and --max-latency choose the recipe, so they go with MODEL --data DATA.")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(
            "Goals are searched by processes of their own: start hfkdq compress several times with one --output-dir."
        )
    if options.trials is not None and options.trials < 1:
        raise ValueError(f"--trials must be 1 or more, got {options.trials}.")
    return Goals(**given)


def _data_of(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """The recipe that was named, and what errors call it."""
    source = options.source
    if source is None or "=" in source:
        raise ValueError(
            "Name a recipe, as in hfkdq compress recipe.yaml, or a model and its data: MODEL --data DATA."
        )
    is_recipe = Path(source).is_file() or Path(source).suffix.lower() in _SUFFIXES
    if options.data is not None:
        if is_recipe:
            raise ValueError(
                f"--data goes with the folder of a model, and {source} is a file, as is a recipe. Write "
                f"{quote(f'data.train={options.data}')} instead beside a recipe."
            )
        # The sections that a recipe is chosen with without looking at the model.
        return {
            "model": source,
            "data": {"train": options.data, "unlabelled": options.unlabelled},
            "export": {},
            "report": {},
        }, "the recipe for this model"
    if options.unlabelled is not None:
        raise ValueError(
            f"--unlabelled goes with a model and --data. In a recipe write {quote(f'data.unlabelled={options.unlabelled}')} instead."
        )
    if is_recipe:
        if not Path(source).is_file():
            raise FileNotFoundError(f"There is no recipe {source}.")
        return load(source), source
    if looks_local(source):
        refuse_missing(source)
    raise ValueError(
        f"{source} is no recipe. For a default recipe name its data too: hfkdq compress {quote(source)} --data DATA."
    )


def _as_changes(training: dict[str, Any]) -> list[str]:
    """Options of `TrainingArguments` as changes of the recipe."""
    return [f"training.{name}={json.dumps(value)}" for name, value in training.items()]


def _early(changes: list[str]) -> list[str]:
    """The changes that can be checked before a recipe is chosen for the model: those that lead into no list."""
    return [text for text in changes if not any(key.isdecimal() for key in text.partition("=")[0].split("."))]
