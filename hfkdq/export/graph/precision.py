# SPDX-License-Identifier: Apache-2.0
"""Turns float files into narrower ones with ONNX Runtime's own tools."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from onnxruntime.quantization import QuantType, quantize_dynamic

from .saving import load_graph, save_graph

# Bytes of a constant that is no weight.
SMALL = 1024


def quantize_dynamically(path: Path) -> None:
    """Replaces a float32 file by its dynamic int8 version, with the settings of Optimum's `avx512_vnni(is_static=False)`.

    Weights are symmetric int8 per channel; activations, those of attention's products too, get a uint8 range at each
    call. Convolutions stay as they are: ONNX Runtime's `ConvInteger` takes several times as long as its float one. So does
    a file that would not become smaller, as that of convolutions before a small head.
    """
    convolutions = [node.name for node in ir.load(path).graph.all_nodes() if node.op_type == "Conv"]
    given = onnx.load(path, load_external_data=False)
    noted = {value.name for value in given.graph.value_info}
    before = sum(file.stat().st_size for file in path.parent.glob(f"{path.name}*"))
    with _quiet(), tempfile.TemporaryDirectory(dir=path.parent) as folder:
        target = Path(folder, path.name)
        options = {"WeightSymmetric": True, "ActivationSymmetric": False, "EnableSubgraph": False}
        quantize_dynamic(
            path, target, per_channel=True, weight_type=QuantType.QInt8, nodes_to_exclude=convolutions,
            extra_options=options,
        )  # fmt: skip
        model = onnx.load(target, load_external_data=False)
        # ONNX Runtime notes the shape of every value, in more bytes than some weights have.
        kept = [value for value in model.graph.value_info if value.name in noted]
        del model.graph.value_info[:], model.metadata_props[:]
        model.graph.value_info.extend(kept)
        model.metadata_props.extend(given.metadata_props)
        onnx.save(model, target)
        if target.stat().st_size < before:
            target.replace(path)


def to_float16(path: Path) -> None:
    """Replaces a float32 file by one with weights in float16; `ValueError` if one does not fit.

    They become float32 when the file is loaded: ONNX Runtime has few kernels for float16 on CPUs.
    """
    model = load_graph(path)
    graph = model.graph
    for name, value in list(graph.initializers.items()):
        tensor = value.const_value
        if tensor is None or tensor.dtype != ir.DataType.FLOAT or tensor.nbytes <= SMALL:
            continue
        weight = tensor.numpy()
        largest = float(np.abs(weight).max())
        if largest > np.finfo(np.float16).max:
            raise ValueError(
                f"The largest weight of {name}, {largest:.3g}, does not fit into float16 (at most 65504)."
            )
        stored = ir.val(f"{name}_float16", const_value=ir.tensor(weight.astype(np.float16), name=f"{name}_float16"))
        cast = ir.node("Cast", [stored], attributes={"to": ir.DataType.FLOAT.value}, name=f"{name}_Cast")
        cast.outputs[0].name = f"{name}_float32"
        graph.register_initializer(stored)
        value.replace_all_uses_with(cast.outputs[0])
        graph.insert_before(graph[0], cast)
        del graph.initializers[name]
    save_graph(model, path)


@contextmanager
def _quiet() -> Iterator[None]:
    """Hides that a file was not preprocessed, which it need not be."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(disabled)
