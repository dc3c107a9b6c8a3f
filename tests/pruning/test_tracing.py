# SPDX-License-Identifier: Apache-2.0
"""Channels and neurons of modules of any name: what goes together is found by following a batch."""

import copy
import math

import pytest
import torch
import transformers as tf
from torch import nn
from transformers.modeling_outputs import ImageClassifierOutput

from hfkdq import (
    DistillationTrainer,
    PruningCallback,
    PruningSpec,
    QATCallback,
    QuantizationSpec,
    fit_sparsity,
    load_pruned,
    load_quantized,
    make_student,
    prune,
    quantize,
)
from hfkdq.modeling.following import STAYS, Following
from hfkdq.pruning.targets import find_targets
from tests.closeness import assert_same_in_double, in_double
from tests.families import FAMILIES


class OwnConfig(tf.PretrainedConfig):
    model_type = "own"


class Own(tf.PreTrainedModel):
    """A model of one's own: `net` makes features, which `head` reads."""

    config_class = OwnConfig
    main_input_name = "pixel_values"

    def __init__(self, config):
        super().__init__(config)
        self.build()
        self.post_init()

    def _init_weights(self, module):
        pass

    def forward(self, pixel_values, labels=None):
        logits = self.classify(pixel_values)
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return ImageClassifierOutput(loss=loss, logits=logits)


class Cnn(Own):
    def build(self):
        self.first, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 12, 3, padding=1, bias=False)
        self.hidden, self.head = nn.Linear(12 * 4 * 4, 10), nn.Linear(10, 3)

    def classify(self, x):
        x = nn.functional.max_pool2d(self.norm(self.first(x)).relu(), 2)
        x = nn.functional.avg_pool2d(nn.functional.pad(self.second(x), (1, 1, 1, 1)).relu(), 2)[:, :, :4, :4]
        return self.head(self.hidden(x.flatten(1)).tanh())


class Mlp(Own):
    def build(self):
        self.net = nn.Sequential(
            nn.Flatten(), nn.Linear(3 * 16 * 16, 16), nn.ReLU(), nn.Linear(16, 12), nn.GELU(), nn.Linear(12, 3)
        )

    def classify(self, x):
        return self.net(x)


class Audio(Own):
    main_input_name = "pixel_values"

    def build(self):
        self.net = nn.Sequential(
            nn.Conv1d(3, 8, 9, stride=4), nn.GroupNorm(4, 8), nn.GELU(), nn.Conv1d(8, 16, 5, stride=2), nn.BatchNorm1d(16),
            nn.ReLU(), nn.Conv1d(16, 12, 3),
        )  # fmt: skip
        self.norm, self.head = nn.LayerNorm(12), nn.Linear(12, 3)

    def classify(self, x):
        return self.head(self.norm(self.net(x.flatten(2)).transpose(1, 2)).mean(1))


class Branches(Own):
    """Branches side by side, a skip connection, a depthwise and a gated convolution."""

    def build(self):
        self.stem, self.left, self.right = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 6, 1), nn.Conv2d(8, 10, 1)
        self.mix, self.depth = nn.Conv2d(16, 8, 1), nn.Conv2d(8, 16, 3, groups=8)
        self.gate, self.out, self.head = nn.Conv2d(16, 24, 1), nn.Conv2d(12, 8, 1), nn.Linear(8, 3)
        self.scale = nn.Parameter(torch.ones(8, 1, 1))

    def classify(self, x):
        x = self.stem(x).relu()
        x = x + self.scale * self.mix(torch.cat([self.left(x), self.right(x).relu()], dim=1))
        gate, value = self.gate(self.depth(x)).chunk(2, dim=1)
        return self.head(self.out(gate.sigmoid() * value).mean((2, 3)))


OWN = {cls.__name__: cls for cls in (Cnn, Mlp, Audio, Branches)}
_IMAGES = dict(image_size=32, num_labels=3)
_STAGES = dict(embedding_size=8, hidden_sizes=[16, 32], depths=[1, 2], num_labels=3)
THEIRS = {
    "MobileNetV1ForImageClassification": dict(depth_multiplier=0.25, **_IMAGES),
    "MobileNetV2ForImageClassification": dict(depth_multiplier=0.35, **_IMAGES),
    "RegNetForImageClassification": dict(groups_width=4, **_STAGES),
    "SegformerForSemanticSegmentation": dict(
        depths=[1, 1], num_encoder_blocks=2, sr_ratios=[2, 1], hidden_sizes=[16, 32], num_attention_heads=[2, 4],
        patch_sizes=[3, 3], strides=[2, 2], mlp_ratios=[2, 2], decoder_hidden_size=16, num_labels=3,
    ),
    "EfficientNetForImageClassification": dict(
        width_coefficient=0.25, depth_coefficient=0.3, hidden_dim=320, **_IMAGES
    ),
}  # fmt: skip
BATCH = {"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))}
PICTURES = {"pixel_values": torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))}


def made(name):
    """A model in float64 with weights that hide nothing."""
    torch.manual_seed(0)
    if name in OWN:
        model = OWN[name](OwnConfig(num_labels=3))
    else:
        cls = getattr(tf, name)
        model = cls(cls.config_class(**THEIRS[name]))
    with torch.no_grad():
        for values in model.parameters():
            values.copy_(torch.randn_like(values) / math.sqrt(max(1, values[0].numel())) + (values.dim() == 1))
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2.0)
    return model.double().eval()


@torch.no_grad()
def logits(model):
    batch = BATCH if isinstance(model, Own) else PICTURES
    with in_double(model):
        return model(batch["pixel_values"].double()).logits


PRUNED = [
    ("Cnn", "channel"), ("Cnn", "neuron"), ("Mlp", "neuron"), ("Audio", "channel"), ("Branches", "channel"),
    ("SegformerForSemanticSegmentation", "neuron"), *((name, "channel") for name in THEIRS),
]  # fmt: skip


@pytest.mark.parametrize(("name", "structure"), PRUNED)
def test_what_no_table_of_names_knows_is_removed(name, structure, tmp_path):
    model = made(name)
    dense, masked, before = logits(model), copy.deepcopy(model), model.num_parameters()
    spec = dict(sparsity=0.5, structure=structure)
    prune(model, PruningSpec(**spec, plain_checkpoint=False), example_inputs=BATCH)
    prune(masked, PruningSpec(**spec, cut="mask"), example_inputs=BATCH)
    assert model.num_parameters() < 0.9 * before
    assert_same_in_double(logits(model), logits(masked))
    assert (logits(model) - dense).abs().max() > 1e-2
    model.save_pretrained(tmp_path)
    loaded = load_pruned(tmp_path, model=type(model))
    assert type(loaded) is type(model)
    assert_same_in_double(logits(loaded), logits(model))


def shapes(model):
    return {name: tuple(values.shape) for name, values in model.named_parameters()}


def test_half_of_the_channels_of_a_network_of_ones_own_are_gone_from_all_that_reads_them():
    model = made("Cnn")
    prune(model, PruningSpec(sparsity=0.5, structure="channel", plain_checkpoint=False), example_inputs=BATCH)
    assert shapes(model) == {
        "first.weight": (4, 3, 3, 3), "first.bias": (4,), "norm.weight": (4,), "norm.bias": (4,), "second.weight": (6, 4, 3, 3),
        "hidden.weight": (10, 6 * 4 * 4), "hidden.bias": (10,), "head.weight": (3, 10), "head.bias": (3,),
    }  # fmt: skip
    assert (model.norm.num_features, model.hidden.in_features, model.second.in_channels) == (4, 96, 4)


def test_what_is_added_or_gated_goes_together_and_what_lies_side_by_side_does_not():
    model = made("Branches")
    prune(model, PruningSpec(sparsity=0.5, structure="channel", plain_checkpoint=False), example_inputs=BATCH)
    found = {name: shape for name, shape in shapes(model).items() if name.endswith("weight") or name == "scale"}
    assert found == {
        "stem.weight": (4, 3, 3, 3), "left.weight": (3, 4, 1, 1), "right.weight": (5, 4, 1, 1), "mix.weight": (4, 8, 1, 1),
        "depth.weight": (8, 1, 3, 3), "gate.weight": (12, 8, 1, 1), "out.weight": (4, 6, 1, 1), "head.weight": (3, 4),
        "scale": (4, 1, 1),
    }  # fmt: skip
    assert (model.depth.groups, model.depth.in_channels, model.depth.out_channels) == (4, 4, 8)


def test_only_the_parts_that_target_modules_names_are_pruned():
    model = made("Branches")
    before = shapes(model)
    spec = PruningSpec(sparsity=0.5, structure="channel", target_modules=["right"], plain_checkpoint=False)
    prune(model, spec, example_inputs=BATCH)
    changed = {name for name, shape in shapes(model).items() if shape != before[name]}
    assert changed == {"right.weight", "right.bias", "mix.weight"}
    assert model.mix.weight.shape == (8, 11, 1, 1)


def test_convolutions_before_a_stack_of_layers_are_pruned_where_they_are_named():
    model = FAMILIES["whisper"].make()
    with pytest.raises(
        ValueError, match="Those beside a stack of layers are looked at where target_modules names them"
    ):
        prune(model, PruningSpec(sparsity=0.5, structure="channel", plain_checkpoint=False))
    prune(model, PruningSpec(sparsity=0.5, structure="channel", plain_checkpoint=False, target_modules=["conv1"]))
    encoder = model.get_encoder()
    assert encoder.conv1.weight.shape[0] == encoder.conv2.weight.shape[1] == 16


def test_the_activations_that_units_give_are_looked_at():
    model = made("Cnn").float()
    spec = PruningSpec(sparsity=0.5, structure="channel", criterion="activation", plain_checkpoint=False)
    prune(model, spec, [BATCH])
    assert model.second.weight.shape == (6, 4, 3, 3)


def roots(follow, parameters):
    """Which places along which dimensions of parameters are one, by name."""
    following = Following(parameters)
    with torch.no_grad(), following:
        out = follow(*parameters.values())
    following.keep(out if isinstance(out, tuple) else ())
    return {axis: [following.root(label) for label in labels.tolist()] for axis, labels in following.axes.items()}


@pytest.mark.parametrize(
    "mixes",
    [
        lambda x: nn.functional.layer_norm(x, (6,)),
        lambda x: x.softmax(-1),
        lambda x: x.cumsum(-1),
        lambda x: x - x.mean(-1, keepdim=True),
        lambda x: x * torch.arange(6.0),
        lambda x: torch.fft.fft(x).real,
        lambda x: torch.where(x > 0, x, x.flip(-1)),
        lambda x: x @ x.t() @ torch.ones(5, 6),
    ],
)
def test_what_needs_all_of_them_or_another_table_stays(mixes):
    found = roots(
        lambda first, second: mixes(torch.randn(5, 4) @ first) @ second,
        {"first": torch.randn(4, 6), "second": torch.randn(6, 3)},
    )
    together = {tuple(sorted(found["first", 1][i] for i in range(6)))}
    assert together == {(STAYS,) * 6} or len(set(found["first", 1])) == 3  # flipped: pairs


@pytest.mark.parametrize(
    "moves",
    [
        lambda x: x.roll(2, -1).roll(-2, -1),
        lambda x: x.flip(-1).flip(-1),
        lambda x: x[:, torch.tensor([5, 4, 3, 2, 1, 0])].flip(1),
        lambda x: torch.cat([x[:, :2], x[:, 2:]], dim=1),
        lambda x: nn.functional.pad(x, (0, 0, 1, 1)),
        lambda x: x.unflatten(1, (2, 3)).permute(2, 1, 0).reshape(6, 5).t()[:, [0, 2, 4, 1, 3, 5]],
        lambda x: x.repeat_interleave(3, 0),
        lambda x: nn.functional.interpolate(x[None, None], scale_factor=(2, 1), mode="bilinear")[0, 0],
        lambda x: x.clone().relu_() * 2.0 + 1.0,
    ],
)
def test_what_is_moved_is_followed(moves):
    found = roots(
        lambda first, second: moves(torch.randn(5, 4) @ first) @ second,
        {"first": torch.randn(4, 6), "second": torch.randn(6, 3)},
    )
    assert found["first", 1] == found["second", 0]
    assert len(set(found["first", 1])) == 6
    assert STAYS not in found["first", 1]


def test_parameters_without_entries_say_nothing():
    """DINOv3 has a token for each of its registers, of which there may be none."""
    found = roots(
        lambda none, first, second: (torch.cat([none, torch.randn(5, 4) @ first]) @ second).softmax(0),
        {"none": torch.randn(0, 6), "first": torch.randn(4, 6), "second": torch.randn(6, 3)},
    )
    assert found["first", 1] == found["second", 0]
    assert STAYS not in found["first", 1]


class Needs(tf.BertForSequenceClassification):
    """It runs on no batch that could be made up."""

    def forward(self, input_ids, kind, labels=None, **kwargs):
        return super().forward(input_ids, attention_mask=(kind > 0).long(), labels=labels, return_dict=True)


def needs():
    torch.manual_seed(0)
    return Needs(FAMILIES["bert"].make().config).eval()


KINDS = {"input_ids": torch.randint(4, 60, (2, 8)), "kind": torch.ones(2, 8), "labels": torch.tensor([0, 1])}
HALF = PruningSpec(sparsity=0.5, structure="neuron", plain_checkpoint=False)


def trainer(model, callback, tmp_path, cls=tf.Trainer, rows=None, **given):
    arguments = tf.TrainingArguments(
        str(tmp_path), max_steps=4, per_device_train_batch_size=2, use_cpu=True, report_to=[], disable_tqdm=True,
        save_strategy="no",
    )  # fmt: skip
    rows = rows or [{"pixel_values": torch.randn(3, 16, 16), "labels": i % 3} for i in range(8)]
    return cls(model, arguments, train_dataset=rows, callbacks=callback, **given)


def begun(made):
    """The trainer where training begins, without data that could be looked at."""
    made.callback_handler.on_train_begin(made.args, made.state, made.control)


CALLS = {
    "prune": lambda model, tmp_path, **given: prune(model, HALF, **given),
    "fit_sparsity": lambda model, tmp_path, example_inputs=None: fit_sparsity(
        model, HALF, parameters=0.95, inputs=example_inputs
    ),
    "callback": lambda model, tmp_path, **given: begun(trainer(model, [PruningCallback(HALF, **given)], tmp_path)),
    "DistillationTrainer": lambda model, tmp_path, **given: begun(
        trainer(model, [PruningCallback(HALF)], tmp_path, DistillationTrainer, **given)
    ),
    "make_student": lambda model, tmp_path, **given: make_student(model, 2, **given),
}


@pytest.mark.parametrize("call", CALLS)
def test_what_no_batch_can_be_made_up_for_is_refused_with_advice_that_works(call, tmp_path):
    model = needs()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"Needs runs on none of the batches .* example_inputs=batch"):
        CALLS[call](model, tmp_path)
    assert all(torch.equal(values, before[name]) for name, values in model.state_dict().items())
    assert not hasattr(model.config, "hfkdq")
    CALLS[call](model, tmp_path, example_inputs=KINDS)


@pytest.mark.parametrize("cls", [tf.Trainer, DistillationTrainer])
def test_the_first_rows_that_are_trained_on_are_tried_too(cls, tmp_path):
    model = needs()
    rows = [{name: value[i % 2] for name, value in KINDS.items()} for i in range(8)]
    one = trainer(model, [PruningCallback(HALF)], tmp_path, cls, rows)
    one.train()
    assert model.bert.encoder.layer[0].intermediate.dense.out_features == needs().config.intermediate_size // 2


def test_rows_that_the_model_does_not_run_on_are_refused_before_a_step(tmp_path):
    model = needs()
    before = copy.deepcopy(model.state_dict())
    one = trainer(model, [PruningCallback(HALF)], tmp_path)
    with pytest.raises(ValueError, match=r"Needs runs on none of the batches .* nor on the one given"):
        one.train()
    assert all(torch.equal(values, before[name]) for name, values in model.state_dict().items())


def test_the_first_batch_of_the_calibration_is_tried_too():
    model = made("Mlp").float()
    with pytest.raises(ValueError, match=r"Mlp runs on none of the batches .* example_inputs=batch"):
        prune(model, HALF)
    prune(model, HALF, [BATCH])
    assert model.net[1].out_features == 8


@pytest.mark.parametrize("quantized", [False, True])
def test_a_model_of_ones_own_is_pruned_while_it_trains(quantized, tmp_path):
    model = made("Cnn").float()
    spec = PruningSpec(sparsity=0.5, structure="channel", criterion="taylor", plain_checkpoint=False)
    callbacks = [PruningCallback(spec, example_inputs=BATCH)]
    if quantized:
        callbacks.append(QATCallback(QuantizationSpec()))
    one = trainer(model, callbacks, tmp_path)
    one.train()
    assert model.second.weight.shape == (6, 4, 3, 3)
    assert model.config.hfkdq["pruning"]["achieved_sparsity"] == 0.5
    assert model(**BATCH).logits.shape == (2, 3)


class Incomplete(tf.PreTrainedModel):
    """It does not call `post_init`, without which Transformers 5 loads no model."""

    config_class = OwnConfig
    main_input_name = "pixel_values"

    def __init__(self, config):
        super().__init__(config)
        self.first, self.second, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, 3)

    def forward(self, pixel_values, labels=None):
        features = self.second(self.first(pixel_values).relu()).mean((2, 3))
        return ImageClassifierOutput(logits=self.head(features))


def test_a_class_that_cannot_be_loaded_is_told_what_it_lacks(tmp_path):
    spec = PruningSpec(sparsity=0.5, structure="channel", plain_checkpoint=False)
    model = quantize(Incomplete(OwnConfig()), QuantizationSpec(), [BATCH])
    model.save_pretrained(tmp_path)
    if int(tf.__version__.split(".")[0]) < 5:
        assert load_quantized(tmp_path, model=Incomplete)(**BATCH).logits.shape == (2, 3)
        return
    with pytest.raises(ValueError, match=r"Incomplete .* does not call self.post_init\(\)"):
        load_quantized(tmp_path, model=Incomplete)
    with pytest.raises(ValueError, match=r"Incomplete .* does not call self.post_init\(\)"):
        prune(Incomplete(OwnConfig()), spec, example_inputs=BATCH)


def test_targets_are_the_same_whenever_they_are_looked_for():
    model = made("Branches")
    spec = PruningSpec(sparsity=0.5, structure="channel")
    first, second = (
        [(t.name, t.units, [(p.name, p.tensor) for p in t.parts]) for t in find_targets(model, spec)] for _ in range(2)
    )
    assert first == second
