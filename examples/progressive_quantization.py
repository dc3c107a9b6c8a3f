#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Progressive distillation: from hard labels to soft ones, with quantization faded in over the second half.

    accelerate launch examples/progressive_quantization.py --num_student_layers 3 --output_dir out/progressive \
        --teacher_model_name_or_path textattack/bert-base-uncased-rotten-tomatoes \
        --dataset cornell-movie-review-data/rotten_tomatoes

    python examples/progressive_quantization.py --tiny --learning_rate 1e-3 --output_dir out/progressive
"""

from __future__ import annotations

from dataclasses import dataclass, field

from datasets import load_dataset
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    HfArgumentParser,
    TrainingArguments,
    set_seed,
)

from hfkdq import (
    DistillationTrainer,
    LogitKD,
    QATCallback,
    QuantizationLoss,
    QuantizationSpec,
    TaskLoss,
    load_quantized,
    make_student,
)
from hfkdq.metrics import classification_metrics
from hfkdq.schedules import Linear

WEIGHTS = {"task_loss": Linear(1, 0), "logit_kd": Linear(0, 1), "quantization_loss": Linear(0, 1, begin=0.5)}


@dataclass
class Arguments:
    teacher_model_name_or_path: str | None = field(
        default=None, metadata={"help": "Hub id or folder of a classifier."}
    )
    dataset: str | None = field(
        default=None, metadata={"help": "Hub id, or a folder of train.parquet and test.parquet, with text and label."}
    )
    num_student_layers: int = field(default=1, metadata={"help": "Layers of the student, copied from the teacher."})
    max_seq_length: int = field(default=64, metadata={"help": "Tokens beyond this are cut off."})
    tiny: bool = field(default=False, metadata={"help": "Made-up sentences and model, to try the script in seconds."})


def main(argv: list[str] | None = None) -> None:
    parser = HfArgumentParser((Arguments, TrainingArguments))
    parser.set_defaults(logging_steps=5, save_strategy="no", report_to="none")
    args, training_args = parser.parse_args_into_dataclasses(argv)
    set_seed(training_args.seed)
    if args.tiny:
        from made_up import text_classification

        raw, tokenizer, (teacher,) = text_classification()
    else:
        if args.dataset is None or args.teacher_model_name_or_path is None:
            parser.error("Give --dataset and --teacher_model_name_or_path, or --tiny.")
        raw = load_dataset(args.dataset)
        tokenizer = AutoTokenizer.from_pretrained(args.teacher_model_name_or_path)
        teacher = AutoModelForSequenceClassification.from_pretrained(
            args.teacher_model_name_or_path, num_labels=raw["train"].features["label"].num_classes
        )
    data = raw.map(
        lambda rows: tokenizer(rows["text"], truncation=True, max_length=args.max_seq_length),
        batched=True, remove_columns=["text"],
    )  # fmt: skip

    trainer = DistillationTrainer(
        make_student(teacher, num_layers=args.num_student_layers), training_args, train_dataset=data["train"],
        eval_dataset=data["test"], processing_class=tokenizer, compute_metrics=classification_metrics,
        teacher_model=teacher,
        objectives=[
            TaskLoss(weight=WEIGHTS["task_loss"]),
            LogitKD(temperature=2.0, weight=WEIGHTS["logit_kd"]),
            QuantizationLoss(objective=LogitKD(temperature=1.0), weight=WEIGHTS["quantization_loss"]),
        ],
        callbacks=[QATCallback(QuantizationSpec())],
    )  # fmt: skip
    trainer.train()
    metrics = trainer.evaluate()
    trainer.save_model()
    trainer.save_state()
    if not trainer.is_world_process_zero():
        return
    print("  step" + "".join(f"{name:>19} x weight" for name in WEIGHTS))
    for row in (row for row in trainer.state.log_history if "loss" in row):
        progress = row["step"] / trainer.state.max_steps
        print(f"{row['step']:6}" + "".join(f"{row[name]:19.2g} x {weight(progress):6.2f}" for name, weight in WEIGHTS.items()))  # fmt: skip
    student = load_quantized(training_args.output_dir)
    print(f"{trainer.state.global_step} steps; accuracy in 8 bits {metrics['eval_accuracy']:.3f}.")
    print(f"Saved in {training_args.output_dir}, a quantized {type(student).__name__}.")


if __name__ == "__main__":
    main()
