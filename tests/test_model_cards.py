# SPDX-License-Identifier: Apache-2.0
"""The cards in `model_cards/` are what their reports say, and their programs run on files of such models."""

import importlib
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers import BertModel, RTDetrImageProcessor

from hfkdq import CompressionReport, PruningSpec, export_onnx, prune
from tests import tiny
from tests.families import FAMILIES

ROOT = Path(__file__).parents[1]
CARDS = sorted((ROOT / "model_cards").glob("*.json"))
SMALL = {
    "BertForSequenceClassification": tiny.bert, "BertForTokenClassification": tiny.bert_tokens, "BertForMaskedLM": tiny.bert_mlm,
    "BertForQuestionAnswering": tiny.bert_qa, "LlamaForCausalLM": tiny.llama, "BartForConditionalGeneration": FAMILIES["bart"].make,
    "BertModel": lambda: BertModel(tiny.bert_config(), add_pooling_layer=False).eval(),
}  # fmt: skip
IN_EXAMPLES = {
    "ASTForAudioClassification": "sounds", "WhisperForConditionalGeneration": "spelled_sounds", "Wav2Vec2BertForCTC": "spectrograms",
    "SegformerForSemanticSegmentation": "segmentation",
}  # fmt: skip


@pytest.fixture
def made(tmp_path):
    """Makes a small model of a class, and what reads its data."""
    sys.path.insert(0, str(ROOT / "examples"))

    def make(name):
        if name in SMALL:
            return SMALL[name](), tiny.tokenizer()
        if name == "RTDetrForObjectDetection":
            return tiny.rt_detr(), RTDetrImageProcessor(size={"height": 64, "width": 64})
        function = getattr(importlib.import_module("made_up"), IN_EXAMPLES[name])
        _, processor, model = function(*[tmp_path / "made"] * (name[:3] in ("Whi", "Wav")))
        return model.eval(), processor

    yield make
    sys.path.remove(str(ROOT / "examples"))
    sys.modules.pop("made_up", None)


def test_there_are_cards():
    assert CARDS


@pytest.mark.every_case
@pytest.mark.parametrize("path", CARDS, ids=lambda path: path.stem)
def test_a_card_is_what_its_report_says(path):
    """`python benchmarks/model_cards.py --render` writes it anew."""
    assert path.with_suffix(".md").read_text(encoding="utf-8") == CompressionReport.load(path).to_card()


@pytest.mark.one_line
@pytest.mark.filterwarnings(
    "ignore:__array__ implementation:DeprecationWarning"
)  # the pipeline for answers, with NumPy 2
@pytest.mark.parametrize("path", CARDS, ids=lambda path: path.stem)
def test_the_programs_of_a_card_run(made, path, tmp_path, monkeypatch, capsys):
    pytest.importorskip("optimum.onnxruntime", reason="the cards were made on the optimum line")
    report = CompressionReport.load(path)
    model, processor = made(report.architecture)
    if "shapes" in report.facts:
        prune(model, PruningSpec(structure="neuron", sparsity=0.5, plain_checkpoint=False))
    if (report.task or "").startswith("text2text-generation"):  # a small model with few positions does not find an end
        model.generation_config.max_length = 16
    folder = export_onnx(model, tmp_path / "onnx", processing_class=processor, latency_rounds=0)
    monkeypatch.chdir(folder)
    Image.new("RGB", (32, 32), "red").save("image.png")
    programs = re.findall(r"```python\n(.*?)```", path.with_suffix(".md").read_text(encoding="utf-8"), re.DOTALL)
    assert len(programs) == 2
    rate = getattr(getattr(processor, "feature_extractor", processor), "sampling_rate", None)
    sound = {"raw": np.zeros(rate or 1, np.float32), "sampling_rate": rate}  # a second; as a file needs ffmpeg
    capsys.readouterr()
    exec(programs[0].replace('"sound.wav"', "sound"), {"sound": sound})
    assert capsys.readouterr().out.strip()
    names = {}
    exec(programs[1], names)
    assert type(names["model"]) is type(model)
    loaded = names["model"].state_dict()
    assert all(value.equal(loaded.pop(name)) for name, value in model.state_dict().items())
    assert all(name.startswith("pooler.") for name in loaded)  # which Transformers makes up for an encoder without
