# SPDX-License-Identifier: Apache-2.0
"""Distillation of predictions: one divergence over the head that both models have."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

import torch
from transformers import PreTrainedModel

from ..fields import COUNT, POSITIVE
from ..losses import DIVERGENCES, Divergence, masked_mean
from ..losses.divergences import TopLogits, coarse_log_probabilities, in_chunks, standardized
from ..modeling.masks import Batch, Positions, batch_size
from ..schedules import Schedule
from .base import Objective, TrainingStep
from .finding import find_head
from .heads import Head, Prediction
from .model_signature import ModelSignature, signature_of


@dataclass(frozen=True, kw_only=True)
class LogitKD(Objective):
    """Divergence between the softened predictions of teacher and student.

    By default `T^2 * KL(softmax(teacher / T) || softmax(student / T))`. Hinton et al., "Distilling the Knowledge in a
    Neural Network" (2015). It knows what the pair of models predicts:

    | head | compared, mean over |
    |---|---|
    | class of a text, image, video or audio clip, choice | classes; examples |
    | several labels at once (`problem_type="multi_label_classification"`) | yes and no of each label; examples |
    | numbers (`"regression"`, or one label) | the numbers, `divergence="mse"` only; examples |
    | tags, masked language models | classes or tokens; positions with a label |
    | replaced tokens (ELECTRA) | yes and no; positions attended to |
    | next tokens, encoder-decoders | the vocabulary; positions whose (next) token has a label |
    | span of an answer | the positions of the text, for start and end; examples |
    | CTC | symbols, the blank included; frames of audio |
    | object queries (DETR, YOLOS, OWL-ViT, …) | classes, query by matched query, of sigmoids times the IoU of the boxes; images |
    | semantic segmentation | classes; pixels of an image that have a label; images |
    | image and text that belong together (CLIP, SigLIP) | the texts for an image and the images for a text; examples |
    | vector of an example | the other examples of the batch, by likeness; examples |

    Where there are no labels the positions attended to count. Over large vocabularies it is computed in chunks, and
    once more in the backward pass, so that no float32 copy of the logits is ever made.

    Args:
        divergence (`str` or `Divergence`, defaults to `"forward_kl"`): `"forward_kl"`, `"reverse_kl"`, `"jsd"`,
            `"soft_ce"`, `"mse"` (of the logits), `"dkd"` or `"dist"`; or an object with settings of its own, such as
            `JSD(beta=0.1)`, `DKD(alpha=1, beta=4)` or `DIST(beta=2, gamma=1)` of `hfkdq.losses`.
        temperature (`float` or schedule, defaults to 2.0): `T`, larger than 0; `"mse"` has none.
        standardize (`bool`, defaults to `False`): scale the logits of both models to mean 0 and deviation 1 over the
            classes first. Sun et al., "Logit Standardization in Knowledge Distillation" (2024).
        top_k (`int`, *optional*): keep only the teacher's `k` likeliest classes apart, and take all others as one.
        common_ids (`bool`, defaults to `False`): of two vocabularies of one tokenizer, padded to different sizes, compare the
            ids that both have, as if there were no others.
        per (`str`, defaults to `"token"`): mean over all positions alike, or over those of each `"sample"` first.
        weight, teacher: as of every [`Objective`]; 1.0 and none by default.

    Raises:
        ValueError: an unknown divergence, a temperature that is not larger than 0; at `attach`, heads, classes or
            vocabularies that differ, a head that this release does not know, or a divergence that makes no sense for it.

    Example:
        ```python
        >>> from hfkdq import LogitKD
        >>> LogitKD(divergence="reverse_kl", temperature=4.0).name
        'logit_kd'

        ```
    """

    schedules: ClassVar[frozenset[str]] = frozenset({"weight", "temperature"})

    divergence: str | Divergence = "forward_kl"
    temperature: Annotated[float | Schedule, POSITIVE] = 2.0
    standardize: bool = False
    top_k: Annotated[int | None, COUNT] = None
    common_ids: bool = False
    per: Literal["token", "sample"] = "token"
    _head: Head = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.divergence, Divergence) and self.divergence not in DIVERGENCES:
            raise ValueError(
                f"LogitKD: divergence={self.divergence!r} is none of {', '.join(map(repr, DIVERGENCES))}, nor a Divergence "
                "such as JSD(beta=0.1) of hfkdq.losses."
            )

    @property
    def _divergence(self) -> Divergence:
        return self.divergence if isinstance(self.divergence, Divergence) else DIVERGENCES[self.divergence]()

    def attach(self, student: PreTrainedModel, teacher: PreTrainedModel | ModelSignature | None) -> None:
        super().attach(student, teacher)
        head = find_head(student, teacher, self.common_ids)
        self._check_divergence(head, signature_of(teacher))
        self._keep(_head=head)

    def _check_divergence(self, head: Head, teacher: ModelSignature) -> None:
        given, name = self._divergence, teacher.model_class
        kinds = {kind: key for key, kind in DIVERGENCES.items()}
        own = kinds.get(type(given), type(given).__name__)
        if not head.softmax and given.uses_temperature:
            raise ValueError(
                f"{name} predicts numbers, for regression, which have no distribution to compare by divergence={own!r}. "
                'Use LogitKD(divergence="mse").'
            )
        if own in head.refused:
            raise ValueError(
                f"divergence={own!r} makes no sense for {name}: "
                + ("it looks for the class on a label." if given.uses_target else "its classes are not the same throughout a batch.")
                + ' Use divergence="forward_kl".'
            )  # fmt: skip
        cached = teacher.temperature
        if self.top_k is None and cached is None:
            return
        classes = teacher.shape(head.outputs[0])
        plain = given.uses_temperature and not (given.uses_target or given.across_rows or self.standardize)
        if not plain or head.refused or (self.common_ids and cached is not None):
            raise ValueError(
                f"Of a teacher's likeliest classes and the rest together (top_k) LogitKD computes the divergences "
                f"'forward_kl', 'reverse_kl', 'jsd' and 'soft_ce' of tokens or classes, without standardize, and common_ids "
                f"of the teacher itself alone; got {self!r} for {name}."
            )
        if self.top_k is not None and classes is not None and self.top_k >= classes[-1]:
            raise ValueError(f"top_k={self.top_k} of {classes[-1]} classes leaves none out. Leave top_k out.")
        if cached is not None and self.temperature != cached:
            raise ValueError(
                f"The likeliest tokens of the teacher were cached at temperature {cached}, and what is left beside them is "
                f"known at that temperature alone; LogitKD has temperature={self.temperature!r}. Use the same one, or "
                "cache the outputs anew."
            )

    def positions(self, batch: Batch) -> Positions:
        return batch_size(batch) if self.per == "sample" else self._head.positions(batch)

    def loss(self, step: TrainingStep) -> torch.Tensor:
        return self.reduced(*self.values(step))

    def values(self, step: TrainingStep) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The divergence per position, `(batch,)` or `(batch, seq)`, and which positions count."""
        predictions, temperature = self.predictions(step), step.at(self.temperature)
        return torch.stack([self._values(p, temperature) for p in predictions]).mean(0), predictions[0].mask

    def predictions(self, step: TrainingStep) -> list[Prediction]:
        found = self._head.predictions(step.student, step.teacher, step.batch)
        return [_narrowed(p) for p in found] if self.common_ids else found

    def reduced(self, values: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """The mean that `per` asks for, of one value per position."""
        if self.per == "sample" and values.dim() > 1:
            return masked_mean(values, mask, dim=1).mean()
        return masked_mean(values, mask)

    def _values(self, p: Prediction, temperature: float) -> torch.Tensor:
        of_rows, of_top = partial(self._of_rows, temperature), partial(self._of_top, temperature)
        shape = p.student.shape[:-1]
        rows = [_rows(x, len(shape)) for x in (p.student, p.teacher, p.valid_classes, p.target)]
        if self._divergence.across_rows and p.mask is not None:  # only what counts may be correlated
            valid = p.mask.reshape(-1)
            found = of_rows(*(None if x is None else x[valid] for x in rows))
            values = found.new_zeros(valid.shape).masked_scatter(valid, found)
        elif self._divergence.across_rows:
            values = of_rows(*rows)
        elif isinstance(p.teacher, TopLogits):
            values = in_chunks(of_top, rows[0], rows[1].log_probabilities, rows[1].indices)
        else:
            values = in_chunks(of_rows, *rows)
        values = values.reshape(shape)
        if p.position_weights is None:
            return values
        return (values * p.position_weights).flatten(1).sum(1)

    def _of_rows(
        self, temperature: float, student: Any, teacher: Any, valid_classes: Any = None, target: Any = None
    ) -> torch.Tensor:
        if self.top_k is not None:
            indices = teacher.topk(self.top_k, dim=-1).indices
            return self._of_top(temperature, student, coarse_log_probabilities(teacher, indices, temperature), indices)
        if self.standardize:
            student, teacher = standardized(student, valid_classes), standardized(teacher, valid_classes)
        return self._divergence(student, teacher, temperature, valid_classes, target)

    def _of_top(self, temperature: float, student: Any, log_teacher: Any, indices: Any) -> torch.Tensor:
        # The log probabilities of a distribution are logits of it.
        log_student = coarse_log_probabilities(student, indices, temperature)
        return self._divergence(log_student, log_teacher) * temperature**2


def _narrowed(p: Prediction) -> Prediction:
    """A prediction over those classes that both models have, the first ones."""
    count = min(p.student.shape[-1], p.teacher.shape[-1])
    target = None if p.target is None else p.target.masked_fill(p.target >= count, -100)
    return replace(p, student=p.student[..., :count], teacher=p.teacher[..., :count], target=target)


def _rows(tensor: Any, axes: int) -> Any:
    if tensor is None:
        return None
    if isinstance(tensor, TopLogits):
        return TopLogits(*(x.flatten(0, axes - 1) for x in (tensor.log_probabilities, tensor.indices)))
    return tensor.flatten(0, axes - 1)
