# SPDX-License-Identifier: Apache-2.0
"""Writes OpenVINO's own files of ONNX files, and runs them on the CPU."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from .defaults import Array
from .session import Port, Session

# By default OpenVINO computes in bfloat16 where the processor does, and makes integers of the inputs of 8-bit weights.
_EXACT = {"EXECUTION_MODE_HINT": "ACCURACY"}


class OpenVinoSession(Session):
    """A model in OpenVINO on the CPU, computed as it is written (`EXECUTION_MODE_HINT="ACCURACY"`): what is float32 there is not
    rounded to bfloat16, and what is not quantized there is not quantized.

    Args:
        path (`str` or `Path`): the `.xml` file, whose weights lie beside it in the `.bin` file; or an ONNX file.
        threads (`int`, *optional*): threads that work on one call. OpenVINO chooses by default.

    Attributes:
        input_names (`list[str]`): what a call takes.
        output_names (`list[str]`): what a call returns, in the order of the file.
        input_shapes (`dict[str, list]`): the shape of each input, with `"?"` for the axes that vary.
        output_shapes (`dict[str, list]`): that of each output.

    Raises:
        ValueError: `threads` is less than 1, there is no such file, or it takes what is no array of numbers.
        RuntimeError: OpenVINO is not installed, or does not load it.

    Example:
        ```python
        session = OpenVinoSession("out/openvino/openvino_model.xml")
        logits = session({"input_ids": ids, "attention_mask": mask})["logits"]
        ```
    """

    runtime, kind, usual = "OpenVINO", "OpenVINO", "openvino_model.xml"
    not_loaded = (
        "If it was exported just now, OpenVINO cannot run this architecture in this precision: choose another, or "
        'target="onnxruntime". Else download it again'
    )

    def _open(self, threads: int | None) -> tuple[list[Port], list[Port]]:
        core = _core()
        limit = {} if threads is None else {"INFERENCE_NUM_THREADS": threads}
        read = _read(core, Path(self._path))
        self._request = core.compile_model(read, "CPU", {**_EXACT, **limit}).create_infer_request()
        # Compiled outputs have the names of what was fused into them too.
        return [_port(one) for one in read.inputs], [_port(one) for one in read.outputs]

    def _run(self, feed: dict[str, Array]) -> Sequence[Array]:
        found = self._request.infer(feed, share_inputs=True)
        return [found[index] for index in range(len(self.output_names))]

    def _is_own(self, error: Exception) -> bool:
        return type(error) is RuntimeError or type(error).__module__.startswith("openvino")


@cache
def _core() -> Any:
    """OpenVINO's entry, one for the process: with the last one it unloads its plugins, below threads that still run in them."""
    return load_openvino().Core()


def _read(core: Any, path: Path) -> Any:
    """The model of a file; outputs of ONNX files have the one name that they have there, and not that of their node too."""
    model = core.read_model(str(path))
    if path.suffix == ".onnx":
        import onnx

        for value, output in zip(onnx.load(path, load_external_data=False).graph.output, model.outputs, strict=True):
            output.get_tensor().set_names({value.name})
    return model


def _port(value: Any) -> Port:
    shape = [str(size) if size.is_dynamic else size.get_length() for size in value.get_partial_shape()]
    element = value.get_element_type()
    numbers = None if element.get_type_name() in ("string", "dynamic") else np.dtype(element.to_dtype()).type
    return Port(value.get_any_name(), shape, element.get_type_name(), numbers)


def require_openvino() -> None:
    """Refuses to begin without OpenVINO (`RuntimeError`)."""
    if find_spec("openvino") is None:
        raise RuntimeError('This needs OpenVINO. Install it: pip install "hfkdq[openvino]"')


def load_openvino() -> Any:
    """The package `openvino`; `RuntimeError` if it is missing. It tells nobody that it is used: with its package for that within
    reach, importing it sends an event over the network."""
    require_openvino()
    name = "openvino_telemetry"
    known = name in sys.modules
    if not known:
        sys.modules[name] = None  # type: ignore[assignment]  # so that an import of it fails
    try:
        import openvino
    finally:
        if not known:
            del sys.modules[name]
    return openvino


def convert(path: Path) -> Path:
    """Writes an ONNX file as OpenVINO's own, beside it, weights as they are: `openvino_NAME.xml`, which is returned, and `.bin`.

    `RuntimeError` if OpenVINO cannot read it.
    """
    openvino = load_openvino()
    target = path.with_name(f"openvino_{path.stem}.xml")
    # A file that was written before may be in use, as its weights are not read but mapped.
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        written = Path(folder, target.name)
        try:
            openvino.save_model(_read(_core(), path), str(written), compress_to_fp16=False)
        except Exception as error:  # its readers have classes of their own
            told = " ".join(str(error).split())[:300].rstrip(".")
            raise RuntimeError(
                f'OpenVINO cannot read this model ({told}). Nothing was written; target="onnxruntime" or "standard" writes it for '
                "ONNX Runtime."
            ) from error
        for file in (written.with_suffix(".bin"), written):
            file.replace(target.with_name(file.name))
    return target
