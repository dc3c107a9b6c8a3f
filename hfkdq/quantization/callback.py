# SPDX-License-Identifier: Apache-2.0
"""Quantization-aware training as a callback of any Trainer.

Knows the callback protocol and the model it is handed; never a trainer class, an objective or a pruning mask.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.distributed as dist
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_callback import ExportableState
from transformers.training_args import TrainingArguments
from transformers.utils import CONFIG_NAME, logging

from ..specs import QuantizationSpec
from .convert import (
    activation_quantizers,
    load_quantizer_states_,
    prepare_qat_,
    quantized_spec,
    quantizer_states,
    record_ranges,
    recorded_quantization,
    set_activation_ranges_,
)

logger = logging.get_logger(__name__)


class QATCallback(TrainerCallback, ExportableState):
    """Trains a model with simulated int8 weights and uint8 activations.

    Works with the plain `transformers.Trainer` and with every subclass. The fake quantizers are put in when the
    Trainer is made (see [`prepare_qat_`]) and stay in memory after training, so that `trainer.evaluate()` measures the
    quantized model. Saved files are those of an ordinary model; their `config.json` records spec and ranges, from
    which [`load_quantized`] rebuilds the quantized one. Training resumes exactly, and with `load_best_model_at_end`
    the ranges come from the same checkpoint as the weights. In distributed training all processes use the ranges of
    the first one.

    Args:
        spec (`QuantizationSpec` or `dict`): what to quantize, and how; a dictionary as `spec.to_dict()` gives it, which
            is what a Trainer that restores its callbacks passes.
        strict_resume (`bool`, defaults to `True`): refuse to resume from a checkpoint of another spec; `False` warns
            instead, and takes over the ranges that fit.

    Raises:
        TypeError: `spec` is neither.
        RuntimeError: at the start of training, if scales are to be learned but the model got its fake quantizers after
            its optimizer.
        ValueError: the spec matches no module, or training resumes from a checkpoint of another spec.

    Example:
        ```python
        from transformers import Trainer
        from hfkdq import QATCallback, QuantizationSpec

        trainer = Trainer(model, args, train_dataset=train, callbacks=[QATCallback(QuantizationSpec())])
        trainer.train()
        ```
    """

    def __init__(self, spec: QuantizationSpec | dict[str, Any], strict_resume: bool = True) -> None:
        if isinstance(spec, dict):
            spec = QuantizationSpec.from_dict(spec)
        if not isinstance(spec, QuantizationSpec):
            raise TypeError(
                f"QATCallback takes a QuantizationSpec, got {type(spec).__name__}: QATCallback(QuantizationSpec())."
            )
        self.spec = spec
        self.strict_resume = strict_resume
        self.ranges: dict[str, dict[str, float]] = {}

    def state(self) -> dict[str, Any]:
        return {"args": {"spec": self.spec.to_dict()}, "attributes": {"ranges": self.ranges}}

    def on_init_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: PreTrainedModel | None = None,
        **kwargs: Any,
    ) -> None:
        if model is not None:
            prepare_qat_(model, self.spec)

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: PreTrainedModel,
        **kwargs: Any,
    ) -> None:
        late = quantized_spec(model) is None
        if late and self.spec.activation_bits is not None and self.spec.range_estimator == "learned":
            raise RuntimeError(
                "range_estimator='learned' trains parameters, and the optimizer was made before they existed. Give "
                "QATCallback to the constructor of the Trainer (callbacks=[...]) instead of add_callback; with "
                "model_init, let it return prepare_qat_(model, spec)."
            )
        prepare_qat_(model, self.spec)
        if state.global_step > 0:
            self._resume(state, model)
        # The Trainer updates this entry when it saves, and fails where a checkpoint without QAT did not have it.
        state.stateful_callbacks.setdefault(type(self).__name__, self.state())
        self._refresh(model)

    def on_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: PreTrainedModel,
        **kwargs: Any,
    ) -> None:
        # Not at the end of the step, where a callback that runs before this one may save the model.
        self._refresh(model)

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: PreTrainedModel,
        **kwargs: Any,
    ) -> None:
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            path = Path(state.best_model_checkpoint)
            has_config = (path / CONFIG_NAME).is_file()
            recorded = recorded_quantization(type(model.config).from_pretrained(path)) if has_config else None
            if recorded is None:
                logger.warning(
                    f"The best checkpoint, {path}, was saved without quantization. Its weights "
                    "are used with the last activation ranges."
                )
            else:
                set_activation_ranges_(model, recorded[1])
        self._refresh(model)

    def _resume(self, state: TrainerState, model: PreTrainedModel) -> None:
        saved = state.stateful_callbacks.get(type(self).__name__)
        saved = saved[0] if isinstance(saved, list) else saved
        if saved is None:
            logger.warning("The checkpoint was saved without QATCallback: activation ranges start anew.")
            return
        then, ranges = saved["args"]["spec"], saved["attributes"]["ranges"]
        if QuantizationSpec.from_dict(then) != self.spec:
            told = f"The checkpoint was trained with QuantizationSpec.from_dict({then}), not with {self.spec}."
            if self.strict_resume:
                raise ValueError(
                    f"{told} Resume with the same spec, give strict_resume=False to go on with the new one, or start "
                    "a new training from the weights."
                )
            logger.warning(f"{told} Training goes on with the new one.")
            own = activation_quantizers(model)
            ranges = {k: v for k, v in ranges.items() if k in own and v.keys() == set(own[k].state_names)}
        load_quantizer_states_(model, ranges)

    def _refresh(self, model: PreTrainedModel) -> None:
        """Makes the ranges of all processes equal, and the records of them current."""
        self.ranges = quantizer_states(model)
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            shared = [self.ranges]
            dist.broadcast_object_list(shared)
            self.ranges = shared[0]
            load_quantizer_states_(model, self.ranges)
        record_ranges(model)
