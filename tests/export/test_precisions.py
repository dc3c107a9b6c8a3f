# SPDX-License-Identifier: Apache-2.0
"""The table of precisions: one entry names a file everywhere."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from hfkdq import QuantizationSpec, export_onnx
from hfkdq.cli.main import _parser
from hfkdq.export.precisions import PRECISIONS, precision_of, recorded_precision

DOCS = Path(__file__).parents[2] / "docs" / "export.md"


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({}, "int8"),
        ({"weight_bits": 2}, "w2a8"),
        ({"activation_bits": 16}, "w8a16"),
        ({"weight_bits": 4, "activation_bits": 4}, "w4a4"),
        ({"activation_bits": None}, "int8_weights"),
        ({"weight_bits": 3, "activation_bits": None}, "int3_weights"),
        ({"weight_bits": 16, "storage_dtype": "bfloat16", "activation_bits": None}, "bfloat16_weights"),
    ],
)
def test_a_spec_is_named_by_its_integers(settings, name):
    spec = QuantizationSpec(**settings)
    precision = precision_of(spec)
    assert (precision.name, precision.spec) == (name, spec)
    assert precision.tolerance == (1e-4 if spec.activation_bits is None else 0.1)
    # Earlier releases called all of them "int8" or "weights".
    for kind in (name, "int8", "weights"):
        assert recorded_precision({"kind": kind, "spec": spec.to_dict()}).name == name


def test_names_of_earlier_releases_are_read():
    assert recorded_precision({"kind": "float", "spec": None}) is PRECISIONS["float32"]
    assert recorded_precision({"kind": "dynamic"}) is PRECISIONS["dynamic"]
    assert recorded_precision({"kind": "weights"}) is None
    assert recorded_precision({}) is None


@pytest.mark.parametrize("name", PRECISIONS)
def test_an_entry_is_documented_and_offered(name, capsys):
    entry = PRECISIONS[name]
    assert precision_of(name) is entry
    assert entry.spec is None or precision_of(entry.spec).name == name
    assert f'`"{name}"`' in export_onnx.__doc__
    assert f'`"{name}"`' in DOCS.read_text(encoding="utf-8")
    with pytest.raises(SystemExit):
        _parser().parse_args(["export", "--help"])
    assert f"{name}: {entry.help}" in " ".join(capsys.readouterr().out.split())
    assert _parser().parse_args(["export", "in", "--quantization", name]).quantization == name


def test_the_table_loads_nothing_heavy():
    code = "import sys, hfkdq.export.precisions; print(*{'torch', 'transformers', 'onnxruntime'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == ""
