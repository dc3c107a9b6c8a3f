# SPDX-License-Identifier: Apache-2.0
"""Objectives on further passes: on inputs with noise or against both models, and of the student in full precision."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
from torch import nn
from transformers import PreTrainedModel

from ..modeling.forwards import TEACHER_PREFIX, base_of, full_precision, hooked
from ..modeling.masks import Batch, Positions, attended_mask
from .base import Objective, Passes, TrainingStep
from .logits import LogitKD
from .model_signature import ModelSignature


@dataclass(frozen=True, kw_only=True)
class ExtraForwardPasses(Objective):
    """Another objective, evaluated on extra forward passes."""

    objective: Objective = field(default_factory=LogitKD)

    def __post_init__(self) -> None:
        super().__post_init__()
        inner, name = self.objective, type(self).__name__
        if not isinstance(inner, Objective) or not inner.uses_teacher or "loss" in inner.needs:
            raise ValueError(f"{name}: objective must compare with a teacher, as LogitKD() does, got {inner!r}.")
        looks_inside = type(inner).capture is not Objective.capture
        if looks_inside or inner.runs_first or inner.uses_all_teachers or inner.teacher is not None:
            raise ValueError(
                f"{name} evaluates {type(inner).__name__} on passes of its own, which works for objectives on what models "
                "return, such as LogitKD() and HiddenStateKD(). A teacher's name goes to the outer objective."
            )

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        return self.objective.needs

    def attach(self, student: PreTrainedModel, teacher: PreTrainedModel | ModelSignature | None) -> None:
        super().attach(student, teacher)
        self.objective.attach(student, teacher)

    def indices(self, need: str) -> tuple[frozenset[int], frozenset[int]] | None:
        return self.objective.indices(need)

    def positions(self, batch: Batch) -> Positions:
        return self.objective.positions(batch)

    def loss(self, step: TrainingStep) -> torch.Tensor:
        return self.objective.loss(step)

    def _read(self, role: int) -> dict[str, Any]:
        found = {need: self.indices(need) for need in ("hidden_states", "attentions") if need in self.objective.needs}
        return {need: None if both is None else both[role] for need, both in found.items()}


@dataclass(frozen=True, kw_only=True)
class NoisyKD(ExtraForwardPasses):
    """Another objective, with noise in what the student reads while the teacher reads the input as it is.

    `D(teacher(x), student(x + noise))`: the student learns to give the clean answer. Costs one more pass of the student
    per step. Noisy Student (Xie et al., "Self-training with Noisy Student improves ImageNet classification", 2020);
    Jiang et al., "SMART" (2020), for noise in embeddings.

    Args:
        objective (`Objective`, defaults to `LogitKD()`): what is compared: an objective on what the models return.
        kind (`str`, defaults to `"gaussian"`): `"gaussian"` adds noise to the input embeddings, or to pixels and
            samples; `"tokens"` replaces tokens, but neither the first of a text nor its special tokens.
        std (`float`, defaults to 0.1): standard deviation of the Gaussian noise, relative to that of what it is added to.
        probability (`float`, defaults to 0.1): with which a token is replaced.
        token_id (`int`, *optional*): what it is replaced by, such as `tokenizer.mask_token_id`; by default a token drawn
            from the vocabulary.
        weight, teacher: as of every [`Objective`]; 1.0 and none by default.

    Raises:
        ValueError: noise that is none, or an objective it cannot be given to; at `attach`, tokens to be replaced of a
            model that reads none.

    Example:
        ```python
        >>> from hfkdq import LogitKD, NoisyKD
        >>> NoisyKD(objective=LogitKD(temperature=4.0), std=0.2).name
        'noisy_kd'

        ```
    """

    kind: Literal["gaussian", "tokens"] = "gaussian"
    std: float = 0.1
    probability: float = 0.1
    token_id: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kind == "gaussian" and not self.std > 0:
            raise ValueError(f"NoisyKD: std must be larger than 0, got {self.std!r}.")
        if self.kind == "tokens" and not 0 < self.probability <= 1:
            raise ValueError(f"NoisyKD: probability must be in (0, 1], got {self.probability!r}.")

    def attach(self, student: PreTrainedModel, teacher: PreTrainedModel | ModelSignature | None) -> None:
        super().attach(student, teacher)
        if self.kind == "tokens" and base_of(student).main_input_name != "input_ids":
            raise ValueError(
                f"NoisyKD(kind='tokens') replaces tokens, but {type(student).__name__} reads "
                f"{base_of(student).main_input_name}. Use kind='gaussian'."
            )

    def run_forward(self, passes: Passes, step: TrainingStep) -> TrainingStep:
        batch = step.batch
        if self.kind == "tokens":
            batch = {**batch, "input_ids": self._replaced(batch, base_of(passes.model).config)}
            return replace(step, student=passes.student(batch, self.needs, self._read(0)))
        noise = _Change(lambda values: torch.randn_like(values) * values.detach().float().std().to(values) * self.std)
        with noise.of(passes.model, batch) as changed:
            return replace(step, student=passes.student(changed, self.needs, self._read(0)))

    def _replaced(self, batch: Batch, config: Any) -> torch.Tensor:
        ids: torch.Tensor = batch["input_ids"]
        named = [getattr(config, f"{name}_token_id", None) for name in ("pad", "bos", "eos", "sep", "cls")]
        special = [i for found in named for i in (found if isinstance(found, list) else [found]) if i is not None]
        chosen = torch.rand(ids.shape, device=ids.device) < self.probability
        chosen &= ~torch.isin(ids, torch.tensor(special, device=ids.device, dtype=ids.dtype))
        attended = batch.get("attention_mask")
        if attended is not None:
            chosen &= attended.ne(0) & attended.cumsum(1).ne(1)  # not the first one, which may stand for the text
        if self.token_id is not None:
            return ids.masked_fill(chosen, self.token_id)
        return torch.where(chosen, torch.randint_like(ids, config.vocab_size), ids)


@dataclass(frozen=True, kw_only=True)
class AdversarialKD(ExtraForwardPasses):
    """Another objective where it is worst: both models read an input that was changed to drive them apart.

    `D(teacher(x + d), student(x + d))` with `d = argmax D` over `|d|_2 <= epsilon * |x|_2` per example, found by `steps`
    steps of `d <- project(d + step_size * |x|_2 * g / |g|_2)` along the gradient `g` with respect to `x`, the student's
    input embeddings at the positions attended to (pixels or samples where there are none). Both lengths are over all
    positions, so `epsilon` is the root-mean-square change of a position relative to that of its embeddings.

    One step is FGM (Miyato et al., "Adversarial Training Methods for Semi-Supervised Text Classification", 2017), several
    are PGD (Madry et al., "Towards Deep Learning Models Resistant to Adversarial Attacks", 2018). Miyato et al. scale
    embeddings to variance 1 first, as a bound means nothing without their length; their bound of 5.0 for texts of some 240
    embeddings of width 256 is `5 / sqrt(240 * 256) = 0.02` here. Costs `steps + 1` passes of the student and 2 of the
    teacher more.

    In the project's own comparison it helped nowhere (0.35 points less with the defaults): docs/results/objectives.md.

    Args:
        objective (`Objective`, defaults to `LogitKD()`): what is driven apart, and then learned.
        epsilon (`float`, defaults to 0.02): largest length of the change of an example, relative to the length of its
            embeddings, pixels or samples.
        steps (`int`, defaults to 1): gradient steps.
        step_size (`float`, *optional*): length of one, in the same unit; by default `epsilon` for one step,
            `1.5 * epsilon / steps` else.
        weight, teacher: as of every [`Objective`]; 1.0 and none by default.

    Raises:
        ValueError: settings out of range, or an objective it cannot be given to; at `attach`, input embeddings of
            different widths, or a teacher of which there are cached outputs alone.

    Example:
        ```python
        >>> from hfkdq import AdversarialKD
        >>> AdversarialKD(epsilon=0.01, steps=3).name
        'adversarial_kd'

        ```
    """

    epsilon: float = 0.02
    steps: int = 1
    step_size: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.epsilon > 0 and self.steps >= 1 and (self.step_size is None or self.step_size > 0)):
            raise ValueError(
                "AdversarialKD: epsilon and step_size must be larger than 0 and steps at least 1, got "
                f"{self.epsilon!r}, {self.step_size!r} and {self.steps!r}."
            )

    def attach(self, student: PreTrainedModel, teacher: PreTrainedModel | ModelSignature | None) -> None:
        super().attach(student, teacher)
        if isinstance(teacher, ModelSignature) or teacher is None:
            raise ValueError("AdversarialKD asks about changed inputs, so it needs the teacher, not its cache.")
        if base_of(student).main_input_name != base_of(teacher).main_input_name:
            raise ValueError("AdversarialKD changes one input for both models, which read different ones.")
        if base_of(student).main_input_name == "input_ids":
            widths = [base_of(model).get_input_embeddings().weight.shape[1] for model in (student, teacher)]
            if widths[0] != widths[1]:
                raise ValueError(
                    f"AdversarialKD adds one change to the input embeddings of both models, which are {widths[0]} and "
                    f"{widths[1]} wide. NoisyKD has no such need."
                )

    def run_forward(self, passes: Passes, step: TrainingStep) -> TrainingStep:
        batch = step.batch
        if TEACHER_PREFIX + base_of(passes.model).main_input_name in batch:
            raise ValueError("AdversarialKD changes one input for both models; the batch brings the teacher its own.")
        target = passes.teacher(batch, self.needs, self._read(1))
        step_size = self.step_size or (self.epsilon if self.steps == 1 else 1.5 * self.epsilon / self.steps)
        lengths: list[torch.Tensor] = []

        def nothing(values: torch.Tensor) -> torch.Tensor:
            # The mask is of what is looked up first: the only text, or the encoder's.
            lengths.append(_length(values, None if lengths else attended_mask(batch)))
            return torch.zeros_like(values)

        change = _Change(nothing, requires_grad=True)
        for _ in range(self.steps):
            with change.of(passes.model, batch) as changed, torch.enable_grad():
                output = passes.student(changed, self.needs, self._read(0))
                with torch.autocast(change.deltas[0].device.type, enabled=False):
                    loss = self.objective.loss(replace(step, student=output, teacher=target))
            gradients = torch.autograd.grad(loss, change.deltas)
            moved = [
                _within(delta.detach() + _unit(gradient) * (step_size * length).to(delta), self.epsilon * length)
                for delta, gradient, length in zip(change.deltas, gradients, lengths, strict=True)
            ]
            change = _Change(moved, requires_grad=True)
        change = _Change([delta.detach() for delta in change.deltas])
        with change.of(passes.teacher_model, batch) as changed:
            target = passes.teacher(changed, self.needs, self._read(1))
        with change.of(passes.model, batch) as changed:
            return replace(step, student=passes.student(changed, self.needs, self._read(0)), teacher=target)


def _length(values: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Euclidean length of each example, over the positions of `mask` where it fits; shape `(batch, 1, ...)`, float32."""
    if mask is not None and mask.shape == values.shape[:2]:
        values = values * mask.view(*mask.shape, *[1] * (values.dim() - 2))
    lengths: torch.Tensor = values.float().flatten(1).norm(dim=1)
    return lengths.view(-1, *[1] * (values.dim() - 1))


def _unit(gradient: torch.Tensor) -> torch.Tensor:
    return (gradient.float() / _length(gradient).clamp(min=1e-12)).to(gradient)


def _within(delta: torch.Tensor, bound: torch.Tensor) -> torch.Tensor:
    return (delta.float() * (bound / _length(delta).clamp(min=1e-12)).clamp(max=1.0)).to(delta)


class _Change:
    """A change that is added to the input embeddings of a model, or to its input where that is no token. An
    encoder-decoder may look up its embeddings twice in a pass, so there may be several additions."""

    def __init__(self, made: Any, requires_grad: bool = False) -> None:
        self._made, self._requires_grad = made, requires_grad
        self.deltas: list[torch.Tensor] = [] if callable(made) else [d.requires_grad_(requires_grad) for d in made]

    def _next(self, values: torch.Tensor) -> torch.Tensor:
        if callable(self._made):
            with torch.no_grad():
                self.deltas.append(self._made(values))
            return values + self.deltas[-1].requires_grad_(self._requires_grad)
        delta = self.deltas[self._used]
        self._used += 1
        return values + delta

    @contextlib.contextmanager
    def of(self, model: Any, batch: Batch) -> Iterator[Batch]:
        """The batch to give to a model while it lasts."""
        self._used, base = 0, base_of(model)
        name = base.main_input_name
        if name != "input_ids":
            yield {**batch, name: self._next(batch[name])}
            return
        table = base.get_input_embeddings().weight
        # Encoder and decoder may have modules of their own around one table.
        lookups = [m for m in base.modules() if isinstance(m, nn.Embedding) and m.weight is table]
        handles = [m.register_forward_hook(lambda module, args, output: self._next(output)) for m in lookups]
        with hooked(handles):
            yield batch


@dataclass(frozen=True, kw_only=True)
class QuantizationLoss(ExtraForwardPasses):
    """Distance between the fake-quantized student and its own forward pass in full precision.

    `D(student in full precision, quantized student)` for the same weights, input and dropout; the former has no
    gradient. With task and distillation terms beside it all three are trained together; its weight may be faded in. It
    is 0 while the student has no fake quantizers, which `QATCallback` puts in. Costs a forward pass of the student more.
    Kim et al., "QKD: Quantization-aware Knowledge Distillation" (2019), study the order of the three.

    Args:
        objective (`Objective`, defaults to `LogitKD()`): the distance: an objective on what models return.
        weight (`float` or schedule, defaults to 1.0): factor of this term.

    Raises:
        ValueError: an objective that does not compare two models.

    Example:
        ```python
        >>> from hfkdq import LogitKD, QuantizationLoss
        >>> from hfkdq.schedules import Linear
        >>> QuantizationLoss(objective=LogitKD(divergence="mse"), weight=Linear(0, 1)).name
        'quantization_loss'

        ```
    """

    uses_teacher: ClassVar[bool] = False

    def attach(self, student: PreTrainedModel, teacher: PreTrainedModel | ModelSignature | None) -> None:
        super().attach(student, student)

    def run_forward(self, passes: Passes, step: TrainingStep) -> TrainingStep:
        device = base_of(passes.model).device
        devices = [device] if device.type == "cuda" else []
        # The pass that follows then has the same dropout, so that the distance is the quantizers' alone.
        with torch.random.fork_rng(devices=devices), torch.no_grad(), full_precision(passes.model):
            return replace(step, teacher=passes.student(step.batch, self.needs, self._read(0)))
