# SPDX-License-Identifier: Apache-2.0
"""What of a spec is in force when: phases of training, exact resuming of every state, and learned parameters."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from torch import nn
from transformers import DataCollatorWithPadding, Trainer, TrainerCallback

from hfkdq import QATCallback, QuantizationSpec, load_quantized
from hfkdq.facts import read_facts
from hfkdq.quantization import activation_ranges, callback, quantized_modules, weight_quantizers
from hfkdq.quantization.records import quantizer_states, weight_states
from hfkdq.quantization.weights import WeightQuantizer
from tests import tiny


class Watch(TrainerCallback):
    """Keeps what `look` finds in the model at the start of every step."""

    def __init__(self, look):
        self.look, self.seen = look, []

    def on_step_begin(self, args, state, control, model, **kwargs):
        self.seen.append(self.look(model))


def make_trainer(args, spec, *callbacks, model=None, **phases):
    return Trainer(
        tiny.bert(layers=1) if model is None else model, args,
        train_dataset=tiny.text_dataset(32), eval_dataset=tiny.text_dataset(16, seed=1),
        data_collator=DataCollatorWithPadding(tiny.tokenizer()), callbacks=[QATCallback(spec, **phases), *callbacks],
    )  # fmt: skip


def widths(model):
    return {quantizer.bits for quantizer in weight_quantizers(model).values()}


STATES = {
    "pact": (dict(range_estimator="pact"), {}),
    "percentile": (dict(range_estimator="percentile", percentile=99.0), {}),
    "learned weights": (dict(weight_bits=4, weight_estimator="learned"), dict(learning_rate_factor=10.0)),
    "falling learned weights": (dict(weight_bits=2, weight_estimator="learned"), dict(lower_bits={0.0: 8, 0.5: 2})),
    "codebooks": (dict(weight_bits=3, weight_mapping="kmeans"), {}),
    "falling codebooks": (dict(weight_bits=2, weight_mapping="kmeans"), dict(lower_bits={0.0: 4, 0.7: 2})),
    "late begin": (dict(), dict(begin=0.6)),
    "frozen": (dict(range_estimator="learned", weight_estimator="learned"), dict(freeze_ranges=0.5)),
    "attention": (dict(attention=True, activation_bits=4), {}),
    "noise": (dict(weight_bits=2), dict(quantized_share=0.5)),
}


@pytest.mark.parametrize("case", STATES)
def test_every_state_resumes_exactly_and_loads_bit_for_bit(training_arguments, case):
    spec, phases = QuantizationSpec(**STATES[case][0]), STATES[case][1]
    args = training_arguments(max_steps=8, save_strategy="steps", save_steps=4)
    whole = make_trainer(args, spec, **phases)
    whole.train()
    resumed = make_trainer(args, spec, **phases)
    resumed.train(resume_from_checkpoint=f"{args.output_dir}/checkpoint-4")
    for (name, ours), theirs in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    assert quantizer_states(whole.model) == quantizer_states(resumed.model)
    assert weight_states(whole.model) == weight_states(resumed.model)
    batch = tiny.batch(whole.model)
    loaded = load_quantized(f"{args.output_dir}/checkpoint-8")
    assert torch.equal(loaded(**batch).logits, whole.model.eval()(**batch).logits)
    assert read_facts(loaded) == read_facts(whole.model)


@pytest.mark.parametrize(
    "phases", [dict(begin=0.5), dict(lower_bits={0.0: 8, 0.5: 4, 0.9: 2})], ids=["not begun", "wider"]
)
def test_a_checkpoint_before_the_end_loads_as_it_was(training_arguments, phases):
    args = training_arguments(max_steps=10, save_strategy="steps", save_steps=3)
    kept = {}

    class Keep(TrainerCallback):
        def on_save(self, args, state, control, model, **kwargs):
            with torch.no_grad():
                kept[state.global_step] = model.eval()(**tiny.batch(model)).logits

    trainer = make_trainer(args, QuantizationSpec(weight_bits=2), Keep(), **phases)
    trainer.train()
    for step, logits in kept.items():
        loaded = load_quantized(f"{args.output_dir}/checkpoint-{step}")
        assert torch.equal(loaded(**tiny.batch(loaded)).logits, logits), step


def test_the_state_of_the_callback_survives_json_and_makes_an_equal_one(training_arguments):
    phases = dict(
        begin=0.1, freeze_ranges=0.8, freeze_batch_norm=0.4, lower_bits={0.0: 8, 0.5: 2}, quantized_share=0.5
    )
    made = QATCallback(QuantizationSpec(weight_bits=2), learning_rate_factor=3.0, **phases)
    twin = QATCallback(**json.loads(json.dumps(made.state()))["args"])
    assert twin.state() == made.state()
    assert [twin.schedule.at(t / 20) for t in range(21)] == [made.schedule.at(t / 20) for t in range(21)]


def test_widths_fall_on_time_and_wider_modules_stay_wider(training_arguments):
    spec = QuantizationSpec(weight_bits=2, overrides={"query": {"weight_bits": 6}})
    watch = Watch(lambda model: {name.split(".")[-2]: q.bits for name, q in weight_quantizers(model).items()})
    make_trainer(training_arguments(max_steps=10), spec, watch, lower_bits={0.0: 8, 0.3: 4, 0.6: 2}).train()
    assert [seen["key"] for seen in watch.seen] == [8, 8, 8, 4, 4, 4, 2, 2, 2, 2]
    assert [seen["query"] for seen in watch.seen] == [8, 8, 8] + [6] * 7
    assert [seen["classifier"] for seen in watch.seen] == [8] * 10


def test_a_learned_scale_keeps_its_range_when_the_width_falls():
    layer = nn.Linear(64, 4)
    quantizer = WeightQuantizer(QuantizationSpec(weight_bits=8, weight_estimator="learned"), layer.weight)
    before = quantizer.scale.detach() * 127
    quantizer.set_bits(4, layer.weight)
    torch.testing.assert_close(quantizer.scale.detach() * 7, before)


def test_nothing_is_quantized_before_the_begin(training_arguments):
    still = dict(layers=1, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    batch = tiny.batch(tiny.bert(**still))

    def computes_as_plain(model):
        plain = tiny.bert(**still)
        plain.load_state_dict(model.state_dict())
        with torch.no_grad():
            return torch.equal(model.eval()(**batch).logits, plain.eval()(**batch).logits)

    watch = Watch(lambda model: (computes_as_plain(model), len(activation_ranges(model))))
    args = training_arguments(max_steps=6)
    trainer = make_trainer(args, QuantizationSpec(), watch, model=tiny.bert(**still), begin=0.5)
    assert computes_as_plain(trainer.model), "nor before training"
    trainer.train()
    assert [equal for equal, _ in watch.seen] == [True] * 3 + [False] * 3
    assert [ranges for _, ranges in watch.seen] == [0, 0, 0, 0, 8, 8]


@pytest.mark.parametrize(
    "spec",
    [
        *(dict(range_estimator=estimator) for estimator in QuantizationSpec.RANGE_ESTIMATORS),
        dict(weight_estimator="learned", range_estimator="learned"),
        dict(weight_mapping="kmeans", activation_bits=None),
    ],
)
def test_frozen_ranges_scales_and_codebooks_stay(training_arguments, spec):
    spec = QuantizationSpec(weight_bits=4, **spec)
    watch = Watch(lambda model: (quantizer_states(model), weight_states(model)))
    trainer = make_trainer(training_arguments(max_steps=6), spec, watch, freeze_ranges=0.5)
    trainer.train()
    found = [*watch.seen, watch.look(trainer.model)]
    assert all(state == found[3] for state in found[4:])
    assert found[2] != found[3]


def test_learning_rate_factor_multiplies_the_steps_of_learned_ranges(training_arguments):
    args = dict(max_steps=1, optim="sgd", learning_rate=1e-2, lr_scheduler_type="constant", max_grad_norm=0.0)
    moved = {}
    for factor in (0.0, 1.0, 5.0):
        spec = QuantizationSpec(weight_bits=4, weight_estimator="learned")
        model = tiny.bert(layers=1)
        trainer = make_trainer(training_arguments(**args), spec, model=model, learning_rate_factor=factor)
        before = {
            name: q.scale.detach().clone() for name, q in weight_quantizers(model).items() if hasattr(q, "scale")
        }
        trainer.train()
        moved[factor] = [weight_quantizers(model)[name].scale.detach() - scale for name, scale in before.items()]
    assert all(step.abs().max() > 0 for step in moved[1.0])
    for zero, one, five in zip(*moved.values(), strict=True):
        assert not zero.any()
        torch.testing.assert_close(five, 5 * one, rtol=1e-3, atol=1e-8)


@pytest.mark.parametrize(
    ("phases", "moves"), [({}, 6), (dict(freeze_batch_norm=0.5), 3), (dict(fold_batch_norm=True), 0)]
)
def test_batch_norm_follows_until_it_is_frozen_or_folded(training_arguments, phases, moves):
    def statistics(model):
        return torch.cat([m.running_mean for m in model.modules() if isinstance(m, nn.BatchNorm2d)])

    watch = Watch(lambda model: statistics(model).clone())
    model = tiny.resnet()
    qat = QATCallback(QuantizationSpec(weight_bits=4), **phases)
    trainer = Trainer(
        model, training_arguments(max_steps=6), train_dataset=tiny.image_dataset(32), callbacks=[qat, watch]
    )
    trainer.train()
    found = [*watch.seen, statistics(trainer.model)]
    changed = [not torch.equal(a, b) for a, b in itertools.pairwise(found)]
    assert changed == [True] * moves + [False] * (6 - moves)
    assert len(activation_ranges(trainer.model)) == len(quantized_modules(trainer.model)) > 5
    trainer.save_model()
    loaded = load_quantized(trainer.args.output_dir)
    batch = tiny.batch(loaded)
    assert torch.equal(loaded(**batch).logits, trainer.model.eval()(**batch).logits)


def test_the_best_model_is_one_with_the_widths_of_the_spec(training_arguments):
    class Worsening(Trainer):
        def evaluate(self, *args, **kwargs):
            return {**super().evaluate(*args, **kwargs), "eval_error": float(self.state.global_step)}

    args = training_arguments(
        max_steps=8, save_strategy="steps", save_steps=2, eval_strategy="steps", eval_steps=2,
        load_best_model_at_end=True, metric_for_best_model="error", greater_is_better=False,
    )  # fmt: skip
    trainer = Worsening(
        tiny.bert(layers=1), args, train_dataset=tiny.text_dataset(32), eval_dataset=tiny.text_dataset(16, seed=1),
        data_collator=DataCollatorWithPadding(tiny.tokenizer()),
        callbacks=[QATCallback(QuantizationSpec(weight_bits=4), lower_bits={0.0: 8, 0.45: 4})],
    )  # fmt: skip
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-4")
    assert 4 in widths(trainer.model)
    batch = tiny.batch(trainer.model)
    best = load_quantized(trainer.state.best_model_checkpoint)
    assert torch.equal(best(**batch).logits, trainer.model.eval()(**batch).logits)


def test_training_that_stops_early_ends_with_the_widths_of_the_spec_and_a_warning(training_arguments, monkeypatch):
    told = []
    monkeypatch.setattr(callback.logger, "warning", told.append)

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = True

    trainer = make_trainer(
        training_arguments(max_steps=6), QuantizationSpec(weight_bits=2), Stop(), lower_bits={0.0: 8, 0.5: 2}
    )
    trainer.train()
    assert [text[:50] for text in told] == ["Training stopped at step 1 of 6, before its weight"]
    assert widths(trainer.model) == {2, 8}
    assert "weight_bits" not in read_facts(trainer.model)["quantization"]


@pytest.mark.parametrize(
    ("phases", "message"),
    [
        (dict(begin=-0.1), "begin"),
        (dict(begin=1.0), "no training"),
        (dict(begin=0.5, freeze_ranges=0.5), "must come after"),
        (dict(freeze_batch_norm=1.5), "freeze_batch_norm"),
        (dict(quantized_share=0.0), "quantized_share"),
        (dict(lower_bits={0.0: 4, 0.5: 8}), "must fall"),
        (dict(lower_bits={0.0: 8, 0.5: 4}), "ends at 4"),
        (dict(lower_bits={0.0: 7, 0.5: 2}), "must fall"),
        (dict(learning_rate_factor=-1.0), "learning_rate_factor"),
    ],
)
def test_phases_out_of_order_are_refused(phases, message):
    with pytest.raises(ValueError, match=message):
        QATCallback(QuantizationSpec(weight_bits=2), **phases)
