# SPDX-License-Identifier: Apache-2.0
"""Teachers: a frozen model, the student's own moving average, or a model that is trained along with it."""

from .averaged import EMATeacher
from .base import Indices, Teacher, TeacherSource
from .cotrained import CoTrainedTeacher, PeerParameters, detached
from .fingerprints import fingerprint, weights_fingerprint
from .frozen import FrozenTeacher, as_source, load_teacher
from .vocabulary import check_vocabulary

__all__ = [
    "CoTrainedTeacher", "EMATeacher", "FrozenTeacher", "Indices", "PeerParameters", "Teacher", "TeacherSource",
    "as_source", "check_vocabulary", "detached", "fingerprint", "load_teacher", "weights_fingerprint",
]  # fmt: skip
