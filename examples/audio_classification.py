#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Compress a transformer that classifies sounds to a GRU of one's own and its int8 file, with augmented spectrograms.

    accelerate launch examples/audio_classification.py --num_train_epochs 30 --output_dir out/gru \
        --teacher_model_name_or_path path/to/audio-spectrogram-transformer --dataset path/to/folder

    python examples/audio_classification.py --tiny --learning_rate 5e-3 --output_dir out/gru

The data are WAV files in 16 bits and mono as bytes in a column `audio`, with a class in `label`. Teacher and student read the same
log-mel spectrograms, stripes of which are blanked at random while training, as SpecAugment does (Park et al., 2019).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from datasets import Audio, load_dataset
from example_utils import parse, to_file, train_and_save
from speech_ctc import samples_of
from torch import Tensor, nn
from transformers import AutoFeatureExtractor, AutoModelForAudioClassification, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from hfkdq import DistillationTrainer, LogitKD, QATCallback, QuantizationSpec, TaskLoss
from hfkdq.metrics import classification_metrics


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
    args, training_args = parse(Arguments, argv, remove_unused_columns=False)
    if args.tiny:
        from made_up import sounds

        raw, extractor, teacher = sounds()
    else:
        raw = load_dataset(args.dataset).cast_column("audio", Audio(decode=False))
        names = raw["train"].features["label"].names
        extractor = AutoFeatureExtractor.from_pretrained(args.teacher_model_name_or_path)
        teacher = AutoModelForAudioClassification.from_pretrained(
            args.teacher_model_name_or_path, id2label=dict(enumerate(names)), label2id={n: i for i, n in enumerate(names)}
        )  # fmt: skip

    def heard(rows: Any, share: float = 0.0) -> dict[str, Tensor]:
        samples = [samples_of(sound["bytes"], extractor.sampling_rate) for sound in rows["audio"]]
        values = extractor(samples, sampling_rate=extractor.sampling_rate, return_tensors="pt")["input_values"]
        return {"input_values": masked(values, share) if share else values, "labels": torch.as_tensor(rows["label"])}

    def learned(rows: Any) -> dict[str, Tensor]:
        return heard(rows, args.masked_share)

    train, test = raw["train"].with_transform(learned), raw["test"].with_transform(heard)
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
