# SPDX-License-Identifier: Apache-2.0
import pytest
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from hfkdq import architecture
from hfkdq.architecture import find_feed_forwards, find_layer_stack, width_field

from . import tiny


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


@pytest.mark.parametrize(
    ("make", "field"),
    [(tiny.bert, "intermediate_size"), (tiny.distilbert, "hidden_dim"), (tiny.llama, "intermediate_size")],
)
def test_the_width_has_a_name_in_the_configuration(make, field):
    assert width_field(make().config) == field


def test_a_configuration_without_a_width_is_refused():
    with pytest.raises(ValueError, match="GPT2Config has no feed-forward width"):
        width_field(_gpt2().config)


@pytest.mark.parametrize(
    ("make", "inputs"), [(tiny.bert, 1), (tiny.distilbert, 1), (tiny.vit, 1), (tiny.llama, 2)]
)  # fmt: skip
def test_feed_forwards_lie_around_the_neurons(make, inputs):
    model = make(layers=3)
    width = getattr(model.config, width_field(model.config))
    blocks = find_feed_forwards(model)
    assert len(blocks) == 3
    for index, block in enumerate(blocks):
        assert [len(block.inputs), len(block.outputs)] == [inputs, 1]
        assert all(linear.out_features == width for _, linear in block.inputs)
        assert all(linear.in_features == width for _, linear in block.outputs)
        for name, linear in block.inputs + block.outputs:
            assert f".{index}." in name
            assert model.get_submodule(name) is linear


def test_a_width_that_equals_the_hidden_size_is_ambiguous():
    with pytest.raises(ValueError, match=r"layer\.0 of BertForSequenceClassification .* 32 neurons"):
        find_feed_forwards(tiny.bert(hidden=32, intermediate_size=32))


def test_attention_of_the_width_of_the_feed_forward_is_not_taken_for_it():
    config = LlamaConfig(
        vocab_size=20, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4, head_dim=8
    )
    with pytest.raises(ValueError, match=r"found: .*q_proj.*down_proj"):
        find_feed_forwards(LlamaForCausalLM(config))


def test_a_norm_over_the_neurons_is_refused():
    model = tiny.bert()
    find_layer_stack(model).layers[1].intermediate.norm = nn.LayerNorm(64)
    with pytest.raises(ValueError, match=r"layer\.1 .*intermediate\.norm\.weight"):
        find_feed_forwards(model)


@pytest.mark.parametrize("names", [None, [], ["NoSuchModel"]])
def test_a_checkpoint_of_an_unknown_class_is_refused(names):
    config = tiny.bert_config()
    config.architectures = names
    with pytest.raises(ValueError, match="as its architecture"):
        architecture.checkpoint_class(config)
    config.architectures = ["BertForSequenceClassification"]
    assert architecture.checkpoint_class(config) is type(tiny.bert())
