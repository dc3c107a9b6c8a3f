#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""A card and a report of every task, from short trainings on real data with `hfkdq compress`: the files of model_cards/.

    make model-cards DATA=path/to/data

DATA has a folder for each data set. A task is a base model, whose training makes the teacher, and a student of its own or of some of the
teacher's layers that is trained with it and for 8-bit integers. Trainings take a minute to ten on a core, so the models are small and
none is as good as it could be. Every run keeps its folder, so that the command goes on where it was; `--tasks pairs` makes less.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from datasets import ClassLabel, Dataset, Image
from PIL import Image as Pictures
from PIL import ImageDraw
from tasks import Made, answers, boxes, letters, names_of, prepare, short, sounds, steps, texts, vocabulary_file, words
from text_classification import pretrained
from tokenizers import ByteLevelBPETokenizer, pre_tokenizers, processors
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BartConfig,
    BartForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    SegformerImageProcessor,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperProcessor,
    WhisperTokenizerFast,
    set_seed,
)

from hfkdq import CompressionReport
from hfkdq.cli.main import main as hfkdq

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
MINILM = {"base_model": "sentence-transformers/all-MiniLM-L6-v2", "license": "apache-2.0", "language": "en"}


@dataclass(frozen=True, kw_only=True)
class Card:
    """What is trained on what.

    Args:
        data (`str`): folder of the data set; `rows` makes of it what the task reads, by default its first rows at random.
        base (`Callable`): from the rows that are trained on to the model before its training, and its processor.
        teaching, training (`dict`): training arguments of teacher and student; without `teaching` the base is the teacher.
        recipe (`dict`): other sections of the student's recipe.
        read (`dict`): how the rows are read.
        told (`dict`): what the report says of the model.
        sizes (`tuple` of `int`): how many rows are trained and measured on.
    """

    data: str
    base: Callable[[Dataset], Made]
    training: dict[str, Any]
    teaching: dict[str, Any] | None = None
    rows: Callable[[Any], Any] = lambda rows: rows
    recipe: dict[str, Any] = field(default_factory=dict)
    read: dict[str, Any] = field(default_factory=dict)
    told: dict[str, Any] = field(default_factory=dict)
    sizes: tuple[int, int] = (4000, 300)


def pairs(rows: Dataset) -> Dataset:
    """Questions and sentences of their contexts, half of which have the answer, as QNLI was made of SQuAD."""

    def split(row: dict[str, list[Any]]) -> dict[str, list[Any]]:
        found: dict[str, list[Any]] = {"question": [], "sentence": [], "label": []}
        for question, context, answer in zip(row["question"], row["context"], row["answers"], strict=True):
            sentences, start = context.split(". "), answer["answer_start"][0]
            ends = np.cumsum([len(sentence) + 2 for sentence in sentences])
            right = int(np.searchsorted(ends, start, side="right"))
            wrong = (right + 1) % len(sentences)
            for label, number in enumerate((right, wrong)[: len(sentences)]):
                found["question"].append(question)
                found["sentence"].append(sentences[number])
                found["label"].append(label)
        return found

    made = rows.map(split, batched=True, remove_columns=rows.column_names)
    return made.cast_column("label", ClassLabel(names=["answered", "not answered"]))


def filled(rows: Dataset) -> Dataset:
    """Paragraphs."""
    return rows.filter(lambda text: len(text) > 200, input_columns="text")


def brief(rows: Dataset) -> Dataset:
    """Sentences of 30 letters at most."""
    return rows.filter(lambda en, de: max(len(en), len(de)) <= 30, input_columns=["en", "de"])


def masks(rows: Dataset) -> Dataset:
    """Images with the class of each pixel: the ellipse in each box, as blood cells are round."""

    def draw(row: dict[str, Any]) -> dict[str, Any]:
        canvas = Pictures.new("L", row["image"].size)
        for (x, y, w, h), kind in zip(row["objects"]["bbox"], row["objects"]["category"], strict=True):
            ImageDraw.Draw(canvas).ellipse((x, y, x + w, y + h), fill=kind + 1)
        return {
            "image": row["image"].resize((160, 120)),
            "mask": canvas.resize((160, 120), Pictures.Resampling.NEAREST),
        }

    return rows.map(draw, remove_columns=rows.column_names).cast_column("mask", Image())


def tokenizer_of(lines: Iterable[str], size: int, template: str | None) -> PreTrainedTokenizerFast:
    """Byte pairs of the texts."""
    made = ByteLevelBPETokenizer()
    made.train_from_iterator(lines, vocab_size=size, special_tokens=SPECIAL, show_progress=False)
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    if template is not None:
        numbers = [(token, SPECIAL.index(token)) for token in ("[CLS]", "[SEP]")]
        made.post_processor = processors.TemplateProcessing(single=template, special_tokens=numbers)
    return PreTrainedTokenizerFast(
        tokenizer_object=made._tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        mask_token="[MASK]", eos_token="[SEP]", model_max_length=64, model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip


def sentence_pairs(rows: Dataset) -> Made:
    names = names_of(rows.features["label"])
    return AutoModelForSequenceClassification.from_pretrained(pretrained(), **names), _tokenizer()


def embeddings(rows: Dataset) -> Made:
    return AutoModel.from_pretrained(pretrained(), add_pooling_layer=False), _tokenizer()


def _tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(pretrained())


def masked_words(rows: Dataset) -> Made:
    return AutoModelForMaskedLM.from_pretrained(pretrained()), _tokenizer()


def next_words(rows: Dataset) -> Made:
    tokenizer = tokenizer_of(rows["text"], 3000, None)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, bos_token_id=2, eos_token_id=3,
    )  # fmt: skip
    return LlamaForCausalLM(config), tokenizer


def translator(rows: Dataset) -> Made:
    lines = [text for language in ("en", "de") for text in rows[language]]
    tokenizer = tokenizer_of(lines, 2000, "$A [SEP]")
    config = BartConfig(
        vocab_size=len(tokenizer), d_model=128, encoder_layers=3, decoder_layers=3, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=512, decoder_ffn_dim=512, max_position_embeddings=64, scale_embedding=True,
        pad_token_id=0, bos_token_id=2, eos_token_id=3, decoder_start_token_id=3, forced_eos_token_id=None,
    )  # fmt: skip
    model = BartForConditionalGeneration(config)
    model.generation_config.max_new_tokens = 24
    return model, tokenizer


def transcriber(rows: Dataset) -> Made:
    """A Whisper for a second of sound, which spells letter by letter."""
    marks = ["<|endoftext|>", "<|startoftranscript|>", "<|transcribe|>", "<|translate|>", "<|notimestamps|>"]
    symbols = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *marks]
    with tempfile.TemporaryDirectory() as folder:
        merges = Path(folder, "merges.txt")
        merges.write_text("#version: 0.2\n")
        tokenizer = WhisperTokenizerFast(vocabulary_file(folder, symbols), str(merges))
    tokenizer.add_special_tokens({"pad_token": marks[0], "additional_special_tokens": marks})
    tokenizer.set_prefix_tokens(predict_timestamps=False)
    extractor = WhisperFeatureExtractor(feature_size=40, sampling_rate=8000, chunk_length=1, hop_length=160, n_fft=400)
    end, start = tokenizer.convert_tokens_to_ids(marks[:2])
    config = WhisperConfig(
        vocab_size=len(tokenizer), d_model=128, encoder_layers=4, decoder_layers=4, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=512, decoder_ffn_dim=512, num_mel_bins=40, max_source_positions=25,
        max_target_positions=32, pad_token_id=end, bos_token_id=end, eos_token_id=end, decoder_start_token_id=start,
        suppress_tokens=None, begin_suppress_tokens=None,
    )  # fmt: skip
    model = WhisperForConditionalGeneration(config)
    model.generation_config.max_length = 16
    return model, WhisperProcessor(extractor, tokenizer)


def pixels(rows: Dataset) -> Made:
    names = ["background", "RBC", "WBC", "platelets"]
    config = SegformerConfig(
        hidden_sizes=[16, 32, 64, 128], decoder_hidden_size=64, depths=[1, 1, 1, 1], num_attention_heads=[1, 2, 4, 8],
        sr_ratios=[4, 2, 1, 1], id2label=dict(enumerate(names)), label2id={name: i for i, name in enumerate(names)},
    )  # fmt: skip
    size = {"height": 96, "width": 128}
    return SegformerForSemanticSegmentation(config), SegformerImageProcessor(size=size, do_reduce_labels=False)


LOGITS: list[Any] = [{"TaskLoss": {"weight": 0.5}}, {"LogitKD": {"temperature": 2.0}}]
HALF = {"student": {"num_layers": 2}, "objectives": LOGITS}
THIRD = {"student": {"num_layers": 3}, "objectives": LOGITS}
EIGHT = {"weight_bits": 8, "activation_bits": 8}
BOTH = {"student": {"num_layers": 2, "num_decoder_layers": 2}, "objectives": LOGITS}
CARDS = {
    "text-classification": Card(
        data="rotten_tomatoes", base=texts, teaching=steps(80, 3e-4, 16), training=steps(50, 3e-4, 16),
        recipe=THIRD, read={"max_length": 32}, told=MINILM,
    ),
    "text-pairs": Card(
        data="squad", rows=pairs, base=sentence_pairs, teaching=steps(250, 2e-4, 16), training=steps(150, 3e-4, 16),
        recipe=THIRD, read={"max_length": 64}, told=MINILM,
    ),
    "token-classification": Card(
        data="wnut17", base=words, teaching=steps(200, 2e-4, 16), training=steps(120, 3e-4, 16), recipe=THIRD,
        read={"max_length": 48}, told=MINILM,
    ),
    "question-answering": Card(
        data="squad", rows=short, base=answers, teaching=steps(300, 2e-4, 16), training=steps(150, 3e-4, 16), recipe=THIRD,
        read={"max_length": 128}, told=MINILM, sizes=(10000, 300),
    ),
    "feature-extraction": Card(
        data="rotten_tomatoes", base=embeddings, training=steps(200, 3e-4, 16), read={"max_length": 32}, told=MINILM,
        recipe={"student": {"num_layers": 3}, "objectives": [{"HiddenStateKD": {"layers": {2: 5}}}, "SimilarityPreservingKD"]},
    ),
    "fill-mask": Card(
        data="wikitext2", rows=filled, base=masked_words, teaching=steps(250, 3e-4, 8), training=steps(150, 5e-4, 8), recipe=THIRD,
        read={"max_length": 64}, told=MINILM, sizes=(4000, 100),
    ),
    "text-generation": Card(
        data="wikitext2", rows=filled, base=next_words, teaching=steps(600, 2e-3), training=steps(200, 2e-3), recipe=HALF,
        sizes=(4000, 100),
    ),
    "translation": Card(
        data="tatoeba_en_de", rows=brief, base=translator, teaching=steps(2000, 1e-3, 64), training=steps(700, 1e-3, 64), recipe=BOTH,
        read={"max_length": 24, "text_columns": ["en", "de"]}, sizes=(60000, 200),
    ),
    "image-segmentation": Card(
        data="bccd", rows=masks, base=pixels, teaching=steps(200, 1e-3, 8), training=steps(100, 5e-4, 8),
        recipe={"objectives": LOGITS, "pruning": {"structure": "neuron", "sparsity": 0.25, "plain_checkpoint": False}}, sizes=(205, 72),
    ),
    "object-detection": Card(
        data="bccd", base=boxes([24, 48, 96, 192], 64, 3), teaching=steps(2400, 1e-3, 8), training=steps(300, 5e-4, 8), sizes=(205, 72),
        recipe={"student": {"num_decoder_layers": 1}, "objectives": ["TaskLoss", {"LogitKD": {"temperature": 1.0}}, "BoxKD"]},
        told={"resamples": 100},  # an interval of a mean precision takes minutes
    ),
    "audio-classification": Card(
        data="fsdd", base=sounds, teaching=steps(1000, 5e-4), training=steps(400, 5e-4), recipe=THIRD, sizes=(2700, 300),
    ),
    "speech-ctc": Card(
        data="fsdd", base=letters, teaching=steps(800, 1e-3, 16), training=steps(300, 1e-3, 16), recipe=HALF, sizes=(2700, 300),
    ),
    "speech-whisper": Card(
        data="fsdd", base=transcriber, teaching=steps(1200, 1e-3, 16), training=steps(400, 1e-3, 16), recipe=BOTH, sizes=(2700, 300),
    ),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder of the data sets")
    parser.add_argument(
        "--render", action="store_true", help="only write the cards anew of the reports that there are"
    )
    parser.add_argument("--output_dir", type=Path, default=Path("out/model-cards"))
    parser.add_argument("--cards", type=Path, default=Path("model_cards"), help="where cards and reports go")
    parser.add_argument("--tasks", nargs="+", choices=list(CARDS), default=list(CARDS))
    parser.add_argument(
        "--latency_rounds", type=int, default=0, help="turns in which files are timed, on a quiet machine"
    )
    parser.add_argument("--steps", type=int, help="steps of every training, for a quick look")
    options = parser.parse_args()
    if options.render:
        for path in options.cards.glob("*.json"):
            write(CompressionReport.load(path), path)
        return
    if options.data is None:
        parser.error("Name the data: --data path/to/folder")
    failed = [name for name in options.tasks if not make(name, CARDS[name], options)]
    if failed:
        raise SystemExit(f"No card of {', '.join(failed)}; the errors are above.")


def make(name: str, card: Card, options: argparse.Namespace) -> bool:
    """Trains teacher and student of a task, unless that was done before, and writes its card and report."""
    folder = options.output_dir / name
    rows = prepare(options.data / card.data, folder / "data", card.rows, card.sizes)
    if not (folder / "base").exists():
        set_seed(0)
        for part in card.base(rows["train"]):
            part.save_pretrained(folder / "base")
    common = {"data": {"train": f"{folder / 'data'}:train", "eval": f"{folder / 'data'}:test", **card.read}}
    recipe = {
        **common, "model": str(folder / "base"), "training": card.training, "quantization": EIGHT, "export": {},
        "report": {"dataset": card.data, "latency_rounds": options.latency_rounds, **card.told}, **card.recipe,
    }  # fmt: skip
    if card.teaching is not None:
        recipe["model"] = str(folder / "teacher" / "student")
        teacher = {**common, "model": str(folder / "base"), "training": card.teaching}
        if not compress(teacher, folder / "teacher", options.steps):
            return False
    if not compress(recipe, folder / "student", options.steps):
        return False
    report = CompressionReport.load(folder / "student" / "report.json")
    report = dataclasses.replace(report, mistakes=())  # whose rows, with their images and sounds, are the data's
    options.cards.mkdir(exist_ok=True)
    write(report, options.cards / f"{name}.json")
    return True


def write(report: CompressionReport, path: Path) -> None:
    """Saves a report, and its card beside it."""
    report.save(path)
    path.with_suffix(".md").write_text(report.to_card(), encoding="utf-8")


def compress(recipe: dict[str, Any], folder: Path, count: int | None) -> bool:
    """`hfkdq compress`, unless it was done before; whether there is a result."""
    if (folder / "recipe.yaml").exists() and (folder / "student").exists():
        return True
    if count is not None:
        recipe = {**recipe, "training": {**recipe["training"], "max_steps": count}}
    file = folder.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return hfkdq(["compress", str(file), "--output-dir", str(folder)]) == 0


if __name__ == "__main__":
    main()
