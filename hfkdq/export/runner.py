# SPDX-License-Identifier: Apache-2.0
"""Runs exported files as the model that they came from: tensors in, tensors out."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput

from .defaults import Array
from .protocol import PAST
from .record import place_of
from .runtime import open_session

ENCODER, DECODER, DECODER_WITH_PAST = "encoder_model", "decoder_model", "decoder_with_past_model"
# A decoder without and with a cache in one file, and a model that is one file.
MERGED, SINGLE = "decoder_model_merged", "model"
# The mask of what an encoder returns, which the encoder's file has where it is shorter than that of what goes in.
ENCODER_MASK = "encoder_attention_mask"
_OWN = ("input_ids", "attention_mask", "position_ids", "use_cache_branch")
# A model that generates is timed for so many tokens.
TOKENS = 32


@dataclass(frozen=True)
class Call:
    """A file, its role (`"model"`, `"encoder"`, `"prompt"`, `"next token"`), its inputs, and how often it is called."""

    part: str
    path: Path
    inputs: Mapping[str, Array]
    times: int = 1


class SingleFile:
    """A model that is one file."""

    def __init__(self, path: Path) -> None:
        self.paths, self._session = [path], open_session(path)
        self.input_names, self.output_names = self._session.input_names, self._session.output_names
        self.output_shapes = self._session.output_shapes

    def __call__(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The outputs for a batch, by name; inputs that the file does not take are ignored."""
        outputs = self._session({name: value.numpy() for name, value in batch.items()})
        return {name: torch.from_numpy(value) for name, value in outputs.items()}

    def calls(self, example: Mapping[str, Array]) -> list[Call]:
        """The timed call: the file on the example."""
        return [Call(SINGLE, self.paths[0], example)]


class GeneratingFiles:
    """The file of a decoder, or those of an encoder and its decoder; `has_cache` if tokens can be added one by one."""

    def __init__(self, folder: Path, task: str, suffix: str = "") -> None:
        every = (ENCODER, DECODER, DECODER_WITH_PAST, MERGED, SINGLE)
        paths = {name: _file(folder, f"{name}{suffix}") for name in every}
        self._paths = {name: path for name, path in paths.items() if path.is_file()}
        self.paths = [*self._paths.values()]
        self._sessions = {name: open_session(path) for name, path in self._paths.items()}
        self._encodes, self.has_cache = ENCODER in self._sessions, task.endswith(PAST)
        encoder = self._sessions.get(ENCODER)
        single = [] if encoder else self._sessions[SINGLE].input_names
        # What else there is to know of each token, as its type.
        self._beside = [name for name in single if name not in _OWN and not name.startswith("past_key_values")]
        given = ["input_ids", "attention_mask", *self._beside]
        self.input_names = [*encoder.input_names, "decoder_input_ids"] if encoder else given
        self.output_names = ["logits"]
        self._tokens = "decoder_input_ids" if self._encodes else "input_ids"

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """The logits that `model(**batch)` has; inputs that the files do not take are ignored."""
        return self._logits(batch, None)

    def incremental_decode(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """The same logits as a call, decoded as generation does it: later tokens join the cache one by one.

        Texts are padded on the right. `ValueError` if the files have no cache.
        """
        if not self.has_cache:
            raise ValueError("These files have no cache to decode with. Export with a task that ends in -with-past.")
        # A decoder beside an encoder starts with one token, another with a prompt.
        return self._logits(batch, 1 if self._encodes else max(1, np.shape(batch["input_ids"])[1] // 2))

    def generate(self, model: Any, batch: Mapping[str, Tensor], **settings: Any) -> Tensor:
        """The tokens that `model.generate(**batch, **settings)` writes where these files compute in place of the model.

        Only an encoder and its decoder; without a cache, whose steps are compared when the files are written.
        """
        shared = self._encoded({name: value.cpu().numpy() for name, value in batch.items()})
        states: Any
        states, mask = (torch.from_numpy(value).to(model.device) for value in shared.values())
        name, forward = self._decoder(0), model.forward

        @functools.wraps(forward)  # generate reads the signature
        def compute(*_: Any, decoder_input_ids: Tensor, encoder_outputs: Any, **inputs: Any) -> Seq2SeqLMOutput:
            given = {"input_ids": decoder_input_ids, "encoder_hidden_states": encoder_outputs[0]}
            seen = inputs.get("attention_mask")
            given[ENCODER_MASK] = torch.ones(given["encoder_hidden_states"].shape[:2]).long() if seen is None else seen
            arrays = {name: value.cpu().numpy() for name, value in given.items()}
            empty = {**self._empty(name, len(decoder_input_ids)), "use_cache_branch": np.array([False])}
            logits: Any = torch.from_numpy(self._sessions[name]({**arrays, **empty})["logits"]).to(model.device)
            return Seq2SeqLMOutput(logits=logits)

        masked = {"attention_mask": mask} if "attention_mask" in batch else {}
        model.forward = compute
        try:
            with torch.no_grad():
                outputs = BaseModelOutput(last_hidden_state=states)
                return model.generate(encoder_outputs=outputs, **masked, use_cache=False, **settings).cpu()
        finally:
            del model.forward

    def calls(self, example: Mapping[str, Array]) -> list[Call]:
        """The timed calls: generating `TOKENS` tokens, or, without a cache, one; `example` is a batch of one."""
        ids = np.zeros((1, 2), np.int64) if self._encodes else np.pad(example["input_ids"], [(0, 0), (0, 1)])
        longer = () if self._encodes else ("attention_mask", "position_ids")
        given = {name: value for name, value in example.items() if name not in longer}
        given |= {name: np.pad(given[name], [(0, 0), (0, 1)], mode="edge") for name in self._beside if name in given}
        last = ids.shape[1] - 1
        calls = [Call("encoder", self._paths[ENCODER], given)] if self._encodes else []
        steps = self._steps({**given, self._tokens: ids if self.has_cache else ids[:, :last]}, last)
        for part, (name, inputs, _) in zip(("prompt", "next token"), steps, strict=False):
            taken = {key: value for key, value in inputs.items() if key in self._sessions[name].input_names}
            calls.append(Call(part, self._paths[name], taken, 1 if part == "prompt" else TOKENS - 1))
        return calls

    def _logits(self, batch: Mapping[str, Any], begin: int | None) -> dict[str, Tensor]:
        """All logits; the tokens from `begin` on are given one by one."""
        arrays = {name: torch.as_tensor(value).cpu().numpy() for name, value in batch.items()}
        if self._tokens not in arrays:
            raise ValueError(f"The files take {', '.join(self.input_names)}; got {', '.join(arrays)}.")
        logits = [outputs["logits"] for _, _, outputs in self._steps(arrays, begin)]
        return {"logits": torch.from_numpy(np.concatenate(logits, axis=1))}

    def _steps(
        self, arrays: Mapping[str, Array], begin: int | None
    ) -> Iterator[tuple[str, dict[str, Array], dict[str, Array]]]:
        """Calls of the decoder, one after the other: the name of its file, what went in, what came out."""
        arrays = dict(arrays)
        ids = arrays.pop(self._tokens)
        length = ids.shape[1]
        begin = length if begin is None else begin
        shared = self._encoded(arrays) if self._encodes else arrays
        cache: dict[str, Array] = {}
        for start, end in [(0, begin), *((i, i + 1) for i in range(begin, length))]:
            name = self._decoder(start)
            inputs = {"input_ids": ids[:, start:end], **shared, **(cache or self._empty(name, len(ids)))}
            inputs["use_cache_branch"] = np.array([start > 0])
            if not self._encodes:
                inputs.update(_places(arrays, ids, start, end))
                inputs.update({name: arrays[name][:, start:end] for name in self._beside if name in arrays})
            outputs = self._sessions[name](inputs)
            yield name, inputs, outputs
            for key, value in outputs.items():
                # What is kept of the encoder does not change, and is not always given again.
                if key.startswith("present") and (start == 0 or ".encoder." not in key):
                    cache[key.replace("present", "past_key_values")] = value

    def _decoder(self, start: int) -> str:
        """The file that is fed tokens from `start` on."""
        if not self._encodes:
            return SINGLE
        return MERGED if MERGED in self._sessions else DECODER_WITH_PAST if start else DECODER

    def _encoded(self, arrays: Mapping[str, Array]) -> dict[str, Array]:
        """The inputs of the decoder that come from the encoder."""
        found = self._sessions[ENCODER](arrays)
        states = found["last_hidden_state"]
        given = arrays.get("attention_mask", np.ones(states.shape[:2], np.int64))
        return {"encoder_hidden_states": states, ENCODER_MASK: found.get(ENCODER_MASK, given)}

    def _empty(self, name: str, size: int) -> dict[str, Array]:
        """A cache of no tokens; a merged decoder, which does not look at it then, wants one."""
        session, tokens = self._sessions[name], int(self._encodes)
        kept = {key: shape for key, shape in session.input_shapes.items() if key.startswith("past_key_values")}
        # An input may leave open what the output that grows from it says.
        grown = {key: session.output_shapes.get(key.replace("past_key_values", "present"), kept[key]) for key in kept}
        pairs = {key: zip(kept[key], grown[key], strict=True) for key in kept}
        sizes = {key: [a if isinstance(a, int) else b for a, b in pair] for key, pair in pairs.items()}
        return {key: np.zeros((size, shape[1], tokens, shape[3]), np.float32) for key, shape in sizes.items()}


def open_files(folder: Path, task: str, suffix: str = "") -> SingleFile | GeneratingFiles:
    """Opens the files of a folder, whose names end in `suffix`, as what takes a batch as `model(**batch)` does and returns
    the same tensors."""
    generates = _file(folder, f"{ENCODER}{suffix}").is_file() or task.startswith("text-generation")
    return GeneratingFiles(folder, task, suffix) if generates else SingleFile(_file(folder, f"{SINGLE}{suffix}"))


def open_recorded(path: Path, facts: Mapping[str, Any]) -> SingleFile | GeneratingFiles:
    """Opens a folder with the record of its export, or one ONNX file, as what takes a batch as `model(**batch)` does."""
    if not path.is_dir():
        return SingleFile(path)
    place, suffix = place_of(path, facts)
    return open_files(place, facts.get("task", ""), suffix)


def _file(folder: Path, name: str) -> Path:
    """A file by its name: OpenVINO's, if there is one."""
    converted = folder / f"openvino_{name}.xml"
    return converted if converted.is_file() else folder / f"{name}.onnx"


def _places(arrays: Mapping[str, Array], ids: Array, start: int, end: int) -> dict[str, Array]:
    """Mask and positions of the tokens from `start` to `end` of a text."""
    mask = arrays.get("attention_mask", np.ones(ids.shape, np.int64))
    positions = arrays.get("position_ids", np.broadcast_to(np.arange(ids.shape[1]), ids.shape))
    return {"attention_mask": mask[:, :end], "position_ids": positions[:, start:end]}
