# SPDX-License-Identifier: Apache-2.0
"""Scores of units against references written with loops, and what gathering importance leaves as it was.

The references name tensors and positions of each model themselves; they know nothing of targets.
"""

import copy

import pytest
import torch
from torch import nn
from transformers import DataCollatorWithPadding, Trainer, TrainerCallback
from transformers.modeling_outputs import SequenceClassifierOutput

from hfkdq.pruning import PruningCallback, prune, share_layers
from hfkdq.pruning.criteria import DECAY, ImportanceStatistics, check_trained
from hfkdq.pruning.importance import collect_importance_
from hfkdq.pruning.targets import LayerTarget, WeightTarget, find_targets
from hfkdq.specs import PruningSpec

from .. import tiny
from ..families import FAMILIES

ALL = slice(None)


def _size(start, length):
    return slice(start * length, (start + 1) * length)


# What belongs to unit u of the first target: pairs of a parameter's name and where in it.
UNITS = {
    ("bert", "neuron"): lambda u: [
        ("bert.encoder.layer.0.intermediate.dense.weight", (u,)),
        ("bert.encoder.layer.0.intermediate.dense.bias", (u,)),
        ("bert.encoder.layer.0.output.dense.weight", (ALL, u)),
    ],
    ("bert", "head"): lambda u: [
        *[(f"bert.encoder.layer.0.attention.self.{n}.weight", (_size(u, 8),)) for n in ("query", "key", "value")],
        *[(f"bert.encoder.layer.0.attention.self.{n}.bias", (_size(u, 8),)) for n in ("query", "key", "value")],
        ("bert.encoder.layer.0.attention.output.dense.weight", (ALL, _size(u, 8))),
    ],
    ("gpt2", "neuron"): lambda u: [
        ("transformer.h.0.mlp.c_fc.weight", (ALL, u)),
        ("transformer.h.0.mlp.c_fc.bias", (u,)),
        ("transformer.h.0.mlp.c_proj.weight", (u,)),
    ],
    ("gpt2", "head"): lambda u: [  # queries, keys and values follow one another, with all heads in each
        *[("transformer.h.0.attn.c_attn.weight", (ALL, _size(4 * block + u, 8))) for block in range(3)],
        *[("transformer.h.0.attn.c_attn.bias", (_size(4 * block + u, 8),)) for block in range(3)],
        ("transformer.h.0.attn.c_proj.weight", (_size(u, 8),)),
    ],
    ("llama", "neuron"): lambda u: [
        ("model.layers.0.mlp.gate_proj.weight", (u,)),
        ("model.layers.0.mlp.up_proj.weight", (u,)),
        ("model.layers.0.mlp.down_proj.weight", (ALL, u)),
    ],
    ("llama", "head"): lambda u: [  # two queries share a key
        ("model.layers.0.self_attn.q_proj.weight", (_size(u, 16),)),
        ("model.layers.0.self_attn.k_proj.weight", (_size(u, 8),)),
        ("model.layers.0.self_attn.v_proj.weight", (_size(u, 8),)),
        ("model.layers.0.self_attn.o_proj.weight", (ALL, _size(u, 16))),
    ],
    ("deberta", "head"): lambda u: [  # every head has its query, key and value in a row
        ("deberta.encoder.layer.0.attention.self.in_proj.weight", (_size(u, 24),)),
        *[(f"deberta.encoder.layer.0.attention.self.{n}", (_size(u, 8),)) for n in ("q_bias", "v_bias")],
        *[
            (f"deberta.encoder.layer.0.attention.self.{n}", (_size(u, 8),))
            for n in ("pos_proj.weight", "pos_q_proj.weight", "pos_q_proj.bias")
        ],
        ("deberta.encoder.layer.0.attention.output.dense.weight", (ALL, _size(u, 8))),
    ],
    ("resnet", "channel"): lambda u: [  # running statistics are no parameters and do not count
        ("resnet.encoder.stages.0.layers.0.layer.0.convolution.weight", (u,)),
        ("resnet.encoder.stages.0.layers.0.layer.0.normalization.weight", (u,)),
        ("resnet.encoder.stages.0.layers.0.layer.0.normalization.bias", (u,)),
        ("resnet.encoder.stages.0.layers.0.layer.1.convolution.weight", (ALL, u)),
    ],
    ("bert", "layer"): lambda u: [
        (name, ()) for name, _ in FAMILIES["bert"].make().named_parameters() if f".layer.{u}." in name
    ],
}  # fmt: skip
READERS = {  # the module that reads the units of the first target
    ("bert", "neuron"): "bert.encoder.layer.0.output.dense",
    ("bert", "head"): "bert.encoder.layer.0.attention.output.dense",
    ("gpt2", "neuron"): "transformer.h.0.mlp.c_proj",
    ("gpt2", "head"): "transformer.h.0.attn.c_proj",
    ("llama", "neuron"): "model.layers.0.mlp.down_proj",
    ("llama", "head"): "model.layers.0.self_attn.o_proj",
    ("resnet", "channel"): "resnet.encoder.stages.0.layers.0.layer.1.convolution",
}
WEIGHTS = {
    "bert": "bert.encoder.layer.0.attention.self.key",
    "gpt2": "transformer.h.0.attn.c_attn",
    "llama": "model.layers.0.mlp.down_proj",
    "resnet": "resnet.encoder.stages.0.layers.0.layer.1.convolution",
    "convnext": "convnext.encoder.stages.0.layers.0.dwconv",
}


def _batches(family, labels=True):
    """Batches of two sizes, so that a mean over batches is not one over examples."""
    found = []
    for size, seed in ((2, 1), (3, 2)):
        batch = FAMILIES[family].batch(size, seed)
        if labels:
            causal = family in ("gpt2", "llama")
            batch["labels"] = batch["input_ids"].clone() if causal else torch.arange(size) % 3
        found.append(batch)
    return found


def _importance(model, spec, batches=None, teacher=None):
    importance = ImportanceStatistics(find_targets(model, spec), spec)
    if batches is not None:
        collect_importance_(model, importance, batches, teacher)
    return importance


def _scores(model, spec, batches=None, teacher=None):
    """Scores of all targets, one after the other."""
    importance = _importance(model, spec, batches, teacher)
    return torch.cat([importance.scores(i) for i in range(len(importance.targets))])


def _spec(structure, criterion, **kwargs):
    return PruningSpec(sparsity=0.5, structure=structure, criterion=criterion, plain_checkpoint=False, **kwargs)


def _gradients(model, batches, loss=lambda model, batch: model(**batch).loss):
    found = []
    for batch in batches:
        model.zero_grad()
        loss(model, batch).backward()
        found.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    model.zero_grad()
    return found


def _naive(model, key, criterion, batches, loss=lambda model, batch: model(**batch).loss):
    """The score of every unit of the first target, by its formula."""
    weights = {name: p.detach().double() for name, p in model.named_parameters()}
    gradients = _gradients(model, batches, loss) if criterion != "magnitude" else []
    units = len(_importance(model, _spec(key[1], "magnitude")).scores(0))
    scores = []
    for u in range(units):
        entries = UNITS[key](u)
        if criterion == "magnitude":
            scores.append(sum(float(weights[n][at].square().sum()) for n, at in entries) ** 0.5)
            continue
        values = []
        for gradient in gradients:
            products = [(weights[n] * gradient[n])[at] for n, at in entries]
            if criterion == "taylor":
                values.append(abs(sum(float(product.sum()) for product in products)))
            else:
                values.append(sum(float(product.square().sum()) for product in products))
        scores.append(sum(values) / len(values))
    return torch.tensor(scores)


def _inputs_of(model, name, batches):
    """All that module `name` reads, as `(positions, features)`."""
    seen = []
    module = model.get_submodule(name)
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    handle.remove()
    if isinstance(module, nn.Conv2d):
        seen = [values.permute(0, 2, 3, 1) for values in seen]
    return torch.cat([values.reshape(-1, values.shape[-1]) for values in seen]).double()


@pytest.mark.parametrize("criterion", ["magnitude", "taylor", "fisher"])
@pytest.mark.parametrize("key", UNITS, ids="-".join)
def test_units_score_by_the_formula_over_all_that_belongs_to_them(key, criterion):
    model, batches = FAMILIES[key[0]].make(), _batches(key[0])
    found = _importance(model, _spec(key[1], criterion), None if criterion == "magnitude" else batches).scores(0)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, _naive(model, key, criterion, batches), rtol=2e-3, atol=1e-8)


@pytest.mark.parametrize("key", READERS, ids="-".join)
def test_the_activation_of_units_is_summed_over_the_weights_that_read_them(key):
    model, batches = FAMILIES[key[0]].make(), _batches(key[0], labels=False)
    seen = _inputs_of(model, READERS[key], batches)
    weight = model.get_submodule(READERS[key]).weight.detach().double().abs()
    found = _importance(model, _spec(key[1], "activation"), batches).scores(0)
    expected = torch.zeros(len(found), dtype=torch.float64)
    per_unit = seen.shape[1] // len(found)
    for feature in range(seen.shape[1]):
        norm = float(seen[:, feature].square().mean()) ** 0.5
        reads = weight[feature] if key[0] == "gpt2" else weight[:, feature]
        expected[feature // per_unit] += float(reads.sum()) * norm
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("criterion", ["magnitude", "activation", "taylor", "fisher"])
@pytest.mark.parametrize("family", WEIGHTS)
def test_single_weights_score_by_the_formula_in_rows_of_outputs(family, criterion):
    model, batches, name = FAMILIES[family].make(), _batches(family), WEIGHTS[family]
    found = _scores(
        model, _spec("weight", criterion, target_modules=[name]), None if criterion == "magnitude" else batches
    )
    weight = model.get_submodule(name).weight.detach()
    if criterion == "magnitude":
        expected = weight.abs()
    elif criterion == "activation":
        norms = [float(x.square().mean()) ** 0.5 for x in _inputs_of(model, name, batches).T]
        expected = weight.abs().clone()
        for feature, norm in enumerate(norms):
            if family == "gpt2":
                expected[feature] *= norm
            elif family == "convnext":  # every output of a depthwise convolution reads the input of its own number
                expected[feature, 0] *= norm
            else:
                expected[:, feature] *= norm
    else:
        power = 1 if criterion == "taylor" else 2
        products = [(weight * found[f"{name}.weight"]).abs() ** power for found in _gradients(model, batches)]
        expected = sum(products) / len(products)
    expected = (expected.T if family == "gpt2" else expected).reshape(-1)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_an_output_of_a_grouped_convolution_reads_the_inputs_of_its_group(groups):
    conv = nn.Conv1d(8, 12, 3, groups=groups)
    spec = PruningSpec(sparsity=0.5, criterion="activation")
    importance = ImportanceStatistics([WeightTarget("conv", conv)], spec)
    values = torch.randn(2, 8, 5)
    with importance.watching():
        conv.eval()(values)
    norms = [float(values[:, c].square().mean()) ** 0.5 for c in range(8)]
    expected = conv.weight.detach().abs().clone()
    for output in range(12):
        group = output // (12 // groups)
        for place in range(8 // groups):
            expected[output, place] *= norms[group * (8 // groups) + place]
    torch.testing.assert_close(importance.scores(0), expected.flatten())


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_the_influence_of_a_layer_is_one_minus_the_cosine_of_what_goes_in_and_out(family):
    model, batches = FAMILIES[family].make(), _batches(family, labels=False)
    for batch in batches:  # the embedding of padding is zero, and has no direction
        batch["input_ids"].clamp_(min=4)
    cosines = [[], [], []]
    last = model.model.layers[-1] if family == "llama" else None
    ends = []
    handle = last and last.register_forward_hook(
        lambda _, args, out: ends.append(out if torch.is_tensor(out) else out[0])
    )
    with torch.no_grad():
        for batch in batches:
            states = list(model(**batch, output_hidden_states=True).hidden_states)
            if handle:  # the last of these has been through the final norm
                states[-1] = ends[-1]
            for place in range(3):
                for before, after in zip(states[place].flatten(0, 1), states[place + 1].flatten(0, 1), strict=True):
                    cosines[place].append(float(before @ after / (before.norm() * after.norm())))
    if handle:
        handle.remove()
    expected = torch.tensor([1 - sum(values) / len(values) for values in cosines])
    found = _scores(model, _spec("layer", "activation"), batches)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)


def test_random_is_seeded_and_its_cuts_nest_as_the_sparsity_grows():
    model = tiny.bert()
    first, same, other = (_scores(model, _spec("neuron", "random", seed=seed)) for seed in (3, 3, 4))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    assert not torch.equal(first[:64], first[64:])  # layers draw for themselves
    gone = torch.zeros(0, dtype=torch.long)
    for sparsity in (0.2, 0.4, 0.8):
        pruned = prune(tiny.bert(), PruningSpec(sparsity=sparsity, criterion="random", target_modules=["query"]))
        zero = (pruned.bert.encoder.layer[0].attention.self.query.weight.flatten() == 0).nonzero().flatten()
        assert len(zero) == round(sparsity * 1024)
        assert torch.isin(gone, zero).all()
        gone = zero


class _FromSteps(TrainerCallback):
    """Movement from what the optimizer did: SGD moves a weight by `-lr * g`, so `-w * g` is `w * change / lr`."""

    def __init__(self):
        self.total, self.steps = {}, 0

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.before = {name: p.detach().clone() for name, p in model.named_parameters()}

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.steps += 1
        for name, p in model.named_parameters():
            moved = self.before[name].double() * (p.detach() - self.before[name]).double() / args.learning_rate
            self.total[name] = self.total.get(name, 0.0) + moved


class _Spy(PruningCallback):
    """Keeps the scores after every step."""

    def on_optimizer_step(self, *args, **kwargs):
        importance = self._progress.importance
        self.seen = importance.scores(0).clone() if importance.is_complete() else None
        super().on_optimizer_step(*args, **kwargs)


@pytest.mark.parametrize("structure", ["neuron", "weight"])
def test_movement_adds_up_what_the_optimizer_moved_away_from_zero(structure, training_arguments):
    kwargs = {"target_modules": ["bert.encoder.layer.0.intermediate.dense"]} if structure == "weight" else {}
    spec = PruningSpec(sparsity=0.5, structure=structure, criterion="movement", begin=0.9, end=1.0, **kwargs)
    arguments = training_arguments(
        max_steps=6, optim="sgd", learning_rate=0.5, lr_scheduler_type="constant", max_grad_norm=0.3,
        gradient_accumulation_steps=2, per_device_train_batch_size=4,
    )  # fmt: skip
    model, steps, spy = tiny.bert(), _FromSteps(), _Spy(spec)
    data = tiny.text_dataset(32)
    collator = DataCollatorWithPadding(tiny.tokenizer())
    Trainer(model, arguments, data_collator=collator, train_dataset=data, callbacks=[steps, spy]).train()
    assert steps.steps == 6
    expected = []
    if structure == "weight":
        expected = steps.total["bert.encoder.layer.0.intermediate.dense.weight"].flatten()
    else:
        for u in range(64):
            expected.append(sum(float(steps.total[n][at].sum()) for n, at in UNITS["bert", "neuron"](u)))
        expected = torch.tensor(expected, dtype=torch.float64)
    assert expected.min() < 0 < expected.max()
    torch.testing.assert_close(spy.seen.double(), expected, rtol=2e-2, atol=float(expected.abs().max()) * 1e-3)


def test_evidence_of_a_training_fades_but_movement_does_not():
    linear = nn.Linear(2, 1, bias=False)
    linear.weight.data = torch.tensor([[1.0, 2.0]])
    targets = [WeightTarget("linear", linear)]
    found = {}
    for criterion in ("taylor", "fisher", "movement"):
        importance = ImportanceStatistics(targets, PruningSpec(sparsity=0.5, criterion=criterion), decay=DECAY)
        for gradient in ([[1.0, 1.0]], [[-3.0, 1.0]]):
            importance.observe_gradients({id(linear.weight): torch.tensor(gradient)})
        found[criterion] = importance.scores(0)
    torch.testing.assert_close(found["taylor"], torch.tensor([0.99 * 1 + 3, 0.99 * 2 + 2]) / 1.99)
    torch.testing.assert_close(found["fisher"], torch.tensor([0.99 * 1 + 9, 0.99 * 4 + 4]) / 1.99)
    torch.testing.assert_close(found["movement"], torch.tensor([2.0, -4.0]))


def _sure(model):
    """The model with nearly all probability on what it says already."""
    sure = copy.deepcopy(model)
    last = {
        "bert": lambda: [sure.classifier.weight, sure.classifier.bias],
        "gpt2": lambda: [sure.transformer.ln_f.weight, sure.transformer.ln_f.bias],
        "t5": lambda: [sure.decoder.final_layer_norm.weight],
    }[model.config.model_type] if not hasattr(sure, "qa_outputs") else lambda: [*sure.qa_outputs.parameters()]  # fmt: skip
    for parameter in last():
        parameter.data *= 1e5
    return sure


def test_a_teacher_that_is_certain_is_taylor_with_its_labels():
    model, batches = FAMILIES["bert"].make(), _batches("bert", labels=False)
    teacher = _sure(FAMILIES["bert"].make(seed=5))
    found = _scores(model, _spec("neuron", "teacher"), batches, teacher)
    with torch.no_grad():
        said = [batch | {"labels": teacher(**batch).logits.argmax(-1)} for batch in batches]
    torch.testing.assert_close(found, _scores(model, _spec("neuron", "taylor"), said), rtol=1e-4, atol=1e-8)
    wrong = [batch | {"labels": (batch["labels"] + 1) % 3} for batch in said]
    against = _scores(model, _spec("neuron", "taylor"), wrong)
    assert not torch.allclose(found, against, rtol=0.2)
    # Labels that contradict the teacher do not count.
    assert torch.equal(found, _scores(model, _spec("neuron", "teacher"), wrong, teacher))


def test_predictions_for_tokens_count_where_there_is_no_padding():
    model = tiny.bert_tokens()
    teacher, batch = _sure(tiny.bert_tokens(seed=3)), tiny.batch(model)
    found = _scores(model, _spec("neuron", "teacher"), [batch], teacher)
    with torch.no_grad():
        labels = teacher(**batch).logits.argmax(-1)
    labels = labels.masked_fill(batch["attention_mask"] == 0, -100)
    expected = _scores(model, _spec("neuron", "taylor"), [batch | {"labels": labels}])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-8)


def test_next_tokens_are_drawn_for_every_position():
    model, (batch, _) = FAMILIES["gpt2"].make(), _batches("gpt2", labels=False)
    batch["attention_mask"][:] = 1
    teacher = _sure(FAMILIES["gpt2"].make(seed=5))
    with torch.no_grad():
        labels = teacher(**batch).logits.argmax(-1)

    def loss(model, batch):
        return nn.functional.cross_entropy(model(**batch).logits.flatten(0, 1), labels.flatten())

    found = _importance(model, _spec("neuron", "teacher"), [batch], teacher).scores(0)
    torch.testing.assert_close(found, _naive(model, ("gpt2", "neuron"), "taylor", [batch], loss), rtol=2e-3, atol=1e-8)


def test_what_a_decoder_says_is_masked_by_what_the_decoder_reads():
    model, batch = FAMILIES["t5"].make(), FAMILIES["t5"].batch()
    batch["decoder_input_ids"] = torch.randint(4, 60, (2, 10))  # as long as what the encoder reads
    mask = torch.ones(2, 10, dtype=torch.long)
    mask[0, 4:] = 0
    teacher = _sure(FAMILIES["t5"].make(seed=5))
    with torch.no_grad():
        labels = teacher(**batch, decoder_attention_mask=mask).logits.argmax(-1).masked_fill(mask == 0, -100)
    batch["decoder_attention_mask"] = mask
    found = _scores(model, _spec("neuron", "teacher"), [batch], teacher)
    expected = _scores(model, _spec("neuron", "taylor"), [batch | {"labels": labels}])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-8)


def test_both_ends_of_an_answer_are_drawn():
    model, batch = tiny.bert_qa(), tiny.batch(tiny.bert_qa())
    teacher = _sure(tiny.bert_qa(seed=3))
    with torch.no_grad():
        said = teacher(**batch)
    ends = {"start_positions": said.start_logits.argmax(-1), "end_positions": said.end_logits.argmax(-1)}
    found = _scores(model, _spec("neuron", "teacher"), [batch], teacher)
    # Transformers takes the mean of the two losses, this criterion their sum.
    expected = 2 * _scores(model, _spec("neuron", "taylor"), [batch | ends])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-8)


def test_classes_and_boxes_of_detectors_both_count():
    model = tiny.yolos()
    batch = {"pixel_values": torch.randn(2, 3, 16, 16)}

    def scores(*silent):
        changed = copy.deepcopy(model)
        for head in silent:
            for parameter in getattr(changed, head).layers[-1].parameters():
                parameter.data.zero_()
        return _scores(changed, _spec("neuron", "teacher"), [batch])

    assert (scores("class_labels_classifier") > 0).all()  # of boxes alone
    assert (scores("bbox_predictor") > 0).all()  # of classes alone
    assert (scores("class_labels_classifier", "bbox_predictor") == 0).all()


def test_several_labels_at_once_are_drawn_one_by_one():
    model = tiny.bert(problem_type="multi_label_classification")
    teacher, batch = _sure(tiny.bert(seed=3, problem_type="multi_label_classification")), tiny.batch(model)
    with torch.no_grad():
        labels = (teacher(**batch).logits > 0).float()
    assert 0 < labels.sum() < labels.numel()
    assert (labels.sum(dim=1) != 1).any()
    found = _scores(model, _spec("neuron", "teacher"), [batch], teacher)
    expected = _scores(model, _spec("neuron", "taylor"), [batch | {"labels": labels}])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("settings", [{"labels": 1}, {"labels": 3, "problem_type": "regression"}])
def test_numbers_are_drawn_around_those_of_the_teacher(settings):
    model = tiny.bert(layers=1, **settings)
    batch = tiny.batch(model, size=1)
    outputs = settings["labels"]
    found = _scores(model, _spec("neuron", "teacher"), [batch] * 200)
    # With noise e the gradient is -e J; for one output the mean of |w * J * e| is |w * J| * sqrt(2 / pi).
    jacobians = _gradients(model, range(outputs), lambda m, i: m(**batch).logits[0, i])
    along = torch.stack([
        torch.stack([
            sum((dict(model.named_parameters())[n].detach() * j[n])[at].sum() for n, at in UNITS["bert", "neuron"](u))
            for u in range(64)
        ])
        for j in jacobians
    ])  # fmt: skip
    expected = along.square().sum(dim=0).sqrt() * (2 / torch.pi) ** 0.5
    torch.testing.assert_close(found, expected, rtol=0.2, atol=float(expected.max()) * 0.02)


def test_drawn_labels_have_the_mean_over_what_the_teacher_says():
    model, teacher = tiny.bert(layers=1), tiny.bert(seed=4, layers=1)
    batch = tiny.batch(model, size=1)
    with torch.no_grad():
        shares = teacher(**batch).logits.softmax(-1)[0]
    assert shares.max() < 0.9
    by_label = [_naive(model, ("bert", "neuron"), "taylor", [batch | {"labels": torch.tensor([y])}]) for y in range(3)]
    expected = sum(share * scores for share, scores in zip(shares, by_label, strict=True))
    found = _scores(model, _spec("neuron", "teacher"), [batch] * 250, teacher)
    torch.testing.assert_close(found, expected, rtol=0.15, atol=float(expected.max()) * 0.02)
    uniform = sum(by_label) / 3
    assert (found - expected).norm() < 0.3 * (uniform - expected).norm()


def test_a_model_is_its_own_teacher_and_the_seed_decides_the_draws():
    model, batches = FAMILIES["bert"].make(), _batches("bert", labels=False)
    first, same, other = (_scores(model, _spec("neuron", "teacher", seed=seed), batches) for seed in (1, 1, 2))
    assert torch.equal(first, same)
    assert not torch.allclose(first, other)
    assert torch.equal(first, _scores(model, _spec("neuron", "teacher", seed=1), batches, copy.deepcopy(model)))
    assert (first > 0).all()


DEAD = 5


def _with_dead_neuron():
    """A model with one neuron of large weights that is always 0, as its bias says."""
    model = tiny.bert(layers=1)
    layer = model.bert.encoder.layer[0]
    with torch.no_grad():
        layer.intermediate.dense.bias[DEAD] = -1e4
        layer.output.dense.weight[:, DEAD] *= 10
    return model


@pytest.mark.parametrize("criterion", ["activation", "taylor", "fisher", "teacher"])
def test_a_neuron_that_does_nothing_goes_first_if_data_are_looked_at(criterion):
    model = _with_dead_neuron()
    batch = tiny.batch(model) | {"labels": torch.tensor([0, 1, 2, 0])}
    scores = _scores(model, _spec("neuron", criterion), [batch])
    assert int(scores.argmin()) == DEAD
    assert float(scores[DEAD]) == 0.0
    assert int(_scores(model, _spec("neuron", "magnitude")).argmax()) == DEAD
    with torch.no_grad():
        before = model(**batch).logits
        pruned = prune(model, PruningSpec(sparsity=1 / 64, structure="neuron", criterion=criterion), [batch])
        torch.testing.assert_close(pruned(**batch).logits, before)


def test_a_head_whose_values_are_zero_goes_first_by_activation():
    model = tiny.bert(layers=1)
    attention = model.bert.encoder.layer[0].attention
    with torch.no_grad():
        attention.self.value.weight[8:16] = 0
        attention.self.value.bias[8:16] = 0
        attention.output.dense.weight[:, 8:16] *= 10
    assert int(_scores(model, _spec("head", "activation"), [tiny.batch(model)]).argmin()) == 1
    assert int(_scores(model, _spec("head", "magnitude")).argmax()) == 1


CRITERIA = ["activation", "taylor", "fisher", "teacher"]


@pytest.mark.parametrize("criterion", CRITERIA)
def test_gathering_leaves_everything_as_it_was(criterion):
    model, teacher = tiny.bert(), tiny.bert(seed=2)
    model.train()
    model.bert.encoder.layer[0].eval()  # as one that is frozen
    teacher.bert.pooler.train()
    model.bert.encoder.layer[1].output.dense.weight.requires_grad_(False)
    for p in model.parameters():
        p.grad = torch.ones_like(p) if p.requires_grad else None
    weights = {n: v.clone() for n, v in model.state_dict().items()}
    modes = [[m.training for m in owner.modules()] for owner in (model, teacher)]
    flags = [p.requires_grad for p in model.parameters()]
    data = tiny.text_dataset(6).map(lambda row: {key: row[key][:4] for key in ("input_ids", "attention_mask")})
    importance = ImportanceStatistics(find_targets(model, _spec("neuron", criterion)), _spec("neuron", criterion))
    state = torch.get_rng_state()
    loader = torch.utils.data.DataLoader(data.with_format("torch"), batch_size=2, shuffle=True)
    collect_importance_(model, importance, loader, teacher)
    assert torch.equal(torch.get_rng_state(), state)
    assert [[m.training for m in owner.modules()] for owner in (model, teacher)] == modes
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all((p.grad == 1).all() if p.requires_grad else p.grad is None for p in model.parameters())
    assert all(torch.equal(v, weights[n]) for n, v in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_gathering_restores_the_model_after_an_error():
    model = tiny.bert()
    model.train().requires_grad_(False)
    with pytest.raises(ValueError, match="Add labels"):
        _scores(model, _spec("neuron", "taylor"), [tiny.batch(model)])
    assert all(m.training for m in model.modules())
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("criterion", CRITERIA)
def test_the_model_is_measured_in_eval_mode_with_frozen_parameters_too(criterion):
    model, batches = tiny.bert(hidden_dropout_prob=0.5), _batches("bert")
    teacher = tiny.bert(hidden_dropout_prob=0.5)
    expected = _scores(model, _spec("neuron", criterion), batches, teacher)
    model.train().requires_grad_(False)
    assert torch.equal(_scores(model, _spec("neuron", criterion), batches, teacher.train()), expected)


@pytest.mark.parametrize("criterion", ["magnitude", *CRITERIA])
def test_models_in_bfloat16_score_in_float32(criterion):
    model, batches = FAMILIES["bert"].make(), _batches("bert")
    expected = _scores(model, _spec("neuron", criterion), batches)
    found = _scores(model.to(torch.bfloat16), _spec("neuron", criterion), batches)
    assert found.dtype == torch.float32
    assert float(torch.corrcoef(torch.stack([found, expected]))[0, 1]) > 0.98


def _images(*scales):
    return [{"pixel_values": scale * torch.randn(2, 3, 16, 16), "labels": torch.tensor([0, 1])} for scale in scales]


@pytest.mark.parametrize("criterion", CRITERIA)
def test_batches_that_overflow_are_left_out(criterion):
    model, batches = FAMILIES["vit"].make(), _images(1.0, 2.0)
    too_large = {"pixel_values": torch.full((2, 3, 16, 16), 3e38), "labels": torch.tensor([0, 1])}
    with torch.no_grad():
        assert not model(**too_large).logits.isfinite().all()
    if criterion == "teacher":
        with pytest.raises(ValueError, match="teacher's logits are not finite"):
            _scores(model, _spec("neuron", criterion), [too_large, *batches])
        return
    expected = _scores(model, _spec("neuron", criterion), batches)
    assert torch.equal(_scores(model, _spec("neuron", criterion), [*batches, too_large]), expected)
    with pytest.raises(ValueError, match=r"Nothing finite came to vit\..*layers?\.0.*float32"):
        _scores(model, _spec("neuron", criterion), [too_large])


def test_data_that_cannot_tell_what_matters_are_refused_and_nothing_changes():
    model = tiny.bert()
    before = {n: v.clone() for n, v in model.state_dict().items()}
    batch = tiny.batch(model)
    for message, batches, spec in (
        ("looks at data: give calibration", None, _spec("neuron", "taylor")),
        ("looks at data: give calibration", None, _spec("neuron", "magnitude", cut="mean")),
        ("needs the gradient of a loss.*Add labels.*'teacher', which needs none", [batch], _spec("head", "fisher")),
        ("hold no batch", [], _spec("neuron", "teacher")),
        ("is learned while the model is trained", [batch], _spec("neuron", "movement")),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            prune(model, spec, batches)
    with pytest.raises(ValueError, match=r"The teacher's logits are of shape \(4, 5\), the model's \(4, 3\)"):
        prune(model, _spec("neuron", "teacher"), [batch], teacher_model=tiny.bert(labels=5))
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
    assert not hasattr(model.config, "hfkdq")


@pytest.mark.parametrize("criterion", CRITERIA)
def test_modules_that_never_run_are_named(criterion):
    model = tiny.bert()
    model.bert.spare = nn.Linear(4, 4)
    batch = tiny.batch(model) | {"labels": torch.tensor([0, 1, 2, 0])}
    with pytest.raises(ValueError, match=r"prunes: bert\.spare never ran.*exclude_modules"):
        _scores(model, _spec("weight", criterion, target_modules=["spare", "key"]), [batch])


def test_means_of_modules_that_never_run_are_not_taken_for_zero():
    model = tiny.bert()
    spec = _spec("neuron", "magnitude", cut="mean")
    importance = ImportanceStatistics(find_targets(model, spec), spec)
    assert sorted(importance.missing().values()) == [f"bert.encoder.layer.{i}.output.dense" for i in range(2)]


def test_a_loss_that_depends_on_nothing_pruned_is_refused():
    class Constant(type(tiny.bert())):
        def forward(self, **kwargs):
            return SequenceClassifierOutput(loss=torch.zeros(()), logits=torch.zeros(2, 3))

    model = Constant(tiny.bert_config())
    with pytest.raises(ValueError, match="no gradient came to it"):
        _scores(model, _spec("neuron", "taylor"), [{"labels": torch.tensor([0, 1])}])


def test_a_dataset_is_batched_and_collated():
    model = tiny.bert()
    data = tiny.text_dataset(8)
    spec = PruningSpec(sparsity=0.5, structure="neuron", criterion="fisher")
    found = prune(tiny.bert(), spec, data, batch_size=4, processing_class=tiny.tokenizer())
    batches = [tiny.tokenizer().pad(data[i : i + 4], return_tensors="pt") for i in (0, 4)]
    expected = prune(model, spec, [dict(batch) for batch in batches])
    assert all(torch.equal(a, b) for a, b in zip(found.parameters(), expected.parameters(), strict=True))


def test_a_layer_without_gradients_is_not_taken_for_one_that_does_not_matter():
    model = tiny.bert(layers=3)
    spec = _spec("layer", "taylor")
    importance = ImportanceStatistics(find_targets(model, spec), spec, decay=DECAY)
    assert isinstance(importance.targets[0], LayerTarget)
    model.bert.embeddings.requires_grad_(False)
    model.bert.encoder.layer[0].requires_grad_(False)
    model(**tiny.batch(model), labels=torch.tensor([0, 1, 2, 0])).loss.backward()
    importance.observe_gradients()
    assert not importance.is_complete()
    assert importance.missing() == {"0.gradient": "bert.encoder.layer"}
    model.bert.encoder.layer.requires_grad_(True)
    model(**tiny.batch(model), labels=torch.tensor([0, 1, 2, 0])).loss.backward()
    importance.observe_gradients()
    assert importance.is_complete()
    assert (importance.scores(0) > 0).all()


@pytest.mark.parametrize("criterion", ["magnitude", "teacher", "taylor", "fisher", "movement"])
@pytest.mark.parametrize("structure", ["neuron", "layer", "weight"])
def test_frozen_layers_have_no_gradients_to_learn_from_in_training(structure, criterion):
    model = tiny.bert(layers=3)
    model.bert.embeddings.requires_grad_(False)
    check_trained(find_targets(model, _spec(structure, criterion)), _spec(structure, criterion))
    model.bert.encoder.layer[1].requires_grad_(False)
    targets = find_targets(model, _spec(structure, criterion))
    if criterion in ("magnitude", "teacher"):
        check_trained(targets, _spec(structure, criterion))
        return
    with pytest.raises(ValueError, match=r"bert\.encoder\.layer\.1\..* has none: it is frozen.*exclude_modules"):
        check_trained(targets, _spec(structure, criterion))


def test_a_layer_that_has_not_run_yet_is_missing():
    model = tiny.bert(layers=2)
    spec = _spec("layer", "activation")
    importance = ImportanceStatistics(find_targets(model, spec), spec)
    importance.watch()
    states = torch.randn(1, 3, 32)
    model.bert.encoder.layer[1](states)
    assert importance.missing() == {"0.0.change": "bert.encoder.layer.0"}
    assert not importance.is_complete()
    model.bert.encoder.layer[0](states)
    assert importance.is_complete()
    importance.unwatch()


def test_an_evaluation_while_training_leaves_no_trace_but_calibration_does():
    model = tiny.bert(layers=1)
    spec = PruningSpec(sparsity=0.5, structure="neuron", criterion="teacher", cut="mean")
    importance = ImportanceStatistics(find_targets(model, spec), spec, decay=DECAY, while_training=True)
    importance.watch()
    model.eval()(**tiny.batch(model))
    assert not importance.tensors
    collect_importance_(model, importance, [tiny.batch(model)] * 2)  # counts all alike
    assert importance.is_complete()
    count = float(importance.tensors["0.bert.encoder.layer.0.output.dense.mean.count"])
    model.eval()(**tiny.batch(model))
    assert float(importance.tensors["0.bert.encoder.layer.0.output.dense.mean.count"]) == count == 80
    model.train()(**tiny.batch(model))  # the hooks of the training are still there
    assert float(importance.tensors["0.bert.encoder.layer.0.output.dense.mean.count"]) == pytest.approx(
        80 * DECAY + 40
    )
    importance.unwatch()


def test_evidence_survives_saving():
    model, batches = tiny.bert(), _batches("bert")
    spec = _spec("head", "activation")
    importance = _importance(model, spec, batches)
    again = ImportanceStatistics(importance.targets, spec)
    again.restore({**importance.tensors_by_name(), "mask.0": torch.zeros(3)})
    assert again.tensors.keys() == importance.tensors.keys()
    assert torch.equal(again.scores(1), importance.scores(1))


@pytest.mark.parametrize(
    "spec", [_spec("neuron", "magnitude"), _spec("head", "taylor"), _spec("weight", "activation")]
)
def test_layers_that_share_weights_are_pruned_before_they_are_shared(spec):
    model = share_layers(tiny.bert(), groups=1)
    with pytest.raises(ValueError, match="Prune first and share_layers afterwards"):
        prune(model, spec, [tiny.batch(model)])


def test_a_weight_that_layers_share_is_ranked_once():
    model = share_layers(tiny.bert(), groups=1)
    assert len(find_targets(model, PruningSpec(sparsity=0.5))) == 6
    prune(model, PruningSpec(sparsity=0.5, criterion="taylor"), [tiny.batch(model) | {"labels": torch.arange(4) % 3}])
    for layer in model.bert.encoder.layer:
        assert int((layer.output.dense.weight == 0).sum()) == 1024


def test_the_body_of_a_bare_network_of_convolutions_is_pruned():
    model = tiny.resnet().resnet
    assert len(find_targets(model, PruningSpec(sparsity=0.5))) == len(
        [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    )
