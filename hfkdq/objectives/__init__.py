# SPDX-License-Identifier: Apache-2.0
"""Objectives of distillation: one small object per term of the loss."""

from .adaptive import ByAgreement, ByGradientNorm
from .attentions import AttentionKD
from .base import Objective, TrainingStep, as_objective
from .boxes import BoxKD
from .cross_vocabulary import ULD
from .ensemble import EnsembleKD
from .feature_maps import FeatureMapKD
from .hidden_states import HiddenStateKD
from .logits import LogitKD
from .mutual_information import CRD, VID
from .on_policy import OnPolicyKD
from .perturbed import AdversarialKD, NoisyKD, QuantizationLoss
from .relations import RelationKD
from .samples import RKD, SimilarityPreservingKD
from .task import TaskLoss

__all__ = [
    "CRD", "RKD", "ULD", "VID", "AdversarialKD", "AttentionKD", "BoxKD", "ByAgreement", "ByGradientNorm", "EnsembleKD",
    "FeatureMapKD", "HiddenStateKD", "LogitKD", "NoisyKD", "Objective", "OnPolicyKD", "QuantizationLoss", "RelationKD",
    "SimilarityPreservingKD", "TaskLoss", "TrainingStep", "as_objective",
]  # fmt: skip
