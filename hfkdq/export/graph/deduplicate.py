# SPDX-License-Identifier: Apache-2.0
"""Merges what an ONNX graph holds twice."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import common


def deduplicate(model: ir.Model) -> None:
    """Merges equal constants and operators, in place, and drops unused ones.

    So layers that share an input, as query, key and value do, share its quantizer.
    """
    passes = [common.LiftConstantsToInitializersPass(size_limit=0), common.DeduplicateHashedInitializersPass()]
    if not any(node.op_type == "If" for node in model.graph):  # it breaks branches that hand on an outer value
        passes.append(common.IdentityEliminationPass())
    passes += [common.CommonSubexpressionEliminationPass(), common.RemoveUnusedNodesPass()]
    ir.passes.Sequential(*passes)(model)
