# SPDX-License-Identifier: Apache-2.0
"""Makes `from_pretrained` of Transformers load models with the quantization that hfkdq recorded in them. It waits until
Transformers is imported, and must not import it itself."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType

_QUANTIZERS = "transformers.quantizers.auto"


def register() -> None:
    """Registers hfkdq with Transformers: now if its quantizers are imported, otherwise once they are."""
    module = sys.modules.get(_QUANTIZERS)
    if hasattr(module, "AUTO_QUANTIZER_MAPPING"):
        _register(module)
    elif not any(isinstance(finder, _Waiting) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Waiting())  # no subclass: importlib.abc takes long to import


class _Waiting:
    """Finds the quantizers of Transformers as others do, and once they are imported registers with them and goes."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != _QUANTIZERS:
            return None
        others = (finder for finder in list(sys.meta_path) if finder is not self)
        spec = next(filter(None, (finder.find_spec(name, path, target) for finder in others)), None)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def load_and_register(module: ModuleType) -> None:
                load(module)
                _register(module)
                if self in sys.meta_path:
                    sys.meta_path.remove(self)

            spec.loader.exec_module = load_and_register  # type: ignore[method-assign]
        return spec


def _register(auto: Any) -> None:
    """Adds quantizer and configuration, unless they are there."""
    from .protocols import QUANT_METHOD

    if QUANT_METHOD not in auto.AUTO_QUANTIZER_MAPPING:
        config, quantizer = _classes()
        auto.register_quantization_config(QUANT_METHOD)(config)
        auto.register_quantizer(QUANT_METHOD)(quantizer)


def _quantize_as_recorded_(model: Any) -> None:
    """Makes the model that `load_quantized` gives of one whose float weights were loaded."""
    from transformers import PreTrainedModel
    from transformers.utils import logging

    from .facts import drop_fact, mark_quantized, unmark_quantized
    from .modeling.checkpoints import wants_plain_weights
    from .quantization.post_training import restore_recorded_
    from .quantization.records import recorded_quantization

    # Both stand for weights that are integers; the latter cannot be saved once the mark is gone.
    vars(model).pop("hf_quantizer", None)
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            vars(module.config).pop("_pre_quantization_dtype", None)
    mark_quantized(model.config)  # what Transformers has made an object of
    if wants_plain_weights():
        return
    recorded = recorded_quantization(model)
    if recorded is None:
        return
    if type(model).__name__ in (model.config.architectures or ()):
        restore_recorded_(model, *recorded)
    else:
        drop_fact(model, "quantization")  # which a checkpoint of this model would not have
        unmark_quantized(model.config)
        logging.get_logger(__name__).warning(
            f"The quantization that the configuration records is that of {', '.join(model.config.architectures or ['no class'])}; "
            f"{type(model).__name__} has its float weights. Load that class to have it quantized."
        )


def _classes() -> tuple[type, type]:
    """Made when Transformers is there to inherit from."""
    from transformers.quantizers.base import HfQuantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin

    from .protocols import QUANT_METHOD

    class HfkdqConfig(QuantizationConfigMixin):
        """Says that `config.hfkdq` records a quantization, and nothing else."""

        def __init__(self, quant_method: Any = QUANT_METHOD, **_: Any) -> None:
            self.quant_method = quant_method

    class HfkdqQuantizer(HfQuantizer):
        """Puts the recorded fake quantizers into a model whose float weights were loaded."""

        requires_calibration = True
        is_trainable = True

        def is_serializable(self, safe_serialization: Any = None) -> bool:
            """Saving writes the float weights and the record."""
            return True

        def preprocess_model(self, model: Any, **kwargs: Any) -> None:
            """Nothing: weights are loaded as those of any model."""

        def postprocess_model(self, model: Any, **kwargs: Any) -> None:
            """Leaves the model that `load_quantized` gives, which Transformers may move, cast and train as any other."""
            _quantize_as_recorded_(model)

        def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None: ...

        def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None: ...

    return HfkdqConfig, HfkdqQuantizer
