#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Distil a speech recognizer: symbols per frame of sound, from clips of different length.

    accelerate launch examples/speech_ctc.py --num_student_layers 12 --output_dir out/ctc \
        --teacher_model_name_or_path facebook/wav2vec2-large-960h-lv60-self --dataset path/to/folder

    python examples/speech_ctc.py --tiny --learning_rate 1e-3 --output_dir out/ctc

The data are WAV files in 16 bits and mono as bytes in a column `audio`, with what is said in a column `text`.
"""

from __future__ import annotations

import io
import wave
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Audio, load_dataset
from example_utils import parse, steps_and_terms, train_and_save
from scipy.signal import resample_poly
from transformers import AutoModelForCTC, AutoProcessor

from hfkdq import DistillationTrainer, LogitKD, TaskLoss, make_student


@dataclass
class Arguments:
    teacher_model_name_or_path: str | None = field(default=None, metadata={"help": "Hub id or folder of a CTC model."})
    dataset: str | None = field(
        default=None, metadata={"help": "Hub id, or a folder of train.parquet and test.parquet, with audio and text."}
    )
    num_student_layers: int = field(default=2, metadata={"help": "Layers of the student, copied from the teacher."})
    tiny: bool = field(default=False, metadata={"help": "Made-up tones and a small model, to try it in seconds."})


def samples_of(wav: bytes, rate: int) -> np.ndarray:
    """The sound of a WAV file, at `rate` samples per second."""
    with wave.open(io.BytesIO(wav)) as sound:
        if (sound.getsampwidth(), sound.getnchannels()) != (2, 1):
            raise ValueError("Expected WAV files in 16 bits and mono.")
        samples = np.frombuffer(sound.readframes(sound.getnframes()), "<i2").astype(np.float32) / 32768
        own = sound.getframerate()
    return samples if own == rate else resample_poly(samples, rate, own).astype(np.float32)


def main(argv: list[str] | None = None) -> None:
    args, training_args = parse(Arguments, argv)
    if args.tiny:
        from made_up import fit, speech

        raw, processor, teacher = speech(Path(training_args.output_dir))
    else:
        raw = load_dataset(args.dataset).cast_column("audio", Audio(decode=False))
        processor = AutoProcessor.from_pretrained(args.teacher_model_name_or_path)
        teacher = AutoModelForCTC.from_pretrained(args.teacher_model_name_or_path, ctc_zero_infinity=True)
    extractor, tokenizer = processor.feature_extractor, processor.tokenizer
    change_case = str.upper if "A" in tokenizer.get_vocab() else str.lower

    def encode(row: Any) -> dict[str, Any]:
        samples = samples_of(row["audio"]["bytes"], extractor.sampling_rate)
        values = extractor(samples, sampling_rate=extractor.sampling_rate).input_values[0]
        return {"input_values": values, "labels": tokenizer(change_case(row["text"])).input_ids}

    def collate(rows: list[Any]) -> dict[str, Any]:
        sounds = [{"input_values": row["input_values"]} for row in rows]
        # The mask keeps frames of padding out of every term.
        batch = extractor.pad(sounds, padding=True, return_attention_mask=True, return_tensors="pt")
        texts = tokenizer.pad([{"input_ids": row["labels"]} for row in rows], return_tensors="pt")
        return {**batch, "labels": texts.input_ids.masked_fill(texts.attention_mask.eq(0), -100)}

    def right_texts(prediction: Any) -> dict[str, float]:
        logits, labels = prediction.predictions, prediction.label_ids
        # Frames that the Trainer added to make batches alike have -100 everywhere.
        frames = np.where((logits == -100).all(-1), tokenizer.pad_token_id, logits.argmax(-1))
        said = processor.batch_decode(np.where(labels == -100, tokenizer.pad_token_id, labels), group_tokens=False)
        return {
            "accuracy": float(np.mean([a == b for a, b in zip(processor.batch_decode(frames), said, strict=True)]))
        }

    data = raw.map(encode, remove_columns=raw["train"].column_names)
    if args.tiny:
        fit(teacher, data["train"], collate, steps=160, rate=3e-3)
    trainer = DistillationTrainer(
        make_student(teacher, num_layers=args.num_student_layers), training_args, train_dataset=data["train"],
        eval_dataset=data["test"], processing_class=processor, data_collator=collate, compute_metrics=right_texts,
        teacher_model=teacher, objectives=[TaskLoss(weight=0.5), LogitKD(temperature=1.0)],
    )  # fmt: skip
    metrics = train_and_save(trainer)
    if metrics is None:
        return
    print(f"{steps_and_terms(trainer)}; texts that are right {metrics['eval_accuracy']:.3f}.")
    print(f"Saved in {training_args.output_dir}.")


if __name__ == "__main__":
    main()
