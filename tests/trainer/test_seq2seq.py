# SPDX-License-Identifier: Apache-2.0
"""Encoder-decoders: what their decoder reads, generation in evaluation, and that they stay `Seq2SeqTrainer`."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    DataCollatorForSeq2Seq,
    GenerationConfig,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    WhisperConfig,
    WhisperForConditionalGeneration,
    set_seed,
)

from hfkdq.losses import forward_kl, masked_mean
from hfkdq.objectives import AttentionKD, HiddenStateKD, LogitKD, TaskLoss
from hfkdq.trainer import Seq2SeqDistillationTrainer
from tests import tiny

from .common import assert_equal_weights, losses

TOKENS = dict(vocab_size=len(tiny.VOCABULARY), pad_token_id=0, eos_token_id=3)


def t5(seed=0, layers=2, hidden=32, **kwargs):
    set_seed(seed)
    config = T5Config(
        d_model=hidden, d_kv=8, d_ff=2 * hidden, num_layers=layers, num_heads=4, decoder_start_token_id=0,
        dropout_rate=0.0, **{**TOKENS, **kwargs},
    )  # fmt: skip
    return T5ForConditionalGeneration(config).eval()


def bart(seed=0, layers=2, hidden=32, **kwargs):
    set_seed(seed)
    config = BartConfig(
        d_model=hidden, encoder_layers=layers, decoder_layers=layers, encoder_attention_heads=4, bos_token_id=2,
        decoder_attention_heads=4, encoder_ffn_dim=2 * hidden, decoder_ffn_dim=2 * hidden, decoder_start_token_id=3,
        max_position_embeddings=64, dropout=0.0, init_std=0.2, forced_eos_token_id=None, **{**TOKENS, **kwargs},
    )  # fmt: skip
    return BartForConditionalGeneration(config).eval()


MODELS = {"t5": t5, "bart": bart}


def translation(rows=24, seed=0):
    """The words backwards, of uneven length."""
    inputs = tiny.text_dataset(rows, seed=seed)["input_ids"]
    return Dataset.from_dict(
        {
            "input_ids": list(inputs),
            "attention_mask": [[1] * len(x) for x in inputs],
            "labels": [[*x[1:-1][::-1], 3] for x in inputs],
        }
    )


class WithoutDecoderInputs(DataCollatorForSeq2Seq):
    """Batches of inputs and labels alone, as for a model that derives the rest."""

    def __call__(self, features, return_tensors=None):
        batch = super().__call__(features, return_tensors)
        batch.pop("decoder_input_ids", None)
        return batch


@pytest.fixture
def arguments(training_arguments):
    def make(folder="out", **kwargs):
        return training_arguments(folder, cls=Seq2SeqTrainingArguments, **kwargs)

    return make


def make_trainer(arguments, kind, objectives=None, teacher=None, cls=Seq2SeqDistillationTrainer, **kwargs):
    student = MODELS[kind](0)
    if cls is not Seq2SeqTrainer and objectives is not None:
        kwargs.update(objectives=objectives, teacher_model=teacher or MODELS[kind](1, layers=3, hidden=64))
    collator = kwargs.pop("collator", DataCollatorForSeq2Seq)(tiny.tokenizer(), model=student)
    settings = dict(train_dataset=translation(), eval_dataset=translation(10, seed=9), data_collator=collator)
    return cls(student, arguments, processing_class=tiny.tokenizer(), **{**settings, **kwargs})


BOTH = [TaskLoss(weight=0.5), LogitKD(temperature=3.0)]


@pytest.mark.parametrize("kind", MODELS)
def test_without_a_teacher_it_is_the_plain_seq2seq_trainer(arguments, kind):
    runs, models = [], []
    for cls in (Seq2SeqTrainer, Seq2SeqDistillationTrainer):
        trainer = make_trainer(
            arguments(cls.__name__, max_steps=3, predict_with_generate=True, generation_max_length=8), kind, cls=cls
        )
        trainer.train()
        predicted = trainer.predict(trainer.eval_dataset)
        runs.append((losses(trainer, "loss", "grad_norm"), predicted.metrics["test_loss"], predicted.predictions))
        models.append(trainer.model)
    assert runs[0][:2] == runs[1][:2]
    np.testing.assert_array_equal(runs[0][2], runs[1][2])
    assert_equal_weights(*models)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("collator", [DataCollatorForSeq2Seq, WithoutDecoderInputs], ids=["prepared", "derived"])
def test_terms_are_those_of_the_models_own_outputs(arguments, kind, collator):
    """Both decoders read the labels shifted, whether the batch has them so or the model makes them; padding is out."""
    trainer = make_trainer(
        arguments(max_steps=1, per_device_train_batch_size=24, optim="sgd", learning_rate=0.0), kind, BOTH,
        collator=collator,
    )  # fmt: skip
    trainer.train()
    batch = trainer.data_collator([dict(row) for row in trainer.train_dataset])
    assert ("decoder_input_ids" in batch) == (collator is DataCollatorForSeq2Seq)
    with torch.no_grad():
        ours, theirs = (model.eval()(**batch) for model in (trainer.model, trainer.teacher_model))
    divergence = masked_mean(forward_kl(ours.logits, theirs.logits, 3.0), batch["labels"].ne(-100))
    expected = [0.5 * ours.loss.item() + divergence.item(), ours.loss.item(), divergence.item()]
    assert losses(trainer, "loss", "task_loss", "logit_kd")[0] == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("kind", MODELS)
def test_accumulated_micro_batches_give_the_update_of_one_batch(arguments, kind):
    results = []
    for size, steps in ((16, 1), (4, 4)):
        settings = dict(per_device_train_batch_size=size, gradient_accumulation_steps=steps, num_train_epochs=2)
        trainer = make_trainer(
            arguments(f"{size}", optim="sgd", learning_rate=0.05, **settings), kind, BOTH,
            train_dataset=translation(22),
        )  # fmt: skip
        trainer.train()
        results.append(trainer)
    names = ("loss", "grad_norm", "task_loss", "logit_kd")
    np.testing.assert_allclose(losses(results[0], *names), losses(results[1], *names), rtol=2e-3)
    assert_equal_weights(results[0].model, results[1].model, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("generate", [True, False])
@pytest.mark.parametrize("kind", MODELS)
def test_evaluation_and_generation_are_those_of_seq2seq_trainer(arguments, kind, generate):
    """`generate` refuses arguments that it does not know, such as columns that are the teacher's alone."""

    def with_column(dataset):
        return dataset.map(lambda row: {"teacher_input_ids": row["input_ids"]})

    class Collator(DataCollatorForSeq2Seq):
        def __call__(self, features, return_tensors=None):
            own = [{k: v for k, v in row.items() if not k.startswith("teacher_")} for row in features]
            batch = super().__call__(own, return_tensors)
            batch["teacher_input_ids"] = batch["input_ids"].clone()
            return batch

    results, seen = [], []
    for cls in (Seq2SeqTrainer, Seq2SeqDistillationTrainer):
        ours = cls is not Seq2SeqTrainer
        settings = GenerationConfig(
            max_length=7, num_beams=2, decoder_start_token_id=0, eos_token_id=3, pad_token_id=0
        )
        trainer = make_trainer(
            arguments(cls.__name__, predict_with_generate=generate, generation_config=settings if generate else None),
            kind, BOTH, cls=cls, **(dict(collator=Collator, eval_dataset=with_column(translation(10, seed=9))) if ours else {}),
            compute_metrics=lambda prediction: seen.append(np.asarray(prediction.predictions if generate else 0).shape) or {},
        )  # fmt: skip
        if ours:
            trainer.teacher_model.forward = lambda *args, **kwargs: pytest.fail("the teacher ran in evaluation")
        metrics = trainer.evaluate()
        predicted = trainer.predict(trainer.eval_dataset).predictions
        results.append((metrics["eval_loss"], predicted if generate else predicted[0]))
        if generate:
            assert predicted.shape[1] <= 7
    assert results[0][0] == results[1][0]
    np.testing.assert_array_equal(results[0][1], results[1][1])
    assert seen[0] == seen[-1]


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("objective", [HiddenStateKD(), AttentionKD()], ids=["hidden", "attention"])
def test_states_of_encoder_decoders_are_refused_at_construction(arguments, kind, objective):
    with pytest.raises(ValueError, match=r"encoder-decoders this release distils the logits alone: LogitKD"):
        make_trainer(arguments(), kind, [objective])


def whisper(seed=0, layers=1):
    set_seed(seed)
    config = WhisperConfig(
        vocab_size=40, num_mel_bins=8, d_model=16, encoder_layers=layers, decoder_layers=layers,
        encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32,
        max_source_positions=10, max_target_positions=12, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        decoder_start_token_id=1, suppress_tokens=None, begin_suppress_tokens=None, dropout=0.0, init_std=0.2,
    )  # fmt: skip
    return WhisperForConditionalGeneration(config).eval()


def test_speech_is_transcribed_as_the_teacher_does(arguments):
    rng = np.random.default_rng(0)
    rows = {
        "input_features": rng.normal(size=(8, 8, 20)).astype("float32").tolist(),
        "labels": [[1, *rng.integers(3, 40, size=4), 2, -100][: 5 + i % 3] + [-100] * (2 - i % 3) for i in range(8)],
    }
    data = Dataset.from_dict(rows).with_format("torch")
    trainer = Seq2SeqDistillationTrainer(
        whisper(0), arguments(max_steps=6, learning_rate=1e-2), train_dataset=data, eval_dataset=data,
        teacher_model=whisper(1, layers=2), objectives=[LogitKD(temperature=1.0)],
    )  # fmt: skip
    with torch.no_grad():
        batch = {key: data[:][key] for key in rows}
        ours, theirs = (model.eval()(**batch).logits for model in (trainer.model, trainer.teacher_model))
    expected = masked_mean(forward_kl(ours, theirs), batch["labels"].ne(-100)).item()
    trainer.train()
    (first,), *_, (last,) = losses(trainer, "logit_kd")
    assert first == pytest.approx(expected, rel=1e-3)
    assert last < first
