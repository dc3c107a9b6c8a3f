# SPDX-License-Identifier: Apache-2.0
"""Embeddings in the file: pooling and norm beside naive loops, and the folders that sentence-transformers reads."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from transformers import AutoModel, LlamaConfig, LlamaModel

from hfkdq import CompressionReport, QuantizationSpec, export_onnx
from hfkdq.export import OnnxSession
from hfkdq.export.choices import POOLINGS
from hfkdq.export.embeddings import FILES, Pooling, find_pooling, pool_
from tests import tiny

MASKS = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 0, 1, 1, 1], [0, 1, 0, 0, 0]])


def encoder():
    return tiny.bert().bert.eval()


def facts(folder):
    return json.loads((folder / "export_facts.json").read_text())


def write_files(folder, pooling=None, modules=("Transformer", "Pooling", "Normalize"), **settings):
    """What sentence-transformers writes beside a checkpoint."""
    (folder / "1_Pooling").mkdir()
    names = ["", "1_Pooling", *(f"{number}_{name}" for number, name in enumerate(modules) if number > 1)]
    listed = [
        {"idx": number, "name": str(number), "path": path, "type": f"sentence_transformers.models.{name}"}
        for number, (path, name) in enumerate(zip(names, modules, strict=True))
    ]
    (folder / "modules.json").write_text(json.dumps(listed))
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling or {"pooling_mode_cls_token": True}))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 24, "do_lower_case": True}))
    (folder / "config_sentence_transformers.json").write_text(
        json.dumps({"__version__": {}, "prompts": {"query": "query: "}, **settings})
    )


def saved(folder, **files):
    folder.mkdir()
    encoder().save_pretrained(folder)
    write_files(folder, **files)
    return AutoModel.from_pretrained(folder)


def by_hand(states, mask, mode):
    """One text after the other, one token after the other."""
    rows = []
    for tokens, seen in zip(states.double(), mask.tolist(), strict=True):
        kept = [(place + 1, token) for place, token in enumerate(tokens) if seen[place]]
        count = len(kept)
        rows.append({
            "cls": lambda: kept[0][1],  # noqa: B023
            "lasttoken": lambda: kept[-1][1],  # noqa: B023
            "max": lambda: torch.stack([token for _, token in kept]).amax(0),  # noqa: B023
            "mean": lambda: sum(token for _, token in kept) / count,  # noqa: B023
            "mean_sqrt_len_tokens": lambda: sum(token for _, token in kept) / math.sqrt(count),  # noqa: B023
            "weightedmean": lambda: sum(w * t for w, t in kept) / sum(w for w, _ in kept),  # noqa: B023
        }[mode]())  # fmt: skip
    return torch.stack(rows).float()


@pytest.mark.parametrize("mode", POOLINGS)
def test_pooling_is_that_of_loops(mode):
    states = torch.randn(4, 5, 3, generator=torch.Generator().manual_seed(0))
    found = Pooling((mode,), False, {}, {})(states, MASKS)
    torch.testing.assert_close(found, by_hand(states, MASKS, mode))
    unit = Pooling((mode,), True, {}, {})(states, MASKS)
    torch.testing.assert_close(unit, found / found.norm(dim=-1, keepdim=True))


def test_a_text_without_tokens_stays_finite_and_several_are_joined():
    states, none = torch.randn(1, 4, 3), torch.zeros(1, 4, dtype=torch.long)
    found = Pooling(("cls", "mean", "lasttoken"), True, {}, {})(states, none)
    assert found.shape == (1, 9)
    assert found.isfinite().all()


@pytest.mark.parametrize(("pooling", "unit"), [("mean", True), (["lasttoken", "cls"], None)])
def test_the_file_has_the_embedding_and_the_folder_the_files(tmp_path, pooling, unit):
    model = encoder()
    before = type(model)
    folder = export_onnx(
        model, tmp_path / "out", pooling=pooling, normalize=unit, processing_class=tiny.tokenizer(), latency_rounds=0
    )
    assert type(model) is before
    written = facts(folder)
    assert written["outputs"] == ["last_hidden_state", "sentence_embedding"]
    assert written["pooling"] == {"modes": ["mean"] if unit else ["cls", "lasttoken"], "normalize": bool(unit)}
    assert written["by_output"]["sentence_embedding"]["max_abs_diff"] < 1e-5
    assert written["model"]["architecture"] == "BertModel"
    batch = {**tiny.batch(model, size=3, seed=7)}
    batch["attention_mask"][1, 3:] = 0
    session = OnnxSession(folder / "model.onnx")
    found = session({name: value.numpy() for name, value in batch.items()})
    again = AutoModel.from_pretrained(folder)
    with torch.no_grad():
        states = again(**batch).last_hidden_state
    modes = ("mean",) if unit else ("cls", "lasttoken")
    wanted = torch.cat([by_hand(states, batch["attention_mask"], mode) for mode in modes], -1)
    wanted = wanted / wanted.norm(dim=-1, keepdim=True) if unit else wanted
    np.testing.assert_allclose(found["sentence_embedding"], wanted, rtol=0, atol=1e-5)
    # An exported folder says by itself how it is pooled.
    assert find_pooling(again, "feature-extraction", None, None).describe() == written["pooling"]


def test_integers_reach_the_embedding(tmp_path):
    model = encoder()
    folder = export_onnx(
        model, tmp_path / "out", quantization=QuantizationSpec(), calibration=[tiny.batch(model)], pooling="mean",
        normalize=True, latency_rounds=0,
    )  # fmt: skip
    written = facts(folder)
    assert written["fused_linears"] == written["quantized_linears"] - 1 == 12, (
        "all but the pooler, which is no part of it"
    )
    lengths = OnnxSession(folder / "model.onnx")({k: v.numpy() for k, v in tiny.batch(model).items()})
    np.testing.assert_allclose(np.linalg.norm(lengths["sentence_embedding"], axis=-1), 1, atol=1e-5)


def test_a_decoder_of_texts_has_its_last_token(tmp_path):
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=64
    )
    folder = export_onnx(
        LlamaModel(config).eval(), tmp_path / "out", pooling="lasttoken", normalize=True, latency_rounds=0
    )
    assert facts(folder)["outputs"] == ["last_hidden_state", "sentence_embedding"]


def test_the_folder_of_the_checkpoint_says_how(tmp_path):
    model = saved(tmp_path / "from", default_prompt_name="query", similarity_fn_name="dot", surprise=[1])
    folder = export_onnx(model, tmp_path / "out", latency_rounds=0)
    assert facts(folder)["pooling"] == {"modes": ["cls"], "normalize": True}
    settings = json.loads((folder / "config_sentence_transformers.json").read_text())
    assert settings["prompts"] == {"query": "query: "}
    assert (settings["default_prompt_name"], settings["similarity_fn_name"]) == ("query", "dot")
    assert "surprise" not in settings
    assert json.loads((folder / "sentence_bert_config.json").read_text()) == {
        "max_seq_length": 24,
        "do_lower_case": True,
    }
    assert find_pooling(model, "feature-extraction", "max", False).describe() == {"modes": ["max"], "normalize": False}
    plain = export_onnx(model, tmp_path / "plain", pooling="none", latency_rounds=0)
    assert "pooling" not in facts(plain)
    assert "sentence_embedding" not in facts(plain)["outputs"]
    assert not any((plain / name).exists() for name in FILES)


@pytest.mark.parametrize(
    "files",
    [
        {"modules": ("Transformer", "Pooling", "Dense", "Normalize")},
        {"modules": ("Transformer", "WeightedLayerPooling")},
        {"pooling": {"pooling_mode": "median"}},
        {"pooling": {"pooling_mode": "mean", "include_prompt": False}},
    ],
)
def test_what_is_not_exported_is_told(tmp_path, caplog, files):
    model = saved(tmp_path / "from", **files)
    assert find_pooling(model, "feature-extraction", None, None) is None
    assert "is not exported" in caplog.text
    assert find_pooling(model, "feature-extraction", "mean", None).modes == ("mean",)


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("modules.json", "{", "is damaged"),
        ("modules.json", '[{"idx": 0}]', "is damaged"),
        ("modules.json", "[" * 100_000, "is damaged"),
        ("1_Pooling/config.json", "[]", "is damaged"),
        ("sentence_bert_config.json", '{"max_seq_length": "long"}', "max_seq_length"),
        ("config_sentence_transformers.json", '{"prompts": {"a": 1}}', "prompts"),
        ("config_sentence_transformers.json", '{"prompts": NaN}', "is damaged"),
    ],
)
def test_damaged_files_are_named(tmp_path, name, text, told):
    model = saved(tmp_path / "from")
    (tmp_path / "from" / name).write_text(text)
    with pytest.raises(ValueError, match=rf"{name}.*{told}"):
        export_onnx(model, tmp_path / "out", latency_rounds=0)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("make", "arguments", "told"),
    [
        (encoder, {"pooling": "average"}, "pooling='average' does not exist"),
        (encoder, {"pooling": []}, "does not exist"),
        (encoder, {"pooling": ["mean", 3]}, "does not exist"),
        (encoder, {"pooling": True}, "pooling=True does not exist"),
        (encoder, {"normalize": True}, "pass pooling= too"),
        (encoder, {"pooling": "none", "normalize": True}, "leaves it out"),
        (tiny.bert, {"pooling": "mean"}, "out of the states of an encoder; BertForSequenceClassification"),
        (tiny.vit, {"normalize": False}, "ViTForImageClassification"),
        (tiny.t5, {"pooling": "mean"}, "T5ForConditionalGeneration"),
    ],
)
def test_what_makes_no_embedding_is_refused(tmp_path, make, arguments, told):
    with pytest.raises(ValueError, match=told):
        export_onnx(make(), tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()


def test_a_report_measures_the_embedding_of_the_file_everywhere(tmp_path):
    model, data = encoder(), tiny.text_dataset(16).remove_columns("labels")
    folder = export_onnx(model, tmp_path / "out", pooling="cls", processing_class=tiny.tokenizer(), latency_rounds=0)
    report = CompressionReport.measure(
        teacher=model, student=model, onnx=folder, eval_dataset=data, processing_class=tiny.tokenizer(),
        latency_rounds=0,
    )  # fmt: skip
    assert all(engine.metrics["spearman"] > 0.9999 for engine in report.engines), report.engines


@pytest.mark.parametrize("mode", POOLINGS)
def test_sentence_transformers_computes_the_same(tmp_path, mode):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    texts = ["w1 w2 w3", "w4", "w5 w6 w7 w8 w9 w2"]
    tokenizer = tiny.tokenizer()
    folder = export_onnx(
        encoder(), tmp_path / "out", pooling=mode, normalize=True, processing_class=tokenizer, latency_rounds=0
    )
    theirs = sentence_transformers.SentenceTransformer(str(folder), device="cpu")
    inputs = {name: np.asarray(value) for name, value in tokenizer(texts, padding=True).items()}
    ours = OnnxSession(folder / "model.onnx")(inputs)["sentence_embedding"]
    np.testing.assert_allclose(theirs.encode(texts, show_progress_bar=False), ours, rtol=0, atol=1e-5)


def test_a_pooled_model_is_copied_and_saved_as_what_it_was(tmp_path):
    import copy

    model = pool_(encoder(), Pooling(("mean",), True, {}, {}))
    twin = copy.deepcopy(model)
    batch = tiny.batch(model)
    assert torch.equal(twin(**batch)["sentence_embedding"], model(**batch)["sentence_embedding"])
    twin.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["BertModel"]


@pytest.mark.parametrize("mode", [5, None, {"a": 1}, ["mean", ["x"]]])
def test_a_pooling_mode_of_another_type_is_named(tmp_path, mode):
    write_files(tmp_path, {"pooling_mode": mode})
    model = encoder()
    model.config._name_or_path = str(tmp_path)
    with pytest.raises(ValueError, match=r"config\.json is damaged: pooling_mode is"):
        find_pooling(model, "feature-extraction", None, None)
