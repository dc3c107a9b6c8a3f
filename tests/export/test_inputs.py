# SPDX-License-Identifier: Apache-2.0
"""A file takes what the data bring and the model reads, by name, and is compared on inputs that are valid."""

import json
from dataclasses import dataclass

import numpy as np
import onnxruntime as ort
import pytest
import torch
import transformers as tf
from torch import nn

from benchmarks.models.entries import ENTRIES
from hfkdq import CompressionReport, QuantizationSpec, export_onnx, load_quantized, quantize
from hfkdq.export.inputs import completed, made_up, model_inputs
from hfkdq.export.job import _check_parity
from hfkdq.export.precisions import FLOAT_TOLERANCE
from hfkdq.export.rope import rope_by_length
from hfkdq.export.verify import Parity, in_same_order

from .. import tiny
from ..families import FAMILIES

SIZES = dict(vocab_size=99, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
             num_labels=3, initializer_range=0.3)  # fmt: skip


def written(model, folder, **arguments):
    """The folder of an export that is not timed, and its record."""
    folder = export_onnx(model, folder / "onnx", latency_rounds=0, **arguments)
    return folder, json.loads((folder / "export_facts.json").read_text())


def difference(folder, model, batch, name="logits"):
    """How far the file is from the model on a batch."""
    session = ort.InferenceSession(str(folder / "model.onnx"))
    got = session.run([name], {value.name: batch[value.name].numpy() for value in session.get_inputs()})[0]
    with torch.no_grad():
        return float(np.abs(got - model(**batch)[name].numpy()).max())


def pairs():
    ids = torch.randint(5, 99, (3, 8), generator=torch.Generator().manual_seed(0))
    types = torch.zeros_like(ids)
    types[:, 4:] = 1
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": types}


def roberta():
    torch.manual_seed(0)
    config = tf.RobertaConfig(**SIZES, type_vocab_size=2, max_position_embeddings=40, pad_token_id=1)
    return tf.RobertaForSequenceClassification(config).eval()


def test_an_extractor_that_makes_masks_brings_one(tmp_path):
    model = FAMILIES["wav2vec2"].make()
    extractor = tf.Wav2Vec2FeatureExtractor(return_attention_mask=True)
    folder, facts = written(model, tmp_path, processing_class=extractor)
    assert facts["inputs"] == ["input_values", "attention_mask"]
    mask = torch.ones(2, 4000, dtype=torch.int64)
    mask[1, 1500:] = 0
    assert difference(folder, model, {"input_values": torch.randn(2, 4000) * mask, "attention_mask": mask}) < 1e-3


@pytest.mark.parametrize("given", ["nothing", "calibration", "evaluation"])
def test_two_kinds_of_token_are_told_apart(given, tmp_path):
    model, batch = roberta(), pairs()
    arguments = {"nothing": {}, "calibration": {"calibration": [batch]}}.get(given)
    if arguments is None:
        rows = [{**{name: value[i] for name, value in batch.items()}, "labels": 1} for i in range(3)]
        arguments = {"eval_dataset": rows, "compute_metrics": lambda prediction: {"one": 1.0}}
    folder, facts = written(model, tmp_path, **arguments)
    source = {"nothing": "made-up inputs", "evaluation": "eval_dataset"}.get(given, given)
    assert (set(facts["inputs"]), facts["compared_on"]) == (set(batch), source)
    assert difference(folder, model, batch) < 1e-4
    card = CompressionReport.from_export(folder).to_card()
    assert ("made-up inputs" in card) == (given == "nothing")


def test_a_decoder_with_a_cache_takes_the_types_of_its_tokens(tmp_path):
    model = FAMILIES["gpt2"].make()
    ids = torch.randint(1, 60, (3, 9))
    batch = {"input_ids": ids, "token_type_ids": (ids > 20).long()}
    _, facts = written(model, tmp_path, calibration=[batch])
    assert "token_type_ids" in facts["inputs"]
    assert facts["incremental_decode"]["max_abs_diff"] < 1e-3


@dataclass
class Answer(tf.utils.ModelOutput):
    logits: torch.Tensor = None
    confidence: torch.Tensor = None


class Entity(tf.BertForSequenceClassification):
    """Takes and gives more than its base."""

    def __init__(self, config):
        super().__init__(config)
        self.sure = nn.Linear(config.hidden_size, 1)

    def forward(self, input_ids=None, attention_mask=None, entity_mask=None, weight=None, labels=None, **kwargs):
        states = self.bert(input_ids, attention_mask=attention_mask).last_hidden_state
        share = (attention_mask if entity_mask is None else entity_mask).unsqueeze(-1).to(states.dtype)
        pooled = (states * share).sum(1) / share.sum(1)
        pooled = pooled if weight is None else pooled * weight
        return Answer(logits=self.classifier(pooled), confidence=self.sure(pooled))


def test_inputs_and_outputs_of_ones_own_are_in_the_file(tmp_path):
    torch.manual_seed(0)
    model = Entity(tf.BertConfig(**SIZES)).eval()
    with pytest.raises(ValueError, match=r"Entity takes weight, .*inputs="):
        written(model, tmp_path)
    ids = pairs()["input_ids"]
    batch = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "entity_mask": (ids > 30).long(),
        "weight": torch.rand(3, 16),
    }
    folder, facts = written(model, tmp_path, inputs=batch)
    assert (set(facts["inputs"]), facts["outputs"]) == (set(batch), ["logits", "confidence"])
    more = {name: torch.cat([value, value]) for name, value in batch.items()}
    more = {name: value[:, :5] if value.dtype == torch.int64 else value for name, value in more.items()}
    assert difference(folder, model, more) < 1e-4
    assert difference(folder, model, more, "confidence") < 1e-4


class SmallConfig(tf.PretrainedConfig):
    model_type = "hfkdq_small_cnn"
    num_channels, image_size = 1, 8


class SmallCNN(tf.PreTrainedModel):
    config_class, main_input_name = SmallConfig, "pixel_values"

    def __init__(self, config):
        super().__init__(config)
        self.conv = nn.Conv2d(1, 8, 3)
        self.head = nn.Linear(8, config.num_labels)
        self.post_init()

    def forward(self, pixel_values, labels=None):
        return {"logits": self.head(self.conv(pixel_values).relu().mean((2, 3)))}


def test_a_model_of_ones_own_is_quantized_saved_loaded_and_exported(tmp_path):
    torch.manual_seed(0)
    model, pictures = SmallCNN(SmallConfig(num_labels=3)), {"pixel_values": torch.randn(4, 1, 8, 8)}
    quantized = quantize(model, QuantizationSpec(), [pictures]).eval()
    quantized.save_pretrained(tmp_path / "checkpoint")
    for own in (SmallCNN, model):
        loaded = load_quantized(tmp_path / "checkpoint", model=own)
        assert torch.equal(loaded(**pictures)["logits"], quantized(**pictures)["logits"])
    with pytest.raises(TypeError, match="model must be"):
        load_quantized(tmp_path / "checkpoint", model=nn.Linear(1, 1))
    tf.AutoConfig.register("hfkdq_small_cnn", SmallConfig, exist_ok=True)
    tf.AutoModelForImageClassification.register(SmallConfig, SmallCNN, exist_ok=True)
    assert type(load_quantized(tmp_path / "checkpoint")) is SmallCNN
    _, facts = written(quantized, tmp_path)
    assert (facts["kind"], facts["task"], facts["outputs"]) == ("int8", "image-classification", ["logits"])


def test_made_up_texts_have_no_padding_inside_and_end():
    config = FAMILIES["bart"].make()
    ids = torch.full((2, 6), config.config.pad_token_id)
    mask = torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
    (batch,) = made_up(config, [{"input_ids": ids, "attention_mask": mask}], [])
    pad, end = config.config.pad_token_id, config.config.eos_token_id
    assert torch.equal(batch["input_ids"] != pad, mask.bool())
    assert [row.tolist().index(end) for row in batch["input_ids"]] == [5, 3]


def test_arrays_and_lists_become_tensors_and_ragged_rows_are_named():
    model = FAMILIES["bert"].make()
    batch = {
        "input_ids": np.ones((2, 3), np.int64),
        "attention_mask": [[1, 1, 1]] * 2,
        "labels": [0, 1],
        "text": ["a", "b"],
    }
    inputs = model_inputs(model, batch)
    assert {name: tuple(value.shape) for name, value in inputs.items()} == {
        "input_ids": (2, 3),
        "attention_mask": (2, 3),
    }
    with pytest.raises(ValueError, match="input_ids of a batch is no array of numbers"):
        model_inputs(model, {"input_ids": [[1, 2], [3]]})


def test_what_is_missing_gets_a_value_that_says_nothing():
    full = completed({"pixel_values": torch.zeros(2, 3, 4, 5)}, ["pixel_mask", "entity"])
    assert torch.equal(full["pixel_mask"], torch.ones(2, 4, 5, dtype=torch.int64))
    assert "entity" not in full


def test_every_output_has_its_own_bound():
    outputs = {
        "logits": {"max_abs_diff": 0.01, "max_abs": 100.0},
        "pred_boxes": {"max_abs_diff": 0.01, "max_abs": 0.5},
    }
    parity = Parity(1, 0.01, 0.0, 100.0, None, [], outputs)
    with pytest.raises(RuntimeError, match=r"differs .* up to 0.01 in pred_boxes .*largest value 0.5"):
        _check_parity(parity, 1e-3, "float32")
    _check_parity(parity, 0.1, "float32")


def test_queries_of_a_detector_may_come_in_another_order():
    wanted = {"logits": torch.randn(2, 5, 3), "pred_boxes": torch.rand(2, 5, 4), "other": torch.randn(2, 5)}
    order = torch.tensor([3, 1, 0, 4, 2])
    got = {name: value if name == "other" else value[:, order] for name, value in wanted.items()}
    assert all(torch.equal(value, wanted[name]) for name, value in in_same_order(got, wanted).items())


def test_nearly_equal_queries_keep_their_order():
    """As a detector gives before it has learnt: 60 queries that differ by less than the root of what a float32 resolves."""
    wanted = {"logits": 0.05 + 1e-5 * torch.randn(4, 60, 4), "pred_boxes": 0.5 + 1e-5 * torch.randn(4, 60, 4)}
    got = {name: value + 1e-8 * torch.randn_like(value) for name, value in wanted.items()}
    assert all(torch.equal(value, got[name]) for name, value in in_same_order(got, wanted).items())


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_positions_follow_the_length_of_each_text(kind, tmp_path):
    scaling = {"longrope": {"short_factor": [1.0, 1.1], "long_factor": [4.0, 16.0]}, "dynamic": {"factor": 2.0}}[kind]
    known = (
        {"max_position_embeddings": 48, "original_max_position_embeddings": 24}
        if kind == "longrope"
        else {"max_position_embeddings": 24}
    )
    make = {"longrope": ("Phi3Config", "Phi3ForCausalLM"), "dynamic": ("LlamaConfig", "LlamaForCausalLM")}[kind]
    config = getattr(tf, make[0])(
        vocab_size=60, hidden_size=16, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=4, intermediate_size=32,
        initializer_range=0.3, pad_token_id=0, bos_token_id=1, eos_token_id=2, rope_scaling={"type" if kind == "longrope" else "rope_type": kind, **scaling}, **known,
    )  # fmt: skip
    torch.manual_seed(0)
    model = getattr(tf, make[1])(config).eval()
    folder, facts = written(model, tmp_path, task="text-generation")
    assert max(row["inputs"]["input_ids"][1] for row in facts["batches"]) > 24
    for length in (40, 20):
        ids = torch.randint(3, 60, (2, length))
        with rope_by_length(model):
            given = {
                "input_ids": ids,
                "attention_mask": torch.ones_like(ids),
                "position_ids": torch.arange(length).repeat(2, 1),
            }
            assert difference(folder, model, given) < 1e-3


def test_a_detector_is_measured_on_labels_that_are_dictionaries(tmp_path):
    model = tiny.yolos().eval()
    size = model.config.image_size
    size = size if isinstance(size, (list, tuple)) else [size, size]
    row = {
        "pixel_values": torch.randn(3, *size),
        "labels": {"boxes": torch.rand(1, 4), "class_labels": torch.tensor([0])},
    }
    seen = []

    def collate(rows):
        pixels = torch.stack([one["pixel_values"] for one in rows])
        return {"pixel_values": pixels, "labels": [one["labels"] for one in rows]}

    def metrics(prediction):
        # As the Trainer has them: losses by name, logits, boxes.
        seen.append([getattr(value, "shape", None) for value in prediction.predictions[:3]])
        return {"map": 0.5}

    data = dict(eval_dataset=[row] * 4, data_collator=collate, compute_metrics=metrics)
    folder, facts = written(model, tmp_path, metric="map", max_drop=0.02, **data)
    assert facts["metrics"]["drop"] == 0
    CompressionReport.measure(student=model, onnx=folder, latency_rounds=0, **data)
    assert len(seen) == 4
    assert all(shapes == seen[0] and shapes[0] is None for shapes in seen)


@pytest.mark.parametrize(
    "family", ["gpt2", pytest.param("bart", marks=[pytest.mark.slow] if tf.__version__.startswith("5") else [])]
)
def test_files_that_generate_are_reported(family, tmp_path):
    model = FAMILIES[family].make()
    rows = [{"input_ids": list(range(3, 12)), "labels": list(range(3, 12))}] * 4
    data = dict(
        eval_dataset=rows, data_collator=tf.default_data_collator, compute_metrics=lambda prediction: {"one": 1.0}
    )
    folder, _ = written(model, tmp_path)
    report = CompressionReport.measure(student=model, onnx=folder, latency_rounds=0, **data)
    assert report.engines[-1].metrics == {"one": 1.0}
    assert report.engines[-1].size == sum(file.stat().st_size for file in folder.glob("*.onnx*"))


def test_float16_leaves_no_weights_beside_its_file(tmp_path, monkeypatch):
    monkeypatch.setenv("FORCE_ONNX_EXTERNAL_DATA", "1")
    folder, facts = written(FAMILIES["bert"].make(), tmp_path, quantization="float16")
    files = {file.name: file.stat().st_size for file in folder.glob("*.onnx*")}
    assert files.pop("model.onnx.data", 0) == 0  # which v5 wants to be there
    assert (list(files), sum(files.values())) == (["model.onnx"], facts["bytes"])


def test_a_layer_that_is_called_twice_counts_once(tmp_path):
    torch.manual_seed(0)
    model = tf.AlbertForSequenceClassification(
        tf.AlbertConfig(**{**SIZES, "num_hidden_layers": 2}, embedding_size=16)
    ).eval()
    ids = pairs()["input_ids"]
    _, facts = written(model, tmp_path, quantization="int8", calibration=[{"input_ids": ids.numpy()}])
    assert facts["fused_linears"] <= facts["quantized_linears"]


@pytest.mark.parametrize("flag", ["return_dict", "torchscript"])
def test_tuples_and_autocast_change_nothing(flag, tmp_path):
    model = FAMILIES["bert"].make(**{flag: flag == "torchscript"})
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, facts = written(model, tmp_path)
    assert facts["outputs"] == ["logits"]


@pytest.mark.parametrize("family", ["t5", "whisper", "bart"])
def test_a_decoder_reads_the_labels_of_a_batch_behind_its_start(family):
    model = FAMILIES[family].make()
    labels = torch.tensor([[7, 8, 9], [7, 8, -100]])
    batch = {**FAMILIES[family].batch(), "labels": labels}
    del batch["decoder_input_ids"]
    start = model.config.decoder_start_token_id
    assert model_inputs(model, batch)["decoder_input_ids"].tolist() == [[start, 7, 8], [start, 7, 8]]
    given = {**batch, "decoder_input_ids": labels.clamp(min=0)}
    assert model_inputs(model, given)["decoder_input_ids"].tolist() == labels.clamp(min=0).tolist()
    assert "labels" not in model_inputs(model, batch)


def test_a_file_takes_as_many_images_as_come(tmp_path):
    """LLaVA takes images apart one by one, and puts them together again."""
    entry = ENTRIES["llava"]
    model, batch = entry.make(), {name: value for name, value in entry.batch().items() if name != "labels"}
    folder, _ = written(model, tmp_path, calibration=[batch])
    with torch.no_grad():
        largest = float(model(**batch).logits.abs().max())
    for count in (1, len(batch["input_ids"])):
        less = {name: value[:count] for name, value in batch.items()}
        assert difference(folder, model, less) <= FLOAT_TOLERANCE * largest


@pytest.mark.parametrize("task", [None, "feature-extraction"])
@pytest.mark.parametrize("kind", ["Text", "Vision"])
def test_a_tower_with_a_projection_keeps_its_embeddings(tmp_path, kind, task):
    torch.manual_seed(0)
    own = {"vocab_size": 99, "eos_token_id": 2} if kind == "Text" else {"image_size": 16, "patch_size": 8}
    sizes = {
        name: value for name, value in SIZES.items() if name not in ("vocab_size", "num_labels", "initializer_range")
    }
    config = getattr(tf, f"CLIP{kind}Config")(**sizes, **own, projection_dim=8)
    model = getattr(tf, f"CLIP{kind}ModelWithProjection")(config).eval()
    folder, _ = written(model, tmp_path, task=task)
    text = {"input_ids": torch.randint(3, 99, (3, 7)), "attention_mask": torch.ones(3, 7, dtype=torch.long)}
    batch = text if kind == "Text" else {"pixel_values": torch.randn(3, 3, 16, 16)}
    for name in (f"{kind.lower().replace('vision', 'image')}_embeds", "last_hidden_state"):
        assert difference(folder, model, batch, name) < 1e-5


@pytest.mark.parametrize("task", [None, "feature-extraction"])
def test_so_does_one_that_hears(tmp_path, task):
    torch.manual_seed(0)
    config = tf.ClapAudioConfig(
        spec_size=32, num_mel_bins=8, patch_size=4, patch_stride=[4, 4], hidden_size=32, depths=[1, 1], window_size=4,
        num_attention_heads=[2, 4], patch_embeds_hidden_size=16, projection_dim=8, enable_fusion=False, num_hidden_layers=2,
    )  # fmt: skip
    batch = {"input_features": torch.randn(2, 1, 128, 8)}
    folder, _ = written(tf.ClapAudioModelWithProjection(config).eval(), tmp_path, task=task, calibration=[batch])
    outputs = {value.name for value in ort.InferenceSession(str(folder / "model.onnx")).get_outputs()}
    assert outputs == {"audio_embeds", "last_hidden_state"}
