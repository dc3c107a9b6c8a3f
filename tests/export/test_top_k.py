# SPDX-License-Identifier: Apache-2.0
"""Files of models that keep the best k of many: a tie that falls otherwise is no error, and an error is no tie."""

import json
from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel, RTDetrImageProcessor

from hfkdq import CompressionReport, QuantizationSpec, export_onnx, quantize
from hfkdq.export.job import _check_parity
from hfkdq.export.top_k import follow_choices, scored_by
from hfkdq.export.verify import Parity, run_torch
from hfkdq.quantization import quantized_modules
from hfkdq.quantization.convert import leave_in_float_

from .. import tiny


class BestConfig(PretrainedConfig):
    model_type = "best_places"


class Best(PreTrainedModel):
    """Keeps the three places that score best; what it says of a place has nothing to do with the score."""

    config_class = BestConfig
    main_input_name = "input_features"

    def __init__(self, config):
        super().__init__(config)
        self.score, self.head = nn.Linear(4, 1, bias=False), nn.Linear(4, 3)
        self.post_init()

    def _init_weights(self, module):
        """Those of torch."""

    def forward(self, input_features, **_):
        places = self.score(input_features).squeeze(-1).topk(3, dim=1).indices
        return {"logits": self.head(input_features.gather(1, places[..., None].expand(-1, -1, 4)))}


def best(shift):
    """Two places of each example have scores that are `shift` apart."""
    torch.manual_seed(0)
    model = Best(BestConfig()).eval()
    with torch.no_grad():
        model.score.weight.copy_(torch.tensor([[1.0, shift, 0.0, 0.0]]))
    return model


def examples():
    """The third and the fourth best of six places differ by the second number times its weight alone."""
    rows = torch.randn(3, 6, 4, generator=torch.Generator().manual_seed(1))
    rows[..., 0] = torch.tensor([5.0, 4.0, 3.0, 3.0, 1.0, 0.0])
    rows[..., 1] = torch.tensor([0.0, 0.0, 0.0, 1.0, 0.0, 0.0])
    return {"input_features": rows}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Files that prefer the third of the two places."""
    where = tmp_path_factory.mktemp("best") / "onnx"
    return export_onnx(best(-1e-6), where, calibration=[examples()], latency_rounds=0)


def test_torch_keeps_what_the_file_keeps_where_scores_are_tied(folder):
    other = best(1e-6)
    own, wanted = run_torch(other, [examples()]), run_torch(best(-1e-6), [examples()])
    assert (own[0]["logits"] - wanted[0]["logits"]).abs().max() > 0.1
    found, choices = follow_choices(folder, other, [examples()], own, tolerance=1e-4)
    assert torch.equal(found[0]["logits"], wanted[0]["logits"])
    assert (choices.rows, choices.other_rows, choices.not_followed) == (9, 3, 0)
    assert choices.score_difference == pytest.approx(1e-6 / 5, rel=0.5)  # of the largest score, which is 5
    assert sorted(path.name for path in folder.glob("*.onnx")) == ["model.onnx"]


def test_what_scores_worse_is_no_tie(folder):
    other = best(0.5)
    own = run_torch(other, [examples()])
    found, choices = follow_choices(folder, other, [examples()], own, tolerance=1e-4)
    assert found == own
    assert (choices.other_rows, choices.not_followed) == (3, 1)
    assert choices.score_difference == pytest.approx(0.5 / 5)
    parity = Parity(1, 1.0, 1.0, 1.0, None, [], {"logits": {"max_abs_diff": 1.0, "max_abs": 1.0}})
    with pytest.raises(RuntimeError, match=r"differ by up to 0\.1 of the largest: more than a tie"):
        _check_parity(parity, 1e-4, "float32", choices=choices)


def test_a_file_that_chooses_elsewhere_or_nowhere_is_compared_as_it_is(folder, monkeypatch, tmp_path):
    model, batch = best(0.5), examples()
    own = run_torch(model, [batch])
    assert follow_choices(tmp_path, model, [batch], own, 1e-4) == (own, None)  # of several parts, none is the model
    monkeypatch.setattr(
        Best, "forward", lambda self, input_features, **_: {"logits": self.head(input_features[:, :3])}
    )
    assert follow_choices(folder, model, [batch], own, 1e-4) == (own, None)


@pytest.mark.one_line
@pytest.mark.parametrize("quantization", [None, QuantizationSpec()], ids=["float32", "int8"])
def test_a_detector_of_two_stages_is_exported(quantization, tmp_path):
    """Places whose boxes would leave the image all have one score."""
    pixels = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    folder = export_onnx(
        tiny.rt_detr(0, 0), tmp_path / "onnx", quantization=quantization, calibration=[{"pixel_values": pixels}],
        latency_rounds=0,
    )  # fmt: skip
    facts = json.loads((folder / "export_facts.json").read_text())
    assert facts["outputs"] == ["logits", "pred_boxes"]
    assert facts["top_k"]["rows"] >= 4 * 6
    assert facts["top_k"]["not_followed"] == 0
    assert set(facts["by_output"]) == {"logits", "pred_boxes"}


def test_a_detector_is_exported_without_data_by_its_processor(tmp_path):
    """With masks of images, which not every file takes; a model of random weights has many equal scores, of which its file keeps others."""
    processor = RTDetrImageProcessor(size={"height": 64, "width": 64})
    folder = export_onnx(tiny.rt_detr(), tmp_path / "onnx", processing_class=processor, latency_rounds=0)
    assert json.loads((folder / "export_facts.json").read_text())["inputs"][0] == "pixel_values"


@pytest.fixture
def quantized():
    """With fake quantizers, and scores of two layers."""
    model = best(0.5)
    model.score = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 1))
    return quantize(model, QuantizationSpec(), [examples()])


def test_the_modules_that_compute_the_scores_are_found_by_running(quantized):
    assert scored_by(quantized, examples()) == ["score.2"]
    assert scored_by(leave_in_float_(quantized, ["score.2"]), examples()) == ["score.0"]
    assert scored_by(leave_in_float_(quantized, ["score.0"]), examples()) == []
    with pytest.raises(ValueError, match="no fake quantizer left"):
        leave_in_float_(quantized, ["head"])


@pytest.mark.one_line
def test_those_of_a_detector_are_found():
    pixels = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    model = quantize(tiny.rt_detr(), QuantizationSpec(), [{"pixel_values": pixels}])
    assert scored_by(model, {"pixel_values": pixels}) == ["model.enc_score_head"]
    assert scored_by(leave_in_float_(model, ["model.enc_score_head"]), {"pixel_values": pixels}) == [
        "model.enc_output.0"
    ]


def test_what_computes_the_scores_stays_in_floats_where_integers_change_the_choice(
    quantized, monkeypatch, tmp_path, caplog
):
    """As if rounding had decided, as long as the layer right before the choice computes with integers."""

    def follow(folder, model, batches, expected, tolerance, load):
        found, choices = follow_choices(folder, model, batches, expected, tolerance, load)
        if "score.2" in quantized_modules(model):
            return [{"logits": outputs["logits"] + 9} for outputs in found], replace(choices, not_followed=1)
        return found, choices

    monkeypatch.setattr("hfkdq.export.top_k.follow_choices", follow)
    folder = export_onnx(quantized, tmp_path / "onnx", calibration=[examples()], latency_rounds=1, threads=1)
    assert {"config.json", "export_facts.json", "model.onnx", "model.safetensors"} <= {
        path.name for path in folder.iterdir()
    }
    assert all(path.is_file() for path in folder.iterdir())
    assert "Left in floating point: score.2." in caplog.text
    facts = json.loads((folder / "export_facts.json").read_text())
    assert facts["top_k"]["left_in_float"] == facts["spec"]["exclude_modules"] == ["score.2"]
    assert (facts["quantized_linears"], facts["float_linears"]) == (2, 1)
    card = CompressionReport.from_export(folder).to_card()
    assert "what scores them stays in floating point: `score.2`" in card
    assert list(quantized_modules(quantized)) == ["score.0", "score.2", "head"]  # the user's own is as it was


def test_a_choice_that_floats_do_not_mend_is_refused(quantized, monkeypatch, tmp_path):
    def follow(folder, model, batches, expected, tolerance, load):
        found, choices = follow_choices(folder, model, batches, expected, tolerance, load)
        return [{"logits": outputs["logits"] + 9} for outputs in found], replace(choices, not_followed=1)

    monkeypatch.setattr("hfkdq.export.top_k.follow_choices", follow)
    with pytest.raises(RuntimeError, match="more than a tie"):
        export_onnx(quantized, tmp_path / "onnx", calibration=[examples()], latency_rounds=0)
    assert not (tmp_path / "onnx").exists()
