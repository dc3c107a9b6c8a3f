# SPDX-License-Identifier: Apache-2.0
"""OnPolicyKD: what the student writes to which prompt, and how it is scored; against loops without cache or padding."""

import copy
from dataclasses import replace

import pytest
import torch
from transformers import BartConfig, BartForConditionalGeneration, set_seed

from hfkdq.losses import JSD
from hfkdq.objectives import LogitKD, TrainingStep
from hfkdq.objectives.model_signature import signature_of
from hfkdq.objectives.on_policy import OnPolicyKD
from hfkdq.schedules import Linear, Step
from tests import tiny

from .common import gpt2

ENDS = [3, *range(45, 75)]  # so that answers end early, and by several tokens


def bart(seed=0):
    set_seed(seed)
    config = BartConfig(
        d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=64, dropout=0.0, init_std=0.2, vocab_size=95,
        pad_token_id=0, bos_token_id=2, eos_token_id=3, decoder_start_token_id=3, forced_eos_token_id=None,
        forced_bos_token_id=None,
    )  # fmt: skip
    return BartForConditionalGeneration(config).eval()


MODELS = {"llama": tiny.llama, "gpt2": gpt2, "t5": tiny.t5, "bart": bart}


class Bare:
    """Passes of two models as they are, which are counted."""

    def __init__(self, model, teacher_model):
        self.model, self.teacher_model, self.seen = model, teacher_model, []

    def student(self, batch, needs=frozenset({"logits"}), indices=None):
        self.seen.append((self.model.training, torch.is_grad_enabled()))
        return self.model(**{k: v for k, v in batch.items() if k != "labels"})

    @torch.no_grad()
    def teacher(self, batch, needs=frozenset({"logits"}), indices=None):
        self.seen.append("teacher")
        return self.teacher_model(**{k: v for k, v in batch.items() if k != "labels"})


def pair(kind, ends=ENDS):
    student, teacher = MODELS[kind](0), MODELS[kind](1)
    student.generation_config.eos_token_id = ends
    return student.train(), teacher


def attached(student, teacher, **kwargs):
    objective = OnPolicyKD(**{"max_new_tokens": 6, **kwargs})
    objective.attach(student, teacher)
    return objective


def evaluated(objective, student, teacher, batch, seed=5, progress=0.0):
    """Value and count for a batch, which the student answers from a seed."""
    torch.manual_seed(seed)
    passes = Bare(student, teacher)
    step = objective.run_forward(passes, TrainingStep(batch, progress))
    if step.student is None:
        step = replace(step, student=passes.student(batch), teacher=passes.teacher(batch))
    return objective.loss(step), objective.positions(batch)


def texts(kind, left=False):
    """A batch, and its prompts as lists."""
    rows = [([5, 6, 7], [8, 9]), ([9], [7, 7, 7, 7]), ([11, 12, 13, 14], [3])]
    if kind in ("t5", "bart"):
        ids = torch.tensor([[5, 6, 7, 3], [9, 3, 0, 0], [11, 12, 3, 0]])
        labels = torch.tensor([[8, 9, 3], [7, 3, -100], [3, -100, -100]])
        return {"input_ids": ids, "attention_mask": ids.ne(0).long(), "labels": labels}, [
            row[row != 0].tolist() for row in ids
        ]
    batch = {"input_ids": [], "attention_mask": [], "labels": []}
    for prompt, answer in rows:
        lost = 6 - len(prompt + answer)
        for name, values, padding in (
            ("input_ids", prompt + answer, 0),
            ("attention_mask", [1] * len(prompt + answer), 0),
            ("labels", [-100] * len(prompt) + answer, -100),
        ):
            batch[name].append([padding] * lost + values if left else values + [padding] * lost)
    return {name: torch.tensor(values) for name, values in batch.items()}, [prompt for prompt, _ in rows]


@torch.no_grad()
def logits_of(model, prompt, answer):
    """Logits at which every token of an answer and the one after it are predicted, for one row without padding."""
    if model.config.is_encoder_decoder:
        decoder = torch.tensor([[model.config.decoder_start_token_id, *answer]])
        return model(input_ids=torch.tensor([prompt]), decoder_input_ids=decoder).logits[0]
    return model(torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 :]


def written_by_hand(student, prompts, count, temperature=1.0, seed=5, ends=ENDS):
    """Answers sampled token by token, every row by itself; a row that has ended still takes its share of chance."""
    torch.manual_seed(seed)
    torch.rand(())  # whether the student writes at all
    rows, done = [[] for _ in prompts], [False] * len(prompts)
    for _ in range(count):
        last = [logits_of(student, p, row)[-1] for p, row in zip(prompts, rows, strict=True)]
        drawn = torch.multinomial(torch.softmax(torch.stack(last).float() / temperature, dim=-1), 1)[:, 0].tolist()
        for i, token in enumerate(drawn):
            if not done[i]:
                rows[i].append(token)
                done[i] = token in ends
        if all(done):
            break
    return rows


def reverse_kl(student, teacher, prompt, answer):
    log_q, log_p = (logits_of(m, prompt, answer)[:-1].log_softmax(-1) for m in (student, teacher))
    return (log_q.exp() * (log_q - log_p)).sum(-1).mean()


@pytest.mark.parametrize(
    ("kind", "left"),
    [("llama", False), ("llama", True), ("gpt2", False), ("gpt2", True), ("t5", False), ("bart", False)],
)
def test_the_value_is_that_of_answers_sampled_one_by_one(kind, left):
    student, teacher = pair(kind)
    batch, prompts = texts(kind, left)
    objective, lengths = attached(student, teacher), set()
    for seed in (5, 6, 7):
        mean, count = evaluated(objective, student.train(), teacher, batch, seed)
        rows = written_by_hand(student.eval(), prompts, 6, seed=seed)
        expected = [reverse_kl(student, teacher, p, row) for p, row in zip(prompts, rows, strict=True)]
        torch.testing.assert_close(mean, torch.stack(expected).mean(), rtol=1e-4, atol=1e-5)
        assert count == objective.positions(batch) == 3
        lengths |= {len(row) for row in rows}
    assert len(lengths) > 1


@pytest.mark.parametrize("kind", ["gpt2", "t5"])
def test_the_student_samples_from_all_it_finds_likely_whatever_its_configuration_says(kind):
    student, teacher = pair(kind)
    settings = student.generation_config
    settings.update(
        do_sample=True, top_k=1, top_p=0.1, temperature=0.1, repetition_penalty=9.0, min_new_tokens=6,
        no_repeat_ngram_size=1, suppress_tokens=[*range(40)], max_length=3,
    )  # fmt: skip
    before = copy.deepcopy(settings.to_dict())
    batch, prompts = texts(kind)
    passes = Bare(student, teacher)
    for temperature in (1.0, 3.0):
        objective = attached(student, teacher, sampling_temperature=temperature)
        torch.manual_seed(5)
        labels = objective.run_forward(passes, TrainingStep(batch)).batch["labels"]
        with torch.no_grad():
            rows = written_by_hand(student.eval(), prompts, 6, temperature)
        assert [row[row != -100].tolist() for row in labels] == rows
        student.train()
    assert student.generation_config is settings
    assert settings.to_dict() == before


def test_what_the_student_writes_is_read_as_a_batch_of_training():
    student, teacher = pair("gpt2")
    batch, prompts = texts("gpt2")
    objective = attached(student, teacher)
    torch.manual_seed(5)
    written = objective.run_forward(Bare(student, teacher), TrainingStep(batch)).batch
    rows = written_by_hand(student.eval(), prompts, 6)
    width = max(len(p) + len(row) for p, row in zip(prompts, rows, strict=True))
    for i, (prompt, row) in enumerate(zip(prompts, rows, strict=True)):
        padding = width - len(prompt) - len(row)
        assert written["input_ids"][i].tolist() == prompt + row + [0] * padding
        assert written["labels"][i].tolist() == [-100] * len(prompt) + row + [-100] * padding
        assert written["attention_mask"][i].tolist() == [1] * (width - padding) + [0] * padding


def test_prompts_are_what_comes_before_the_first_label():
    student, teacher = pair("llama", ends=None)
    ids = torch.arange(5, 17).reshape(2, 6)

    def prompts(**columns):
        objective = attached(student, teacher, max_new_tokens=1)
        written = objective.run_forward(Bare(student, teacher), TrainingStep({"input_ids": ids, **columns})).batch
        return [row[mask == 1][:-1].tolist() for row, mask in zip(*(written[k] for k in ("input_ids", "attention_mask")), strict=True)]  # fmt: skip

    assert prompts() == [[5], [11]]
    assert prompts(labels=ids) == [[5], [11]]
    labels = torch.tensor([[-100, -100, 7, -100, 9, 10], [-100] * 6])
    assert prompts(labels=labels) == [[5, 6], [11, 12, 13, 14, 15, 16]]
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [0, 1, 1, 1, 1, 0]])
    assert prompts(attention_mask=mask) == [[7], [12]]
    assert prompts(attention_mask=mask, labels=torch.where(ids % 6 == 4, ids, -100)) == [[7, 8, 9], [12, 13, 14, 15]]


def test_padding_and_the_answers_of_the_batch_change_nothing():
    student, teacher = pair("gpt2")
    objective = attached(student, teacher)
    batch, _ = texts("gpt2")
    expected = evaluated(objective, student, teacher, batch)
    labels = torch.nn.functional.pad(batch["labels"], (2, 3), value=-100)
    mask = torch.nn.functional.pad(batch["attention_mask"], (2, 3))
    ids = torch.nn.functional.pad(batch["input_ids"], (2, 3)).masked_fill((mask == 0) | (labels != -100), 44)
    found = evaluated(objective, student, teacher, {"input_ids": ids, "attention_mask": mask, "labels": labels})
    torch.testing.assert_close(found, expected)


def test_the_mode_of_the_student_is_kept_and_the_gradient_is_the_students_alone():
    student, teacher = pair("llama")
    batch, _ = texts("llama")
    objective, passes, modes = attached(student, teacher), Bare(student, teacher), []
    layer = student.model.layers[0]
    layer.register_forward_hook(lambda module, *_: modes.append((module.training, torch.is_grad_enabled())))
    step = objective.run_forward(passes, TrainingStep(batch))
    assert passes.seen == [(True, True), "teacher"]
    assert modes[-1] == (True, True)
    assert set(modes[:-1]) == {(False, False)}
    assert len(modes) > 2
    assert student.training
    assert layer.training
    mean = objective.loss(step)
    mean.backward()
    assert all(p.grad.abs().sum() > 0 for p in student.parameters())
    assert all(p.grad is None for p in teacher.parameters())


def test_weights_that_were_cast_for_sampling_do_not_cut_off_the_gradient():
    student, teacher = pair("llama")
    batch, _ = texts("llama")
    objective = attached(student, teacher)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        step = objective.run_forward(Bare(student, teacher), TrainingStep(batch))
    objective.loss(step).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in student.parameters())


def test_a_student_that_is_its_teacher_learns_nothing():
    student, _ = pair("gpt2")
    batch, _ = texts("gpt2")
    teacher = copy.deepcopy(student)
    mean, _ = evaluated(attached(student, teacher), student, teacher, batch)
    assert mean.item() == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_off_policy_it_is_the_inner_objective_per_sample(kind):
    student, teacher = pair(kind)
    batch, _ = texts(kind)
    inner = LogitKD(divergence=JSD(0.3), temperature=3.0)
    objective, plain = attached(student, teacher, objective=inner, fraction=0.0), LogitKD(
        divergence=JSD(0.3), temperature=3.0, per="sample"
    )  # fmt: skip
    plain.attach(student, teacher)
    state = torch.get_rng_state()
    step = objective.run_forward(None, TrainingStep(batch))
    assert torch.equal(torch.get_rng_state(), state)  # nothing is drawn where nothing is to be decided
    assert (step.student, step.teacher) == (None, None)
    assert objective.needs == plain.needs == {"logits"}
    out = student(**batch), teacher(**batch)
    torch.testing.assert_close(objective(*out, batch), plain(*out, batch))
    per_token = LogitKD(divergence=JSD(0.3), temperature=3.0)
    per_token.attach(student, teacher)
    assert not torch.allclose(objective(*out, batch), per_token(*out, batch))


def test_the_student_writes_as_often_as_the_fraction_says():
    student, teacher = pair("llama")
    batch, _ = texts("llama")
    objective = attached(student, teacher, fraction=Linear(0.0, 1.0), max_new_tokens=1)
    shares = []
    for progress in (0.0, 0.3, 1.0):
        passes, wrote = Bare(student, teacher), []
        for _ in range(60):
            wrote.append(objective.run_forward(passes, TrainingStep(batch, progress)).student is not None)
        assert len(passes.seen) == 2 * sum(wrote)
        shares.append(sum(wrote) / 60)
    assert shares[0] == 0.0
    assert 0.15 < shares[1] < 0.45
    assert shares[2] == 1.0


def test_schedules_of_the_inner_objective_see_the_progress():
    student, teacher = pair("llama")
    batch, _ = texts("llama")
    found = []
    for temperature, progress in ((Linear(1.0, 5.0), 0.5), (3.0, 0.0), (1.0, 0.0)):
        objective = attached(student, teacher, objective=LogitKD(temperature=temperature))
        found.append(evaluated(objective, student, teacher, batch, progress=progress)[0].item())
    assert found[0] == pytest.approx(found[1], rel=1e-6)
    assert found[0] != pytest.approx(found[2], rel=1e-2)


def test_answers_end_where_the_positions_of_a_model_do():
    student, teacher = pair("gpt2", ends=None)
    teacher.config.n_positions = 8
    batch, _ = texts("gpt2")
    objective = attached(student, teacher, max_new_tokens=60)
    written = objective.run_forward(Bare(student, teacher), TrainingStep(batch)).batch
    assert written["input_ids"].shape == (3, 8)  # the longest prompt has 4 tokens
    teacher.config.n_positions = 4
    with pytest.raises(
        ValueError, match="The longest prompt of a batch has 4 tokens, and the models have 4 positions"
    ):
        attached(student, teacher).run_forward(Bare(student, teacher), TrainingStep(batch))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(fraction=1.2), "fraction is a probability"),
        (dict(fraction=-0.1), "fraction is a probability"),
        (dict(fraction=Step(0.0, 2.0)), "fraction is a probability"),
        (dict(fraction=float("nan")), "fraction is a probability"),
        (dict(max_new_tokens=0), "max_new_tokens must be a positive integer"),
        (dict(max_new_tokens=1.5), "max_new_tokens must be a positive integer"),
        (dict(sampling_temperature=0.0), "sampling_temperature must be larger than 0"),
        (dict(objective="reverse_kl"), "objective must be a LogitKD"),
        (dict(objective=LogitKD(weight=0.5)), "Give weight and teacher to OnPolicyKD itself"),
        (dict(objective=LogitKD(teacher="large")), "Give weight and teacher to OnPolicyKD itself"),
    ],
)
def test_wrong_settings_are_refused_at_construction(settings, message):
    with pytest.raises(ValueError, match=message):
        OnPolicyKD(**settings)


def test_pairs_that_cannot_do_it_are_refused():
    for model in (tiny.bert, tiny.bert_mlm, tiny.wav2vec2_ctc):
        with pytest.raises(ValueError, match="OnPolicyKD lets the student write texts in answer to texts"):
            attached(model(0), model(1))
    with pytest.raises(ValueError, match="OnPolicyKD asks the teacher about texts that the student writes"):
        attached(tiny.llama(0), signature_of(tiny.llama(1)))
    with pytest.raises(ValueError, match="For language models of two vocabularies there is ULD"):
        attached(tiny.llama(0), tiny.llama(1, vocab=120))
