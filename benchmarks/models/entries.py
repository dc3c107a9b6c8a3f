# SPDX-License-Identifier: Apache-2.0
"""The families of the table, one entry each: a class, the settings of a tiny configuration and the kind of its inputs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import transformers as tf

from hfkdq import HiddenStateKD, LogitKD
from hfkdq.modeling.tasks import task_of
from tests.families import FAMILIES, VOCABULARY, randomise_

from . import batches as b
from . import own

T = dict(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
         max_position_embeddings=64, num_labels=3, initializer_range=0.2, pad_token_id=0, bos_token_id=1, eos_token_id=2)  # fmt: skip
KV = {**T, "num_key_value_heads": 2}
V = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, image_size=32, patch_size=8,
         num_channels=3, num_labels=3, initializer_range=0.2)  # fmt: skip
ED = dict(vocab_size=VOCABULARY, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
          decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=40, init_std=0.2, pad_token_id=0, bos_token_id=1,
          eos_token_id=2, decoder_start_token_id=2, forced_eos_token_id=2, max_position_embeddings=64)  # fmt: skip
S = dict(FAMILIES["wav2vec2"].settings, num_hidden_layers=2)
TEXT_PART = dict(T, projection_dim=16, num_hidden_layers=2)
RESNET = dict(model_type="resnet", num_channels=3, embedding_size=8, hidden_sizes=[16, 32], depths=[1, 1],
              layer_type="basic", out_features=["stage2"])  # fmt: skip
PYRAMID = dict(RESNET, hidden_sizes=[8, 16, 16, 16], depths=[1, 1, 1, 1], out_features=["stage2", "stage3", "stage4"])
DETR = dict(d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
            encoder_ffn_dim=48, decoder_ffn_dim=40, init_std=0.2, num_queries=5, num_labels=3, use_timm_backbone=False,
            use_pretrained_backbone=False, backbone=None, backbone_config=RESNET)  # fmt: skip
RT = dict(encoder_hidden_dim=32, encoder_in_channels=[16, 16, 16], encoder_layers=1, encoder_ffn_dim=48,
          encoder_attention_heads=4, d_model=32, num_queries=6, decoder_in_channels=[32, 32, 32], decoder_ffn_dim=40,
          num_feature_levels=3, decoder_n_points=2, decoder_layers=4, decoder_attention_heads=4, num_denoising=4,
          num_labels=3, anchor_image_size=None)  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """One row of the table.

    Args:
        title (`str`): the family as people call it.
        model (`str`): the class, of Transformers or of `own.py`.
        config (`str`): the class of its configuration.
        settings (`dict`): what the configuration is made of; nested configurations are dictionaries.
        batch (`Callable`): makes a labelled batch.
        group (`str`): the part of the table.
        nested (`dict`): names of settings whose dictionaries are made configurations by `AutoConfig` first.
        labelled (`bool`): whether the class computes a loss by itself.
        does (`str`): its task, where hfkdq knows none of the class, or Transformers lacks the class.
        objective (`Callable`): makes what distils it.
        counts (`bool`): whether a Trainer may tell the class how many labels a step has; BLIP and CLAP hand the number on
            to a class that does not take it.
        labels (`int`, *optional*): how many classes another head has than the settings say.
    """

    title: str
    model: str
    config: str
    settings: dict[str, Any]
    batch: Callable[[], b.Batch]
    group: str
    nested: tuple[str, ...] = ()
    labelled: bool = True
    does: str = "own"
    objective: Callable[[], Any] = LogitKD
    labels: int | None = None
    counts: bool = True

    @property
    def task(self) -> str:
        """What the class is for, in the words of the Hub."""
        found = task_of(self.model)
        return found.name if found else self.does

    @property
    def exists(self) -> bool:
        """Whether the installed Transformers has the classes."""
        return all(hasattr(own, name) or getattr(tf, name, None) is not None for name in (self.model, self.config))

    def make(self, seed: int = 0) -> tf.PreTrainedModel:
        """The model with random weights, biases and norms included, in eval mode."""
        torch.manual_seed(seed)
        return randomise_(self._class(self.model)(self.configuration()), seed)

    def configuration(self) -> tf.PretrainedConfig:
        """A new configuration of the settings."""
        settings = copy.deepcopy(self.settings)  # configurations take parts out of what they are given
        for name in self.nested:
            inner = settings[name]
            settings[name] = tf.AutoConfig.for_model(inner.pop("model_type"), **inner)
        config = self._class(self.config)(**settings)
        if self.labels is not None:
            config.num_labels = self.labels
            config.pad_token_id = getattr(config, "pad_token_id", None) or 0
        return config

    @staticmethod
    def _class(name: str) -> Any:
        return getattr(own, name, None) or getattr(tf, name)


def _text(title: str, stem: str, settings: dict[str, Any] = T, **kwargs: Any) -> Entry:
    batch = kwargs.pop("batch", b.classified_text)
    kwargs.setdefault("does", "text-classification")
    return Entry(
        title, f"{stem}ForSequenceClassification", f"{stem}Config", settings, batch, "Text encoders", **kwargs
    )


def _decoder(title: str, stem: str, settings: dict[str, Any] = KV, model: str | None = None, **kwargs: Any) -> Entry:
    model, config = model or f"{stem}ForCausalLM", kwargs.pop("config", f"{stem}Config")
    return Entry(title, model, config, settings, b.next_tokens, "Text decoders", **kwargs)


def _both(title: str, model: str, config: str, settings: dict[str, Any] = ED, **kwargs: Any) -> Entry:
    return Entry(title, model, config, settings, b.pairs, "Encoder-decoders", **kwargs)


def _image(title: str, stem: str, settings: dict[str, Any], size: int = 32, **kwargs: Any) -> Entry:
    model = kwargs.pop("model", f"{stem}ForImageClassification")
    batch = kwargs.pop("batch", partial(b.images, size))
    return Entry(title, model, f"{stem}Config", settings, batch, "Images", **kwargs)


def _detector(title: str, stem: str, settings: dict[str, Any], size: int = 64, **kwargs: Any) -> Entry:
    model, kwargs = f"{stem}ForObjectDetection", {"does": "object-detection", **kwargs}
    return Entry(title, model, f"{stem}Config", settings, partial(b.boxes, size), "Detectors", **kwargs)


def _speech(
    title: str, model: str, config: str, settings: dict[str, Any], batch: Any = b.waves, **kwargs: Any
) -> Entry:
    return Entry(title, model, config, settings, batch, "Speech and sound", **kwargs)


def _of(name: str) -> dict[str, Any]:
    """The settings that the tests use."""
    return FAMILIES[name].settings


def _gpt2(**changes: Any) -> dict[str, Any]:
    return {**dict(vocab_size=VOCABULARY, n_positions=64, n_embd=32, n_layer=2, n_head=4, initializer_range=0.2,
                   bos_token_id=1, eos_token_id=2), **changes}  # fmt: skip


_DEBERTA = {**_of("deberta-v2"), "num_hidden_layers": 2}
_CONV = dict(num_channels=3, num_labels=3, image_size=64)
_STAGES = dict(hidden_sizes=[8, 16], depths=[2, 2], num_labels=3)
_AUDIO_PART = dict(window_size=4, num_mel_bins=16, spec_size=32, patch_size=4, patch_stride=[4, 4], hidden_size=32,
                   depths=[2, 2], num_attention_heads=[2, 4], num_hidden_layers=2, patch_embeds_hidden_size=16,
                   projection_dim=16, enable_patch_layer_norm=True)  # fmt: skip

ENTRIES: dict[str, Entry] = {
    "bert": _text("BERT", "Bert"),
    "roberta": _text("RoBERTa", "Roberta"),
    "xlm-roberta": _text("XLM-R", "XLMRoberta"),
    "distilbert": _text("DistilBERT", "DistilBert", {**_of("distilbert"), "n_layers": 2}),
    "modernbert": _text("ModernBERT", "ModernBert", {
        **T, "num_hidden_layers": 4, "global_attn_every_n_layers": 2, "local_attention": 8, "reference_compile": False,
        "cls_token_id": 1, "sep_token_id": 2}),
    "deberta-v3": _text("DeBERTa-v3", "DebertaV2", _DEBERTA),
    "nomic-bert": _text("Nomic BERT", "NomicBert"),
    "albert": _text("ALBERT", "Albert", {**T, "embedding_size": 16}),
    "electra": _text("ELECTRA", "Electra", {**T, "embedding_size": 16}),
    "mpnet": _text("MPNet", "MPNet", {**T, "pad_token_id": 1}),
    "longformer": _text("Longformer", "Longformer", {**T, "attention_window": [4, 4]}),
    "bigbird": _text("BigBird", "BigBird", {**T, "attention_type": "block_sparse", "block_size": 4, "num_random_blocks": 1}),
    "funnel": _text("Funnel", "Funnel", dict(
        vocab_size=VOCABULARY, block_sizes=[2, 2], num_decoder_layers=1, d_model=32, n_head=4, d_head=8, d_inner=48,
        num_labels=3, initializer_std=0.2)),
    "fnet": _text("FNet", "FNet", batch=b.unmasked_text),
    "xlnet": _text("XLNet", "XLNet", dict(
        vocab_size=VOCABULARY, d_model=32, n_layer=2, n_head=4, d_inner=48, num_labels=3, initializer_range=0.2,
        pad_token_id=0)),
    "layoutlm": _text("LayoutLM", "LayoutLM", {**T, "max_2d_position_embeddings": 64}, batch=b.pages),
    "convbert": _text("ConvBERT", "ConvBert", {**T, "embedding_size": 32, "head_ratio": 2, "conv_kernel_size": 3}),
    "squeezebert": _text("SqueezeBERT", "SqueezeBert", {**T, "embedding_size": 32}),
    "mobilebert": _text("MobileBERT", "MobileBert", {
        **T, "embedding_size": 16, "intra_bottleneck_size": 16, "true_hidden_size": 16, "num_feedforward_networks": 2}),
    "roformer": _text("RoFormer", "RoFormer", {**T, "embedding_size": 32}),
    "perceiver": _text("Perceiver", "Perceiver", dict(
        vocab_size=VOCABULARY, num_latents=8, d_latents=32, d_model=16, num_blocks=1, num_self_attends_per_block=2,
        num_self_attention_heads=4, num_cross_attention_heads=4, max_position_embeddings=12, num_labels=3,
        initializer_range=0.2)),
    "gpt2": _decoder("GPT-2", "GPT2", _gpt2(n_inner=48), "GPT2LMHeadModel"),
    "gpt-neo": _decoder("GPT-Neo", "GPTNeo", dict(
        vocab_size=VOCABULARY, hidden_size=32, num_layers=2, num_heads=4, intermediate_size=48, window_size=8,
        attention_types=[[["global", "local"], 1]], max_position_embeddings=64, initializer_range=0.2, bos_token_id=1,
        eos_token_id=2)),
    "gpt-neox": _decoder("GPT-NeoX", "GPTNeoX", T),
    "opt": _decoder("OPT", "OPT", {**T, "ffn_dim": 48, "word_embed_proj_dim": 32, "init_std": 0.2}),
    "bloom": _decoder("BLOOM", "Bloom", dict(
        vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.2, pad_token_id=0)),
    "falcon": _decoder("Falcon", "Falcon", T),
    "llama": _decoder("Llama", "Llama"),
    "mistral": _decoder("Mistral", "Mistral", {**KV, "sliding_window": 8}),
    "mixtral": _decoder("Mixtral", "Mixtral", {**KV, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}),
    "qwen2": _decoder("Qwen2", "Qwen2"),
    "qwen3": _decoder("Qwen3", "Qwen3", {**KV, "head_dim": 8}),
    "qwen3-moe": _decoder("Qwen3-MoE", "Qwen3Moe", {
        **KV, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}),
    "phi": _decoder("Phi", "Phi"),
    "phi3": _decoder("Phi-3", "Phi3"),
    "gemma3": _decoder("Gemma 3", "Gemma3", {
        **KV, "num_hidden_layers": 4, "head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 8,
        "layer_types": ["sliding_attention", "full_attention"] * 2}, config="Gemma3TextConfig"),
    "smollm3": _decoder("SmolLM3", "SmolLM3", {**KV, "no_rope_layer_interval": 2}),
    "olmo2": _decoder("OLMo 2", "Olmo2"),
    "granite": _decoder("Granite", "Granite"),
    "starcoder2": _decoder("StarCoder2", "Starcoder2"),
    "cohere": _decoder("Cohere", "Cohere"),
    "gpt-oss": _decoder("gpt-oss", "GptOss", {
        **KV, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8}),
    "mamba": _decoder("Mamba", "Mamba", dict(
        vocab_size=VOCABULARY, hidden_size=32, state_size=8, num_hidden_layers=2, time_step_rank=4, pad_token_id=0,
        bos_token_id=1, eos_token_id=2)),
    "mamba2": _decoder("Mamba-2", "Mamba2", dict(
        vocab_size=VOCABULARY, hidden_size=32, state_size=8, num_hidden_layers=2, num_heads=4, head_dim=16, n_groups=2,
        chunk_size=8, pad_token_id=0, bos_token_id=1, eos_token_id=2)),
    "gptj": _decoder("GPT-J", "GPTJ", _gpt2(n_inner=48, rotary_dim=4)),
    "mpt": _decoder("MPT", "Mpt", dict(
        vocab_size=VOCABULARY, d_model=32, n_layers=2, n_heads=4, expansion_ratio=2, max_seq_len=64, initializer_range=0.2,
        pad_token_id=0, bos_token_id=1, eos_token_id=2)),
    "gemma2": _decoder("Gemma 2", "Gemma2", {
        **KV, "num_hidden_layers": 4, "head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 8,
        "layer_types": ["sliding_attention", "full_attention"] * 2}),
    "deepseek-v3": _decoder("DeepSeek-V3", "DeepseekV3", {
        **T, "num_hidden_layers": 3, "num_key_value_heads": 4, "moe_intermediate_size": 24, "n_routed_experts": 4,
        "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1, "kv_lora_rank": 16,
        "q_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8}),
    "t5": _both("T5", "T5ForConditionalGeneration", "T5Config", {**_of("t5"), "num_decoder_layers": 2}),
    "t5gemma": _both("T5Gemma", "T5GemmaForConditionalGeneration", "T5GemmaConfig", dict(
        vocab_size=VOCABULARY, decoder_start_token_id=1, **{part: dict(
            {k: v for k, v in KV.items() if k != "num_labels"}, head_dim=8, query_pre_attn_scalar=8, sliding_window=8)
            for part in ("encoder", "decoder")})),
    "bart": _both("BART", "BartForConditionalGeneration", "BartConfig"),
    "mbart": _both("mBART", "MBartForConditionalGeneration", "MBartConfig"),
    "marian": _both("Marian", "MarianMTModel", "MarianConfig", {**ED, "decoder_vocab_size": VOCABULARY}),
    "pegasus": _both("Pegasus", "PegasusForConditionalGeneration", "PegasusConfig"),
    "m2m100": _both("M2M100, NLLB", "M2M100ForConditionalGeneration", "M2M100Config"),
    "led": _both("LED", "LEDForConditionalGeneration", "LEDConfig", {
        **ED, "attention_window": [4, 4], "max_encoder_position_embeddings": 64, "max_decoder_position_embeddings": 64}),
    "vit": _image("ViT", "ViT", V),
    "deit": _image("DeiT", "DeiT", V),
    "beit": _image("BEiT", "Beit", {**V, "use_relative_position_bias": True}),
    "dinov2": _image("DINOv2", "Dinov2", {**V, "mlp_ratio": 2}),
    "dinov3": _image("DINOv3", "DINOv3ViT", V, model="DINOv3ViTModel", batch=partial(b.pixels, 32), labelled=False,
                     does="image features", objective=HiddenStateKD),
    "swin": _image("Swin", "Swin", _of("swin"), 64),
    "swinv2": _image("Swin v2", "Swinv2", _of("swin"), 64),
    "convnextv2": _image("ConvNeXt V2", "ConvNextV2", {**_of("convnext"), "hidden_sizes": [8, 16]}, 64),
    "mobilenet-v1": _image("MobileNetV1", "MobileNetV1", {**_CONV, "depth_multiplier": 0.125, "min_depth": 8}, 64),
    "mobilenet-v2": _image("MobileNetV2", "MobileNetV2", {**_CONV, "depth_multiplier": 0.125, "min_depth": 8}, 64),
    "mobilevit": _image("MobileViT", "MobileViT", dict(
        _CONV, hidden_sizes=[16, 24, 32], neck_hidden_sizes=[8, 8, 16, 16, 24, 32, 48], num_attention_heads=2,
        mlp_ratio=2.0, initializer_range=0.2), 64),
    "resnet": _image("ResNet", "ResNet", _of("resnet"), 64),
    "efficientnet": _image("EfficientNet", "EfficientNet", dict(
        _CONV, width_coefficient=0.25, depth_coefficient=0.5, hidden_dim=320, kernel_sizes=[3, 3], in_channels=[8, 16],
        out_channels=[16, 32], strides=[1, 2], num_block_repeats=[1, 2], expand_ratios=[1, 4], depthwise_padding=[]), 64),
    "regnet": _image("RegNet", "RegNet", dict(_STAGES, embedding_size=8, groups_width=4), 64),
    "levit": _image("LeViT", "Levit", dict(
        image_size=64, hidden_sizes=[16, 24, 32], num_attention_heads=[2, 2, 2], depths=[2, 2, 2], key_dim=[8, 8, 8],
        patch_size=16, mlp_ratio=[2, 2, 2], attention_ratio=[2, 2, 2], num_labels=3, initializer_range=0.2), 64),
    "pvt-v2": _image("PVT v2", "PvtV2", dict(
        image_size=64, num_channels=3, num_encoder_blocks=2, depths=[2, 2], sr_ratios=[2, 1], hidden_sizes=[16, 32],
        patch_sizes=[7, 3], strides=[4, 2], num_attention_heads=[1, 2], mlp_ratios=[2, 2], num_labels=3), 64),
    "poolformer": _image("PoolFormer", "PoolFormer", dict(
        num_channels=3, hidden_sizes=[8, 16], depths=[2, 2], patch_sizes=[7, 3], strides=[4, 2], padding=[2, 1],
        num_encoder_blocks=2, mlp_ratio=2.0, layer_scale_init_value=0.5, num_labels=3, initializer_range=0.2), 64),
    "cvt": _image("CvT", "Cvt", dict(
        num_channels=3, patch_sizes=[7, 3], patch_stride=[4, 2], patch_padding=[2, 1], embed_dim=[16, 32], num_heads=[1, 2],
        depth=[1, 2], mlp_ratio=[2.0, 2.0], attention_drop_rate=[0.0, 0.0], drop_rate=[0.0, 0.0], drop_path_rate=[0.0, 0.0],
        qkv_bias=[True, True], cls_token=[False, True], qkv_projection_method=["dw_bn", "dw_bn"], kernel_qkv=[3, 3],
        padding_kv=[1, 1], stride_kv=[2, 2], padding_q=[1, 1], stride_q=[1, 1], num_labels=3, initializer_range=0.2), 64),
    "bit": _image("BiT", "Bit", dict(_STAGES, num_channels=3, embedding_size=8, hidden_sizes=[16, 32], num_groups=4), 64),
    "depth-anything": _image("Depth Anything", "DepthAnything", dict(
        backbone_config=dict(V, model_type="dinov2", mlp_ratio=2, out_features=["stage1", "stage2"], reshape_hidden_states=False),
        reassemble_hidden_size=32, patch_size=8, reassemble_factors=[2, 1], neck_hidden_sizes=[8, 16], fusion_hidden_size=8,
        head_hidden_size=8, initializer_range=0.2),
        model="DepthAnythingForDepthEstimation", batch=partial(b.pixels, 32), labelled=False, does="depth-estimation",
        objective=HiddenStateKD, nested=("backbone_config",)),
    "segformer": _image("SegFormer", "Segformer", dict(
        num_encoder_blocks=2, depths=[2, 2], sr_ratios=[2, 1], hidden_sizes=[16, 32], patch_sizes=[7, 3], strides=[4, 2],
        num_attention_heads=[1, 2], mlp_ratios=[2, 2], decoder_hidden_size=16, num_labels=3), 64,
        model="SegformerForSemanticSegmentation", batch=partial(b.areas, 64)),
    "mask2former": _image("Mask2Former", "Mask2Former", dict(
        backbone_config=dict(model_type="swin", image_size=64, patch_size=4, embed_dim=8, depths=[1, 1, 1, 1],
                             num_heads=[1, 2, 2, 2], window_size=4, out_features=["stage1", "stage2", "stage3", "stage4"]),
        feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=24, encoder_layers=2,
        decoder_layers=3, num_attention_heads=2, dim_feedforward=24, num_queries=5, num_labels=3, train_num_points=16), 64,
        model="Mask2FormerForUniversalSegmentation", batch=partial(b.masks, 64), nested=("backbone_config",)),
    "detr": _detector("DETR", "Detr", DETR, nested=("backbone_config",)),
    "conditional-detr": _detector("Conditional DETR", "ConditionalDetr", DETR, nested=("backbone_config",)),
    "deformable-detr": _detector("Deformable DETR", "DeformableDetr", {
        **DETR, "decoder_layers": 4, "num_feature_levels": 2, "encoder_n_points": 2, "decoder_n_points": 2}, nested=("backbone_config",)),
    "rt-detr": _detector("RT-DETR", "RTDetr", {**RT, "backbone_config": dict(
        PYRAMID, model_type="rt_detr_resnet", depths=[1, 1, 1, 1])}, nested=("backbone_config",)),
    "d-fine": _detector("D-FINE", "DFine", {**RT, "eval_idx": -1, "max_num_bins": 8, "lqe_hidden_dim": 8, "backbone_config": dict(
        model_type="hgnet_v2", num_channels=3, stem_channels=[3, 8, 8], stage_in_channels=[8, 8, 16, 16],
        stage_mid_channels=[8, 8, 8, 8], stage_out_channels=[8, 16, 16, 16], stage_num_blocks=[1, 1, 1, 1],
        stage_downsample=[False, True, True, True], stage_light_block=[False, False, True, True],
        stage_kernel_size=[3, 3, 3, 3], stage_numb_of_layers=[1, 1, 1, 1], embedding_size=8, hidden_sizes=[8, 16, 16, 16],
        depths=[1, 1, 1, 1], out_features=["stage2", "stage3", "stage4"])}, nested=("backbone_config",)),
    "rf-detr": _detector("RF-DETR", "RfDetr", dict(
        backbone_config=dict(model_type="rf_detr_dinov2", hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                             mlp_ratio=2, image_size=64, patch_size=8, num_windows=2, out_features=["stage1", "stage2"]),
        decoder_ffn_dim=40, decoder_layers=2, decoder_self_attention_heads=4, decoder_cross_attention_heads=4,
        num_queries=5, group_detr=2, d_model=32, num_labels=3, decoder_n_points=2), nested=("backbone_config",)),
    "yolos": _detector("YOLOS", "Yolos", {**V, "image_size": [32, 32], "num_detection_tokens": 6}, 32),
    "table-transformer": _detector("Table Transformer", "TableTransformer", DETR, nested=("backbone_config",)),
    "owlvit": Entry("OWL-ViT", "OwlViTForObjectDetection", "OwlViTConfig", dict(
        text_config=TEXT_PART, vision_config=V, projection_dim=32), partial(b.searched, 32), "Detectors", labelled=False,
        does="zero-shot-object-detection"),
    "whisper": _speech("Whisper", "WhisperForConditionalGeneration", "WhisperConfig", {
        **_of("whisper"), "decoder_layers": 2}, b.features),
    "moonshine": _speech("Moonshine", "MoonshineForConditionalGeneration", "MoonshineConfig", dict(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, encoder_num_hidden_layers=2,
        decoder_num_hidden_layers=2, encoder_num_attention_heads=4, decoder_num_attention_heads=4,
        max_position_embeddings=64, initializer_range=0.2, pad_token_id=0), b.said),
    "speech2text": _speech("Speech2Text", "Speech2TextForConditionalGeneration", "Speech2TextConfig", {
        **ED, "input_feat_per_channel": 8, "conv_channels": 16, "max_source_positions": 64, "max_target_positions": 32},
        b.frames),
    "wav2vec2": _speech("Wav2Vec2", "Wav2Vec2ForCTC", "Wav2Vec2Config", S),
    "wav2vec2-bert": _speech("Wav2Vec2-BERT", "Wav2Vec2BertForCTC", "Wav2Vec2BertConfig", {
        **{k: v for k, v in S.items() if not k.startswith(("conv", "feat", "num_conv", "num_feat", "do_stable"))},
        "feature_projection_input_dim": 16, "conv_depthwise_kernel_size": 5, "add_adapter": False},
        partial(b.frames, 16, 40, 12)),
    "wavlm": _speech("WavLM", "WavLMForCTC", "WavLMConfig", {**S, "num_buckets": 16, "max_bucket_distance": 32}),
    "hubert": _speech("HuBERT", "HubertForCTC", "HubertConfig", S),
    "unispeech": _speech("UniSpeech", "UniSpeechForCTC", "UniSpeechConfig", {**S, "num_ctc_classes": 12}),
    "sew": _speech("SEW", "SEWForCTC", "SEWConfig", {
        **{k: v for k, v in S.items() if k != "do_stable_layer_norm"}, "squeeze_factor": 2}),
    "data2vec-audio": _speech("Data2Vec audio", "Data2VecAudioForCTC", "Data2VecAudioConfig", {
        **{k: v for k, v in S.items() if k not in ("do_stable_layer_norm", "feat_extract_norm")}, "conv_pos_kernel_size": 5,
        "num_conv_pos_embeddings": 2}),
    "speecht5": _speech("SpeechT5", "SpeechT5ForSpeechToText", "SpeechT5Config", {
        **S, "vocab_size": VOCABULARY, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
        "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 40, "max_text_positions": 64,
        "encoder_max_relative_position": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
        "decoder_start_token_id": 2}, b.said),
    "ast": _speech("AST", "ASTForAudioClassification", "ASTConfig", {
        **{k: v for k, v in V.items() if k != "image_size"}, "patch_size": 8, "frequency_stride": 8, "time_stride": 8,
        "max_length": 32, "num_mel_bins": 16}, b.patches),
    "clap": _speech("CLAP", "ClapModel", "ClapConfig", dict(
        text_config=TEXT_PART, audio_config=_AUDIO_PART, projection_dim=16), b.clips, counts=False),
    "clip": Entry("CLIP", "CLIPModel", "CLIPConfig", dict(
        text_config=TEXT_PART, vision_config=dict(V, projection_dim=16), projection_dim=16), b.image_and_text,
        "Several kinds of input"),
    "siglip": Entry("SigLIP", "SiglipModel", "SiglipConfig", dict(
        text_config=dict(TEXT_PART, projection_size=32), vision_config=V), b.image_and_text, "Several kinds of input"),
    "blip": Entry("BLIP", "BlipForConditionalGeneration", "BlipConfig", dict(
        text_config=dict(TEXT_PART, encoder_hidden_size=32, sep_token_id=2), vision_config=V, projection_dim=16,
        image_text_hidden_size=16),
        lambda: {**b.next_tokens(), **b.pixels()}, "Several kinds of input", counts=False),
    "vilt": Entry("ViLT", "ViltForQuestionAnswering", "ViltConfig", dict(T, image_size=32, patch_size=8, num_channels=3),
                  b.asked, "Several kinds of input"),
    "trocr": Entry("TrOCR", "VisionEncoderDecoderModel", "VisionEncoderDecoderConfig", dict(
        encoder=dict(V, model_type="vit"), decoder=dict(
            ED, model_type="trocr", is_decoder=True, add_cross_attention=True, cross_attention_hidden_size=32),
        decoder_start_token_id=2, pad_token_id=0), b.captions, "Several kinds of input"),
    "llava": Entry("LLaVA", "LlavaForConditionalGeneration", "LlavaConfig", dict(
        vision_config=dict(V, model_type="clip_vision_model", projection_dim=16), text_config=dict(KV, model_type="llama"),
        image_token_index=3, vision_feature_layer=-1), partial(b.questions, 32, 16, 3), "Several kinds of input"),
    "videomae": Entry("VideoMAE", "VideoMAEForVideoClassification", "VideoMAEConfig", {
        **V, "image_size": 16, "num_frames": 4, "tubelet_size": 2}, b.videos, "Several kinds of input"),
    "timesformer": Entry("TimeSformer", "TimesformerForVideoClassification", "TimesformerConfig", {
        **V, "image_size": 16, "num_frames": 4}, b.videos, "Several kinds of input"),
    "patchtst": Entry("PatchTST", "PatchTSTForPrediction", "PatchTSTConfig", dict(
        num_input_channels=2, context_length=32, patch_length=8, patch_stride=8, num_hidden_layers=2, d_model=32,
        num_attention_heads=4, ffn_dim=48, prediction_length=4, init_std=0.2, loss="mse"), b.series,
        "Several kinds of input"),
    "informer": Entry("Informer", "InformerForPrediction", "InformerConfig", dict(
        prediction_length=4, context_length=16, input_size=1, lags_sequence=[1, 2], num_time_features=1, d_model=32,
        encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=48,
        decoder_ffn_dim=40, init_std=0.2, distil=False, attention_type="full"), b.forecasts, "Several kinds of input"),
    "own-cnn": Entry("a CNN of one's own", "OwnCNN", "OwnConfig", dict(num_labels=3), b.images, "Classes of one's own"),
    "own-gru": Entry("a GRU of one's own", "OwnGRU", "OwnConfig", dict(num_labels=3), b.classified_text,
                     "Classes of one's own"),
}  # fmt: skip
