# SPDX-License-Identifier: Apache-2.0
"""Every family in every kind of file, for the task that its models are best known for."""

from __future__ import annotations

import itertools
import json

import onnx_ir as ir
import pytest
import transformers
from packaging.version import Version

from hfkdq import export_onnx
from hfkdq.export.backends import load_backend

from .tasks import TASKS, make

ON_V5 = Version(transformers.__version__).major >= 5
KINDS = ("float16", "dynamic", "int8", "int8_weights", "int4_weights")
BEST_KNOWN = (
    "text2text-generation-with-past", "automatic-speech-recognition-with-past", "text-generation-with-past",
    "text-classification", "image-classification", "automatic-speech-recognition", "object-detection",
)  # fmt: skip
# Random weights of twice the usual scale make a T5 of what narrow numbers lose more than other families do.
TOLERANCE = {"t5": {"float16": 0.1, "dynamic": 0.6}}
# Whose self-attention stays in several operators, and why.
NOT_FUSED = {
    "mpnet": "adds a bias of positions to the scores",
    "deberta": "adds products with positions to the scores",
    "deberta-v2": "adds products with positions to the scores",
    "gpt2": "has a past",
    "llama": "has a past",
    "t5": "adds a bias of positions to the scores",
    "swin": "adds a bias of positions to the scores",
    "detr": "adds positions to the inputs of query and key",
    "convnext": "has none",
    "resnet": "has none",
}


def task_of(family):
    return next(task for task in BEST_KNOWN if task in TASKS[family] and TASKS[family][task] is None)


def cells():
    """Family and kind; on v5, where tracing takes longer, most are slow tests."""
    for family, kind in itertools.product(TASKS, KINDS):
        slow = ON_V5 and (kind != "int8" or family not in ("bert", "gpt2", "t5", "vit", "wav2vec2"))
        yield pytest.param(family, kind, marks=[pytest.mark.slow] if slow else [])


@pytest.mark.parametrize(("family", "kind"), list(cells()))
def test_family_in_kind(family, kind, tmp_path):
    task = task_of(family)
    model = make(family, task)
    calibration = load_backend().dummy_batches(model, task)
    arguments = dict(quantization=kind, calibration=calibration, task=task, latency_rounds=0)
    arguments["tolerance"] = TOLERANCE.get(family, {}).get(kind)
    facts = json.loads((export_onnx(model, tmp_path / "onnx", **arguments) / "export_facts.json").read_text())
    assert facts["task"] == task
    assert facts["max_abs_diff"] <= facts["tolerance"] * facts["max_abs_logit"]
    if kind == "int8":
        assert facts["fused_linears"] >= 0.8 * facts["quantized_linears"] > 0
        operators = {node.op_type for path in (tmp_path / "onnx").glob("*.onnx") for node in ir.load(path).graph}
        assert ("QAttention" in operators) == (family not in NOT_FUSED), NOT_FUSED.get(family)
