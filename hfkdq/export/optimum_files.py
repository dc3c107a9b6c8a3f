# SPDX-License-Identifier: Apache-2.0
"""Runs a folder of exported files the way Optimum's users do, tensors in and tensors out.

Knows the names of the files and Optimum's classes; how the files came about is decided elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput

from optimum import onnxruntime as ort_models

from .checks import PAST

GENERATING = {
    "text-generation": "ORTModelForCausalLM",
    "text2text-generation": "ORTModelForSeq2SeqLM",
    "automatic-speech-recognition": "ORTModelForSpeechSeq2Seq",
    "image-to-text": "ORTModelForVision2Seq",
}


class GeneratingFiles:
    """A folder with the file of a decoder, or those of an encoder and its decoder, in Optimum's class for them.

    Args:
        folder (`Path`): the folder, with the configuration of the model.
        task (`str`): as `resolve_task` gave it.

    Attributes:
        input_names (`list[str]`): what a call takes.
        output_names (`list[str]`): what a call returns.
        model (`ORTModel`): the files in Optimum's class.
    """

    def __init__(self, folder: Path, task: str) -> None:
        cls = getattr(ort_models, GENERATING[task.removesuffix(PAST)])
        # The class looks for a cache by default, and refuses files that have none.
        self.model = (
            cls.from_pretrained(folder) if task.endswith(PAST) else cls.from_pretrained(folder, use_cache=False)
        )
        encoder = getattr(self.model, "encoder", None)
        self._encodes = encoder is not None
        self._caches = task.endswith(PAST)
        if encoder is not None:
            self.input_names = [*encoder.input_names, "decoder_input_ids"]
        else:
            self.input_names = ["input_ids", "attention_mask"]
        self.output_names = ["logits"]

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """The logits that `model(**batch)` has; inputs that the files do not take are ignored."""
        return {"logits": self.model(**self._inputs(batch)).logits}

    def step_by_step(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """The same logits, made as generation makes them: what comes later is added to the cache token by token.

        Args:
            batch (`Mapping[str, torch.Tensor]`): as for a call, texts padded on the right.

        Returns:
            `dict[str, torch.Tensor]`: `logits`, at every position.

        Raises:
            ValueError: the files have no cache.
        """
        if not self._caches:
            raise ValueError("These files have no cache to decode with. Export with a task that ends in -with-past.")
        inputs = self._inputs(batch)
        name = "decoder_input_ids" if self._encodes else "input_ids"
        ids = inputs.pop(name)
        length = ids.shape[1]
        # A decoder beside an encoder starts with one token, another with a prompt.
        begin = 1 if self._encodes else max(1, length // 2)
        cache, logits = None, []
        for start, end in [(0, begin), *((i, i + 1) for i in range(begin, length))]:
            tokens = {name: ids[:, start:end]}
            outputs = self.model(**self._until(end, inputs), **tokens, past_key_values=cache, use_cache=True)
            cache = outputs.past_key_values
            logits.append(outputs.logits)
            if self._encodes and start == 0:
                inputs = self._encoded(inputs, outputs.encoder_last_hidden_state)
        return {"logits": torch.cat(logits, dim=1)}

    def _inputs(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        inputs = {name: torch.as_tensor(value).cpu() for name, value in batch.items()}
        if any(name not in inputs and name != "attention_mask" for name in self.input_names):
            raise ValueError(f"The files take {', '.join(self.input_names)}; got {', '.join(inputs)}.")
        inputs = {name: value for name, value in inputs.items() if name in self.input_names}
        if "attention_mask" in self.input_names and "attention_mask" not in inputs:
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        return inputs

    def _until(self, end: int, inputs: dict[str, Any]) -> dict[str, Any]:
        """The inputs besides the tokens of a step of decoding."""
        return inputs if self._encodes else {"attention_mask": inputs["attention_mask"][:, :end]}

    def _encoded(self, inputs: dict[str, Any], states: Tensor) -> dict[str, Any]:
        """The inputs of the steps after the first, which do not encode again."""
        kept = {name: value for name, value in inputs.items() if name == "attention_mask"}
        return {**kept, "encoder_outputs": BaseModelOutput(last_hidden_state=states)}
