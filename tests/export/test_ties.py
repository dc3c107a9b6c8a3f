# SPDX-License-Identifier: Apache-2.0
"""The integers inside an int8 file are those of the fake-quantized model, but where a number lies between two of them."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch

from hfkdq import QuantizationSpec, export_onnx
from hfkdq.quantization import activation_quantizers, quantize
from tests import tiny

# Of a step between two integers: what floating-point errors of the layers before can add up to.
NEAR = 1e-3


def probe(folder):
    """The file with its quantized activations as further outputs: by scale, as fake quantizers of one input share it."""
    model = ir.load(folder / "model.onnx")
    nodes = [node for node in model.graph if node.op_type == "QuantizeLinear"]
    model.graph.outputs.extend(node.outputs[0] for node in nodes)
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString())
    return session, [float(node.inputs[1].const_value.numpy()) for node in nodes]


def watch(model):
    """What every fake quantizer was given in the last call, in steps, and the integers it made of it: by scale."""
    seen = {}

    def hook(quantizer, args, output):
        scale, zero = quantizer.qparams()
        steps = args[0].double() / scale.double()
        codes = (torch.round(args[0] * (1.0 / scale)) + zero).clamp(0, 255)
        seen[float(scale)] = steps.detach().numpy(), codes.detach().numpy()

    for quantizer in activation_quantizers(model).values():
        quantizer.register_forward_hook(hook)
    return seen


@pytest.mark.parametrize("make", [tiny.bert, tiny.vit, tiny.distilbert])
@torch.no_grad()
def test_integers_differ_at_ties_alone_and_logits_after_them(make, tmp_path):
    spec, model = QuantizationSpec(), make()
    quantize(model, spec, [tiny.batch(model, seed=seed) for seed in range(3)]).eval()
    session, scales = probe(export_onnx(model, tmp_path / "onnx", quantization=spec, latency_rounds=0))
    seen, equal = watch(model), 0
    for seed in range(10, 40):
        batch = {name: value for name, value in tiny.batch(model, seed=seed).items() if name != "labels"}
        if "attention_mask" in batch:
            batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        logits = model(**batch).logits.numpy()
        feed = {i.name: batch[i.name].numpy() if i.name in batch else np.zeros_like(batch["input_ids"])
                for i in session.get_inputs()}  # fmt: skip
        outputs = session.run(None, feed)
        flipped = np.zeros(len(logits), bool)
        for scale, codes in zip(scales, outputs[1:], strict=True):
            steps, expected = (array.reshape(len(logits), -1) for array in seen[scale])
            wrong = expected != codes.reshape(expected.shape)
            for row in np.flatnonzero(wrong.any(-1) & ~flipped):
                between = steps[row][wrong[row]]
                assert np.abs(between - np.floor(between) - 0.5).max() < NEAR
            flipped |= wrong.any(-1)
        equal += int((~flipped).sum())
        np.testing.assert_allclose(outputs[0][~flipped], logits[~flipped], rtol=0, atol=1e-5 * np.abs(logits).max())
    assert equal > 30, "there are examples without a tie, and so something was compared"
