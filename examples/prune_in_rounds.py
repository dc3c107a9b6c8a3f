#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Prune a text classifier in rounds, each followed by training, as far as it keeps a share of its teacher's accuracy.

    accelerate launch examples/prune_in_rounds.py --rounds 6 --keep 0.99 --num_train_epochs 6 --output_dir out/rounds \
        --teacher_model_name_or_path textattack/bert-base-uncased-rotten-tomatoes \
        --dataset cornell-movie-review-data/rotten_tomatoes

    python examples/prune_in_rounds.py --tiny --learning_rate 1e-3 --output_dir out/rounds
    accelerate launch examples/prune_in_rounds.py --preset gpu
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

from example_utils import NEWS, NEWS_TEACHER, load_classifier, parse, tokenize
from transformers import (
    Trainer,
)

from hfkdq import DistillationTrainer, LogitKD, PruningCallback, PruningSpec, TaskLoss
from hfkdq.metrics import classification_metrics

GPU = {
    **NEWS, "teacher_model_name_or_path": NEWS_TEACHER, "rounds": 6, "keep": 0.99, "num_train_epochs": 6, "output_dir": "out/rounds",
}  # fmt: skip


@dataclass
class Arguments:
    teacher_model_name_or_path: str | None = field(
        default=None, metadata={"help": "Hub id or folder of a classifier, which is also what is pruned."}
    )
    dataset: str | None = field(
        default=None, metadata={"help": "Hub id, or a folder of train.parquet and test.parquet, with text and label."}
    )
    structure: str = field(default="neuron", metadata={"help": "neuron or layer."})
    sparsity: float = field(default=0.9, metadata={"help": "What is removed if no round is too far."})
    rounds: int = field(default=4, metadata={"help": "In how many steps the sparsity grows."})
    keep: float = field(default=0.97, metadata={"help": "The share of the teacher's accuracy to be kept."})
    max_seq_length: int = field(default=64, metadata={"help": "Tokens beyond this are cut off."})
    tiny: bool = field(default=False, metadata={"help": "Made-up sentences and model, to try the script in seconds."})


def main(argv: list[str] | None = None) -> None:
    args, training_args = parse(Arguments, argv, GPU)
    # Until the last step, so that every round has the same time to recover.
    spec = PruningSpec(
        sparsity=args.sparsity, structure=args.structure, criterion="taylor", rounds=args.rounds, end=1.0
    )
    raw, tokenizer, teacher = load_classifier(args, args.teacher_model_name_or_path)
    data = tokenize(raw, tokenizer, args.max_seq_length)
    common = dict(
        args=training_args, train_dataset=data["train"], eval_dataset=data["test"], processing_class=tokenizer,
        compute_metrics=classification_metrics,
    )  # fmt: skip

    bound = args.keep * Trainer(teacher, **common).evaluate()["eval_accuracy"]
    trainer = DistillationTrainer(
        copy.deepcopy(teacher), teacher_model=teacher, objectives=[TaskLoss(weight=0.5), LogitKD(temperature=2.0)],
        callbacks=[PruningCallback(spec, metric="accuracy", at_least=bound)], **common,
    )  # fmt: skip
    trainer.train()
    trainer.save_model()
    trainer.save_state()
    if not trainer.is_world_process_zero():
        return
    for row in trainer.state.log_history:
        if "eval_accuracy" in row:
            sparsity = spec.sparsity_at(row["step"] / trainer.state.max_steps)
            verdict = "kept" if row["eval_accuracy"] >= bound else f"below {bound:.3f}, so undone"
            print(f"step {row['step']:6}: {sparsity:6.1%} of the {args.structure}s gone, accuracy {row['eval_accuracy']:.3f}, {verdict}")  # fmt: skip
    fact = trainer.model.config.hfkdq["pruning"]
    print(f"{trainer.state.global_step} steps. {fact['achieved_sparsity']:.1%} of the {args.structure}s are removed: "
          f"{fact['parameters_after']:,} of {fact['parameters_before']:,} parameters, saved in {training_args.output_dir}.")  # fmt: skip


if __name__ == "__main__":
    main()
