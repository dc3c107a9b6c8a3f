# SPDX-License-Identifier: Apache-2.0
"""Quantizes the operands of the two matrix products of attention: queries and keys, probabilities and values."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..modeling import ATTENTION_INPUTS
from ..specs import QuantizationScheme, QuantizationSpec, module_matches
from .activations import ActivationQuantizer, make_activation_quantizer
from .adapters import plain_modules
from .weights import Stateless

OPERANDS = ("query", "key", "probabilities", "value")
_PRODUCTS = (torch.matmul, torch.bmm, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.Tensor.bmm)
_SDPA = F.scaled_dot_product_attention


class AttentionQuantizer(Stateless):
    """The fake quantizers of one attention module, and the mode that puts them before its matrix products.

    While the module runs, `scaled_dot_product_attention` is computed in its parts, and the operands of `matmul` are
    quantized: of the first product as query and key, of the second as probabilities and value.
    """

    fake_quantize_enabled = True

    def __init__(self, scheme: QuantizationScheme, device: torch.device | None = None) -> None:
        super().__init__()
        self.operands = nn.ModuleDict({name: make_activation_quantizer(scheme, device) for name in OPERANDS})  # type: ignore[misc]
        self._modes: list[_QuantizedProducts | None] = []
        self.handles: list[Any] = []

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_modes": []}

    def quantize(self, name: str, values: Tensor) -> Tensor:
        return self.operands[name](values)

    def enter(self) -> None:
        """Starts to quantize products, unless the fake quantizers are off."""
        mode = _QuantizedProducts(self) if self.fake_quantize_enabled else None
        self._modes.append(mode)
        if mode is not None:
            mode.__enter__()

    def leave(self, module: nn.Module, failed: bool) -> None:
        """Stops to quantize products. Raises `ValueError`: the module has multiplied in another way than attention does."""
        mode = self._modes.pop()
        if mode is None:
            return
        mode.__exit__(None, None, None)
        if mode.products != 2 and not failed:
            raise ValueError(
                f"attention=True quantizes two matrix products; {type(module).__name__} made {mode.products} that could "
                "be seen. Load the model with attn_implementation='sdpa' or 'eager', or leave its attention in floating "
                "point with attention=False."
            )

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
        is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
    ) -> Tensor:  # fmt: skip
        """`torch.nn.functional.scaled_dot_product_attention` with fake-quantized operands."""
        operands = {"query": query, "key": key, "value": value}
        query, key, value = (self.quantize(name, operand) for name, operand in operands.items())
        if enable_gqa:
            repeats = query.shape[-3] // key.shape[-3]
            key, value = key.repeat_interleave(repeats, dim=-3), value.repeat_interleave(repeats, dim=-3)
        scores = query @ key.transpose(-2, -1) * (1.0 / math.sqrt(query.shape[-1]) if scale is None else scale)
        if is_causal:
            attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            # Not minus infinity, which makes NaN of a query that may look nowhere.
            scores = scores.masked_fill(~attn_mask, torch.finfo(scores.dtype).min)
        elif attn_mask is not None:
            scores = scores + attn_mask
        probabilities = scores.softmax(dim=-1, dtype=torch.float32).to(value.dtype)
        if dropout_p > 0.0:
            probabilities = F.dropout(probabilities, dropout_p)
        return self.quantize("probabilities", probabilities) @ value


class _QuantizedProducts(TorchFunctionMode):
    """Sends the matrix products of one run of a module through its quantizers."""

    def __init__(self, quantizer: AttentionQuantizer) -> None:
        super().__init__()
        self.quantizer, self.products = quantizer, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _SDPA:
            self.products += 2
            return self.quantizer.attend(*args, **(kwargs or {}))
        if func in _PRODUCTS and len(args) == 2 and args[0].ndim > 2 and args[1].ndim > 2:
            names = OPERANDS[:2] if self.products == 0 else OPERANDS[2:]
            self.products += 1
            args = tuple(self.quantizer.quantize(name, operand) for name, operand in zip(names, args, strict=True))
        return func(*args, **(kwargs or {}))


def _enter(module: Any, args: Any) -> None:
    module.attention_quantizer.enter()


def _leave(module: Any, args: Any, output: Any) -> None:
    module.attention_quantizer.leave(module, failed=output is None)


def find_attention(model: nn.Module, spec: QuantizationSpec) -> dict[str, nn.Module]:
    """The modules that compute queries, keys and values, by name, without those that the spec excludes. Raises
    `ValueError`: the model has none."""
    attention = {name: module for name, module in plain_modules(model) if computes_attention(module)}
    found = {name: m for name, m in attention.items() if not module_matches(name, spec.exclude_modules)}
    if not found:
        raise ValueError(
            f"attention=True: {type(model).__name__} has no module with projections for query, key and value that are "
            "named as Transformers names them. Use attention=False."
        )
    return found


def computes_attention(module: nn.Module) -> bool:
    """Whether a module has projections for query, key and value."""
    if isinstance(module, nn.ModuleDict):  # the quantizers themselves
        return False
    children = {name for name, _ in module.named_children()}
    return "c_attn" in children or all(children & set(names) for names in ATTENTION_INPUTS.values())


def swap_attention_in_(module: nn.Module, spec: QuantizationSpec) -> None:
    """Puts fake quantizers before the matrix products of an attention module, in place."""
    module.attention_quantizer = quantizer = AttentionQuantizer(spec, next(module.parameters()).device)
    after = module.register_forward_hook(_leave, always_call=True)
    quantizer.handles = [module.register_forward_pre_hook(_enter), after]
    quantizer.train(module.training)


def swap_attention_out_(model: nn.Module) -> None:
    """Undoes `swap_attention_in_` in all of `model`."""
    for module in list(model.modules()):
        quantizer = module._modules.get("attention_quantizer")
        if isinstance(quantizer, AttentionQuantizer):
            for handle in quantizer.handles:
                handle.remove()
            del module.attention_quantizer


def attention_quantizers(model: nn.Module) -> dict[str, ActivationQuantizer]:
    """The quantizers of attention in `model`, by `module:operand`."""
    return {
        f"{name.rpartition('.')[0]}:{operand}": quantizer  # type: ignore[misc]
        for name, module in plain_modules(model)
        if isinstance(module, AttentionQuantizer)
        for operand, quantizer in module.operands.items()
    }
