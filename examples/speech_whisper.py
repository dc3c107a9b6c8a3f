#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Distil Whisper as Distil-Whisper does: its encoder frozen, its decoder cut, on transcripts of the teacher, to int8 files.

    accelerate launch examples/speech_whisper.py --num_decoder_layers 2 --max_wer 0.1 --max_drop 0.01 --output_dir out/whisper \
        --teacher_model_name_or_path openai/whisper-small.en --dataset path/to/folder

    python examples/speech_whisper.py --tiny --learning_rate 2e-3 --output_dir out/whisper
    accelerate launch examples/speech_whisper.py --preset gpu

The teacher writes what it hears in every clip of the training; clips are left out in which it is further than `--max_wer` (word error
rate) from the text of the data, as those labels would be wrong (Gandhi et al., 2023). Files whose word error rate is more than
`--max_drop` above that of the student are refused. The data are those of examples/speech_ctc.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Audio
from example_utils import first_rows, load_splits, parse, to_file, train_and_save
from speech_ctc import samples_of
from transformers import AutoModelForSpeechSeq2Seq, AutoProcessor, Seq2SeqTrainingArguments

from hfkdq import LogitKD, QATCallback, QuantizationSpec, Seq2SeqDistillationTrainer, TaskLoss, make_student
from hfkdq.metrics import WordErrorRate, metrics_for

# The decoder of distil-small.en; learning rate, warmup, batch and 5,000 steps (here 14 epochs) of the README of Distil-Whisper.
GPU = {
    "teacher_model_name_or_path": "openai/whisper-small.en", "dataset": "keithito/lj_speech", "num_decoder_layers": 4,
    "max_drop": 0.01, "num_train_epochs": 14, "learning_rate": 1e-4, "lr_scheduler_type": "constant_with_warmup", "warmup_steps": 50,
    "per_device_train_batch_size": 32, "per_device_eval_batch_size": 32, "output_dir": "out/whisper",
}  # fmt: skip


@dataclass
class Arguments:
    teacher_model_name_or_path: str | None = field(default=None, metadata={"help": "Hub id or folder of a Whisper."})
    dataset: str | None = field(
        default=None, metadata={"help": "Hub id, or a folder of train.parquet and test.parquet, with audio and text."}
    )
    num_decoder_layers: int = field(default=1, metadata={"help": "Layers of the student's decoder, copied."})
    max_wer: float = field(
        default=0.1, metadata={"help": "Clips with a transcript further from their text are left out."}
    )
    max_drop: float | None = field(default=None, metadata={"help": "What integers may add to the word error rate."})
    max_samples: int | None = field(default=None, metadata={"help": "Clips of each split. All by default."})
    tiny: bool = field(default=False, metadata={"help": "Made-up tones and a small model, to try it in seconds."})


def main(argv: list[str] | None = None) -> None:
    # Sounds are read when they are needed, from a column that no model knows.
    defaults = dict(remove_unused_columns=False, predict_with_generate=True)
    args, training_args = parse(Arguments, argv, GPU, arguments=Seq2SeqTrainingArguments, **defaults)
    if args.tiny:
        from made_up import fit, spelled_sounds

        raw, processor, teacher = spelled_sounds(Path(training_args.output_dir))
    else:
        raw = load_splits(args.dataset).cast_column("audio", Audio(decode=False))
        processor = AutoProcessor.from_pretrained(args.teacher_model_name_or_path)
        teacher = AutoModelForSpeechSeq2Seq.from_pretrained(args.teacher_model_name_or_path)
    raw = first_rows(raw, args.max_samples)
    extractor, tokenizer = processor.feature_extractor, processor.tokenizer

    def features(sounds: list[Any]) -> Any:
        clips = [samples_of(sound["bytes"], extractor.sampling_rate) for sound in sounds]
        return extractor(clips, sampling_rate=extractor.sampling_rate, return_tensors="pt").input_features

    def encode(rows: Any) -> dict[str, Any]:
        written = tokenizer(rows["text"]).input_ids
        if all(ids[0] == teacher.config.decoder_start_token_id for ids in written):
            written = [ids[1:] for ids in written]  # which the model puts there itself
        return {"input_features": features(rows["audio"]), "labels": written}

    def collate(rows: list[Any]) -> dict[str, Any]:
        labels = tokenizer.pad([{"input_ids": row["labels"]} for row in rows], return_tensors="pt")
        return {
            "input_features": torch.stack([row["input_features"] for row in rows]),
            "labels": labels.input_ids.masked_fill(labels.attention_mask.eq(0), -100),
        }

    if args.tiny:
        fit(teacher, raw["train"].with_transform(encode), collate, steps=120, rate=3e-3)

    @torch.no_grad()
    def transcribed(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        written = teacher.generate(input_features=features(rows["audio"]).to(teacher.device))
        texts = processor.batch_decode(written, skip_special_tokens=True)
        wrong = [WordErrorRate.score([ours], [text])["wer"] for ours, text in zip(texts, rows["text"], strict=True)]
        return {"text": [text.strip() for text in texts], "wer": wrong}

    teacher.eval().to(training_args.device)
    with training_args.main_process_first():
        heard = raw["train"].map(transcribed, batched=True, batch_size=16, desc="Transcripts")
    train = heard.filter(lambda wer: wer <= args.max_wer, input_columns="wer")
    print(f"{len(train)} of {len(heard)} clips have a transcript with a word error rate of {args.max_wer} at most.")
    if not len(train):
        raise SystemExit(
            "Nothing is left to learn from. Raise --max_wer, or name a teacher that understands the data."
        )

    train, test = train.with_transform(encode), raw["test"].with_transform(encode)
    student = make_student(teacher, num_decoder_layers=args.num_decoder_layers)
    student.get_encoder().requires_grad_(False)
    metrics = metrics_for(student, processor)
    trainer = Seq2SeqDistillationTrainer(
        student, training_args, train_dataset=train, eval_dataset=test, processing_class=processor, data_collator=collate,
        compute_metrics=metrics, teacher_model=teacher, objectives=[TaskLoss(), LogitKD(temperature=2.0, weight=0.8)],
        callbacks=[QATCallback(QuantizationSpec())],
    )  # fmt: skip
    if train_and_save(trainer) is not None:
        to_file(trainer, teacher, test, timed=not args.tiny, max_drop=args.max_drop)


if __name__ == "__main__":
    main()
