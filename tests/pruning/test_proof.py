# SPDX-License-Identifier: Apache-2.0
"""What pruning and `make_student` leave is what they say, for layers, heads and neurons of models that are unlike most."""

import copy
import dataclasses
import re

import pytest
import torch
import transformers as tf
from safetensors import SafetensorError

from benchmarks.models.entries import ENTRIES
from hfkdq import PruningSpec, load_pruned, make_student, prune
from hfkdq.facts import read_facts
from hfkdq.modeling import Probe, bypass_, find_layer_stack, find_layer_stacks
from tests.families import FAMILIES

ON_V5 = int(tf.__version__.split(".")[0]) >= 5
IDS = torch.randint(4, 60, (2, 24), generator=torch.Generator().manual_seed(0))
_SIZES = dict(hidden_size=32, num_hidden_layers=6, num_attention_heads=4, intermediate_size=48, initializer_range=0.3)
_TEXT = dict(**_SIZES, vocab_size=64, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2)
_CAUSAL = dict(**_TEXT, num_key_value_heads=2, head_dim=8)
_IMAGE = dict(**_SIZES, image_size=16, patch_size=4, num_labels=3)
_EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
_MODERN = dict(
    **_TEXT, cls_token_id=1, sep_token_id=2, local_attention=4, **({} if ON_V5 else {"reference_compile": False})
)
KINDS = {
    "modernbert": ("ModernBertForMaskedLM", "ModernBertConfig", _MODERN),
    "gpt2": (
        "GPT2LMHeadModel", "GPT2Config",
        dict(vocab_size=64, n_embd=32, n_layer=6, n_head=4, n_positions=64, initializer_range=0.5,
             scale_attn_by_inverse_layer_idx=True, attn_implementation="eager"),
    ),
    "diffllama": ("DiffLlamaForCausalLM", "DiffLlamaConfig", {k: v for k, v in _CAUSAL.items() if k != "head_dim"}),
    "gpt_neo": (
        "GPTNeoForCausalLM", "GPTNeoConfig",
        dict(vocab_size=64, hidden_size=32, num_layers=6, attention_types=[[["global", "local"], 3]], num_heads=4,
             intermediate_size=48, window_size=4, max_position_embeddings=64, initializer_range=0.3),
    ),
    "longformer": (
        "LongformerForSequenceClassification", "LongformerConfig", dict(_TEXT, attention_window=[4, 4, 8, 8, 4, 8])
    ),
    "gemma3": (
        "Gemma3ForCausalLM", "Gemma3TextConfig",
        dict(_CAUSAL, sliding_window=4, layer_types=["sliding_attention", "sliding_attention", "full_attention"] * 2),
    ),
    "smollm3": ("SmolLM3ForCausalLM", "SmolLM3Config", dict(_CAUSAL, no_rope_layers=[1, 1, 0, 1, 0, 0])),
    "qwen3_moe": ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", dict(_CAUSAL, **_EXPERTS, mlp_only_layers=[0])),
    "dinov2": ("Dinov2ForImageClassification", "Dinov2Config", {k: v for k, v in _IMAGE.items() if k != "intermediate_size"}),
    "beit": ("BeitForImageClassification", "BeitConfig", _IMAGE),
}  # fmt: skip
HALF = PruningSpec(sparsity=0.5, structure="neuron")


def make(kind):
    model, config, settings = KINDS[kind]
    settings = dict(settings)
    implementation = settings.pop("attn_implementation", "sdpa" if kind == "modernbert" else "eager")
    torch.manual_seed(0)
    made = getattr(tf, model)(getattr(tf, config)(**settings, attn_implementation=implementation)).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return made


@torch.no_grad()
def logits(model):
    if model.main_input_name == "pixel_values":
        return model(pixel_values=torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))).logits
    return model(IDS, **({"use_cache": False} if "CausalLM" in type(model).__name__ else {})).logits


def assert_same(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


def loaded(model, folder):
    model.save_pretrained(folder)
    return type(model).from_pretrained(folder, attn_implementation=model.config._attn_implementation).eval()


@pytest.mark.parametrize("kind", KINDS)
def test_a_student_computes_what_its_layers_do_in_the_teacher(kind, tmp_path):
    teacher = make(kind)
    layers = [1, 2, 4] if kind == "modernbert" and not ON_V5 else [1, 4, 6]
    student = make_student(teacher, layers=layers)
    for place, layer in enumerate(find_layer_stack(teacher).layers):
        bypass_(layer, place + 1 not in layers)
    assert_same(logits(student), logits(teacher))
    assert_same(logits(loaded(student, tmp_path)), logits(student))


@pytest.mark.parametrize("kind", KINDS)
def test_layers_that_are_pruned_leave_what_is_loaded_again(kind, tmp_path):
    model = make(kind)
    before = copy.deepcopy(model)
    prune(model, PruningSpec(sparsity=0.34, structure="layer"))
    kept = read_facts(model)["student"]["layers"]
    for place, layer in enumerate(find_layer_stack(before).layers):
        bypass_(layer, place + 1 not in kept)
    assert len(kept) == 4
    assert_same(logits(model), logits(before))
    assert_same(logits(loaded(model, tmp_path)), logits(model))


@pytest.mark.skipif(ON_V5, reason="Transformers 5 has a list with an entry for each layer")
def test_a_pattern_without_a_period_loads_with_load_pruned_alone(tmp_path):
    teacher = make("modernbert")
    student = make_student(teacher, layers=[1, 4, 6])
    student.save_pretrained(tmp_path)
    assert_same(logits(load_pruned(tmp_path, attn_implementation="sdpa")), logits(student))
    with pytest.raises(TypeError, match="unsupported operand"):
        type(student).from_pretrained(tmp_path)


def test_evenly_spaced_layers_make_way_for_one_that_has_no_other_place():
    assert make_student(make("modernbert"), 2).config.hfkdq["student"]["layers"][0] == 1
    with pytest.raises(ValueError, match=r"hold tensors that no other place has\. Choose layers among which are 1 of"):
        make_student(make("modernbert"), layers=[2, 5])


def test_stacks_of_configurations_within_the_configuration_are_found():
    text = dict(vocab_size=64, max_position_embeddings=40, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    both = {k: v for k, v in _SIZES.items() if k != "initializer_range"}
    config = tf.CLIPConfig(
        text_config={**both, **text}, vision_config={**both, "image_size": 16, "patch_size": 8}, projection_dim=16
    )
    model = tf.CLIPModel(config)
    fields = ["text_config.num_hidden_layers", "vision_config.num_hidden_layers"]
    assert [stack.field for stack in find_layer_stacks(model)] == fields
    student = make_student(model, 3, num_decoder_layers=2)
    assert (student.config.text_config.num_hidden_layers, student.config.vision_config.num_hidden_layers) == (3, 2)
    prune(model, HALF)
    assert (model.config.text_config.intermediate_size, model.config.vision_config.intermediate_size) == (24, 24)


@pytest.mark.parametrize("layer", [-2, 1, [-3, -1]])
def test_the_layer_whose_output_is_the_image_of_a_text_keeps_its_meaning(layer):
    """LLaVA says by number which layers of its images the text reads."""
    settings = copy.deepcopy(ENTRIES["llava"].settings) | {"vision_feature_layer": layer}
    settings["vision_config"]["num_hidden_layers"] = settings["text_config"]["num_hidden_layers"] = 4
    model = dataclasses.replace(ENTRIES["llava"], settings=settings).make()
    whole = copy.deepcopy(model)
    prune(model, PruningSpec(sparsity=0.5, structure="layer", criterion="random"))
    ours, theirs = find_layer_stacks(model), find_layer_stacks(whole)
    for left, stack in zip(ours, theirs, strict=True):
        assert len(left) == 2
        kept = [next(iter(layer.state_dict().values())).tolist() for layer in left.layers]
        for layer in stack.layers:
            bypass_(layer, next(iter(layer.state_dict().values())).tolist() not in kept)
    probe = Probe(whole)
    assert_same(probe.outputs(model.double())[0], probe.outputs(probe.twin)[0])


def test_layers_that_change_their_class_as_they_run_get_new_numbers():
    """BigBird puts full attention in place of the sparse one when a text is short."""
    model = ENTRIES["bigbird"].make()
    with torch.no_grad():
        model(IDS)
        for parameter in model.bert.encoder.layer[0].parameters():
            parameter *= 0.1  # so that it goes
    prune(model, PruningSpec(sparsity=0.5, structure="layer"))
    (layer,) = model.bert.encoder.layer
    assert type(layer.attention.self).__name__ == "BigBirdSelfAttention"
    assert (layer.attention.self.layer_idx, layer.attention.seed) == (0, 0)


def test_layers_with_heads_of_their_own_are_for_make_student():
    with pytest.raises(
        ValueError, match=r"each layer of model\.decoder\.layers.*make_student\(teacher, num_decoder_layers"
    ):
        prune(ENTRIES["rt-detr"].make(), PruningSpec(sparsity=0.5, structure="layer"))


HEADS = {
    "norms over all heads": lambda: tf.Olmo2ForCausalLM(tf.Olmo2Config(**{**_CAUSAL, "num_hidden_layers": 2})),
    "sinks": lambda: tf.GptOssForCausalLM(
        tf.GptOssConfig(
            **{**_CAUSAL, "num_hidden_layers": 2}, num_local_experts=4, num_experts_per_tok=2, rope_scaling=None
        )
    ),
    "code": lambda: make("longformer"),
}


@pytest.mark.parametrize("beside", HEADS)
def test_heads_with_more_than_is_known_are_refused_with_the_model_unchanged(beside):
    model = HEADS[beside]()
    tensors, config = copy.deepcopy(model.state_dict()), model.config.to_dict()
    with pytest.raises(ValueError, match=r"structure='head' does not fit .* Nothing is changed"):
        prune(model, PruningSpec(sparsity=0.5, structure="head", plain_checkpoint=False))
    assert all(torch.equal(value, tensors[name]) for name, value in model.state_dict().items())
    assert model.config.to_dict() == config


def test_heads_of_stages_with_different_numbers_are_removed(tmp_path):
    config = tf.SegformerConfig(
        num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1], hidden_sizes=[16, 32], num_attention_heads=[2, 4],
        patch_sizes=[3, 3], strides=[2, 2], mlp_ratios=[2, 2], num_labels=3, initializer_range=0.3,
    )  # fmt: skip
    model = tf.SegformerForImageClassification(config).eval()
    masked = copy.deepcopy(model)
    prune(model, PruningSpec(sparsity=0.5, structure="head", plain_checkpoint=False))
    prune(masked, PruningSpec(sparsity=0.5, structure="head", plain_checkpoint=False, cut="mask"))
    assert_same(logits(model), logits(masked))
    model.save_pretrained(tmp_path)
    assert_same(logits(load_pruned(tmp_path)), logits(model))


WIDTHS = {
    "qwen3_moe": ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", dict(_EXPERTS, mlp_only_layers=[0])),
    "qwen2_moe": ("Qwen2MoeForCausalLM", "Qwen2MoeConfig", dict(_EXPERTS, shared_expert_intermediate_size=24)),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", dict(num_local_experts=4)),
    "gpt_oss": ("GptOssForCausalLM", "GptOssConfig", dict(num_local_experts=4, num_experts_per_tok=2, rope_scaling=None)),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", {}),
}  # fmt: skip


@pytest.mark.parametrize("kind", WIDTHS)
def test_neurons_of_all_experts_and_of_fused_gates_are_removed(kind, tmp_path):
    name, config, settings = WIDTHS[kind]
    torch.manual_seed(0)
    model = getattr(tf, name)(getattr(tf, config)(**{**_CAUSAL, "num_hidden_layers": 2, **settings})).eval()

    def neurons():
        return sum(
            p.numel() for n, p in model.named_parameters() if "_proj" in n and "attn" not in n and "bias" not in n
        )

    before, masked = neurons(), copy.deepcopy(model)
    prune(model, HALF)
    assert neurons() == before / 2
    prune(masked, PruningSpec(sparsity=0.5, structure="neuron", cut="mask"))
    assert_same(logits(model), logits(masked))
    assert_same(logits(loaded(model, tmp_path)), logits(model))


def test_experts_in_one_tensor_are_not_ranked_by_activations_that_nothing_reads():
    model = HEADS["sinks"]()
    with pytest.raises(ValueError, match="holds all experts in one tensor"):
        prune(model, PruningSpec(sparsity=0.5, structure="neuron", criterion="activation"), [{"input_ids": IDS}])


def refusal(model, structure):
    """Why a structure does not fit a model; nothing if it does."""
    try:
        prune(copy.deepcopy(model), PruningSpec(sparsity=0.5, structure=structure, plain_checkpoint=False))
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("family", ["convnext", "resnet", "swin", "wav2vec2"])
def test_a_refusal_advises_what_works(family):
    model = FAMILIES[family].make()
    told = {structure: refusal(model, structure) for structure in ("neuron", "head", "channel", "layer", "hidden")}
    fits = {structure for structure, message in told.items() if not message} | {"weight"}
    advised = [message.partition("What fits this model: ")[2] for message in told.values()]
    assert any(advised)
    for each in filter(None, advised):
        assert set(re.findall(r"structure='(\w+)'", each)) == fits


@pytest.mark.parametrize(
    ("family", "structure"),
    [("depth-anything", "layer"), ("longformer", "head"), ("funnel", "hidden")],
)
def test_what_is_left_of_a_structure_that_does_not_fit_works(family, structure):
    model = ENTRIES[family].make()
    if not (message := refusal(model, structure)):
        pytest.skip("it fits")
    for cut in [{"cut": "mask", "structure": structure}] * ("cut='mask'" in message) + [{"structure": "weight"}]:
        prune(copy.deepcopy(model), PruningSpec(sparsity=0.5, plain_checkpoint=False, **cut))


def test_a_disk_that_is_full_is_no_fault_of_a_model(monkeypatch):
    def fails(self, folder, **_):
        raise SafetensorError("No space left on device (os error 28)")

    model = FAMILIES["bert"].make().eval()
    monkeypatch.setattr(tf.BertForSequenceClassification, "save_pretrained", fails)
    for attempt in (
        lambda: make_student(model, num_layers=1),
        lambda: prune(model, PruningSpec(structure="neuron", sparsity=0.5)),
    ):
        with pytest.raises(OSError, match=r"cannot be written to .*No space left.*\. Make room there, or .* TMPDIR"):
            attempt()
