# SPDX-License-Identifier: Apache-2.0
import copy
import json
import logging
import random
import warnings
from functools import partial

import numpy as np
import pytest
import torch
import transformers
from packaging.version import Version
from safetensors.torch import load_file
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    ViTImageProcessor,
    pipeline,
)

from hfkdq import QATCallback, QuantizationSpec, quantize
from hfkdq import export_onnx as export_and_time
from hfkdq.export.job import ExportJob
from hfkdq.export.runner import open_files
from hfkdq.quantization import activation_ranges, prepare_qat_, quantized_modules, quantized_spec, strip_quantizers_
from tests import tiny

ON_V5 = Version(transformers.__version__) >= Version("4.58")
optimum_line = pytest.mark.skipif(ON_V5, reason="Optimum's exporter needs transformers<4.58")
INT8 = QuantizationSpec()
export_onnx = partial(export_and_time, latency_rounds=0)


@pytest.fixture(autouse=True)
def _one_thread():
    # Tiny models gain nothing from more, and sessions that wait for work would compete with torch.
    torch.set_num_threads(1)


def batches(model, count=3):
    return [tiny.batch(model, size=8, seed=seed) for seed in range(count)]


def facts(folder):
    return json.loads((folder / "export_facts.json").read_text())


def trained(make, spec, training_arguments, **kwargs):
    """A model after three steps of quantization-aware training with the plain Trainer."""
    model = make()
    text = model.main_input_name == "input_ids"
    trainer = Trainer(
        model,
        training_arguments(max_steps=3, **kwargs),
        train_dataset=tiny.text_dataset() if text else tiny.image_dataset(),
        data_collator=DataCollatorWithPadding(tiny.tokenizer()) if text else None,
        callbacks=[QATCallback(spec)] if spec else None,
    )
    trainer.train()
    return trainer.model


def nodes(folder):
    import onnx

    graph = onnx.load(folder / "model.onnx").graph
    return graph, {op: [node for node in graph.node if node.op_type == op] for op in {n.op_type for n in graph.node}}


def constants(graph):
    from onnx import numpy_helper

    return {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}


def onnx_logits(folder, batch):
    return open_files(folder, facts(folder)["task"])(batch)["logits"]


@pytest.mark.parametrize(
    ("make", "task"),
    [
        (tiny.bert, "text-classification"),
        (tiny.distilbert, "text-classification"),
        (tiny.vit, "image-classification"),
        (tiny.bert_mlm, "fill-mask"),
    ],
)
def test_float(make, task, tmp_path):
    model = make()
    before = copy.deepcopy(model.state_dict())
    folder = export_onnx(model, tmp_path / "new" / "onnx", calibration=batches(model))
    assert folder == tmp_path / "new" / "onnx"
    assert {file.name for file in folder.iterdir()} <= {
        "model.onnx", "model.safetensors", "config.json", "generation_config.json", "export_facts.json",
        "model.onnx.data", "export.json",  # the second exporter's own
    }  # fmt: skip
    written = facts(folder)
    assert (written["kind"], written["task"], written["opset"], written["samples"]) == ("float32", task, 18, 24)
    assert written["max_abs_diff"] <= 1e-5 * written["max_abs_logit"]
    assert written["top1_agreement"] == 1.0
    assert written["bytes"] == (folder / "model.onnx").stat().st_size
    assert written["spec"] is None
    batch = tiny.batch(model, size=3, seed=7)
    with torch.no_grad():
        expected = model(**batch).logits
        reloaded = type(model).from_pretrained(folder)(**batch).logits
    torch.testing.assert_close(onnx_logits(folder, batch), expected, rtol=0, atol=1e-5)
    assert torch.equal(reloaded, expected)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("make", "spec"),
    [
        (tiny.bert, INT8),
        (tiny.bert, QuantizationSpec(range_estimator="learned")),
        (tiny.bert, QuantizationSpec(activation_bits=None)),
        (tiny.distilbert, QuantizationSpec(range_estimator="min_max", exclude_modules=["classifier"])),
        (tiny.vit, INT8),
        (tiny.bert, QuantizationSpec(weight_bits=4)),
        (tiny.resnet, QuantizationSpec(weight_bits=6)),
    ],
)
def test_trained_int8(make, spec, tmp_path, training_arguments):
    model = trained(make, spec, training_arguments).eval()
    state = copy.deepcopy(model.state_dict())
    folder = export_onnx(model, tmp_path / "onnx", quantization=spec, calibration=batches(model))
    written = facts(folder)
    bits, activations = spec.weight_bits, spec.activation_bits
    assert written["kind"] == (f"int{bits}_weights" if activations is None else "int8" if bits == 8 else f"w{bits}a8")
    assert written["max_abs_diff"] <= 0.05 * written["max_abs_logit"]
    assert QuantizationSpec.from_dict(written["spec"]) == spec
    linears = {n: m for n, m in quantized_modules(model).items() if isinstance(m, torch.nn.Linear)}
    assert written["quantized_linears"] == len(linears)
    assert written["fused_linears"] == (len(linears) if spec.activation_bits else 0)
    assert written["float_linears"] == sum(type(module) is torch.nn.Linear for module in model.modules())

    graph, operators = nodes(folder)
    values = constants(graph)
    stored = {value.tobytes() for value in values.values() if value.dtype in (np.int8, np.uint8)}
    attention = [
        values[node.input[1]] for node in operators.get("QAttention", [])
    ]  # query, key and value side by side
    stored |= {part.tobytes() for codes in attention for part in np.split(codes, 3, axis=1)}
    for module in quantized_modules(model).values():
        wanted = module.integer_weight().numpy().astype(np.int8)
        # As MatMul wants them or as Gather does, and unsigned where products of int8 saturate.
        unsigned = (wanted.astype(np.int16) + 128).astype(np.uint8)
        assert {codes.tobytes() for codes in (wanted.T, wanted, unsigned.T, unsigned)} & stored
    quantizers = {(values[n.input[1]].item(), values[n.input[2]].item()) for n in operators.get("QuantizeLinear", [])}
    assert quantizers == {(r["scale"], r["zero_point"]) for r in activation_ranges(model).values()}

    assert quantized_spec(model) == spec
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    make().save_pretrained(tmp_path / "plain")
    assert set(load_file(folder / "model.safetensors")) == set(load_file(tmp_path / "plain" / "model.safetensors"))
    recorded = json.loads((folder / "config.json").read_text())["hfkdq"]["quantization"]
    assert recorded["ranges"] == activation_ranges(model)


def test_int8_logits_equal_torch_under_padding(tmp_path, training_arguments):
    model = trained(tiny.bert, INT8, training_arguments).eval()
    folder = export_onnx(model, tmp_path / "onnx", quantization=INT8)
    batch = tiny.batch(model, size=4, seed=5)
    assert not batch["attention_mask"].all()
    with torch.no_grad():
        expected = model(**batch).logits
        unquantized = strip_quantizers_(copy.deepcopy(model))(**batch).logits
    got = onnx_logits(folder, batch)
    # One code that a rounding tie moves is the most that may differ; quantization itself is larger.
    assert (got - expected).abs().mean() < 0.2 * (unquantized - expected).abs().mean()


def test_query_key_and_value_share_one_quantizer(tmp_path, training_arguments):
    model = trained(tiny.bert, INT8, training_arguments)
    _, operators = nodes(export_onnx(model, tmp_path / "onnx", quantization=INT8))
    assert len(operators["QuantizeLinear"]) == 2 * 4 + 2  # a layer has four inputs; then pooler and classifier


def test_dynamic(tmp_path):
    model = tiny.bert()
    folder = export_onnx(model, tmp_path / "onnx", quantization="dynamic", calibration=batches(model))
    written = facts(folder)
    assert written["kind"] == "dynamic"
    assert 1e-4 < written["max_abs_diff"] / written["max_abs_logit"] < 0.3
    assert "MatMulInteger" in nodes(folder)[1]
    export_onnx(tiny.vit(), tmp_path / "vit", quantization="dynamic")


def test_int8_file_is_a_quarter_of_the_float_file(tmp_path):
    model = tiny.bert(hidden=256, layers=2)
    int8 = export_onnx(model, tmp_path / "int8", quantization=INT8, calibration=batches(model, 1), tolerance=1.0)
    weights = QuantizationSpec(activation_bits=None)
    weight_only = export_onnx(model, tmp_path / "weights", quantization=weights)
    size = facts(export_onnx(model, tmp_path / "float"))["bytes"]
    assert facts(int8)["bytes"] <= 0.30 * size
    assert facts(weight_only)["bytes"] <= 0.30 * size


def test_float_and_dynamic_of_a_trained_model_use_its_float_weights(tmp_path, training_arguments):
    model = trained(tiny.vit, INT8, training_arguments).eval()
    folder = export_onnx(model, tmp_path / "float", quantization="float32")
    batch = tiny.batch(model)
    with torch.no_grad():
        expected = strip_quantizers_(copy.deepcopy(model))(**batch).logits
    got = onnx_logits(folder, batch)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    assert quantized_spec(model) == INT8


def test_the_trained_integers_are_the_default(tmp_path):
    spec = QuantizationSpec(weight_bits=2)
    model = quantize(tiny.bert(layers=1), spec, [tiny.batch(tiny.bert())])
    written = facts(export_onnx(model, tmp_path / "onnx"))
    assert written["kind"] == "w2a8"
    assert QuantizationSpec.from_dict(written["spec"]) == spec


def test_calibration_quantizes_a_copy_of_an_untrained_model(tmp_path):
    model = tiny.bert()
    folder = export_onnx(
        model,
        tmp_path / "onnx",
        quantization=INT8,
        processing_class=tiny.tokenizer(),
        calibration=tiny.text_dataset(rows=80),
        tolerance=0.2,
    )
    assert facts(folder)["samples"] == 64
    assert facts(folder)["fused_linears"] == facts(folder)["quantized_linears"] == 14
    assert quantized_spec(model) is None
    assert not hasattr(model.config, "hfkdq")


def test_all_of_a_one_shot_iterable_is_observed(tmp_path):
    model = tiny.vit()
    few = batches(model, 8)
    wide = {"pixel_values": 100 * few[0]["pixel_values"]}  # the ninth batch: no comparison needs it
    spec = QuantizationSpec(range_estimator="min_max")
    observed = []
    for name, data in (("few", iter(few)), ("all", iter([*few, wide]))):
        folder = export_onnx(model, tmp_path / name, quantization=spec, calibration=data, tolerance=1.0)
        ranges = json.loads((folder / "config.json").read_text())["hfkdq"]["quantization"]["ranges"]
        observed.append({name: entry["scale"] for name, entry in ranges.items()})
    assert any(observed[1][name] > scale for name, scale in observed[0].items())


@optimum_line
def test_processing_class_and_pipelines(tmp_path):
    from optimum.onnxruntime import ORTModelForSequenceClassification

    model = tiny.bert()
    folder = export_onnx(model, tmp_path / "onnx", processing_class=tiny.tokenizer())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = ["w1 w2 w3", "w4"]
    torch_pipe = pipeline("text-classification", model=model, tokenizer=tokenizer)
    ort_pipe = pipeline(
        "text-classification", model=ORTModelForSequenceClassification.from_pretrained(folder), tokenizer=tokenizer
    )
    for expected, got in zip(torch_pipe(texts), ort_pipe(texts), strict=True):
        assert got["label"] == expected["label"]
        assert got["score"] == pytest.approx(expected["score"], abs=1e-5)
    assert AutoModelForSequenceClassification.from_pretrained(folder).num_labels == 3
    export_onnx(tiny.vit(), tmp_path / "vit", processing_class=ViTImageProcessor(size={"height": 8, "width": 8}))
    assert (tmp_path / "vit" / "preprocessor_config.json").is_file()


def test_mixed_precision_training_leaves_no_trace(tmp_path, training_arguments):
    model = trained(tiny.bert, INT8, training_arguments, bf16=True)
    folder = export_onnx(model, tmp_path / "onnx", quantization=INT8)
    assert facts(folder)["fused_linears"] == 14
    assert "_original_forward" in vars(model)  # as Accelerate left it
    half = tiny.vit().to(torch.bfloat16)
    export_onnx(half, tmp_path / "half")
    assert half.dtype == torch.bfloat16


def test_a_decoder_without_cache(tmp_path):
    model = tiny.llama()
    written = facts(export_onnx(model, tmp_path / "float", task="text-generation"))
    assert written["task"] == "text-generation"
    assert written["max_abs_diff"] <= 1e-5 * written["max_abs_logit"]


def test_is_quiet_and_leaves_random_numbers_alone(tmp_path, capfd, caplog):
    export_onnx(tiny.vit(), tmp_path / "first")
    model = tiny.bert_mlm()
    torch.rand(1), random.random(), np.random.rand()  # no longer where a seed would put them
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    optimum = logging.getLogger("optimum")
    level = optimum.level
    optimum.setLevel(logging.WARNING)  # as a user has it
    optimum.addHandler(caplog.handler)
    transformers.utils.logging.disable_progress_bar()  # Transformers 5 has one for saving
    capfd.readouterr()
    caplog.clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        export_onnx(model, tmp_path / "a", quantization="dynamic")
    assert not [str(warning.message) for warning in caught]
    transformers.utils.logging.enable_progress_bar()
    optimum.removeHandler(caplog.handler)
    optimum.setLevel(level)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert capfd.readouterr() == ("", "")
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1:] == (random.getstate(), np.random.get_state()[1].tolist())


def bad_arguments():
    quantized = prepare_qat_(tiny.bert(), INT8)
    text, image = tiny.text_dataset(), tiny.image_dataset()
    return {
        "no model": (torch.nn.Linear(2, 2), {}, TypeError, "PreTrainedModel, got Linear"),
        "unknown kind": (tiny.bert(), {"quantization": "int9"}, ValueError, "'int9' does not exist"),
        "no spec": (tiny.bert(), {"quantization": 8}, TypeError, "or one of .* got int"),
        "tolerance": (tiny.bert(), {"tolerance": 0.0}, ValueError, "must be a positive number"),
        "untrained": (tiny.bert(), {"quantization": INT8}, ValueError, r"pass calibration="),
        "no range seen": (quantized, {"quantization": INT8}, ValueError, "have seen no data"),
        "other spec": (
            quantized, {"quantization": QuantizationSpec(activation_bits=None)}, ValueError, "spec it was trained with"
        ),
        "task": (tiny.bert(), {"task": "image-classification"}, ValueError, "It can for: .*text-classification"),
        "no such task": (tiny.bert(), {"task": "telepathy"}, ValueError, "'telepathy'"),
        "columns": (tiny.vit(), {"calibration": text}, ValueError, "columns input_ids.* takes pixel_values"),
        "batches of another model": (
            tiny.vit(), {"calibration": [tiny.batch(tiny.bert())]}, ValueError, "columns input_ids.* takes pixel_values"
        ),
        "uneven texts": (
            tiny.bert(), {"calibration": text}, ValueError, "make no batch: .* Pass the processing_class= that pads"
        ),
        "no batch": (tiny.vit(), {"calibration": []}, ValueError, "calibration is empty"),
        "no batches": (tiny.vit(), {"calibration": [1]}, TypeError, "iterable of int"),
        "learned": (
            tiny.vit(),
            {"quantization": QuantizationSpec(range_estimator="learned"), "calibration": image},
            ValueError, "learned",
        ),
    }  # fmt: skip


@pytest.mark.parametrize("case", bad_arguments())
def test_bad_arguments(case, tmp_path):
    model, arguments, error, message = bad_arguments()[case]
    with pytest.raises(error, match=message):
        export_onnx(model, tmp_path / "new" / "onnx", **arguments)
    assert not list(tmp_path.iterdir())


def test_an_existing_folder_is_not_touched(tmp_path):
    (tmp_path / "onnx").mkdir()
    with pytest.raises(FileExistsError, match=r"onnx exists\. Export to a new folder"):
        export_onnx(tiny.bert(), tmp_path / "onnx")
    assert not list((tmp_path / "onnx").iterdir())


def test_a_difference_past_the_bound_leaves_nothing(tmp_path):
    model = tiny.bert()
    with pytest.raises(
        RuntimeError, match=r"dynamic ONNX file differs .* up to 0\.\d+ .* largest logit .* allowed is"
    ):
        export_onnx(model, tmp_path / "new" / "onnx", quantization="dynamic", tolerance=1e-4)
    assert not list(tmp_path.iterdir())


def test_nan_never_passes(tmp_path):
    model = tiny.bert()
    model.classifier.bias.data[1] = float("nan")
    with pytest.raises(RuntimeError, match="torch model gives NaN or infinity in 'logits'"):
        export_onnx(model, tmp_path / "onnx", tolerance=1e9)
    assert not list(tmp_path.iterdir())


FAULTS = {
    "a full disk at the weights": (
        "transformers.PreTrainedModel.save_pretrained",
        OSError(28, "No space left on device"),
    ),
    "a full disk at the graph": ("hfkdq.export.graph.save_graph", OSError(28, "No space left on device")),
    "a report that cannot be written": ("pathlib.Path.write_text", PermissionError("denied")),
    "no memory": ("hfkdq.export.job.run_torch", MemoryError()),
    "an interruption": ("hfkdq.export.job.compare", KeyboardInterrupt()),
    "an end": ("hfkdq.export.job.open_files", SystemExit(143)),
    "a fault of the exporter": ("hfkdq.export.job.ExportJob.write_files", RuntimeError("of the exporter")),
    "a fault of the runtime": ("onnxruntime.InferenceSession.__init__", RuntimeError("of the runtime")),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_leaves_nothing_and_the_next_export_is_fine(name, tmp_path, monkeypatch):
    place, fault = FAULTS[name]
    model, deep = tiny.bert(), tmp_path / "deep" / "onnx"

    def fails(*args, **kwargs):
        raise fault

    with monkeypatch.context() as patch:
        patch.setattr(place, fails, raising=name != "an end")
        if name == "an end":
            patch.setattr("hfkdq.export.runner.open_files", fails)
        with pytest.raises(type(fault)):
            export_onnx(model, deep, latency_rounds=0)
    assert list(tmp_path.iterdir()) == []
    assert export_onnx(model, deep, latency_rounds=0) == deep
    assert sorted(path.name for path in deep.parent.iterdir()) == ["onnx"]


def test_two_exports_into_one_folder_lose_nothing(tmp_path, monkeypatch):
    """The second is told while the first is at work; what somebody makes meanwhile stays beside the finished work."""
    model, write = tiny.bert(), ExportJob.write

    def slow(source, kind, folder):
        with pytest.raises(FileExistsError, match="Another process is writing"):
            export_onnx(model, tmp_path / "onnx", latency_rounds=0)
        (tmp_path / "onnx").mkdir()
        (tmp_path / "onnx" / "theirs").write_text("theirs")
        return write(source, kind, folder)

    monkeypatch.setattr(ExportJob, "write", slow)
    assert export_onnx(model, tmp_path / "onnx", latency_rounds=0) == tmp_path / "onnx-2"
    assert (tmp_path / "onnx-2" / "model.onnx").is_file()
    assert [path.name for path in (tmp_path / "onnx").iterdir()] == ["theirs"]


def test_an_architecture_that_the_exporter_does_not_know_is_traced_from_a_batch(tmp_path):
    """On both lines; equal to the model, as every export is. What PyTorch itself has no operators for is told in one line."""
    sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    vision = transformers.DINOv3ViTModel(transformers.DINOv3ViTConfig(**sizes, image_size=32, patch_size=8)).eval()
    batch = {"pixel_values": torch.randn(3, 3, 32, 32)}
    assert (export_onnx(vision, tmp_path / "vision", inputs=batch, latency_rounds=0) / "model.onnx").is_file()
    text = transformers.ErnieForSequenceClassification(transformers.ErnieConfig(**sizes, vocab_size=40)).eval()
    assert (export_onnx(text, tmp_path / "text", latency_rounds=0) / "model.onnx").is_file()
    config = transformers.FNetConfig(vocab_size=40, hidden_size=16, num_hidden_layers=1, intermediate_size=32)
    fourier = transformers.FNetForSequenceClassification(config).eval()
    if transformers.__version__.startswith("5"):  # whose exporter has an operator for it
        assert (export_onnx(fourier, tmp_path / "fnet", latency_rounds=0) / "model.onnx").is_file()
        return
    with pytest.raises(RuntimeError, match=r"cannot write FNet.*fft.*Nothing was written"):
        export_onnx(fourier, tmp_path / "fnet", latency_rounds=0)
    assert not (tmp_path / "fnet").exists()


def test_weights_that_the_model_reads_without_a_call_stay_in_floating_point(tmp_path, caplog):
    """WavLM's attention gives the weights of its layers to a function of PyTorch."""
    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=12)
    convolutions = dict(conv_dim=(8, 8), conv_stride=(5, 2), conv_kernel=(10, 3), num_conv_pos_embeddings=4)
    config = transformers.WavLMConfig(**sizes, **convolutions, num_conv_pos_embedding_groups=2, num_buckets=8)
    model = transformers.WavLMForCTC(config).eval()
    sounds = [{"input_values": torch.randn(2, 800)}]
    quantize(model, QuantizationSpec(activation_bits=None), sounds)
    folder = export_onnx(model, tmp_path / "onnx", inputs=sounds[0], latency_rounds=0)
    assert "never calls" in caplog.text
    facts = json.loads((folder / "export_facts.json").read_text())
    assert facts["max_abs_diff"] <= 1e-4 * facts["max_abs_logit"]
