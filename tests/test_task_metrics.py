# SPDX-License-Identifier: Apache-2.0
"""The usual metrics of every task: against values by hand, and alike for a model, its file and any batch size."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import transformers as tf
from datasets import Dataset

from hfkdq import CompressionReport, QuantizationSpec, export_onnx
from hfkdq.collators import TeacherCollator
from hfkdq.export.runner import open_files
from hfkdq.measuring.evaluation import Evaluation, with_decoder_inputs
from hfkdq.metrics import answer_features, answer_metrics, metrics_for

from . import tiny
from .families import FAMILIES

RNG = np.random.default_rng(0)


def evaluation(model, data, tmp_path, processor=None, collator=None, batch_size=3):
    processor = tiny.tokenizer() if processor is None else processor
    metrics = metrics_for(model, processor, data)
    return Evaluation(data, metrics, processor, collator, batch_size, str(tmp_path / "trainer"))


def measured(model, data, tmp_path, **settings):
    return evaluation(model, data, tmp_path, **settings).metrics("the model", model)


def logits_of(model, data, *names):
    with torch.no_grad():
        return [model(**{name: torch.tensor([row[name]]) for name in names or ("input_ids",)}).logits for row in data]


# ---------------------------------------------------------------------- against values by hand


def test_one_label(tmp_path):
    model, data = tiny.bert(layers=1), tiny.text_dataset(11)
    right = [int(logits.argmax()) == row["labels"] for logits, row in zip(logits_of(model, data), data, strict=True)]
    assert measured(model, data, tmp_path)["accuracy"] == pytest.approx(np.mean(right))


def test_a_regression(tmp_path):
    model = tiny.bert(layers=1, labels=1)
    rows = tiny.text_dataset(11)
    values = [float(value) for value in RNG.normal(size=11)]
    data = rows.remove_columns("labels").add_column("labels", values)
    found = np.concatenate([logits.numpy().ravel() for logits in logits_of(model, data)])
    metrics = measured(model, data, tmp_path)
    assert metrics["pearson"] == pytest.approx(np.corrcoef(found, values)[0, 1], abs=1e-5)
    ranks = [np.argsort(np.argsort(numbers)) for numbers in (found, values)]
    assert metrics["spearman"] == pytest.approx(np.corrcoef(*ranks)[0, 1], abs=1e-5)
    assert metrics["mse"] == pytest.approx(np.square(found - values).mean(), rel=1e-4)


def test_the_metric_that_counts_stands_first():
    metrics = metrics_for(tiny.bert(labels=1))
    found = metrics(tf.EvalPrediction(np.array([[0.1], [0.2], [0.4]]), np.array([0.1, 0.3, 0.2])))
    assert list(found) == ["spearman", "pearson", "mse"]
    assert found["spearman"] == pytest.approx(0.5)


def test_several_labels(tmp_path):
    model, rows = tiny.bert(layers=1), tiny.text_dataset(11)
    labels = RNG.integers(0, 2, size=(11, 3)).astype(float).tolist()
    data = rows.remove_columns("labels").add_column("labels", labels)
    found = torch.cat(logits_of(model, data)).numpy() > 0
    true = np.array(labels) > 0
    metrics = measured(model, data, tmp_path)
    assert metrics["f1"] == pytest.approx(2 * (found & true).sum() / (found.sum() + true.sum()))
    assert metrics["accuracy"] == pytest.approx((found == true).all(-1).mean())


def test_entities_are_whole(tmp_path):
    names = ["O", "B-x", "I-x"]
    model = tiny.bert_tokens(layers=1, id2label=dict(enumerate(names)), label2id={n: i for i, n in enumerate(names)})
    data = tiny.token_dataset(9)
    collator = tf.DataCollatorForTokenClassification(tiny.tokenizer())
    metrics = measured(model, data, tmp_path, collator=collator)

    def entities(labels):
        """Begin, end and kind, as seqeval reads lists: an I- that follows no entity begins one."""
        found, start = set(), None
        for place, name in enumerate([*labels, "O"]):
            if start is not None and (name == "O" or name[0] == "B"):
                found.add((start, place))
                start = None
            if name != "O" and (name[0] == "B" or start is None):
                start = place
        return found

    hits = ours = theirs = 0
    for logits, row in zip(logits_of(model, data), data, strict=True):
        valid = np.array(row["labels"]) != -100
        said = entities([names[i] for i in logits[0].argmax(-1).numpy()[valid]])
        true = entities([names[i] for i in np.array(row["labels"])[valid]])
        hits, ours, theirs = hits + len(said & true), ours + len(said), theirs + len(true)
    assert hits > 0
    assert metrics["precision"] == pytest.approx(hits / ours)
    assert metrics["recall"] == pytest.approx(hits / theirs)
    assert metrics["f1"] == pytest.approx(2 * hits / (ours + theirs))


@pytest.mark.parametrize("kind", ["next", "masked"])
def test_language_models(tmp_path, kind):
    model = tiny.llama() if kind == "next" else tiny.bert_mlm()
    data = tiny.text_dataset(9).remove_columns("labels")
    labels = [list(row["input_ids"]) if kind == "next" else [-100, *row["input_ids"][1:]] for row in data]
    data = data.add_column("labels", labels)
    collator = tf.DataCollatorForTokenClassification(tiny.tokenizer())
    losses, hits, shift = [], [], int(kind == "next")
    for logits, row in zip(logits_of(model, data), labels, strict=True):
        scores = logits[0, : len(row) - shift].double().log_softmax(-1)
        for place, label in enumerate(row[shift:]):
            if label != -100:
                losses.append(-float(scores[place, label]))
                hits.append(int(scores[place].argmax()) == label)
    metrics = measured(model, data, tmp_path, collator=collator)
    assert metrics["accuracy"] == pytest.approx(np.mean(hits))
    assert metrics["perplexity"] == pytest.approx(np.exp(np.mean(losses)), rel=1e-4)


def test_answers_come_from_the_best_window(tmp_path):
    tokenizer = tiny.tokenizer()
    words = [f"w{i}" for i in range(30)]
    context = " ".join(words)
    rows = Dataset.from_dict(
        {
            "question": ["w40", "w41"],
            "context": [context, context],
            "answers": [{"text": ["w20 w21"], "answer_start": [context.index("w20")]}, {"text": ["w3"], "answer_start": [context.index("w3 ")]}],
        }
    )  # fmt: skip
    backend = tokenizer.backend_tokenizer
    from tokenizers import processors

    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    features = answer_features(rows, tokenizer, max_length=16, stride=4)
    assert len(features) > 4
    with_answer = [row for row in features if row["start_positions"] > 0]
    for row in with_answer:
        first, last = row["offset_mapping"][row["start_positions"]][0], row["offset_mapping"][row["end_positions"]][1]
        assert row["context"][first:last] == row["answers"][0]
    assert {row["example"] for row in with_answer} == {0, 1}

    def logits(place):
        """Sure of the labels where there is an answer, less sure of another place elsewhere."""
        values = np.full((len(features), 16), -5.0)
        for number, row in enumerate(features):
            at = row[f"{place}_positions"]
            values[number, at or 5] = 9.0 if at else 1.0
        return values

    compute = answer_metrics(features)
    perfect = tf.EvalPrediction((logits("start"), logits("end")), None)
    assert compute(perfect) == {"exact_match": 1.0, "f1": 1.0}
    worse = logits("end")
    first = with_answer[0]
    number = [row["example"] == 0 and row["start_positions"] == first["start_positions"] for row in features].index(
        True
    )
    worse[number] = np.roll(worse[number], -1)  # w20 without w21
    partly = compute(tf.EvalPrediction((logits("start"), worse), None))
    assert partly["exact_match"] == 0.5
    assert partly["f1"] == pytest.approx((2 * 1 * 0.5 / 1.5 + 1) / 2)
    model = tiny.bert_qa(layers=1)
    assert set(measured(model, features, tmp_path, processor=tokenizer)) == {"f1", "exact_match"}
    spans = features.select_columns(["input_ids", "attention_mask", "start_positions", "end_positions"])
    assert set(measured(model, spans, tmp_path, processor=tokenizer)) == {"f1", "exact_match"}


def test_pixels(tmp_path):
    config = tf.SegformerConfig(
        num_channels=1, num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1], hidden_sizes=[8, 16], patch_sizes=[3, 3],
        strides=[2, 2], num_attention_heads=[1, 2], mlp_ratios=[2, 2], decoder_hidden_size=16, num_labels=3,
    )  # fmt: skip
    model = tf.SegformerForSemanticSegmentation(config).eval()
    masks = RNG.integers(0, 3, size=(5, 16, 16))
    masks[:, :2] = 255
    data = Dataset.from_dict({"pixel_values": RNG.normal(size=(5, 1, 16, 16)).astype("float32"), "labels": masks})
    with torch.no_grad():
        logits = model(torch.tensor(np.array(data["pixel_values"]), dtype=torch.float32)).logits
    found = torch.nn.functional.interpolate(logits, (16, 16), mode="bilinear", align_corners=False).argmax(1).numpy()
    valid = masks != 255
    shares = [
        ((found == c) & (masks == c) & valid).sum() / (((found == c) | (masks == c)) & valid).sum() for c in range(3)
    ]
    metrics = measured(model, data, tmp_path, processor=False)
    assert metrics["mean_iou"] == pytest.approx(np.mean(shares))
    assert metrics["accuracy"] == pytest.approx((found == masks)[valid].mean())


# ---------------------------------------------------------------------- whatever the batches are


@pytest.fixture
def letters(tmp_path):
    path = tmp_path / "vocab.json"
    path.write_text(json.dumps({token: i for i, token in enumerate(["<pad>", "<unk>", "|", *"abcdefghi"])}))
    return tf.Wav2Vec2CTCTokenizer(path, pad_token="<pad>", unk_token="<unk>", bos_token=None, eos_token=None)


class Sounds:
    """Pads sounds and labels, as data collators for CTC do."""

    def __call__(self, rows):
        length = max(len(row["input_values"]) for row in rows)
        longest = max(len(row["labels"]) for row in rows)
        sounds = [
            np.pad(np.array(row["input_values"], "float32"), (0, length - len(row["input_values"]))) for row in rows
        ]
        return {
            "input_values": torch.tensor(np.array(sounds)),
            "attention_mask": torch.tensor(
                [[int(i < len(row["input_values"])) for i in range(length)] for row in rows]
            ),
            "labels": torch.tensor([row["labels"] + [-100] * (longest - len(row["labels"])) for row in rows]),
        }


def test_a_letter_that_is_said_twice_is_two_letters(letters):
    metrics = metrics_for(tiny.wav2vec2_ctc(), letters)
    said = np.array([[3, 3, 0, 3, 4, 4], [5, 0, 2, 2, 5, -100]])
    labels = np.array([[3, 3, 4], [5, 2, 5]])
    assert metrics(tf.EvalPrediction(said, labels)) == {"wer": 0.0, "cer": 0.0}


def test_frames_of_padding_are_silent(tmp_path, letters):
    model = tiny.wav2vec2_ctc()
    rows = [
        {"input_values": RNG.normal(size=length).tolist(), "labels": [int(i) for i in RNG.integers(3, 12, size=4)]}
        for length in (4000, 2000, 3000, 1200)
    ]
    data = Dataset.from_list(rows)
    alone, together = (
        measured(model, data, tmp_path, processor=letters, collator=Sounds(), batch_size=size) for size in (1, 4)
    )
    assert alone == together
    assert alone["wer"] > 0


# ---------------------------------------------------------------------- texts that are generated


def translations(rows=6):
    data = {"input_ids": [], "attention_mask": [], "labels": []}
    for _ in range(rows):
        ids = [*RNG.integers(5, 90, size=RNG.integers(3, 8)).tolist(), 3]
        data["input_ids"].append(ids)
        data["attention_mask"].append([1] * len(ids))
        data["labels"].append([*ids[:-1][::-1], 3])
    return Dataset.from_dict(data)


def test_a_file_generates_what_its_model_does(tmp_path):
    model, data, tokenizer = tiny.t5(), translations(), tiny.tokenizer()
    model.generation_config.max_new_tokens = 7
    folder = export_onnx(
        model, tmp_path / "onnx", quantization="float32", processing_class=tokenizer, eval_dataset=data, latency_rounds=0,
        data_collator=tf.DataCollatorForSeq2Seq(tokenizer),
    )  # fmt: skip
    quality = json.loads((folder / "export_facts.json").read_text())["metrics"]
    assert quality["metric"] == "bleu"
    assert quality["onnx"] == quality["torch"]
    files = open_files(folder, "text2text-generation-with-past")
    batch = tf.DataCollatorForSeq2Seq(tokenizer)(list(data))
    batch = {name: batch[name] for name in ("input_ids", "attention_mask")}
    for settings in (dict(max_new_tokens=7), dict(max_new_tokens=7, num_beams=3)):
        with torch.no_grad():
            expected = model.generate(**batch, **settings)
        assert torch.equal(files.generate(model, batch, **settings), expected)
    assert "forward" not in vars(model)


def test_whisper_is_given_what_it_makes_of_labels_itself():
    model = FAMILIES["whisper"].make().eval()
    labels = torch.tensor([[5, 6, 2], [7, 2, -100]])
    batch = {"input_features": torch.randn(2, 8, 40, generator=torch.Generator().manual_seed(0)), "labels": labels}
    made = with_decoder_inputs(model, batch)
    assert made["decoder_input_ids"].tolist() == [[1, 5, 6], [1, 7, 2]]
    with torch.no_grad():
        expected = model(**batch).logits
        del made["labels"]
        torch.testing.assert_close(model(**made).logits, expected, rtol=0, atol=0)


# ---------------------------------------------------------------------- without labels


def test_embeddings_are_held_against_the_first_model(tmp_path):
    tf.set_seed(0)
    teacher, student = (
        tf.BertModel(tiny.bert_config(hidden=width), add_pooling_layer=False).eval() for width in (32, 16)
    )
    data = tiny.text_dataset(9).remove_columns("labels")
    how = evaluation(teacher, data, tmp_path)
    assert how.metrics("teacher", teacher) == pytest.approx({"spearman": 1, "retrieval": 1, "cosine": 1})
    found = how.metrics("student", student)
    assert set(found) == {"spearman", "retrieval"}

    def similar(model):
        rows = []
        for row in data:
            with torch.no_grad():
                states = model(torch.tensor([row["input_ids"]])).last_hidden_state[0].double().mean(0)
            rows.append(torch.nn.functional.normalize(states, dim=0))
        return (torch.stack(rows) @ torch.stack(rows).T).numpy()

    ours, theirs = similar(student), similar(teacher)
    pairs = np.triu_indices(9, 1)
    ranks = [np.argsort(np.argsort(matrix[pairs])) for matrix in (ours, theirs)]
    assert found["spearman"] == pytest.approx(np.corrcoef(*ranks)[0, 1], abs=1e-3)


def test_an_embedding_file_needs_no_labels(tmp_path):
    tf.set_seed(0)
    model = tf.BertModel(tiny.bert_config(layers=1), add_pooling_layer=False).eval()
    data = tiny.text_dataset(9).remove_columns("labels")
    folder = export_onnx(
        model, tmp_path / "onnx", quantization=QuantizationSpec(), processing_class=tiny.tokenizer(), calibration=data,
        eval_dataset=data, max_drop=0.5, latency_rounds=0,
    )  # fmt: skip
    quality = json.loads((folder / "export_facts.json").read_text())["metrics"]
    assert quality["metric"] == "spearman"
    assert quality["torch"]["cosine"] == pytest.approx(1.0)
    assert 0.5 < quality["onnx"]["cosine"] < 1


# ---------------------------------------------------------------------- through the report


def test_a_teacher_with_another_tokenizer_is_measured_on_its_own_columns(tmp_path):
    rows = tiny.text_dataset(12)
    student, teacher, tokenizer = tiny.bert(layers=1), tiny.bert(seed=3, vocab_size=200), tiny.tokenizer()
    own = [[token + 100 for token in row["input_ids"]] for row in rows]
    data = rows.add_column("teacher_input_ids", own).add_column("teacher_attention_mask", rows["attention_mask"])
    with torch.no_grad():
        right = [int(teacher(torch.tensor([ids])).logits.argmax()) for ids in own]
    folder = export_onnx(student, tmp_path / "onnx", quantization="float32", latency_rounds=0)
    pad = tf.DataCollatorWithPadding(tokenizer)
    report = CompressionReport.measure(
        teacher=teacher, student=student, onnx=folder, eval_dataset=data, processing_class=tokenizer,
        data_collator=TeacherCollator(pad, pad), latency_rounds=0,
    )  # fmt: skip
    metrics = {engine.name: engine.metrics["accuracy"] for engine in report.engines}
    assert metrics["teacher"] == pytest.approx(np.mean(np.array(right) == np.array(rows["labels"])))
    assert metrics["student"] == metrics["ONNX float"]


def test_metrics_that_are_not_known_are_asked_for():
    model = tf.BertForNextSentencePrediction(tiny.bert_config())
    with pytest.raises(ValueError, match=r"BertForNextSentencePrediction has no usual metric. Pass compute_metrics="):
        metrics_for(model)
    with pytest.raises(ValueError, match="Pass its tokenizer or processor as processing_class="):
        metrics_for(tiny.t5())
