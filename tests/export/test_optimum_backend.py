# SPDX-License-Identifier: Apache-2.0
import copy
import functools
import operator
import random
import shutil
from collections import Counter

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
import transformers
from onnx import numpy_helper
from packaging.version import Version
from transformers import GPT2Config, VisionEncoderDecoderConfig, VisionEncoderDecoderModel, ViTConfig, pipeline

from benchmarks.models.entries import ENTRIES
from hfkdq import QuantizationSpec
from hfkdq.export.graph import improve, multiplies_exactly
from hfkdq.export.lowering import lower_quantizers_
from hfkdq.export.runner import open_files
from hfkdq.quantization import activation_quantizers, quantize

from .. import tiny
from ..families import FAMILIES, VARIANTS
from .tasks import EXPORTED, TASKS, make

if Version(transformers.__version__) >= Version("4.58"):
    pytest.skip("Optimum's exporter needs transformers<4.58", allow_module_level=True)

import optimum.onnxruntime
from optimum.exporters.tasks import TasksManager

from hfkdq.export import optimum_backend as backend
from hfkdq.export.optimum_attention import PlainAttention, plain_attention


def exported(model, folder, task, *, traced=None, fold_constants=True):
    """The folder with the model's checkpoint and files."""
    model.save_pretrained(folder)
    files = backend.trace(
        copy.deepcopy(model) if traced is None else traced, folder, task, fold_constants=fold_constants
    )
    backend.finish(folder, model.config, task)
    return files


@torch.no_grad()
def differences(model, run, batches):
    """Largest difference of each output, as a share of its largest value."""
    shares = {}
    for batch in batches:
        expected = model(**batch)
        for name, got in run(batch).items():
            mask = batch.get("attention_mask") if "decoder_input_ids" not in batch else None
            want = expected[name]
            if mask is not None and want.ndim > 2 and want.shape[:2] == mask.shape:
                want, got = want[mask.bool()], got[mask.bool()]
            share = ((want - got).abs().max() / want.abs().max()).item()
            shares[name] = max(share, shares.get(name, 0.0))
    return shares


@pytest.mark.parametrize(("family", "task"), EXPORTED)
def test_what_optimum_exports_equals_torch(family, task, tmp_path):
    model = make(family, task)
    batches = backend.dummy_batches(model, task)
    exported(model, tmp_path, backend.resolve_task(model, task))
    shares = differences(model, open_files(tmp_path, task), batches)
    assert shares
    assert max(shares.values()) < 1e-4


def test_the_table_is_what_optimum_says():
    for family, tasks in TASKS.items():
        model_type = make(family, "feature-extraction").config.model_type
        listed = set(TasksManager.get_supported_tasks_for_model_type(model_type, "onnx", library_name="transformers"))
        # Several files that no ORTModelFor... class reads.
        assert {task for task, refused in tasks.items() if refused is None} == listed - {
            "feature-extraction-with-past"
        }


@pytest.mark.parametrize("family", TASKS)
def test_a_refused_task_gets_the_list_of_the_others(family):
    model = make(family, "feature-extraction")
    for task, reason in TASKS[family].items():
        if reason is None:
            assert backend.resolve_task(model, task) == task
            continue
        with pytest.raises(ValueError, match=reason) as caught:
            backend.resolve_task(model, task)
        listed = str(caught.value).split("It can for: ")[1].rstrip(".").split(", ")
        assert set(listed) == {task for task, refused in TASKS[family].items() if refused is None}


@pytest.mark.parametrize(
    ("family", "task"),
    [
        ("bert", "text-classification"),
        ("gpt2", "text-generation-with-past"),
        ("llama", "text-generation-with-past"),
        ("t5", "text2text-generation-with-past"),
        ("bart", "text2text-generation-with-past"),
        ("deit", "image-classification"),
        ("wav2vec2", "automatic-speech-recognition"),
        ("whisper", "automatic-speech-recognition-with-past"),
        ("detr", "object-detection"),
    ],
)
def test_the_default_task_is_that_of_the_class_with_a_cache_if_it_generates(family, task):
    model = FAMILIES[family].make()
    assert backend.resolve_task(model, None) == task
    model.__class__ = type("Mine", (type(model),), {"__module__": "mine"})
    assert backend.resolve_task(model, None) == task


@pytest.mark.parametrize(
    ("family", "given", "resolved"),
    [
        ("t5", "summarization", "text2text-generation-with-past"),
        ("t5", "translation", "text2text-generation-with-past"),
        ("t5", "seq2seq-lm", "text2text-generation"),
        ("t5", "text2text-generation", "text2text-generation"),
        ("gpt2", "causal-lm", "text-generation"),
        ("gpt2", "causal-lm-with-past", "text-generation-with-past"),
        ("bert", "sequence-classification", "text-classification"),
    ],
)
def test_synonyms_of_a_task(family, given, resolved):
    assert backend.resolve_task(FAMILIES[family].make(), given) == resolved


def test_the_one_task_that_optimum_has_for_heads_is_that_of_a_head_in_no_table():
    model = ENTRIES["patchtst"].make()
    assert backend.resolve_task(model, None) == "time-series-forecasting"
    assert backend.resolve_task(model.model, None) == "feature-extraction"


def test_an_architecture_that_optimum_lacks_gets_the_nearest_names():
    model = FAMILIES["bert"].make()
    model.config.model_type = "robertta"
    with pytest.raises(ValueError, match=r"no ONNX export for the architecture 'robertta'.*nearest.* roberta,"):
        backend.resolve_task(model, None)
    model = make("bert", "feature-extraction")
    model.__class__ = torch.nn.Module  # no class that Transformers has a task for
    model.config = FAMILIES["bert"].make().config
    with pytest.raises(ValueError, match=r"cannot tell the task of Module. Pass one as task=: .*fill-mask"):
        backend.resolve_task(model, None)


GENERATING = {
    "gpt2": ("ORTModelForCausalLM", {"pad_token_id": 0}),
    "llama": ("ORTModelForCausalLM", {}),
    # Transformers' own cache has as many layers as the encoder.
    "t5": ("ORTModelForSeq2SeqLM", {"num_decoder_layers": 2}),
    "bart": ("ORTModelForSeq2SeqLM", {}),
    "whisper": ("ORTModelForSpeechSeq2Seq", {}),
}


@pytest.fixture(scope="module")
def generating(tmp_path_factory):
    """A model that generates and its exported folder, by family."""

    @functools.cache
    def export(family):
        model = FAMILIES[family].make(**GENERATING[family][1])
        folder = tmp_path_factory.mktemp(family)
        exported(model, folder, backend.resolve_task(model, None))
        return model, folder

    return export


@pytest.mark.parametrize("family", GENERATING)
def test_generation_through_optimum_gives_the_tokens_of_torch(family, generating):
    model, folder = generating(family)
    ort_model = getattr(optimum.onnxruntime, GENERATING[family][0]).from_pretrained(folder)
    inputs = FAMILIES[family].batch(size=3, seed=1)
    inputs.pop("decoder_input_ids", None)
    if not model.config.is_encoder_decoder:
        inputs = {name: value.flip(1) for name, value in inputs.items()}  # padded on the left
        assert not inputs["attention_mask"][-1, 0]
    for beams in (1, 3):
        wanted = {"max_new_tokens": 8, "do_sample": False, "num_beams": beams}
        expected = model.generate(**inputs, **wanted)
        assert len(expected.unique()) > 2
        assert torch.equal(ort_model.generate(**inputs, **wanted), expected)


def test_a_picture_is_described_in_words(tmp_path):
    torch.manual_seed(0)
    ids = {"decoder_start_token_id": 1, "pad_token_id": 0, "eos_token_id": 2}
    encoder = ViTConfig(**FAMILIES["vit"].settings)
    decoder = GPT2Config(**FAMILIES["gpt2"].settings, add_cross_attention=True, is_decoder=True)
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder, **ids)
    model = VisionEncoderDecoderModel(config).eval()
    task = backend.resolve_task(model, None)
    assert task == "image-to-text-with-past"
    exported(model, tmp_path, task)
    runner, batches = open_files(tmp_path, task), backend.dummy_batches(model, task)
    assert differences(model, runner, batches)["logits"] < 1e-4
    assert differences(model, runner.incremental_decode, batches)["logits"] < 1e-4
    ort_model = optimum.onnxruntime.ORTModelForVision2Seq.from_pretrained(tmp_path)
    inputs = {**FAMILIES["vit"].batch(), "max_new_tokens": 8, "decoder_start_token_id": 1, "pad_token_id": 0}
    assert torch.equal(ort_model.generate(**inputs), model.generate(**inputs))


def test_weights_beside_their_files_stay_beside_them(tmp_path, monkeypatch):
    model, task = make("bart", "text2text-generation"), "text2text-generation-with-past"
    model.save_pretrained(tmp_path)
    with monkeypatch.context() as patch:
        patch.setenv("FORCE_ONNX_EXTERNAL_DATA", "1")  # as above 2 GB
        files = backend.trace(copy.deepcopy(model), tmp_path, task, fold_constants=True)
    assert [file.name for file in files] == [
        "decoder_model.onnx",
        "decoder_with_past_model.onnx",
        "encoder_model.onnx",
    ]
    backend.finish(tmp_path, model.config, task)
    beside = {file.name for file in tmp_path.glob("*_data")}
    assert beside == {"encoder_model.onnx_data", "decoder_model_merged.onnx_data"}
    assert differences(model, open_files(tmp_path, task), backend.dummy_batches(model, task))["logits"] < 1e-4


def test_files_without_a_cache_say_so(tmp_path):
    model = make("gpt2", "text-generation")
    exported(model, tmp_path, "text-generation")
    runner = open_files(tmp_path, "text-generation")
    with pytest.raises(ValueError, match="have no cache"):
        runner.incremental_decode(FAMILIES["gpt2"].batch())
    with pytest.raises(ValueError, match=r"take input_ids, attention_mask; got pixel_values"):
        runner({"pixel_values": torch.zeros(1, 3, 8, 8)})


def test_a_folder_holds_the_merged_decoder_and_nothing_of_optimums(generating):
    names = {"config.json", "generation_config.json", "model.safetensors"}
    assert {file.name for file in generating("gpt2")[1].iterdir()} == names | {"model.onnx"}
    merged = {"encoder_model.onnx", "decoder_model_merged.onnx"}
    assert {file.name for file in generating("bart")[1].iterdir()} == names | merged


@pytest.mark.parametrize(("family", "task"), [("gpt2", "text-generation"), ("t5", "summarization")])
def test_pipelines(family, task, generating):
    model, folder = generating(family)
    ort_model = getattr(optimum.onnxruntime, GENERATING[family][0]).from_pretrained(folder)
    wanted = {"max_new_tokens": 6, "do_sample": False}
    texts = ["w1 w2 w3", "w4 w5 w6"]
    expected, got = (
        pipeline(task, model=each, tokenizer=tiny.tokenizer())(texts, **wanted) for each in (model, ort_model)
    )
    assert got == expected


@pytest.mark.parametrize("family", ["gpt2", "llama-tied", "t5", "whisper"])
def test_trained_integers_survive_the_merge_of_the_decoders(family, tmp_path):
    changes = GENERATING.get(family, ("", {}))[1]
    entry = {**FAMILIES, **VARIANTS}[family]
    model = quantize(entry.make(**changes), QuantizationSpec(), [entry.batch(4, seed) for seed in range(3)]).eval()
    task = backend.resolve_task(model, None)
    lowered = copy.deepcopy(model)
    lower_quantizers_(lowered)
    model.save_pretrained(tmp_path)
    files = backend.trace(lowered, tmp_path, task, fold_constants=False)
    for file in files:
        improve(file, target="onnxruntime", unsigned=not multiplies_exactly())
    parts = [codes(file) for file in files if "encoder_model" not in file.name]
    apart = open_files(shutil.copytree(tmp_path, tmp_path / "apart"), task)
    backend.finish(tmp_path, model.config, task)
    merged = codes(next(file for file in tmp_path.glob("*.onnx") if "encoder_model" not in file.name))
    assert merged == functools.reduce(operator.or_, parts)  # what both decoders have is there once
    assert len(merged) > 10
    runner, batches = open_files(tmp_path, task), backend.dummy_batches(model, task)
    for batch in batches:  # in one runtime, as the same integers; which may round to either side in torch
        for run in ("__call__", "incremental_decode"):
            whole, separate = (getattr(each, run)(batch)["logits"] for each in (runner, apart))
            torch.testing.assert_close(whole, separate, rtol=0, atol=1e-5 * separate.abs().max().item())
    allowed = 2 * moved_at_ties(model, batches) + 1e-4
    assert differences(model, runner, batches)["logits"] < allowed
    assert differences(model, runner.incremental_decode, batches)["logits"] < allowed


@torch.no_grad()
def moved_at_ties(model, batches):
    """How far logits move, as a share of the largest, where numbers near a tie of two integers round to either.

    The order of sums decides what they round to; an error of 1e-3 of a step is what test_ties.py allows them.
    """
    generator = torch.Generator().manual_seed(0)

    def shake(quantizer, args):
        step = quantizer.qparams()[0] * 1e-3
        return (args[0] + step * (2 * torch.rand(args[0].shape, generator=generator) - 1), *args[1:])

    plain = [model(**batch).logits for batch in batches]
    hooks = [q.register_forward_pre_hook(shake) for q in activation_quantizers(model).values()]
    moved = [
        ((model(**batch).logits - want).abs().max() / want.abs().max()).item()
        for batch, want in zip(batches, plain, strict=True)
        for _ in range(20)
    ]
    for hook in hooks:
        hook.remove()
    return max(moved)


def codes(file):
    """How often a file has which weight of bytes."""
    tensors = [numpy_helper.to_array(tensor) for tensor in onnx.load(file).graph.initializer]
    return Counter(array.tobytes() for array in tensors if array.dtype in (np.int8, np.uint8) and array.ndim == 2)


@pytest.mark.parametrize(("family", "task"), [("llama-tied", "text-generation-with-past"), ("bert-tied", "fill-mask")])
def test_a_head_tied_to_its_embedding_is_written_once(family, task, tmp_path):
    model = VARIANTS[family].make()
    embedding = model.get_input_embeddings().weight
    (file,) = exported(model, tmp_path, task)
    shapes = [tuple(tensor.dims) for tensor in onnx.load(file).graph.initializer]
    assert shapes.count(tuple(embedding.shape)) + shapes.count(tuple(embedding.shape[::-1])) == 1


@pytest.mark.parametrize("family", ["bert", "distilbert", "vit", "wav2vec2", "gpt2", "llama", "bart"])
def test_attention_leaves_no_arithmetic_on_shapes(family, tmp_path):
    model = FAMILIES[family].make()
    for file in exported(model, tmp_path, backend.resolve_task(model, None).removesuffix("-with-past")):
        improve(file, target="onnxruntime")
        operators = Counter(node.op_type for node in onnx.load(file).graph.node)
        assert not operators.keys() & {"Sqrt", "IsNaN"} - ({"Sqrt"} if family == "llama" else set())  # its norms
        assert operators["Softmax"] > 1
    if family == "bert":  # one mask for all queries
        assert not operators.keys() & {"Expand", "Where"}


@pytest.mark.parametrize("mask", ["none", "bool", "float", "causal"])
@pytest.mark.parametrize("heads", [4, 2, 1])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_plain_attention_is_torchs(mask, heads, scale):
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 4, 5, 8, generator=generator)
    key, value = (torch.randn(2, heads, 6, size, generator=generator) for size in (8, 3))
    allowed = torch.rand(2, 1, 5, 6, generator=generator) > 0.4
    allowed[..., 0] = True
    given = {"none": None, "causal": None, "bool": allowed, "float": torch.where(allowed, 0.5, -1e9)}[mask]
    arguments = dict(attn_mask=given, is_causal=mask == "causal", scale=scale, enable_gqa=True)
    expected = F.scaled_dot_product_attention(query, key, value, **arguments)
    torch.testing.assert_close(plain_attention(query, key, value, **arguments), expected)
    with PlainAttention():
        through_torch = F.scaled_dot_product_attention(query, key, value, **arguments)
    assert torch.equal(through_torch, plain_attention(query, key, value, **arguments))


def test_plain_attention_of_a_query_that_sees_nothing_is_finite():
    query, value = torch.randn(1, 1, 2, 4), torch.randn(1, 1, 3, 4)
    nothing = torch.zeros(2, 3, dtype=torch.bool)
    got = plain_attention(query, value, value, attn_mask=nothing)
    torch.testing.assert_close(got, value.mean(2, keepdim=True).expand_as(query))


def test_dummy_batches_are_the_same_at_every_call_and_leave_random_numbers_alone():
    model = make("bart", "text2text-generation")
    first = backend.dummy_batches(model, "text2text-generation-with-past")
    torch.rand(1), np.random.rand(), random.random()
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    second = backend.dummy_batches(model, "text2text-generation-with-past")
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1:] == (np.random.get_state()[1].tolist(), random.getstate())
    assert [batch["decoder_input_ids"].shape for batch in first] == [(8, 16), (3, 8)]
    for one, other in zip(first, second, strict=True):
        assert one.keys() == other.keys() == {"input_ids", "attention_mask", "decoder_input_ids"}
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_model_whose_sizes_have_names_that_optimum_does_not_read_has_random_inputs():
    stages = transformers.RTDetrResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 8, 16, 16],
        depths=[1] * 4,
        layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )
    config = transformers.RTDetrConfig(
        backbone_config=stages, encoder_in_channels=[8, 16, 16], d_model=32, decoder_layers=1
    )
    model = transformers.RTDetrForObjectDetection(config)
    assert {batch["pixel_values"].shape[1] for batch in backend.dummy_batches(model, "object-detection")} == {3}


def test_heads_of_another_width_than_the_model_keep_two_decoders(tmp_path):
    """As flan-t5-small has them; `ORTModelForSeq2SeqLM` starts a merged decoder with a past of the wrong width."""
    model = FAMILIES["t5"].make(d_kv=16, num_layers=2, num_decoder_layers=2)
    exported(model, tmp_path, "text2text-generation-with-past")
    assert {file.name for file in tmp_path.glob("*.onnx")} == {
        "encoder_model.onnx", "decoder_model.onnx", "decoder_with_past_model.onnx"
    }  # fmt: skip
    ort_model = optimum.onnxruntime.ORTModelForSeq2SeqLM.from_pretrained(tmp_path)
    inputs = FAMILIES["t5"].batch(size=3, seed=1)
    del inputs["decoder_input_ids"]
    wanted = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(ort_model.generate(**inputs, **wanted), model.generate(**inputs, **wanted))
