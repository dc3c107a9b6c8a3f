# SPDX-License-Identifier: Apache-2.0
"""Where a frozen model lives while a student is trained: on one device, sharded by FSDP2, or in a DeepSpeed engine."""

from __future__ import annotations

import copy
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, is_initialized
from accelerate.utils import DistributedType, DynamoBackend
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch.distributed.tensor import DTensor

from .forwards import base_of


def place_frozen(model: Any, accelerator: Accelerator) -> Any:
    """A frozen model as it is to be called beside the student that `accelerator` trains.

    A model that was loaded with a `device_map` or by bitsandbytes stays where it is. Any other is sharded where the
    student's parameters are (FSDP2, DeepSpeed ZeRO-3) and moved to the device of the training elsewhere, and compiled if
    the training is.
    """
    if has_device_map(base_of(model)):
        return model
    if accelerator.distributed_type == DistributedType.FSDP:
        return _by_fsdp2(model, accelerator)
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return _by_deepspeed(model, accelerator)
    model.to(accelerator.device)
    # Not `accelerator.prepare_model`: it would change the model's forward for every other use of it.
    plugin = accelerator.state.dynamo_plugin
    return model if plugin.backend == DynamoBackend.NO else torch.compile(model, **plugin.to_kwargs())


def has_device_map(model: Any) -> bool:
    """Whether a model is to run where it was loaded, which may be another device than that of the training."""
    return getattr(model, "hf_device_map", None) is not None or bool(getattr(model, "is_quantized", False))


def is_dispatched(model: Any) -> bool:
    """Whether hooks move what a model is given to its parts, on several devices or on disk."""
    devices = set((getattr(model, "hf_device_map", None) or {}).values())
    return len(devices) > 1 or "disk" in devices


def sharding() -> str | None:
    """What shards the model that this process trains, "FSDP" or "DeepSpeed"; `None` if nothing does."""
    names = {DistributedType.FSDP: "FSDP", DistributedType.DEEPSPEED: "DeepSpeed"}
    return names.get(AcceleratorState().distributed_type) if is_initialized() else None


def refuse_sharded(model: Any) -> None:
    """Raises `ValueError` for a model of which this process holds a part."""
    if was_split_while_loaded(model) or any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        raise ValueError(
            "The parameters of the model are spread over several processes. Save it in all of them (trainer.save_model) and "
            "go on in one, with the model that hfkdq.load_quantized or from_pretrained loads."
        )


def was_split_while_loaded(model: Any) -> bool:
    """Whether DeepSpeed ZeRO-3 took the parameters apart as the model was made, so that nothing can look at them."""
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())


def _by_fsdp2(model: Any, accelerator: Accelerator) -> Any:
    plugin = accelerator.state.fsdp_plugin
    # accelerate writes the layers of the model it wraps into the plugin, where the student's would be looked for.
    names, policy = plugin.transformer_cls_names_to_wrap, plugin.auto_wrap_policy
    plugin.transformer_cls_names_to_wrap = _layers_to_wrap(model, names)
    try:
        return fsdp2_prepare_model(accelerator, model)
    finally:
        plugin.transformer_cls_names_to_wrap, plugin.auto_wrap_policy = names, policy


def _layers_to_wrap(model: Any, names: list[str] | None) -> list[str]:
    """Classes of the layers of `model` to shard one by one: those configured if it has them, else its own."""
    present = {type(module).__name__: module for module in model.modules()}
    own = [name for name in names or () if name in present] or list(base_of(model)._no_split_modules or ())
    embeddings = model.get_input_embeddings()
    # accelerate shards the input embeddings by themselves, which fails within a block that is sharded already.
    return [name for name in own if name in present and all(m is not embeddings for m in present[name].modules())]


def _by_deepspeed(model: Any, accelerator: Accelerator) -> Any:
    import deepspeed

    student = accelerator.state.deepspeed_plugin.deepspeed_config
    kept = ("bf16", "fp16", "train_micro_batch_size_per_gpu")
    config = {key: copy.deepcopy(student[key]) for key in kept if isinstance(student.get(key), (int, dict))}
    config.setdefault("train_micro_batch_size_per_gpu", 1)
    zero = student.get("zero_optimization", {})
    # Below stage 3 only gradients and optimizer states are sharded, and a frozen model has neither.
    config["zero_optimization"] = {"stage": 3 if zero.get("stage") == 3 else 0}
    if config["zero_optimization"]["stage"] == 3 and "offload_param" in zero:
        config["zero_optimization"]["offload_param"] = copy.deepcopy(zero["offload_param"])
    engine, *_ = deepspeed.initialize(model=model, config=config)
    engine.eval()
    return engine
