# SPDX-License-Identifier: Apache-2.0
"""Quantization-aware training as a callback of any Trainer."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch.distributed as dist
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.utils import CONFIG_NAME, logging

from ..modeling.own_modules import as_pretrained_
from ..modeling.placement import sharding
from ..specs import QuantizationSpec
from . import records
from .batch_norm import fold_batch_norm_
from .convert import prepare_qat_, strip_quantizers_
from .schedule import BitSchedule, QATSchedule, UpdateScaling, learned_parameters

logger = logging.get_logger(__name__)


class QATCallback(TrainerCallback, ExportableState):
    """Trains a model with simulated integer weights and activations.

    Works with the plain `transformers.Trainer` and with every subclass. The fake quantizers are put in when the
    Trainer is made (see [`prepare_qat_`]) and stay in memory after training, so that `trainer.evaluate()` measures the
    quantized model. Saved files are those of an ordinary model; their `config.json` records spec and ranges, from
    which [`load_quantized`] rebuilds the quantized one. Training resumes exactly, and with `load_best_model_at_end`
    the ranges come from the same checkpoint as the weights; the best is searched among those that have the bits of the
    spec. In distributed training all processes use the ranges of the first one.

    With `lower_bits` the bits of the schedule are logged as `weight_bits`.

    Points of training are shares of its steps: 0.0 the start, 1.0 the end.

    Args:
        spec (`QuantizationSpec` or `dict`): what to quantize, and how; a dictionary as `spec.to_dict()` gives it, which
            is what a Trainer that restores its callbacks passes.
        strict_resume (`bool`, defaults to `True`): refuse to resume from a checkpoint of another spec; `False` warns
            instead, and takes over the ranges that fit.
        begin (`float`, defaults to 0.0): when the fake quantizers are turned on.
        freeze_ranges (`float`, *optional*): when ranges of activations, learned scales and codebooks stop to follow.
        freeze_batch_norm (`float`, *optional*): when BatchNorm stops to follow the batches and uses its running
            statistics.
        fold_batch_norm (`bool`, defaults to `False`): before training, move every BatchNorm into the convolution it
            follows, as in [`fold_batch_norm_`].
        lower_bits (`dict`, *optional*): the bit schedule: bits of the weights on the way to those of the spec, as
            `{0.0: 8, 0.3: 4, 0.6: 2}`; weights that the spec keeps wider stay wider.
        quantized_share (`float`, defaults to 1.0): Quant-Noise: share of the channels that each training pass quantizes, drawn at
            random, in (0, 1] (Fan et al., "Training with Quantization Noise for Extreme Model Compression", 2021).
        learning_rate_factor (`float`, defaults to 1.0): learning rate of learned ranges and scales, as a multiple of
            that of the Trainer.
        log_ranges (`bool`, defaults to `False`): log the least and the largest value of every quantized activation, as
            `activation_min/<module>` and `activation_max/<module>`.

    Raises:
        TypeError: `spec` is neither.
        NotImplementedError: as training is set up, scales of one number are to be learned under FSDP.
        RuntimeError: at the start of training, if scales are to be learned but the model got its fake quantizers after
            its optimizer.
        ValueError: the spec matches no module, points of training or bits are not in order, or training resumes from
            a checkpoint of another spec.

    Example:
        ```python
        from transformers import Trainer
        from hfkdq import QATCallback, QuantizationSpec

        trainer = Trainer(model, args, train_dataset=train, callbacks=[QATCallback(QuantizationSpec())])
        trainer.train()
        ```
    """

    def __init__(
        self,
        spec: QuantizationSpec | dict[str, Any],
        strict_resume: bool = True,
        *,
        begin: float = 0.0,
        freeze_ranges: float | None = None,
        freeze_batch_norm: float | None = None,
        fold_batch_norm: bool = False,
        lower_bits: BitSchedule | None = None,
        quantized_share: float = 1.0,
        learning_rate_factor: float = 1.0,
        log_ranges: bool = False,
    ) -> None:
        self.spec = spec = QuantizationSpec.given(spec, "QATCallback")
        self.strict_resume = strict_resume
        self.schedule = QATSchedule(spec, begin, freeze_ranges, freeze_batch_norm, lower_bits, quantized_share)
        self.fold_batch_norm = fold_batch_norm
        self.scaling = UpdateScaling(learning_rate_factor)
        self.log_ranges = log_ranges
        self._model: PreTrainedModel | None = None
        # Of the last optimizer step, where others would be read between two.
        self._states: dict[str, Any] | None = None

    def state(self) -> dict[str, Any]:
        """The part of a checkpoint that is the callback's: its settings, and the state of the quantizers."""
        more = {"learning_rate_factor": self.scaling.factor, "log_ranges": self.log_ranges}
        schedule = {**asdict(self.schedule), "fold_batch_norm": self.fold_batch_norm}
        attributes = self._present() if self._states is None else self._states
        return {"args": {"spec": self.spec.to_dict(), **schedule, **more}, "attributes": attributes}

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        if model is None:
            return
        if self.fold_batch_norm and records.quantized_spec(as_pretrained_(model)) is None:
            fold_batch_norm_(model)
        prepare_qat_(model, self.spec)
        if sharding() == "FSDP" and any(parameter.ndim == 0 for parameter in learned_parameters(model)):
            raise NotImplementedError(
                "The spec learns ranges or scales that are single numbers, and FSDP shards no parameter of one number. Leave out "
                "range_estimator and weight_estimator, or train under DDP or DeepSpeed."
            )
        self.schedule.at(0.0).apply_(model)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        late = records.quantized_spec(as_pretrained_(model)) is None
        prepare_qat_(model, self.spec)
        if late and learned_parameters(model):
            strip_quantizers_(model)
            raise RuntimeError(
                "The spec learns ranges or scales, which are parameters, and the optimizer was made before they existed. "
                "Give QATCallback to the constructor of the Trainer (callbacks=[...]) instead of add_callback; with "
                "model_init, let it return prepare_qat_(model, spec)."
            )
        self.schedule.at(state.global_step / state.max_steps).apply_(model)
        saved: Any = state.stateful_callbacks  # by name, whatever type Transformers says
        if state.global_step > 0:
            self._resume(self._saved_in(saved), model)
        # The Trainer updates this entry when it saves, and fails where a checkpoint without QAT did not have it.
        self._model = model
        saved.setdefault(type(self).__name__, self.state())
        self._share(model, args)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        self.scaling.before_step(model, self.schedule.at(state.global_step / state.max_steps).frozen)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        self.scaling.after_step_()
        # The step being taken is not counted in global_step yet.
        before, now = state.global_step / state.max_steps, (state.global_step + 1) / state.max_steps
        self.schedule.at(now).apply_(model)
        if before < self.schedule.schedule_end <= now:
            # Models before this step were not quantized as the spec says; none of them may be loaded as the best one.
            state.best_metric = state.best_model_checkpoint = state.best_global_step = None
        # Not at the end of the step, where a callback that runs before this one may save the model.
        self._share(model, args)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        logs: Any = None,
        **kwargs: Any,
    ) -> None:
        if logs is None or "loss" not in logs or not state.log_history:
            return
        told: dict[str, float] = {}
        if self.schedule.lower_bits:
            told["weight_bits"] = self.schedule.at(state.global_step / state.max_steps).bits
        if self.log_ranges:
            known = {name: q for name, q in records.activation_quantizers(model).items() if q.initialized}
            for name, quantizer in known.items():
                told[f"activation_min/{name}"], told[f"activation_max/{name}"] = quantizer.ends()
        logs.update(told)
        state.log_history[-1].update(told)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        if state.global_step < self.schedule.schedule_end * state.max_steps:
            logger.warning(
                f"Training stopped at step {state.global_step} of {state.max_steps}, before its weights had the bits "
                "of the spec. They have them now, without the training that should have followed."
            )
        self.schedule.at(1.0).apply_(model)
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            path = Path(state.best_model_checkpoint)
            has_config = (path / CONFIG_NAME).is_file()
            recorded = records.recorded_quantization(type(model.config).from_pretrained(path)) if has_config else None
            if recorded is not None:
                records.restore_record_(model, recorded[1])
            # A checkpoint of adapters has no configuration.
            elif has_config or not self._load_state_of(path, model):
                logger.warning(
                    f"The best checkpoint, {path}, was saved without quantization. Its weights "
                    "are used with the last activation ranges."
                )
        self._share(model, args)
        self._states = None
        records.record_ranges(model)

    def _saved_in(self, callbacks: Any) -> dict[str, Any] | None:
        saved = callbacks.get(type(self).__name__)
        return saved[0] if isinstance(saved, list) else saved

    def _load_state_of(self, path: Path, model: PreTrainedModel) -> bool:
        """Takes over the quantizers from the Trainer's state in a checkpoint; whether there were any."""
        file = path / "trainer_state.json"
        saved = self._saved_in(TrainerState.load_from_json(str(file)).stateful_callbacks) if file.is_file() else None
        if saved is None:
            return False
        records.load_quantizer_states_(model, saved["attributes"]["ranges"])
        records.load_weight_states_(model, saved["attributes"].get("weights", {}))
        return True

    def _resume(self, saved: dict[str, Any] | None, model: PreTrainedModel) -> None:
        if saved is None:
            logger.warning("The checkpoint was saved without QATCallback: activation ranges start anew.")
            return
        then, ranges = saved["args"]["spec"], saved["attributes"]["ranges"]
        weights = saved["attributes"].get("weights", {})
        if told := self.spec.differs([then], self.strict_resume):
            logger.warning(told)
            own = records.activation_quantizers(model)
            ranges = {k: v for k, v in ranges.items() if k in own and v.keys() == set(own[k].state_names)}
            weights = {}
        records.load_quantizer_states_(model, ranges)
        records.load_weight_states_(model, weights)

    def _present(self) -> dict[str, Any]:
        if self._model is None:
            return {"ranges": {}, "weights": {}}
        return {"ranges": records.quantizer_states(self._model), "weights": records.weight_states(self._model)}

    def _share(self, model: PreTrainedModel, args: TrainingArguments) -> None:
        """Makes the ranges of all processes equal, and the record of the model follow it."""
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            shared = [records.quantizer_states(model)]
            dist.broadcast_object_list(shared)
            records.load_quantizer_states_(model, shared[0])
        # What is saved between two micro batches goes on from the step before, so it must not have seen the first of them.
        steps_are_cut = args.gradient_accumulation_steps > 1
        if steps_are_cut:
            self._states = self._present()
        records.record_ranges(model, live=not steps_are_cut, digest=False)
