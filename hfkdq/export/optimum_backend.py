# SPDX-License-Identifier: Apache-2.0
"""Writes ONNX files with Optimum, traced from torch, and puts those of a generating model together."""

from __future__ import annotations

import difflib
import inspect
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
import onnxruntime as ort
import torch
from accelerate.utils import find_tied_parameters
from optimum.exporters.onnx import OnnxConfig
from optimum.exporters.onnx.convert import export
from optimum.exporters.onnx.utils import _get_submodels_and_onnx_configs
from optimum.exporters.tasks import TasksManager
from optimum.onnx import merge_decoders, remove_duplicate_weights_from_tied_info
from optimum.onnxruntime import ORTModelForCausalLM
from optimum.utils import DEFAULT_DUMMY_SHAPES, DummyPastKeyValuesGenerator, NormalizedConfig
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from ..modeling.forwards import EMBEDDINGS, forward_columns
from ..modeling.tasks import is_bare, tasks_of
from . import runner
from .choices import WITHOUT_FILE
from .dummies import dummy_batches as random_batches
from .embeddings import NAME as SENTENCE_EMBEDDING
from .inputs import axes_of, beside_tokens, file_outputs, is_own, takes_any_size, to_trace
from .optimum_attention import CountedFromTheFront, PlainAttention
from .protocol import PAST, UnknownArchitecture
from .runner import SINGLE
from .silence import silent_and_seeded

__all__ = ["MERGES", "OPSET", "PACKAGES", "dummy_batches", "finish", "resolve_task", "trace"]

# The first opset with everything the exported models need as single operators; Optimum's own default.
OPSET = 18
MERGES = True
PACKAGES: tuple[str, ...] = ("transformers", "torch", "optimum-onnx", "onnx", "onnxruntime")
ENCODER, DECODER, DECODER_WITH_PAST, MERGED = (
    f"{name}.onnx" for name in (runner.ENCODER, runner.DECODER, runner.DECODER_WITH_PAST, runner.MERGED)
)


def resolve_task(model: PreTrainedModel, task: str | None) -> str:
    """Optimum's name of the task; by default that of the model's class, with a cache (`-with-past`) if it generates.

    `ValueError` if Optimum cannot export such a model, or not for this task.
    """
    supported = _supported_tasks(model)
    if task is None:
        return _inferred_task(model, supported)
    resolved: str = TasksManager.map_from_synonym(task)
    # Optimum has "seq2seq-lm" with and without "-with-past"; "summarization" says nothing of a cache.
    silent = resolved != task and TasksManager.map_from_synonym(task + PAST) == task + PAST
    if silent and resolved + PAST in supported:
        resolved += PAST
    if resolved not in supported:
        raise ValueError(
            f"Optimum cannot export {model.config.model_type!r} for the task {task!r}. It can for: "
            f"{', '.join(supported)}."
        )
    return resolved


def _supported_tasks(model: PreTrainedModel) -> list[str]:
    """The tasks that Optimum exports this architecture for and loads again."""
    model_type = model.config.model_type
    try:
        tasks = TasksManager.get_supported_tasks_for_model_type(model_type, "onnx", library_name="transformers")
    except KeyError as error:
        types = TasksManager.get_supported_model_type_for_task
        known = {name for task in TasksManager.get_all_tasks() for name in types(task, "onnx")}
        nearest = difflib.get_close_matches(model_type, sorted(known), n=3, cutoff=0.0)
        raise UnknownArchitecture(
            f"Optimum has no ONNX export for the architecture {model_type!r}. The nearest names it has are "
            f"{', '.join(nearest)}. Export it with Transformers 5, whose exporter has more of them. {WITHOUT_FILE}"
        ) from error
    # Without a head there is nothing to generate, and no ORTModelFor... class reads the several files.
    return [task for task in tasks if task != "feature-extraction" + PAST]


def _inferred_task(model: PreTrainedModel, supported: list[str]) -> str:
    """The task of the first class in the inheritance of `model` that Transformers has in a table."""
    for cls in type(model).__mro__:
        # Optimum's own inference takes the first entry, which for BART is fill-mask, and stops at DeiT's two classes.
        known: dict[str, dict[str, Any]] = TasksManager._TRANSFORMERS_TASKS_TO_MODEL_MAPPINGS
        for task, classes in known.items():
            names = {name for entry in classes.values() for name in ([entry] if isinstance(entry, str) else entry)}
            if task in supported and cls.__name__ in names:
                return task + PAST if task + PAST in supported else task
    listed = next((entry.name for entry in tasks_of(model) if entry.name in supported), None)
    # PatchTST has one for heads.
    headed = [task for task in supported if task != "feature-extraction" or is_bare(model)]
    # A tower with a projection (CLIP's) has no task in Transformers.
    possible = headed or ([] if tasks_of(model) else supported)
    if listed is not None or len(possible) == 1:
        return listed or possible[0]
    raise ValueError(
        f"Optimum cannot tell the task of {type(model).__name__}. Pass one as task=: {', '.join(supported)}."
    )


def dummy_batches(model: PreTrainedModel, task: str) -> list[dict[str, Tensor]]:
    """Random inputs of two sizes that `model` accepts, the same at every call; texts are padded on the right."""
    constructor = _constructor(model, task.removesuffix(PAST))
    if constructor is None:
        return random_batches(model, task)
    with silent_and_seeded():
        config, shapes = constructor(model.config), _shapes(model)
        length = shapes["sequence_length"]
        sizes = ({"batch_size": 8}, {"batch_size": 3, "sequence_length": length // 2})
        try:
            batches = [config.generate_dummy_inputs(framework="pt", **{**shapes, **size}) for size in sizes]
        except (IndexError, KeyError):  # where it would read the sizes off a processor, or off other names
            return random_batches(model, task)
    # The random positions that it draws are none that a text has.
    accepted = forward_columns(model) - {"position_ids"}
    return [{name: value for name, value in batch.items() if name in accepted} for batch in batches]


def trace(
    model: PreTrainedModel, folder: Path, task: str, batches: Sequence[Mapping[str, Tensor]] | None = None, *,
    fold_constants: bool,
) -> list[Path]:  # fmt: skip
    """Writes `model` as `model.onnx`, or as one file for each part of an encoder-decoder that generates.

    These are `encoder_model.onnx`, `decoder_model.onnx` and, with a cache, `decoder_with_past_model.onnx`, which `finish`
    merges. See [`Backend`].
    """
    # Some models ask this rather than the configuration, and would make a mask for every query.
    for module in model.modules():
        if hasattr(module, "attn_implementation"):
            module.attn_implementation = "eager"  # type: ignore[assignment]
    samples = [dict(batch) for batch in batches or dummy_batches(model, task)]
    with silent_and_seeded(), tempfile.TemporaryDirectory(dir=folder) as work, PlainAttention(), CountedFromTheFront():
        for name, (part, config) in _parts(model, task, samples).items():
            path = Path(work, f"{name}.onnx")
            export(
                part, config, path, opset=OPSET, input_shapes={**DEFAULT_DUMMY_SHAPES, **_shapes(model)},
                do_constant_folding=fold_constants, disable_dynamic_axes_fix=is_own(model),
            )  # fmt: skip
            # What several modules share is written once, as a head its embedding.
            if path.name != ENCODER and (tied := find_tied_parameters(model)):
                remove_duplicate_weights_from_tied_info(onnx.load(path), model, tied, save_path=str(path))
        # Files of more than 2 GB have their weights beside them.
        files = [file.replace(folder / file.name) for file in Path(work).glob("*.onnx*")]
    return sorted(file for file in files if file.suffix == ".onnx")


def _parts(
    model: PreTrainedModel, task: str, batches: Sequence[dict[str, Tensor]]
) -> dict[str, tuple[PreTrainedModel, OnnxConfig]]:
    """What is traced for each file, and its configuration; a model that is one file is traced on the batches."""
    parts: dict[str, tuple[PreTrainedModel, OnnxConfig]] = {SINGLE: (model, _OwnConfig(model.config, task="default"))}
    if _constructor(model, task) is not None:
        _, parts = _get_submodels_and_onnx_configs(
            model, task, monolith=False, custom_onnx_configs={}, custom_architecture=False, _variant="default",
            library_name="transformers",
        )  # fmt: skip
    if list(parts) == [SINGLE] and task.endswith(PAST):
        _fit_cache_(parts[SINGLE][1], model.config)
    if list(parts) == [SINGLE] and not task.endswith(PAST):
        _follow_(parts[SINGLE][1], model, task, batches)
    elif list(parts) == [SINGLE] and beside_tokens(batches[0]):
        _add_inputs_(parts[SINGLE][1], beside_tokens(batches[0]))
    return parts


def _fit_cache_(config: Any, of: PretrainedConfig) -> None:
    """Gives a decoder a cache with as many heads as its keys have, where Optimum takes those of its queries (Phi)."""
    heads: Any = getattr(of.get_text_config(), "num_key_value_heads", None)
    if config.DUMMY_PKV_GENERATOR_CLASS is not DummyPastKeyValuesGenerator or heads is None:
        return

    class Cache(DummyPastKeyValuesGenerator):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            width: int = self.__dict__["hidden_size"] // self.__dict__["num_attention_heads"]
            self.num_attention_heads, self.hidden_size = heads, heads * (getattr(of, "head_dim", None) or width)

    classes = tuple(Cache if c is DummyPastKeyValuesGenerator else c for c in config.DUMMY_INPUT_GENERATOR_CLASSES)
    made = {"DUMMY_INPUT_GENERATOR_CLASSES": classes, "DUMMY_PKV_GENERATOR_CLASS": Cache}
    config.__class__ = type(type(config).__name__, (type(config),), made)


def _add_inputs_(config: Any, names: Sequence[str]) -> None:
    """Has the configuration of a decoder take more than Optimum's for each token."""
    base = type(config)

    def dummies(self: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        given = base.generate_dummy_inputs(self, *args, **kwargs)
        return {**given, **dict.fromkeys(names, given["input_ids"] * 0)}

    axes = {**config.inputs, **dict.fromkeys(names, config.inputs["input_ids"])}
    config.__class__ = type(base.__name__, (base,), {"inputs": axes, "generate_dummy_inputs": dummies})


def _constructor(model: PreTrainedModel, task: str) -> Any:
    """What makes Optimum's configuration of an architecture for a task; `None` if it has none."""
    find = TasksManager.get_exporter_config_constructor
    try:
        return find("onnx", model=model, task=task, library_name="transformers")
    except (KeyError, ValueError, AttributeError):
        return None


class _OwnConfig(OnnxConfig):
    """Of an architecture that Optimum does not know."""

    NORMALIZED_CONFIG_CLASS = NormalizedConfig
    inputs: dict[str, dict[int, str]] = {}  # noqa: RUF012
    outputs: dict[str, dict[int, str]] = {}  # noqa: RUF012


def _follow_(config: OnnxConfig, model: PreTrainedModel, task: str, batches: Sequence[dict[str, Tensor]]) -> None:
    """Has a configuration of Optimum's take the inputs of the batches, by name, and give the outputs that come of them."""
    batch, any_size = to_trace(batches), takes_any_size(model, task)
    with torch.no_grad():
        output = model(**batch)
    names = list(file_outputs(model, output, task))
    known_axes = {**config.outputs, SENTENCE_EMBEDDING: {0: "batch_size"}}
    if not is_own(model) and not known_axes.keys().isdisjoint(output):
        names = [name for name in output if name in {*known_axes, *EMBEDDINGS}]
    order = [*(name for name in inspect.signature(model.forward).parameters if name in batch), *batch]
    inputs = {name: config.inputs.get(name) or axes_of(name, batches, task, any_size) for name in dict.fromkeys(order)}
    lengths = {batch[name].shape[axis]: known for name, axes in inputs.items() for axis, known in axes.items() if axis}
    outputs = {
        name: known_axes.get(name)
        or {0: "batch_size"} | {axis: lengths[n] for axis, n in enumerate(output[name].shape) if axis and n in lengths}
        for name in names
    }

    def dummies(self: Any, framework: str = "pt", **_: Any) -> dict[str, Any]:
        return {name: batch[name].numpy() if framework == "np" else batch[name] for name in inputs}

    own = {"inputs": inputs, "outputs": outputs, "generate_dummy_inputs": dummies}
    config.__class__ = type(type(config).__name__, (type(config),), own)


def finish(folder: Path, config: PretrainedConfig, task: str) -> None:
    """Completes what `trace` wrote for the classes of Optimum that run it.

    Two decoders become `decoder_model_merged.onnx`, if they can be merged, and a decoder by itself takes the empty cache
    that `ORTModelForCausalLM` begins with.
    """
    if task.endswith(PAST) and (folder / f"{SINGLE}.onnx").is_file():
        _take_empty_cache(folder / f"{SINGLE}.onnx", config)
    decoders = [folder / DECODER, folder / DECODER_WITH_PAST]
    # `ORTModelForSeq2SeqLM` takes all heads of a merged decoder together to be as wide as the model.
    width = getattr(config, "d_kv", None)
    can_be_merged = width is None or width * config.num_heads == config.d_model
    if not all(path.is_file() for path in decoders) or not can_be_merged:
        return
    beside = [path.with_name(f"{path.name}_data") for path in decoders]
    if any(path.is_file() for path in beside):
        # Optimum writes weights beside a file only where there is such a file.
        (folder / f"{MERGED}_data").touch()
    with silent_and_seeded():
        merge_decoders(*decoders, save_path=folder / MERGED, strict=False)
    for path in (*decoders, *beside):
        path.unlink(missing_ok=True)


def _take_empty_cache(path: Path, config: PretrainedConfig) -> None:
    """Leaves heads and width of a decoder's past open where `ORTModelForCausalLM` begins with others than the model has.

    It takes them from the width of the model and the heads of its queries for most architectures. Those of a cache without
    tokens do not matter: ONNX Runtime joins the first keys and values to nothing. The outputs say what the inputs leave open.
    """
    model = onnx.load(path, load_external_data=False)
    pasts = [value for value in model.graph.input if value.name.startswith("past_key_values")]
    grown = {value.name: value.type.tensor_type.shape.dim for value in model.graph.output}
    begun = _begun_cache(config)
    for value in pasts:
        dims = value.type.tensor_type.shape.dim
        if len(dims) == 4 and None not in begun and (dims[1].dim_value, dims[3].dim_value) != begun:
            for axis, dim in enumerate(grown.get(value.name.replace("past_key_values", "present"), ())):
                if dims[axis].dim_value:
                    dim.dim_value = dims[axis].dim_value
            dims[1].dim_param, dims[3].dim_param = "key_value_heads", "head_width"
    onnx.save(model, path)


def _begun_cache(config: PretrainedConfig) -> tuple[int | None, int | None]:
    """Heads and width of the empty cache that `ORTModelForCausalLM` makes, which does not ask its file for them."""
    value = onnx.helper.make_tensor_value_info("input_ids", onnx.TensorProto.INT64, [1])
    graph = onnx.helper.make_graph([], "none", [value], [value])
    file = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", OPSET)], ir_version=8)
    with silent_and_seeded(), tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "none.onnx")
        onnx.save(file, path)
        session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
        model = ORTModelForCausalLM(config=config, session=session, model_save_dir=folder)
    return tuple(getattr(model, name, None) for name in ("num_key_value_heads", "embed_size_per_head"))  # type: ignore[return-value]


def _shapes(model: PreTrainedModel) -> dict[str, int]:
    """Sizes of random inputs that fit the model."""
    config = model.config
    # Half of the position table leaves room for models that start counting at an offset.
    tables = [getattr(config, name, None) for name in ("max_position_embeddings", "max_target_positions")]
    shapes = {"sequence_length": min([16, *(table // 2 for table in tables if isinstance(table, int))])}
    if isinstance(frames := getattr(config, "max_source_positions", None), int):
        shapes["nb_max_frames"] = min(2 * frames, DEFAULT_DUMMY_SHAPES["nb_max_frames"])  # the encoder halves them
    return shapes
