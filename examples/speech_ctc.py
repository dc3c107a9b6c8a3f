#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Distil a speech recognizer to an int8 file: symbols per frame of sound, from clips of different length.

    accelerate launch examples/speech_ctc.py --num_student_layers 12 --output_dir out/ctc \
        --teacher_model_name_or_path facebook/wav2vec2-large-960h-lv60-self --dataset path/to/folder

    python examples/speech_ctc.py --tiny --learning_rate 1e-3 --output_dir out/ctc
    python examples/speech_ctc.py --tiny --gru_width 64 --learning_rate 5e-3 --output_dir out/gru
    accelerate launch examples/speech_ctc.py --preset gpu

The data are WAV files in 16 bits and mono as bytes in a column `audio`, with what is said in a column `text`. `--clips 3` joins as many of
them at random, as digits to numbers. `--gru_width` makes the student a GRU of one's own, which hears nothing of what comes later; its teacher
reads spectrograms, as Wav2Vec2-BERT does, and has a frame for each of theirs.
"""

from __future__ import annotations

import io
import wave
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Audio
from example_utils import load_splits, parse, steps_and_terms, to_file, train_and_save
from scipy.signal import resample_poly
from torch import Tensor, nn
from transformers import AutoModelForCTC, AutoProcessor, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from hfkdq import DistillationTrainer, LogitKD, QATCallback, QuantizationSpec, TaskLoss, make_student
from hfkdq.metrics import metrics_for

GPU = {
    "teacher_model_name_or_path": "facebook/wav2vec2-large-robust-ft-libri-960h", "dataset": "edinburghcstr/ami:ihm",
    "num_student_layers": 12, "num_train_epochs": 5, "learning_rate": 1e-4, "warmup_steps": 1000,
    "per_device_train_batch_size": 16, "per_device_eval_batch_size": 16, "output_dir": "out/ctc",
}  # fmt: skip


@dataclass
class Arguments:
    teacher_model_name_or_path: str | None = field(default=None, metadata={"help": "Hub id or folder of a CTC model."})
    dataset: str | None = field(
        default=None, metadata={"help": "Hub id, or a folder of train.parquet and test.parquet, with audio and text."}
    )
    num_student_layers: int = field(default=2, metadata={"help": "Layers of the student, copied from the teacher."})
    gru_width: int | None = field(default=None, metadata={"help": "Units of a GRU, in the place of such layers."})
    clips: int = field(default=1, metadata={"help": "How many clips are joined, with their texts."})
    tiny: bool = field(default=False, metadata={"help": "Made-up tones and a small model, to try it in seconds."})


class GRUForCTCConfig(PretrainedConfig):
    model_type = "gru_ctc"

    def __init__(self, bands: int = 80, width: int = 64, vocab_size: int = 32, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.bands, self.width, self.vocab_size = bands, width, vocab_size


class GRUForCTC(PreTrainedModel):
    """Symbols (batch, frames, vocab_size) of spectrograms (batch, frames, bands); padding comes after all that is heard."""

    config_class = GRUForCTCConfig
    main_input_name = "input_features"

    def __init__(self, config: GRUForCTCConfig) -> None:
        super().__init__(config)
        self.gru = nn.GRU(config.bands, config.width, num_layers=2, batch_first=True)
        self.lm_head = nn.Linear(config.width, config.vocab_size)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        pass  # PyTorch's own are meant for recurrent layers

    def forward(
        self, input_features: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None
    ) -> CausalLMOutput:
        logits, loss = self.lm_head(self.gru(input_features)[0]), None
        if labels is not None:
            heard = torch.full(logits.shape[:1], logits.shape[1]) if attention_mask is None else attention_mask.sum(-1)
            loss = nn.functional.ctc_loss(
                logits.log_softmax(-1).transpose(0, 1), labels.clamp(min=0), heard, (labels >= 0).sum(-1),
                blank=self.config.pad_token_id, zero_infinity=True,
            )  # fmt: skip
        return CausalLMOutput(loss=loss, logits=logits)


def samples_of(wav: bytes, rate: int) -> np.ndarray:
    """The sound of a WAV file, at `rate` samples per second."""
    with wave.open(io.BytesIO(wav)) as sound:
        if (sound.getsampwidth(), sound.getnchannels()) != (2, 1):
            raise ValueError("Expected WAV files in 16 bits and mono.")
        samples = np.frombuffer(sound.readframes(sound.getnframes()), "<i2").astype(np.float32) / 32768
        own = sound.getframerate()
    return samples if own == rate else resample_poly(samples, rate, own).astype(np.float32)


def main(argv: list[str] | None = None) -> None:
    args, training_args = parse(Arguments, argv, GPU)
    if args.tiny:
        from made_up import fit, spectrograms, speech

        made = speech if args.gru_width is None else spectrograms
        raw, processor, teacher = made(Path(training_args.output_dir))
    else:
        raw = load_splits(args.dataset).cast_column("audio", Audio(decode=False))
        processor = AutoProcessor.from_pretrained(args.teacher_model_name_or_path)
        teacher = AutoModelForCTC.from_pretrained(args.teacher_model_name_or_path, ctc_zero_infinity=True)
    extractor, tokenizer = processor.feature_extractor, processor.tokenizer
    names = (extractor.model_input_names[0], "attention_mask")
    change_case = str.upper if "A" in tokenizer.get_vocab() else str.lower

    def encode(rows: Any) -> dict[str, Any]:
        samples = [samples_of(sound["bytes"], extractor.sampling_rate) for sound in rows["audio"]]
        spoken = [change_case(text) for text in rows["text"]]
        starts = range(0, len(spoken), args.clips)
        sounds = [np.concatenate(samples[start : start + args.clips]) for start in starts]
        texts = [" ".join(spoken[start : start + args.clips]) for start in starts]
        heard = [extractor(sound, sampling_rate=extractor.sampling_rate) for sound in sounds]
        inputs = {name: [one[name][0] for one in heard] for name in names if name in heard[0]}
        return inputs | {"labels": tokenizer(texts).input_ids}

    def collate(rows: list[Any]) -> dict[str, Any]:
        sounds = [{name: np.asarray(row[name]) for name in names if name in row} for row in rows]
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

    mixed = raw.shuffle(seed=training_args.seed) if args.clips > 1 else raw
    data = mixed.map(encode, batched=True, batch_size=60 * args.clips, remove_columns=raw["train"].column_names)
    if args.tiny:
        fit(teacher, data["train"], collate, steps=160, rate=3e-3)
    if args.gru_width is None:
        student = make_student(teacher, num_layers=args.num_student_layers)
    else:
        sizes = dict(bands=len(data["train"][0][names[0]][0]), width=args.gru_width)
        student = GRUForCTC(
            GRUForCTCConfig(**sizes, vocab_size=len(tokenizer), pad_token_id=teacher.config.pad_token_id)
        )
    trainer = DistillationTrainer(
        student, training_args, train_dataset=data["train"], eval_dataset=data["test"], processing_class=processor,
        data_collator=collate, compute_metrics=right_texts, teacher_model=teacher,
        objectives=[TaskLoss(weight=0.5), LogitKD(temperature=1.0)], callbacks=[QATCallback(QuantizationSpec())],
    )  # fmt: skip
    metrics = train_and_save(trainer)
    if metrics is None:
        return
    to_file(trainer, teacher, data["test"], timed=not args.tiny, metrics=metrics_for(teacher, processor))
    print(f"{steps_and_terms(trainer)}; texts that are right {metrics['eval_accuracy']:.3f}.")
    print(f"Saved in {training_args.output_dir}.")


if __name__ == "__main__":
    main()
