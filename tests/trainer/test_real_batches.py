# SPDX-License-Identifier: Apache-2.0
"""Objectives see what models return for rows of the user's own where no example can be made up of a configuration."""

import pytest
import torch
import transformers as tf
from torch.nn import functional as F
from torch.utils.data import IterableDataset

from hfkdq.caching import cache_teacher_outputs
from hfkdq.losses import forward_kl
from hfkdq.objectives import HiddenStateKD, LogitKD, RelationKD, TaskLoss
from hfkdq.trainer import DistillationTrainer
from tests import tiny

from .common import assert_equal_weights, losses, weights

_LAYERS = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
_STILL = dict(_LAYERS, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, initializer_range=0.3, num_labels=3)


def _random(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def _ids(high, *shape):
    return torch.randint(4, high, shape, generator=torch.Generator().manual_seed(0))


def _choices(**kwargs):
    return tf.BertForMultipleChoice(tiny.bert_config(**{"initializer_range": 0.3, **kwargs}))


def _video():
    config = tf.VideoMAEConfig(**_STILL, image_size=16, patch_size=8, num_frames=4, tubelet_size=2)
    return tf.VideoMAEForVideoClassification(config)


def _sound():
    shape = dict(max_length=24, num_mel_bins=16, patch_size=8, frequency_stride=8, time_stride=8)
    return tf.ASTForAudioClassification(tf.ASTConfig(**_STILL, **shape))


def _picture():
    towers = dict(
        vision_config=dict(**_LAYERS, image_size=16, patch_size=8), text_config=dict(**_LAYERS, vocab_size=60)
    )
    return tf.SiglipForImageClassification(tf.SiglipConfig(**towers, num_labels=3))


def _sight_and_text():
    return tf.LlavaForConditionalGeneration(
        tf.LlavaConfig(
            vision_config=tf.CLIPVisionConfig(**_LAYERS, image_size=16, patch_size=8),
            text_config=tf.LlamaConfig(
                **_LAYERS, vocab_size=60, num_key_value_heads=2, initializer_range=0.3, pad_token_id=0
            ),
            image_token_index=59,
        )
    )


def _speech(**kwargs):
    settings = dict(
        vocab_size=60, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=48, decoder_ffn_dim=48, dropout=0.0, init_std=0.3, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        decoder_start_token_id=2, max_source_positions=64, max_target_positions=32, input_feat_per_channel=8,
        input_channels=1, conv_channels=16, conv_kernel_sizes=[3, 3], num_conv_layers=2,
    )  # fmt: skip
    return tf.Speech2TextForConditionalGeneration(tf.Speech2TextConfig(**{**settings, **kwargs}))


def _characters():
    return tf.CanineForSequenceClassification(
        tf.CanineConfig(**_STILL, num_hash_buckets=64, max_position_embeddings=64, local_transformer_stride=16)
    )


def _seen():
    ids = _ids(56, 4, 12)
    ids[:, 1:5] = 59
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": _random(4, 3, 16, 16)}


_CLASSES = torch.tensor([0, 1, 2, 1])
_HEARD = {"input_features": _random(4, 40, 8), "attention_mask": torch.ones(4, 40, dtype=torch.long)}
KINDS = {
    "choices": (_choices, {"input_ids": _ids(60, 4, 3, 10), "labels": _CLASSES}),
    "video": (_video, {"pixel_values": _random(4, 4, 3, 16, 16), "labels": _CLASSES}),
    "spectrum": (_sound, {"input_values": _random(4, 24, 16), "labels": _CLASSES}),
    "one of two towers": (_picture, {"pixel_values": _random(4, 3, 16, 16), "labels": _CLASSES}),
    "image and text": (_sight_and_text, {**_seen(), "labels": _seen()["input_ids"].masked_fill(_ids(59, 4, 12) < 20, -100)}),
    "speech": (_speech, {**_HEARD, "labels": _ids(60, 4, 6)}),
}  # fmt: skip


def _made(build, seed):
    tf.set_seed(seed)
    return build().eval()


class Stream(IterableDataset):
    """Rows that can be had once."""

    def __init__(self, rows):
        self.rows = iter(rows)

    def __iter__(self):
        yield from self.rows


def _rows(batch, times=1):
    return [{key: value[i] for key, value in batch.items()} for i in range(4)] * times


def _trainer(arguments, student, teacher, objectives, rows, **kwargs):
    return DistillationTrainer(
        student, arguments, teacher_model=teacher, objectives=objectives, train_dataset=rows, **kwargs
    )


def _expected(kind, student, teacher, batch):
    labels = batch["labels"]
    with torch.no_grad():
        found = forward_kl(student(**batch).logits, teacher(**batch).logits, 2.0)
    if kind == "image and text":
        return found[:, :-1][labels[:, 1:] != -100].mean().item()
    return found.mean().item()


@pytest.mark.parametrize("stream", [False, True], ids=["rows with places", "stream"])
@pytest.mark.parametrize("kind", KINDS)
def test_predictions_are_compared_whatever_the_models_read(kind, stream, training_arguments):
    build, batch = KINDS[kind]
    student, teacher = _made(build, 0), _made(build, 1)
    expected = _expected(kind, student, teacher, batch)
    rows = _rows(batch)
    trainer = _trainer(
        training_arguments(max_steps=1, per_device_train_batch_size=4), student, teacher, [LogitKD()],
        Stream(rows) if stream else rows,
    )  # fmt: skip
    trainer.train()
    assert losses(trainer, "logit_kd")[0][0] == pytest.approx(expected, rel=1e-4)


def test_a_stream_loses_no_row_and_learned_projections_reach_the_optimizer(training_arguments):
    rows = _rows(KINDS["choices"][1], times=3)
    student, teacher = _made(_choices, 0), _made(lambda: _choices(hidden=48), 1)
    trainer = _trainer(
        training_arguments(max_steps=3, per_device_train_batch_size=4), student, teacher, [TaskLoss(), HiddenStateKD()],
        Stream(rows),
    )  # fmt: skip
    trainer.train()
    assert trainer.state.global_step == 3
    (projection, _) = trainer._distillation.projections.maps.values()
    assert any(projection.weight is p for group in trainer.optimizer.param_groups for p in group["params"])
    assert projection.weight in trainer.optimizer.state
    assert not any("hfkdq" in name for name, _ in student.named_parameters())


def test_rows_that_are_looked_at_change_nothing_of_a_training(training_arguments):
    """Whether an example was given or rows were drawn, with dropout and rows that are changed at random."""

    class Noisy(torch.utils.data.Dataset):
        def __init__(self, rows):
            self.rows = rows

        def __len__(self):
            return len(self.rows)

        def __getitem__(self, i):
            return {**self.rows[i], "input_ids": self.rows[i]["input_ids"].roll(int(torch.randint(5, ())))}

    batch, trained, states = KINDS["choices"][1], [], []
    for number, example in enumerate((None, batch)):
        student, teacher = _made(lambda: _choices(hidden_dropout_prob=0.2), 0), _made(_choices, 1)
        trainer = _trainer(
            training_arguments(f"{number}", max_steps=3), student, teacher, [TaskLoss(), LogitKD()],
            Noisy(_rows(batch, times=3)), example_inputs=example,
        )  # fmt: skip
        states.append(torch.random.get_rng_state())
        trainer.train()
        trained.append(trainer.model)
    assert torch.equal(*states)
    assert_equal_weights(*trained)


def test_a_stopped_training_on_a_stream_goes_on_exactly(training_arguments):
    batch = KINDS["choices"][1]

    def trainer(**kwargs):
        return _trainer(
            training_arguments(max_steps=4, per_device_train_batch_size=4, save_steps=2, save_strategy="steps", **kwargs),
            _made(_choices, 0), _made(_choices, 1), [TaskLoss(), LogitKD()], Stream(_rows(batch, times=4)),
        )  # fmt: skip

    whole, resumed = trainer(), trainer()
    whole.train()
    resumed.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-2")
    assert_equal_weights(whole.model, resumed.model)


def test_projections_that_would_come_too_late_are_refused_and_an_example_helps(training_arguments):
    batch = KINDS["choices"][1]

    def trainer(**kwargs):
        return _trainer(
            training_arguments(max_steps=2, per_device_train_batch_size=4, save_steps=1, save_strategy="steps"),
            _made(_choices, 0), _made(lambda: _choices(hidden=48), 1), [TaskLoss(), HiddenStateKD()],
            Stream(_rows(batch, times=2)), **kwargs,
        )  # fmt: skip

    whole = trainer(example_inputs=batch)
    whole.train()
    checkpoint = f"{whole.args.output_dir}/checkpoint-1"
    with pytest.raises(ValueError, match=r"goes on from a checkpoint.*example_inputs=batch"):
        trainer().train(resume_from_checkpoint=checkpoint)
    resumed = trainer(example_inputs=batch)
    resumed.train(resume_from_checkpoint=checkpoint)
    assert_equal_weights(whole.model, resumed.model)


def test_what_does_not_fit_is_refused_before_a_weight_changes(training_arguments):
    student = _made(_choices, 0)
    before = weights(student)
    rows = _rows(KINDS["choices"][1])
    with pytest.raises(ValueError, match="predict different things"):
        _trainer(training_arguments(), student, _made(_video, 1), [LogitKD()], rows)
    trainer = _trainer(training_arguments(max_steps=1), student, _made(_video, 1), [HiddenStateKD()], Stream(rows))
    with pytest.raises(ValueError, match=r"VideoMAEForVideoClassification does not run on the batch.*example_inputs"):
        trainer.train()
    assert all(torch.equal(value, before[key]) for key, value in student.state_dict().items())


def test_a_model_that_failed_when_it_was_tried_is_as_before(training_arguments):
    """Transformers 4 leaves functions of its own in layers whose states it records when a model fails."""
    student, teacher = _made(_sound, 0), _made(_sound, 1)
    hooks = {name: len(module._forward_hooks) for name, module in student.named_modules()}
    for objective in (HiddenStateKD(), RelationKD(), HiddenStateKD(layers={1: 7})):
        with pytest.raises(ValueError, match=r"does not run on the batch|out of range"):
            _trainer(
                training_arguments(), student, teacher, [HiddenStateKD(projection=True), objective], None,
                example_inputs={"input_values": _random(1, 24, 16 if objective.layers else 5)},
            )  # fmt: skip
    assert not any("forward" in vars(module) for module in student.modules())
    assert not any("hfkdq" in name for name, _ in student.named_modules())
    if int(tf.__version__.split(".")[0]) < 5:  # which lets hooks of its own stay for the next time
        assert {name: len(module._forward_hooks) for name, module in student.named_modules()} == hooks


def test_cached_outputs_of_such_models_train_as_their_teacher_does(tmp_path, training_arguments):
    from datasets import Dataset

    batch = {**KINDS["choices"][1]}
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    rows = Dataset.from_dict({key: value.tolist() for key, value in batch.items()}).with_format("torch")
    student, teacher = _made(_choices, 0), _made(_choices, 1)
    expected = _expected("choices", student, teacher, batch)
    cached = cache_teacher_outputs(teacher, rows, folder=tmp_path / "cache", dtype="float16", hidden_states=[2])
    trainer = _trainer(
        training_arguments(max_steps=1, per_device_train_batch_size=4), student, None, [LogitKD()], cached
    )
    trainer.train()
    assert losses(trainer, "logit_kd")[0][0] == pytest.approx(expected, rel=2e-3)


def test_hidden_states_of_every_choice_count_by_its_own_mask(training_arguments):
    batch = {**KINDS["choices"][1]}
    batch["attention_mask"] = (torch.arange(10) < 4 + torch.arange(12).reshape(4, 3, 1) % 6).long()
    student, teacher = _made(_choices, 0), _made(_choices, 1)
    with torch.no_grad():
        states = [m(**batch, output_hidden_states=True).hidden_states for m in (student, teacher)]
    mask = batch["attention_mask"].flatten(0, 1).bool()
    expected = sum(F.mse_loss(states[0][i][mask], states[1][i][mask]).item() for i in (1, 2)) / 2
    trainer = _trainer(
        training_arguments(max_steps=1, per_device_train_batch_size=4),
        student,
        teacher,
        [HiddenStateKD()],
        _rows(batch),
    )
    trainer.train()
    assert losses(trainer, "hidden_state_kd")[0][0] == pytest.approx(expected, rel=1e-4)
