# SPDX-License-Identifier: Apache-2.0
"""Training killed at any moment and started again: the same as one that was never cut, bit for bit."""

from __future__ import annotations

import functools
import logging
import multiprocessing
import multiprocessing.connection
import os
import random
import signal
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from hfkdq.objectives import HiddenStateKD, LogitKD, TaskLoss
from hfkdq.objectives.base import as_objective
from hfkdq.trainer import DistillationTrainer
from hfkdq.trainer.checkpoints import is_complete, resolve
from tests import tiny

from ..launch import python_path
from . import resume_runs
from .common import ALL_TERMS, assert_equal_weights, losses, make_trainer, teacher_of

# Processes fork from one that has imported everything and has run nothing.
CONTEXT = multiprocessing.get_context("forkserver")
# To start a process reads the exit codes of all that have ended; who reads one at the same moment gets 255.
EXIT_CODES = threading.Lock()


@pytest.fixture(scope="module", autouse=True)
def _server():
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = python_path()
    CONTEXT.set_forkserver_preload([resume_runs.__name__])
    yield
    os.environ.pop("PYTHONPATH") if before is None else os.environ.update(PYTHONPATH=before)


def start(folder, **kwargs):
    """What a training in a process of its own ends with; `None` if it was killed."""
    return start_processes(folder, [{}], **kwargs)[0]


def exit_code(process):
    multiprocessing.connection.wait([process.sentinel], 200)
    with EXIT_CODES:
        process.join(0)
        return process.exitcode


def start_processes(folder, environments, **kwargs):
    """What every process of one training ends with; `None` where the first was killed, and the others after it."""
    results = [Path(f"{folder}-{rank}.pt") for rank in range(len(environments))]
    processes = [
        CONTEXT.Process(target=resume_runs.train, args=(folder, result, environment), kwargs=kwargs)
        for result, environment in zip(results, environments, strict=True)
    ]
    with EXIT_CODES:
        for process in processes:
            process.start()
    killed = exit_code(processes[0]) == -signal.SIGKILL
    for process in processes[1:]:
        if killed:
            process.kill()
    codes = [exit_code(process) for process in processes]
    if killed:
        return [None] * len(processes)
    assert codes == [0] * len(processes)
    return [torch.load(result, weights_only=False) for result in results]


def assert_same(one, other, where="run"):
    assert type(one) is type(other), where
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_same(one[key], other[key], f"{where}: {key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), where
        for i, (ours, theirs) in enumerate(zip(one, other, strict=True)):
            assert_same(ours, theirs, f"{where}: {i}")
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other), where
    elif isinstance(one, np.ndarray):
        np.testing.assert_array_equal(one, other, where)
    else:
        assert one == other, where


def start_until_done(folder, kills, **kwargs):
    """What a training ends with that is killed at the moments `kills`, each time started again as a user would."""
    for kill_at in (*kills, None):
        # Without a whole checkpoint yet Trainer refuses to resume, and one starts again from the beginning.
        resume = any(is_complete(checkpoint) for checkpoint in folder.glob("checkpoint-*"))
        done = start(folder, kill_at=kill_at, resume=resume, **kwargs)
        if done is not None:
            return done
    raise AssertionError("the last start was not to be killed")


def assert_same_end(one, other, where):
    ends = [dict(one["end"]), dict(other["end"])]
    if "before forward" not in one["moments"]:  # killed after its last step, Trainer draws nothing any more
        for end in ends:
            del end["random"]
    assert_same(*ends, where)


ESTIMATORS = ["moving_average", "learned"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    with ThreadPoolExecutor(2) as pool:
        runs = pool.map(lambda estimator: start(folder / estimator, estimator=estimator), ESTIMATORS)
        return dict(zip(ESTIMATORS, runs, strict=True))


def test_the_uncut_training_prunes_quantizes_projects_and_saves_between_logs(whole):
    for run in whole.values():
        end, moments = run["end"], run["moments"]
        assert end["state"][0] == resume_runs.STEPS
        assert end["projections"]
        assert end["quantizers"]
        assert any((weight == 0).all(dim=1).sum() == 32 for weight in end["weights"].values() if weight.dim() == 2)
        assert moments.count("middle of trainer_state.json") == 4
        assert [row["step"] for row in end["logs"] if "loss" in row] == [2, 4, 6, 8, 10]


def draw(moments, count, seed):
    """Moments by their number: first of which kind, then which one, so that rare kinds come as often as others."""
    generator = random.Random(seed)
    kinds = sorted(set(moments))
    numbers = {kind: [i for i, name in enumerate(moments) if name == kind] for kind in kinds}
    return [generator.choice(numbers[kind]) for kind in generator.sample(kinds, count)]


@pytest.mark.one_line
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_killed_at_random_moments_it_ends_as_if_never_cut(whole, tmp_path, estimator):
    moments = whole[estimator]["moments"]
    kills = draw(moments, 20 if estimator == "moving_average" else 4, seed=20)
    with ThreadPoolExecutor(2) as pool:
        ends = pool.map(lambda at: start_until_done(tmp_path / f"{at}", [at], estimator=estimator), kills)
        for at, end in zip(kills, ends, strict=True):
            assert_same_end(end, whole[estimator], f"killed {moments[at]} ({at})")


@pytest.mark.one_line
def test_killed_again_and_again_it_ends_as_if_never_cut(whole, tmp_path):
    length = len(whole["moving_average"]["moments"])
    generator = random.Random(2)
    histories = [sorted(generator.sample(range(length // 4, length // 2), 3), reverse=True) for _ in range(2)]
    with ThreadPoolExecutor(2) as pool:
        ends = pool.map(lambda kills: start_until_done(tmp_path / f"{kills[0]}", kills), histories)
        for kills, end in zip(histories, ends, strict=True):
            assert_same_end(end, whole["moving_average"], f"killed at {kills}")


@pytest.mark.one_line
def test_two_processes_killed_between_two_logs_end_as_if_never_cut(tmp_path):
    """What each process summed up since the last log differs; losses and terms of both count in the next row."""

    def run(folder, **kwargs):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        group = dict(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        environments = [{**group, "RANK": rank, "LOCAL_RANK": rank} for rank in "01"]
        return start_processes(tmp_path / folder, environments, num_train_epochs=3, eval_steps=5, **kwargs)

    never_cut = run("whole")
    moments = never_cut[0]["moments"]
    saved = moments.index("after trainer_state.json")
    assert run("cut", kill_at=moments.index("in the optimizer step", saved)) == [None, None]
    assert is_complete(tmp_path / "cut" / "checkpoint-3")
    for ours, theirs in zip(run("cut", resume=True), never_cut, strict=True):
        assert_same(ours["end"], theirs["end"])


@pytest.mark.parametrize(
    ("event", "dropout"), [("on_substep_end", 0.0), ("on_optimizer_step", 0.1), ("on_step_end", 0.1)]
)
def test_a_training_that_is_asked_to_end_saves_and_goes_on_exactly(whole, tmp_path, event, dropout):
    """Asked in the middle of a step, Trainer does not keep what dropout drew in it, so there is none in that case."""
    if "enable_jit_checkpoint" not in {field.name for field in fields(TrainingArguments)}:
        pytest.skip("this release of Transformers does not save on SIGTERM")
    settings = dict(enable_jit_checkpoint=True, dropout=dropout)
    folder = tmp_path / "run"
    start(folder, terminate=(event, 7 if event != "on_optimizer_step" else 6), **settings)
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint-6", "checkpoint-7"]
    never_cut = whole["moving_average"] if dropout else start(tmp_path / "whole", dropout=dropout)
    ends = [start(folder, resume=True, **settings)["end"], never_cut["end"]]
    if event == "on_substep_end":  # the forward passes of the cut step were made, and are counted, twice
        for end in ends:
            del end["state"][2], end["logs"][-1]["total_flos"]
    assert_same(*ends)


# ---------------------------------------------------------------------- which checkpoint is taken


def made(arguments, terms=None, cls=DistillationTrainer, teacher=None, **kwargs):
    student = tiny.bert(0, hidden_dropout_prob=0.1)
    return make_trainer(arguments, terms or ALL_TERMS["sum"], student, teacher or teacher_of(), cls=cls, **kwargs)


@pytest.fixture
def steps(training_arguments):
    """Makes arguments of a short training with a checkpoint after every step."""

    def make(folder="out", max_steps=2, **kwargs):
        return training_arguments(folder, max_steps=max_steps, save_strategy="steps", save_steps=1, **kwargs)

    return make


@pytest.fixture
def warned():
    found, handler = [], logging.Handler(logging.WARNING)
    handler.emit = lambda record: found.append(record.getMessage())
    logging.getLogger("hfkdq").addHandler(handler)
    yield found
    logging.getLogger("hfkdq").removeHandler(handler)


def test_a_checkpoint_that_was_cut_off_is_passed_over_or_refused_by_name(steps, tmp_path, warned):
    made(steps(max_steps=3)).train()
    cut = tmp_path / "out" / "checkpoint-3"
    os.truncate(cut / "trainer_state.json", 300)
    with pytest.raises(ValueError, match=r"checkpoint-3 is no checkpoint, or was cut off while"):
        made(steps(max_steps=3)).train(resume_from_checkpoint=str(cut))
    assert not warned
    again = made(steps(max_steps=3))
    seen = []
    again.add_callback(Record(seen))
    again.train(resume_from_checkpoint=True)
    assert [message for message in warned if "checkpoint-3 was cut off" in message]
    assert seen == [3]
    assert is_complete(cut)


class Record(TrainerCallback):
    def __init__(self, seen):
        self.seen = seen

    def on_step_end(self, args, state, control, **kwargs):
        self.seen.append(state.global_step)


def test_without_a_whole_checkpoint_there_is_nothing_to_resume(steps, tmp_path):
    made(steps(max_steps=1)).train()
    (tmp_path / "out" / "checkpoint-1" / "trainer_state.json").unlink()
    with pytest.raises(ValueError, match=r"was written to the end, so there is nothing to go on from. Start anew"):
        made(steps(max_steps=1)).train(resume_from_checkpoint=True)


def test_a_checkpoint_is_not_whole_while_it_is_written_anew(steps, tmp_path, monkeypatch):
    made(steps()).train()
    last = tmp_path / "out" / "checkpoint-2"
    assert is_complete(last)

    def cut(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "_save_optimizer_and_scheduler", cut)
    with pytest.raises(KeyboardInterrupt):
        made(steps()).train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-1"))
    assert not is_complete(last)
    assert resolve(True, str(tmp_path / "out")).endswith("checkpoint-1")


@pytest.mark.parametrize("file", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_checkpoint_that_was_being_deleted_is_refused(steps, tmp_path, file):
    made(steps(max_steps=1)).train()
    (tmp_path / "out" / "checkpoint-1" / file).unlink()
    with pytest.raises(ValueError, match="cut off"):
        made(steps()).train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-1"))


def test_no_file_of_a_checkpoint_holds_a_weight_of_the_teacher(steps, tmp_path):
    trainer = made(steps(max_steps=1))
    trainer.train()
    files = [path.read_bytes() for path in (tmp_path / "out" / "checkpoint-1").iterdir()]
    for model, count in ((trainer.teacher_model, 0), (trainer.model, 1)):
        for name, weight in model.named_parameters():
            if weight.unique().numel() > 8:
                assert sum(weight.detach().numpy().tobytes() in file for file in files) == count, name


@pytest.mark.parametrize(
    "settings", [dict(save_only_model=True), dict(ignore_data_skip=True), dict(save_only_model=True, logging_steps=2)]
)
def test_without_optimizer_or_data_order_it_goes_on_as_the_plain_trainer(steps, tmp_path, settings):
    runs = []
    for cls in (Trainer, DistillationTrainer):
        arguments = dict(max_steps=6, per_device_train_batch_size=4, **settings)
        made(steps(cls.__name__, **arguments), [TaskLoss()], cls).train()
        again = made(steps(cls.__name__, **arguments), [TaskLoss()], cls)
        again.train(resume_from_checkpoint=str(tmp_path / cls.__name__ / "checkpoint-2"))
        runs.append(again)
    plain, ours = runs
    np.testing.assert_allclose(losses(plain, "loss", "grad_norm"), losses(ours, "loss", "grad_norm"), rtol=1e-3)
    assert len(losses(ours, "loss")) == 6 // ours.args.logging_steps
    assert_equal_weights(plain.model, ours.model, rtol=1e-4, atol=1e-6)


# ---------------------------------------------------------------------- who may go on


def one(student_out, teacher_out, batch):
    return student_out.logits.square().mean()


def other(student_out, teacher_out, batch):
    return student_out.logits.abs().mean()


def scaled(factor, student_out, teacher_out, batch):
    return factor * student_out.logits.square().mean()


PAIRS = {
    "another teacher": (dict(), dict(teacher=lambda: tiny.bert(7, layers=4, hidden=48)), "teacher: "),
    "a wider teacher": (dict(), dict(teacher=lambda: tiny.bert(7, layers=4, hidden=64)), "teacher: "),
    "another temperature": (dict(), dict(terms=[TaskLoss(), LogitKD(temperature=5.0), HiddenStateKD()]), "objectives"),
    "another callable": (dict(terms=[TaskLoss(), one]), dict(terms=[TaskLoss(), other]), "test_resume.other'"),
    "a projection less": (
        dict(terms=[HiddenStateKD(layers={1: 2, 2: 4})]),
        dict(terms=[HiddenStateKD(layers={1: 2})]),
        "objectives",
    ),
    "no teacher before": (dict(cls=Trainer), dict(), "teacher: None then"),
}


@pytest.mark.parametrize("pair", PAIRS)
def test_another_training_does_not_go_on_unless_told_to(steps, tmp_path, warned, pair):
    then, now, message = PAIRS[pair]
    then, now = ({**kwargs, "teacher": kwargs.get("teacher", teacher_of)()} for kwargs in (then, now))
    before = made(steps(max_steps=1), **then)
    before.train()
    with pytest.raises(ValueError, match=r"(?s)was written by another training.*strict_resume=False") as error:
        made(steps(), **now).train(resume_from_checkpoint=True)
    assert message in str(error.value)
    assert not warned
    after = made(steps(learning_rate=0.0), **now, strict_resume=False)
    after.train(resume_from_checkpoint=True)
    assert [text for text in warned if "was written by another training" in text and message in text]
    assert after.state.global_step == 2
    assert_equal_weights(before.model, after.model)
    fits = before.optimizer.param_groups and [
        [p.shape for p in g["params"]] for g in before.optimizer.param_groups
    ] == [[p.shape for p in g["params"]] for g in after.optimizer.param_groups]
    assert bool([text for text in warned if "optimizer starts anew" in text]) is not fits
    steps_of = {int(state["step"]) for state in after.optimizer.state_dict()["state"].values()}
    assert steps_of == ({2} if fits else {1})


def test_projections_that_fit_are_taken_over(steps, warned):
    before = made(steps(max_steps=1), [HiddenStateKD(layers={1: 2, 2: 4})])
    before.train()
    after = made(steps(learning_rate=0.0), [HiddenStateKD(layers={1: 2}), TaskLoss()], strict_resume=False)
    after.train(resume_from_checkpoint=True)
    assert torch.equal(
        before._distillation.projections.maps["0"].weight, after._distillation.projections.maps["0"].weight
    )


def test_a_description_of_a_callable_is_the_same_in_every_process():
    def make():
        def term(factor, student_out, teacher_out, batch):
            return factor

        return [as_objective(functools.partial(term, 2.0)), as_objective(term)]

    terms, twins = make(), make()
    assert [term.describe() for term in terms] == [term.describe() for term in twins]
    halved, doubled = (as_objective(functools.partial(scaled, factor)).describe() for factor in (0.5, 2.0))
    assert halved != doubled
