# SPDX-License-Identifier: Apache-2.0
"""Losses as pure tensor functions: divergences of predictions, distances of features, relations of samples."""

from .divergences import (
    DIST,
    DIVERGENCES,
    DKD,
    JSD,
    MSE,
    Divergence,
    ForwardKL,
    ReverseKL,
    SoftCrossEntropy,
    forward_kl,
)
from .features import attention_kl, cosine_distance, masked_mean, mean_squared_error, normalized_squared_error

__all__ = [
    "DIST", "DIVERGENCES", "DKD", "JSD", "MSE", "Divergence", "ForwardKL", "ReverseKL", "SoftCrossEntropy",
    "attention_kl", "cosine_distance", "forward_kl", "masked_mean", "mean_squared_error", "normalized_squared_error",
]  # fmt: skip
