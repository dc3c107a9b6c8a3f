# SPDX-License-Identifier: Apache-2.0
"""One tiny model of every architecture family that hfkdq prunes, with inputs that fit it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import transformers as tf
from torch import Tensor, nn

from .closeness import batch_for, in_double

VOCABULARY = 60
_TEXT = dict(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48,
             max_position_embeddings=64, num_labels=3, initializer_range=0.2, pad_token_id=0)  # fmt: skip
_IMAGE = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48, image_size=16,
              patch_size=4, num_channels=3, num_labels=3, initializer_range=0.2)  # fmt: skip
_SPEECH = dict(
    hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48, conv_dim=(16, 16),
    conv_stride=(20, 10), conv_kernel=(20, 10), num_feat_extract_layers=2, num_conv_pos_embeddings=16,
    num_conv_pos_embedding_groups=4, layerdrop=0.0, num_labels=3, classifier_proj_size=16, vocab_size=12,
    mask_time_prob=0.0, feat_extract_norm="layer", do_stable_layer_norm=True, pad_token_id=0, initializer_range=0.2,
)  # fmt: skip
_BOTH = dict(d_model=32, encoder_layers=2, decoder_layers=3, encoder_attention_heads=4, decoder_attention_heads=4,
             encoder_ffn_dim=48, decoder_ffn_dim=40, init_std=0.2)  # fmt: skip


def randomise_(model: tf.PreTrainedModel, seed: int) -> tf.PreTrainedModel:
    """Biases start as zeros and norms as ones, and what they hide would not be seen: random ones, in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(generator=generator)
                module.running_var.uniform_(0.5, 2.0, generator=generator)
    return model.eval()


@dataclass(frozen=True)
class Family:
    """How to make a model, and which kind of inputs it takes."""

    model: str
    config: str
    settings: dict
    inputs: str = "text"

    def make(self, seed: int = 0, **changes) -> tf.PreTrainedModel:
        """The model with random weights, biases and norms included, in eval mode."""
        torch.manual_seed(seed)
        config = getattr(tf, self.config)(**{**self.settings, **changes})
        return randomise_(getattr(tf, self.model)(config), seed)

    def batch(self, size: int = 2, seed: int = 0) -> dict[str, Tensor]:
        """Inputs of the model, without labels."""
        return _INPUTS[self.inputs](torch.Generator().manual_seed(seed), size)

    def outputs(self, model: tf.PreTrainedModel) -> Tensor:
        """What the model predicts for `batch()`, in its own precision."""
        batch = batch_for(model, self.batch())
        with torch.no_grad(), in_double(model):
            return model(**batch).logits


def _text(generator: torch.Generator, size: int) -> dict[str, Tensor]:
    ids = torch.randint(4, VOCABULARY, (size, 10), generator=generator)
    mask = torch.ones_like(ids)
    mask[-1, 7:] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def _pairs(generator: torch.Generator, size: int) -> dict[str, Tensor]:
    return {
        **_text(generator, size),
        "decoder_input_ids": torch.randint(4, VOCABULARY, (size, 5), generator=generator),
    }


def _crossing(generator: torch.Generator, size: int) -> dict[str, Tensor]:
    return {**_text(generator, size), "encoder_hidden_states": torch.randn(size, 6, 32, generator=generator)}


_INPUTS: dict[str, Callable[[torch.Generator, int], dict[str, Tensor]]] = {
    "text": _text,
    "pairs": _pairs,
    "crossing": _crossing,
    "image": lambda g, size: {"pixel_values": torch.randn(size, 3, 16, 16, generator=g)},
    "picture": lambda g, size: {"pixel_values": torch.randn(size, 3, 64, 64, generator=g)},
    "wave": lambda g, size: {"input_values": torch.randn(size, 4000, generator=g)},
    "spectrum": lambda g, size: {
        "input_features": torch.randn(size, 8, 40, generator=g),
        "decoder_input_ids": torch.randint(4, VOCABULARY, (size, 5), generator=g),
    },
}

FAMILIES: dict[str, Family] = {
    "bert": Family("BertForSequenceClassification", "BertConfig", _TEXT),
    "roberta": Family("RobertaForSequenceClassification", "RobertaConfig", _TEXT),
    "distilbert": Family(
        "DistilBertForSequenceClassification", "DistilBertConfig",
        dict(vocab_size=VOCABULARY, dim=32, n_layers=3, n_heads=4, hidden_dim=48, max_position_embeddings=64,
             num_labels=3, initializer_range=0.2),
    ),
    "electra": Family("ElectraForSequenceClassification", "ElectraConfig", {**_TEXT, "embedding_size": 16}),
    "mpnet": Family("MPNetForSequenceClassification", "MPNetConfig", {**_TEXT, "pad_token_id": 1}),
    "deberta": Family(
        "DebertaForSequenceClassification", "DebertaConfig",
        {**_TEXT, "relative_attention": True, "pos_att_type": ["c2p", "p2c"], "max_relative_positions": 8, "pooler_hidden_size": 32},
    ),
    "deberta-v2": Family(
        "DebertaV2ForSequenceClassification", "DebertaV2Config",
        {**_TEXT, "relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_buckets": 8,
         "norm_rel_ebd": "layer_norm", "share_att_key": True, "pooler_hidden_size": 32},
    ),
    "gpt2": Family(
        "GPT2LMHeadModel", "GPT2Config",
        dict(vocab_size=VOCABULARY, n_positions=64, n_embd=32, n_layer=3, n_head=4, n_inner=48, initializer_range=0.2,
             bos_token_id=1, eos_token_id=2),
    ),
    "llama": Family(
        "LlamaForCausalLM", "LlamaConfig", {**_TEXT, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2}
    ),
    "t5": Family(
        "T5ForConditionalGeneration", "T5Config",
        dict(vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_decoder_layers=3, num_heads=4,
             feed_forward_proj="gated-gelu", decoder_start_token_id=0, pad_token_id=0, initializer_factor=2.0),
        "pairs",
    ),
    "bart": Family(
        "BartForConditionalGeneration", "BartConfig",
        dict(_BOTH, vocab_size=VOCABULARY, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
             decoder_start_token_id=2, forced_eos_token_id=2),
        "pairs",
    ),
    "vit": Family("ViTForImageClassification", "ViTConfig", _IMAGE, "image"),
    "deit": Family("DeiTForImageClassification", "DeiTConfig", _IMAGE, "image"),
    "swin": Family(
        "SwinForImageClassification", "SwinConfig",
        dict(image_size=64, patch_size=4, num_channels=3, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4,
             mlp_ratio=3.0, num_labels=3, initializer_range=0.2),
        "picture",
    ),
    "convnext": Family(
        "ConvNextForImageClassification", "ConvNextConfig",
        dict(num_channels=3, hidden_sizes=[16, 24], depths=[2, 2], num_stages=2, num_labels=3, image_size=64,
             initializer_range=0.2, layer_scale_init_value=0.5),
        "picture",
    ),
    "resnet": Family(
        "ResNetForImageClassification", "ResNetConfig",
        dict(num_channels=3, embedding_size=8, hidden_sizes=[16, 32], depths=[2, 2], layer_type="bottleneck", num_labels=3),
        "picture",
    ),
    "wav2vec2": Family("Wav2Vec2ForCTC", "Wav2Vec2Config", _SPEECH, "wave"),
    "hubert": Family("HubertForCTC", "HubertConfig", _SPEECH, "wave"),
    "whisper": Family(
        "WhisperForConditionalGeneration", "WhisperConfig",
        dict(_BOTH, vocab_size=VOCABULARY, num_mel_bins=8, max_source_positions=20, max_target_positions=16,
             pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1, suppress_tokens=None,
             begin_suppress_tokens=None),
        "spectrum",
    ),
    "detr": Family(
        "DetrForObjectDetection", "DetrConfig",
        dict(_BOTH, num_queries=5, num_labels=3, use_timm_backbone=False, use_pretrained_backbone=False, backbone=None),
        "picture",
    ),
    "yolos": Family(
        "YolosForObjectDetection", "YolosConfig", {**_IMAGE, "image_size": [16, 16], "num_detection_tokens": 6}, "image"
    ),
}  # fmt: skip


def _detr_settings() -> dict:
    backbone = tf.ResNetConfig(
        num_channels=3,
        embedding_size=8,
        hidden_sizes=[16, 32],
        depths=[1, 1],
        layer_type="basic",
        out_features=["stage2"],
    )
    return {"backbone_config": backbone}


FAMILIES["detr"].settings.update(_detr_settings())
# Other forms of the same families, which keep their heads, neurons or norms elsewhere.
VARIANTS: dict[str, Family] = {
    "bert-decoder": Family(
        "BertLMHeadModel", "BertConfig", {**_TEXT, "is_decoder": True, "add_cross_attention": True}, "crossing"
    ),
    "bert-tied": Family("BertForMaskedLM", "BertConfig", _TEXT),
    "deberta-v2-own-keys": Family(
        "DebertaV2ForSequenceClassification",
        "DebertaV2Config",
        {**FAMILIES["deberta-v2"].settings, "share_att_key": False},
    ),
    "gpt2-default-width": Family("GPT2LMHeadModel", "GPT2Config", {**FAMILIES["gpt2"].settings, "n_inner": None}),
    "hubert-base": Family(
        "HubertForCTC",
        "HubertConfig",
        {**_SPEECH, "feat_extract_norm": "group", "do_stable_layer_norm": False},
        "wave",
    ),
    "llama-all-keys": Family(
        "LlamaForCausalLM", "LlamaConfig", {**FAMILIES["llama"].settings, "num_key_value_heads": 4}
    ),
    "llama-tied": Family(
        "LlamaForCausalLM", "LlamaConfig", {**FAMILIES["llama"].settings, "tie_word_embeddings": True}
    ),
    "t5-relu": Family(
        "T5ForConditionalGeneration", "T5Config", {**FAMILIES["t5"].settings, "feed_forward_proj": "relu"}, "pairs"
    ),
    "wav2vec2-base": Family(
        "Wav2Vec2ForCTC",
        "Wav2Vec2Config",
        {**_SPEECH, "feat_extract_norm": "group", "do_stable_layer_norm": False},
        "wave",
    ),
}
