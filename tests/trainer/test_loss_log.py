# SPDX-License-Identifier: Apache-2.0
"""The log of the loss terms by itself: means over steps, resuming, and values that are not finite."""

from types import SimpleNamespace

import pytest
import torch

from hfkdq.trainer.loss_log import LossLog, check_finite, check_gradient, check_weights

ALONE = SimpleNamespace(gather=lambda rows: rows, scaler=None)
NAMES = ["task_loss", "logit_kd"]


def values(*numbers):
    return torch.tensor([*numbers, sum(numbers)])


def test_terms_are_means_over_optimizer_steps():
    log = LossLog()
    assert log.close(NAMES, [], ALONE, 0) == {}
    for step, numbers in enumerate([(1.0, 2.0), (3.0, 4.0)]):
        for _ in range(2):  # micro batches, each with its share of the window
            assert log.add(values(*(number / 2 for number in numbers)), step) is None
    assert log.close(NAMES, [], ALONE, 2) == {"task_loss": 2.0, "logit_kd": 3.0}
    assert log.close(NAMES, [], ALONE, 2) == {}


def test_a_checkpoint_has_whole_steps_and_a_resumed_run_goes_on_from_them():
    log = LossLog()
    log.add(values(1.0, 2.0), 4)
    log.add(values(3.0, 4.0), 5)
    assert torch.equal(log.finished(5), values(1.0, 2.0))  # step 6 is not finished
    assert torch.equal(log.finished(6), values(1.0, 2.0) + values(3.0, 4.0))
    again = LossLog()
    again.clear(resumed=(log.start, log.finished(5)))
    start, summed = again.add(values(3.0, 4.0), 5)
    assert (start, summed.item()) == (4, 3.0)
    assert again.close(NAMES, [], ALONE, 6) == {"task_loss": 2.0, "logit_kd": 3.0}


def test_values_that_are_not_finite_stop_a_training_unless_a_loss_scale_is_searched_for():
    with pytest.raises(RuntimeError, match="At step 3 logit_kd is nan"):
        check_finite(NAMES, [1.0, float("nan")], ALONE, 2)
    with pytest.raises(RuntimeError, match="gradient was inf before step 2"):
        check_gradient(float("inf"), ALONE, 2)
    searched = SimpleNamespace(scaler=object())
    check_finite(NAMES, [1.0, float("nan")], searched, 2)
    check_gradient(float("inf"), searched, 2)
    model = torch.nn.Linear(2, 2)
    check_weights(model)
    model.bias.data[0] = float("nan")
    with pytest.raises(RuntimeError, match=r"1 of 2 weights are not finite, such as bias"):
        check_weights(model)
