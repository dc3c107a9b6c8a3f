# SPDX-License-Identifier: Apache-2.0
"""The precisions of exported files. A new one is one entry of `PRECISIONS`; nothing heavy is imported for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..specs import QuantizationSpec

FLOAT = "float32"
DYNAMIC = "dynamic"
AUTO, TRAINED = "auto", "trained"
# Where activations stay in floating point only rounding differs; a uint8 activation at a rounding tie may change its
# code, and move all that follow it.
FLOAT_TOLERANCE, INTEGER_TOLERANCE = 1e-4, 0.1


@dataclass(frozen=True)
class Precision:
    """A precision of an exported file, and all that follows from it. `settings` are fields of the [`QuantizationSpec`] of
    its integers, `None` for a file that is made of the traced float file, which `before_fusion` and `after_fusion`
    rewrite before and after its operators are fused."""

    name: str  # in `quantization=`, on the command line, in what the export records, and as a tag of the model card
    label: str  # in tables
    tolerance: float  # largest difference from torch, as a share of the largest logit
    description: str  # the end of the card's sentence "Export to ONNX, ..."
    help: str = ""  # for the command line
    settings: Mapping[str, Any] | None = None
    is_fitted: bool = False  # whether the spec is adapted to each model, as one that was only named is
    before_fusion: Callable[[Path], None] | None = None
    after_fusion: Callable[[Path], None] | None = None

    @property
    def spec(self) -> QuantizationSpec | None:
        """The spec of its integers."""
        if self.settings is None:
            return None
        from ..specs import QuantizationSpec

        return QuantizationSpec(**self.settings)

    @property
    def has_integers(self) -> bool:
        """Whether torch computes with the file's own integers, so that the two can be equal."""
        return self.settings is not None

    @property
    def needs_calibration(self) -> bool:
        """Whether ranges of activations have to be known."""
        return self.settings is not None and self.settings.get("activation_bits", 8) is not None

    @property
    def multiplies_integers(self) -> bool:
        """Whether activations are integers too."""
        return self.name == DYNAMIC or self.needs_calibration


def _quantize_dynamically(path: Path) -> None:
    from .graph import quantize_dynamically

    quantize_dynamically(path)


def _to_float16(path: Path) -> None:
    from .graph import to_float16

    to_float16(path)


def _of_integers(settings: Mapping[str, Any], help: str = "", is_fitted: bool = False) -> Precision:
    """The precision of a spec: `int8`, `int4_weights`, `w2a8`, ..."""
    weights, activations = settings.get("weight_bits", 8), settings.get("activation_bits", 8)
    if activations is not None:
        name = label = "int8" if weights == activations == 8 else f"w{weights}a{activations}"
    else:
        dtype = "bfloat16" if settings.get("storage_dtype") == "bfloat16" else "float16"
        stored = dtype if weights == 16 else f"int{weights}"
        name, label = f"{stored}_weights", f"{stored} weights"
    tolerance = FLOAT_TOLERANCE if activations is None else INTEGER_TOLERANCE
    return Precision(name, label, tolerance, "with the quantization above", help, dict(settings), is_fitted)


# In the order in which "auto" tries them.
PRECISIONS: dict[str, Precision] = {
    precision.name: precision
    for precision in (
        _of_integers({}, "ranges from the calibration data", is_fitted=True),
        Precision(
            DYNAMIC, "dynamic int8", 0.3, "with 8-bit weights; the ranges of activations are found while it runs",
            "int8 with ranges found at each call", before_fusion=_quantize_dynamically,
        ),
        _of_integers({"activation_bits": None}, "activations stay float", is_fitted=True),
        _of_integers(
            {"weight_bits": 4, "group_size": 32, "activation_bits": None}, "activations stay float", is_fitted=True
        ),
        Precision(
            "float16", "float16", 0.02, "with weights in half precision", "weights in half precision",
            after_fusion=_to_float16,
        ),
        Precision(FLOAT, "float", FLOAT_TOLERANCE, "in floating point", "no quantization"),
    )
}  # fmt: skip
NAMES = (*PRECISIONS, AUTO)
# Names in the records of earlier releases.
_FORMER = {"float": FLOAT}


def precision_of(quantization: QuantizationSpec | str) -> Precision:
    """The precision that `quantization=` asks for; `TypeError` or `ValueError` if it is neither a spec nor a name."""
    if isinstance(quantization, str):
        if quantization not in PRECISIONS:
            raise ValueError(
                f"quantization={quantization!r} does not exist. Use None, a QuantizationSpec or one of {', '.join(NAMES)}."
            )
        return PRECISIONS[quantization]
    from ..specs import QuantizationSpec

    if not isinstance(quantization, QuantizationSpec):
        raise TypeError(
            f"quantization must be None, a QuantizationSpec or one of {', '.join(NAMES)}, got {type(quantization).__name__}."
        )
    return _of_integers(quantization.to_dict())


def recorded_precision(facts: Mapping[str, Any]) -> Precision | None:
    """The precision of a file in what its export recorded, of this or an earlier release; `None` if it does not say."""
    if facts.get("spec") is not None:
        return _of_integers(facts["spec"])
    name = str(facts.get("kind"))
    return PRECISIONS.get(_FORMER.get(name, name))
