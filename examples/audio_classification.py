#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Compress a transformer that classifies sounds to a GRU of one's own and its int8 file, with augmented spectrograms.

    accelerate launch examples/audio_classification.py --num_train_epochs 30 --output_dir out/gru \
        --teacher_model_name_or_path path/to/audio-spectrogram-transformer --dataset path/to/folder

    python examples/audio_classification.py --tiny --learning_rate 5e-3 --output_dir out/gru
    accelerate launch examples/audio_classification.py --preset gpu

The data are WAV files in 16 bits and mono as bytes in a column `audio`, with a class in `label`: the teacher's of the
same name, and sounds of a class that it does not know are left out. Teacher and student read the same log-mel spectrograms, stripes of
which are blanked at random while training, as SpecAugment does (Park et al., 2019).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from datasets import Audio
from example_utils import load_splits, parse, to_file, train_and_save
from speech_ctc import samples_of
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoModelForAudioClassification,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import SequenceClassifierOutput

from hfkdq import DistillationTrainer, LogitKD, QATCallback, QuantizationSpec, TaskLoss
from hfkdq.metrics import classification_metrics

# 30 epochs of 128 sounds, of which 48 of 128 frames and bands may be blanked: AST on Speech Commands (Gong et al., 2021).
GPU = {
    "teacher_model_name_or_path": "MIT/ast-finetuned-speech-commands-v2", "dataset": "google/speech_commands:v0.02",
    "width": 256, "masked_share": 0.375, "num_train_epochs": 30, "learning_rate": 1e-3, "warmup_steps": 500,
    "per_device_train_batch_size": 128, "per_device_eval_batch_size": 128, "output_dir": "out/gru",
}  # fmt: skip


@dataclass
class Arguments:
    teacher_model_name_or_path: str | None = field(default=None, metadata={"help": "Hub id or folder of an AST."})
    dataset: str | None = field(
        default=None, metadata={"help": "Hub id, or a folder of train.parquet and test.parquet, with audio and label."}
    )
    width: int = field(default=64, metadata={"help": "Units of the student's GRU."})
    masked_share: float = field(default=0.15, metadata={"help": "Widest stripe of time and of pitch that is blanked."})
    tiny: bool = field(default=False, metadata={"help": "Made-up tones and a small model, to try it in seconds."})


class GRUConfig(PretrainedConfig):
    model_type = "gru_audio_classifier"

    def __init__(self, bands: int = 128, width: int = 64, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.bands, self.width = bands, width


class GRUForAudioClassification(PreTrainedModel):
    """Reads spectrograms (batch, frames, bands) frame by frame; the logits come from the mean of what it remembers."""

    config_class = GRUConfig
    main_input_name = "input_values"

    def __init__(self, config: GRUConfig) -> None:
        super().__init__(config)
        self.gru = nn.GRU(config.bands, config.width, batch_first=True)
        self.classifier = nn.Linear(config.width, config.num_labels)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        pass  # PyTorch's own are meant for recurrent layers

    def forward(self, input_values: Tensor, labels: Tensor | None = None) -> SequenceClassifierOutput:
        logits = self.classifier(self.gru(input_values)[0].mean(dim=1))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


def masked(spectrograms: Tensor, share: float) -> Tensor:
    """Spectrograms (batch, frames, bands) with a stripe of frames and one of bands set to their mean."""
    kept = torch.ones_like(spectrograms, dtype=torch.bool)
    for sound in kept:
        for axis, length in enumerate(sound.shape):
            width = int(torch.randint(int(share * length) + 1, ()))
            sound.narrow(axis, int(torch.randint(length - width + 1, ())), width).fill_(False)
    return spectrograms.where(kept, spectrograms.mean(dim=(1, 2), keepdim=True))


def main(argv: list[str] | None = None) -> None:
    # Sounds are read when they are needed, from a column that no model knows.
    args, training_args = parse(Arguments, argv, GPU, remove_unused_columns=False)
    if args.tiny:
        from made_up import sounds

        raw, extractor, teacher = sounds()
    else:
        raw = load_splits(args.dataset).cast_column("audio", Audio(decode=False))
        names = raw["train"].features["label"].names
        extractor = AutoFeatureExtractor.from_pretrained(args.teacher_model_name_or_path)
        config = AutoConfig.from_pretrained(args.teacher_model_name_or_path)
        if not set(names) & set(config.label2id):  # it has numbers alone, which are those of the data
            config.id2label, config.label2id = dict(enumerate(names)), {name: i for i, name in enumerate(names)}
        teacher = AutoModelForAudioClassification.from_pretrained(args.teacher_model_name_or_path, config=config)
    classes = [teacher.config.label2id.get(name) for name in raw["train"].features["label"].names]
    known = raw.filter(lambda label: classes[label] is not None, input_columns="label")
    print(f"{len(known['train'])} of {len(raw['train'])} sounds are of a class that the teacher knows.")

    def heard(rows: Any, share: float = 0.0) -> dict[str, Tensor]:
        samples = [samples_of(sound["bytes"], extractor.sampling_rate) for sound in rows["audio"]]
        values = extractor(samples, sampling_rate=extractor.sampling_rate, return_tensors="pt")["input_values"]
        labels = torch.as_tensor([classes[label] for label in rows["label"]])
        return {"input_values": masked(values, share) if share else values, "labels": labels}

    def learned(rows: Any) -> dict[str, Tensor]:
        return heard(rows, args.masked_share)

    train, test = known["train"].with_transform(learned), known["test"].with_transform(heard)
    if args.tiny:
        from made_up import fit

        fit(teacher, train, None)
    config = GRUConfig(
        bands=extractor.num_mel_bins, width=args.width, id2label=teacher.config.id2label, label2id=teacher.config.label2id
    )  # fmt: skip
    trainer = DistillationTrainer(
        GRUForAudioClassification(config), training_args, train_dataset=train, eval_dataset=test,
        processing_class=extractor, compute_metrics=classification_metrics, teacher_model=teacher,
        objectives=[TaskLoss(weight=0.5), LogitKD(temperature=2.0)], callbacks=[QATCallback(QuantizationSpec())],
    )  # fmt: skip
    if train_and_save(trainer) is not None:
        to_file(trainer, teacher, test, timed=not args.tiny, metrics=classification_metrics)


if __name__ == "__main__":
    main()
