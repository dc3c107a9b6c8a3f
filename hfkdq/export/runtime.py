# SPDX-License-Identifier: Apache-2.0
"""Runs an ONNX file on the CPU, arrays in and arrays out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from .defaults import Array, neutral

_TYPES: dict[str, type[np.generic]] = {
    "tensor(bool)": np.bool_, "tensor(float16)": np.float16, "tensor(float)": np.float32, "tensor(double)": np.float64,
    **{f"tensor({kind.__name__})": kind for kind in (
        np.int8, np.int16, np.int32, np.int64, np.uint8, np.uint16, np.uint32, np.uint64,
    )},
}  # fmt: skip
_NOT_LOADED = "Export it again, or download it again"
_NOT_RUN = (
    "If it was exported just now, this architecture cannot be exported for all sizes of its inputs: the tracer took some of them "
    "for constants"
)


class OnnxSession:
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

    def __init__(self, path: str | Path, threads: int | None = None) -> None:
        if threads is not None and threads < 1:
            raise ValueError(f"threads must be at least 1, got {threads!r}. Leave it out to let ONNX Runtime choose.")
        if not Path(path).is_file():
            raise ValueError(
                f"There is no ONNX file at {str(path)!r}. `export_onnx` writes one: model.onnx in its folder."
            )
        options = ort.SessionOptions()
        options.log_severity_level = 3
        if threads is not None:
            options.intra_op_num_threads = threads
        with in_plain_words(path, _NOT_LOADED):
            self._session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self._path = path
        strange = next((value for value in self._session.get_inputs() if value.type not in _TYPES), None)
        if strange is not None:
            raise ValueError(
                f"{path} takes {strange.type} as {strange.name!r}; only files that take arrays of numbers can be run. Export the model "
                "without its tokenizer or processor."
            )
        self._types = {value.name: _TYPES[value.type] for value in self._session.get_inputs()}
        self.input_names: list[str] = [value.name for value in self._session.get_inputs()]
        self.output_names: list[str] = [value.name for value in self._session.get_outputs()]
        self.input_shapes: dict[str, list[int | str]] = {
            value.name: value.shape for value in self._session.get_inputs()
        }
        self.output_shapes: dict[str, list[int | str]] = {
            value.name: value.shape for value in self._session.get_outputs()
        }

    def __call__(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Runs the file once.

        Args:
            inputs (`Mapping[str, np.ndarray]`): an array per input; what the file does not take is ignored. As a
                Transformers model does, a missing `attention_mask` or `pixel_mask` counts as ones, missing
                `token_type_ids` as zeros, and missing `position_ids` as the numbers from 0.

        Returns:
            `dict[str, np.ndarray]`: an array per output.

        Raises:
            ValueError: another input of the file is missing.
            RuntimeError: ONNX Runtime stops, as where the file works for some lengths alone.
            TypeError: an array cannot become what the file takes without loss of kind, as floats for integers.
        """
        feed = {name: self._fill(name, inputs) for name in self.input_names}
        with in_plain_words(self._path, _NOT_RUN):
            return dict(zip(self.output_names, self._session.run(None, feed), strict=True))

    def _fill(self, name: str, inputs: Mapping[str, Array]) -> Array:
        if name in inputs:
            return inputs[name].astype(self._types[name], casting="same_kind", copy=False)
        value = neutral(name, inputs)
        if value is not None:
            return value.astype(self._types[name])
        raise ValueError(f"The file takes {', '.join(self.input_names)}; {name} is missing: got {', '.join(inputs)}.")


@contextmanager
def in_plain_words(path: str | Path, advice: str) -> Iterator[None]:
    """Makes one line of ONNX Runtime's own errors, which are of no common class."""
    try:
        yield
    except Exception as error:
        if not type(error).__module__.startswith("onnxruntime"):
            raise
        told = " ".join(str(error).split())[:300].rstrip(".")
        raise RuntimeError(f"ONNX Runtime cannot run {Path(path).name}: {told}. {advice}.") from error


def onnx_call(path: str, inputs: Mapping[str, Array], threads: int) -> Callable[[], Any]:
    """A call that runs a file once on `inputs`, for the process that times it."""
    session = OnnxSession(path, threads=threads)
    return lambda: session(inputs)
