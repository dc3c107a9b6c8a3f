# SPDX-License-Identifier: Apache-2.0
"""A file in a runtime on the CPU, arrays in and arrays out, whichever runtime it is."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .choices import WITHOUT_FILE
from .defaults import Array, neutral

_NOT_RUN = (
    "If it was exported just now, this architecture cannot be exported for all sizes of its inputs: the tracer took some of them "
    f"for constants. {WITHOUT_FILE.rstrip('.')}"
)

_NOISE = re.compile(
    r"\[ONNXRuntimeError\] : \d+ : \w+ : |Non-zero status code returned while running |/onnxruntime_src/.*? was false\. "
)
"""Of what ONNX Runtime says: numbers, and lines of its own source."""


class Port(NamedTuple):
    """An input or an output: its name, its shape with names for the axes that vary, its type as the runtime calls it and in
    NumPy, where it is of numbers."""

    name: str
    shape: list[int | str]
    told: str
    dtype: type[np.generic] | None


@contextmanager
def in_plain_words(runtime: str, path: str | Path, advice: str, is_own: Callable[[Exception], bool]) -> Iterator[None]:
    """Makes one line of the errors of a runtime, which are of no common class; `is_own` tells them."""
    try:
        yield
    except Exception as error:
        if not is_own(error):
            raise
        told = _NOISE.sub("", " ".join(str(error).split()))[:300].rstrip(".")
        raise RuntimeError(f"{runtime} cannot run {Path(path).name}: {told}. {advice}.") from error


class Session(ABC):
    """A file in a runtime; what its classes have in common."""

    runtime: str
    """What the runtime is called."""
    kind: str
    """What its files are called."""
    usual: str
    """The name of a file."""
    not_loaded = "Export it again, or download it again"
    """What to do where one does not load."""

    def __init__(self, path: str | Path, threads: int | None = None) -> None:
        if threads is not None and threads < 1:
            raise ValueError(
                f"threads must be at least 1, got {threads!r}. Leave it out to let {self.runtime} choose."
            )
        if not Path(path).is_file():
            raise ValueError(
                f"There is no {self.kind} file at {str(path)!r}. `export_onnx` writes one: {self.usual} in its folder."
            )
        self._path = path
        with in_plain_words(self.runtime, path, self.not_loaded, self._is_own):
            inputs, outputs = self._open(threads)
        self._types: dict[str, type[np.generic]] = {}
        for port in inputs:
            if port.dtype is None:
                raise ValueError(
                    f"{path} takes {port.told} as {port.name!r}; only files that take arrays of numbers can be run. Export the model "
                    "without its tokenizer or processor."
                )
            self._types[port.name] = port.dtype
        self.input_names = [port.name for port in inputs]
        self.output_names = [port.name for port in outputs]
        self.input_shapes = {port.name: port.shape for port in inputs}
        self.output_shapes = {port.name: port.shape for port in outputs}

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
            RuntimeError: the runtime stops, as where the file works for some lengths alone.
            TypeError: an array cannot become what the file takes without loss of kind, as floats for integers.
        """
        feed = {name: self._fill(name, inputs) for name in self.input_names}
        with in_plain_words(self.runtime, self._path, _NOT_RUN, self._is_own):
            return dict(zip(self.output_names, self._run(feed), strict=True))

    @abstractmethod
    def _open(self, threads: int | None) -> tuple[list[Port], list[Port]]:
        """Loads the file; its inputs and outputs."""

    @abstractmethod
    def _run(self, feed: dict[str, Array]) -> Sequence[Array]:
        """The outputs, in their order."""

    @abstractmethod
    def _is_own(self, error: Exception) -> bool:
        """Whether the runtime raised an error."""

    def _fill(self, name: str, inputs: Mapping[str, Array]) -> Array:
        if name in inputs:
            return inputs[name].astype(self._types[name], casting="same_kind", copy=False)
        value = neutral(name, inputs)
        if value is not None:
            return value.astype(self._types[name])
        raise ValueError(f"The file takes {', '.join(self.input_names)}; {name} is missing: got {', '.join(inputs)}.")
