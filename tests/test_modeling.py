# SPDX-License-Identifier: Apache-2.0
import pytest
import transformers
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.models.auto import modeling_auto

from hfkdq import modeling
from hfkdq.modeling import find_heads, find_layer_stack, find_layer_stacks, find_neurons, width_fields
from hfkdq.modeling.tasks import TASKS, task_of

from . import tiny
from .families import FAMILIES


def _gpt2() -> GPT2LMHeadModel:
    return GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=16, n_embd=16, n_layer=3, n_head=2))


def _t5() -> T5ForConditionalGeneration:
    return T5ForConditionalGeneration(
        T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0)
    )


@pytest.mark.parametrize("make", [tiny.bert, tiny.distilbert, tiny.vit, tiny.llama])
def test_the_stack_holds_all_layers_of_the_model(make):
    model = make(layers=3)
    stack = find_layer_stack(model)
    assert len(stack) == 3
    assert model.get_submodule(stack.name) is stack.layers


def test_the_stack_is_found_beside_lists_of_the_same_length_inside_the_layers():
    model = tiny.bert(layers=2)
    for layer in find_layer_stack(model).layers:
        layer.experts = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
    assert find_layer_stack(model).name == "bert.encoder.layer"


def test_conv1d_models_have_a_stack_too():
    assert find_layer_stack(_gpt2()).name == "transformer.h"


def test_encoder_decoders_have_no_one_stack():
    with pytest.raises(ValueError, match=r"one stack of 2 layers .* found: encoder\.block, decoder\.block"):
        find_layer_stack(_t5())


WIDTHS = {
    "bert": {"intermediate_size": 48}, "distilbert": {"hidden_dim": 48}, "gpt2": {"n_inner": 48}, "t5": {"d_ff": 48},
    "bart": {"encoder_ffn_dim": 48, "decoder_ffn_dim": 40}, "swin": {"mlp_ratio": 3.0},
}  # fmt: skip


@pytest.mark.parametrize("family", WIDTHS)
def test_the_width_has_a_name_in_the_configuration(family):
    assert width_fields(FAMILIES[family].make().config) == WIDTHS[family]


def test_a_width_that_is_left_to_the_model_is_four_times_the_hidden_one():
    model = _gpt2()
    assert width_fields(model.config) == {"n_inner": 64}
    assert [group.units for group in find_neurons(model)] == [64, 64, 64]


def test_a_configuration_without_a_width_is_refused():
    with pytest.raises(ValueError, match="ResNetConfig has no feed-forward width"):
        find_neurons(FAMILIES["resnet"].make())


NEURONS = {  # layers into the neurons and out of them, in every feed-forward block
    "bert": (1, 1), "roberta": (1, 1), "distilbert": (1, 1), "electra": (1, 1), "mpnet": (1, 1), "deberta": (1, 1),
    "deberta-v2": (1, 1), "gpt2": (1, 1), "llama": (2, 1), "t5": (2, 1), "bart": (1, 1), "vit": (1, 1), "deit": (1, 1),
    "swin": (1, 1), "wav2vec2": (1, 1), "hubert": (1, 1), "whisper": (1, 1), "detr": (1, 1), "yolos": (1, 1),
}  # fmt: skip


@pytest.mark.parametrize("family", NEURONS)
def test_neurons_lie_between_the_layers_that_compute_and_read_them(family):
    model = FAMILIES[family].make()
    groups = find_neurons(model)
    layers = sum(len(stack) for stack in find_layer_stacks(model)) if family != "swin" else 4
    assert len(groups) == layers
    for group in groups:
        sides = [[s for s in group.of_role(role) if s.tensor == "weight"] for role in ("output", "input")]
        assert tuple(map(len, sides)) == NEURONS[family]
        for entry in group.slices:
            assert entry.values.shape[entry.dim] == group.units == len(entry.positions)
            assert entry.name.startswith(f"{group.name}.")
            assert model.get_submodule(entry.name) is entry.module


@pytest.mark.parametrize("changes", [{"intermediate_size": 32}, {"intermediate_size": 64, "head_dim": 16}])
def test_neurons_are_told_from_other_parts_of_the_same_size(changes):
    model = FAMILIES["llama"].make(**changes)
    for group in find_neurons(model):
        assert {entry.name.rpartition(".")[2] for entry in group.slices} == {"gate_proj", "up_proj", "down_proj"}


def test_tensors_that_the_class_has_not_by_itself_are_refused():
    model = tiny.bert()
    find_layer_stack(model).layers[1].intermediate.norm = nn.LayerNorm(64)
    with pytest.raises(ValueError, match=r"BertForSequenceClassification .*layer\.1\.intermediate\.norm"):
        find_neurons(model)


STACKS = {
    "bert": [("bert.encoder.layer", 3, "num_hidden_layers")],
    "gpt2": [("transformer.h", 3, "num_hidden_layers")],
    "t5": [("encoder.block", 2, "num_layers"), ("decoder.block", 3, "num_decoder_layers")],
    "whisper": [("model.encoder.layers", 2, "encoder_layers"), ("model.decoder.layers", 3, "decoder_layers")],
    "detr": [("model.encoder.layers", 2, "encoder_layers"), ("model.decoder.layers", 3, "decoder_layers")],
}


@pytest.mark.parametrize("family", STACKS)
def test_stacks_are_those_that_the_configuration_counts(family):
    model = FAMILIES[family].make()
    stacks = find_layer_stacks(model)
    assert [(stack.name, len(stack), stack.field) for stack in stacks] == STACKS[family]
    assert all(model.get_submodule(stack.name) is stack.layers for stack in stacks)
    assert [stack.bound_to() for stack in stacks] == ([[0], [0]] if family == "t5" else [[]] * len(stacks))


def test_tensors_outside_of_the_stack_that_follow_its_depth_are_named():
    (stack,) = find_layer_stacks(FAMILIES["yolos"].make())
    assert [name.rpartition(".")[2] for name in stack.beside] == ["mid_position_embeddings"]


def test_heads_that_share_keys_are_one_unit():
    group = find_heads(FAMILIES["llama"].make())[0]  # 4 heads of 8, 2 for keys and values
    rows = {entry.name.rpartition(".")[2]: entry.positions.tolist() for entry in group.slices}
    assert group.units == 2
    assert rows["q_proj"] == rows["o_proj"] == [list(range(16)), list(range(16, 32))]
    assert rows["k_proj"] == rows["v_proj"] == [list(range(8)), list(range(8, 16))]


def test_heads_in_a_fused_projection_have_an_entry_in_each_of_its_blocks():
    entry = find_heads(FAMILIES["gpt2"].make())[0].slices[0]
    assert entry.positions[1].tolist() == [8 + i + block * 32 for block in range(3) for i in range(8)]
    entry = find_heads(FAMILIES["deberta"].make())[0].slices[0]
    assert entry.positions[1].tolist() == list(range(24, 48))


@pytest.mark.parametrize(("family", "names"), [
    ("t5", ["encoder.block", "decoder.block", *(f"decoder.block.{i}.layer.1.EncDecAttention" for i in range(3))]),
    ("mpnet", ["mpnet.encoder"]),
])  # fmt: skip
def test_heads_of_layers_that_share_position_biases_are_one_group(family, names):
    assert [group.name for group in find_heads(FAMILIES[family].make())] == names


@pytest.mark.parametrize("names", [None, [], ["NoSuchModel"]])
def test_a_checkpoint_of_an_unknown_class_is_refused(names):
    config = tiny.bert_config()
    config.architectures = names
    with pytest.raises(ValueError, match="as its architecture"):
        modeling.checkpoint_class(config)
    config.architectures = ["BertForSequenceClassification"]
    assert modeling.checkpoint_class(config) is type(tiny.bert())


@pytest.mark.parametrize(
    ("name", "task"),
    [
        ("BertForSequenceClassification", "text-classification"),
        ("Wav2Vec2ForSequenceClassification", "audio-classification"),
        ("DeiTForImageClassificationWithTeacher", "image-classification"),
        ("GPT2LMHeadModel", "text-generation"),
        ("BartForConditionalGeneration", "text2text-generation"),
        ("WhisperForConditionalGeneration", "automatic-speech-recognition"),
        ("BertModel", "feature-extraction"),
        ("ViTModel", None),
    ],
)
def test_the_task_of_a_class_is_the_one_that_transformers_lists_it_for(name, task):
    found = task_of(name)
    assert (found and found.name) == task


def test_every_auto_class_of_a_task_is_there_and_loads_its_classes():
    for task in TASKS:
        if task.auto is not None:
            mapping = getattr(transformers, task.auto)._model_mapping._model_mapping
            assert mapping == getattr(modeling_auto, f"MODEL_FOR_{task.table}_MAPPING_NAMES")
