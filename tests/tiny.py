# SPDX-License-Identifier: Apache-2.0
"""Tiny models, tokenizers and data sets, made from configurations without a network."""

from __future__ import annotations

import numpy as np
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
    Wav2Vec2Config,
    Wav2Vec2ForCTC,
    YolosConfig,
    YolosForObjectDetection,
    set_seed,
)

WORDS = [f"w{i}" for i in range(90)]
VOCABULARY = {token: i for i, token in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS])}


def tokenizer(model_max_length: int = 32) -> PreTrainedTokenizerFast:
    """A BERT-like tokenizer over the words w0 to w89."""
    backend = Tokenizer(models.WordLevel(VOCABULARY, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", VOCABULARY["[CLS]"]), ("[SEP]", VOCABULARY["[SEP]"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_max_length=model_max_length,
        model_input_names=["input_ids", "attention_mask"],
    )


def bert_config(layers: int = 2, hidden: int = 32, heads: int = 4, labels: int = 3, **kwargs) -> BertConfig:
    settings = dict(
        vocab_size=len(VOCABULARY),
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=2 * hidden,
        max_position_embeddings=64,
        num_labels=labels,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.2,
    )
    return BertConfig(**{**settings, **kwargs})


def bert(seed: int = 0, **kwargs) -> BertForSequenceClassification:
    set_seed(seed)
    return BertForSequenceClassification(bert_config(**kwargs)).eval()


def bert_tokens(seed: int = 0, **kwargs) -> BertForTokenClassification:
    set_seed(seed)
    return BertForTokenClassification(bert_config(**kwargs)).eval()


def bert_mlm(seed: int = 0, **kwargs) -> BertForMaskedLM:
    set_seed(seed)
    return BertForMaskedLM(bert_config(**kwargs)).eval()


def distilbert(seed: int = 0, layers: int = 2, labels: int = 3) -> DistilBertForSequenceClassification:
    set_seed(seed)
    config = DistilBertConfig(
        vocab_size=len(VOCABULARY), dim=32, n_layers=layers, n_heads=4, hidden_dim=64, max_position_embeddings=64,
        num_labels=labels, dropout=0.0, attention_dropout=0.0, seq_classif_dropout=0.0, initializer_range=0.2,
    )  # fmt: skip
    return DistilBertForSequenceClassification(config).eval()


def llama(seed: int = 0, layers: int = 2, hidden: int = 32, vocab: int = len(VOCABULARY)) -> LlamaForCausalLM:
    set_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.2,
        pad_token_id=0, bos_token_id=2, eos_token_id=3,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def vit(seed: int = 0, layers: int = 2, hidden: int = 32, labels: int = 3, **kwargs) -> ViTForImageClassification:
    set_seed(seed)
    config = ViTConfig(
        image_size=8, patch_size=2, num_channels=1, hidden_size=hidden, num_hidden_layers=layers,
        num_attention_heads=4, intermediate_size=2 * hidden, num_labels=labels, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0, initializer_range=0.2, **kwargs,
    )  # fmt: skip
    return ViTForImageClassification(config).eval()


def text_dataset(rows: int = 24, labels: int = 3, seed: int = 0) -> Dataset:
    """Token ids of uneven length (4 to 12, unpadded) with a label that the first words decide."""
    rng = np.random.default_rng(seed)
    data = {"input_ids": [], "attention_mask": [], "labels": []}
    for _ in range(rows):
        ids = [2, *rng.integers(5, len(VOCABULARY), size=rng.integers(2, 11)).tolist(), 3]
        data["input_ids"].append(ids)
        data["attention_mask"].append([1] * len(ids))
        data["labels"].append(int(sum(ids) % labels))
    return Dataset.from_dict(data)


def token_dataset(rows: int = 24, labels: int = 3, seed: int = 0) -> Dataset:
    """As `text_dataset`, with a label per token; first and last are -100, so label counts are uneven."""

    def per_token(row):
        return {"labels": [-100, *[i % labels for i in row["input_ids"][1:-1]], -100]}

    return text_dataset(rows, labels, seed).map(per_token)


def image_dataset(rows: int = 24, labels: int = 3, seed: int = 0) -> Dataset:
    """8 x 8 pixel images, one channel, brighter with their label."""
    rng = np.random.default_rng(seed)
    label = rng.integers(0, labels, size=rows)
    pixels = rng.normal(size=(rows, 1, 8, 8)).astype("float32") + label[:, None, None, None]
    return Dataset.from_dict({"pixel_values": pixels.tolist(), "labels": label.tolist()}).with_format("torch")


def batch(model, size: int = 4, seed: int = 0) -> dict[str, torch.Tensor]:
    """A padded batch without labels that fits `model`."""
    generator = torch.Generator().manual_seed(seed)
    if model.main_input_name == "pixel_values":
        return {"pixel_values": torch.randn(size, 1, 8, 8, generator=generator)}
    ids = torch.randint(5, len(VOCABULARY), (size, 10), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(size):
        mask[row, 10 - row % 4 :] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def bert_qa(seed: int = 0, **kwargs) -> BertForQuestionAnswering:
    set_seed(seed)
    return BertForQuestionAnswering(bert_config(**{"labels": 2, **kwargs})).eval()


def wav2vec2_config(hidden: int = 32, layers: int = 2, **kwargs) -> Wav2Vec2Config:
    settings = dict(
        hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=4, intermediate_size=64, conv_dim=(16, 16),
        conv_stride=(20, 10), conv_kernel=(20, 10), num_feat_extract_layers=2, num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4, layerdrop=0.0, num_labels=3, classifier_proj_size=16, vocab_size=12,
        hidden_dropout=0.0, attention_dropout=0.0, activation_dropout=0.0, feat_proj_dropout=0.0, final_dropout=0.0,
        mask_time_prob=0.0, feat_extract_norm="layer", do_stable_layer_norm=True, pad_token_id=0,
        ctc_loss_reduction="mean", initializer_range=0.2,
    )  # fmt: skip
    return Wav2Vec2Config(**{**settings, **kwargs})


def wav2vec2_ctc(seed: int = 0, **kwargs) -> Wav2Vec2ForCTC:
    set_seed(seed)
    return Wav2Vec2ForCTC(wav2vec2_config(**kwargs)).eval()


def yolos(seed: int = 0, queries: int = 6, hidden: int = 32, labels: int = 3) -> YolosForObjectDetection:
    set_seed(seed)
    config = YolosConfig(
        image_size=[16, 16], patch_size=4, num_channels=3, hidden_size=hidden, num_hidden_layers=2, num_labels=labels,
        num_attention_heads=4, intermediate_size=2 * hidden, num_detection_tokens=queries, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0, initializer_range=0.5,
    )  # fmt: skip
    model = YolosForObjectDetection(config)
    for name, parameter in model.named_parameters():
        if "detection_token" in name:  # they start as zeros, so that all queries would be alike
            torch.nn.init.normal_(parameter, std=3.0)
    return model.eval()


def t5(seed: int = 0, layers: int = 2, hidden: int = 32, vocab: int = len(VOCABULARY)) -> T5ForConditionalGeneration:
    set_seed(seed)
    config = T5Config(
        vocab_size=vocab, d_model=hidden, d_kv=8, d_ff=2 * hidden, num_layers=layers, num_heads=4, dropout_rate=0.0,
        decoder_start_token_id=0, pad_token_id=0, eos_token_id=3, initializer_factor=2.0,
    )  # fmt: skip
    return T5ForConditionalGeneration(config).eval()
