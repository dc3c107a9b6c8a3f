# SPDX-License-Identifier: Apache-2.0
"""What a student is trained to do: one small object per term of the loss."""

from .adaptive import ByAgreement, ByGradientNorm
from .attentions import AttentionKD
from .base import Objective, as_objective
from .ensemble import EnsembleKD
from .hidden_states import HiddenStateKD
from .logits import LogitKD
from .perturbed import AdversarialKD, NoisyKD
from .quantization_loss import QuantizationLoss
from .task import TaskLoss

__all__ = [
    "AdversarialKD",
    "AttentionKD",
    "ByAgreement",
    "ByGradientNorm",
    "EnsembleKD",
    "HiddenStateKD",
    "LogitKD",
    "NoisyKD",
    "Objective",
    "QuantizationLoss",
    "TaskLoss",
    "as_objective",
]
