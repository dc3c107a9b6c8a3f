# SPDX-License-Identifier: Apache-2.0
"""Models with adapters of PEFT: the names their modules have without them, and quantizing weights together with them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from torch import nn

from ..modeling.forwards import base_of


def plain_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """As `model.named_modules()`, with the modules and names that the model has once its adapters are merged. Layers
    within adapters are left out, and of modules that PEFT trains as a whole the copy in use takes the place of the
    original."""
    if "peft" not in sys.modules:  # who has adapters has imported it
        yield from model.named_modules()
    else:
        for name, module, _ in wrapped_modules(model):
            yield name, module


def wrapped_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Module | None]]:
    """As `plain_modules`, with the layer of PEFT that is around each module, or `None`."""
    return _walk(base_of(model), "", set())


def _walk(module: nn.Module, name: str, seen: set[int]) -> Iterator[tuple[str, nn.Module, nn.Module | None]]:
    inner = _within(module)
    if id(inner) in seen:
        return
    seen.add(id(inner))
    yield name, inner, None if inner is module else module
    for child_name, child in inner._modules.items():
        if child is not None:
            yield from _walk(child, f"{name}.{child_name}" if name else child_name, seen)


def _within(module: nn.Module) -> Any:
    """The module in the place of a layer of PEFT once adapters are merged; other modules themselves."""
    if not type(module).__module__.startswith(("peft.", __package__)):
        return module
    if "modules_to_save" in module._modules:
        copies: Any = module.modules_to_save
        active: Any = module.active_adapters
        return copies[active[0]] if active and active[0] in copies else module.original_module
    if "original_module" in module._modules:
        return module.original_module
    return module.get_base_layer() if "base_layer" in module._modules else module  # type: ignore[operator]


def has_adapters(model: nn.Module) -> bool:
    """Whether PEFT has put adapters into `model`."""
    return "peft" in sys.modules and any(wrapper is not None for _, _, wrapper in wrapped_modules(model))


def check_adapters(model: nn.Module) -> None:
    """Refuses adapters that cannot be merged into weights. Raises `ValueError`: `model` is a PEFT model of another
    kind than LoRA."""
    peft = sys.modules.get("peft")
    if peft is None or not isinstance(model, (peft.PeftModel, peft.PeftMixedModel)):
        return
    if not isinstance(model.base_model, peft.LoraModel):
        kind = str(getattr(model.active_peft_config.peft_type, "value", model.active_peft_config.peft_type))
        raise ValueError(
            f"The adapters are of the kind {kind}. Quantization-aware training is for LoRA, whose adapters are part of the "
            "weights that are quantized. Use LoraConfig, or train first and quantize the merged model."
        )


def check_adapter(name: str, wrapper: nn.Module | None) -> None:
    """Refuses a layer of PEFT around a module that is to be quantized, unless it is linear LoRA or a trained copy.
    Raises `ValueError`: saying why."""
    if wrapper is None or "modules_to_save" in wrapper._modules:
        return
    from .lora import unsupported_reason

    reason = unsupported_reason(wrapper)
    if reason:
        raise ValueError(
            f"The weight of {name} cannot be quantized together with its adapter: {reason}. Change that, leave {name} "
            "out with exclude_modules, or merge the adapters first: merge_adapters(model)."
        )


def attach_lora_(model: nn.Module, modules: set[int]) -> None:
    """Attaches LoRA adapters to the linear layers in `modules` (by `id`), which then quantize the merged weight."""
    if not has_adapters(model):
        return
    from .lora import QuantizedLoraLinear

    for name, module, wrapper in wrapped_modules(model):
        if id(module) in modules and wrapper is not None and "base_layer" in wrapper._modules:
            check_adapter(name, wrapper)
            wrapper.__class__ = QuantizedLoraLinear
            # Not as an attribute of a module, which would make it a child of its own child.
            vars(module)["adapter"] = wrapper


def detach_lora_(model: nn.Module) -> None:
    """Undoes `attach_lora_`."""
    for module in list(model.modules()):
        wrapper = vars(module).get("adapter")
        if getattr(wrapper, "base_layer", None) is module:  # modules of Wav2Vec2 have an attribute of that name too
            from peft.tuners.lora import Linear

            wrapper.__class__ = Linear
            del vars(module)["adapter"]
