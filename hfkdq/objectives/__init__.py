# SPDX-License-Identifier: Apache-2.0
"""What a student is trained to do: one small object per term of the loss."""

from .attentions import AttentionKD
from .base import Objective, as_objective
from .ensemble import EnsembleKD
from .hidden_states import HiddenStateKD
from .logits import LogitKD
from .task import TaskLoss

__all__ = ["AttentionKD", "EnsembleKD", "HiddenStateKD", "LogitKD", "Objective", "TaskLoss", "as_objective"]
