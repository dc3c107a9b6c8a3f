# SPDX-License-Identifier: Apache-2.0
"""Whether two models compute the same, found by running them on one batch in float64."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel
from transformers.utils import logging

from ..schema import brief
from .checkpoints import completed_by, plain_weights, without_pooler
from .examples import NoExample, given_to
from .forwards import as_output, forward_columns, full_precision, return_dict_kwargs
from .probing import nested_configs

_IN_DOUBLE = 5 * 10**8
"""Parameters up to which a copy in float64 is made; larger models are compared in their own precision."""

_SHARES = {torch.float64: 2e-6, torch.float32: 1e-3}
"""By precision, what may differ of the largest number: where norms are masked, some factors are rounded to float32."""

_LONGEST = 520
"""Tokens of the batch at most: windows of up to 256 tokens are seen."""


class NotWritten(OSError):
    """There is no room for a copy of a model, which says nothing of the model."""


class _Doubled(TorchFunctionMode):
    """Makes float64 of every float32 that a model asks for by name, as norms and softmax do."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.float:
            return args[0].double()
        args = tuple(torch.float64 if value is torch.float32 else value for value in args)
        return func(*args, **{k: torch.float64 if v is torch.float32 else v for k, v in (kwargs or {}).items()})


@contextmanager
def in_double(model: PreTrainedModel) -> Iterator[None]:
    """Where a model of float64 computes in float64 throughout; for a model of another kind it changes nothing."""
    before = torch.get_default_dtype()
    if model.dtype != torch.float64:
        yield
        return
    torch.set_default_dtype(torch.float64)
    try:
        with _Doubled():
            yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def _silent() -> Iterator[None]:
    """Transformers says nothing while a copy is saved and loaded."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


class Probe:
    """A copy of a model on the CPU in eval mode, in float64 if it is not too large, and a batch that it takes.

    The batch is made up, or, where none that is made up fits, that of [`tried_on`].

    Args:
        model (`PreTrainedModel`): the model, which is not touched.

    Raises:
        NoExample: the model takes no batch that is known.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        given = given_to(model)
        small = model.num_parameters() <= _IN_DOUBLE
        for self._dtype in (torch.float64, model.dtype) if small else (model.dtype,):
            self.twin = self.twin_of(model)
            for made in [*_made_batches(model), *([given] if given else [])]:
                self.batch = {
                    key: value.to("cpu", self._dtype if value.is_floating_point() else value.dtype)
                    for key, value in made.items()
                    if torch.is_tensor(value) and key != "labels"
                }
                try:
                    if self.outputs(self.twin):
                        return
                except Exception:  # whatever a class raises for inputs, or a precision, that are not its own
                    continue
        raise NoExample(
            f"{type(model).__name__} runs on none of the batches that are made up for it"
            f"{'' if given is None else ', nor on the one given'}, so what would become of it cannot be tried. Give a batch that "
            "it runs on, as your collator makes it: example_inputs=batch. Its outputs must have names."
        )

    def twin_of(self, model: PreTrainedModel) -> PreTrainedModel:
        """Such a copy of a model."""
        if any(parameter.is_meta for parameter in model.parameters()):
            raise NoExample(
                f"Parts of {type(model).__name__} lie on disk, so it cannot be tried. Load it without device_map."
            )
        twin = cast(Any, copy.deepcopy(model)).to("cpu", self._dtype).eval()
        if model.dtype != torch.float32:  # its tables of positions may be rounded; those of a loaded model are not
            for name, buffer in _built_buffers(model).items():
                owner, _, last = name.rpartition(".")
                module = twin.get_submodule(owner)
                if last in module._non_persistent_buffers_set and last in module._buffers:
                    module._buffers[last] = buffer.to(self._dtype) if buffer.is_floating_point() else buffer
        if "flash" in str(getattr(twin.config, "_attn_implementation", "")):
            twin.set_attn_implementation("sdpa")
        return twin

    def outputs(self, model: PreTrainedModel) -> list[Tensor]:
        """The floating-point tensors that `model` gives for the batch."""
        values = [value for value in self.run(model).values() if torch.is_tensor(value)]
        return [value for value in values if value.is_floating_point()]

    @torch.no_grad()
    def run(self, model: PreTrainedModel) -> Mapping[str, Any]:
        """All that `model` gives for the batch, by name."""
        arguments = dict(self.batch, **return_dict_kwargs(model))
        if "use_cache" in forward_columns(model):
            arguments["use_cache"] = False
        if getattr(model.config, "_experts_implementation", None) not in (None, "eager"):
            cast(Any, model).set_experts_implementation("eager")  # others have no float64
        with torch.random.fork_rng(devices=[]), in_double(model), full_precision(model):
            torch.manual_seed(0)
            return cast(Mapping[str, Any], as_output(model(**arguments)))

    def writes(self, model: PreTrainedModel, use_cache: bool) -> bool:
        """Whether an encoder-decoder generates two tokens for the batch."""
        given = {name: value for name, value in self.batch.items() if not name.startswith("decoder_")}
        settings = GenerationConfig.from_model_config(model.config)
        settings.update(max_new_tokens=2, min_new_tokens=2, use_cache=use_cache)
        try:
            with torch.random.fork_rng(devices=[]), in_double(model), full_precision(model), _silent():
                cast(Any, model).generate(**given, generation_config=settings)
        except Exception:  # whatever a class raises
            return False
        return True

    def reloaded(self, model: PreTrainedModel, load: Callable[..., Any]) -> list[Tensor]:
        """The same of `model` as `load` reads it again from disk; of several processes the first one tries it."""
        # Transformers 5 writes nothing in the others.
        if dist.is_available() and dist.is_initialized() and dist.get_rank() > 0:
            return self.outputs(model)
        if getattr(model, "generation_config", None) is not None:
            model.generation_config = GenerationConfig()
        with tempfile.TemporaryDirectory() as folder, _silent():
            try:
                model.save_pretrained(folder)
            except (OSError, SafetensorError) as error:
                raise NotWritten(
                    f"A copy of the model, which is tried, cannot be written to {folder} ({brief(error)}). Make room there, or name "
                    "another folder for temporary files in the variable TMPDIR."
                ) from error
            eager = getattr(model.config, "_attn_implementation", None) == "eager"  # others are not for every backbone
            with completed_by(type(model)), plain_weights():
                kwargs = {**({"attn_implementation": "eager"} if eager else {}), **without_pooler(model)}
                loaded = load(folder, dtype=model.dtype, **kwargs)
            return self.outputs(
                loaded.to(model.dtype).eval()
            )  # XLNet makes parameters in float32 whatever is asked for


def differing(found: Sequence[Tensor], expected: Sequence[Tensor], kept: Tensor | None = None) -> str | None:
    """By how much outputs differ where that is more than rounding; `kept` are the channels left of narrower outputs."""
    if len(found) != len(expected):
        return f"{len(found)} outputs where {len(expected)} are expected"
    for one, other in zip(found, expected, strict=True):
        if kept is not None and one.shape != other.shape and other.shape[-1:] == kept.shape:
            other = other[..., kept.to(other.device)]
        if one.shape != other.shape:
            return f"an output of shape {tuple(one.shape)} where {tuple(other.shape)} is expected"
        finite = other.isfinite()
        if not torch.equal(one.isfinite(), finite):
            return "numbers that are not finite"
        if bool(finite.any()):
            largest = float((one - other)[finite].abs().max())
            if largest > _SHARES.get(one.dtype, 0.05) * max(1.0, float(other[finite].abs().max())):
                return f"by up to {largest:.2g}"
    return None


def _built_buffers(model: PreTrainedModel) -> dict[str, Tensor]:
    try:
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            return dict(type(model)._from_config(copy.deepcopy(model.config), dtype=torch.float32).named_buffers())
    except Exception:  # not every model is what its configuration says
        return {}


def _made_batches(model: PreTrainedModel) -> Iterator[dict[str, Tensor]]:
    """Batches that models of this kind take, the likeliest first."""
    generator = torch.Generator().manual_seed(0)
    takes, config = forward_columns(model), model.config
    configs = [inner for _, inner in nested_configs(config)]
    main = model.main_input_name
    texts: list[str] = [name for name in ("input_ids", "decoder_input_ids") if name in takes]
    if not getattr(config, "is_encoder_decoder", False) and main == "input_ids" and "decoder_input_ids" in texts:
        texts.remove("decoder_input_ids")
    targets = int(_first(configs, "max_target_positions") or 26) - 2
    for shapes in _shapes(main, takes, configs):
        found = {name: torch.randn(2, *shape, generator=generator) for name, shape in shapes.items()}
        if not texts:
            yield found
            continue
        for length in _lengths(configs):
            made: dict[str, Tensor] = {}
            for name in texts:
                made[name] = _token_ids(config, length if name == "input_ids" else min(length, targets, 24), generator)
            if "attention_mask" in takes and "input_ids" in made:
                made["attention_mask"] = torch.ones_like(made["input_ids"])
                made["attention_mask"][-1, 2 * length // 3 :] = 0
            if "image_grid_thw" in takes and "input_ids" in made:
                yield from ({**text, **patches} for text, patches in _with_patches(configs, made, takes, generator))
            elif "pixel_values" in found and "input_ids" in made:
                yield from ({**found, **text} for text in _with_image(configs, made))
            yield {**found, **made}
            if found and main == "input_ids":
                yield made
            yield {key: value for key, value in {**found, **made}.items() if key != "attention_mask"}


def _shapes(main: str, takes: Collection[str], configs: Sequence[PretrainedConfig]) -> Iterator[dict[str, list[int]]]:
    """The shapes of one example of what is no text, by input."""
    found: dict[str, list[int]] = {}
    bins = _first(configs, "num_mel_bins", "input_feat_per_channel", "feature_projection_input_dim") or 80
    if "pixel_values" in takes:
        size = _first(configs, "image_size") or 64
        sides = size if isinstance(size, (tuple, list)) else (size, size)
        found["pixel_values"] = [int(side) for side in (_first(configs, "num_channels") or 3, *sides)]
    if main == "input_values":
        frames = _first(configs, "max_length")
        if "num_mel_bins" in vars(configs[0]) and "patch_size" in vars(configs[0]):
            yield {main: [int(frames or 1024), int(bins)]}
        yield {main: [4000]}
    elif "input_features" in takes:
        yield {**found, "input_features": [int(bins), 2 * int(_first(configs, "max_source_positions") or 50)]}
        yield {**found, "input_features": [100, int(bins)]}
        yield {**found, "input_features": [1, int(_first(configs, "spec_size") or 100), int(bins)]}
    elif "past_values" in takes:
        yield {"past_values": [int(_first(configs, name) or 1) for name in ("context_length", "num_input_channels")]}
    else:
        yield found
        frames = _first(configs, "num_frames")
        if found and frames:
            yield {"pixel_values": [int(frames), *found["pixel_values"]]}


def _with_image(configs: Sequence[PretrainedConfig], text: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """A text that begins with the tokens that stand for the patches of an image, where a text has such."""
    token = _first(configs, "image_token_id", "image_token_index")
    sizes = _first(configs, "image_size"), _first(configs, "patch_size")
    size, patch = (value[0] if isinstance(value, (list, tuple)) else value for value in sizes)
    if type(token) is int and type(size) is int and type(patch) is int:
        whole = (size // patch) ** 2
        named = [_first(configs, name) for name in ("mm_tokens_per_image", "image_seq_length", "num_query_tokens")]
        for count in dict.fromkeys([whole, whole + 1, *(n for n in named if type(n) is int), max(1, whole // 4)]):
            fronts = {name: torch.full((2, count), token if name == "input_ids" else 1) for name in text}
            yield {name: torch.cat([fronts[name], value], dim=1) for name, value in text.items()}


def _with_patches(
    configs: Sequence[PretrainedConfig], text: dict[str, Tensor], takes: Collection[str], generator: torch.Generator
) -> Iterator[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """A text behind a square image, for models that take the patches of all images as one matrix (Qwen2-VL)."""
    token, start = _first(configs, "image_token_id"), _first(configs, "vision_start_token_id")
    patch, merged = _first(configs, "patch_size"), _first(configs, "spatial_merge_size")
    if not all(type(number) is int for number in (token, start, patch, merged)):
        return
    side = 2 + int(_first(configs, "window_size") or 0) // (patch * merged)  # more than one window
    width = int(_first(configs, "in_channels", "in_chans") or 3) * int(_first(configs, "temporal_patch_size") or 1)
    image = {
        "pixel_values": torch.randn(2 * (side * merged) ** 2, width * patch**2, generator=generator),
        "image_grid_thw": torch.tensor([[1, side * merged, side * merged]] * 2),
    }
    ids = torch.tensor([[start, *[token] * side**2]] * 2)
    if "mm_token_type_ids" in takes:
        text = {**text, "mm_token_type_ids": torch.zeros_like(text["input_ids"])}
    fronts = {"input_ids": ids, "mm_token_type_ids": (ids == token).long()}
    yield {k: torch.cat([fronts.get(k, torch.ones_like(ids)), v], dim=1) for k, v in text.items()}, image


def _first(configs: Sequence[PretrainedConfig], *names: str) -> Any:
    values = (vars(config).get(name) for name in names for config in configs)
    return next((value for value in values if value is not None), None)


def _lengths(configs: Sequence[PretrainedConfig]) -> list[int]:
    """Longer than any local window, within the table of positions; and what a model says of its length itself."""
    numbers: list[tuple[str, int]] = []
    for config in configs:
        for name, value in vars(config).items():
            values = value if isinstance(value, (list, tuple)) else [value]
            numbers += [(name, number) for number in values if type(number) is int and number > 0]
    windows = [number for name, number in numbers if "window" in name or name == "local_attention"]
    seen = [number for number in windows if 2 * number + 8 <= _LONGEST]
    positions = [number for name, number in numbers if name in ("max_position_embeddings", "n_positions")]
    longest = min([_LONGEST, *(number - 2 for number in positions if number > 2)])
    own = [number for name, number in numbers if "seq_len" in name and number <= _LONGEST]
    return [max(2, min(2 * max(seen, default=8) + 8, longest)), *own]


def _token_ids(config: PretrainedConfig, length: int, generator: torch.Generator) -> Tensor:
    """Ids of tokens that are not special, the end of the text last, as some classifiers look for it."""
    text = config.get_text_config()
    special = {
        value
        for _, inner in nested_configs(config)
        for name, value in vars(inner).items()
        if ("token_id" in name or "token_index" in name) and type(value) is int
    }
    vocabulary = int(getattr(text, "vocab_size", None) or 2)
    plain = torch.tensor([i for i in range(min(vocabulary, 1000)) if i not in special] or [0])
    ids = plain[torch.randint(len(plain), (2, length), generator=generator)]
    end = getattr(text, "eos_token_id", None)
    if type(end) is int and end < vocabulary:
        ids[:, -1] = end
    return ids
