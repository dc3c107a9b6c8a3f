#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Prune a text classifier down to a share of its operations or parameters while the whole one teaches it.

    accelerate launch examples/prune_to_target.py --structure neuron --measure flops --target 0.7 --output_dir out/pruned \
        --teacher_model_name_or_path textattack/bert-base-uncased-rotten-tomatoes \
        --dataset cornell-movie-review-data/rotten_tomatoes

    python examples/prune_to_target.py --tiny --structure head --learning_rate 1e-3 --output_dir out/pruned
    accelerate launch examples/prune_to_target.py --preset gpu
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

from example_utils import NEWS, NEWS_TEACHER, load_classifier, parse, tokenize
from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    Trainer,
)

from hfkdq import (
    DistillationTrainer,
    HiddenStateKD,
    LogitKD,
    PruningCallback,
    PruningSpec,
    TaskLoss,
    fit_sparsity,
    load_pruned,
)
from hfkdq.metrics import classification_metrics

GPU = {**NEWS, "teacher_model_name_or_path": NEWS_TEACHER, "target": 0.6, "output_dir": "out/pruned"}


@dataclass
class Arguments:
    teacher_model_name_or_path: str | None = field(
        default=None, metadata={"help": "Hub id or folder of a classifier, which is also what is pruned."}
    )
    dataset: str | None = field(
        default=None, metadata={"help": "Hub id, or a folder of train.parquet and test.parquet, with text and label."}
    )
    structure: str = field(default="neuron", metadata={"help": "neuron, head or layer."})
    criterion: str = field(default="taylor", metadata={"help": "taylor, fisher, movement, activation or magnitude."})
    measure: str = field(default="flops", metadata={"help": "What the target is of: flops or parameters."})
    target: float = field(default=0.8, metadata={"help": "The share of it that may be left."})
    max_seq_length: int = field(default=64, metadata={"help": "Tokens beyond this are cut off."})
    tiny: bool = field(default=False, metadata={"help": "Made-up sentences and model, to try the script in seconds."})


def main(argv: list[str] | None = None) -> None:
    args, training_args = parse(Arguments, argv, GPU)
    raw, tokenizer, teacher = load_classifier(args, args.teacher_model_name_or_path)
    data = tokenize(raw, tokenizer, args.max_seq_length)
    common = dict(
        args=training_args, train_dataset=data["train"], eval_dataset=data["test"], processing_class=tokenizer,
        compute_metrics=classification_metrics,
    )  # fmt: skip

    student = copy.deepcopy(teacher)
    # No field of most configurations says how many heads are left; load_pruned reads it from what is recorded.
    most = PruningSpec(
        sparsity=0.95, structure=args.structure, criterion=args.criterion, end=0.6, plain_checkpoint=args.structure != "head"
    )  # fmt: skip
    sample = DataCollatorWithPadding(tokenizer)([data["train"][row] for row in range(8)])
    spec = fit_sparsity(student, most, inputs=sample, **{args.measure: args.target})

    trainer = DistillationTrainer(
        student, teacher_model=teacher, callbacks=[PruningCallback(spec)],
        objectives=[TaskLoss(weight=0.5), LogitKD(temperature=2.0), HiddenStateKD()], **common,
    )  # fmt: skip
    trainer.train()
    accuracy = [each.evaluate()["eval_accuracy"] for each in (Trainer(teacher, **common), trainer)]
    trainer.save_model()
    trainer.save_state()
    if not trainer.is_world_process_zero():
        return
    if spec.plain_checkpoint:
        loaded = AutoModelForSequenceClassification.from_pretrained(training_args.output_dir)
    else:
        loaded = load_pruned(training_args.output_dir)
    fact = loaded.config.hfkdq["pruning"]
    print(f"{fact['achieved_sparsity']:.0%} of the {args.structure}s went, for {args.target} of the {args.measure}.")
    print(f"{'':10}{'parameters':>12}{'accuracy':>10}")
    print(f"{'teacher':10}{fact['parameters_before']:>12,}{accuracy[0]:>10.3f}")
    print(f"{'pruned':10}{fact['parameters_after']:>12,}{accuracy[1]:>10.3f}")
    loads = "from_pretrained" if spec.plain_checkpoint else "load_pruned"
    print(f"{trainer.state.global_step} steps. Saved in {training_args.output_dir}, where {loads} finds it.")


if __name__ == "__main__":
    main()
