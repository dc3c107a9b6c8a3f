# SPDX-License-Identifier: Apache-2.0
"""Who a student learns from: a frozen model, its own moving average, or a peer that learns along with it."""

from .base import Teacher
from .frozen import FrozenTeacher, fingerprint, load_teacher
from .moving import AveragedTeacher, CoTrainedTeacher, EMATeacher, averaged_copy
from .peers import CoTrainedModel, PeerParameters, without_graph
from .vocabulary import check_vocabulary

__all__ = [
    "AveragedTeacher",
    "CoTrainedModel",
    "CoTrainedTeacher",
    "EMATeacher",
    "FrozenTeacher",
    "PeerParameters",
    "Teacher",
    "averaged_copy",
    "check_vocabulary",
    "fingerprint",
    "load_teacher",
    "without_graph",
]
