#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Mixed precision: each module of a text classifier gets the width it needs under a size, then training, against one width.

    accelerate launch examples/mixed_precision.py --model_name_or_path textattack/bert-base-uncased-rotten-tomatoes \
        --dataset cornell-movie-review-data/rotten_tomatoes --budget 0.13 --output_dir out/mixed

    python examples/mixed_precision.py --tiny --learning_rate 1e-3 --output_dir out/mixed
    accelerate launch examples/mixed_precision.py --preset gpu
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace
from pathlib import Path

import rich
from example_utils import NEWS, NEWS_TEACHER, load_classifier, parse, tokenize

from hfkdq import DistillationTrainer, LogitKD, QATCallback, QuantizationSpec, TaskLoss, suggest_bits
from hfkdq.metrics import classification_metrics

GPU = {**NEWS, "model_name_or_path": NEWS_TEACHER, "max_batches": 32, "output_dir": "out/mixed"}


@dataclass
class Arguments:
    model_name_or_path: str | None = field(default=None, metadata={"help": "Hub id or folder of a classifier."})
    dataset: str | None = field(
        default=None, metadata={"help": "Hub id, or a folder of train.parquet and test.parquet, with text and label."}
    )
    budget: float = field(default=0.13, metadata={"help": "Share of what the quantized weights take in float32."})
    bits: list[int] = field(default_factory=lambda: [8, 4, 2], metadata={"help": "Widths to choose from."})
    max_batches: int = field(default=8, metadata={"help": "Batches of 8 rows on which the outputs are compared."})
    max_seq_length: int = field(default=64, metadata={"help": "Tokens beyond this are cut off."})
    tiny: bool = field(default=False, metadata={"help": "Made-up sentences and model, to try the script in seconds."})


def main(argv: list[str] | None = None) -> None:
    args, training_args = parse(Arguments, argv, GPU, needs="model_name_or_path")
    raw, tokenizer, model = load_classifier(args, args.model_name_or_path)
    data = tokenize(raw, tokenizer, args.max_seq_length)

    sample = data["train"].shuffle(seed=training_args.seed)
    allocation = suggest_bits(
        model.to(training_args.device), sample, budget=args.budget, bits=args.bits, processing_class=tokenizer,
        max_batches=args.max_batches,
    )  # fmt: skip
    # The widest single width that fits, for comparison.
    width = next(bits for bits in allocation.widths if allocation.uniform(bits)[0] <= allocation.budget)
    uniform = QuantizationSpec(weight_bits=width, embedding_bits=width, head_bits=width)

    teacher = copy.deepcopy(model)  # which the trainer freezes

    def train(spec: QuantizationSpec, folder: str) -> DistillationTrainer:
        """A copy of the model, trained with this spec and the float model as its teacher."""
        trainer = DistillationTrainer(
            copy.deepcopy(model), replace(training_args, output_dir=folder), train_dataset=data["train"],
            eval_dataset=data["test"], processing_class=tokenizer, compute_metrics=classification_metrics,
            teacher_model=teacher, objectives=[TaskLoss(weight=0.5), LogitKD(temperature=2.0)],
            callbacks=[QATCallback(spec)],
        )  # fmt: skip
        trainer.train()
        return trainer

    single = train(uniform, str(Path(training_args.output_dir) / "uniform")).evaluate()
    trainer = train(allocation.spec, training_args.output_dir)
    mixed = trainer.evaluate()
    trainer.save_model()
    trainer.save_state()
    if not trainer.is_world_process_zero():
        return
    rich.print(allocation.table())
    plot = allocation.plot(Path(training_args.output_dir) / "bits.png")
    size, _ = allocation.uniform(width)
    print(f"Every weight in {width} bits: {size:,} bytes, accuracy {single['eval_accuracy']:.3f} after training.")
    print(f"Each module in its own width: {allocation.bytes:,} bytes, accuracy {mixed['eval_accuracy']:.3f}, {trainer.state.global_step} steps.")  # fmt: skip
    print(f"Saved in {training_args.output_dir}, the sensitivities in {plot}.")


if __name__ == "__main__":
    main()
