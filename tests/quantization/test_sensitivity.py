# SPDX-License-Identifier: Apache-2.0
"""Widths for every module under a size: what is measured, what is chosen, and what comes of it."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import nn
from transformers import BertModel, BertPreTrainedModel, GPT2Config, GPT2LMHeadModel, set_seed

from hfkdq import QuantizationSpec, quantize, suggest_bits
from hfkdq.quantization import prepare_qat_, quantized_modules, strip_quantizers_
from hfkdq.quantization.allocation import choose_bits
from tests import tiny

WEIGHTS_ALONE = QuantizationSpec(activation_bits=None)


def batches(model, count=2):
    return [tiny.batch(model, seed=seed) for seed in range(count)]


def planted():
    """A BERT one of whose modules has a huge weight in every row, for an input that is always 0."""
    model = tiny.bert()
    layer = model.bert.encoder.layer[0]
    with torch.no_grad():
        layer.attention.output.LayerNorm.weight[0] = layer.attention.output.LayerNorm.bias[0] = 0.0
        layer.intermediate.dense.weight[:, 0] = 5.0
    return model, "bert.encoder.layer.0.intermediate.dense"


def naive_kl(before, after):
    p, q = before.double().softmax(-1), after.double().softmax(-1)
    return (p * (p / q).log()).sum(-1)


@torch.no_grad()
def outputs(model, sample):
    return [model(**batch) for batch in sample]


def moved(make, name, width, sample, distance):
    """The distance between a model and its copy of which one module has quantized weights."""
    spec = QuantizationSpec(activation_bits=None, target_modules=[name], overrides={name: {"weight_bits": width}})
    return distance(outputs(make(), sample), outputs(prepare_qat_(make(), spec), sample))


# ------------------------------------------------------------------ what is chosen


def brute_force(sizes, costs, budget):
    fitting = []
    for widths in itertools.product(*(list(found) for found in sizes.values())):
        pairs = list(zip(sizes, widths, strict=True))
        size = sum(sizes[name][width] for name, width in pairs)
        if size <= budget:
            fitting.append((sum(costs[name][width] for name, width in pairs), size))
    return min(fitting) if fitting else None


def random_case(seed, modules=6):
    rng = np.random.default_rng(seed)
    weights = rng.integers(1, 40, size=modules)
    sizes = {f"m{i}": {b: int(8 * n * b // 8 + 4) for b in (8, 4, 2)} for i, n in enumerate(weights)}
    costs = {name: dict(zip((8, 4, 2), rng.gamma(0.5, size=3) * [0.1, 1, 5], strict=True)) for name in sizes}
    low, high = (sum(pick(found.values()) for found in sizes.values()) for pick in (min, max))
    return sizes, costs, int(rng.integers(low, high + 1))


@pytest.mark.parametrize("seed", range(25))
def test_the_choice_is_that_of_brute_force(seed):
    sizes, costs, budget = random_case(seed)
    chosen = choose_bits(sizes, costs, budget)
    assert list(chosen) == list(sizes)
    assert sum(sizes[name][width] for name, width in chosen.items()) <= budget
    best, size = brute_force(sizes, costs, budget)
    assert sum(costs[name][width] for name, width in chosen.items()) == pytest.approx(best, rel=1e-12)
    assert sum(sizes[name][width] for name, width in chosen.items()) == size


@pytest.mark.parametrize("states", [2, 8, 16, 40])
def test_with_few_states_the_choice_fits_and_keeps_its_guarantee(states):
    for seed in range(40):
        sizes, costs, budget = random_case(seed)
        chosen = choose_bits(sizes, costs, budget, states=states)
        assert sum(sizes[name][width] for name, width in chosen.items()) <= budget
        bound = brute_force(sizes, costs, math.floor(budget * (1 - len(sizes) / states)))
        if bound is not None:
            assert sum(costs[name][width] for name, width in chosen.items()) <= bound[0] + 1e-12
        narrowest = sum(min(found.values()) for found in sizes.values())
        assert set(choose_bits(sizes, costs, narrowest, states=states).values()) == {2}


def test_of_sizes_that_are_taken_as_one_the_cheapest_stays():
    sizes = {"a": {8: 100, 4: 51, 3: 50, 2: 10}, "b": {4: 45, 2: 10}}
    costs = {"a": {8: 0.0, 4: 1.0, 3: 5.0, 2: 9.0}, "b": {4: 0.0, 2: 5.0}}
    for states in (3, 1000):
        assert choose_bits(sizes, costs, 111, states=states) == {"a": 4, "b": 4}


def test_a_module_that_moves_nothing_gets_the_narrowest_width():
    sizes = {"a": {8: 80, 2: 20}, "b": {8: 80, 2: 20}}
    assert choose_bits(sizes, {"a": {8: 0.0, 2: 0.0}, "b": {8: 0.0, 2: 1.0}}, 160) == {"a": 2, "b": 8}
    with pytest.raises(ValueError, match="take 40 bytes, more than the budget of 39"):
        choose_bits(sizes, {"a": {8: 0.0, 2: 0.0}, "b": {8: 0.0, 2: 1.0}}, 39)


def test_a_planted_sensitive_module_gets_the_wide_width():
    model, name = planted()
    plain = suggest_bits(tiny.bert(), batches(model), budget=0.2)
    found = suggest_bits(model, batches(model), budget=0.2)
    assert found.sensitivity[name][4] == max(values[4] for values in found.sensitivity.values())
    assert found.sensitivity[name][4] > 10 * plain.sensitivity[name][4]
    assert found.bits[name] == 8
    assert set(found.bits.values()) == {8, 4, 2} or set(found.bits.values()) == {8, 4}


def test_the_mix_moves_outputs_less_than_one_width_of_the_same_size():
    model, _ = planted()
    sample = batches(model, 4)
    one_width = suggest_bits(model, sample, budget=0.2).uniform(4)[0]
    found = suggest_bits(model, sample, budget=one_width)
    before = outputs(model, sample)

    def total(spec):
        after = outputs(quantize(planted()[0], spec), sample)
        return float(torch.cat([naive_kl(a.logits, b.logits) for a, b in zip(before, after, strict=True)]).mean())

    mixed = total(suggest_bits(model, sample, budget=one_width, spec=WEIGHTS_ALONE).spec)
    uniform = total(QuantizationSpec(weight_bits=4, embedding_bits=4, head_bits=4, activation_bits=None))
    assert found.bytes <= one_width
    assert mixed < 0.7 * uniform
    assert found.predicted < 0.7 * found.uniform(4)[1]
    assert found.predicted == pytest.approx(sum(found.sensitivity[n][b] for n, b in found.bits.items()))


# ------------------------------------------------------------------ what is measured


def class_distance(before, after):
    return float(torch.cat([naive_kl(a.logits, b.logits) for a, b in zip(before, after, strict=True)]).mean())


def attended(values, sample):
    return torch.cat([value[batch["attention_mask"].bool()] for value, batch in zip(values, sample, strict=True)])


def token_distance(sample):
    def distance(before, after):
        parts = [naive_kl(a.logits, b.logits) for a, b in zip(before, after, strict=True)]
        return float(attended(parts, sample).mean())

    return distance


def relative_distance(pick):
    def distance(before, after):
        old, new = (torch.cat([pick(output, i).double() for i, output in enumerate(side)]) for side in (before, after))
        return float((new - old).square().mean() / old.var(unbiased=False))

    return distance


def span_distance(sample):
    def distance(before, after):
        found = []
        for old, new, batch in zip(before, after, sample, strict=True):
            for part in ("start_logits", "end_logits"):
                for a, b, mask in zip(old[part], new[part], batch["attention_mask"].bool(), strict=True):
                    found.append(naive_kl(a[mask], b[mask]))
        return float(torch.stack(found).mean())

    return distance


def label_distance(before, after):
    def both(logits):
        return torch.stack([logits, torch.zeros_like(logits)], dim=-1)

    parts = [naive_kl(both(a.logits), both(b.logits)) for a, b in zip(before, after, strict=True)]
    return float(torch.cat(parts).mean())


def box_distance(before, after):
    parts = [naive_kl(a.logits, b.logits) for a, b in zip(before, after, strict=True)]
    return float(torch.cat(parts).mean()) + relative_distance(lambda output, i: output.pred_boxes)(before, after)


def bare():
    set_seed(0)
    return BertModel(tiny.bert_config()).eval()


TEXT = batches(tiny.bert(), 2)
PICTURES = [{"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(i))} for i in range(2)]
QUERY = "encoder.layer.0.attention.self.query"
HEADS = {
    "classes": (tiny.bert, TEXT, f"bert.{QUERY}", class_distance),
    "tags": (tiny.bert_tokens, TEXT, "classifier", token_distance(TEXT)),
    "next tokens": (tiny.llama, TEXT, "model.layers.0.mlp.down_proj", token_distance(TEXT)),
    "spans": (tiny.bert_qa, TEXT, "qa_outputs", span_distance(TEXT)),
    "labels": (lambda: tiny.bert(problem_type="multi_label_classification", labels=10), TEXT, "classifier", label_distance),
    "numbers": (lambda: tiny.bert(problem_type="regression", labels=2), TEXT, "classifier",
                relative_distance(lambda output, i: output.logits)),
    "one number": (lambda: tiny.bert(labels=1), TEXT, f"bert.{QUERY}", relative_distance(lambda output, i: output.logits)),
    "states": (bare, TEXT, QUERY,
               relative_distance(lambda output, i: output.last_hidden_state[TEXT[i]["attention_mask"].bool()])),
    "objects": (tiny.yolos, PICTURES, "vit.encoder.layer.0.attention.attention.query", box_distance),
}  # fmt: skip


@pytest.mark.parametrize("head", HEADS)
def test_sensitivity_is_how_far_the_outputs_move(head):
    make, sample, name, distance = HEADS[head]
    model = make()
    if name not in dict(model.named_modules()):  # the layers of some models moved in Transformers 5
        name = next(found for found, _ in model.named_modules() if found.endswith(("query", "q_proj")))
    spec = QuantizationSpec(target_modules=[name])
    smallest = suggest_bits(model, sample, budget=0.2, spec=spec, bits=(8, 3, 2))
    for width in (8, 3, 2):
        expected = moved(make, name, width, sample, distance)
        assert expected > 0
        assert smallest.sensitivity[name][width] == pytest.approx(expected, rel=1e-4), width
    kinds = {"numbers": "relative squared error", "one number": "relative squared error",
             "states": "relative squared error", "objects": "KL divergence + relative squared error"}  # fmt: skip
    assert smallest.measure == kinds.get(head, "KL divergence")


def test_frames_of_padding_do_not_count():
    model = tiny.wav2vec2_ctc()
    sound = torch.randn(2, 4000, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(2, 4000, dtype=torch.long)
    mask[1, 2000:] = 0
    spec = QuantizationSpec(target_modules=["lm_head"])
    found = suggest_bits(model, [{"input_values": sound, "attention_mask": mask}], budget=0.2, spec=spec)
    frames = torch.arange(20) < torch.tensor([[20], [10]])
    assert model._get_feat_extract_output_lengths(mask.sum(1)).tolist() == [20, 10]

    def distance(before, after):
        return float(naive_kl(before[0].logits, after[0].logits)[frames].mean())

    sample = [{"input_values": sound, "attention_mask": mask}]
    assert found.sensitivity["lm_head"][2] == pytest.approx(
        moved(tiny.wav2vec2_ctc, "lm_head", 2, sample, distance), rel=1e-4
    )


def test_what_a_decoder_writes_counts_where_it_has_labels():
    model = tiny.t5()
    sample = [
        {**batch, "labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)} for batch in TEXT
    ]
    name = "decoder.block.1.layer.2.DenseReluDense.wo"
    found = suggest_bits(model, sample, budget=0.2, spec=QuantizationSpec(target_modules=[name]))

    def distance(before, after):
        parts = [naive_kl(a.logits, b.logits) for a, b in zip(before, after, strict=True)]
        return float(torch.cat([p[b["labels"] != -100] for p, b in zip(parts, sample, strict=True)]).mean())

    assert found.sensitivity[name][2] == pytest.approx(moved(tiny.t5, name, 2, sample, distance), rel=1e-4)


def test_a_dataset_is_batched_as_for_calibration_and_only_so_many_batches_count():
    data = tiny.text_dataset(10)
    by_tokenizer = suggest_bits(tiny.bert(), data, budget=0.2, batch_size=4, processing_class=tiny.tokenizer())
    rows = [tiny.tokenizer().pad(data[i : i + 4], return_tensors="pt") for i in range(0, 10, 4)]
    given = suggest_bits(tiny.bert(), (dict(batch) for batch in rows), budget=0.2)
    assert given == by_tokenizer
    first = suggest_bits(tiny.bert(), itertools.cycle(map(dict, rows)), budget=0.2, max_batches=1)
    assert first == suggest_bits(tiny.bert(), [dict(rows[0])], budget=0.2)
    assert first.sensitivity != given.sensitivity


# ------------------------------------------------------------------ what it makes of the model


def counted(model):
    """Bytes of the weights of a quantized model, from the integers and scales that its modules give."""
    total, seen = 0, set()
    for module in quantized_modules(model).values():
        if module.weight.data_ptr() in seen:
            continue
        seen.add(module.weight.data_ptr())
        scheme = module.quantization_scheme
        if scheme.weight_bits == 16:
            total += 2 * module.weight.numel()
            continue
        total += math.ceil(module.integer_weight().numel() * scheme.weight_bits / 8)
        total += module.weight_scale().numel() * {"float32": 4, "float16": 2, "bfloat16": 2}[scheme.storage_dtype]
        zero_point = module.weight_zero_point()
        total += 0 if zero_point is None else math.ceil(zero_point.numel() * scheme.weight_bits / 8)
        if scheme.weight_mapping == "kmeans":
            total += 4 * module.weight_quantizer.codebook.numel()
    return total


def gpt2():
    set_seed(0)
    config = GPT2Config(
        vocab_size=len(tiny.VOCABULARY), n_embd=32, n_layer=2, n_head=4, n_positions=32, initializer_range=0.2
    )
    return GPT2LMHeadModel(config).eval()  # fmt: skip


SPECS = {
    "default": {},
    "groups, half": dict(group_size=32, storage_dtype="float16"),
    "base of other groups": dict(weight_bits=4, group_size=32),
    "affine": dict(symmetric=False),
    "k-means": dict(weight_mapping="kmeans"),
    "one scale": dict(per_channel=False),
    "half weights": dict(storage_dtype="bfloat16"),
    "weights alone": dict(activation_bits=None, weight_estimator="mse"),
}


MADE = [(tiny.bert, settings) for settings in SPECS]
MADE += [(gpt2, "default"), (gpt2, "base of other groups"), (gpt2, "affine"), (tiny.vit, "default")]


@pytest.mark.parametrize(("make", "settings"), MADE)
def test_the_model_made_from_the_spec_has_the_widths_and_bytes_that_were_said(make, settings):
    model = make()
    spec = QuantizationSpec(**SPECS[settings])
    bits = (16, 8, 4, 2) if settings == "half weights" else (8, 6, 4, 3, 2)
    found = suggest_bits(model, batches(model), budget=0.18, spec=spec, bits=bits)
    assert QuantizationSpec.from_dict(json.loads(json.dumps(found.spec.to_dict()))) == found.spec
    quantized = quantize(make(), found.spec, batches(model))
    widths = {name: module.quantization_scheme.weight_bits for name, module in quantized_modules(quantized).items()}
    assert widths == found.bits
    assert len(set(widths.values())) > 1
    assert counted(quantized) == found.bytes <= found.budget
    weights = {module.weight.data_ptr(): module.weight for module in quantized_modules(quantized).values()}
    assert found.float_bytes == 4 * sum(weight.numel() for weight in weights.values())  # a shared table counts once
    for width in (found.widths[0], found.widths[-1]):
        overrides = {pattern: {**value, "weight_bits": width} for pattern, value in found.spec.overrides.items()}
        uniform = QuantizationSpec(**SPECS[settings], overrides=overrides)
        assert counted(quantize(make(), uniform, batches(model))) == found.uniform(width)[0]


def test_half_weights_are_no_integers():
    model = tiny.bert()
    spec = QuantizationSpec(storage_dtype="bfloat16", target_modules=["query", "key"])
    found = suggest_bits(model, batches(model), budget=0.5, spec=spec, bits=(16, 8))
    assert set(found.bits.values()) == {16}
    assert found.bytes == found.float_bytes // 2


class Recurrent(BertPreTrainedModel):
    """A classifier over an LSTM; and two linear layers that share their weight, as `tied` says."""

    def __init__(self, config, tied=True):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, 32)
        self.lstm = nn.LSTM(32, 32, num_layers=2, batch_first=True)
        self.first, self.second = nn.Linear(32, 32), nn.Linear(32, 32)
        if tied:
            self.second.weight = self.first.weight
        self.block = nn.ModuleDict({"first": nn.Linear(32, 32)})  # whose name ends as another does
        self.head = nn.Linear(32, 3)
        self.post_init()

    def forward(self, input_ids, attention_mask=None):
        states = self.lstm(self.embed(input_ids))[0].mean(1)
        states = self.block["first"](self.second(self.first(states).relu()).relu()).relu()
        return {"logits": self.head(states)}


def recurrent(**kwargs):
    set_seed(0)
    return Recurrent(tiny.bert_config(), **kwargs).eval()


def test_weights_that_are_shared_count_once_and_have_one_width():
    model, apart = recurrent(), recurrent(tied=False)
    found = suggest_bits(model, TEXT, budget=0.2, bits=(8, 4, 2))
    assert "first" in found.sizes
    assert "second" not in found.sizes
    assert found.bits["first"] == found.bits["second"]
    assert suggest_bits(apart, TEXT, budget=0.2).float_bytes - found.float_bytes == 4 * 32 * 32
    spec = QuantizationSpec(activation_bits=None, target_modules=r"first|second", weight_bits=2, head_bits=2)
    both = class_distance(outputs_of_dict(recurrent(), TEXT), outputs_of_dict(prepare_qat_(recurrent(), spec), TEXT))
    assert found.sensitivity["first"][2] == pytest.approx(both, rel=1e-4)


def outputs_of_dict(model, sample):
    return [type("Output", (), output) for output in outputs(model, sample)]


def test_gates_of_recurrent_layers_have_a_scale_each():
    found = suggest_bits(recurrent(), TEXT, budget=0.2)
    weights = 4 * 4 * 32 * 32  # two layers of two matrices with four gates
    assert found.sizes["lstm"] == {8: weights + 4 * 4 * 4, 4: weights // 2 + 64, 2: weights // 4 + 64}
    assert all(value > 0 for value in found.sensitivity["lstm"].values())


def test_a_name_that_others_end_with_means_its_module_alone():
    model = recurrent(tied=False)
    spec = QuantizationSpec(overrides={"block.first": None})
    found = suggest_bits(model, TEXT, budget=0.2, spec=spec)
    assert "block.first" not in found.bits
    quantized = prepare_qat_(recurrent(tied=False), found.spec)
    assert set(quantized_modules(quantized)) == set(found.bits)
    free = suggest_bits(model, TEXT, budget=0.2)
    for name, width in free.bits.items():
        module = model.get_submodule(name)
        assert free.spec.scheme(name, module).weight_bits == width


def test_a_head_that_shares_a_table_has_its_bits_and_counts_once():
    model = tiny.bert_mlm()
    found = suggest_bits(model, batches(model), budget=0.2)
    table, head = "bert.embeddings.word_embeddings", "cls.predictions.decoder"
    assert found.bits[table] == found.bits[head]
    assert (table in found.sizes) != (head in found.sizes)


def test_widths_that_the_spec_sets_stay():
    model = tiny.bert()
    spec = QuantizationSpec(head_bits=8, embedding_bits=4, overrides={"query": {"weight_bits": 6, "symmetric": False}})
    found = suggest_bits(model, batches(model), budget=0.12, spec=spec)
    for name, width in found.bits.items():
        fixed = 8 if name == "classifier" else 4 if "embeddings" in name else 6 if "query" in name else None
        assert fixed is None or (width == fixed and list(found.sizes[name]) == [fixed]), name
        assert (name in found.spec.overrides) == (fixed is None)
    assert {width for name, width in found.bits.items() if name not in found.spec.overrides} == {8, 6, 4}
    quantized = quantize(tiny.bert(), found.spec, batches(model))
    assert counted(quantized) == found.bytes
    scheme = quantized_modules(quantized)[f"bert.{QUERY}"].quantization_scheme
    assert (scheme.weight_bits, scheme.symmetric) == (6, False)


def test_other_settings_of_an_override_stay():
    model = tiny.bert()
    spec = QuantizationSpec(overrides={"classifier": {"per_channel": False}}, exclude_modules=["key"])
    found = suggest_bits(model, batches(model), budget=0.2, spec=spec)
    assert not any("key" in name for name in found.bits)
    assert found.spec.overrides["classifier"] == {"per_channel": False, "weight_bits": found.bits["classifier"]}


# ------------------------------------------------------------------ the model stays what it was


def snapshot(model):
    return (
        {name: value.clone() for name, value in model.state_dict().items()},
        {name: (type(module), module.training, set(vars(module))) for name, module in model.named_modules()},
        {name: (parameter.requires_grad, parameter.grad) for name, parameter in model.named_parameters()},
        {name: parameter.data_ptr() for name, parameter in model.named_parameters()},
        model.config.to_dict(),
    )


def assert_same(model, before):
    after = snapshot(model)
    assert before[1:] == after[1:]
    assert before[0].keys() == after[0].keys()
    assert all(torch.equal(value, after[0][name]) for name, value in before[0].items())


def with_dropout():
    return tiny.bert(hidden_dropout_prob=0.3)


@pytest.mark.parametrize("make", [with_dropout, tiny.t5, recurrent, gpt2])
def test_the_model_comes_back_as_it_was(make):
    model = make().train()
    next(iter(model.children())).eval()
    model.config.hfkdq = {"quantization": {"of": "another run"}}
    before, random = snapshot(model), torch.get_rng_state()
    sample = [{**batch, "labels": batch["input_ids"]} for batch in TEXT] if make is tiny.t5 else TEXT
    suggest_bits(model, sample, budget=0.2, spec=QuantizationSpec(weight_mapping="kmeans"))
    assert_same(model, before)
    assert torch.equal(random, torch.get_rng_state())


def test_the_model_comes_back_as_it_was_when_something_breaks():
    model, calls = tiny.bert().train(), []
    before = snapshot(model)

    def breaks(module, inputs):
        calls.append(module)
        if len(calls) > 7:
            raise KeyError("in the middle")

    hook = model.classifier.register_forward_pre_hook(breaks)
    with pytest.raises(KeyError, match="in the middle"):
        suggest_bits(model, batches(model), budget=0.2)
    hook.remove()
    assert_same(model, before)
    with pytest.raises(ValueError, match="group_size=128 does not divide the 32 inputs"):
        suggest_bits(model, batches(model), budget=0.2, spec=QuantizationSpec(group_size=128))
    assert_same(model, before)


# ------------------------------------------------------------------ budgets and errors


def test_a_budget_is_a_share_of_float32_or_bytes():
    model = tiny.bert()
    share = suggest_bits(model, batches(model), budget=0.2)
    assert share.budget == int(0.2 * share.float_bytes)
    assert share.budget - 700 < share.bytes <= share.budget
    assert suggest_bits(model, batches(model), budget=share.budget) == share
    for width in (8, 2):
        assert set(suggest_bits(model, batches(model), budget=share.uniform(width)[0]).bits.values()) == {width}
    predicted = [suggest_bits(model, batches(model), budget=part).predicted for part in (0.1, 0.15, 0.2, 0.25)]
    assert predicted == sorted(predicted, reverse=True)
    assert len(set(predicted)) == 4


def nan(model):
    return [{**tiny.batch(model), "inputs_embeds": torch.full((4, 10, 32), float("nan")), "input_ids": None}]


SMALLEST, LARGEST = 8240, 25232


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        (
            dict(budget=0.05),
            ValueError,
            rf"too small: the fewest bits take {SMALLEST:,} bytes, a share of 0\.091",
        ),
        (dict(budget=SMALLEST - 1), ValueError, f"too small: the fewest bits take {SMALLEST:,}"),
        (dict(budget=1), ValueError, "budget=1 .* too small"),
        (dict(budget=LARGEST + 1), ValueError, f"more than the most bits take, {LARGEST:,} bytes"),
        (dict(budget=1.0), ValueError, "nothing to choose"),
        (dict(budget=1.5), ValueError, "no share of the float32 size"),
        (dict(budget=0.0), ValueError, "no share of the float32 size"),
        (dict(budget=True), TypeError, "share .float. or bytes .int."),
        (dict(budget="20%"), TypeError, "got str '20%'"),
        (dict(bits=(8, 5)), ValueError, "out of 16, 8, 6, 4, 3, 2, 1, got .8, 5."),
        (dict(bits=(8, 8)), ValueError, "different numbers of bits"),
        (dict(bits=(8,)), ValueError, "at least two"),
        (dict(bits=(16, 8)), ValueError, "storage_dtype"),
        (dict(bits=(8, 1), spec=QuantizationSpec(symmetric=False)), ValueError, "symmetric=True"),
        (dict(max_batches=0), ValueError, "max_batches must be at least 1"),
        (dict(data=[]), ValueError, "hold no batch"),
        (dict(data=tiny.text_dataset(2).select([])), ValueError, "hold no batch"),
        (dict(data=[torch.zeros(1, 4)]), TypeError, "batch 1 is a Tensor"),
        (dict(data=nan(tiny.bert())), ValueError, "inputs_embeds of calibration batch 1 is not finite"),
        (dict(spec=QuantizationSpec(target_modules=["nowhere"])), ValueError, "matches no module"),
    ],
)
def test_what_cannot_be_is_refused_and_the_model_left_alone(settings, error, message):
    model = tiny.bert().train()
    before = snapshot(model)
    with pytest.raises(error, match=message):
        suggest_bits(model, **{"data": batches(model), "budget": 0.2, **settings})
    assert_same(model, before)


def test_the_share_that_an_error_names_is_enough():
    model = tiny.bert()
    assert set(suggest_bits(model, batches(model), budget=0.091).bits.values()) == {2}
    assert set(suggest_bits(model, batches(model), budget=SMALLEST).bits.values()) == {2}


def test_models_that_are_quantized_or_not_finite_are_refused():
    model = quantize(tiny.bert(), QuantizationSpec(), batches(tiny.bert()))
    with pytest.raises(ValueError, match="strip_quantizers_"):
        suggest_bits(model, batches(model), budget=0.2)
    suggest_bits(strip_quantizers_(model), batches(model), budget=0.2)
    model.bert.encoder.layer[0].output.LayerNorm.weight.data.fill_(float("inf"))
    with pytest.raises(ValueError, match="does not stay finite"):
        suggest_bits(model, batches(model), budget=0.2)


def test_adapters_are_to_be_merged_first():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny.bert(), peft.LoraConfig(target_modules=["query"]))
    with pytest.raises(ValueError, match="merge_adapters"):
        suggest_bits(model, batches(tiny.bert()), budget=0.2)


# ------------------------------------------------------------------ what people see


@pytest.fixture
def found():
    return suggest_bits(tiny.bert(), TEXT, budget=0.2)


def test_the_table_has_every_module_and_the_totals(found):
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(found.table())
    lines = [line.split() for line in console.export_text().splitlines() if line.strip()]
    rows = {line[0]: line[1:] for line in lines}
    for name, width in found.bits.items():
        row = rows[name.removeprefix("bert.")]
        assert row[:3] == [f"{found.sensitivity[name][b]:.1e}" for b in (8, 4, 2)]
        assert row[3:] == [str(width), f"{found.sizes[name][width]:,}"]
    assert lines[-2] == ["all,", "bytes", *(f"{found.uniform(b)[0]:,}" for b in (8, 4, 2)), f"{found.bytes:,}"]
    assert lines[-3][-1] == f"{found.predicted:.1e}"


def test_everything_is_json_ready(found):
    data = json.loads(json.dumps(found.to_dict()))
    assert data["bits"] == found.bits
    assert data["bytes"] == found.bytes
    assert data["predicted"] == found.predicted
    assert {
        name: {int(b): v for b, v in row.items()} for name, row in data["sensitivity"].items()
    } == found.sensitivity
    assert QuantizationSpec.from_dict(data["spec"]) == found.spec
    with pytest.raises(ValueError, match="3 bits were not measured; there are 8, 4, 2"):
        found.uniform(3)


def test_the_plot_grows_with_the_modules(found, tmp_path):
    from PIL import Image

    path = found.plot(tmp_path / "bits.png")
    assert path == tmp_path / "bits.png"
    deep = suggest_bits(tiny.bert(layers=4), TEXT, budget=0.2)
    heights = []
    for allocation in (found, deep):
        picture = Image.open(allocation.plot(tmp_path / "bits.png"))
        colors = {color for _, color in picture.convert("RGB").getcolors(maxcolors=1 << 20)}
        assert {(0x3B, 0x7D, 0xC4), (0x7F, 0xAE, 0x3F)} <= colors, "the bars of 8 and of 4 bits"
        heights.append(picture.height)
    more = len(deep.sensitivity) - len(found.sensitivity)
    assert heights[1] - heights[0] == pytest.approx(more * 0.17 * 150, abs=2)


def test_a_plot_can_be_drawn_where_nothing_moves(tmp_path):
    model = tiny.bert()
    model.classifier.weight.data.zero_()
    allocation = suggest_bits(model, TEXT, budget=0.2)
    assert set(allocation.bits.values()) == {2}
    assert allocation.predicted == 0.0
    assert allocation.plot(str(tmp_path / "bits.png")).is_file()
