# SPDX-License-Identifier: Apache-2.0
"""What is removed is tried on a copy; for that a batch is made up for every kind of input."""

import pytest
import torch
import transformers as tf

from benchmarks.models.entries import ENTRIES
from hfkdq import PruningSpec, make_student, prune
from hfkdq.modeling import Probe, find_layer_stacks

from .families import randomise_


@pytest.mark.parametrize(
    "family",
    ["moonshine", "speech2text", "wav2vec2-bert", "clap", "videomae", "timesformer", "patchtst", "whisper", "ast"],
)
def test_a_batch_is_made_up(family):
    probe = Probe(ENTRIES[family].make())
    assert all(value.isfinite().all() for value in probe.outputs(probe.twin))


def test_a_text_with_an_image_runs_both_models():
    """LLaVA computes nothing of an image that no token stands for."""
    probe = Probe(ENTRIES["llava"].make())
    assert "pixel_values" in probe.batch
    before = probe.outputs(probe.twin)
    probe.batch["pixel_values"] = -probe.batch["pixel_values"]
    assert not probe.outputs(probe.twin)[0].equal(before[0])


def qwen(kind, **vision):
    """A tiny Qwen2.5-VL or Qwen3-VL with four layers of images and of texts."""
    sizes = dict(depth=4, hidden_size=32, intermediate_size=48, out_hidden_size=32, num_heads=4, patch_size=4)
    rope = {"rope_type": "default", "type": "default", "mrope_section": [1, 1, 2]}
    text = dict(
        vocab_size=64, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48,
        max_position_embeddings=512, head_dim=8, rope_scaling=rope, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    tokens = dict(image_token_id=3, video_token_id=4, vision_start_token_id=5, vision_end_token_id=6)
    config = getattr(tf, f"{kind}Config")(text_config=text, vision_config={**sizes, **vision}, **tokens)
    torch.manual_seed(0)
    return randomise_(getattr(tf, f"{kind}ForConditionalGeneration")(config), 0).eval()


WINDOWS = dict(window_size=16, fullatt_block_indexes=[1, 3])


def test_the_patches_of_all_images_as_one_matrix_are_made_up_too():
    probe = Probe(qwen("Qwen2_5_VL", **WINDOWS))
    before = probe.outputs(probe.twin)
    probe.batch["pixel_values"] = -probe.batch["pixel_values"]
    assert not probe.outputs(probe.twin)[0].equal(before[0])


def test_layers_of_images_that_attend_to_all_are_still_those():
    student = make_student(qwen("Qwen2_5_VL", **WINDOWS), layers=[1, 2, 3])
    assert student.config.vision_config.fullatt_block_indexes == [1]
    pruned = qwen("Qwen2_5_VL", **WINDOWS)
    for place, layer in enumerate(find_layer_stacks(pruned)[0].layers):
        for parameter in layer.parameters():
            parameter.data *= 0.1 if place in (0, 2) else 1.0  # so that these go
    prune(pruned, PruningSpec(sparsity=0.5, structure="layer"))
    assert pruned.config.vision_config.fullatt_block_indexes == [0, 1]


def test_what_a_text_reads_after_layers_of_images_is_read_after_those_that_are_left():
    student = make_student(qwen("Qwen3VL", deepstack_visual_indexes=[1, 2]), layers=[2, 3, 4])
    assert student.config.vision_config.deepstack_visual_indexes == [0, 1]
    with pytest.raises(ValueError, match="would not compute"):
        make_student(qwen("Qwen3VL", deepstack_visual_indexes=[1, 2]), layers=[3, 4])


def test_heads_that_cannot_go_are_refused():
    """Moonshine divides its width by the number of heads, which nothing but a run shows."""
    model = ENTRIES["moonshine"].make()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="tried on a copy"):
        prune(model, PruningSpec(structure="head", sparsity=0.5, plain_checkpoint=False))
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())


def test_a_list_that_is_as_long_as_a_stack_by_chance_is_none_of_its_fields():
    """Two convolutions with a kernel size each, before two layers: Speech2Text."""
    teacher = ENTRIES["speech2text"].make()
    student = make_student(teacher, 1, num_decoder_layers=1)
    assert len(student.model.encoder.layers) == len(student.model.decoder.layers) == 1
    assert student.config.num_conv_layers == len(student.config.conv_kernel_sizes) == 2


def test_parameters_that_are_float32_whatever_is_asked_for_are_tried_all_the_same():
    """XLNet makes some with `torch.FloatTensor`, so that a model loaded in float64 has two precisions."""
    model = ENTRIES["xlnet"].make()
    student = make_student(model, 1)
    assert student.config.n_layer == len(student.transformer.layer) == 1
    assert prune(model, PruningSpec(structure="layer", sparsity=0.5)).config.n_layer == 1


def test_a_field_of_any_name_describes_the_neurons_that_a_batch_has_found():
    model = ENTRIES["xlnet"].make()
    spec = PruningSpec(structure="neuron", sparsity=0.5, exclude_modules=["sequence_summary.summary"])
    assert prune(model, spec).config.d_inner == model.transformer.layer[0].ff.layer_1.out_features == 24


def test_numbers_and_lists_beside_the_layers_of_an_encoder_follow_them():
    """LED has a window for each layer of the encoder, and Transformers 4 the number of these twice."""
    teacher = ENTRIES["led"].make()
    student = make_student(teacher, 1, num_decoder_layers=2)
    assert len(student.led.encoder.layers) == student.config.encoder_layers == student.config.num_hidden_layers == 1
    assert len(student.led.decoder.layers) == student.config.decoder_layers == 2
    assert student.config.attention_window == [4]


def test_a_layer_may_call_its_input_as_it_likes():
    """PatchTST gives its layers `hidden_state=`."""
    student = make_student(ENTRIES["patchtst"].make(), 1)
    assert len(student.model.encoder.layers) == student.config.num_hidden_layers == 1
