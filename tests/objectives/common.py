# SPDX-License-Identifier: Apache-2.0
"""One step of an objective on two tiny models, and what every objective must hold to."""

from __future__ import annotations

import torch
from transformers import (
    ConvNextConfig,
    ConvNextForImageClassification,
    GPT2Config,
    GPT2LMHeadModel,
    ResNetConfig,
    ResNetForImageClassification,
    Wav2Vec2Config,
    Wav2Vec2ForSequenceClassification,
    set_seed,
)

from tests import tiny


def gpt2(seed=0, layers=2, hidden=32, heads=4, **kwargs):
    set_seed(seed)
    config = GPT2Config(
        vocab_size=96, n_embd=hidden, n_layer=layers, n_head=heads, n_positions=64, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0, initializer_range=0.2, pad_token_id=0, bos_token_id=2, eos_token_id=3, **kwargs,
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval()


def resnet(seed=0, sizes=(8, 12, 16), **kwargs):
    set_seed(seed)
    settings = dict(num_channels=1, embedding_size=8, layer_type="basic", num_labels=3)
    config = ResNetConfig(hidden_sizes=list(sizes), depths=[1] * len(sizes), **{**settings, **kwargs})
    return ResNetForImageClassification(config).eval()


def convnext(seed=0, sizes=(8, 12, 16, 20)):
    set_seed(seed)
    config = ConvNextConfig(num_channels=1, patch_size=2, hidden_sizes=list(sizes), depths=[1] * 4, num_labels=3)
    return ConvNextForImageClassification(config).eval()


def wav2vec2(seed=0, hidden=32, stride=10):
    set_seed(seed)
    config = Wav2Vec2Config(
        hidden_size=hidden, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, conv_dim=(16, 16),
        conv_stride=(20, stride), conv_kernel=(20, 10), num_feat_extract_layers=2, num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4, layerdrop=0.0, num_labels=3, classifier_proj_size=16, vocab_size=32,
        hidden_dropout=0.0, attention_dropout=0.0, feat_proj_dropout=0.0, activation_dropout=0.0, final_dropout=0.0,
        feat_extract_norm="layer", apply_spec_augment=False,
    )  # fmt: skip
    return Wav2Vec2ForSequenceClassification(config).eval()


def sound(lengths=(4000, 3000, 2000), total=4000):
    """A batch of noise of these lengths in samples, padded with zeros."""
    mask = torch.arange(total) < torch.tensor(lengths).unsqueeze(1)
    noise = torch.randn(len(lengths), 4000, generator=torch.Generator().manual_seed(0))
    values = torch.zeros(len(lengths), total)
    values[:, :4000] = noise
    return {"input_values": values * mask, "attention_mask": mask.long()}


def padded(batch, by=3):
    """The same batch with more padding on the right, and other tokens under all of it."""
    ids, mask = (torch.nn.functional.pad(batch[key], (0, by)) for key in ("input_ids", "attention_mask"))
    return {**batch, "input_ids": ids.masked_fill(mask == 0, 7), "attention_mask": mask}


def step(objective, student, teacher, batch):
    """What an objective gives for a batch, run as the trainer runs it, in training mode."""
    request = {f"output_{need}": True for need in objective.needs}
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    student.train()
    with objective.capture() as seen:
        with torch.no_grad():
            teacher_out = teacher(**inputs, **request)
        student_out = student(**inputs, **request)
    return objective(student_out, teacher_out, batch, seen=seen), objective.positions(batch)


def attached(objective, student, teacher):
    objective.attach(student, teacher)
    return objective


def assert_teaches_the_student_alone(objective, student, teacher, batch):
    """There is a gradient in the student and in all learned maps, none in the teacher."""
    objective = attached(objective, student, teacher)
    teacher.requires_grad_(True)
    value, _ = step(objective, student, teacher, batch)
    value.backward()
    gradients = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
    assert all(torch.isfinite(gradient).all() for gradient in gradients.values())
    assert any(gradient.abs().sum() > 0 for name, gradient in gradients.items() if "hfkdq" not in name)
    maps = [name for name, _ in student.named_parameters() if "hfkdq" in name]
    assert all(gradients[name].abs().sum() > 0 for name in maps)
    assert all(p.grad is None for p in teacher.parameters())


__all__ = [
    "assert_teaches_the_student_alone",
    "attached",
    "convnext",
    "gpt2",
    "padded",
    "resnet",
    "sound",
    "step",
    "tiny",
    "wav2vec2",
]
