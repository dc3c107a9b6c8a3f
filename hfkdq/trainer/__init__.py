# SPDX-License-Identifier: Apache-2.0
"""`DistillationTrainer`: the Transformers `Trainer` with a teacher and objectives, and the same of `Seq2SeqTrainer`."""

from __future__ import annotations

from transformers import Seq2SeqTrainer, Trainer

from .mixin import DistillationMixin

__all__ = ["DistillationMixin", "DistillationTrainer", "Seq2SeqDistillationTrainer"]


class DistillationTrainer(DistillationMixin, Trainer):
    """The Transformers `Trainer` with a teacher.

    Takes everything `Trainer` takes, in the same positions, with plain `TrainingArguments`. Without `objectives` it is
    `Trainer`. Loss terms are means over all valid positions of an optimizer step, over accumulated micro batches and
    processes alike; every term is logged under its own name. Evaluation is plain `Trainer`: the teacher is not run.

    Args:
        args, kwargs: what `transformers.Trainer` takes. `callbacks` may be a function of the trial, as `objectives`.
        teacher_model (`PreTrainedModel`, `PeftModel` or `str`, *optional*): the model to learn from, or the Hub id or
            folder to load it from. It is frozen and put into eval mode in place, and is in no optimizer and no
            checkpoint. `model.get_base_model()` of a PEFT student stands for the student without its adapters; no
            second copy is kept then. Also an [`EMATeacher`] (the student's own moving average), a
            [`CoTrainedTeacher`] (a peer that learns along), or a `dict` of teachers by name, of which objectives name
            theirs. Not needed where `train_dataset` comes from [`cache_teacher_outputs`].
        teacher_init_kwargs (`dict`, *optional*): arguments of `from_pretrained` where the teacher is a `str`, such as
            `dtype`, `device_map` or `quantization_config`.
        objectives (list of objectives or callables, or a function of the trial, *optional*): the terms of the training
            loss, such as `[TaskLoss(weight=0.5), LogitKD(temperature=2.0)]`. A callable
            `f(student_out, teacher_out, batch)` returns a mean over the examples. A function that takes the trial of a
            hyperparameter search returns such a list anew for every trial; outside of a search it gets `None`.
        strict_resume (`bool`, defaults to `True`): refuse to resume from a checkpoint that was written with another
            teacher or other objectives; `False` warns instead.
        example_inputs (`dict`, *optional*): a batch as the collator makes it, on which objectives see what the models
            return, and callbacks that prune try the student. By default an example made up of their configurations; where that does not do, the first rows of
            `train_dataset`, or of a stream the first batch of the training, before any weight changes.

    Raises:
        ValueError: no objectives for a teacher, objectives that need one where there is none or name one that is not
            there, a teacher that shares parameters with the student, an objective that does not fit the pair, or cached
            outputs of another teacher than the one given.
        TypeError: a student or teacher that is no Transformers model, or an objective that cannot be called.
        NotImplementedError: FSDP1, `torch.nn.DataParallel`, tensor, context or sequence parallelism; a model that
            DeepSpeed ZeRO-3 split while it was loaded; or, under FSDP2 and DeepSpeed, teachers that change and objectives
            that take passes of their own.
        RuntimeError: while training, at the first step at which the teacher's logits are not finite.

    Example:
        ```python
        trainer = DistillationTrainer(
            model=student, teacher_model=teacher, args=TrainingArguments("out"),
            objectives=[TaskLoss(weight=0.5), LogitKD(temperature=2.0)],
            train_dataset=train, eval_dataset=dev, processing_class=tokenizer)
        trainer.train()
        ```
    """


class Seq2SeqDistillationTrainer(DistillationMixin, Seq2SeqTrainer):
    """The Transformers `Seq2SeqTrainer` with a teacher: [`DistillationTrainer`] for encoder-decoders.

    Evaluates with `predict_with_generate` as `Seq2SeqTrainer` does. A teacher whose decoder input is not in the batch
    derives it from the labels.

    Args:
        args, kwargs: what `transformers.Seq2SeqTrainer` and [`DistillationTrainer`] take.
    """
