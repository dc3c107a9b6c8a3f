# SPDX-License-Identifier: Apache-2.0
"""Rewriting of traced ONNX files, the same for every exporter."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from .attention import fuse_attention
from .convolutions import Array, fold_pads, guard_convolutions
from .decoders import merge_decoders
from .deduplicate import deduplicate
from .integer_convolutions import fuse_convolutions
from .linears import count_fused_linears, fuse_linears
from .precision import quantize_dynamically, to_float16
from .saving import load_graph, save_graph
from .shapes import fix_shapes, noted_shapes
from .stored import stored_bytes, stored_weights
from .sums import round_sums
from .unsigned import make_unsigned, multiplies_exactly

__all__ = [
    "count_fused_linears", "deduplicate", "fix_shapes", "fuse_attention", "fuse_convolutions", "fuse_linears", "improve",
    "make_unsigned", "merge_decoders", "multiplies_exactly", "noted_shapes", "quantize_dynamically", "save_graph",
    "stored_bytes", "stored_weights", "to_float16",
]  # fmt: skip


def improve(
    path: Path, *, target: str, unsigned: bool = False, batches: Sequence[Mapping[str, Array]] = ()
) -> dict[str, int]:
    """Rewrites a file by one that computes the same with fewer operators; with ONNX's own for `target="standard"`.

    `unsigned` writes weights of integer products as uint8; with `batches`, arrays by the names of inputs, sums of
    convolutions of codes are rounded too. Returns how many of them there are, and how many have an integer bias.
    """
    model = load_graph(path)
    deduplicate(model)
    fix_shapes(model)
    fold_pads(model)
    sums = round_sums(model, path.with_suffix(".calibrated"), batches) if batches else 0
    convolutions = fuse_convolutions(model)
    if target == "onnxruntime":
        fuse_linears(model)
        guard_convolutions(model)
        deduplicate(model)
        fuse_attention(model)
    if unsigned:
        make_unsigned(model)
    deduplicate(model)
    save_graph(model, path)
    return {"integer_convolutions": convolutions, "rounded_sums": sums}
