# SPDX-License-Identifier: Apache-2.0
"""Merges what an ONNX graph holds twice."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import common


def deduplicate(model: ir.Model) -> None:
    """Merges, in place, what is there several times, and drops what nothing uses.

    Equal constants become one, so that the quantizers of linear layers that share an input (query, key and value)
    become one too.

    Args:
        model (`onnx_ir.Model`): changed in place.
    """
    passes = [common.LiftConstantsToInitializersPass(size_limit=0), common.DeduplicateInitializersPass()]
    if not any(node.op_type == "If" for node in model.graph):  # it breaks branches that hand on an outer value
        passes.append(common.IdentityEliminationPass())
    passes += [common.CommonSubexpressionEliminationPass(), common.RemoveUnusedNodesPass()]
    ir.passes.Sequential(*passes)(model)
