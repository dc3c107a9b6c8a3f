# SPDX-License-Identifier: Apache-2.0
"""hfkdq: distil, prune and quantize Transformers models, and export what was trained to ONNX."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .registration import register as _register
from .version import __version__  # noqa: F401  (public, and in no `__all__`)

_register()

# Loaded on first use, so that `import hfkdq` costs nothing and needs no extra.
_HOMES = {
    name: room
    for room, names in {
        "objectives": "AdversarialKD AttentionKD BoxKD ByAgreement ByGradientNorm CRD EnsembleKD FeatureMapKD "
        "HiddenStateKD LogitKD NoisyKD OnPolicyKD QuantizationLoss RKD RelationKD "
        "SimilarityPreservingKD TaskLoss ULD VID",
        "quantization": "BitAllocation QATCallback load_quantized merge_adapters quantize suggest_bits",
        "teachers": "CoTrainedTeacher EMATeacher",
        "report": "CompressionReport",
        "trainer": "DistillationTrainer Seq2SeqDistillationTrainer",
        "pruning": "PruningCallback cluster_weights compressed_size fit_sparsity load_pruned prune "
        "prune_vocabulary share_layers",
        "specs": "PruningSpec QuantizationSpec",
        "caching": "cache_teacher_outputs generate_targets",
        "export": "export_onnx",
        "students": "make_student",
        "hub": "push_to_hub",
    }.items()
    for name in names.split()
}

__all__ = [
    "CRD", "RKD", "ULD", "VID", "AdversarialKD", "AttentionKD", "BitAllocation", "BoxKD", "ByAgreement",
    "ByGradientNorm", "CoTrainedTeacher", "CompressionReport", "DistillationTrainer", "EMATeacher", "EnsembleKD",
    "FeatureMapKD", "HiddenStateKD", "LogitKD", "NoisyKD", "OnPolicyKD", "PruningCallback", "PruningSpec",
    "QATCallback", "QuantizationLoss", "QuantizationSpec", "RelationKD", "Seq2SeqDistillationTrainer",
    "SimilarityPreservingKD", "TaskLoss", "cache_teacher_outputs", "cluster_weights", "compressed_size", "export_onnx",
    "fit_sparsity", "generate_targets", "load_pruned", "load_quantized", "make_student", "merge_adapters", "prune", "prune_vocabulary",
    "push_to_hub", "quantize", "share_layers", "suggest_bits",
]  # fmt: skip

if TYPE_CHECKING:
    from .caching import cache_teacher_outputs, generate_targets
    from .export import export_onnx
    from .hub import push_to_hub
    from .objectives import (
        CRD,
        RKD,
        ULD,
        VID,
        AdversarialKD,
        AttentionKD,
        BoxKD,
        ByAgreement,
        ByGradientNorm,
        EnsembleKD,
        FeatureMapKD,
        HiddenStateKD,
        LogitKD,
        NoisyKD,
        OnPolicyKD,
        QuantizationLoss,
        RelationKD,
        SimilarityPreservingKD,
        TaskLoss,
    )
    from .pruning import (
        PruningCallback,
        cluster_weights,
        compressed_size,
        fit_sparsity,
        load_pruned,
        prune,
        prune_vocabulary,
        share_layers,
    )
    from .quantization import BitAllocation, QATCallback, load_quantized, merge_adapters, quantize, suggest_bits
    from .report import CompressionReport
    from .specs import PruningSpec, QuantizationSpec
    from .students import make_student
    from .teachers import CoTrainedTeacher, EMATeacher
    from .trainer import DistillationTrainer, Seq2SeqDistillationTrainer


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'hfkdq' has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
