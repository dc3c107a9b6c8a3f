# SPDX-License-Identifier: Apache-2.0
"""Runs an ONNX file on the CPU, arrays in and arrays out; a file of another runtime in that one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from .defaults import Array
from .session import Port, Session

_TYPES: dict[str, type[np.generic]] = {
    "tensor(bool)": np.bool_, "tensor(float16)": np.float16, "tensor(float)": np.float32, "tensor(double)": np.float64,
    **{f"tensor({kind.__name__})": kind for kind in (
        np.int8, np.int16, np.int32, np.int64, np.uint8, np.uint16, np.uint32, np.uint64,
    )},
}  # fmt: skip


class OnnxSession(Session):
    """An ONNX file in ONNX Runtime on the CPU.

    Args:
        path (`str` or `Path`): the `.onnx` file.
        threads (`int`, *optional*): threads that work on one call. ONNX Runtime chooses by default.

    Attributes:
        input_names (`list[str]`): what a call takes.
        output_names (`list[str]`): what a call returns, in the order of the file.
        input_shapes (`dict[str, list]`): the shape of each input, with names for the axes that vary.
        output_shapes (`dict[str, list]`): that of each output.

    Raises:
        ValueError: `threads` is less than 1, there is no such file, or it takes what is no array of numbers.
        RuntimeError: ONNX Runtime does not load it.

    Example:
        ```python
        session = OnnxSession("out/onnx/model.onnx")
        logits = session({"input_ids": ids, "attention_mask": mask})["logits"]
        ```
    """

    runtime, kind, usual = "ONNX Runtime", "ONNX", "model.onnx"

    def _open(self, threads: int | None) -> tuple[list[Port], list[Port]]:
        self._session = open_quietly(str(self._path), **({} if threads is None else {"intra_op_num_threads": threads}))
        both = (self._session.get_inputs(), self._session.get_outputs())
        inputs, outputs = (
            [Port(one.name, one.shape, one.type, _TYPES.get(one.type)) for one in ports] for ports in both
        )
        return inputs, outputs

    def _run(self, feed: dict[str, Array]) -> Sequence[Array]:
        return self._session.run(None, feed)

    def _is_own(self, error: Exception) -> bool:
        return is_of_onnxruntime(error)


def open_quietly(file: str | bytes, **settings: Any) -> ort.InferenceSession:
    """ONNX Runtime's own session of a file or its bytes, on the CPU and without warnings, with these `SessionOptions`."""
    options = ort.SessionOptions()
    for name, value in {"log_severity_level": 3, **settings}.items():
        setattr(options, name, value)
    return ort.InferenceSession(file, options, providers=["CPUExecutionProvider"])


@cache
def multiplies_blocks(bits: int) -> bool:
    """Whether ONNX Runtime has products with blocks of weights of so many bits, which is tried; 1.23 has them for 4 and 8."""
    codes = ", ".join(["0"] * (4 * bits))
    model = ir.from_onnx_text(
        f"""<ir_version: 10, opset_import: ["" : 17, "com.microsoft" : 1]> probe (float[1, 32] a) => (float[1, 1] product)
        <uint8[1, 1, {4 * bits}] codes = {{{codes}}}, float[1] scale = {{1.0}}>
        {{ product = com.microsoft.MatMulNBits <K = 32, N = 1, bits = {bits}, block_size = 32> (a, codes, scale) }}"""
    )
    try:
        open_quietly(ir.to_proto(model).SerializeToString(), log_severity_level=4)
    except Exception as error:
        if not is_of_onnxruntime(error):
            raise
        return False
    return True


def is_of_onnxruntime(error: Exception) -> bool:
    """Whether ONNX Runtime raised an error."""
    return type(error).__module__.startswith("onnxruntime")


def open_session(path: str | Path, threads: int | None = None) -> Session:
    """A file in the runtime that it is for: OpenVINO for its `.xml`, else ONNX Runtime; errors as [`OnnxSession`] has them."""
    if Path(path).suffix != ".xml":
        return OnnxSession(path, threads)
    from .openvino_runtime import OpenVinoSession

    return OpenVinoSession(path, threads)


def onnx_call(path: str, inputs: Mapping[str, Array], threads: int) -> Callable[[], Any]:
    """A call that runs a file once on `inputs`, for the process that times it."""
    session = open_session(path, threads)
    return lambda: session(inputs)
