# SPDX-License-Identifier: Apache-2.0
"""`QuantizationSpec`: how numbers become integers, and in which modules."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn.utils.parametrize import type_before_parametrizations
from transformers.pytorch_utils import Conv1D

from ..fields import check_fields
from ..protocols import SwappedLayer
from .base import ModulePatterns, Serializable, as_text, freeze_patterns, module_matches

RECURRENT = (nn.LSTM, nn.GRU)
QUANTIZABLE = (nn.Linear, Conv1D, nn.Conv1d, nn.Conv2d, nn.Embedding, *RECURRENT)
"""Module types that can be quantized; a subclass is one of them only if it keeps their forward pass."""


def expert_weights(module: nn.Module) -> dict[str, Tensor]:
    """The parameters, of shape (experts, ...), of a module that holds all experts of a layer; none for other modules."""
    if "expert" not in type(module).__name__.lower() or isinstance(module, QUANTIZABLE):
        return {}
    return {name: p for name, p in module.named_parameters(recurse=False) if p.dim() == 3}


def outputs_last(module: nn.Module, name: str) -> bool:
    """Whether outputs are the last axis of such a parameter: as long as a bias, or by what the layer says of itself."""
    weight, bias = expert_weights(module)[name], module._parameters.get(f"{name}_bias")
    if bias is not None and weight.shape[1] != weight.shape[2]:
        return bias.shape[-1] == weight.shape[2]
    known = getattr(module, "is_transposed", None)
    if known is None and isinstance(width := getattr(module, "hidden_size", None), int):
        return (weight.shape[1] == width) != ("down" in name)
    return bool(known)


def is_quantizable(module: nn.Module) -> bool:
    """Whether a module is of a type that can be quantized."""
    return isinstance(module, QUANTIZABLE) or bool(expert_weights(module))


def _one_of(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    # True == 1, and a width that is a bool is a mistake.
    if isinstance(value, bool) or value not in allowed:
        raise ValueError(f"{name}={value!r} does not exist. Use one of {', '.join(map(str, allowed))}.")


@dataclass(frozen=True, kw_only=True)
class QuantizationScheme(Serializable):
    """How the weights and the input of one module become integers; a [`QuantizationSpec`] without its modules.

    With b bits, a symmetric weight is `s * q`, q in [-Q, Q] with `Q = 2**(b-1) - 1`: 3 values at 2 bits (ternary). One
    bit has q in {-1, 1}. An affine weight is `s * (q - z)`, q in [0, 2**b - 1], as is an activation.

    Args:
        weight_bits (`int`, defaults to 8): 8, 6, 4, 3, 2 or 1; 16 keeps weights in `storage_dtype`.
        activation_bits (`int`, *optional*, defaults to 8): 16, 8 or 4; `None` leaves activations in floating point.
        per_channel (`bool`, defaults to `True`): a scale per output channel, row of a table or gate of a recurrent
            layer, rather than one per module.
        group_size (`int`, *optional*): 32, 64 or 128 neighbouring inputs of a channel share a scale.
        symmetric (`bool`, defaults to `True`): whether weights do without a zero point.
        activation_symmetric (`bool`, defaults to `False`): the same for activations: their zero point is the middle.
        weight_mapping (`str`, defaults to `"linear"`): which values the integers stand for. `"power_law"`: those of
            \\(sign(x)|x|^p\\), quantized linearly, and back (Yvinec et al., "PowerQuant: Automorphism Search for
            Non-Uniform Quantization", 2023). `"power_of_two"`: \\(\\pm s 2^{-k}\\) and 0 (Zhou et al., "Incremental
            Network Quantization", 2017). `"kmeans"`: one codebook of \\(2^b\\) values for the module, in units of the
            scale (Han et al., "Deep Compression", 2016).
        activation_mapping (`str`, defaults to `"linear"`): `"linear"` or `"power_law"`.
        power (`float`, defaults to 0.5): p of the power law, in (0, 1].
        weight_estimator (`str`, *optional*): how the scale of weights is found. `"min_max"`: the largest weight.
            `"percentile"` leaves out the largest few. `"mse"`: the clipping that changes the weights least.
            `"mean_abs"`: from the mean of |w|: \\(2 E|w| / \\sqrt Q\\); at 2 bits
            \\(E(|w| : |w| > 0.7 E|w|)\\) (Li et al., "Ternary Weight Networks", 2016), at 1 bit \\(E|w|\\)
            (Rastegari et al., "XNOR-Net", 2016); weights that are zero do not count. `"learned"`: trained with the loss (Esser et al., "Learned Step Size
            Quantization", 2020). By default `"mean_abs"` at 2 and 1 bits, `"min_max"` above.
        range_estimator (`str`, defaults to `"moving_average"`): how the range of an activation is found.
            `"moving_average"` follows minimum and maximum of the batches exponentially, `"min_max"` keeps the widest
            seen; `"percentile"` and `"mse"` follow the percentile, and the range of least squared error.
            `"learned"` trains scale and zero point (Bhalgat et al., "LSQ+", 2020), `"pact"` the bound of a symmetric
            or one-sided range (Choi et al., "PACT: Parameterized Clipping Activation", 2018).
        averaging_constant (`float`, defaults to 0.05): share of the newest batch in a moving average, in (0, 1].
        percentile (`float`, defaults to 99.9): for `"percentile"`, in (50, 100].
        storage_dtype (`str`, defaults to `"float32"`): `"float32"`, `"float16"` or `"bfloat16"`: what the scales of
            weights, and weights of 16 bits, are rounded to.
    """

    WEIGHT_BITS: ClassVar[tuple[int, ...]] = (16, 8, 6, 4, 3, 2, 1)
    ACTIVATION_BITS: ClassVar[tuple[int | None, ...]] = (16, 8, 4, None)
    GROUP_SIZES: ClassVar[tuple[int | None, ...]] = (None, 32, 64, 128)
    MAPPINGS: ClassVar[tuple[str, ...]] = ("linear", "power_law", "power_of_two", "kmeans")
    WEIGHT_ESTIMATORS: ClassVar[tuple[str, ...]] = ("min_max", "percentile", "mse", "mean_abs", "learned")
    RANGE_ESTIMATORS: ClassVar[tuple[str, ...]] = ("moving_average", "min_max", "percentile", "mse", "learned", "pact")
    STORAGE_DTYPES: ClassVar[tuple[str, ...]] = ("float32", "float16", "bfloat16")

    weight_bits: int = 8
    activation_bits: int | None = 8
    per_channel: bool = True
    group_size: int | None = None
    symmetric: bool = True
    activation_symmetric: bool = False
    weight_mapping: str = "linear"
    activation_mapping: str = "linear"
    power: float = 0.5
    weight_estimator: str | None = None
    range_estimator: str = "moving_average"
    averaging_constant: float = 0.05
    percentile: float = 99.9
    storage_dtype: str = "float32"

    def __post_init__(self) -> None:
        _one_of("weight_bits", self.weight_bits, self.WEIGHT_BITS)
        _one_of("activation_bits", self.activation_bits, self.ACTIVATION_BITS)
        _one_of("group_size", self.group_size, self.GROUP_SIZES)
        _one_of("weight_mapping", self.weight_mapping, self.MAPPINGS)
        _one_of("activation_mapping", self.activation_mapping, self.MAPPINGS[:2])
        _one_of("weight_estimator", self.weight_estimator, (None, *self.WEIGHT_ESTIMATORS))
        _one_of("range_estimator", self.range_estimator, self.RANGE_ESTIMATORS)
        _one_of("storage_dtype", self.storage_dtype, self.STORAGE_DTYPES)
        check_fields(self)
        for name, value, low, high in (
            ("averaging_constant", self.averaging_constant, 0, 1),
            ("power", self.power, 0, 1),
            ("percentile", self.percentile, 50, 100),
        ):
            if not low < value <= high:
                raise ValueError(f"{name} must be in ({low}, {high}], got {value!r}.")
        self._check_together()

    def _check_together(self) -> None:
        if self.group_size is not None and not self.per_channel:
            raise ValueError(f"group_size={self.group_size} divides channels; per_channel=False has none of them.")
        if self.weight_bits == 16 and self.storage_dtype == "float32":
            raise ValueError("weight_bits=16 keeps weights in storage_dtype; set it to 'float16' or 'bfloat16'.")
        if not self.symmetric and (self.weight_bits == 1 or self.weight_mapping in ("power_of_two", "kmeans")):
            raise ValueError(
                f"symmetric=False needs a zero point, which weight_bits={self.weight_bits} with "
                f"weight_mapping={self.weight_mapping!r} has not. Use symmetric=True."
            )
        if self.weight_estimator == "mean_abs" and not self.symmetric:
            raise ValueError("weight_estimator='mean_abs' gives a scale and no zero point. Use symmetric=True.")
        if self.weight_bits == 1 and self.weight_mapping != "linear":
            raise ValueError(f"weight_bits=1 has two values, and weight_mapping={self.weight_mapping!r} adds none.")
        if self.weight_mapping == "kmeans" and self.weight_estimator is not None:
            raise ValueError(
                f"weight_mapping='kmeans' finds its codebook itself; weight_estimator={self.weight_estimator!r} would have "
                "no effect. Leave it at None."
            )
        plain = self.symmetric and self.weight_mapping == "linear" and self.group_size is None
        if self.weight_estimator == "learned" and not (plain and 2 <= self.weight_bits <= 8):
            raise ValueError(
                "weight_estimator='learned' trains one scale a channel or module, of symmetric linear weights. Use it "
                "with symmetric=True, weight_mapping='linear', group_size=None and 8 to 2 bits."
            )
        if self.learns_ranges and self.activation_mapping != "linear":
            raise ValueError(
                f"range_estimator={self.range_estimator!r} has gradients for activation_mapping='linear' alone."
            )

    @property
    def learns_ranges(self) -> bool:
        """Whether ranges of activations are parameters that a loss trains."""
        return self.activation_bits is not None and self.range_estimator in ("learned", "pact")

    @property
    def learns(self) -> bool:
        """Whether there is anything to train besides the weights."""
        return self.learns_ranges or self.weight_estimator == "learned"


# What a module of another width than `weight_bits` goes without.
_PLAIN = {"group_size": None, "symmetric": True, "weight_mapping": "linear", "weight_estimator": None}
_SCHEME_FIELDS = tuple(item.name for item in fields(QuantizationScheme))


@dataclass(frozen=True, kw_only=True)
class QuantizationSpec(QuantizationScheme):
    """How weights and activations become integers, in which modules, in training and in the exported file.

    Linear layers (`nn.Linear` and the `Conv1D` of GPT-2), convolutions (`nn.Conv1d`, `nn.Conv2d`), tables
    (`nn.Embedding`) and recurrent layers (`nn.LSTM`, `nn.GRU`; weights alone) are quantized as a [`QuantizationScheme`]
    says, by default with symmetric int8 weights per output channel, `s = max|w| / 127`, and affine uint8 inputs per
    tensor, `q = clamp(round(x / s) + z, 0, 255)`, after Jacob et al., "Quantization and Training of Neural Networks for
    Efficient Integer-Arithmetic-Only Inference" (2018).

    Args:
        embedding_bits (`int`, *optional*): width of embeddings. 8 by default, or `weight_bits` if that is more. Where it
            is not `weight_bits`, the table is linear and symmetric with a scale per row.
        head_bits (`int`, *optional*): width of the head: linear layers outside the pretrained base model, and output
            embeddings. As `embedding_bits`; its activations have at least 8 bits then.
        attention (`bool`, defaults to `False`): also quantize what enters the matrix products of attention, queries,
            keys, probabilities and values, with `activation_bits`.
        overrides (`dict`, *optional*): other settings for some modules, as `{pattern: {"weight_bits": 4}}`. A pattern is
            a module's name or the last parts of it, the name of its class, or a regular expression for the whole name;
            the settings are fields of a [`QuantizationScheme`], or `None` to leave the modules in floating point. Of
            several that match, later ones win.
        target_modules (`str` or list of `str`, *optional*): which modules, in the grammar of PEFT. All by default.
        exclude_modules (`str` or list of `str`, *optional*): which of those to leave in floating point.
        kwargs: the arguments of [`QuantizationScheme`].

    Raises:
        ValueError: a width, group size, mapping or estimator that does not exist, or settings that exclude each other.

    Example:
        ```python
        >>> from hfkdq import QuantizationSpec
        >>> spec = QuantizationSpec(weight_bits=4, group_size=64, overrides={"classifier": {"weight_bits": 8}})
        >>> QuantizationSpec.from_dict(spec.to_dict()) == spec
        True

        ```
    """

    embedding_bits: int | None = None
    head_bits: int | None = None
    attention: bool = False
    overrides: dict[str, dict[str, Any] | None] = field(default_factory=dict)
    target_modules: ModulePatterns = None
    exclude_modules: ModulePatterns = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("embedding_bits", "head_bits"):
            _one_of(name, getattr(self, name), (None, *self.WEIGHT_BITS))
            if getattr(self, name) == 16 and self.storage_dtype == "float32":
                raise ValueError(f"{name}=16 keeps weights in storage_dtype; set it to 'float16' or 'bfloat16'.")
        if self.attention and self.activation_bits is None:
            raise ValueError("attention=True quantizes activations; activation_bits=None leaves them alone.")
        freeze_patterns(self)
        object.__setattr__(self, "overrides", copy.deepcopy(dict(self.overrides)))
        for pattern, changes in self.overrides.items():
            self._check_override(pattern, changes)

    def _check_override(self, pattern: str, changes: dict[str, Any] | None) -> None:
        if not isinstance(pattern, str) or not (changes is None or isinstance(changes, dict)):
            raise TypeError(
                f"overrides must be a dictionary {{pattern: {{field: value}} or None}}, got {pattern!r}: {changes!r}."
            )
        unknown = sorted(set(changes or ()) - set(_SCHEME_FIELDS))
        if unknown:
            names = ", ".join(_SCHEME_FIELDS)
            raise ValueError(f"overrides[{pattern!r}] has no field {', '.join(unknown)}. Known: {names}.")
        if changes is not None:
            try:
                self._changed(changes)
            except ValueError as error:
                raise ValueError(f"overrides[{pattern!r}]: {error}") from error

    @classmethod
    def describe(cls, settings: Mapping[str, Any], code: Callable[..., str] = as_text) -> str:
        """A recorded spec in words: `"8-bit weights (symmetric, scales per output channel), 8-bit activations (...)"`.

        Args:
            settings (`dict`): what [`~QuantizationSpec.to_dict`] gave, of this or another release.
            code (`Callable`, *optional*): writes values, given side by side, as code.
        """
        text, covered = _describe_weights(settings), {"weight_bits", "activation_bits", *_COVERED}
        if settings.get("activation_bits"):
            ranges = f"{settings.get('range_estimator', '')}".replace("_", " ")
            kind = "symmetric" if settings.get("activation_symmetric") else "affine"
            kind += _describe_mapping(settings.get("activation_mapping"))
            where = ", inside attention too" if settings.get("attention") else ""
            text += f", {settings['activation_bits']}-bit activations{where} ({kind}, per tensor{f', ranges: {ranges}' if ranges else ''})"
        own = len(settings.get("overrides") or {})
        if own:
            text += f"; {own:,} {'setting' if own == 1 else 'settings'} for single modules"
        names = settings.get("exclude_modules")
        if names:
            text += f"; in floating point: {', '.join(map(code, [names] if isinstance(names, str) else names))}"
        if settings.get("weight_bits") == 16:
            covered.add("storage_dtype")
        return text + cls.describe_rest(settings, covered, code)

    def selects(self, name: str, module: nn.Module) -> bool:
        """Whether this spec quantizes `module`, found under `name` in the model."""
        if not is_quantizable(module) or module_matches(name, self.exclude_modules):
            return False
        return self.target_modules is None or module_matches(name, self.target_modules)

    def scheme(self, name: str, module: nn.Module, is_head: bool = False) -> QuantizationScheme | None:
        """How `module`, found under `name`, is quantized.

        Args:
            name (`str`): dotted name of the module.
            module (`nn.Module`): a module that `selects` chose.
            is_head (`bool`, defaults to `False`): whether it belongs to the head of the model.

        Returns:
            [`QuantizationScheme`]: its scheme, `None` if an override leaves it in floating point.
        """
        changes: dict[str, Any] = {}
        # An override may ask for another width, and is checked by itself; so what it changes comes first.
        matching = [value for pattern, value in self.overrides.items() if override_matches(pattern, name, module)]
        if matching and matching[-1] is None:
            return None
        if is_head or isinstance(module, nn.Embedding):
            bits = self.head_bits if is_head else self.embedding_bits
            bits = max(8, self.weight_bits) if bits is None else bits
            if bits != self.weight_bits:
                changes = {**_PLAIN, "weight_bits": bits}
            if is_head and self.head_bits is None and self.activation_bits is not None:
                changes["activation_bits"] = max(8, self.activation_bits)
        for value in matching:
            changes |= value or {}
        if isinstance(module, RECURRENT):
            changes |= {"activation_bits": None, "group_size": None}
        elif expert_weights(module):
            changes |= {"activation_bits": None}
        return self._changed(changes)

    def _changed(self, changes: dict[str, Any]) -> QuantizationScheme:
        return replace(QuantizationScheme(**{name: getattr(self, name) for name in _SCHEME_FIELDS}), **changes)


# Settings that `describe` has words for, besides widths.
_COVERED = (
    "per_channel", "group_size", "symmetric", "activation_symmetric", "weight_mapping", "activation_mapping",
    "range_estimator", "attention", "overrides", "exclude_modules", "embedding_bits", "head_bits",
)  # fmt: skip
_MAPPINGS = {"power_law": "power law", "power_of_two": "powers of two", "kmeans": "k-means codebook"}


def _describe_mapping(mapping: str | None) -> str:
    return "" if mapping in (None, "linear") else f", {_MAPPINGS.get(mapping, mapping)}"


def _describe_weights(settings: Mapping[str, Any]) -> str:
    bits, group = settings.get("weight_bits", 8), settings.get("group_size")
    if bits == 16:
        return f"{settings.get('storage_dtype', '16-bit')} weights"
    scale = "per tensor" if settings.get("per_channel") is False else "per output channel"
    scale = f"per {group} inputs" if group else scale
    kind = "affine" if settings.get("symmetric") is False else "symmetric"
    text = f"{bits}-bit weights ({'ternary, ' if bits == 2 and kind == 'symmetric' else ''}{kind}"
    text += f"{_describe_mapping(settings.get('weight_mapping'))}, scales {scale})"
    for name, key in (("embeddings", "embedding_bits"), ("head", "head_bits")):
        own = settings.get(key)
        own = max(8, bits) if own is None else own
        text += f", {name} {own}-bit" if own != bits else ""
    return text


def override_matches(pattern: str, name: str, module: nn.Module) -> bool:
    """Whether a key of `QuantizationSpec.overrides` means `module`, found under `name`."""
    plain = module.plain_class if isinstance(module, SwappedLayer) else type_before_parametrizations(module)
    if plain.__name__ == pattern or module_matches(name, [pattern]):
        return True
    try:
        return module_matches(name, pattern)
    except re.error as error:
        raise ValueError(f"overrides: {pattern!r} is neither a module's name nor a regular expression.") from error
