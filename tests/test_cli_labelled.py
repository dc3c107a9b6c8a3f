# SPDX-License-Identifier: Apache-2.0
"""`hfkdq export --eval-data` for every task: rows as such data sets have them, measured by the usual metrics."""

import datasets
import numpy as np
import pytest
import torch
import transformers as tf
from datasets import ClassLabel, Dataset, Features, Image, List, Value
from PIL import Image as Picture
from tokenizers import processors

from hfkdq.cli.data import EVALUATION
from hfkdq.cli.inputs import Reader
from hfkdq.measuring.evaluation import Evaluation
from hfkdq.metrics import metrics_for
from hfkdq.modeling.forwards import forward_columns

from . import tiny

TEXTS = [f"w{i} w{i + 1} w{i + 2}" for i in range(6)]
RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def pairing():
    """A tokenizer that tells two texts apart."""
    tokenizer = tiny.tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return tokenizer


class Run:
    """The rows of a table as `--eval-data` reads them: batches of all, and the metrics of the model."""

    def __init__(self, tmp_path, model, rows, processor=None, columns=None, length=None):
        data = rows if isinstance(rows, Dataset) else Dataset.from_dict(rows)
        data.to_parquet(tmp_path / "rows.parquet")
        processor = tiny.tokenizer() if processor is None else processor
        reader = Reader(model, processor, columns, length)
        self.given = reader.evaluation(str(tmp_path / "rows.parquet"), EVALUATION, None)
        rows = self.given["eval_dataset"]
        accepted = forward_columns(model)
        has_transform = rows.format["type"] == "custom"
        kept = rows if has_transform else rows.select_columns([n for n in rows.column_names if n in accepted])
        self.batch = self.given["data_collator"]([kept[i] for i in range(len(kept))])
        metrics = metrics_for(model, processor, self.given["eval_dataset"])
        evaluation = Evaluation(
            self.given["eval_dataset"], metrics, processor, self.given["data_collator"], 4, str(tmp_path / "trainer")
        )
        self.metrics = evaluation.metrics("the model", model)
        calibration = reader.batches(str(tmp_path / "rows.parquet"), EVALUATION, 64)
        self.calibration = next(iter(calibration))
        with torch.no_grad():
            model(**self.calibration)


def test_a_regression(tmp_path):
    rows = {"id": ["a", "b", "c"] * 2, "text": TEXTS, "label": [0.5, 1, 2, 3, 4, 5]}
    run = Run(tmp_path, tiny.bert(labels=1), rows)
    assert run.batch["labels"].tolist() == rows["label"]
    assert run.batch["input_ids"].tolist() == tiny.tokenizer()(TEXTS)["input_ids"]  # never the column called id
    assert set(run.metrics) == {"pearson", "spearman", "mse"}


def test_several_labels(tmp_path):
    names = ["red", "green", "blue"]
    model = tiny.bert(id2label=dict(enumerate(names)), label2id={name: i for i, name in enumerate(names)})
    run = Run(tmp_path, model, {"text": TEXTS, "labels": [["red"], [], ["blue", "green"], ["red"], ["blue"], []]})
    assert run.batch["labels"].tolist()[:3] == [[1, 0, 0], [0, 0, 0], [0, 1, 1]]
    assert set(run.metrics) == {"f1", "macro_f1", "accuracy"}


def test_lists_of_words(tmp_path):
    names = ["O", "B-x", "I-x"]
    model = tiny.bert_tokens(id2label=dict(enumerate(names)), label2id={name: i for i, name in enumerate(names)})
    rows = Dataset.from_dict(
        {"id": ["0", "1"], "tokens": [["w1", "w2w3", "w4"], ["w5"]], "ner_tags": [[0, 1, 2], [1]]},
        features=Features({"id": Value("string"), "tokens": List(Value("string")), "ner_tags": List(ClassLabel(names=["O", "I-x", "B-x"]))}),
    )  # fmt: skip
    run = Run(tmp_path, model, rows)
    assert run.batch["labels"].tolist() == [[-100, 0, 2, 1, -100], [-100, 2, -100, -100, -100]]  # by name
    assert set(run.metrics) == {"precision", "recall", "f1", "accuracy"}
    assert set(run.calibration) == {"input_ids", "attention_mask"}


def test_questions(tmp_path):
    context = " ".join(f"w{i}" for i in range(60))
    answers = {"text": ["w50"], "answer_start": [context.index("w50")]}
    rows = {"id": ["q"], "title": ["w9"], "context": [context], "question": ["w70"], "answers": [answers]}
    run = Run(tmp_path, tiny.bert_qa(), rows, processor=pairing())
    assert len(run.batch["input_ids"]) > 1
    assert set(run.metrics) == {"f1", "exact_match"}


@pytest.mark.parametrize("kind", ["masked", "next"])
def test_language_models(tmp_path, kind):
    model = tiny.bert_mlm() if kind == "masked" else tiny.llama()
    texts = ["", *(" ".join(f"w{i}" for i in RNG.integers(0, 90, 25)) for _ in range(8))]
    first, again = (Run(tmp_path, model, {"text": texts}) for _ in range(2))
    assert torch.equal(first.batch["input_ids"], again.batch["input_ids"])
    assert first.metrics == again.metrics
    labels, ids = first.batch["labels"], first.batch["input_ids"]
    if kind == "masked":
        assert torch.equal(labels.ne(-100), ids.eq(4))
        assert 0.05 < labels.ne(-100).float().mean() < 0.3
    else:
        assert torch.equal(labels, ids)
        assert ids.shape[1] == 32


def test_translations(tmp_path):
    model = tiny.t5()
    model.generation_config.max_new_tokens = 5
    run = Run(tmp_path, model, {"de": TEXTS, "en": TEXTS[::-1]})
    assert set(run.metrics) == {"bleu", "chrf"}
    assert run.batch["labels"].tolist() == tiny.tokenizer()(TEXTS[::-1])["input_ids"]
    nested = Run(
        tmp_path, model, {"translation": [{"de": a, "en": b} for a, b in zip(TEXTS, TEXTS[::-1], strict=True)]}
    )
    assert nested.metrics == run.metrics
    turned = Run(tmp_path, model, {"de": TEXTS, "en": TEXTS[::-1]}, columns=["en", "de"])
    assert torch.equal(turned.batch["labels"], run.batch["input_ids"])
    assert set(run.calibration) == {"input_ids", "attention_mask", "decoder_input_ids"}
    with pytest.raises(
        ValueError, match=r"the columns are a \(string\)\. Name the two with --text-columns SOURCE,TARGET"
    ):
        Run(tmp_path, model, {"a": TEXTS})


def images(count=4, size=16):
    return [Picture.fromarray(RNG.integers(0, 255, (size, size, 3), dtype=np.uint8)) for _ in range(count)]


def test_masks(tmp_path):
    config = tf.SegformerConfig(
        num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1], hidden_sizes=[8, 16], patch_sizes=[3, 3], strides=[2, 2],
        num_attention_heads=[1, 2], mlp_ratios=[2, 2], decoder_hidden_size=16, num_labels=3,
    )  # fmt: skip
    masks = [Picture.fromarray(RNG.integers(0, 3, (16, 16), dtype=np.uint8)) for _ in range(4)]
    rows = Dataset.from_dict(
        {"image": images(), "mask": masks}, features=Features({"image": Image(), "mask": Image()})
    )
    processor = tf.SegformerImageProcessor(size={"height": 16, "width": 16})
    run = Run(tmp_path, tf.SegformerForSemanticSegmentation(config).eval(), rows, processor=processor)
    assert torch.equal(run.batch["labels"][0], torch.tensor(np.asarray(masks[0])).long())
    assert set(run.metrics) == {"mean_iou", "accuracy"}


@pytest.mark.parametrize("form", ["lists", "rows"])
def test_boxes(tmp_path, form):
    names = ["a", "b", "c"]
    model = tiny.yolos()
    model.config.id2label, model.config.label2id = dict(enumerate(names)), {name: i for i, name in enumerate(names)}
    boxes = [[[1.0, 2.0, 4.0, 8.0]], [[0.0, 0.0, 16.0, 16.0], [8.0, 8.0, 4.0, 4.0]], []]
    kinds = [[1], [0, 2], []]
    category, box = ClassLabel(names=["c", "b", "a"]), List(Value("float32"))
    if form == "lists":
        objects = [{"bbox": box, "category": kind} for box, kind in zip(boxes, kinds, strict=True)]
        feature = {"bbox": List(box), "category": List(category)}
    else:
        objects = [
            [{"bbox": b, "category": k} for b, k in zip(*both, strict=True)] for both in zip(boxes, kinds, strict=True)
        ]
        feature = List({"bbox": box, "category": category})
    rows = Dataset.from_dict(
        {"image": images(3), "objects": objects}, features=Features({"image": Image(), "objects": feature})
    )
    processor = tf.YolosImageProcessor(size={"height": 16, "width": 16}, do_pad=False)
    run = Run(tmp_path, model, rows, processor=processor)
    assert [one["class_labels"].tolist() for one in run.batch["labels"]] == [[1], [2, 0], []]  # by name
    assert run.batch["labels"][0]["boxes"].tolist() == [[3 / 16, 6 / 16, 4 / 16, 8 / 16]]  # centre and size
    assert {"map", "map_50", "map_75", "map_a"} <= set(run.metrics)


def test_images_and_texts(tmp_path):
    vision = dict(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8
    )
    text = dict(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=95, eos_token_id=3
    )
    tf.set_seed(0)
    model = tf.CLIPModel(tf.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).eval()
    processor = tf.CLIPProcessor(
        tf.CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}), tiny.tokenizer()
    )
    rows = Dataset.from_dict(
        {"image": images(6), "caption": TEXTS}, features=Features({"image": Image(), "caption": Value("string")})
    )
    run = Run(tmp_path, model, rows, processor=processor)
    assert set(run.batch) == {"input_ids", "attention_mask", "pixel_values"}
    assert set(run.metrics) == {"accuracy"}


def test_embeddings_need_no_labels(tmp_path):
    run = Run(tmp_path, tf.BertModel(tiny.bert_config(layers=1), add_pooling_layer=False).eval(), {"text": TEXTS})
    assert run.metrics == pytest.approx({"spearman": 1, "retrieval": 1, "cosine": 1})


def test_inputs_that_are_there_are_taken(tmp_path):
    rows = {"input_ids": [[2, 5, 6, 3], [2, 7, 3]], "labels": [[-100, 1, 2, -100], [-100, 0, -100]]}
    run = Run(tmp_path, tiny.bert_tokens(), rows)
    assert run.batch["labels"].tolist() == [[-100, 1, 2, -100], [-100, 0, -100, -100]]


def test_what_lacks_is_named(tmp_path):
    for model, rows, words in (
        (tiny.bert_tokens(), {"text": TEXTS, "tags": [[0]] * 6}, "one column of lists of words; there are 0 of them in text"),
        (tiny.bert_tokens(), {"tokens": [["w1"]]}, "no column ner_tags or tags .*their columns are tokens"),
        (tiny.bert_qa(), {"question": TEXTS}, "the columns question, context and answers; there is no context"),
        (tiny.bert(labels=1), {"text": TEXTS, "label": ["good"] * 6}, "a regression needs numbers"),
        (tiny.yolos(), {"text": TEXTS}, r"one column of images \(datasets.Image\); there are 0"),
        (tf.BertForNextSentencePrediction(tiny.bert_config()), {"text": TEXTS}, "no usual metric for BertForNext"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            Run(tmp_path, model, rows)


CONTEXT = " ".join(f"w{i}" for i in range(20))
ANSWER = {"text": ["w3"], "answer_start": [CONTEXT.index("w3")]}


def tagger():
    names = ["O", "B-x", "I-x"]
    return tiny.bert_tokens(id2label=dict(enumerate(names)), label2id={name: i for i, name in enumerate(names)})


@pytest.mark.parametrize(
    ("model", "rows", "words"),
    [
        (tagger, {"tokens": [["w1", "w2"]] * 2, "tags": [[0, 0], [0]]}, r"2 words in tokens and 1 labels in tags of row 1"),
        (tagger, {"tokens": [["w1"]] * 2, "tags": [[0], [0, 1]]}, r"1 words in tokens and 2 labels in tags of row 1"),
        (tagger, {"tokens": [["w1"], ["w2"]], "tags": [[0], None]}, r"lack a value of tags in row 1 \(1 of 2 rows\)"),
        (tagger, {"tokens": [["w1"]], "tags": [[7]]}, r"have the label 7; the model has the classes 0 to 2"),
        (tagger, {"tokens": [["w1"]], "tags": [["B-z"]]}, r"label 'B-z', which the model does not know"),
        (tagger, {"input_ids": [[2, 5, 3]], "labels": [[-100] * 3]}, r"no label other than -100"),
        (tiny.bert_qa, {"question": ["w1"], "context": [None], "answers": [ANSWER]}, r"lack a value of context in row 0"),
        (tiny.bert_qa, {"question": ["w1"], "context": [CONTEXT], "answers": ["w3"]}, r"needs lists text and answer_start"),
        (tiny.bert_qa, {"question": ["w1"], "context": [CONTEXT], "answers": [{"text": ["w3"]}]}, r"needs lists text and ans"),
        (tiny.bert_qa, {"question": ["w1"] * 2, "context": [CONTEXT] * 2, "answers": [ANSWER, {"text": ["w3"], "answer_start": [8]}]}, r"Row 1 says that its answer 'w3' begins at character 8 of the context, where there is ' w'. It is at 9"),
        (tiny.bert_qa, {"question": ["w1"], "context": [CONTEXT], "answers": [{"text": ["x"], "answer_start": [-1]}]}, r"It is nowhere in the context"),
        (tiny.bert_qa, {"question": ["w1"], "context": [CONTEXT], "answers": [{"text": ["w3"], "answer_start": []}]}, r"1 answers and 0 of answer_start"),
        (tiny.bert_qa, {"question": ["w1 " * 50], "context": [CONTEXT], "answers": [ANSWER]}, r"No window of 32 tokens"),
        (tiny.t5, {"de": TEXTS, "en": [None, *TEXTS[1:]]}, r"lack a value of en in row 0 \(1 of 6 rows\)"),
        (tiny.llama, {"text": ["", " "]}, r"The column text has no text in any row"),
        (tiny.bert_mlm, {"text": ["w1", "w2"]}, r"no label other than -100"),
        (tiny.bert, {"text": [None, *TEXTS[1:]], "label": [0] * 6}, r"lack a value of text in row 0"),
        (tiny.bert, {"text": TEXTS, "label": [[0], None, [1], [], [2], [0]]}, r"lack a value of label in row 1"),
        (tiny.bert, {"text": TEXTS, "label": [["pink"]] * 6}, r"label 'pink', which the model does not know"),
        (lambda: tiny.bert(labels=1), {"text": TEXTS, "label": [None, *range(5)]}, r"lack a value of label in row 0"),
        (lambda: tiny.bert(labels=1), {"text": TEXTS, "label": [float("nan")] * 6}, r"needs numbers that are finite"),
    ],
)  # fmt: skip
def test_a_row_that_is_wrong_is_named(tmp_path, model, rows, words):
    with pytest.raises(ValueError, match=words):
        Run(tmp_path, model(), rows, processor=pairing())


@pytest.mark.parametrize(
    ("objects", "words"),
    [
        ({"bbox": [[1, 1, 2, 2]], "category": [0, 1]}, "1 boxes and 2 of category in row 0"),
        ({"bbox": [[1, 1, 2]], "category": [0]}, "a box is x, y, width and height"),
        ({"bbox": [[1, 1, -2, 2]], "category": [0]}, "the last two positive"),
        ({"bbox": [[1, 1, 2, 2]], "category": [9]}, "have the label 9; the model has the classes 0 to 2"),
        ({"bbox": [], "category": []}, "no object in any image"),
    ],
)
def test_a_box_that_is_wrong_is_named(tmp_path, objects, words):
    feature = {"bbox": List(List(Value("float32"))), "category": List(Value("int64"))}
    rows = {"image": images(2), "objects": [objects] * 2}
    rows = Dataset.from_dict(rows, features=Features({"image": Image(), "objects": feature}))
    processor = tf.YolosImageProcessor(size={"height": 16, "width": 16}, do_pad=False)
    with pytest.raises(ValueError, match=words):
        Run(tmp_path, tiny.yolos(), rows, processor=processor)
