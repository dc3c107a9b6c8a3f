# SPDX-License-Identifier: Apache-2.0
"""Labels that a teacher writes: what `generate` gives row by row, kept in shards, resumed, filtered by errors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers as tf
from datasets import Dataset

from hfkdq import DistillationTrainer, LogitKD, TaskLoss, generate_targets, make_student
from hfkdq.caching import writer
from hfkdq.metrics import WordErrorRate

from .. import tiny


def rows(count=11, seed=0):
    rng = np.random.default_rng(seed)
    ids = [[*rng.integers(5, 90, size=rng.integers(2, 7)).tolist(), 3] for _ in range(count)]
    return Dataset.from_dict(
        {"input_ids": ids, "attention_mask": [[1] * len(i) for i in ids], "labels": [i[::-1] for i in ids], "number": range(count)}
    )  # fmt: skip


def collator():
    return tf.DataCollatorForSeq2Seq(tiny.tokenizer())


def expected(teacher, data, **settings):
    found = []
    for row in data:
        with torch.no_grad():
            ids = teacher.generate(torch.tensor([row["input_ids"]]), **settings)[0, 1:].tolist()
        found.append(ids[: ids.index(3) + 1] if 3 in ids else ids)
    return found


@pytest.mark.parametrize("beams", [1, 3])
def test_labels_are_what_the_teacher_writes(tmp_path, beams):
    teacher, data = tiny.t5(), rows()
    settings = dict(max_new_tokens=6, num_beams=beams)
    written = generate_targets(
        teacher, data, data_collator=collator(), folder=tmp_path / "t", batch_size=4, **settings
    )
    assert written["labels"] == expected(teacher, data, **settings)
    assert written.column_names == ["input_ids", "attention_mask", "number", "labels"]
    assert written["number"] == data["number"]


def test_a_run_that_was_stopped_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "SHARD_ROWS", 4)
    teacher, data, calls = tiny.t5(), rows(), []
    generate = teacher.generate

    def counted(**inputs):
        calls.append(len(inputs["input_ids"]))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return generate(**inputs)

    monkeypatch.setattr(teacher, "generate", counted)
    settings = dict(data_collator=collator(), folder=tmp_path / "t", batch_size=2, max_new_tokens=6)
    with pytest.raises(KeyboardInterrupt):
        generate_targets(teacher, data, **settings)
    again = generate_targets(teacher, data, **settings)
    assert calls == [2, 2, 2, *[2, 2, 2, 1]]  # the first shard is kept
    monkeypatch.undo()
    assert again["labels"] == expected(teacher, data, max_new_tokens=6)
    with pytest.raises(ValueError, match=r"cached for something else: generation was"):
        generate_targets(teacher, data, **{**settings, "max_new_tokens": 7})


def test_samples_are_drawn_alike(tmp_path):
    teacher, data = tiny.t5(), rows()
    settings = dict(data_collator=collator(), max_new_tokens=6, do_sample=True)
    first, again = (generate_targets(teacher, data, folder=tmp_path / name, **settings) for name in "ab")
    assert first["labels"] == again["labels"]
    assert first["labels"] != expected(teacher, data, max_new_tokens=6)


def test_rows_that_the_teacher_gets_wrong_are_left_out(tmp_path):
    teacher, tokenizer = tiny.t5(), tiny.tokenizer()
    data = rows()
    own = expected(teacher, data, max_new_tokens=6)
    mixed = [ids if i % 3 else [40, 41, 42, 3] for i, ids in enumerate(own)]
    data = data.remove_columns("labels").add_column("labels", mixed)
    how = dict(processing_class=tokenizer, data_collator=collator(), max_new_tokens=6)
    kept = generate_targets(teacher, data, folder=tmp_path / "t", max_wer=0.2, **how)
    texts = [tokenizer.batch_decode(ids, skip_special_tokens=True) for ids in (own, mixed)]
    right = [i for i, (said, true) in enumerate(zip(*texts, strict=True)) if said == true or (true and WordErrorRate.score([said], [true])["wer"] <= 0.2)]  # fmt: skip
    assert kept["number"] == right
    assert 0 < len(right) < len(data)
    with pytest.raises(ValueError, match="give labels, and processing_class="):
        generate_targets(teacher, data, max_wer=0.2, data_collator=collator())


def test_a_student_trains_on_them(tmp_path):
    teacher, data = tiny.t5(), rows()
    written = generate_targets(teacher, data, data_collator=collator(), folder=tmp_path / "t", max_new_tokens=6)
    args = tf.TrainingArguments(str(tmp_path / "out"), max_steps=2, use_cpu=True, report_to=[], disable_tqdm=True)
    trainer = DistillationTrainer(
        make_student(teacher, num_decoder_layers=1), args, train_dataset=written, data_collator=collator(),
        teacher_model=teacher, objectives=[TaskLoss(), LogitKD()],
    )  # fmt: skip
    assert trainer.train().training_loss > 0


def test_what_writes_no_text_is_refused():
    with pytest.raises(ValueError, match=r"needs an encoder-decoder.*OnPolicyKD"):
        generate_targets(tiny.llama(), rows())
    with pytest.raises(TypeError, match="whose rows have places, got list"):
        generate_targets(tiny.t5(), [{"input_ids": [1]}])
