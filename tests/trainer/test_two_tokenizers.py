# SPDX-License-Identifier: Apache-2.0
"""Students whose teachers read the same texts by another tokenizer, through the trainer."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    GPT2Config,
    GPT2ForSequenceClassification,
    PreTrainedTokenizerFast,
    Seq2SeqTrainingArguments,
    set_seed,
)

from hfkdq.collators import TeacherCollator
from hfkdq.losses import forward_kl
from hfkdq.losses.relations import sorted_distance
from hfkdq.objectives import VID, AttentionKD, HiddenStateKD, LogitKD, RelationKD, TaskLoss
from hfkdq.objectives.cross_vocabulary import ULD
from hfkdq.trainer import DistillationTrainer, Seq2SeqDistillationTrainer
from tests import tiny

from .common import losses


def letters():
    """A tokenizer that takes a text letter by letter and adds nothing."""
    vocabulary = {token: i for i, token in enumerate(["<end>", "<unk>", "w", *"0123456789"])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split("", "isolated")]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<end>", eos_token="<end>", unk_token="<unk>",
        model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip


def texts(rows=12, seed=0):
    rng = np.random.default_rng(seed)
    return [" ".join(f"w{i}" for i in rng.integers(0, 90, size=rng.integers(1, 6))) for _ in range(rows)]


def gpt2_classifier(seed=0):
    set_seed(seed)
    config = GPT2Config(
        vocab_size=len(letters()), n_embd=16, n_layer=1, n_head=2, n_positions=64, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0, initializer_range=0.2, num_labels=3, pad_token_id=0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return GPT2ForSequenceClassification(config).eval()


def test_a_bert_teaches_a_gpt2_to_classify(training_arguments):
    own, theirs = letters(), tiny.tokenizer()
    lines = texts()
    labels = [len(line) % 3 for line in lines]

    def tokenized(with_teacher):
        columns = dict(own(lines))
        if with_teacher:
            columns |= {f"teacher_{name}": ids for name, ids in theirs(lines).items()}
        return Dataset.from_dict({**columns, "labels": labels})

    assert tokenized(True)[0]["input_ids"] != tokenized(True)[0]["teacher_input_ids"]
    student, teacher = gpt2_classifier(), tiny.bert(1)
    with torch.no_grad():
        ours = student(**own(lines, padding=True, return_tensors="pt"), labels=torch.tensor(labels))
        # By themselves, so that nothing is padding.
        logits = torch.cat([teacher(**theirs(line, return_tensors="pt")).logits for line in lines])
        single = torch.cat([student(**own(line, return_tensors="pt")).logits for line in lines])
    expected = [ours.loss.item(), forward_kl(single, logits, 2.0).mean().item()]
    trainer = DistillationTrainer(
        student, training_arguments(max_steps=25, per_device_train_batch_size=12, learning_rate=1e-2),
        train_dataset=tokenized(True), eval_dataset=tokenized(False), teacher_model=teacher,
        objectives=[TaskLoss(weight=0.1), LogitKD()],
        data_collator=TeacherCollator(DataCollatorWithPadding(own), DataCollatorWithPadding(theirs)),
    )  # fmt: skip
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected[0], rel=1e-5)
    trainer.train()
    assert losses(trainer, "task_loss", "logit_kd")[0] == pytest.approx(expected, rel=1e-4)
    assert losses(trainer, "logit_kd")[-1][0] < 0.5 * expected[1]
    with_columns = trainer.evaluate(tokenized(True))["eval_loss"]
    assert with_columns == trainer.evaluate()["eval_loss"]


def answered(student_words, teacher_words):
    """Rows of prompt and answer lengths, with ids of either vocabulary."""
    rng, rows = np.random.default_rng(0), []
    for (prompt, answer), (other, others) in zip(student_words, teacher_words, strict=True):
        ids, theirs = rng.integers(5, 90, size=prompt + answer).tolist(), rng.integers(5, 120, size=other + others)
        rows.append(
            {
                "input_ids": ids, "attention_mask": [1] * len(ids), "labels": [-100] * prompt + ids[prompt:],
                "teacher_input_ids": theirs.tolist(), "teacher_attention_mask": [1] * len(theirs),
                "teacher_labels": [-100] * other + theirs[other:].tolist(),
            }
        )  # fmt: skip
    return Dataset.from_list(rows)


def test_uld_compares_answers_of_two_tokenizers_over_a_window(training_arguments):
    """What counts of a window is what the shorter answers have, however it is cut into micro batches."""
    lengths = [(2, 3), (1, 5), (4, 1), (3, 4), (2, 2), (1, 1)], [(3, 5), (2, 2), (5, 4), (1, 4), (4, 1), (2, 6)]
    data = answered(*lengths)
    student, teacher = tiny.llama(0), tiny.llama(1, vocab=120)
    values = []
    for row, (prompt, answer), (other, others) in zip(data, *lengths, strict=True):
        with torch.no_grad():
            ours = student(torch.tensor([row["input_ids"]])).logits[0, prompt - 1 :]
            theirs = teacher(torch.tensor([row["teacher_input_ids"]])).logits[0, other - 1 :]
        shorter = min(answer, others)
        values.append(sorted_distance(ours[:shorter], theirs[:shorter]))
    expected = torch.cat(values).mean().item()
    for size, steps in ((6, 1), (2, 3), (4, 2)):
        trainer = DistillationTrainer(
            tiny.llama(0), training_arguments(
                f"{size}", max_steps=12 if size == 6 else 1, per_device_train_batch_size=size, gradient_accumulation_steps=steps,
                learning_rate=1e-2,
            ),
            train_dataset=data, teacher_model=teacher, objectives=[ULD()],
            data_collator=TeacherCollator(*[DataCollatorForSeq2Seq(tiny.tokenizer())] * 2),
        )  # fmt: skip
        trainer.train()
        found = losses(trainer, "uld", "loss")
        assert found[0] == pytest.approx([expected, expected], rel=3e-4)
        if size == 6:
            assert found[-1][0] < 0.8 * expected


@pytest.mark.parametrize("decoder_inputs", [False, True], ids=["labels alone", "decoder inputs of the student"])
def test_the_decoder_of_a_teacher_reads_its_own_labels(training_arguments, decoder_inputs):
    student, teacher = tiny.t5(0), tiny.t5(1, vocab=130)
    rng = np.random.default_rng(0)
    rows = []
    for n in (2, 4, 3, 5):
        ids, theirs = rng.integers(5, 90, size=(2, n)).tolist(), rng.integers(5, 120, size=(2, 7 - n)).tolist()
        rows.append(
            {"input_ids": ids[0], "labels": ids[1], "teacher_input_ids": theirs[0], "teacher_labels": theirs[1]}
        )
    for row in rows:
        row["attention_mask"], row["teacher_attention_mask"] = (
            [1] * len(row[k]) for k in ("input_ids", "teacher_input_ids")
        )
    values = []
    for row in rows:
        own, theirs = (
            {k: torch.tensor([row[f"{prefix}{k}"]]) for k in ("input_ids", "labels")} for prefix in ("", "teacher_")
        )
        shorter = min(own["labels"].shape[1], theirs["labels"].shape[1])
        with torch.no_grad():
            pair = student(**own).logits[0, :shorter], teacher(**theirs).logits[0, :shorter]
        values.append(sorted_distance(*pair))
    own = DataCollatorForSeq2Seq(tiny.tokenizer(), model=student if decoder_inputs else None)
    trainer = Seq2SeqDistillationTrainer(
        student, training_arguments(cls=Seq2SeqTrainingArguments, max_steps=1),
        train_dataset=Dataset.from_list(rows), teacher_model=teacher, objectives=[ULD()],
        data_collator=TeacherCollator(own, DataCollatorForSeq2Seq(tiny.tokenizer())),
    )  # fmt: skip
    trainer.train()
    assert losses(trainer, "uld")[0][0] == pytest.approx(torch.cat(values).mean().item(), rel=1e-4)


def test_what_lies_along_the_tokens_of_the_student_is_not_the_teachers(training_arguments):
    """The student has token types and a mask, the tokenizer of the teacher makes neither."""
    student, teacher, seen = tiny.bert(0), tiny.bert(1, vocab_size=300), []
    rows = tiny.text_dataset(8).map(
        lambda row: {"token_type_ids": [1] * len(row["input_ids"]), "teacher_input_ids": [7, 8, 9, 200, 201]}
    )
    data = rows.map(
        lambda row: {name: (row[name] + [0] * 12)[:12] for name in ("input_ids", "attention_mask", "token_type_ids")}
    )
    trainer = DistillationTrainer(
        student, training_arguments(max_steps=1), train_dataset=data.with_format("torch"), teacher_model=teacher,
        objectives=[LogitKD()],
    )  # fmt: skip
    teacher.register_forward_pre_hook(lambda module, args, kwargs: seen.append(set(kwargs)), with_kwargs=True)
    trainer.train()
    assert seen[0] & {"input_ids", "attention_mask", "token_type_ids"} == {"input_ids"}


@pytest.mark.parametrize(
    "objective", [HiddenStateKD(), RelationKD(), AttentionKD(), VID(), LogitKD()], ids=lambda o: o.name
)
@pytest.mark.parametrize("same_length", [True, False])
def test_positions_of_other_tokens_are_not_compared(objective, same_length, training_arguments):
    make = tiny.bert_mlm if isinstance(objective, LogitKD) else tiny.bert
    theirs = [7] * (9 if same_length else 6)
    rows = [{"input_ids": [3] * 9, "teacher_input_ids": theirs, "teacher_attention_mask": [1] * len(theirs)}] * 8
    trainer = DistillationTrainer(
        make(0), training_arguments(max_steps=1), train_dataset=Dataset.from_list(rows), teacher_model=make(1),
        objectives=[objective], data_collator=lambda rows: {k: torch.tensor([row[k] for row in rows]) for k in rows[0]},
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"tokens of its own \(teacher_input_ids\).* RKD"):
        trainer.train()
