# SPDX-License-Identifier: Apache-2.0
import copy
import math

import pytest
import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    GPTBigCodeConfig,
    GPTBigCodeForCausalLM,
    ModernBertConfig,
    ModernBertForSequenceClassification,
)

from hfkdq.losses.relations import relation_kl
from hfkdq.objectives.model_signature import ModelSignature
from hfkdq.objectives.relations import RelationKD

from .common import assert_teaches_the_student_alone, attached, gpt2, padded, step, tiny

PAIRS = {
    "bert": (lambda: tiny.bert(0, heads=2), lambda: tiny.bert(1, layers=3, hidden=48)),
    "distilbert": (tiny.distilbert, lambda: tiny.bert(1, hidden=48, heads=6)),
    "llama": (tiny.llama, lambda: tiny.llama(1, layers=3, hidden=64)),
    "gpt2": (gpt2, lambda: gpt2(1, hidden=48, heads=6)),
    "llama from gpt2": (tiny.llama, lambda: gpt2(1, hidden=48)),
    "bert from llama": (tiny.bert, lambda: tiny.llama(1)),
    "vit": (tiny.vit, lambda: tiny.vit(1, layers=3, hidden=48)),
}
CAUSAL = {"llama", "gpt2", "llama from gpt2", "bert from llama"}


def last_vectors(model, batch):
    """Queries, keys and values of the last layer, found and split by the test itself."""
    names = {
        "BertForSequenceClassification": ("attention.self.query", "attention.self.key", "attention.self.value"),
        "DistilBertForSequenceClassification": ("attention.q_lin", "attention.k_lin", "attention.v_lin"),
        "LlamaForCausalLM": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "ViTForImageClassification": ("attention.attention.query", "attention.attention.key", "attention.attention.value"),
        "GPT2LMHeadModel": ("attn.c_attn",),
    }[type(model).__name__]  # fmt: skip
    modules = dict(model.named_modules())
    layer = max((n for n in modules if n.endswith(f".{model.config.num_hidden_layers - 1}")), key=len)
    if f"{layer}.{names[0]}" not in modules:  # Transformers 5
        names = ("attention.q_proj", "attention.k_proj", "attention.v_proj")
    seen = []
    hooks = [modules[f"{layer}.{n}"].register_forward_hook(lambda m, a, out: seen.append(out)) for n in names]
    with torch.no_grad():
        model(**batch)
    for hook in hooks:
        hook.remove()
    if len(seen) == 1:
        width = model.config.hidden_size
        seen = [seen[0][..., i * width : (i + 1) * width] for i in range(3)]
    return seen


def naive(ours, theirs, heads, mask, causal):
    """The formula of MiniLMv2 with a loop over everything."""
    values = []
    for b in range(len(mask)):
        valid = [i for i in range(mask.shape[1]) if mask[b, i]]
        for i in valid:
            keys = [j for j in valid if j <= i or not causal]
            total = 0.0
            for h in range(heads):
                p, q = [], []
                for vectors, found in ((theirs, p), (ours, q)):
                    d = vectors.shape[-1] // heads
                    part = vectors[b, :, h * d : (h + 1) * d].double()
                    scores = torch.stack([part[i] @ part[j] for j in keys]) / math.sqrt(d)
                    found.append(torch.softmax(scores, 0))
                total += (p[0] * (p[0] / q[0]).log()).sum() / heads
            values.append(total)
    return torch.stack(values).mean(), len(values)


@pytest.mark.parametrize("name", PAIRS)
def test_the_value_is_that_of_the_formula(name):
    student, teacher = (make() for make in PAIRS[name])
    batch = tiny.batch(student, size=3)
    objective = attached(RelationKD(), student, teacher)
    value, count = step(objective, student, teacher, batch)
    vectors = last_vectors(student, batch), last_vectors(teacher, batch)
    mask = batch.get("attention_mask", torch.ones(vectors[0][0].shape[:2]))
    # Of all pairs 4 is the largest number that divides all widths and is at most the teacher's number of heads.
    parts = [naive(*pair, 4, mask, name in CAUSAL) for pair in zip(*vectors, strict=True)]
    torch.testing.assert_close(value.double(), sum(part for part, _ in parts), rtol=1e-4, atol=1e-5)
    assert value > 1e-3
    assert objective.positions(batch) == count == (parts[0][1] if "attention_mask" in batch else len(mask))


def test_layers_heads_and_kinds_are_those_that_were_asked_for():
    student, teacher, batch = tiny.bert(0, layers=3), tiny.bert(1, layers=3), tiny.batch(tiny.bert())
    settings = {"layers": {1: 2, 3: 3}, "relation_heads": 8, "relations": ["value", "key"]}
    value, _ = step(attached(RelationKD(**settings), student, teacher), student, teacher, batch)
    singles = [
        step(attached(RelationKD(layers={s: t}, relation_heads=8, relations=[kind]), student, teacher), student, teacher, batch)[0]
        for s, t in ((1, 2), (3, 3)) for kind in ("key", "value")
    ]  # fmt: skip
    torch.testing.assert_close(value, sum(singles) / 2)
    other, _ = step(attached(RelationKD(layers={1: 2, 3: 3}, relations=["value", "key"]), student, teacher), student, teacher, batch)  # fmt: skip
    assert abs(other - value) > 1e-4


@pytest.mark.parametrize("name", PAIRS)
def test_a_model_teaches_its_copy_nothing(name):
    student = PAIRS[name][0]()
    teacher = copy.deepcopy(student)
    value, _ = step(attached(RelationKD(), student, teacher), student, teacher, tiny.batch(student))
    assert abs(value) < 1e-6


@pytest.mark.parametrize("name", [name for name in PAIRS if name != "vit"])
def test_padding_changes_nothing(name):
    student, teacher = (make() for make in PAIRS[name])
    objective, batch = attached(RelationKD(), student, teacher), tiny.batch(student)
    value, count = step(objective, student, teacher, batch)
    more = padded(batch)
    again, count_again = step(objective, student, teacher, more)
    torch.testing.assert_close(again, value, rtol=1e-4, atol=1e-6)
    assert count == count_again


def test_padding_on_the_left_gives_numbers():
    student, teacher = tiny.llama(0), tiny.llama(1)
    batch = tiny.batch(student)
    left = {key: value.flip(1) for key, value in batch.items()}
    value, _ = step(attached(RelationKD(), student, teacher), student, teacher, left)
    value.backward()
    assert torch.isfinite(value)
    assert all(torch.isfinite(p.grad).all() for p in student.parameters() if p.grad is not None)


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2", "vit"])
def test_any_attention_implementation_gives_the_same_value(name):
    found = []
    for implementation in ("sdpa", "eager"):
        if name == "bert":  # on Transformers 4 it cannot be switched
            student, teacher = (tiny.bert(seed, attn_implementation=implementation) for seed in (0, 1))
        else:
            student, teacher = (make() for make in PAIRS[name])
            student.set_attn_implementation(implementation)
            teacher.set_attn_implementation(implementation)
        objective = attached(RelationKD(layers="uniform"), student, teacher)
        found.append(step(objective, student, teacher, tiny.batch(student))[0])
        assert student.config._attn_implementation == implementation
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", PAIRS)
def test_the_gradient_reaches_the_student_alone(name):
    student, teacher = (make() for make in PAIRS[name])
    assert_teaches_the_student_alone(RelationKD(), student, teacher, tiny.batch(student))


def test_the_gradient_is_the_same_under_gradient_checkpointing():
    gradients = []
    for checkpointing in (False, True):
        student, teacher = tiny.bert(0, layers=3), tiny.bert(1, layers=3)
        if checkpointing:
            student.gradient_checkpointing_enable({"use_reentrant": False})
        objective, batch = attached(RelationKD(), student, teacher), tiny.batch(student)
        step(objective, student, teacher, batch)[0].backward()
        gradients.append({name: p.grad for name, p in student.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


def test_checkpointing_that_cuts_the_vectors_off_is_refused():
    student, teacher = tiny.bert(0), tiny.bert(1)
    student.gradient_checkpointing_enable({"use_reentrant": True})
    student.get_input_embeddings().register_forward_hook(lambda m, a, out: out.requires_grad_(True))
    with pytest.raises(RuntimeError, match="use_reentrant"):
        step(attached(RelationKD(), student, teacher), student, teacher, tiny.batch(student))


def test_a_student_with_adapters_learns_from_itself_without_them():
    peft = pytest.importorskip("peft")
    base = tiny.bert(0, layers=3)
    batch, twins = tiny.batch(base), (copy.deepcopy(base), copy.deepcopy(base))
    student = peft.get_peft_model(base, peft.LoraConfig(target_modules=["query", "value"], r=2))

    def value_of(objective):
        with objective.capture() as seen:
            with torch.no_grad(), student.disable_adapter():
                student(**batch)
            student(**batch)
        return objective(None, None, batch, seen=seen)

    # Both layers run in both roles, and each is looked at in one of them.
    across = attached(RelationKD(layers={3: 2}), student, base)
    apart, _ = step(attached(RelationKD(layers={3: 2}), *twins), *twins, batch)
    torch.testing.assert_close(value_of(across), apart, rtol=1e-4, atol=1e-6)
    objective = attached(RelationKD(), student, base)
    assert abs(value_of(objective)) < 1e-6
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    value = value_of(objective)
    value.backward()
    assert value > 1e-3
    assert all(p.grad.abs().sum() > 0 for name, p in student.named_parameters() if "lora_B" in name)


def hooks_of(*models):
    return sum(len(module._forward_hooks) for model in models for module in model.modules())


def test_hooks_and_tensors_last_for_a_batch_only():
    student, teacher = tiny.bert(0), tiny.bert(1)
    objective, batch = attached(RelationKD(), student, teacher), tiny.batch(student)
    assert hooks_of(student, teacher) == 0
    kept = []

    def fail():
        with objective.capture() as seen:
            kept.append(seen)
            assert hooks_of(student, teacher) == 6
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert hooks_of(student, teacher) == 0
    assert kept == [({}, {})]
    known = dict(vars(objective))
    step(objective, student, teacher, batch)
    assert vars(objective) == known  # what was seen went through the step alone
    student(**batch)
    assert kept == [({}, {})]
    with pytest.raises(RuntimeError, match="within `capture"):
        objective(None, None, batch)


def test_linear_layers_that_are_replaced_after_attach_are_still_looked_at():
    student, teacher = tiny.bert(0), tiny.bert(1)
    objective, batch = attached(RelationKD(), student, teacher), tiny.batch(student)
    before, _ = step(objective, student, teacher, batch)
    attention = student.bert.encoder.layer[-1].attention.self
    attention.query = copy.deepcopy(attention.query)
    with torch.no_grad():
        attention.query.weight.mul_(2)
    after, _ = step(objective, student, teacher, batch)
    assert abs(after - before) > 1e-3


def test_a_step_in_half_precision_gives_nearly_the_same_value():
    student, teacher = tiny.bert(0), tiny.bert(1)
    objective, batch = attached(RelationKD(), student, teacher), tiny.batch(student)
    value, _ = step(objective, student, teacher, batch)
    with torch.autocast("cpu", torch.bfloat16):
        half, _ = step(objective, student, teacher, batch)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, value, rtol=0.05, atol=0.01)


def test_training_brings_the_relations_together():
    student, teacher = tiny.distilbert(0), tiny.bert(1, hidden=48)
    objective, batch = attached(RelationKD(), student, teacher), tiny.batch(student)
    optimizer = torch.optim.Adam(student.parameters(), 3e-3)
    values = []
    for _ in range(25):
        value, _ = step(objective, student, teacher, batch)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        values.append(value.item())
    assert values[-1] < 0.5 * values[0]


def bart():
    return BartForConditionalGeneration(
        BartConfig(vocab_size=96, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
                   decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=64)
    )  # fmt: skip


def modernbert():
    return ModernBertForSequenceClassification(
        ModernBertConfig(vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
                         pad_token_id=0, cls_token_id=2, sep_token_id=3, bos_token_id=2, eos_token_id=3)
    )  # fmt: skip


def bigcode():
    return GPTBigCodeForCausalLM(
        GPTBigCodeConfig(vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=64, multi_query=False)
    )


@pytest.mark.parametrize(
    ("settings", "student", "teacher", "message"),
    [
        ({}, tiny.bert, lambda: ModelSignature("BertModel", tiny.bert_config()), "Cached outputs hold no queries"),
        ({}, bart, bart, "one stack"),
        ({}, tiny.bert, modernbert, "found: 0 for query, 0 for key, 0 for value"),
        ({}, gpt2, bigcode, "found: 0 for query"),
        ({}, gpt2, lambda: gpt2(add_cross_attention=True), "found: 2 for query"),
        ({}, tiny.bert, tiny.vit, "4 positions"),
        ({"layers": {3: 1}}, tiny.bert, tiny.bert, "out of range"),
        ({"layers": {0: 0}}, tiny.bert, tiny.bert, "embeddings"),
        ({"relation_heads": 3}, tiny.bert, lambda: tiny.bert(hidden=48), "widths .*: 32, 48. Use a divisor of 16"),
    ],
)
def test_models_that_do_not_fit_are_refused_at_attach(settings, student, teacher, message):
    with pytest.raises(ValueError, match=message):
        RelationKD(**settings).attach(student(), teacher())


@pytest.mark.parametrize(
    "settings",
    [{"relations": ()}, {"relations": "query"}, {"relations": ("query", "query")}, {"relations": ("output",)},
     {"relation_heads": 0}, {"relation_heads": 2.0}],
)  # fmt: skip
def test_impossible_settings_are_refused(settings):
    with pytest.raises(ValueError, match="RelationKD: relation"):
        RelationKD(**settings)


def test_relation_kl_by_hand():
    # One head of width 1: scores are products, so positions 0 and 1 of (1, 0) see (1, 0) and (0, 0).
    teacher, student = torch.tensor([[[1.0], [0.0]]]), torch.zeros(1, 2, 1)
    p = torch.tensor([math.e, 1.0]) / (math.e + 1.0)
    first = (p * (p * 2).log()).sum()
    torch.testing.assert_close(relation_kl(student, teacher, 1), torch.tensor([[first, 0.0]]))
    torch.testing.assert_close(relation_kl(student, teacher, 1, causal=True), torch.zeros(1, 2))
    mask = torch.tensor([[True, False]])
    torch.testing.assert_close(relation_kl(student, teacher, 1, mask), torch.zeros(1, 2))
