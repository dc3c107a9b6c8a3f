# SPDX-License-Identifier: Apache-2.0
import collections
import copy
import functools
import json
import logging
import random
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from torch import nn

pytest.importorskip("transformers.exporters", reason="the exporter of Transformers 5")

import transformers
from onnxscript import optimizer
from transformers import masking_utils
from transformers.exporters import ExportedModel

from benchmarks.models.entries import ENTRIES
from hfkdq import export_onnx
from hfkdq.export import exporters_backend as backend
from hfkdq.export import exporters_tracing as tracing
from hfkdq.export.exporters_generation import Part
from hfkdq.export.graph import saving
from hfkdq.export.inputs import model_inputs
from hfkdq.export.operators import onnx_op
from hfkdq.export.runner import SingleFile, open_files

from ..families import FAMILIES, VARIANTS
from .tasks import EXPORTED, make

TASK = {
    "bert": "text-classification",
    "resnet": "image-classification",
    "llama": "text-generation-with-past",
    "t5": "text2text-generation-with-past",
}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A model of one layer and its exported folder, by family."""

    @functools.cache
    def export(family):
        model, folder = make(family, TASK[family]), tmp_path_factory.mktemp(family)
        backend.trace(copy.deepcopy(model), folder, TASK[family], fold_constants=True)
        model.config.save_pretrained(folder)
        backend.finish(folder, model.config, TASK[family])
        return model, folder

    return export


@torch.no_grad()
def share(model, run, batch):
    """The largest difference of any output, as a share of its largest value; padding does not count."""
    expected, shares = model(**batch), []
    for name, got in run(batch).items():
        want, mask = expected[name], None if "decoder_input_ids" in batch else batch.get("attention_mask")
        assert want.shape == got.shape
        if mask is not None and want.ndim > 2 and want.shape[:2] == mask.shape:
            want, got = want[mask.bool()], got[mask.bool()]
        shares.append(((want - got).abs().max() / want.abs().max()).item())
    assert shares
    return max(shares)


def texts(size, length, padding):
    ids = torch.randint(4, 60, (size, length))
    mask = torch.ones_like(ids)
    mask[-1, length - padding :] = 0
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}


@pytest.mark.parametrize(("size", "length", "padding"), [(1, 1, 0), (1, 40, 0), (5, 7, 3)])
def test_a_file_equals_torch_at_sizes_it_was_not_traced_at(size, length, padding, exported):
    model, folder = exported("bert")
    assert share(model, open_files(folder, TASK["bert"]), texts(size, length, padding)) < 1e-5


def test_convolutions_take_pictures_of_any_size(exported):
    model, folder = exported("resnet")
    for height, width in ((64, 64), (40, 72)):
        pictures = {"pixel_values": torch.randn(3, 3, height, width)}
        assert share(model, open_files(folder, TASK["resnet"]), pictures) < 1e-5


def test_greedy_steps_through_exported_model_give_the_tokens_of_generate(exported):
    model, folder = exported("llama")
    run = ExportedModel.from_pretrained(folder).runners["model"]
    batch = FAMILIES["llama"].batch(3)
    ids, mask = batch["input_ids"].flip(1), batch["attention_mask"].flip(1)  # padded on the left
    expected = model.generate(ids, attention_mask=mask, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    config = model.config
    empty = torch.zeros(3, config.num_key_value_heads, 0, config.hidden_size // config.num_attention_heads)
    past, step, positions = [{"key": empty, "value": empty}], ids, (mask.cumsum(1) - 1).clamp(min=0)
    tokens = ids
    for _ in range(5):
        outputs = run(input_ids=step, attention_mask=mask, position_ids=positions, past_key_values=past)
        with torch.no_grad():
            full = model(tokens, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits
        torch.testing.assert_close(outputs["logits"][:, -1], full[:, -1], atol=1e-6, rtol=1e-4)
        scores = outputs["logits"][:, -1]
        scores[:, config.eos_token_id] = -torch.inf
        step, past = scores.argmax(-1, keepdim=True), outputs["present"]
        tokens, mask = torch.cat([tokens, step], 1), torch.cat([mask, torch.ones_like(step)], 1)
        positions = positions[:, -1:] + 1
    assert torch.equal(tokens, expected)


def test_exported_model_loads_what_is_finished(exported):
    model, folder = exported("bert")
    batch = texts(3, 9, 2)
    with torch.no_grad():
        expected = model(**batch)
    outputs = ExportedModel.from_pretrained(folder)(**batch)
    assert type(outputs) is type(expected)
    torch.testing.assert_close(outputs.logits, expected.logits, atol=1e-5, rtol=0)
    parts = ExportedModel.from_pretrained(exported("t5")[1])
    assert set(parts.components) == {"encoder_model", "decoder_model", "decoder_with_past_model"}
    assert parts.config.model_type == "t5"


def signature(folder, name="model"):
    graph = onnx.load(folder / f"{name}.onnx").graph

    def shapes(values):
        return {v.name: [dim.dim_param or dim.dim_value for dim in v.type.tensor_type.shape.dim] for v in values}

    return shapes(graph.input), shapes(graph.output)


def test_inputs_outputs_and_axes_have_the_names_of_optimum(exported):
    assert signature(exported("bert")[1]) == (
        {name: ["batch_size", "sequence_length"] for name in ("input_ids", "attention_mask", "token_type_ids")},
        {"logits": ["batch_size", 3]},
    )
    grown = "past_sequence_length + sequence_length"
    assert signature(exported("llama")[1]) == (
        {
            "input_ids": ["batch_size", "sequence_length"],
            "attention_mask": ["batch_size", grown],
            "position_ids": ["batch_size", "sequence_length"],
            "past_key_values.0.key": ["batch_size", 2, "past_sequence_length", 8],
            "past_key_values.0.value": ["batch_size", 2, "past_sequence_length", 8],
        },
        {
            "logits": ["batch_size", "sequence_length", 60],
            "present.0.key": ["batch_size", 2, grown, 8],
            "present.0.value": ["batch_size", 2, grown, 8],
        },
    )
    inputs, outputs = signature(exported("t5")[1], "decoder_with_past_model")
    assert list(inputs)[:3] == ["input_ids", "encoder_attention_mask", "past_key_values.0.decoder.key"]
    assert inputs["past_key_values.0.encoder.value"] == ["batch_size", 4, "encoder_sequence_length", 8]
    assert list(outputs) == ["logits", "present.0.decoder.key", "present.0.decoder.value"]
    assert "present.0.encoder.key" in signature(exported("t5")[1], "decoder_model")[1]


def test_the_graph_has_nothing_that_the_model_does_not_compute(exported, tmp_path):
    _, folder = exported("bert")
    count = collections.Counter(node.op_type for node in onnx.load(folder / "model.onnx").graph.node)
    assert not {"Expand", "GatherND", "Identity", "If", "IsNaN", "Max", "Range"} & set(count)
    assert (count["Where"], count["Softmax"], count["LayerNormalization"]) == (1, 1, 3)
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    ort.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])
    fused = {node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node}
    assert "BiasGelu" in fused
    assert "SkipLayerNormalization" not in fused  # the slower kernel


def test_a_file_tells_nothing_of_the_machine_that_wrote_it(exported):
    text = (exported("bert")[1] / "model.onnx").read_bytes()
    assert b"classifier.weight" in text
    for place in (b"site-packages", bytes(Path(__file__).parents[2]), b"stack_trace"):
        assert place not in text


class Integers(nn.Module):
    """Weights as int8, dequantized by an operator and by arithmetic."""

    def __init__(self):
        super().__init__()
        self.register_buffer("codes", torch.randint(-127, 128, (6, 6), dtype=torch.int8))
        self.register_buffer("other", torch.randint(-127, 128, (6, 6), dtype=torch.int8))
        self.register_buffer("scale", torch.rand(6) + 0.1)
        self.register_buffer("zero", torch.zeros(6, dtype=torch.int8))

    def forward(self, values):
        weight = onnx_op(
            "DequantizeLinear", self.codes, self.scale, self.zero, opset=13, axis=1,
            compute=lambda codes, scale, zero: (codes.float() - zero.float()) * scale,
        )  # fmt: skip
        return {"result": values @ weight + values @ (self.other.float() * self.scale)}


def trace_module(module, path, inputs, axes=lambda name: {0: "batch_size"}, fold_constants=True):
    part = Part("model", module, module.forward, inputs)
    return tracing.trace_file(part, path, axes=axes, fold_constants=fold_constants)


@pytest.mark.parametrize(("fold_constants", "kept"), [(False, {"codes", "other"}), (True, {"codes"})])
def test_integer_weights_stay_unless_constants_may_be_folded(fold_constants, kept, tmp_path):
    module, values = Integers(), torch.randn(3, 6)
    path = trace_module(module, tmp_path / "m.onnx", {"values": values}, fold_constants=fold_constants)
    tensors = onnx.load(path).graph.initializer
    assert {tensor.name for tensor in tensors if tensor.data_type == onnx.TensorProto.INT8} - {"zero"} == kept
    wide, options = torch.randn(7, 6), ort.SessionOptions()
    # Which would round the values to 8 bits as well.
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    torch.testing.assert_close(
        torch.from_numpy(session.run(None, {"values": wide.numpy()})[0]), module(wide)["result"]
    )


class Fixed(nn.Module):
    def forward(self, values):
        return {"result": values * 2 if values.shape[1] == 4 else values}


def test_an_axis_that_the_tracer_fixed_is_an_error(tmp_path):
    axes = {0: "batch_size", 1: "sequence_length"}
    with pytest.raises(RuntimeError, match=r"fixed the axes sequence_length of the input 'values'"):
        trace_module(Fixed(), tmp_path / "m.onnx", {"values": torch.randn(3, 4)}, axes=lambda name: axes)
    assert not list(tmp_path.iterdir())


class Counting(nn.Module):
    def forward(self, values):
        return {"result": values * 2 if len(values) > 1 else values}


def test_a_length_that_the_model_asks_for_leaves_its_axis_open(tmp_path):
    length, wide = torch.Tensor.__len__, torch.randn(5, 4)
    path = trace_module(Counting(), tmp_path / "m.onnx", {"values": torch.randn(3, 4)})
    (result,) = ort.InferenceSession(path).run(None, {"values": wide.numpy()})
    torch.testing.assert_close(torch.from_numpy(result), wide * 2)
    assert torch.Tensor.__len__ is length


def test_weights_that_no_file_holds_lie_beside_it(tmp_path, monkeypatch):
    monkeypatch.setattr(saving, "MAX_BYTES", 100)
    layer, values = nn.Linear(64, 64), torch.randn(3, 64)
    call = layer.forward
    part = Part("model", layer, lambda input: {"result": call(input)}, {"input": values})
    path = tracing.trace_file(part, tmp_path / "model.onnx", axes=lambda name: {0: "batch_size"}, fold_constants=True)
    assert (tmp_path / "model.onnx.data").stat().st_size >= 64 * 64 * 4 > path.stat().st_size
    backend.finish(tmp_path, None, "feature-extraction")
    got = ExportedModel.from_pretrained(tmp_path)(input=values)["result"]
    torch.testing.assert_close(got, layer(values), atol=1e-5, rtol=0)


def test_tracing_is_quiet_and_leaves_everything_as_it_was(tmp_path, capfd):
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    optimize, mask = optimizer.optimize_ir, masking_utils.ALL_MASK_ATTENTION_FUNCTIONS["eager"]
    layer = Fixed()
    capfd.readouterr()
    trace_module(layer, tmp_path / "m.onnx", {"values": torch.randn(3, 4)}, axes=lambda name: {0: "batch_size"})
    assert capfd.readouterr() == ("", "")
    torch.set_rng_state(states[0])  # what made the inputs
    assert states[1:] == (random.getstate(), np.random.get_state()[1].tolist())
    assert optimizer.optimize_ir is optimize
    assert masking_utils.ALL_MASK_ATTENTION_FUNCTIONS["eager"] is mask
    assert "forward" not in vars(layer)
    assert logging.root.manager.disable < logging.WARNING


@pytest.mark.parametrize(
    ("family", "task"),
    [
        ("bert", "text-classification"),
        ("gpt2", "text-generation-with-past"),
        ("t5", "text2text-generation-with-past"),
        ("bart", "text2text-generation-with-past"),
        ("deit", "image-classification"),
        ("wav2vec2", "automatic-speech-recognition"),
        ("whisper", "automatic-speech-recognition-with-past"),
        ("detr", "object-detection"),
        ("bert-tied", "fill-mask"),
        ("bert-decoder", "text-generation-with-past"),
    ],
)
def test_the_default_task_is_that_of_the_class_with_a_cache_if_it_generates(family, task):
    model = {**FAMILIES, **VARIANTS}[family].make()
    assert backend.resolve_task(model, None) == task
    model.__class__ = type("Mine", (type(model),), {"__module__": "mine"})
    assert backend.resolve_task(model, None) == task


@pytest.mark.parametrize(
    ("family", "given", "resolved"),
    [
        ("t5", "summarization", "text2text-generation-with-past"),
        ("t5", "seq2seq-lm", "text2text-generation"),
        ("gpt2", "causal-lm", "text-generation"),
        ("gpt2", "causal-lm-with-past", "text-generation-with-past"),
        ("bert", "sequence-classification", "text-classification"),
    ],
)
def test_synonyms_of_a_task(family, given, resolved):
    assert backend.resolve_task(FAMILIES[family].make(), given) == resolved


def test_what_cannot_be_exported_is_told_with_what_can():
    with pytest.raises(ValueError, match=r"cannot export BertForSeq.*'telepathy'.* It can for: text-classification\."):
        backend.resolve_task(FAMILIES["bert"].make(), "telepathy")
    with pytest.raises(ValueError, match=r"the nearest is 'text-generation-with-past'"):
        backend.resolve_task(FAMILIES["gpt2"].make(), "text2text-generation-with-past")
    model = FAMILIES["bert"].make()
    model.__class__ = torch.nn.Module  # no class that Transformers has a task for
    with pytest.raises(ValueError, match=r"no ONNX export for the architecture 'bert' as Module.*fill-mask"):
        backend.resolve_task(model, None)


def test_random_inputs_are_those_of_the_tokenizer_and_the_same_every_time():
    roberta, bert = FAMILIES["roberta"].make(), FAMILIES["bert"].make()
    first, second = (backend.dummy_batches(bert, "text-classification") for _ in range(2))
    assert [set(batch) for batch in first] == 2 * [{"input_ids", "attention_mask", "token_type_ids"}]
    assert "token_type_ids" not in backend.dummy_batches(roberta, "text-classification")[0]
    assert all(torch.equal(a[name], b[name]) for a, b in zip(first, second, strict=True) for name in a)
    assert first[0]["input_ids"].shape != first[1]["input_ids"].shape
    assert not first[0]["attention_mask"].all()


@pytest.mark.slow
@pytest.mark.parametrize(("family", "task"), [one for one in EXPORTED if one != ("bart", "text-classification")])
def test_what_optimum_exports_is_exported_here_too(family, task, tmp_path):
    model = make(family, task)
    backend.trace(copy.deepcopy(model), tmp_path, backend.resolve_task(model, task), fold_constants=True)
    model.config.save_pretrained(tmp_path)
    backend.finish(tmp_path, model.config, task)
    assert set(json.loads((tmp_path / "export.json").read_text())["components"]) == {
        path.stem for path in tmp_path.glob("*.onnx")
    }
    runner = open_files(tmp_path, task)
    for batch in backend.dummy_batches(model, task):
        assert share(model, runner, batch) < 1e-4


def test_models_that_no_table_has_a_task_for_are_traced_from_a_batch(tmp_path):
    """CLIP, whose made-up batch has texts and images, and its images alone, from a batch that is given."""
    sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, projection_dim=8)
    images = dict(sizes, image_size=16, patch_size=8)
    text = dict(sizes, vocab_size=60, max_position_embeddings=20, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    whole = transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=images))
    alone = transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**images))
    batch = {"pixel_values": torch.randn(3, 3, 16, 16)}
    for model, given, outputs in ((whole, {}, "logits_per_image"), (alone, {"inputs": batch}, "image_embeds")):
        folder = export_onnx(model.eval(), tmp_path / outputs, latency_rounds=0, **given)
        assert outputs in {value.name for value in onnx.load(folder / "model.onnx").graph.output}


@pytest.mark.parametrize("family", ["trocr", "patchtst"])
def test_masks_of_all_rows_and_values_to_come(family, tmp_path):
    """TrOCR wants masks of the whole batch; what is forecast is a label, which nobody has who runs a file."""
    model, batch = ENTRIES[family].make(), ENTRIES[family].batch()
    export_onnx(model, tmp_path / "onnx", calibration=[batch], latency_rounds=0)
    runner = SingleFile(tmp_path / "onnx" / "model.onnx")
    assert not {"labels", "future_values"} & {*runner.input_names}
    given = model_inputs(model, batch)
    assert share(model, runner, {name: value[:1] for name, value in given.items()}) <= 1e-5


@pytest.mark.slow
def test_the_mask_of_a_sound_that_its_encoder_shortens(tmp_path):
    model, batch = ENTRIES["moonshine"].make(), ENTRIES["moonshine"].batch()
    batch["attention_mask"] = torch.ones_like(batch["input_values"]).long()
    batch["attention_mask"][1, 2000:] = 0
    export_onnx(model, tmp_path / "onnx", calibration=[batch], latency_rounds=0)
    runner = open_files(tmp_path / "onnx", "automatic-speech-recognition-with-past")
    given = model_inputs(model, batch)
    found, whole = (
        runner(inputs)["logits"] for inputs in (given, {**given, "attention_mask": given["attention_mask"] * 0 + 1})
    )
    assert torch.equal(found[0], whole[0])
    assert not torch.allclose(found[1], whole[1], atol=1e-3)


def test_a_decoder_that_reads_what_is_to_come_is_refused(tmp_path):
    entry = ENTRIES["informer"]
    with pytest.raises(RuntimeError, match="reads future_values, which the exporter of Transformers 5"):
        export_onnx(entry.make(), tmp_path / "onnx", calibration=[entry.batch()], latency_rounds=0)
    assert not list(tmp_path.iterdir())
