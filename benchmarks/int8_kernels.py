#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Which operators run an int8 encoder fastest: the graphs that the export could write, built by hand.

    make bench-kernels

Six layers in the shape of MiniLM with random integers, from hidden states to hidden states, with linear layers and
attention written in different operators. Each graph is timed in turn, in a process of its own.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper
from rich.console import Console
from rich.table import Table

from hfkdq.export.runtime import onnx_call
from hfkdq.measuring.latency import TimedEngine, time_engines

MICROSOFT = "com.microsoft"
LAYERS, HIDDEN, HEADS, INNER = 6, 384, 12, 1536
HEAD = HIDDEN // HEADS
# Name: how linear layers, attention and the sum before a LayerNorm are written.
GRAPHS = {
    "QDQ, plain attention": ("qdq", "plain", False),
    "MatMulIntegerToFloat, plain attention": ("fused", "plain", False),
    "MatMulIntegerToFloat, SkipLayerNormalization": ("fused", "plain", True),
    "MatMulIntegerToFloat, MultiHeadAttention": ("fused", "multi-head", False),
    "MatMulIntegerToFloat, QAttention": ("fused", "quantized", False),
    "MatMulIntegerToFloat, QAttention, uint8 weights": ("fused uint8", "quantized", False),
    "DynamicQuantizeMatMul, plain attention": ("dynamic", "plain", False),
    "float, plain attention": ("float", "plain", False),
    "MatMulNBits of 8 bits, plain attention": ("8 bits", "plain", False),
    "MatMulNBits of 4 bits, plain attention": ("4 bits", "plain", False),
}
BLOCK = 32


class Encoder:
    """Builds one graph."""

    def __init__(self, linears: str, attention: str, skip: bool) -> None:
        self.linears, self.attention, self.skip = linears.removesuffix(" uint8"), attention, skip
        self.is_unsigned = linears.endswith(" uint8")
        self.random = np.random.default_rng(0)
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, onnx.TensorProto] = {}
        self.scale = self.constant(np.float32(0.02), "scale")
        self.zero = self.constant(np.uint8(128), "zero")
        self.ones = self.constant(np.ones(HIDDEN, np.float32), "ones")
        self.zeros = self.constant(np.zeros(HIDDEN, np.float32), "zeros")

    def constant(self, value: np.ndarray | np.generic, name: str) -> str:
        self.constants[name] = numpy_helper.from_array(np.asarray(value), name)
        return name

    def op(self, kind: str, *inputs: str, domain: str = "", **attributes: object) -> str:
        name = f"value_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [name], domain=domain, **attributes))
        return name

    def weight(self, name: str, inputs: int, outputs: int) -> tuple[str, str, str, str]:
        codes = self.random.integers(-127, 128, (inputs, outputs), dtype=np.int8)
        zeros = np.zeros(outputs, np.int8)
        if self.is_unsigned:
            codes, zeros = ((values.astype(np.int16) + 128).astype(np.uint8) for values in (codes, zeros))
        return (
            self.constant(codes, f"{name}.codes"),
            self.constant(self.random.random(outputs, np.float32) * np.float32(0.001), f"{name}.scale"),
            self.constant(zeros, f"{name}.zero"),
            self.constant(self.random.normal(0, 0.1, outputs).astype(np.float32), f"{name}.bias"),
        )

    def prepared(self, value: str) -> str:
        is_quantized = self.linears in ("qdq", "fused")
        return self.op("QuantizeLinear", value, self.scale, self.zero) if is_quantized else value

    def linear(self, value: str, name: str, inputs: int, outputs: int) -> str:
        if self.linears == "float":
            return self.op("MatMul", value, self.constant(self.random.random((inputs, outputs), np.float32), name))
        if self.linears.endswith("bits"):
            return self.blocks(value, name, inputs, outputs, int(self.linears[0]))
        codes, scale, zero, bias = self.weight(name, inputs, outputs)
        if self.linears == "dynamic":
            return self.op("DynamicQuantizeMatMul", value, codes, scale, zero, bias, domain=MICROSOFT)
        if self.linears == "fused":
            return self.op(
                "MatMulIntegerToFloat", value, codes, self.scale, scale, self.zero, zero, bias, domain=MICROSOFT
            )
        values = self.op("DequantizeLinear", value, self.scale, self.zero)
        return self.op("Add", self.op("MatMul", values, self.op("DequantizeLinear", codes, scale, zero, axis=1)), bias)

    def blocks(self, value: str, name: str, inputs: int, outputs: int, bits: int) -> str:
        shape = (outputs, inputs // BLOCK, BLOCK * bits // 8)
        codes = self.constant(self.random.integers(0, 256, shape, dtype=np.uint8), f"{name}.codes")
        scale = self.constant(
            self.random.random(outputs * inputs // BLOCK, np.float32) * np.float32(0.001), f"{name}.scale"
        )
        settings = dict(K=inputs, N=outputs, bits=bits, block_size=BLOCK, accuracy_level=1)
        return self.op("MatMulNBits", value, codes, scale, domain=MICROSOFT, **settings)

    def attend(self, value: str, layer: int) -> str:
        if self.attention == "quantized":
            codes, scale, zero, bias = self.weight(f"{layer}.qkv", HIDDEN, 3 * HIDDEN)
            arguments = (value, codes, bias, self.scale, scale, "", self.zero, zero)
            return self.op("QAttention", *arguments, domain=MICROSOFT, num_heads=HEADS)
        query, key, values = (self.linear(value, f"{layer}.{part}", HIDDEN, HIDDEN) for part in "qkv")
        if self.attention == "multi-head":
            return self.op("MultiHeadAttention", query, key, values, domain=MICROSOFT, num_heads=HEADS)
        split = self.constant(np.array([0, 0, HEADS, HEAD]), "split")
        merged = self.constant(np.array([0, 0, HIDDEN]), "merged")
        query, key, values = (self.op("Reshape", part, split) for part in (query, key, values))
        query, values = (self.op("Transpose", part, perm=[0, 2, 1, 3]) for part in (query, values))
        scores = self.op("MatMul", query, self.op("Transpose", key, perm=[0, 2, 3, 1]))
        scores = self.op("Mul", scores, self.constant(np.float32(HEAD**-0.5), "head"))
        mixed = self.op("MatMul", self.op("Softmax", scores, axis=-1), values)
        return self.op("Reshape", self.op("Transpose", mixed, perm=[0, 2, 1, 3]), merged)

    def norm(self, value: str, change: str) -> str:
        if self.skip:
            return self.op(
                "SkipLayerNormalization", value, change, self.ones, self.zeros, domain=MICROSOFT, epsilon=1e-12
            )
        return self.op("LayerNormalization", self.op("Add", value, change), self.ones, self.zeros, epsilon=1e-12)

    def save(self, path: Path) -> None:
        # A shape that only the call knows keeps ONNX Runtime from fusing what the graph does not ask for.
        value = self.op("Reshape", "hidden", "shape")
        for layer in range(LAYERS):
            mixed = self.prepared(self.attend(self.prepared(value), layer))
            value = self.norm(value, self.linear(mixed, f"{layer}.out", HIDDEN, HIDDEN))
            inner = self.linear(self.prepared(value), f"{layer}.in", HIDDEN, INNER)
            inner = self.prepared(self.op("Gelu", inner, domain=MICROSOFT))
            value = self.norm(value, self.linear(inner, f"{layer}.down", INNER, HIDDEN))
        self.nodes.append(helper.make_node("Identity", [value], ["result"]))
        shape = ["batch", "length", HIDDEN]
        graph = helper.make_graph(
            self.nodes, "encoder",
            [helper.make_tensor_value_info("hidden", onnx.TensorProto.FLOAT, shape),
             helper.make_tensor_value_info("shape", onnx.TensorProto.INT64, [None])],
            [helper.make_tensor_value_info("result", onnx.TensorProto.FLOAT, None)], list(self.constants.values()),
        )  # fmt: skip
        opsets = [helper.make_opsetid("", 18), helper.make_opsetid(MICROSOFT, 1)]
        onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5, help="turns of half a second of every graph")
    options = parser.parse_args()
    shapes = ((1, 32), (1, 128), (16, 128))
    table = Table(title=f"Milliseconds: median (fastest), {options.threads} threads")
    for column in ("Graph", *(f"{batch} x {length}" for batch, length in shapes)):
        table.add_column(column, justify="left" if column == "Graph" else "right", no_wrap=True)
    rows: dict[str, list[str]] = {name: [] for name in GRAPHS}
    with tempfile.TemporaryDirectory() as folder:
        for number, settings in enumerate(GRAPHS.values()):
            Encoder(*settings).save(Path(folder, f"{number}.onnx"))
        for batch, length in shapes:
            hidden = np.random.default_rng(1).normal(size=(batch, length, HIDDEN)).astype(np.float32)
            engines = [
                TimedEngine(
                    name,
                    onnx_call,
                    Path(folder, f"{number}.onnx"),
                    {"hidden": hidden, "shape": np.array(hidden.shape)},
                )
                for number, name in enumerate(GRAPHS)
            ]
            times = time_engines(engines, threads=options.threads, rounds=options.rounds)
            for name, found in zip(GRAPHS, times, strict=True):
                rows[name].append(f"{found.median_ms:.2f} ({found.min_ms:.2f})")
    for name, cells in rows.items():
        table.add_row(name, *cells)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
