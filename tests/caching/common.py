# SPDX-License-Identifier: Apache-2.0
"""Teachers of every kind of head with rows for them, and batches of their cached outputs beside live ones."""

from __future__ import annotations

import numpy as np
import torch
from accelerate import Accelerator
from datasets import Dataset
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertForQuestionAnswering,
    DataCollatorForSeq2Seq,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForCTC,
    YolosConfig,
    YolosForObjectDetection,
    default_data_collator,
    set_seed,
)

from hfkdq.caching import CachedCollator, CachedTeacher, cache_info, cache_teacher_outputs
from hfkdq.teachers import FrozenTeacher
from tests import tiny


def padder(side: str = "right"):
    tokenizer = tiny.tokenizer()
    tokenizer.padding_side = side
    return tokenizer


def language_rows(rows: int = 10, seed: int = 0) -> Dataset:
    """Texts with themselves as labels, as of causal language models; the first two tokens are a prompt."""
    return tiny.text_dataset(rows, seed=seed).map(lambda row: {"labels": [-100, -100, *row["input_ids"][2:]]})


def bart(seed: int = 0) -> BartForConditionalGeneration:
    set_seed(seed)
    config = BartConfig(
        vocab_size=95, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=32,
        pad_token_id=0, bos_token_id=2, eos_token_id=3, decoder_start_token_id=3, forced_eos_token_id=3, init_std=0.3,
    )  # fmt: skip
    return BartForConditionalGeneration(config).eval()


def translations(rows: int = 10) -> Dataset:
    labels = [[*range(5 + i, 7 + i + i % 4), 3] for i in range(rows)]
    return tiny.text_dataset(rows).remove_columns("labels").add_column("labels", labels)


def questions(seed: int = 0) -> BertForQuestionAnswering:
    set_seed(seed)
    return BertForQuestionAnswering(tiny.bert_config(labels=2)).eval()


def speech(seed: int = 0, **kwargs) -> Wav2Vec2ForCTC:
    set_seed(seed)
    config = Wav2Vec2Config(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, conv_dim=(8, 8),
        conv_stride=(20, 10), conv_kernel=(20, 10), num_feat_extract_layers=2, num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2, layerdrop=0.0, vocab_size=12, feat_extract_norm="layer",
        do_stable_layer_norm=True, initializer_range=0.3, **kwargs,
    )  # fmt: skip
    return Wav2Vec2ForCTC(config).eval()


def sounds(rows: int = 6) -> Dataset:
    rng = np.random.default_rng(0)
    lengths = [1500 + 431 * (i % 4) for i in range(rows)]
    return Dataset.from_dict({"input_values": [rng.normal(size=n).astype("float32").tolist() for n in lengths]})


def detector(seed: int = 0) -> YolosForObjectDetection:
    set_seed(seed)
    config = YolosConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=[8, 8],
        patch_size=4, num_channels=1, num_detection_tokens=5, num_labels=3, initializer_range=0.3,
    )  # fmt: skip
    return YolosForObjectDetection(config).eval()


def multi_label(seed: int = 0):
    return tiny.bert(seed, problem_type="multi_label_classification")


def several_labels() -> Dataset:
    return tiny.text_dataset(10).map(
        lambda row: {"labels": [1.0, 0.0, float(row["labels"] > 0)]}, load_from_cache_file=False
    )


def regression(seed: int = 0):
    return tiny.bert(seed, labels=1)


def images() -> Dataset:
    return tiny.image_dataset(6)


def sound_collator():
    return DataCollatorWithPadding(Wav2Vec2FeatureExtractor(return_attention_mask=True))


# Kind of head: teacher, rows, collator, and the outputs that are compared with the batch's positions that count.
KINDS = {
    "class": (tiny.bert, lambda: tiny.text_dataset(10), lambda: DataCollatorWithPadding(padder())),
    "image": (tiny.vit, images, lambda: default_data_collator),
    "multi label": (multi_label, several_labels, lambda: DataCollatorWithPadding(padder())),
    "regression": (regression, lambda: tiny.text_dataset(10), lambda: DataCollatorWithPadding(padder())),
    "tokens": (tiny.bert_tokens, lambda: tiny.token_dataset(10), lambda: DataCollatorForTokenClassification(padder())),
    "causal": (tiny.llama, language_rows, lambda: DataCollatorForTokenClassification(padder())),
    "causal, left": (tiny.llama, language_rows, lambda: DataCollatorForTokenClassification(padder("left"))),
    "seq2seq": (bart, translations, lambda: DataCollatorForSeq2Seq(padder())),
    "span": (questions, lambda: tiny.text_dataset(10).remove_columns("labels"), lambda: DataCollatorWithPadding(padder())),
    "ctc": (speech, sounds, sound_collator),
    "detection": (detector, lambda: images().remove_columns("labels"), lambda: default_data_collator),
}  # fmt: skip


def cached(teacher, rows, collator, folder, **kwargs):
    """The dataset with outputs, in batches of 4 rows so that padding differs from that of the training."""
    return cache_teacher_outputs(teacher, rows, data_collator=collator, folder=folder, batch_size=4, **kwargs)


def both(teacher, dataset, collator, rows=(5, 1, 3, 0), needs=frozenset({"logits"}), indices=None):
    """A batch of some rows, and the outputs of the cached and the live teacher for it."""
    info = cache_info(dataset)
    batch = CachedCollator(collator, info)(dataset.__getitems__(list(rows)))
    indices = indices or {"hidden_states": frozenset(info.layers)}
    found = CachedTeacher(info, "cpu")(batch, needs, indices, step=1)
    live = FrozenTeacher(teacher, Accelerator(cpu=True), ["labels", "start_positions", "end_positions"])
    return batch, found, live(batch, needs, indices, step=1)


def frames_of(teacher, batch) -> torch.Tensor:
    """Which frames of a batch of sound are a row's own, by a loop."""
    lengths = [int(teacher._get_feat_extract_output_lengths(int(n))) for n in batch["attention_mask"].sum(1)]
    total = int(teacher._get_feat_extract_output_lengths(batch["input_values"].shape[1]))
    return torch.tensor([[i < n for i in range(total)] for n in lengths])
