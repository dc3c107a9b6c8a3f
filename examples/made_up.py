# SPDX-License-Identifier: Apache-2.0
"""Made-up data and small models for the examples' `--tiny` option: no download, a few seconds on a CPU.

Rows look like those of the data sets that the examples are for, so everything behind this file is what users run.
"""

from __future__ import annotations

import io
import json
import random
import string
import wave
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Audio, ClassLabel, Dataset, DatasetDict, Features, Image, Value
from PIL import Image as Picture
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.utils.data import DataLoader
from transformers import (
    ASTConfig,
    ASTFeatureExtractor,
    ASTForAudioClassification,
    BertConfig,
    BertForMaskedLM,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ResNetConfig,
    ResNetForImageClassification,
    SeamlessM4TFeatureExtractor,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    SegformerImageProcessor,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
    Wav2Vec2BertConfig,
    Wav2Vec2BertForCTC,
    Wav2Vec2BertProcessor,
    Wav2Vec2Config,
    Wav2Vec2CTCTokenizer,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForCTC,
    Wav2Vec2Processor,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperProcessor,
    WhisperTokenizerFast,
    YolosConfig,
    YolosForObjectDetection,
    YolosImageProcessor,
)

ADJECTIVES = {"negative": ["dull", "awful", "boring", "poor"], "positive": ["bright", "great", "moving", "rich"]}
NOUNS = ["plot", "cast", "score", "twist"]


def fit(model: PreTrainedModel, rows: Any, collate: Callable[[Any], Any] | None, steps: int = 40, rate: float = 2e-3) -> Any:  # fmt: skip
    """Teaches the task to a model that is to be a teacher, in a few seconds."""
    loader = DataLoader(rows, batch_size=16, shuffle=True, collate_fn=collate)
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=rate)
    for _, batch in zip(range(steps), (batch for _ in iter(int, 1) for batch in loader), strict=False):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def text_tokenizer(words: Sequence[str], template: str = "[CLS] $A [SEP]", pair: str | None = None, letters: bool = False) -> PreTrainedTokenizerFast:  # fmt: skip
    """A tokenizer that knows these words, or takes texts letter by letter."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    backend = Tokenizer(models.WordLevel({t: i for i, t in enumerate([*special, *words])}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated") if letters else pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single=template, pair=pair or "$A $B:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        eos_token="[SEP]", model_max_length=64, model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip


def text_classification(
    teachers: int = 1, unused_words: int = 0
) -> tuple[DatasetDict, PreTrainedTokenizerFast, list[PreTrainedModel]]:
    """Sentences whose adjective decides the label, and BERTs of 2 or more layers that have learned it."""
    rows = [
        {"text": f"a {word} film" + f" with a {noun}" * i, "label": label}
        for i in range(1, 4)
        for noun in NOUNS
        for label, group in enumerate(ADJECTIVES.values())
        for word in group
    ]
    raw = Dataset.from_list(rows).cast_column("label", ClassLabel(names=list(ADJECTIVES))).train_test_split(32, seed=0)
    words = sorted({word for row in rows for word in row["text"].split()})
    tokenizer = text_tokenizer([*words, *(f"unused{i}" for i in range(unused_words))])
    learned = raw["train"].map(lambda row: tokenizer(row["text"]), remove_columns=["text"])
    found = []
    for i in range(teachers):
        config = BertConfig(
            vocab_size=len(tokenizer), hidden_size=32 + 16 * i, num_hidden_layers=2 + 2 * i, num_attention_heads=4,
            intermediate_size=64, max_position_embeddings=64, initializer_range=0.1, id2label=dict(enumerate(ADJECTIVES)),
            label2id={name: label for label, name in enumerate(ADJECTIVES)},
        )  # fmt: skip
        found.append(fit(BertForSequenceClassification(config), learned, DataCollatorWithPadding(tokenizer)))
    return raw, tokenizer, found


def _bert(kind: Any, tokenizer: PreTrainedTokenizerFast, **settings: Any) -> PreTrainedModel:
    return kind(
        BertConfig(
            vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
            max_position_embeddings=64, initializer_range=0.1, **settings,
        )
    )  # fmt: skip


def text_pairs(regression: bool) -> tuple[DatasetDict, PreTrainedTokenizerFast, PreTrainedModel]:
    """Pairs of three nouns each: whether they share more than one, or which part of them; and a BERT of random weights."""
    rng, rows = random.Random(0), {"sentence1": list[str](), "sentence2": list[str](), "label": list[Any]()}
    for number in range(160):
        first, shared = rng.sample(NOUNS, 3), number % 4
        rest = [noun.upper() for noun in rng.sample(NOUNS, 3 - shared)]
        rows["sentence1"].append(" ".join(first))
        rows["sentence2"].append(" ".join(rng.sample(first[:shared] + rest, 3)))
        rows["label"].append(shared / 3 if regression else int(shared > 1))
    raw = Dataset.from_dict(rows)
    if not regression:
        raw = raw.cast_column("label", ClassLabel(names=["different", "alike"]))
    parts = raw.train_test_split(32, seed=0)
    tokenizer = text_tokenizer([*NOUNS, *(noun.upper() for noun in NOUNS)], pair="[CLS] $A [SEP] $B:1 [SEP]:1")
    labels: dict[str, Any] = {"num_labels": 1} if regression else {"id2label": {0: "different", 1: "alike"}}
    model = _bert(BertForSequenceClassification, tokenizer, **labels)
    return DatasetDict(train=parts["train"], validation=parts["test"]), tokenizer, model


def small_gpt(classes: Any) -> tuple[PreTrainedTokenizerFast, PreTrainedModel]:
    """A GPT-2 of random weights that reads letter by letter, for the classes of a configuration."""
    tokenizer = text_tokenizer([*string.ascii_lowercase, " "], template="$A [SEP]", letters=True)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=64, n_embd=32, n_layer=2, n_head=4, initializer_range=0.1, bos_token_id=2,
        eos_token_id=3, id2label=classes.id2label, label2id=classes.label2id,
    )  # fmt: skip
    return tokenizer, GPT2ForSequenceClassification(config)


def masked_language_model(tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """A BERT of random weights that guesses words."""
    tokenizer.mask_token = "[UNK]"
    return _bert(BertForMaskedLM, tokenizer).eval()


def named_entities() -> tuple[DatasetDict, PreTrainedTokenizerFast, PreTrainedModel]:
    """Sentences of people and cities as lists of words, with a tag for each, and a BERT of random weights."""
    tags = ["O", "B-person", "I-person", "B-city"]
    rows: dict[str, list[Any]] = {"tokens": [], "ner_tags": []}
    for first in ("Anna", "Bob", "Carla", "Dan"):
        for family in ("", "Smith", "Berg"):
            for verb in ("lives", "works"):
                for city in ("Oslo", "Rome", "Lima"):
                    person = [first, family] if family else [first]
                    rows["tokens"].append([*person, verb, "in", city, "today"])
                    rows["ner_tags"].append([*range(1, len(person) + 1), 0, 0, 3, 0])
    features = Features(tokens=[Value("string")], ner_tags=[ClassLabel(names=tags)])
    raw = Dataset.from_dict(rows, features=features).train_test_split(16, seed=0)
    tokenizer = text_tokenizer(sorted({word for row in rows["tokens"] for word in row}))
    labels = dict(id2label=dict(enumerate(tags)), label2id={name: number for number, name in enumerate(tags)})
    return raw, tokenizer, _bert(BertForTokenClassification, tokenizer, **labels)


def questions() -> tuple[DatasetDict, PreTrainedTokenizerFast, PreTrainedModel]:
    """Where people live: contexts that are longer than a window, and a BERT of random weights."""
    people, cities = ["Anna", "Bob", "Carla", "Dan"], ["Oslo", "Rome", "Lima", "Bonn"]
    rng = random.Random(0)
    rows: list[dict[str, Any]] = []
    for number in range(80):
        homes = dict(zip(people, rng.sample(cities, 4), strict=True))
        context = " ".join(f"now {person} lives in {city} too" for person, city in homes.items())
        person = people[number % 4]
        answers = {"text": [homes[person]], "answer_start": [context.index(homes[person])]}
        rows.append({"question": f"where lives {person}", "context": context, "answers": answers})
    raw = DatasetDict(train=Dataset.from_list(rows[:64]), validation=Dataset.from_list(rows[64:]))
    words = {word for row in rows for word in (row["context"] + " " + row["question"]).split()}
    tokenizer = text_tokenizer(sorted(words), pair="[CLS] $A [SEP] $B:1 [SEP]:1")
    return raw, tokenizer, _bert(BertForQuestionAnswering, tokenizer)


def translations() -> tuple[DatasetDict, PreTrainedTokenizerFast, PreTrainedModel]:
    """Sentences of three words in two languages of the same order, and a T5 of random weights."""
    parts = [{"the": "das", "a": "ein"}, {"small": "kleine", "old": "alte", "red": "rote"}, {"house": "Haus", "dog": "Tier", "book": "Buch"}]  # fmt: skip
    rows = [
        {"en": f"{a} {b} {c}", "de": f"{parts[0][a]} {parts[1][b]} {parts[2][c]}"}
        for a in parts[0] for b in parts[1] for c in parts[2]
    ] * 4  # fmt: skip
    raw = Dataset.from_list(rows).train_test_split(12, seed=0)
    tokenizer = text_tokenizer(
        sorted({word for part in parts for pair in part.items() for word in pair}), template="$A [SEP]"
    )
    config = T5Config(
        vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, dropout_rate=0.0,
        decoder_start_token_id=0, pad_token_id=0, eos_token_id=3,
    )  # fmt: skip
    model = T5ForConditionalGeneration(config)
    model.generation_config.max_new_tokens = 8
    return raw, tokenizer, model


def _llama(tokenizer: PreTrainedTokenizerFast, width: int, layers: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.1,
        pad_token_id=0, bos_token_id=2, eos_token_id=3,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def language_model(
    encode: Callable[[Any, Any], dict[str, list[int]]], letters: bool
) -> tuple[DatasetDict, PreTrainedTokenizerFast, PreTrainedTokenizerFast, PreTrainedModel, PreTrainedModel]:
    """Instructions to repeat a word: rows, tokenizers of student and teacher, and both models."""
    rows = [
        {"instruction": f"say {noun}" + " again" * again, "response": " ".join([noun] * (again + 1))}
        for again in range(3)
        for noun in NOUNS
    ]
    raw = DatasetDict(train=Dataset.from_list(rows * 8), test=Dataset.from_list(rows))
    own = text_tokenizer(["say", "again", *NOUNS], template="$A")
    theirs = (
        text_tokenizer(sorted(set("say again\n" + "".join(NOUNS))), template="$A", letters=True) if letters else own
    )
    teacher = _llama(theirs, width=48, layers=4)
    learned = raw["train"].map(lambda row: encode(row, theirs), remove_columns=raw["train"].column_names)
    fit(teacher, learned, DataCollatorForSeq2Seq(theirs), steps=80)
    return raw, own, theirs, _llama(own, width=32, layers=2), teacher


def images(convolutional: bool) -> tuple[DatasetDict, PreTrainedModel, PreTrainedModel]:
    """scikit-learn's handwritten digits as `pixel_values` and `labels`, a student and a larger teacher."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = np.repeat(digits.images[:500, None].astype(np.float32) / 8 - 1, 3, axis=1)  # (images, 3, 8, 8)
    if convolutional:  # which halve height and width several times
        pixels = pixels.repeat(4, axis=2).repeat(4, axis=3)
    rows = Dataset.from_dict({"pixel_values": pixels, "labels": digits.target[:500]}).with_format("torch")
    data = rows.train_test_split(120, seed=0)

    def model(width: int, layers: int) -> PreTrainedModel:
        if convolutional:
            sizes = [width, 2 * width]
            return ResNetForImageClassification(
                ResNetConfig(embedding_size=width, hidden_sizes=sizes, depths=[layers // 2] * 2, layer_type="basic", num_labels=10)
            )  # fmt: skip
        return ViTForImageClassification(
            ViTConfig(
                image_size=8, patch_size=2, hidden_size=width, num_hidden_layers=layers, num_attention_heads=4,
                intermediate_size=2 * width, initializer_range=0.1, num_labels=10,
            )
        )  # fmt: skip

    student, teacher = model(32, 2), model(64, 4)
    return data, student, fit(teacher, data["train"], None, steps=60)


def speech(folder: Path, most: int = 5) -> tuple[DatasetDict, Wav2Vec2Processor, PreTrainedModel]:
    """A tone for every letter of a "text" of two or `most`; `folder` gets the vocabulary that the tokenizer is read from."""
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<unk>", "|", *string.ascii_lowercase])}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    processor = Wav2Vec2Processor(
        feature_extractor=Wav2Vec2FeatureExtractor(sampling_rate=2000, do_normalize=True, return_attention_mask=True),
        tokenizer=Wav2Vec2CTCTokenizer(str(folder / "vocab.json"), pad_token="<pad>", unk_token="<unk>"),
    )
    rng = random.Random(0)
    texts = ["".join(rng.choices("abc", k=rng.randint(2, most))) for _ in range(64)]
    rows = {"audio": [{"bytes": _tones(text), "path": None} for text in texts], "text": texts}
    raw = Dataset.from_dict(rows).cast_column("audio", Audio(decode=False)).train_test_split(16, seed=0)
    config = Wav2Vec2Config(
        hidden_size=48, num_hidden_layers=4, num_attention_heads=4, intermediate_size=96, conv_dim=(16, 16),
        conv_stride=(10, 8), conv_kernel=(20, 8), num_feat_extract_layers=2, num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4, layerdrop=0.0, vocab_size=len(vocabulary), mask_time_prob=0.0, feat_extract_norm="layer",
        do_stable_layer_norm=True, pad_token_id=0, ctc_loss_reduction="mean", ctc_zero_infinity=True, initializer_range=0.1,
    )  # fmt: skip
    return raw, processor, Wav2Vec2ForCTC(config)


def spelled_sounds(folder: Path) -> tuple[DatasetDict, WhisperProcessor, PreTrainedModel]:
    """The tones of `speech`, in `folder` too, and a Whisper of random weights that writes letter by letter."""
    marks = ["<|endoftext|>", "<|startoftranscript|>", "<|transcribe|>", "<|translate|>", "<|notimestamps|>"]
    raw, _, _ = speech(folder, most=2)
    symbols = {symbol: i for i, symbol in enumerate([*sorted(pre_tokenizers.ByteLevel.alphabet()), *marks])}
    for name, content in {
        "vocab.json": symbols, "merges.txt": "#version: 0.2\n", "normalizer.json": {},
        "tokenizer_config.json": {"tokenizer_class": "WhisperTokenizer", "pad_token": marks[0], "additional_special_tokens": marks},
    }.items():  # fmt: skip
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    tokenizer = WhisperTokenizerFast.from_pretrained(folder)
    tokenizer.set_prefix_tokens(predict_timestamps=False)
    extractor = WhisperFeatureExtractor(feature_size=16, sampling_rate=2000, chunk_length=1, hop_length=20, n_fft=200)
    end, start = tokenizer.convert_tokens_to_ids(marks[:2])
    config = WhisperConfig(
        vocab_size=len(tokenizer), d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, num_mel_bins=16, max_source_positions=50,
        max_target_positions=16, pad_token_id=end, bos_token_id=end, eos_token_id=end, decoder_start_token_id=start,
        suppress_tokens=None, begin_suppress_tokens=None, init_std=0.1,
    )  # fmt: skip
    model = WhisperForConditionalGeneration(config)
    model.generation_config.max_length = 16
    return raw, WhisperProcessor(extractor, tokenizer), model


def spectrograms(folder: Path) -> tuple[DatasetDict, Wav2Vec2BertProcessor, PreTrainedModel]:
    """The tones of `speech`, and a Wav2Vec2-BERT of random weights that reads their log-mel spectrograms."""
    raw, spelled, _ = speech(folder)
    extractor = SeamlessM4TFeatureExtractor(feature_size=16, num_mel_bins=16, sampling_rate=8000)
    config = Wav2Vec2BertConfig(
        vocab_size=len(spelled.tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        feature_projection_input_dim=32, conv_depthwise_kernel_size=3, pad_token_id=0, ctc_loss_reduction="mean",
        ctc_zero_infinity=True, apply_spec_augment=False, layerdrop=0.0, initializer_range=0.1,
        left_max_position_embeddings=8, right_max_position_embeddings=4,
    )  # fmt: skip
    return raw, Wav2Vec2BertProcessor(extractor, spelled.tokenizer), Wav2Vec2BertForCTC(config)


def _tones(text: str, rate: int = 2000) -> bytes:
    time = np.arange(rate // 4) / rate
    gap = np.zeros(rate // 20)
    tones = [np.r_[np.sin(2 * np.pi * 200 * (1 + "abc".index(letter)) * time), gap] for letter in text]
    file = io.BytesIO()
    with wave.open(file, "wb") as sound:
        sound.setparams((1, 2, rate, 0, "NONE", ""))
        sound.writeframes((np.concatenate(tones) * 20000).astype("<i2").tobytes())
    return file.getvalue()


def sounds() -> tuple[DatasetDict, ASTFeatureExtractor, PreTrainedModel]:
    """Tones of three pitches, and an audio spectrogram transformer of random weights."""
    rng, pitches = random.Random(0), ["a", "b", "c"]
    texts = ["".join(rng.choices(pitch, k=2)) for pitch in pitches for _ in range(24)]
    rows = {
        "audio": [{"bytes": _tones(text, 16000), "path": None} for text in texts],
        "label": [ord(t[0]) - 97 for t in texts],
    }
    raw = (
        Dataset.from_dict(rows)
        .cast_column("audio", Audio(decode=False))
        .cast_column("label", ClassLabel(names=pitches))
    )
    config = ASTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, max_length=64, num_mel_bins=32,
        frequency_stride=16, time_stride=16, initializer_range=0.1, id2label=dict(enumerate(pitches)),
        label2id={name: i for i, name in enumerate(pitches)},
    )  # fmt: skip
    return (
        raw.train_test_split(24, seed=0),
        ASTFeatureExtractor(max_length=64, num_mel_bins=32),
        ASTForAudioClassification(config),
    )


def detection() -> tuple[DatasetDict, YolosImageProcessor, PreTrainedModel]:
    """Pictures with one red or blue box, and a YOLOS of random weights."""
    rng, colors = np.random.default_rng(0), {"red": (220, 30, 30), "blue": (30, 30, 220)}
    rows: dict[str, list[Any]] = {"image": [], "objects": []}
    for i in range(48):
        canvas = rng.integers(90, 120, size=(32, 32, 3), dtype=np.uint8)
        x, y = (int(place) for place in rng.integers(0, 16, size=2))
        w, h = (int(length) for length in rng.integers(8, 16, size=2))
        canvas[y : y + h, x : x + w] = list(colors.values())[i % 2]
        rows["image"].append(Picture.fromarray(canvas))
        rows["objects"].append({"bbox": [[x, y, w, h]], "category": [i % 2]})
    objects = {"bbox": [[Value("float32")]], "category": [ClassLabel(names=list(colors))]}
    raw = Dataset.from_dict(rows, features=Features(image=Image(), objects=objects)).train_test_split(8, seed=0)
    config = YolosConfig(
        image_size=[32, 32], patch_size=8, hidden_size=64, num_hidden_layers=4, num_attention_heads=4,
        intermediate_size=128, num_detection_tokens=6, initializer_range=0.1, id2label=dict(enumerate(colors)),
        label2id={name: i for i, name in enumerate(colors)},
    )  # fmt: skip
    model = YolosForObjectDetection(config)
    torch.nn.init.normal_(model.vit.embeddings.detection_tokens)  # zeros would make all queries alike
    return raw, YolosImageProcessor(size={"height": 32, "width": 32}), model


def segmentation() -> tuple[DatasetDict, SegformerImageProcessor, PreTrainedModel]:
    """The pictures of `detection`, and a SegFormer of random weights."""
    raw, _, _ = detection()
    names = ["background", *raw["train"].features["objects"]["category"].feature.names]
    config = SegformerConfig(
        hidden_sizes=[16, 32], depths=[1, 1], num_encoder_blocks=2, num_attention_heads=[2, 4], sr_ratios=[2, 1],
        patch_sizes=[3, 3], strides=[2, 2], mlp_ratios=[2, 2], decoder_hidden_size=32, initializer_range=0.1,
        id2label=dict(enumerate(names)), label2id={name: i for i, name in enumerate(names)},
    )  # fmt: skip
    processor = SegformerImageProcessor(size={"height": 32, "width": 32}, do_reduce_labels=False)
    return raw, processor, SegformerForSemanticSegmentation(config)
