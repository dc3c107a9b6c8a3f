# SPDX-License-Identifier: Apache-2.0
"""Norms that move into the convolution before them, and norms that keep their statistics."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel, ResNetConfig, ResNetForImageClassification

from hfkdq import QuantizationSpec
from hfkdq.quantization import prepare_qat_, quantized_modules
from hfkdq.quantization.batch_norm import fold_batch_norm_, freeze_batch_norm_, thaw_batch_norm_
from tests import tiny

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)


def norms_of(model):
    return [module for module in model.modules() if isinstance(module, NORMS)]


def randomize(model):
    """Statistics and parameters as training leaves them, and some scales below zero."""
    torch.manual_seed(0)
    for norm in norms_of(model):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.3, 3.0)
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    assert any((norm.weight < 0).any() for norm in norms_of(model))
    return model.eval()


def resnet():
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 2], layer_type="basic", num_labels=3)
    config.image_size = 32
    return randomize(ResNetForImageClassification(config))


class Own(PreTrainedModel):
    """A model of the layers that it is given, for what the models of Transformers do not have."""

    config_class = PretrainedConfig
    main_input_name = "input_values"

    def __init__(self, config, **layers):
        super().__init__(config)
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, input_values):
        return self.first_norm(self.first(input_values))


def own(cls=Own, **layers):
    return randomize(cls(PretrainedConfig(), **layers))


def test_folded_resnet_computes_the_same_with_the_same_keys():
    model = resnet()
    folded, images = copy.deepcopy(model), torch.randn(2, 3, 32, 32)
    assert fold_batch_norm_(folded) == len(norms_of(model)) == 8
    torch.testing.assert_close(folded(images).logits, model(images).logits, rtol=1e-4, atol=1e-4)
    assert list(folded.state_dict()) == list(model.state_dict())
    for norm in norms_of(folded):
        plain = nn.functional.batch_norm(
            torch.zeros(1, norm.num_features), torch.zeros_like(norm.bias), torch.ones_like(norm.bias)
        )
        assert torch.equal(plain, torch.zeros_like(plain))
        torch.testing.assert_close(norm.running_var + norm.eps, torch.ones_like(norm.bias))
        assert not norm.running_mean.any()
        assert norm.weight.eq(1).all()
        assert not norm.weight.requires_grad
        assert norm.bias.requires_grad


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("conv", "norm", "size"),
    [(nn.Conv1d, nn.BatchNorm1d, (9,)), (nn.Conv2d, nn.BatchNorm2d, (9, 8))],
)
@pytest.mark.parametrize("groups", [1, 4])
def test_convolutions_with_and_without_a_bias(conv, norm, size, bias, groups):
    model = own(first=conv(4, 8, 3, padding=1, bias=bias, groups=groups), first_norm=norm(8, eps=0.1))
    inputs, before = torch.randn(2, 4, *size), copy.deepcopy(model)
    expected = model(inputs)
    assert fold_batch_norm_(model, {"input_values": inputs}) == 1
    torch.testing.assert_close(model(inputs), expected, rtol=1e-4, atol=1e-5)
    factor = before.first_norm.weight / (before.first_norm.running_var + before.first_norm.eps).sqrt()
    torch.testing.assert_close(model.first.weight, before.first.weight * factor.reshape(-1, *[1] * (len(size) + 1)))
    assert model.first.bias is None or not model.first.bias.any()


def test_folded_model_is_saved_loaded_and_quantized_as_an_ordinary_one(tmp_path):
    model, images = resnet(), torch.randn(2, 3, 32, 32)
    fold_batch_norm_(model)
    expected = model(images).logits
    model.save_pretrained(tmp_path)
    loaded, info = ResNetForImageClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert torch.equal(loaded.eval()(images).logits, expected)
    assert torch.equal(pickle.loads(pickle.dumps(model))(images).logits, expected)
    prepare_qat_(model, QuantizationSpec(activation_bits=None))
    weights = [
        module.integer_weight() for module in quantized_modules(model).values() if isinstance(module, nn.Conv2d)
    ]
    assert len(weights) == 8
    assert all(codes.flatten(1).abs().amax(dim=1).eq(127).all() for codes in weights)


def test_frozen_norms_keep_their_statistics_in_training_until_thawed():
    model, images = resnet(), torch.randn(2, 3, 32, 32)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    expected = model(images).logits
    freeze_batch_norm_(model)
    freeze_batch_norm_(model)  # twice is as once
    model.train()
    assert all(not norm.training for norm in norms_of(model))
    out = model(images).logits
    assert torch.equal(out, expected)
    out.sum().backward()
    assert all(norm.weight.grad is not None for norm in norms_of(model)), "scale and shift are trained on"
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    thaw_batch_norm_(model)
    assert all(type(norm) in NORMS and norm.training for norm in norms_of(model))
    model(images)
    assert not any(torch.equal(value, before[n]) for n, value in model.state_dict().items() if "running" in n)
    freeze_batch_norm_(model.eval())
    thaw_batch_norm_(model)
    assert not any(norm.training for norm in norms_of(model))


def test_folding_leaves_training_with_the_folded_weights():
    model, images = resnet(), torch.randn(2, 3, 32, 32)
    fold_batch_norm_(model.train())
    assert model.training
    assert torch.equal(model(images).logits, model.eval()(images).logits)


class Shared(Own):
    def forward(self, input_values):
        return self.first_norm(self.first(input_values)) + self.second_norm(self.first(input_values * 2))


class Forked(Own):
    def forward(self, input_values):
        output = self.first(input_values)
        return self.first_norm(output) + self.second_norm(output)


class Reused(Own):
    def forward(self, input_values):
        return self.first_norm(self.second(self.first_norm(self.first(input_values))))


@pytest.mark.parametrize("cls", [Shared, Forked, Reused])
def test_what_is_used_more_than_once_is_not_folded(cls):
    layers = {"first": nn.Conv1d(4, 4, 3), "first_norm": nn.BatchNorm1d(4), "second_norm": nn.BatchNorm1d(4)}
    model = own(cls, **layers, second=nn.Conv1d(4, 4, 3))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=f"{cls.__name__} has no BatchNorm that directly follows a convolution"):
        fold_batch_norm_(model, {"input_values": torch.randn(2, 4, 9)})
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_what_cannot_be_folded_is_said():
    with pytest.raises(ValueError, match="ViTForImageClassification has no BatchNorm"):
        fold_batch_norm_(tiny.vit())
    with pytest.raises(ValueError, match=r"takes input_values.*fold_batch_norm_\(model, example\)"):
        fold_batch_norm_(own(first=nn.Conv1d(4, 4, 3), first_norm=nn.BatchNorm1d(4)))
