# SPDX-License-Identifier: Apache-2.0
"""Whatever stands in the section `hfkdq` of a `config.json`: a model loads from it or one clear error says why not."""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hfkdq import (
    PruningSpec,
    QuantizationSpec,
    load_pruned,
    load_quantized,
    make_student,
    prune,
    quantize,
    share_layers,
)
from tests import tiny
from tests.fuzz.common import answers, bounded, mutated, mutations


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A quantized model, one with learned scales and codebooks, and a pruned student with shapes and shared layers."""
    folder = tmp_path_factory.mktemp("fuzz")
    size = dict(layers=2, hidden=8, heads=2, max_position_embeddings=16)
    quantized = tiny.bert(**size)
    spec = QuantizationSpec(exclude_modules=["query"], overrides={"key": {"weight_bits": 4}}, attention=True)
    quantize(quantized, spec, [tiny.batch(quantized)])
    codebook = tiny.bert(**size)
    quantize(
        codebook,
        QuantizationSpec(weight_mapping="kmeans", weight_bits=4, head_bits=8),
        [tiny.batch(codebook)],
        smoothing=None,
    )
    pruned = make_student(tiny.bert(**{**size, "layers": 4}), num_layers=2)
    prune(pruned, PruningSpec(sparsity=0.5, structure="head", plain_checkpoint=False))
    share_layers(pruned, 1)
    found = {}
    for name, model in {"quantized": quantized, "codebook": codebook, "pruned": pruned}.items():
        model.save_pretrained(folder / name)
        found[name] = folder / name, json.loads((folder / name / "config.json").read_text())
    return found


def load(folder):
    load_pruned(str(folder))
    if "quantization" in json.loads((folder / "config.json").read_text()).get("hfkdq", {}):
        load_quantized(str(folder))


@bounded
@given(name=st.sampled_from(["quantized", "quantized", "codebook", "pruned"]), steps=mutations)
def test_mutated_sections(checkpoints, name, steps):
    folder, config = checkpoints[name]
    section = mutated(config["hfkdq"], steps)
    (folder / "config.json").write_text(json.dumps({**config, "hfkdq": section}), encoding="utf-8")
    quantized = isinstance(section, dict) and "quantization" in section
    answers(lambda: (load_quantized if quantized else load_pruned)(str(folder)))


def test_those_that_were_told_at_length_or_on_many_lines(checkpoints):
    folder, config = checkpoints["codebook"]
    section = config["hfkdq"]["quantization"]
    spec = section["spec"]
    text = json.dumps(section)
    shapes = re.sub(r'"shape": \[[^]]*\]', f'"shape": {list(range(1000))}', text)
    assert shapes != text
    for damaged in (
        {**section, "spec": {**spec, "\n# Heading\n": 1}},
        {**section, "spec": {**spec, "overrides": {"key": {"\n#": 1}}}},
        json.loads(shapes),
    ):
        (folder / "config.json").write_text(json.dumps({**config, "hfkdq": {"quantization": damaged}}))
        assert not answers(lambda: load_quantized(str(folder)))


@bounded
@given(
    name=st.sampled_from(["quantized", "pruned"]), place=st.integers(0, 10**6), data=st.binary(min_size=0, max_size=20)
)
def test_damaged_bytes(checkpoints, name, place, data):
    folder, config = checkpoints[name]
    section = json.dumps(config["hfkdq"]).encode()
    place %= len(section)
    broken = section[:place] + data + section[place + len(data) :]
    rest = json.dumps({key: value for key, value in config.items() if key != "hfkdq"}).encode()
    (folder / "config.json").write_bytes(rest[:-1] + b', "hfkdq": ' + broken + b"}")
    answers(lambda: (load_quantized if name == "quantized" else load_pruned)(str(folder)))
