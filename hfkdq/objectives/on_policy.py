# SPDX-License-Identifier: Apache-2.0
"""Distillation on what the student itself writes: it answers the prompts of a batch, and the teacher scores that."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar

import torch
from transformers import GenerationConfig, PreTrainedModel

from ..fields import COUNT, POSITIVE, SHARE, Rule
from ..modeling.forwards import base_of, evaluating
from ..modeling.masks import Batch, Positions, attended_mask, batch_size
from ..schedules import Schedule
from .base import Objective, Passes, TrainingStep
from .logits import LogitKD
from .model_signature import ModelSignature

_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "forced_bos_token_id")


@dataclass(frozen=True, kw_only=True)
class OnPolicyKD(Objective):
    """Divergence on answers that the student samples, so that it learns from the mistakes that it really makes.

    For a batch the student answers its prompts with probability `fraction`: `y ~ student(. | x)`, without a gradient, in
    eval mode. The term is `mean over (x, y) of mean over t of D(teacher(. | x, y_<t), student(. | x, y_<t))`. Otherwise
    `y` are the answers of the batch. Agarwal et al., "On-Policy Distillation of Language Models: Learning from
    Self-Generated Mistakes" (2024), algorithm 1; with the reverse KL divergence after Gu et al., "MiniLLM: Knowledge
    Distillation of Large Language Models" (2024).

    The prompt of a language model are the tokens before the first one that has a label; where the first token has one,
    or there are no labels, it is that token. Of an encoder-decoder it is what the encoder reads. An answer ends with the
    end token of `student.generation_config`, after `max_new_tokens`, or where the positions of a model end. All of the
    student's distribution is sampled from, whatever else `generation_config` says; it stays as it is.

    Args:
        objective (`LogitKD`, defaults to `LogitKD(divergence="reverse_kl", temperature=1.0)`): how teacher and student
            are compared, at every token of an answer; `per` is always `"sample"` here.
        fraction (`float` or schedule, defaults to 1.0): the probability, in [0, 1], that the student writes the answers
            of a batch.
        max_new_tokens (`int`, defaults to 64): the length of an answer, in tokens, at most.
        sampling_temperature (`float`, defaults to 1.0): the student's logits are divided by it for sampling.
        weight, teacher: as of every [`Objective`]; 1.0 and none by default.

    Raises:
        ValueError: a fraction outside of [0, 1], another number that is not larger than 0, or an `objective` with a weight
            or teacher of its own; at `attach`, a student that writes no text, cached outputs in the place of a teacher,
            or what [`LogitKD`] raises; in training, a prompt as long as the positions of a model.

    Example:
        ```python
        >>> from hfkdq.objectives import LogitKD
        >>> from hfkdq import OnPolicyKD
        >>> from hfkdq.schedules import Linear
        >>> OnPolicyKD(objective=LogitKD(divergence="jsd", temperature=1.0), fraction=Linear(0.0, 1.0)).name
        'on_policy_kd'

        ```
    """

    schedules: ClassVar[frozenset[str]] = frozenset({"weight", "fraction"})

    objective: LogitKD = field(default_factory=lambda: LogitKD(divergence="reverse_kl", temperature=1.0))
    fraction: Annotated[float | Schedule, Rule("is a probability, within [0, 1]", SHARE.holds)] = 1.0
    max_new_tokens: Annotated[int, COUNT] = 64
    sampling_temperature: Annotated[float, POSITIVE] = 1.0
    _inner: LogitKD = field(init=False, repr=False, compare=False)
    _longest: int | None = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.objective, LogitKD):
            raise ValueError(f"OnPolicyKD compares predictions: objective must be a LogitKD, got {self.objective!r}.")
        if self.objective.weight != 1.0 or self.objective.teacher is not None:
            raise ValueError(f"Give weight and teacher to OnPolicyKD itself, not to its objective {self.objective!r}.")

    def attach(self, student: PreTrainedModel, teacher: PreTrainedModel | ModelSignature | None) -> None:
        super().attach(student, teacher)
        base = base_of(student)
        if not base.can_generate() or base.main_input_name != "input_ids":
            raise ValueError(
                f"OnPolicyKD lets the student write texts in answer to texts, and {type(base).__name__} cannot. Use a "
                "student such as AutoModelForCausalLM or AutoModelForSeq2SeqLM gives, or LogitKD, which needs no answers."
            )
        if isinstance(teacher, ModelSignature):
            raise ValueError(
                "Cached outputs are of the texts of a dataset, and OnPolicyKD asks the teacher about texts that the student "
                "writes. Give the teacher itself as teacher_model."
            )
        inner = replace(self.objective, per="sample")
        inner.attach(student, teacher)
        limits = [getattr(model.config, "max_position_embeddings", None) for model in (base, base_of(teacher))]
        longest = min((n for n in limits if isinstance(n, int) and n > 0), default=None)
        self._keep(_inner=inner, _longest=longest)

    def positions(self, batch: Batch) -> Positions:
        return batch_size(batch)

    def run_forward(self, passes: Passes, step: TrainingStep) -> TrainingStep:
        """With probability `fraction`, lets the student answer the prompts, and both models read what it wrote."""
        fraction = step.at(self.fraction)
        # From the generator on the CPU, whose state is in every checkpoint.
        if fraction <= 0.0 or float(torch.rand((), device="cpu")) >= fraction:
            return step
        model = passes.model
        write = self._translated if base_of(model).config.is_encoder_decoder else self._continued
        written = write(model, step.batch)
        return replace(step, batch=written, student=passes.student(written), teacher=passes.teacher(written))

    def loss(self, step: TrainingStep) -> torch.Tensor:
        return self._inner.loss(step)

    def _continued(self, model: Any, batch: Batch) -> dict[str, torch.Tensor]:
        """Prompts and answers of a model without encoder, as it would get them for training: padded on the right."""
        is_prompt = _prompts(batch)
        width = int(is_prompt.sum(1).max())
        prompts, mask = (x[:, -width:] for x in _ordered(is_prompt, batch["input_ids"], is_prompt))
        texts, kept = self._sampled(model, prompts.masked_fill(~mask, 0), mask, prompt_length=width)
        valid = torch.cat([mask, kept], dim=1)
        answer = torch.cat([torch.zeros_like(mask), kept], dim=1)
        found = _ordered(~valid, texts.masked_fill(~valid, 0), texts.masked_fill(~answer, -100), valid.long())
        longest = int(valid.sum(1).max())
        return dict(zip(("input_ids", "labels", "attention_mask"), (x[:, :longest] for x in found), strict=True))

    def _translated(self, model: Any, batch: Batch) -> dict[str, torch.Tensor]:
        ids, mask = batch["input_ids"], batch.get("attention_mask")
        mask = torch.ones_like(ids) if mask is None else mask
        texts, kept = self._sampled(model, ids, mask, prompt_length=1)
        labels = texts[:, 1:].masked_fill(~kept, -100)
        return {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": texts[:, :-1], "labels": labels}

    @torch.no_grad()
    def _sampled(
        self, model: Any, ids: torch.Tensor, mask: torch.Tensor, prompt_length: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Prompts with what the student writes, and which of the new tokens are an answer: all up to its end."""
        base = base_of(model)
        own, settings = base.generation_config, self._settings(base.generation_config, prompt_length)
        base.generation_config = settings  # what the model's own one says beyond the settings would be added to them
        try:
            with evaluating(model):
                found = model.generate(input_ids=ids, attention_mask=mask.long(), generation_config=settings)
        finally:
            base.generation_config = own
            # Weights cast here have no gradient; older releases of PyTorch give them to the student's own pass too.
            torch.clear_autocast_cache()
        ends = torch.as_tensor([] if own.eos_token_id is None else own.eos_token_id, device=found.device)
        is_end = torch.isin(found[:, prompt_length:], ends)
        return found, is_end.cumsum(1) - is_end.long() == 0

    def _settings(self, own: GenerationConfig, prompt_length: int) -> GenerationConfig:
        longest, count = self._longest, self.max_new_tokens
        if longest is not None:
            count = min(count, longest - prompt_length)
        if count < 1:
            raise ValueError(
                f"The longest prompt of a batch has {prompt_length} tokens, and the models have {longest} positions, so "
                "there is no room for an answer. Shorten the prompts."
            )
        tokens = {name: getattr(own, name, None) for name in _TOKENS}
        if tokens["pad_token_id"] is None:  # fills up answers after their end, where it is not read
            tokens["pad_token_id"] = 0
        return GenerationConfig(
            do_sample=True, temperature=float(self.sampling_temperature), top_k=0, top_p=1.0, max_new_tokens=count, **tokens
        )  # fmt: skip


def _prompts(batch: Batch) -> torch.Tensor:
    """Mask of the prompt tokens, `(batch, seq)`: at least one in every row."""
    labels, attended = batch.get("labels"), attended_mask(batch)
    if attended is None:
        attended = torch.ones_like(batch["input_ids"], dtype=torch.bool)
    answers = attended if labels is None else attended & labels.ne(-100)
    prompt = attended & (answers.cumsum(1) == 0)
    first = attended & (attended.cumsum(1) == 1)
    return torch.where(prompt.any(1, keepdim=True), prompt, first)


def _ordered(last: torch.Tensor, *tensors: torch.Tensor) -> list[torch.Tensor]:
    """Tensors of shape `(batch, seq)` with the positions of `last` at the end of each row, otherwise in their order."""
    order = last.long().argsort(dim=1, stable=True)
    return [tensor.gather(1, order) for tensor in tensors]
