# SPDX-License-Identifier: Apache-2.0
"""Which units go, how many, and what is left in their place, against references written with loops.

Scores are set by the tests; where they come from is tested elsewhere.
"""

import itertools
import math

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from hfkdq.pruning import prune
from hfkdq.pruning.criteria import ImportanceStatistics
from hfkdq.pruning.importance import collect_importance_
from hfkdq.pruning.masks import Masks, units_kept
from hfkdq.pruning.targets import WeightTarget, find_targets
from hfkdq.specs import PruningSpec

from .. import tiny
from ..families import FAMILIES


class _Given(ImportanceStatistics):
    """Scores as they are told."""

    def scores(self, i):
        return self.told[i].clone()


def _masks(targets, spec, told):
    importance = _Given(targets, spec)
    importance.told = told
    return Masks(targets, spec, importance)


def _random_scores(targets, seed=0):
    generator = torch.Generator().manual_seed(seed)
    # Of different scale, so that a global ranking differs from local ones.
    return [torch.randn(target.units, generator=generator) * (1 + i % 3) for i, target in enumerate(targets)]


def _spec(structure, sparsity=0.5, **kwargs):
    return PruningSpec(sparsity=sparsity, structure=structure, **{"plain_checkpoint": False, **kwargs})


def _gone(masks):
    return [set(mask.nonzero().flatten().tolist()) for mask in masks.pruned]


@pytest.mark.parametrize("sparsity", [0.0, 0.01, 0.37, 0.5, 0.9])
@pytest.mark.parametrize("structure", ["neuron", "weight", "block"])
def test_the_same_share_with_the_lowest_scores_goes_from_every_target(structure, sparsity):
    targets = find_targets(FAMILIES["bart"].make(), _spec(structure))
    told = _random_scores(targets)
    masks = _masks(targets, _spec(structure, sparsity), told)
    masks.grow_to(sparsity)
    for scores, gone in zip(told, _gone(masks), strict=True):
        count = len(scores) - round(len(scores) * (1 - sparsity))
        order = sorted(range(len(scores)), key=lambda u: float(scores[u]))
        assert gone == set(order[:count])


@pytest.mark.parametrize("sparsity", [0.2, 0.5, 0.97])
@pytest.mark.parametrize("structure", ["neuron", "head", "weight", "block", "layer"])
def test_a_global_ranking_is_one_sort_that_leaves_every_target_a_unit(structure, sparsity):
    model = FAMILIES["bart"].make()
    spec = _spec(structure, sparsity, ranking="global")
    targets = find_targets(model, spec)
    assert structure == "head" or len({target.units for target in targets}) > 1
    told = _random_scores(targets)
    told[0] -= 10.0  # would go wholly
    masks = _masks(targets, spec, told)
    masks.grow_to(sparsity)
    best = {(i, max(range(len(s)), key=lambda u: float(s[u]))) for i, s in enumerate(told)}
    others = [(float(s[u]), (i, u)) for i, s in enumerate(told) for u in range(len(s)) if (i, u) not in best]
    total = sum(len(scores) for scores in told)
    count = min(total - round(total * (1 - sparsity)), len(others))
    expected = {place for _, place in sorted(others)[:count]}
    assert {(i, u) for i, gone in enumerate(_gone(masks)) for u in gone} == expected
    assert min(target.units - gone for target, gone in zip(targets, masks.counts(), strict=True)) >= 1


def test_a_global_ranking_compares_scores_of_different_layers():
    model = tiny.bert()
    with torch.no_grad():
        for parameter in model.bert.encoder.layer[0].parameters():
            parameter.mul_(1e-6)
    prune(model, PruningSpec(sparsity=0.5, ranking="global"))
    zeros = [
        sum(int((p == 0).sum()) for p in layer.parameters() if p.dim() == 2) for layer in model.bert.encoder.layer
    ]
    assert zeros == [8192 - 6, 6]


@pytest.mark.parametrize("ranking", ["local", "global"])
@pytest.mark.parametrize("structure", ["neuron", "head", "weight"])
def test_masks_only_grow_however_scores_change(structure, ranking):
    spec = _spec(structure, 0.75, ranking=ranking)
    targets = find_targets(tiny.bert(), spec)
    masks = _masks(targets, spec, None)
    before = [set() for _ in targets]
    for step, sparsity in enumerate((0.25, 0.25, 0.5, 0.3, 0.75)):
        masks.importance.told = _random_scores(targets, seed=step)
        masks.grow_to(sparsity)
        for old, new in zip(before, _gone(masks), strict=True):
            assert old <= new
        before = _gone(masks)
    total = sum(target.units for target in targets)
    assert sum(masks.counts()) == total - units_kept(total, 0.75)


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 8), (1, 2)])
@pytest.mark.parametrize(
    "layer", [nn.Linear(16, 6), Conv1D(6, 16), nn.Conv2d(4, 6, 2)], ids=["linear", "conv1d", "conv"]
)
def test_every_group_of_a_row_is_whole_or_keeps_its_n_best(layer, n, m):
    spec = PruningSpec(structure="n:m", pattern=f"{n}:{m}")
    target = WeightTarget("layer", layer)
    nn.init.normal_(layer.weight)
    before = layer.weight.detach().clone()
    matrix = before.T if isinstance(layer, Conv1D) else before.flatten(1)  # 6 outputs, 16 inputs
    masks = Masks([target], spec, ImportanceStatistics([target], spec))
    costs = {}
    for row, start in itertools.product(range(6), range(0, 16, m)):
        lowest = sorted(range(start, start + m), key=lambda c: float(matrix[row, c].abs()))[: m - n]
        costs[row, start] = (sum(float(matrix[row, c].abs()) for c in lowest), {(row, c) for c in lowest})
    cheapest = sorted(costs.values(), key=lambda item: item[0])
    for share in (0.0, 0.1, 0.5, 0.83, 1.0):
        masks.grow_to(share * (1 - n / m))
        masks.apply_()
        now = layer.weight.detach()
        zero = (now.T if isinstance(layer, Conv1D) else now.flatten(1)) == 0
        expected = set().union(*(places for _, places in cheapest[: round(share * len(costs))]))
        assert set(map(tuple, zero.nonzero().tolist())) == expected
        assert torch.equal(now[now != 0], before[now != 0])
    assert (zero.view(6, -1, m).sum(dim=2) == m - n).all()


def test_groups_that_are_done_stay_as_scores_change():
    layer = nn.Linear(8, 4, bias=False)
    spec = PruningSpec(structure="n:m")
    target = WeightTarget("layer", layer)
    masks = _masks([target], spec, None)
    before = set()
    for step in range(1, 9):
        masks.importance.told = _random_scores([target], seed=step)
        masks.grow_to(0.5 * step / 8)
        counts = masks.pruned[0].view(-1, 4).sum(dim=1).tolist()
        assert sorted(counts) == [0] * (8 - step) + [2] * step
        assert before <= _gone(masks)[0]
        before = _gone(masks)[0]


def test_inputs_that_groups_do_not_divide_are_refused():
    with pytest.raises(ValueError, match=r"has 32 inputs, which groups of 5 do not divide.*exclude_modules"):
        prune(tiny.bert(), PruningSpec(structure="n:m", pattern="2:5"))


@pytest.mark.parametrize(
    "layer", [nn.Linear(10, 7), Conv1D(7, 10), nn.Conv2d(5, 7, (1, 2))], ids=["linear", "conv1d", "conv"]
)
@pytest.mark.parametrize(("rows", "columns"), [(4, 4), (3, 5), (1, 10), (7, 1), (8, 16)])
def test_blocks_go_whole_and_end_at_the_edges(layer, rows, columns):
    spec = PruningSpec(sparsity=0.5, structure="block", pattern=f"{rows}x{columns}")
    target = WeightTarget("layer", layer, spec.block)
    nn.init.normal_(layer.weight)
    matrix = layer.weight.detach().T if isinstance(layer, Conv1D) else layer.weight.detach().flatten(1)
    matrix = matrix.clone()  # 7 outputs, 10 inputs
    blocks = []
    for top, left in itertools.product(range(0, 7, rows), range(0, 10, columns)):
        places = {(r, c) for r in range(top, min(top + rows, 7)) for c in range(left, min(left + columns, 10))}
        blocks.append((sum(float(matrix[place]) ** 2 for place in places) ** 0.5, places))
    importance = ImportanceStatistics([target], spec)
    torch.testing.assert_close(importance.scores(0), torch.tensor([norm for norm, _ in blocks]))
    masks = Masks([target], spec, importance)
    masks.grow_to(0.5)
    masks.apply_()
    now = layer.weight.detach()
    zero = (now.T if isinstance(layer, Conv1D) else now.flatten(1)) == 0
    count = len(blocks) - round(len(blocks) * 0.5)
    expected = set().union(*(places for _, places in sorted(blocks, key=lambda item: item[0])[:count]))
    assert set(map(tuple, zero.nonzero().tolist())) == expected


READERS = {  # the layer that reads the units, and how many of its inputs are one
    ("bert", "neuron"): ("bert.encoder.layer.{}.output.dense", 1),
    ("bert", "head"): ("bert.encoder.layer.{}.attention.output.dense", 8),
    ("gpt2", "neuron"): ("transformer.h.{}.mlp.c_proj", 1),
    ("gpt2", "head"): ("transformer.h.{}.attn.c_proj", 8),
}


def _reads(model, name, batches):
    seen = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    handle.remove()
    return torch.cat([values.flatten(0, -2) for values in seen])


@pytest.mark.parametrize("key", READERS, ids="-".join)
def test_means_of_what_is_cut_go_into_the_bias_behind(key):
    family, structure = key
    batches = [FAMILIES[family].batch(size, seed=size) for size in (2, 5)]
    model = FAMILIES[family].make()
    spec = _spec(structure, 0.5, cut="mean", criterion="activation")
    targets = find_targets(model, spec)
    importance = ImportanceStatistics(targets, spec)
    collect_importance_(model, importance, batches)
    masks = Masks(targets, spec, importance)
    names = [READERS[key][0].format(i) for i in range(3)]
    old = [[p.detach().clone() for p in model.get_submodule(name).parameters()] for name in names]
    means = [_reads(model, name, batches).mean(dim=0) for name in names]
    biases = [bias.clone() for _, bias in old]
    done = [set() for _ in names]
    for sparsity in (0.25, 0.5):  # each unit is folded in once, when it goes
        masks.grow_to(sparsity)
        for i, gone in enumerate(_gone(masks)):
            for unit in gone - done[i]:
                for feature in range(unit * READERS[key][1], (unit + 1) * READERS[key][1]):
                    weight = old[i][0][feature] if family == "gpt2" else old[i][0][:, feature]
                    biases[i] += weight * means[i][feature]
            done[i] = gone
        for name, expected in zip(names, biases, strict=True):
            torch.testing.assert_close(model.get_submodule(name).bias.detach(), expected, rtol=1e-4, atol=1e-5)
    masks.apply_()
    assert all(len(gone) == targets[0].units // 2 for gone in done)


@pytest.mark.parametrize("key", READERS, ids="-".join)
def test_means_are_nearer_to_what_the_layer_said_than_zeros(key):
    family, structure = key
    batches = [FAMILIES[family].batch(4, seed=1)]
    name = READERS[key][0].format(0)
    given = _reads(FAMILIES[family].make(), name, batches)
    with torch.no_grad():
        expected = FAMILIES[family].make().get_submodule(name)(given)
        errors = {}
        for cut in ("mean", "mask"):
            model = FAMILIES[family].make()
            spec = _spec(structure, 0.5, cut=cut, criterion="activation")
            targets = find_targets(model, spec)
            importance = ImportanceStatistics(targets, spec)
            collect_importance_(model, importance, batches)
            masks = Masks(targets, spec, importance)
            masks.grow_to(0.5)
            masks.apply_()
            errors[cut] = (model.get_submodule(name)(given) - expected).square().sum(dim=1).mean()
    assert errors["mean"] < errors["mask"]
    # The mean of a square is the square of the mean and the variance; the first is what the bias takes away.
    mean = FAMILIES[family].make().get_submodule(name)
    gone = ~(model.get_submodule(name).weight != 0).any(dim=1 if family == "gpt2" else 0)
    weight = mean.weight.detach() if family == "gpt2" else mean.weight.detach().T
    taken = (given.mean(dim=0)[gone] @ weight[gone]).square().sum()
    torch.testing.assert_close(errors["mask"] - errors["mean"], taken, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("structure", ["neuron", "head"])
def test_a_unit_that_never_changes_goes_without_a_trace_if_its_mean_stays(structure):
    model = tiny.bert(layers=1)
    layer = model.bert.encoder.layer[0]
    with torch.no_grad():
        if structure == "neuron":
            layer.intermediate.dense.weight[3] = 0.0
            layer.intermediate.dense.bias[3] = 1.5
        else:  # values that are the same everywhere
            layer.attention.self.value.weight[8:16] = 0.0
            layer.attention.self.value.bias[8:16] = torch.randn(8)
        batch = tiny.batch(model)
        before = model(**batch).logits
        targets = find_targets(model, _spec(structure, cut="mean"))
        spec = _spec(structure, 1 / targets[0].units, cut="mean")
        importance = _Given(targets, spec)
        importance.told = [torch.arange(targets[0].units).float()]
        importance.told[0][3 if structure == "neuron" else 1] = -1.0
        collect_importance_(model, importance, [batch])
        masks = Masks(targets, spec, importance)
        masks.grow_to(spec.sparsity)
        masks.apply_()
        torch.testing.assert_close(model(**batch).logits, before, rtol=1e-4, atol=1e-5)
        assert not (
            layer.output.dense.weight[:, 3] if structure == "neuron" else layer.attention.output.dense.weight[:, 8:16]
        ).any()


def test_means_of_a_model_in_bfloat16_are_summed_in_float32():
    spec = _spec("neuron", 0.5, cut="mean", criterion="activation")
    biases = []
    for dtype in (torch.float32, torch.bfloat16):
        model = FAMILIES["bert"].make()
        model.load_state_dict(model.to(torch.bfloat16).state_dict())
        model = model.to(dtype)
        targets = find_targets(model, spec)
        importance = _Given(targets, spec)
        importance.told = _random_scores(targets)
        for i in range(3):
            importance.tensors[f"{i}.bert.encoder.layer.{i}.output.dense.mean"] = torch.linspace(-3, 3, 48)
            importance.tensors[f"{i}.bert.encoder.layer.{i}.output.dense.mean.count"] = torch.tensor(7.0)
        masks = Masks(targets, spec, importance)
        masks.grow_to(0.5)
        biases.append(model.bert.encoder.layer[0].output.dense.bias.detach())
    assert biases[1].dtype == torch.bfloat16
    torch.testing.assert_close(biases[1].float(), biases[0].to(torch.bfloat16).float(), rtol=0, atol=0)


@pytest.mark.parametrize("make", [tiny.llama, tiny.t5])
def test_means_need_a_bias_that_takes_them(make):
    with pytest.raises(ValueError, match=r"no linear layer with a bias that could take the mean.*cut='remove'"):
        prune(make(), _spec("neuron", cut="mean"), [])


@pytest.mark.parametrize(("structure", "family"), [("neuron", "bert"), ("head", "gpt2"), ("channel", "resnet")])
def test_cut_mask_zeroes_and_keeps_shapes(structure, family):
    model = FAMILIES[family].make()
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    prune(model, _spec(structure, cut="mask"))
    assert {name: value.shape for name, value in model.state_dict().items()} == shapes
    removed = prune(FAMILIES[family].make(), _spec(structure))
    assert {name: value.shape for name, value in removed.state_dict().items()} != shapes
    torch.testing.assert_close(
        FAMILIES[family].outputs(model), FAMILIES[family].outputs(removed), rtol=1e-4, atol=1e-4
    )


def test_decay_fades_what_is_pruned_and_leaves_the_rest():
    model = tiny.bert(layers=1)
    spec = _spec("neuron", cut="decay")
    targets = find_targets(model, spec)
    masks = _masks(targets, spec, _random_scores(targets))
    masks.grow_to(0.5)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    masks.apply_(fade=0.8)
    masks.apply_(fade=0.5)
    gone = masks.pruned[0]
    for name, p in model.named_parameters():
        expected = before[name].clone()
        if ".intermediate.dense." in name:
            expected[gone] *= 0.4
        elif name.endswith("layer.0.output.dense.weight"):
            expected[:, gone] *= 0.4
        torch.testing.assert_close(p.detach(), expected)
    masks.apply_()
    assert not model.bert.encoder.layer[0].intermediate.dense.weight[gone].any()


@pytest.mark.parametrize("ranking", ["local", "global"])
def test_the_layer_that_others_need_stays(ranking):
    model = FAMILIES["t5"].make()  # the first layer of each stack holds the position biases of all
    spec = _spec("layer", 0.4, ranking=ranking)
    targets = find_targets(model, spec)
    assert [target.protected for target in targets] == [(0,), (0,)]
    told = [torch.arange(float(target.units)) - 10 for target in targets]  # the first ones score least
    masks = _masks(targets, spec, told)
    masks.grow_to(spec.sparsity)
    assert _gone(masks) == [{1}, {1}]


def test_a_stack_may_come_down_to_the_layer_that_cannot_go():
    model = FAMILIES["t5"].make()
    prune(model, PruningSpec(sparsity=0.6, structure="layer"))  # of 2 and 3 layers 1 each is left
    assert (len(model.encoder.block), len(model.decoder.block)) == (1, 1)
    assert FAMILIES["t5"].outputs(model).isfinite().all()
    with pytest.raises(ValueError, match=r"would leave 0 of the 2 units .*of which some cannot go"):
        prune(FAMILIES["t5"].make(), PruningSpec(sparsity=0.8, structure="layer"))


@pytest.mark.parametrize(
    ("structure", "patterns", "changed"),
    [
        ("neuron", {"target_modules": ["layer.1"]}, {1}),
        ("neuron", {"target_modules": r".*layer\.[02]\.intermediate\.dense"}, {0, 2}),
        ("neuron", {"exclude_modules": ["layer.0", "layer.2.output.dense"]}, {1}),
        ("head", {"target_modules": r".*layer\.2\.attention\.self\.query"}, {2}),
        ("head", {"exclude_modules": r".*layer\.1\..*"}, {0, 2}),
    ],
)
def test_patterns_choose_the_groups_by_any_of_their_layers(structure, patterns, changed):
    model = FAMILIES["bert"].make()
    prune(model, _spec(structure, **patterns))
    for i, layer in enumerate(model.bert.encoder.layer):
        rows = len(layer.intermediate.dense.weight) if structure == "neuron" else len(layer.attention.self.key.weight)
        assert rows == {"neuron": (48, 24), "head": (32, 16)}[structure][i in changed]
    assert FAMILIES["bert"].outputs(model).isfinite().all()


def test_patterns_that_match_no_group_are_refused_by_name():
    with pytest.raises(ValueError, match=r"matches no group of units \(neuron\).*bert\.encoder\.layer\.0"):
        prune(FAMILIES["bert"].make(), _spec("neuron", target_modules=["nowhere"]))


FORMULAS = {
    "cubic": lambda s, t: s * (1 - (1 - t) ** 3),
    "exponential": lambda s, t: 1 - (1 - s) ** t,
    "linear": lambda s, t: s * t,
}


@pytest.mark.parametrize(("begin", "end"), [(0.0, 0.7), (0.0, 1.0), (0.1, 0.3), (0.25, 0.95)])
@pytest.mark.parametrize("rounds", [None, 1, 3, 8])
@pytest.mark.parametrize("schedule", FORMULAS)
def test_the_sparsity_follows_the_formula_of_its_schedule(schedule, rounds, begin, end):
    spec = PruningSpec(sparsity=0.85, schedule=schedule, rounds=rounds, begin=begin, end=end)
    steps = [step / 240 for step in range(241)]
    for progress in steps:
        t = (progress - begin) / (end - begin)
        if t < -1e-12:
            expected = 0.0
        elif t > 1 - 1e-12:
            expected = 0.85
        else:
            if rounds is not None and t > 1e-9:  # round r lasts until r / rounds, and has what is due there
                t = next(r / rounds for r in range(1, rounds + 1) if t < r / rounds + 1e-9)
            expected = FORMULAS[schedule](0.85, max(t, 0.0))
        assert spec.sparsity_at(progress) == pytest.approx(expected, abs=1e-12)
    found = [spec.sparsity_at(progress) for progress in steps]
    assert found == sorted(found)
    assert spec.sparsity_at(end) == 0.85
    assert spec.sparsity_at(1.0) == 0.85
    if begin > 0:
        assert spec.sparsity_at(math.nextafter(begin, 0.0)) == 0.0
    if rounds is not None:
        assert len({round(value, 12) for value in found} - {0.0}) == rounds


def test_the_teacher_is_asked_in_8_rounds_by_default():
    spec = PruningSpec(sparsity=0.8, structure="neuron", criterion="teacher", schedule="linear", end=1.0)
    assert len({spec.sparsity_at(step / 100) for step in range(1, 101)}) == 8
    assert PruningSpec(sparsity=0.8, schedule="linear", end=1.0).sparsity_at(0.5) == pytest.approx(0.4)


@pytest.mark.parametrize("schedule", FORMULAS)
def test_the_end_of_a_schedule_is_exact(schedule):
    for sparsity in (0.1, 1 / 3, 0.7, 0.999):
        spec = PruningSpec(sparsity=sparsity, schedule=schedule, begin=0.1, end=0.3)
        assert spec.sparsity_at(0.3) == sparsity


@pytest.mark.parametrize(
    ("units", "sparsity", "multiple", "kept"),
    [(64, 0.3, 8, 48), (64, 0.3, 1, 45), (28, 0.3, 8, 16), (28, 0.1, 8, 24), (64, 0.99, 8, 8), (20, 0.05, 8, 16), (6, 0.5, 8, 6), (64, 0.0, 8, 64)],
)  # fmt: skip
def test_so_many_stay_that_kernels_take_whole_blocks(units, sparsity, multiple, kept):
    assert units_kept(units, sparsity, multiple) == kept


@pytest.mark.parametrize(
    ("make", "structure"),
    [(tiny.resnet, "channel"), (tiny.bert, "neuron"), (tiny.bert, "hidden")],
    ids=["channel", "neuron", "hidden"],
)
def test_what_stays_is_a_multiple(make, structure):
    model = make()
    sizes = {name: value.shape for name, value in model.named_parameters()}
    pruned = prune(model, _spec(structure, 0.3, multiple_of=4))
    changed = [
        (before, after)
        for name, value in pruned.named_parameters()
        for before, after in zip(sizes[name], value.shape, strict=True)
        if before != after
    ]
    assert changed
    assert all(after % 4 == 0 for _, after in changed)


def test_a_multiple_that_keeps_all_is_refused():
    with pytest.raises(
        ValueError, match=r"sparsity=0\.1 removes nothing, as multiple_of=64 keeps all units of every module"
    ):
        prune(tiny.bert(), _spec("neuron", 0.1, multiple_of=64))
