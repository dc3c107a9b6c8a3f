# SPDX-License-Identifier: Apache-2.0
"""Teachers: a frozen model, the student's own moving average, or a model that is trained along with it."""

from .base import Indices, Teacher, TeacherSource, check_vocabulary, fingerprint, weights_fingerprint
from .cotrained import CoTrainedTeacher, PeerParameters, detached
from .frozen import EMATeacher, FrozenTeacher, as_source, load_teacher

__all__ = [
    "CoTrainedTeacher", "EMATeacher", "FrozenTeacher", "Indices", "PeerParameters", "Teacher", "TeacherSource",
    "as_source", "check_vocabulary", "detached", "fingerprint", "load_teacher", "weights_fingerprint",
]  # fmt: skip
