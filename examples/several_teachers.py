#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Learn from two teachers at once, from the student's own moving average, or together with a peer.

    accelerate launch examples/several_teachers.py --kind ensemble --num_student_layers 3 --output_dir out/ensemble \
        --model_names_or_paths textattack/bert-base-uncased-rotten-tomatoes textattack/distilbert-base-uncased-rotten-tomatoes \
        --dataset cornell-movie-review-data/rotten_tomatoes

    python examples/several_teachers.py --kind peer --tiny --learning_rate 1e-3 --output_dir out/peer
    accelerate launch examples/several_teachers.py --preset gpu

All models must read the tokens of the first one's tokenizer: for teachers with others, see `language_model.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from example_utils import NEWS, NEWS_TEACHER, load_splits, parse, steps_and_terms, tokenize, train_and_save
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from hfkdq import CoTrainedTeacher, DistillationTrainer, EMATeacher, EnsembleKD, LogitKD, TaskLoss, make_student
from hfkdq.metrics import classification_metrics

GPU = {
    **NEWS, "model_names_or_paths": [NEWS_TEACHER, "textattack/distilbert-base-uncased-ag-news"], "num_student_layers": 6,
    "output_dir": "out/ensemble",
}  # fmt: skip


@dataclass
class Arguments:
    kind: Literal["ensemble", "average", "peer"] = field(default="ensemble", metadata={"help": "Who teaches."})
    model_names_or_paths: list[str] = field(
        default_factory=list, metadata={"help": "Two classifiers; of an ensemble the teachers. An average needs one."}
    )
    dataset: str | None = field(
        default=None, metadata={"help": "Hub id, or a folder of train.parquet and test.parquet, with text and label."}
    )
    num_student_layers: int = field(
        default=1, metadata={"help": "Layers of the student, copied from the first model."}
    )
    max_seq_length: int = field(default=64, metadata={"help": "Tokens beyond this are cut off."})
    tiny: bool = field(default=False, metadata={"help": "Made-up sentences and models, to try the script in seconds."})


def main(argv: list[str] | None = None) -> None:
    args, training_args = parse(Arguments, argv, GPU, needs="model_names_or_paths")
    wanted = 1 if args.kind == "average" else 2
    if args.tiny:
        from made_up import text_classification

        raw, tokenizer, models = text_classification(teachers=wanted)
    else:
        if len(args.model_names_or_paths) < wanted:
            raise SystemExit(f"Give {wanted} --model_names_or_paths.")
        raw = load_splits(args.dataset)
        names = args.model_names_or_paths
        tokenizer = AutoTokenizer.from_pretrained(names[0])
        labels = raw["train"].features["label"].names
        settings = dict(id2label=dict(enumerate(labels)), label2id={name: i for i, name in enumerate(labels)})
        models = [AutoModelForSequenceClassification.from_pretrained(name, **settings) for name in names[:wanted]]
    data = tokenize(raw, tokenizer, args.max_seq_length)

    student = make_student(models[0], num_layers=args.num_student_layers)
    if args.kind == "ensemble":
        teacher = {f"teacher{i}": model for i, model in enumerate(models, 1)}
        # Of each example the teacher counts more that is nearer to its label.
        objectives = [TaskLoss(weight=0.5), EnsembleKD(objective=LogitKD(temperature=2.0), weighting="confidence")]
    elif args.kind == "average":
        teacher = EMATeacher(decay=0.9 if args.tiny else 0.999)
        objectives = [TaskLoss(), LogitKD(temperature=1.0)]
    else:
        teacher = CoTrainedTeacher(models[1])  # it learns from the student what the student learns from it
        objectives = [TaskLoss(), LogitKD(temperature=1.0)]
    trainer = DistillationTrainer(
        student, training_args, train_dataset=data["train"], eval_dataset=data["test"], processing_class=tokenizer,
        compute_metrics=classification_metrics, teacher_model=teacher, objectives=objectives,
    )  # fmt: skip
    metrics = train_and_save(trainer)
    if metrics is None:
        return
    saved = [training_args.output_dir]
    if args.kind != "ensemble":  # a teacher that changed is a result as well
        saved.append(str(Path(training_args.output_dir, args.kind)))
        trainer.teacher_model.save_pretrained(saved[-1])
        tokenizer.save_pretrained(saved[-1])
    print(f"{steps_and_terms(trainer)}; accuracy {metrics['eval_accuracy']:.3f}.")
    print(f"Saved in {' and '.join(saved)}.")


if __name__ == "__main__":
    main()
