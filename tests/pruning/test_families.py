# SPDX-License-Identifier: Apache-2.0
"""Every architecture family with every structure: what goes, what is left, and how the result loads.

The masked model, the pruned one and the reloaded one must say the same.
"""

from __future__ import annotations

import copy
import itertools
import json
import math
import pickle
import warnings

import pytest
import torch
import transformers as tf
from packaging.version import Version
from torch import nn

from benchmarks.models.entries import ENTRIES
from hfkdq import PruningSpec, export_onnx, load_pruned, prune
from hfkdq.facts import read_facts
from hfkdq.modeling import find_layer_stacks
from hfkdq.modeling.bypass import bypass_
from hfkdq.pruning.criteria import ImportanceStatistics
from hfkdq.pruning.masks import Masks
from hfkdq.pruning.targets import GroupTarget, LayerTarget, find_targets

from ..closeness import DOUBLE, ROUNDED_NORMS, UNIT, assert_same_in_double, batch_for, doubled, in_double
from ..families import FAMILIES, VARIANTS

ON_V5 = Version(tf.__version__) >= Version("4.58")
optimum_line = pytest.mark.skipif(ON_V5, reason="Optimum's exporter needs transformers<4.58")
STRUCTURES = ("neuron", "head", "channel", "layer", "hidden")

PLAIN, SHAPES = "plain", "shapes"
NO_CHANNELS = r"has no block of convolutions whose inner channels could go"
NO_NEURONS = r"has no feed-forward width: none of intermediate_size, hidden_dim"
NO_HEADS = r"has no attention whose parts are known"
NO_LAYERS = r"has no stack of layers that \w+ counts"
NO_HIDDEN = r"structure='hidden' is not supported for [\w-]+: scales, position tables or group counts"
WHY_SHAPES = {
    "head": r"\w+Config has no size of a head that its model reads: \w+ divides its width by the number of heads",
    "hidden": r"divides its hidden width by the number of heads, so that their size would change with it",
    "channel": r"no field of \w+Config decides only the sizes that would change",
}
"""Why a family that loads with recorded shapes alone does so."""

_ENCODER = dict(neuron=PLAIN, head=SHAPES, channel=NO_CHANNELS, layer=PLAIN, hidden=SHAPES)
_FIXED_WIDTH = {**_ENCODER, "hidden": NO_HIDDEN}
_IMAGES = {**_ENCODER, "head": PLAIN if ON_V5 else SHAPES}
_CONVOLUTIONS = dict(neuron=NO_NEURONS, head=NO_HEADS, channel=SHAPES, layer=NO_LAYERS, hidden=NO_HIDDEN)
EXPECTED: dict[str, dict[str, str]] = {
    **dict.fromkeys(("bert", "roberta", "distilbert", "electra", "mpnet", "gpt2"), _ENCODER),
    **dict.fromkeys(("deberta", "deberta-v2", "bart", "wav2vec2", "hubert", "whisper"), _FIXED_WIDTH),
    **dict.fromkeys(("vit", "deit"), _IMAGES),
    **dict.fromkeys(("convnext", "resnet"), _CONVOLUTIONS),
    "llama": {**_ENCODER, "head": PLAIN, "hidden": PLAIN},
    "t5": {**_FIXED_WIDTH, "head": PLAIN},
    "swin": {
        **_FIXED_WIDTH,
        "head": r"relative_position_bias_table beside its heads, which is not known to follow them",
        "layer": NO_LAYERS,
    },
    "detr": {
        **_FIXED_WIDTH,
        "head": SHAPES if ON_V5 else r"\(DetrAttention\) needs as many heads as its configuration says",
        "channel": SHAPES,
    },
    "yolos": {
        **_FIXED_WIDTH,
        "layer": r"mid_position_embeddings of YolosForObjectDetection has an entry for every place between two layers",
    },
}
"""`"plain"`: from_pretrained loads it; `"shapes"`: load_pruned alone; otherwise the reason why it is refused."""

PAIRS = [(name, structure, EXPECTED[name][structure]) for name in FAMILIES for structure in STRUCTURES]
LOADS_PLAINLY = [(name, structure) for name, structure, how in PAIRS if how == PLAIN]
NEEDS_SHAPES = [(name, structure) for name, structure, how in PAIRS if how == SHAPES]
REFUSED = [pair for pair in PAIRS if pair[2] not in (PLAIN, SHAPES)]


def spec_of(structure: str, **changes) -> PruningSpec:
    """Half of the units, or about a third of the layers."""
    return PruningSpec(**{"structure": structure, "sparsity": 0.34 if structure == "layer" else 0.5, **changes})


def masked(model: tf.PreTrainedModel, spec: PruningSpec) -> tuple[tf.PreTrainedModel, Masks]:
    """A copy of `model` in its old shapes that computes what the pruned model should."""
    model = copy.deepcopy(model)
    targets = find_targets(model, spec)
    masks = Masks(targets, spec, ImportanceStatistics(targets, spec))
    masks.grow_to(spec.sparsity)
    masks.apply_()
    return model, masks


def parameters_left(model: tf.PreTrainedModel, masks: Masks) -> int:
    """Parameters of `model` in its old shapes without what belongs to the pruned units."""
    shapes = {id(parameter): list(parameter.shape) for parameter in model.parameters()}
    for target, gone in zip(masks.targets, masks.pruned, strict=True):
        if isinstance(target, LayerTarget):
            for layer in (layer for layer, out in zip(target.stack.layers, gone, strict=True) if out):
                shapes.update({id(parameter): [0] for parameter in layer.parameters()})
        elif isinstance(target, GroupTarget):
            for entry in target.group.slices:
                if isinstance(entry.values, nn.Parameter):
                    shapes[id(entry.values)][entry.dim] -= int(gone.sum()) * entry.positions.shape[1]
    return sum(math.prod(shape) for shape in shapes.values())


def state_of(model: tf.PreTrainedModel) -> tuple:
    """All that a refused call must leave alone."""
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    numbers = {
        name: {key: value for key, value in vars(module).items() if type(value) in (int, float, bool, str)}
        for name, module in model.named_modules()
    }
    hooks = {name: (len(module._forward_hooks), type(module)) for name, module in model.named_modules()}
    return tensors, numbers, hooks, model.config.to_dict()


def assert_untouched(model: tf.PreTrainedModel, before: tuple) -> None:
    after = state_of(model)
    assert after[0].keys() == before[0].keys()
    assert all(torch.equal(after[0][name], tensor) for name, tensor in before[0].items())
    assert after[1:] == before[1:]


def pruned_twin(family, model: tf.PreTrainedModel, spec: PruningSpec) -> torch.Tensor:
    """Prunes `model`, checks it against its masked copy and the slices, and gives its outputs."""
    before, double = family.outputs(model), doubled(model)
    twin, masks = masked(double, spec)
    left = parameters_left(twin, masks)
    assert prune(model, spec) is model
    # A norm without a mean whose channels are masked scales by a root that is rounded to float32.
    share = ROUNDED_NORMS if spec.structure == "hidden" else DOUBLE
    assert_same_in_double(family.outputs(prune(double, spec)), family.outputs(twin), share)
    for name, tensor in double.state_dict().items():  # of which the hidden width scales some anew
        torch.testing.assert_close(model.state_dict()[name].to(tensor.dtype), tensor, rtol=4 * UNIT, atol=0)
    outputs = family.outputs(model)
    assert (outputs - before).abs().max() > 1e-2
    assert sum(parameter.numel() for parameter in model.parameters()) == left
    assert left < sum(parameter.numel() for parameter in twin.parameters())
    fact = model.config.hfkdq["pruning"]
    assert (
        fact["parameters_before"] - fact["parameters_after"]
        == sum(parameter.numel() for parameter in twin.parameters()) - left
    )
    return outputs


def assert_round_trip(config: tf.PretrainedConfig, unpruned: tf.PretrainedConfig) -> None:
    """Nothing is lost between `to_dict` and `from_dict` but what is lost without pruning as well."""

    def lost(config):
        written = config.to_dict()
        again = type(config).from_dict(copy.deepcopy(written)).to_dict()
        return {key for key in written.keys() | again.keys() if key not in again or again[key] != written.get(key)}

    assert lost(config) == lost(unpruned)
    assert config.to_dict()["hfkdq"]["pruning"]["spec"]


def assert_loads_plainly(family, model: tf.PreTrainedModel, outputs: torch.Tensor, folder) -> None:
    model.save_pretrained(folder)
    loaded, info = type(model).from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(family.outputs(loaded), outputs)


def assert_loads_by_shapes_alone(family, model: tf.PreTrainedModel, outputs: torch.Tensor, folder) -> None:
    model.save_pretrained(folder)
    loaded = load_pruned(folder)
    assert type(loaded) is type(model)
    assert not loaded.training
    assert torch.equal(family.outputs(loaded), outputs)
    assert {name: tuple(t.shape) for name, t in loaded.state_dict().items()} == {
        name: tuple(t.shape) for name, t in model.state_dict().items()
    }
    with pytest.raises(RuntimeError, match=r"size mismatch|ignore_mismatched_sizes"):
        type(model).from_pretrained(folder)


def test_the_table_knows_every_family_and_structure():
    assert {name: set(row) for name, row in EXPECTED.items()} == {name: set(STRUCTURES) for name in FAMILIES}


@pytest.mark.parametrize(("name", "structure"), LOADS_PLAINLY)
def test_the_pruned_model_is_the_masked_one_and_loads_like_any_other(name, structure, tmp_path):
    family = FAMILIES[name]
    model = family.make()
    outputs = pruned_twin(family, model, spec_of(structure))
    assert "shapes" not in read_facts(model)
    assert_round_trip(model.config, family.make().config)
    assert_loads_plainly(family, model, outputs, tmp_path)
    assert torch.equal(family.outputs(load_pruned(tmp_path)), outputs)


@pytest.mark.parametrize(("name", "structure"), NEEDS_SHAPES)
def test_what_a_configuration_cannot_say_loads_by_its_recorded_shapes_alone(name, structure, tmp_path):
    family = FAMILIES[name]
    model = family.make()
    before = state_of(model)
    with pytest.raises(
        ValueError, match=rf"from_pretrained could not load.*{WHY_SHAPES[structure]}.*plain_checkpoint=False"
    ):
        prune(model, spec_of(structure))
    assert_untouched(model, before)
    outputs = pruned_twin(family, model, spec_of(structure, plain_checkpoint=False))
    assert read_facts(model)["shapes"]["tensors"]
    assert_round_trip(model.config, family.make().config)
    assert_loads_by_shapes_alone(family, model, outputs, tmp_path)


@pytest.mark.parametrize(("name", "structure", "reason"), REFUSED)
def test_what_a_family_lacks_is_refused_with_the_reason_before_anything_is_done(name, structure, reason):
    model = FAMILIES[name].make()
    before = state_of(model)
    for plain in (True, False):
        with pytest.raises(ValueError, match=reason):
            prune(model, spec_of(structure, plain_checkpoint=plain))
    assert_untouched(model, before)


VARIANT_PAIRS = [
    ("bert-decoder", "neuron", PLAIN),
    ("bert-decoder", "head", SHAPES),
    ("bert-decoder", "layer", PLAIN),
    ("bert-tied", "hidden", SHAPES),
    ("deberta-v2-own-keys", "head", SHAPES),
    ("gpt2-default-width", "neuron", PLAIN),
    ("gpt2-default-width", "hidden", SHAPES),
    ("hubert-base", "head", SHAPES),
    ("hubert-base", "layer", PLAIN),
    ("llama-all-keys", "head", PLAIN),
    ("llama-tied", "hidden", PLAIN),
    ("t5-relu", "neuron", PLAIN),
    ("t5-relu", "head", PLAIN),
    ("wav2vec2-base", "neuron", PLAIN),
    ("wav2vec2-base", "head", SHAPES),
    ("wav2vec2-base", "layer", PLAIN),
]


@pytest.mark.parametrize(("name", "structure", "how"), VARIANT_PAIRS)
def test_other_forms_of_a_family_prune_like_it(name, structure, how, tmp_path):
    family = VARIANTS[name]
    model = family.make()
    outputs = pruned_twin(family, model, spec_of(structure, plain_checkpoint=how == PLAIN))
    if how == PLAIN:
        assert_loads_plainly(family, model, outputs, tmp_path)
    else:
        assert_loads_by_shapes_alone(family, model, outputs, tmp_path)


def test_the_width_of_a_decoder_that_reads_another_model_stays():
    model = VARIANTS["bert-decoder"].make()
    before = state_of(model)
    with pytest.raises(
        ValueError, match="add_cross_attention=True: the cross-attention reads hidden states of another"
    ):
        prune(model, spec_of("hidden", plain_checkpoint=False))
    assert_untouched(model, before)


@pytest.mark.parametrize("name", ["bert-tied", "gpt2-default-width", "llama-tied"])
def test_tied_embeddings_are_still_one_tensor_after_the_hidden_width_was_pruned(name, tmp_path):
    model = prune(VARIANTS[name].make(), spec_of("hidden", plain_checkpoint=False))
    model.save_pretrained(tmp_path)
    for one in (model, load_pruned(tmp_path)):
        assert one.get_output_embeddings().weight is one.get_input_embeddings().weight
        assert one.get_input_embeddings().weight.shape == (60, 16)
        assert one.get_input_embeddings().embedding_dim == 16


def test_a_model_with_one_key_head_keeps_it():
    model = FAMILIES["llama"].make(num_key_value_heads=1)
    before = state_of(model)
    with pytest.raises(ValueError, match=r"would leave 0 of the 1 units \(head\) of model\.layers\.0\.self_attn"):
        prune(model, spec_of("head"))
    assert_untouched(model, before)


@pytest.mark.parametrize("heads", [2, 4])
def test_heads_that_share_their_keys_go_together(heads):
    model = prune(FAMILIES["llama"].make(num_key_value_heads=heads), spec_of("head"))
    assert (model.config.num_attention_heads, model.config.num_key_value_heads) == (2, heads // 2)
    assert model.config.head_dim == 8
    assert model.model.layers[0].self_attn.q_proj.weight.shape == (16, 32)


@pytest.mark.parametrize(
    ("sparsity", "widths"), [(0.15, (41, 82)), (0.3, (34, 67)), (0.03, (47, 93)), (0.5, (24, 48))]
)
def test_swin_stages_of_other_widths_load_or_are_refused_when_rounding_parts_them(sparsity, widths, tmp_path):
    family = FAMILIES["swin"]
    model = family.make()
    spec = spec_of("neuron", sparsity=sparsity)
    if widths[1] != 2 * widths[0]:
        with pytest.raises(ValueError, match=r"different numbers of units \(neuron\), which SwinConfig cannot say"):
            prune(model, spec)
        spec = spec_of("neuron", sparsity=sparsity, plain_checkpoint=False)
    outputs = pruned_twin(family, model, spec)
    left = {target.name: target.units for target in find_targets(model, spec)}
    assert left == {f"swin.encoder.layers.{i}.blocks.{j}": widths[i] for i in range(2) for j in range(2)}
    if spec.plain_checkpoint:
        assert_loads_plainly(family, model, outputs, tmp_path)
    else:
        assert_loads_by_shapes_alone(family, model, outputs, tmp_path)


@pytest.mark.parametrize("name", ["mpnet", "t5"])
def test_heads_that_share_position_biases_go_from_all_layers_at_once(name):
    model = FAMILIES[name].make()
    prune(model, spec_of("head", plain_checkpoint=False))
    tables = [m for key, m in model.named_modules() if key.endswith("relative_attention_bias")]
    assert {table.weight.shape[1] for table in tables} == {2}
    assert {table.embedding_dim for table in tables} == {2}
    counts = [m.num_attention_heads if name == "mpnet" else m.n_heads for m in model.modules()
              if type(m).__name__ in ("MPNetSelfAttention", "T5Attention")]  # fmt: skip
    assert set(counts) == {2}


@pytest.mark.parametrize(
    ("name", "reentrant"),
    [
        ("bert", True),
        ("bert", False),
        ("gpt2", False),
        ("llama", True),
        ("t5", False),
        ("vit", False),
        ("wav2vec2", False),
    ],
)
def test_a_layer_that_is_passed_by_is_so_under_gradient_checkpointing(name, reentrant):
    family = FAMILIES[name]
    settings = family.make().config.to_dict()
    no_dropout = {key: 0.0 for key, value in settings.items() if "drop" in key and isinstance(value, float)}
    model, masks = masked(family.make(**no_dropout), spec_of("layer"))
    model.double().train()

    def gradients():
        model.zero_grad()
        logits = model(**batch_for(model, family.batch())).logits
        logits.square().mean().backward()
        return logits.detach(), {key: p.grad for key, p in model.named_parameters() if p.grad is not None}

    logits, expected = gradients()
    with torch.no_grad():  # not within `in_double`, as what is computed anew in the backward pass cannot be
        assert_same_in_double(model.eval()(**batch_for(model, family.batch())).logits, logits, ROUNDED_NORMS)
    model.train().gradient_checkpointing_enable({"use_reentrant": reentrant})
    again, actual = gradients()
    assert_same_in_double(again, logits, ROUNDED_NORMS)
    assert actual.keys() == expected.keys()
    for key, gradient in expected.items():
        assert_same_in_double(actual[key], gradient, ROUNDED_NORMS)
    target = masks.targets[0]
    for layer, out in zip(target.stack.layers, masks.pruned[0], strict=True):
        still = {bool((p.grad == 0).all()) for p in layer.parameters() if p.grad is not None}
        assert still == {True} if out else False in still


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "t5", "vit", "whisper"])
def test_hidden_states_of_a_layer_that_is_passed_by_are_those_before_it(name):
    family = FAMILIES[name]
    model = family.make()
    layers = find_layer_stacks(model)[-1].layers
    for passed_by in (0, len(layers) - 2):  # the last one may have a norm behind it
        bypass_(layers[passed_by], True)
        with torch.no_grad():
            out = model(**family.batch(), output_hidden_states=True)
        states = out.hidden_states if "hidden_states" in out else out.decoder_hidden_states
        same = [torch.equal(after, before) for before, after in itertools.pairwise(states[:-1])]
        assert same == [place == passed_by for place in range(len(same))]
        bypass_(layers[passed_by], False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_with_a_bypassed_layer_hands_on_what_came_to_its_own(duplicate):
    model = FAMILIES["bert"].make()
    layers = find_layer_stacks(model)[0].layers
    bypass_(layers[0], True)
    other = duplicate(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1.0)
        first, second = (
            m(**FAMILIES["bert"].batch(), output_hidden_states=True).hidden_states for m in (model, other)
        )
    for states in (first, second):
        assert torch.equal(states[1], states[0])
    assert not torch.equal(first[0], second[0])
    bypass_(find_layer_stacks(other)[0].layers[0], False)
    assert layers[0].bypassed
    with torch.no_grad():
        again = other(**FAMILIES["bert"].batch(), output_hidden_states=True).hidden_states
    assert not torch.equal(again[1], again[0])


GENERATING = [
    (name, structure)
    for name in ("gpt2", "llama", "t5", "bart", "whisper")
    for structure in ("neuron", "head", "layer")
]


def generated(family, model: tf.PreTrainedModel, use_cache: bool = True) -> torch.Tensor:
    """Logits, in float64, of six tokens that `model` writes, each after the ones before it."""
    model = doubled(model)
    batch = {
        key: value[:1] for key, value in batch_for(model, family.batch()).items() if not key.startswith("decoder_")
    }
    torch.manual_seed(0)
    with in_double(model):
        out = model.generate(
            **batch, max_new_tokens=6, min_new_tokens=6, do_sample=False, use_cache=use_cache, output_logits=True,
            return_dict_in_generate=True, **({"eos_token_id": None} if family.model.startswith("Whisper") else {}),
        )  # fmt: skip
    return torch.stack(out.logits, dim=1)


@pytest.mark.parametrize(("name", "structure"), GENERATING)
def test_the_pruned_model_writes_what_the_masked_one_does(name, structure, tmp_path):
    family, spec = FAMILIES[name], spec_of(structure, plain_checkpoint=False)
    # Transformers makes the cache of a T5 for as many layers as its encoder has.
    model = family.make(**({"num_layers": 3} if name == "t5" else {}))
    before = generated(family, model)
    expected = generated(family, masked(model, spec)[0])
    assert expected.shape[1] == 6
    prune(model, spec).save_pretrained(tmp_path)
    assert_same_in_double(generated(family, model), expected)
    assert_same_in_double(generated(family, load_pruned(tmp_path)), expected)
    assert_same_in_double(generated(family, model, use_cache=False), expected)
    assert before.shape != expected.shape or (before - expected).abs().max() > 1e-2


WITH_HEADS = [name for name, row in EXPECTED.items() if row["head"] in (PLAIN, SHAPES)]
HAVE_SDPA = [name for name in WITH_HEADS if getattr(tf, FAMILIES[name].model)._supports_sdpa and name != "detr"]


@pytest.mark.parametrize("name", HAVE_SDPA)
def test_heads_go_under_the_other_implementation_of_attention_too(name, tmp_path):
    family = FAMILIES[name]
    assert family.make().config._attn_implementation == "sdpa"  # which the tests above have run
    model = family.make(attn_implementation="eager")
    outputs = pruned_twin(family, model, spec_of("head", plain_checkpoint=False))
    model.save_pretrained(tmp_path)
    loaded = load_pruned(tmp_path, attn_implementation="eager")
    assert loaded.config._attn_implementation == "eager"
    assert torch.equal(family.outputs(loaded), outputs)


@pytest.mark.parametrize(
    ("name", "structure"),
    [("bert", "neuron"), ("bert", "hidden"), ("llama", "head"), ("llama", "hidden"), ("t5", "head"), ("resnet", "channel")],
)  # fmt: skip
def test_half_precision_stays_half(name, structure, tmp_path):
    family = FAMILIES[name]
    family.make().save_pretrained(tmp_path / "before")  # loading leaves what must be float32 so
    model = getattr(tf, family.model).from_pretrained(tmp_path / "before", dtype=torch.bfloat16)

    def outputs(model, dtype=torch.bfloat16):
        batch = {key: v.to(dtype) if v.is_floating_point() else v for key, v in family.batch().items()}
        with torch.no_grad():
            return model.to(dtype)(**batch).logits

    spec = spec_of(structure, plain_checkpoint=False)
    twin = masked(model, spec)[0]
    expected = outputs(twin)
    exact = outputs(copy.deepcopy(twin), torch.float64)
    before = outputs(model)
    prune(model, spec).save_pretrained(tmp_path / "after")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    actual = outputs(model)
    error, rounding, change = ((one - exact).double().norm() for one in (actual, expected, before))
    # The same sums rounded in another order: as far from the exact ones as the masked model is, by as many roundings.
    assert error < min(3 * rounding, change)
    loaded = load_pruned(tmp_path / "after")
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    assert torch.equal(outputs(loaded), actual)


NEURONS_FIRST, LAYERS_FIRST, HEADS_FIRST = (
    ("neuron", "head", "layer"), ("layer", "head", "neuron"), ("head", "layer", "hidden"),
)  # fmt: skip
SEQUENCES = [
    *[
        ("bert", order, ranking)
        for order in (NEURONS_FIRST, LAYERS_FIRST, HEADS_FIRST)
        for ranking in ("local", "global")
    ],
    ("gpt2", NEURONS_FIRST, "global"),
    ("gpt2", HEADS_FIRST, "local"),
    ("llama", NEURONS_FIRST, "local"),
    ("llama", NEURONS_FIRST, "global"),
    ("llama", HEADS_FIRST, "local"),
    ("vit", LAYERS_FIRST, "global"),
]


@pytest.mark.parametrize(("name", "order", "ranking"), SEQUENCES)
def test_structures_are_pruned_one_after_the_other(name, order, ranking, tmp_path):
    family = FAMILIES[name]
    model = family.make()
    for step, structure in enumerate(order):
        # The ranking of the hidden width is one anyway, and layers are of one stack.
        changes = {"ranking": ranking} if structure in ("neuron", "head") else {}
        outputs = pruned_twin(family, model, spec_of(structure, plain_checkpoint=False, **changes))
        model.save_pretrained(tmp_path / str(step))
        assert torch.equal(family.outputs(load_pruned(tmp_path / str(step))), outputs)
    plain = "shapes" not in read_facts(model)
    assert plain or (name, ranking) != ("llama", "local")
    assert not plain or name in ("llama", "vit")
    check = assert_loads_plainly if plain else assert_loads_by_shapes_alone
    check(family, model, outputs, tmp_path / "end")


@pytest.mark.one_line
@pytest.mark.parametrize("name", ["t5", "bart"])
def test_both_stacks_of_an_encoder_decoder_are_pruned_one_after_the_other(name, tmp_path):
    family = FAMILIES[name]
    model = family.make()
    for structure in ("head", "neuron", "layer"):
        changes = {"ranking": "global"} if structure != "layer" else {}
        outputs = pruned_twin(family, model, spec_of(structure, plain_checkpoint=False, **changes))
    assert_loads_by_shapes_alone(family, model, outputs, tmp_path)


def test_a_second_pruning_in_another_process_goes_on_from_the_loaded_model(tmp_path):
    family = FAMILIES["bert"]
    model = prune(family.make(), spec_of("head", ranking="global", plain_checkpoint=False))
    model.save_pretrained(tmp_path / "first")
    loaded = load_pruned(tmp_path / "first")
    with pytest.raises(ValueError, match="has been pruned with plain_checkpoint=False before"):
        prune(loaded, spec_of("neuron"))
    outputs = pruned_twin(family, loaded, spec_of("neuron", plain_checkpoint=False))
    prune(model, spec_of("neuron", plain_checkpoint=False))
    assert torch.equal(family.outputs(model), outputs)
    assert_loads_by_shapes_alone(family, loaded, outputs, tmp_path / "second")


SINGLE_FILE = [
    *[(name, "neuron") for name in FAMILIES if name not in ("t5", "bart", "whisper", "convnext", "resnet")],
    ("convnext", "channel"), ("resnet", "channel"), ("bert", "head"), ("bert", "layer"), ("bert", "hidden"),
    ("mpnet", "head"), ("gpt2", "head"), ("llama", "head"), ("vit", "head"), ("vit", "layer"), ("wav2vec2", "head"),
]  # fmt: skip


@optimum_line
@pytest.mark.parametrize(("name", "structure"), SINGLE_FILE)
def test_the_pruned_model_exports_to_onnx(name, structure, tmp_path):
    family = FAMILIES[name]
    model = family.make()
    # Heads ranked together leave layers with different numbers of them.
    spec = spec_of(structure, plain_checkpoint=False, ranking="global" if structure == "head" else "local")
    size = sum(parameter.numel() for parameter in model.parameters())
    prune(model, spec)
    task = "image-classification" if name == "deit" else None  # which Optimum cannot tell
    folder = export_onnx(model, tmp_path / "onnx", task=task)  # raises if the file says something else
    left = sum(parameter.numel() for parameter in model.parameters())
    written = json.loads((folder / "export_facts.json").read_text())
    assert written["max_abs_diff"] <= 1e-4 * written["max_abs_logit"]
    assert 4 * left * 0.9 < written["bytes"] < 4 * size + 500_000
    held = onnx_parameters(folder / "model.onnx")
    assert held < size
    assert family.outputs(load_pruned(folder)).shape == family.outputs(model).shape
    if name == "llama" and structure == "head":  # of which every layer has lost the same number
        assert "shapes" not in read_facts(model)
        assert written["task"] == "text-generation-with-past"
    if name == "gpt2" and structure == "head":  # whose cache could not hold them
        assert written["task"] == "text-generation"
        with pytest.raises(ValueError, match=r"heads.*Export it for 'text-generation'"):
            export_onnx(model, tmp_path / "past", task="text-generation-with-past")


PARTS = [
    ("t5", "head", "text2text-generation"),
    ("bart", "neuron", "text2text-generation"),
    ("whisper", "neuron", "automatic-speech-recognition"),
]


@optimum_line
@pytest.mark.parametrize(("name", "structure", "task"), PARTS)
def test_an_encoder_decoder_exports_with_optimum_as_its_parts(name, structure, task, tmp_path):
    from onnxruntime import InferenceSession
    from optimum.exporters.onnx import onnx_export_from_model

    # Optimum traces Whisper with 3000 frames alone; export_onnx itself writes single files.
    family = FAMILIES[name]
    model = prune(family.make(**({"max_source_positions": 1500} if name == "whisper" else {})), spec_of(structure))
    batch = family.batch()
    if name == "whisper":
        batch["input_features"] = torch.randn(2, 8, 3000, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(**batch).logits
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        onnx_export_from_model(model, tmp_path, task=task, opset=18, do_validation=False)

    def run(part, feeds):
        session = InferenceSession(tmp_path / part, providers=["CPUExecutionProvider"])
        wanted = {entry.name for entry in session.get_inputs()}
        return session.run(None, {key: value for key, value in feeds.items() if key in wanted})[0]

    feeds = {key: value.numpy() for key, value in batch.items()}
    states = run("encoder_model.onnx", feeds)
    feeds["input_ids"] = feeds.pop("decoder_input_ids")
    feeds |= {"encoder_hidden_states": states, "encoder_attention_mask": feeds.get("attention_mask")}
    logits = torch.from_numpy(run("decoder_model.onnx", feeds))
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


def onnx_parameters(path) -> int:
    import onnx

    return sum(math.prod(t.dims) for t in onnx.load(path).graph.initializer if t.data_type == onnx.TensorProto.FLOAT)


@torch.no_grad()
def test_a_layer_that_returns_a_dictionary_is_passed_by():
    """As those of SqueezeBERT do."""
    entry = ENTRIES["squeezebert"]
    model, shorter, batch = entry.make(), entry.make(), entry.batch()
    del shorter.transformer.encoder.layers[0]
    expected = shorter(**batch, output_hidden_states=True)
    bypass_(model.transformer.encoder.layers[0], True)
    found = model(**batch, output_hidden_states=True)
    assert torch.equal(found.logits, expected.logits)
    assert torch.equal(found.hidden_states[1], found.hidden_states[0])
    pruned = entry.make()
    prune(pruned, PruningSpec(structure="layer", sparsity=0.5))
    assert pruned.config.num_hidden_layers == 1
