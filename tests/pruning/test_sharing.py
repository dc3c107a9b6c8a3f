# SPDX-License-Identifier: Apache-2.0
import copy
import pickle

import numpy as np
import pytest
import torch
from torch import nn
from transformers import Trainer, TrainerCallback
from transformers.testing_utils import CaptureLogger, LoggingLevel
from transformers.utils import logging

from hfkdq.facts import read_facts
from hfkdq.modeling import find_layer_stack
from hfkdq.pruning.clustering import cluster_values, cluster_weights
from hfkdq.pruning.file_size import METHODS, compressed_size
from hfkdq.pruning.sharing import restore_sharing_, share_layers, unshare_layers_
from hfkdq.quantization import QATCallback, load_quantized
from hfkdq.quantization.convert import prepare_qat_
from hfkdq.specs import QuantizationSpec

from .. import tiny
from ..families import FAMILIES

MAKERS = [tiny.bert, tiny.bert_mlm, tiny.distilbert, tiny.vit, tiny.llama, tiny.gpt2]


def _layers(model):
    return find_layer_stack(model).layers


def _logits(model):
    model.eval()
    with torch.no_grad():
        return model(**tiny.batch(model)).logits


def _shared_with(model, number):
    """Numbers of the layers all of whose parameters are those of layer `number`."""
    mine = [id(p) for p in _layers(model)[number - 1].parameters()]
    return [i for i, layer in enumerate(_layers(model), start=1) if [id(p) for p in layer.parameters()] == mine]


def _same(one, other):
    assert one.keys() == other.keys()
    return all(torch.equal(value, other[key]) for key, value in one.items())


# --------------------------------------------------------------------------- which layers share what


@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        (None, [[1, 2, 3, 4, 5, 6]]),
        (2, [[1, 2, 3], [4, 5, 6]]),
        (4, [[1, 2], [3], [4, 5], [6]]),  # as ALBERT's int(i / (num_hidden_layers / num_hidden_groups))
        ([[1, 3], [6, 2, 5]], [[1, 3], [6, 2, 5]]),
    ],
)
def test_layers_of_a_group_are_one_set_of_parameters(groups, expected):
    model = tiny.bert(layers=6)
    weights = {number: layer.state_dict() for number, layer in enumerate(copy.deepcopy(_layers(model)), start=1)}
    size = sum(p.numel() for p in _layers(model)[0].parameters())
    before = model.num_parameters()

    assert share_layers(model, groups) is model
    assert model.config.hfkdq["sharing"] == {"layers": expected}
    for group in expected:
        for number in group:
            assert _shared_with(model, number) == sorted(group)
            assert _same(_layers(model)[number - 1].state_dict(), weights[group[0]])
    named = sum(len(group) - 1 for group in expected)
    assert model.num_parameters() == before - named * size


def test_even_groups_are_those_of_albert():
    for total in range(1, 9):
        model = tiny.bert(layers=total)
        for count in range(1, total + 1):
            groups = share_layers(model, count).config.hfkdq["sharing"]["layers"]
            where = {layer: i for i, group in enumerate(groups) for layer in group}
            assert where == {i + 1: int(i / (total / count) + 1e-9) for i in range(total)}


def test_a_group_may_start_from_the_mean_of_its_layers():
    model = tiny.bert(layers=3)
    before = [layer.attention.self.query.weight.detach().clone() for layer in _layers(model)]
    share_layers(model, [[1, 3]], init="mean")
    torch.testing.assert_close(_layers(model)[2].attention.self.query.weight.detach(), (before[0] + before[2]) / 2)
    assert torch.equal(_layers(model)[1].attention.self.query.weight, before[1])


def test_sharing_anew_starts_from_the_layers_as_they_are():
    model = share_layers(tiny.bert(layers=4), 1)
    share_layers(model, 2)
    assert [_shared_with(model, number) for number in (1, 3)] == [[1, 2], [3, 4]]


def test_gradients_are_the_sum_over_the_layers():
    shared = share_layers(tiny.bert(layers=3).double(), [[1, 3]])
    apart = unshare_layers_(copy.deepcopy(shared))
    assert "sharing" not in read_facts(apart)
    assert len({id(p) for layer in _layers(apart) for p in layer.parameters()}) == 3 * len(
        [*_layers(apart)[0].parameters()]
    )
    inputs = {**tiny.batch(shared), "labels": torch.tensor([0, 1, 2, 0])}
    for model in (shared, apart):
        model(**inputs).loss.backward()
    parts = [dict(layer.named_parameters()) for layer in _layers(apart)]
    for name, parameter in _layers(shared)[0].named_parameters():
        torch.testing.assert_close(parameter.grad, parts[0][name].grad + parts[2][name].grad)
    for name, parameter in _layers(shared)[1].named_parameters():
        torch.testing.assert_close(parameter.grad, parts[1][name].grad)


# --------------------------------------------------------------------------- files


@pytest.mark.parametrize("make", MAKERS)
def test_the_checkpoint_is_a_plain_one(make, tmp_path):
    model = share_layers(make(layers=3))
    expected, plain = _logits(model), make(layers=3)
    assert model.state_dict().keys() == plain.state_dict().keys()
    model.save_pretrained(tmp_path)
    with LoggingLevel(logging.WARNING), CaptureLogger(logging.get_logger("transformers")) as said:
        loaded = type(model).from_pretrained(tmp_path)
    assert not said.out
    assert torch.equal(_logits(loaded), expected)
    assert loaded.num_parameters() == plain.num_parameters() > model.num_parameters()

    assert restore_sharing_(loaded) is loaded
    assert _shared_with(loaded, 1) == [1, 2, 3]
    assert loaded.num_parameters() == model.num_parameters()
    assert torch.equal(_logits(loaded), expected)
    loaded.save_pretrained(tmp_path / "again")


def test_parts_of_a_shared_model_can_be_saved_too(tmp_path):
    model = share_layers(tiny.bert(layers=2))
    model.bert.save_pretrained(tmp_path)
    loaded = type(model.bert).from_pretrained(tmp_path)
    assert _same(loaded.encoder.layer[0].state_dict(), model.bert.encoder.layer[1].state_dict())


def _copied(model):
    return copy.deepcopy(model)


def _pickled(model):
    return pickle.loads(pickle.dumps(model))


def _converted(model):
    return model.to(torch.bfloat16).float()


@pytest.mark.parametrize("change", [_copied, _pickled, _converted])
def test_sharing_survives(change, tmp_path):
    model = change(share_layers(tiny.bert(layers=3), [[1, 2]]))
    assert [_shared_with(model, number) for number in (1, 3)] == [[1, 2], [3]]
    model.save_pretrained(tmp_path)
    assert torch.equal(_logits(type(model).from_pretrained(tmp_path)), _logits(model))
    with pytest.raises(RuntimeError, match="differ in what is to be loaded"):
        model.load_state_dict(tiny.bert(seed=1, layers=3).state_dict())


def test_the_parameters_themselves_are_not_copied():
    model = share_layers(tiny.bert(layers=2))
    kept = model.state_dict(keep_vars=True)
    name = "bert.encoder.layer.{}.output.dense.weight"
    assert kept[name.format(0)] is kept[name.format(1)]
    assert model.state_dict()[name.format(0)].data_ptr() == _layers(model)[0].output.dense.weight.data_ptr()


def test_layers_that_differ_are_not_loaded_into_shared_ones():
    model, other = share_layers(tiny.bert(layers=2)), tiny.bert(seed=1, layers=2)
    with pytest.raises(RuntimeError, match=r"layer\.0\.\S+ and \S+layer\.1\.\S+ are one parameter .* differ"):
        model.load_state_dict(other.state_dict())
    with pytest.raises(RuntimeError, match="assign=True would make them two"):
        model.load_state_dict(share_layers(other).state_dict(), assign=True)
    model.load_state_dict(other.state_dict())
    assert _same(model.state_dict(), other.state_dict())
    unshare_layers_(model).load_state_dict(tiny.bert(seed=2, layers=2).state_dict())
    assert not torch.equal(_layers(model)[0].output.dense.weight, _layers(model)[1].output.dense.weight)


def test_layers_trained_apart_are_not_tied_again(tmp_path):
    model = share_layers(tiny.bert(layers=3))
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    with torch.no_grad():
        _layers(loaded)[2].output.dense.bias[0] += 1e-3
    with pytest.raises(ValueError, match=r"output\.dense\.bias of layers 1 and 3 differ.*unshare_layers_"):
        restore_sharing_(loaded)
    assert _shared_with(loaded, 1) == [1]
    plain = tiny.bert(layers=2)
    assert _same(restore_sharing_(plain).state_dict(), tiny.bert(layers=2).state_dict())


# --------------------------------------------------------------------------- training


class _Interrupt(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == 4


def _trainer(training_arguments, folder, model, callbacks=(), **kwargs):
    args = training_arguments(folder, max_steps=8, save_strategy="steps", save_steps=4, **kwargs)
    data = tiny.text_dataset()
    return Trainer(
        model, args, train_dataset=data, eval_dataset=data, processing_class=tiny.tokenizer(), callbacks=[*callbacks]
    )


def test_a_resumed_training_equals_an_uninterrupted_one(training_arguments, tmp_path):
    def make():
        return share_layers(tiny.bert(layers=3, hidden_dropout_prob=0.1), [[1, 2, 3]])

    whole = _trainer(training_arguments, "whole", make())
    whole.train()
    held = [p for group in whole.optimizer.param_groups for p in group["params"]]
    assert sum(p.numel() for p in held) == whole.model.num_parameters()
    assert _shared_with(whole.model, 1) == [1, 2, 3]

    _trainer(training_arguments, "cut", make(), [_Interrupt()]).train()
    resumed = _trainer(training_arguments, "cut", make())
    resumed.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-4"))
    assert _shared_with(resumed.model, 1) == [1, 2, 3]
    assert _same(resumed.model.state_dict(), whole.model.state_dict())
    assert not torch.equal(_layers(whole.model)[0].output.dense.weight, _layers(make())[0].output.dense.weight)


def test_the_best_model_is_loaded_into_shared_parameters(training_arguments, tmp_path):
    model = share_layers(tiny.bert(layers=2))
    trainer = _trainer(
        training_arguments, "out", model, eval_strategy="steps", eval_steps=4, load_best_model_at_end=True,
        learning_rate=0.5,
    )  # fmt: skip
    trainer.train()
    assert _shared_with(model, 1) == [1, 2]
    best = type(model).from_pretrained(trainer.state.best_model_checkpoint)
    assert _same(model.state_dict(), best.state_dict())
    other = ({"checkpoint-4", "checkpoint-8"} - {trainer.state.best_model_checkpoint.rpartition("/")[2]}).pop()
    assert not _same(model.state_dict(), type(model).from_pretrained(tmp_path / "out" / other).state_dict())


@pytest.mark.parametrize("settings", [{}, {"weight_bits": 4, "weight_estimator": "learned"}])
def test_shared_layers_are_trained_with_fake_quantizers(settings, training_arguments, tmp_path):
    model = share_layers(tiny.bert(layers=2))
    trainer = _trainer(training_arguments, "qat", model, [QATCallback(QuantizationSpec(**settings))])
    trainer.train()
    assert _shared_with_quantizers(model)
    trainer.save_model(str(tmp_path / "saved"))
    loaded = load_quantized(tmp_path / "saved")
    torch.testing.assert_close(_logits(loaded), _logits(model), rtol=0, atol=1e-6)
    assert _shared_with_quantizers(restore_sharing_(loaded))
    torch.testing.assert_close(_logits(loaded), _logits(model), rtol=0, atol=1e-6)


def _shared_with_quantizers(model):
    """Whether both layers have the same weights, each with activation ranges of its own."""
    one, other = (layer.output.dense for layer in _layers(model))
    own = one.activation_quantizer is not other.activation_quantizer
    return one.weight is other.weight and one.bias is other.bias and own and type(one) is not nn.Linear


# --------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    "groups", [0, 4, True, 1.5, [], [[]], [1, 2], [[0, 1]], [[1, 4]], [[1, 2], [2, 3]], [[1, 1]], [["1", "2"]], "all"]
)
def test_groups_that_are_none_are_refused(groups):
    model = tiny.bert(layers=3)
    with pytest.raises(ValueError, match=r"groups=.*1 to 3"):
        share_layers(model, groups)
    assert not read_facts(model)


def _wider(layer):
    layer.output.dense = nn.Linear(70, 32)


def _without_bias(layer):
    layer.output.dense = nn.Linear(64, 32, bias=False)


def _in_half(layer):
    layer.output.dense.to(torch.bfloat16)


def _frozen(layer):
    layer.output.dense.requires_grad_(False)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_wider, r"output\.dense\.weight is .*\(32, 64\).* in layer 1 and .*\(32, 70\).* in layer 3"),
        (_without_bias, r"layer 1 has output\.dense\.bias, layer 3 has not"),
        (_in_half, r"output\.dense\.weight is trained, float32 .* and trained, bfloat16"),
        (_frozen, r"output\.dense\.weight is trained, .* and frozen, "),
    ],
)
def test_layers_that_are_not_alike_are_refused(change, said):
    model = tiny.bert(layers=3)
    change(_layers(model)[2])
    with pytest.raises(ValueError, match=said):
        share_layers(model)
    assert _shared_with(model, 1) == [1]
    share_layers(model, [[1, 2]])
    assert _shared_with(model, 1) == [1, 2]


def test_models_that_cannot_share_are_refused():
    with pytest.raises(TypeError, match="PreTrainedModel, got Linear"):
        share_layers(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="init='last'"):
        share_layers(tiny.bert(), init="last")
    with pytest.raises(ValueError, match="share_layers first"):
        share_layers(prepare_qat_(tiny.bert(), QuantizationSpec()))
    model = tiny.bert()
    query = _layers(model)[0].attention.self.query
    query.weight = nn.Parameter(torch.zeros(32, 32, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"attention\.self\.query\.weight of layer 1 is torch\.int8"):
        share_layers(model)


# --------------------------------------------------------------------------- clusters


def _naive_clusters(values, clusters):
    """Lloyd's algorithm in float64, one centroid at a time, and a cut through the worst cluster for each empty one."""
    centroids = np.linspace(values.min(), values.max(), clusters)
    before = None
    for _ in range(99):
        if (values == 0).any():
            centroids[np.abs(centroids).argmin()] = 0.0
        nearest = np.abs(values[:, None] - centroids[None, :]).argmin(axis=1)
        members = [values[nearest == j] for j in range(len(centroids))]
        if before is None or (nearest != before).any():
            before = nearest
            centroids = np.array([part.mean() if len(part) else c for part, c in zip(members, centroids, strict=True)])
            continue
        parts = [part for part in members if len(part)]
        options = []  # (error, part, values to take out of it)
        for i, part in enumerate(parts):
            if not (part == 0).any():
                options.append((((part - part.mean()) ** 2).sum(), i, part > part.mean()))
                continue
            for sign in (-1, 1):
                side = part[part * sign > 0]
                if len(side):
                    options.append(((side**2).sum(), i, part * sign >= side.mean() * sign))
        options = sorted((o for o in options if o[2].any()), key=lambda option: -option[0])[: clusters - len(parts)]
        if not options:
            return centroids[nearest]
        pieces = [parts[i][out] for _, i, out in options]
        for i in {i for _, i, _ in options}:
            parts[i] = parts[i][~np.logical_or.reduce([out for _, j, out in options if j == i])]
        centroids = np.sort([0.0 if (part == 0).any() else part.mean() for part in parts + pieces])
        before = None
    raise AssertionError("the cases of these tests should settle sooner")


@pytest.mark.parametrize("clusters", [2, 5, 16])
@pytest.mark.parametrize("pruned", [0.0, 0.6])
@pytest.mark.parametrize("outlier", [0.5, 40.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_clusters_are_those_of_a_naive_search(clusters, pruned, outlier, dtype):
    generator = torch.Generator().manual_seed(clusters)
    weight = torch.randn(40, 30, generator=generator).to(dtype)
    weight[0, 0] = outlier
    weight[torch.rand(40, 30, generator=generator) < pruned] = 0.0
    found = cluster_values(weight, clusters)
    expected = torch.from_numpy(_naive_clusters(weight.double().flatten().numpy(), clusters)).view(40, 30).to(dtype)
    assert found.dtype == dtype
    torch.testing.assert_close(found, expected, rtol=1e-6 if dtype.itemsize > 2 else 0, atol=0)
    assert len(found.unique()) == clusters  # none is spent on nothing between outliers
    assert (found[weight == 0] == 0).all()
    assert torch.equal(cluster_values(found, clusters), found)


def test_few_values_stay_as_they_are():
    # Of these, k-means would see no more than rounding between the two in the middle.
    weight = torch.tensor([0.0, 4.0, 4.0 + 1e-12, 9.0], dtype=torch.float64)
    assert torch.equal(cluster_values(weight, 4), weight)
    assert len(cluster_values(weight, 3).unique()) == 3


def test_values_near_zero_are_told_from_it_beside_outliers():
    weight = torch.tensor([0.0, 0.0, 0.1, 0.1, -0.1, 40.0, 40.001])
    torch.testing.assert_close(cluster_values(weight, 4), torch.tensor([0.0, 0.0, 0.1, 0.1, -0.1, 40.0005, 40.0005]))


@pytest.mark.parametrize("make", [tiny.bert, tiny.gpt2, tiny.bert_mlm])
def test_layers_and_embeddings_take_few_values_and_the_rest_stays(make):
    model = make()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    plain = {id(p): name for name, p in model.named_parameters()}
    modules = [m for m in model.modules() if type(m).__name__ in ("Linear", "Conv1D", "Embedding")]
    chosen = {plain[id(m.weight)] for m in modules}
    assert cluster_weights(model, 8) is model
    now = dict(model.named_parameters())
    error = sum(float((now[n].detach() - before[n]).double().square().sum()) for n in chosen)
    spread = sum(float(before[n].double().var(correction=0)) * before[n].numel() for n in chosen)
    fact = model.config.hfkdq["clustering"]
    assert fact == {"clusters": 8, "modules": len(chosen), "relative_error": pytest.approx(error / spread, rel=1e-4)}
    assert 0.005 < fact["relative_error"] < 0.05  # of a normal distribution 3 bits leave 0.035 at best
    for name, parameter in now.items():
        if name in chosen:
            assert len(parameter.unique()) <= 8
            assert not torch.equal(parameter, before[name])
        else:
            assert torch.equal(parameter, before[name])


def test_tied_weights_are_clustered_once_and_stay_tied():
    model = share_layers(tiny.bert_mlm(layers=3))
    count = len({id(m.weight) for m in model.modules() if isinstance(m, (nn.Linear, nn.Embedding))})
    cluster_weights(model, 4)
    assert model.config.hfkdq["clustering"]["modules"] == count
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert _shared_with(model, 1) == [1, 2, 3]


def test_patterns_choose_what_is_clustered():
    model = tiny.bert()
    cluster_weights(model, 4, target_modules=["query", "value"], exclude_modules=r".*layer\.1\..*")
    few = {n for n, p in model.named_parameters() if p.dim() == 2 and p.numel() > 100 and len(p.unique()) <= 4}
    assert few == {f"bert.encoder.layer.0.attention.self.{part}.weight" for part in ("query", "value")}
    resnet = cluster_weights(tiny.resnet(), 4, target_modules=["convolution"])
    assert len(resnet.resnet.embedder.embedder.convolution.weight.unique()) <= 4


def test_what_cannot_be_clustered_is_refused():
    model = tiny.bert_mlm()
    before = copy.deepcopy(model.state_dict())
    for clusters in (1, 0, True, 2.5):
        with pytest.raises(ValueError, match="at least 2"):
            cluster_weights(model, clusters)
    with pytest.raises(TypeError, match="got Linear"):
        cluster_weights(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"target_modules=\['qery'\].*for example: bert"):
        cluster_weights(model, target_modules=["qery"])
    with pytest.raises(ValueError, match=r"word_embeddings is chosen and .*decoder is excluded"):
        cluster_weights(model, exclude_modules=["decoder"])
    assert _same(model.state_dict(), before)
    assert not read_facts(model)
    with pytest.raises(ValueError, match="fake quantizers"):
        cluster_weights(prepare_qat_(tiny.bert(), QuantizationSpec()))
    broken = tiny.bert()
    _layers(broken)[1].output.dense.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"layer\.1\.output\.dense .* finite"):
        cluster_weights(broken)


# --------------------------------------------------------------------------- sizes


def _size(model, folder, method, **kwargs):
    model.save_pretrained(folder)
    return compressed_size(folder, method, **kwargs)


def test_clustered_and_shared_models_are_small_once_compressed(tmp_path):
    def make():
        return tiny.bert(layers=4, hidden=64)

    plain = {method: _size(make(), tmp_path / "plain", method) for method in METHODS}
    assert all(size.files == ("model.safetensors",) for size in plain.values())
    for method in METHODS:
        clustered = _size(cluster_weights(make(), 16), tmp_path / "clustered", method)
        assert clustered.bytes_before == pytest.approx(plain[method].bytes_before, rel=0.01)
        # 4 of 32 bits, and what the compressor's own format costs.
        assert clustered.bytes < 0.25 * plain[method].bytes, method
    layer = 4 * sum(p.numel() for p in _layers(make())[0].parameters())
    shared = _size(share_layers(make()), tmp_path / "shared", "xz")
    assert shared.bytes < plain["xz"].bytes - 3 * 0.85 * layer
    # It cannot find a layer again that lies further back than it remembers.
    assert layer > 65536
    short = _size(share_layers(make()), tmp_path / "shared", "xz", dictionary=65536)
    assert short.bytes > 0.97 * plain["xz"].bytes


def test_sizes_are_those_of_real_compressed_files(tmp_path):
    import bz2
    import gzip
    import lzma
    import zipfile

    data = np.random.default_rng(0).integers(0, 9, size=400_000, dtype=np.uint8).tobytes()
    (tmp_path / "a.onnx").write_bytes(data)
    (tmp_path / "a.onnx_data").write_bytes(data[:1000])
    (tmp_path / "tokenizer.json").write_text("{}")
    with zipfile.ZipFile(tmp_path / "all.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(tmp_path / "a.onnx", "a.onnx")
        archive.write(tmp_path / "a.onnx_data", "a.onnx_data")
    real = {
        "xz": sum(len(lzma.compress(part, preset=6)) for part in (data, data[:1000])),
        "gzip": sum(len(gzip.compress(part, 6)) for part in (data, data[:1000])),
        "bz2": sum(len(bz2.compress(part)) for part in (data, data[:1000])),
        "zip": (tmp_path / "all.zip").stat().st_size,
    }
    for method in METHODS:
        size = compressed_size(tmp_path, method)
        assert size.files == ("a.onnx", "a.onnx_data")
        assert size.bytes_before == len(data) + 1000
        assert size.method == method
        assert size.bytes == pytest.approx(real[method], abs=200)
    assert compressed_size(tmp_path / "tokenizer.json").files == ("tokenizer.json",)
    assert len(compressed_size(tmp_path, "gzip", files=["*"]).files) == 4


def test_what_cannot_be_measured_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"method='rar' is none of xz, gzip, bz2, zip"):
        compressed_size(tmp_path, "rar")
    with pytest.raises(ValueError, match="no file and no folder"):
        compressed_size(tmp_path / "missing")
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"no file like \*\.safetensors.*it holds pytorch_model\.bin.*files="):
        compressed_size(tmp_path)
    with pytest.raises(ValueError, match="4,096 to 1,610,612,736"):
        compressed_size(tmp_path, dictionary=2**31)


@pytest.mark.parametrize("layers", [2, 3])
def test_encoder_decoders_are_refused(layers):
    model = FAMILIES["bart"].make(encoder_layers=2, decoder_layers=layers)
    with pytest.raises(ValueError, match="2 stacks of layers"):
        share_layers(model)
