# SPDX-License-Identifier: Apache-2.0
"""What was done to a model, written once into `model.config.hfkdq`, where it survives saving and loading.

Knows only that a model has a configuration; what the facts mean belongs to those who write them.
"""

from __future__ import annotations

import copy
from typing import Any

from transformers import PretrainedConfig, PreTrainedModel


def read_facts(model_or_config: PreTrainedModel | PretrainedConfig) -> dict[str, Any]:
    """A copy of all recorded facts, by topic (`"student"`, `"distillation"`, `"pruning"`, `"quantization"`)."""
    config = getattr(model_or_config, "config", model_or_config)
    facts = getattr(config, "hfkdq", None)
    return copy.deepcopy(facts) if isinstance(facts, dict) else {}


def record_fact(model: PreTrainedModel, topic: str, fact: dict[str, Any]) -> None:
    """Writes JSON-ready `fact` under `topic` into the model's configuration, in place of what stood there."""
    model.config.hfkdq = {**read_facts(model), topic: fact}


def drop_fact(model: PreTrainedModel, topic: str) -> None:
    """Takes a topic out again, and the record with it if nothing else is in it."""
    facts = read_facts(model)
    if facts.pop(topic, None) is not None:
        model.config.hfkdq = facts
        if not facts:
            del model.config.hfkdq


def refresh_facts(model: PreTrainedModel) -> None:
    """Lets the modules of a model that has changed its shapes write anew what they have recorded of it.

    A module that records something has a method `write_facts(model)`, which writes it for all of its kind.
    """
    kinds = {type(module).write_facts: module for module in model.modules() if hasattr(module, "write_facts")}
    for module in kinds.values():
        module.write_facts(model)
