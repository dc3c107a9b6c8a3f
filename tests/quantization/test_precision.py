# SPDX-License-Identifier: Apache-2.0
"""Half precision: quantizers compute in float32, and their learned parameters survive loss scaling."""

from __future__ import annotations

import pytest
import torch

from hfkdq import QuantizationSpec
from hfkdq.quantization import prepare_qat_
from hfkdq.quantization.records import quantizer_states
from hfkdq.quantization.schedule import learned_parameters
from tests import tiny

LEARNED = QuantizationSpec(weight_bits=4, range_estimator="learned", weight_estimator="learned")


def prepared(spec):
    model = prepare_qat_(tiny.bert(layers=1, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0), spec)
    model.train()(**tiny.batch(model))  # finds the ranges
    return model


def loss_of(model, dtype):
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        return model(**tiny.batch(model), labels=torch.tensor([0, 1, 2, 0])).loss


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("spec", [LEARNED, QuantizationSpec(weight_bits=2), QuantizationSpec(range_estimator="pact")])
def test_gradients_under_autocast_are_those_of_float32_but_for_rounding(spec, dtype):
    found = {}
    for precision in (torch.float32, dtype):
        model = prepared(spec)
        loss_of(model, precision).backward()
        found[precision] = torch.cat([p.grad.flatten().float() for p in model.parameters()])
    exact, rounded = found.values()
    assert torch.cosine_similarity(exact, rounded, dim=0) > 0.98
    assert rounded.norm() == pytest.approx(exact.norm().item(), rel=0.1)


def test_loss_scaling_changes_no_step_and_an_overflow_moves_no_range():
    models = {}
    for scale in (1.0, 2.0**10):
        model = models[scale] = prepared(LEARNED)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        scaler.scale(loss_of(model, torch.float16)).backward()
        scaler.step(optimizer)
        scaler.update()
    for one, other in zip(*(learned_parameters(model) for model in models.values()), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-4)
    before = quantizer_states(model)
    optimizer.zero_grad()
    scaler.scale(loss_of(model, torch.float16) * 1e38).backward()
    scaler.step(optimizer)
    assert quantizer_states(model) == before
    assert all(parameter.isfinite().all() for parameter in model.parameters())
