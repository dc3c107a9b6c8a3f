# SPDX-License-Identifier: Apache-2.0
"""`from_pretrained` of Transformers, before and after hfkdq is imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageClassification
from transformers import AutoModelForSequenceClassification as AutoClassifier

from hfkdq import QuantizationSpec, load_pruned, load_quantized, make_student, quantize
from hfkdq.modeling import load_checkpoint
from hfkdq.quantization import activation_ranges, quantized_modules, strip_quantizers_
from tests import tiny

MARK = {"quant_method": "hfkdq"}
LOUD = {**os.environ, "TRANSFORMERS_VERBOSITY": "warning"}
REPOSITORY = str(Path(__file__).parents[1])
# Prints, for each way to load, whether there are fake quantizers, and the logits as bits.
PROGRAM = """
import sys, json, torch
sys.path.insert(0, {repository!r})
{first}
from transformers import AutoModelForSequenceClassification
inputs = torch.load({batch!r})
def load():
    model = AutoModelForSequenceClassification.from_pretrained({folder!r})
    with torch.no_grad():
        return [type(model.classifier).__name__, model(**inputs).logits.numpy().tobytes().hex()]
found = [load()]
import hfkdq
print(json.dumps([*found, load()]))
"""


def quantized(make=tiny.bert, spec=None):
    model = make().eval()
    return quantize(model, spec or QuantizationSpec(), [tiny.batch(model, seed=seed) for seed in range(2)])


def run(tmp_path, first):
    model, batch = quantized(), tmp_path / "batch.pt"
    torch.save(dict(tiny.batch(model)), batch)
    model.save_pretrained(tmp_path / "model")
    code = PROGRAM.format(repository=REPOSITORY, first=first, batch=str(batch), folder=str(tmp_path / "model"))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=LOUD)
    bits = [
        bytes(logits(m, tiny.batch(model)).numpy().tobytes()).hex() for m in (model, strip_quantizers_(quantized()))
    ]
    return json.loads(done.stdout.splitlines()[-1]), bits, done.stderr


def logits(model, batch):
    with torch.no_grad():
        return model(**batch).logits


def test_without_hfkdq_it_is_an_ordinary_checkpoint_and_with_it_the_quantized_model(tmp_path):
    (without, after), (ours, floats), said = run(tmp_path, "")
    assert without == ["Linear", floats]
    assert "Unknown quantization type, got hfkdq" in said
    assert after == ["QuantizedLinear", ours], "also where Transformers was imported first"


def test_hfkdq_imported_first_waits_for_transformers(tmp_path):
    waits = "import hfkdq; assert 'transformers' not in sys.modules and 'torch' not in vars(hfkdq)"
    (first, second), (ours, _), said = run(tmp_path, waits)
    assert first == second == ["QuantizedLinear", ours]
    assert "Unknown quantization type" not in said


@pytest.mark.parametrize(
    ("make", "auto"),
    [
        (tiny.bert, AutoClassifier),
        (tiny.llama, AutoModelForCausalLM),
        (tiny.vit, AutoModelForImageClassification),
    ],
)
def test_it_gives_what_load_quantized_gives(tmp_path, make, auto):
    model = quantized(make, QuantizationSpec(range_estimator="min_max", attention=True))
    model.save_pretrained(tmp_path)
    found, known = auto.from_pretrained(tmp_path), load_quantized(tmp_path)
    assert torch.equal(logits(found, tiny.batch(model)), logits(known, tiny.batch(model)))
    assert torch.equal(logits(found, tiny.batch(model)), logits(model, tiny.batch(model)))
    assert activation_ranges(found) == activation_ranges(known)
    assert not found.training
    assert vars(found).keys() == vars(known).keys(), "it moves, casts and trains as any other model"
    assert found.config.to_dict() == known.config.to_dict()
    assert found.bfloat16().dtype == torch.bfloat16
    found.float().save_pretrained(tmp_path / "again")
    strip_quantizers_(auto.from_pretrained(tmp_path)).save_pretrained(tmp_path / "plain")
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    assert json.loads((tmp_path / "again" / "config.json").read_text())["quantization_config"] == MARK


def test_the_mark_comes_and_goes_with_the_fake_quantizers(tmp_path):
    model = quantized()
    assert model.config.quantization_config == MARK
    strip_quantizers_(model)
    assert not hasattr(model.config, "quantization_config")
    model.save_pretrained(tmp_path)
    assert not quantized_modules(AutoClassifier.from_pretrained(tmp_path))


def test_a_student_of_float_weights_has_no_mark(tmp_path):
    quantized().save_pretrained(tmp_path)
    teacher = load_checkpoint(str(tmp_path))
    assert teacher.config.quantization_config == MARK, "which it would be saved with, beside the record"
    assert not hasattr(make_student(teacher, num_layers=1).config, "quantization_config")


def test_what_loads_float_weights_still_does(tmp_path):
    model = quantized()
    model.save_pretrained(tmp_path)
    plain = strip_quantizers_(quantized())
    for load in (load_checkpoint, load_pruned):
        found = load(str(tmp_path))
        assert not quantized_modules(found)
        assert torch.equal(logits(found, tiny.batch(model)), logits(plain, tiny.batch(model)))


@pytest.mark.parametrize("edit", [lambda c: c.pop("hfkdq"), lambda c: c["hfkdq"].pop("quantization")])
def test_a_mark_without_a_record_is_an_ordinary_checkpoint(tmp_path, edit):
    quantized().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    edit(config)
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert not quantized_modules(AutoClassifier.from_pretrained(tmp_path))


def test_a_damaged_record_is_named(tmp_path):
    quantized().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["hfkdq"]["quantization"]["ranges"] = {"classifier": {"scale": "wide", "zero_point": 0}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"is damaged: .*classifier.*its weights load as they are"):
        AutoClassifier.from_pretrained(tmp_path)


def test_another_class_has_float_weights_and_says_so(tmp_path, caplog):
    quantized().save_pretrained(tmp_path)
    found = AutoModel.from_pretrained(tmp_path)
    assert "is that of BertForSequenceClassification; BertModel has its float weights" in caplog.text
    assert not quantized_modules(found)


def test_what_another_class_saves_is_an_ordinary_checkpoint(tmp_path):
    quantized().save_pretrained(tmp_path / "whole")
    base = AutoModel.from_pretrained(tmp_path / "whole")
    base.save_pretrained(tmp_path / "base")
    told = json.loads((tmp_path / "base" / "config.json").read_text())
    assert not {"hfkdq", "quantization_config"} & told.keys()
    again = AutoModel.from_pretrained(tmp_path / "base")
    batch = tiny.batch(base)
    torch.testing.assert_close(again(**batch).last_hidden_state, base(**batch).last_hidden_state)


def test_the_advice_about_a_record_without_ranges_works(tmp_path):
    quantized().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["hfkdq"]["quantization"]["ranges"].popitem()
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        ValueError, match=r"lacks the ranges of 1 .*without the section hfkdq in config\.json its weights load"
    ):
        AutoClassifier.from_pretrained(tmp_path)
    del config["hfkdq"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert not quantized_modules(AutoClassifier.from_pretrained(tmp_path))
