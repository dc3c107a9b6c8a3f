# SPDX-License-Identifier: Apache-2.0
"""Says what a checkpoint or an exported folder is, without loading a model: class, sizes, weights, records, hashes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import safe_open
from transformers import PretrainedConfig

from ..export.record import export_file, read_export
from ..facts import describe_facts, read_facts
from ..modeling import load_config
from ..modeling.tasks import task_of
from ..provenance import describe_files, find_difference, weight_files
from ..schema import read_file
from .files import public_facts, public_parity

# Of a configuration, whatever its family calls them (`attribute_map` knows the other names).
_SIZES = (
    "num_hidden_layers", "encoder_layers", "decoder_layers", "num_layers", "hidden_size", "d_model", "hidden_sizes", "depths",
    "num_attention_heads", "num_key_value_heads", "intermediate_size", "vocab_size", "max_position_embeddings", "image_size",
    "num_labels",
)  # fmt: skip


def inspect_folder(folder: str | Path) -> dict[str, Any]:
    """What there is to know of a folder with a `config.json`: a checkpoint, what `export_onnx` wrote, or both.
    JSON-ready: `architecture`, `model_type`, `task`, `sizes`, `parameters`, `weights` (name, shape, data type and share
    of zeros of each tensor), `facts` as they are recorded, `steps` in sentences, `files` with their hashes, and
    `export` with what the export recorded and `unchanged`, whether its files are still those. Raises `OSError`: there
    is no configuration. Raises `ValueError`: a file is damaged; one line names it."""
    folder = Path(folder)
    config = load_config(str(folder))
    facts = read_facts(config)
    name = next(iter(config.architectures or []), None)
    task = None if name is None else task_of(name)
    weights = [row for file in weight_files(folder) if file.suffix == ".safetensors" for row in _weights(file)]
    found: dict[str, Any] = {
        "architecture": name, "model_type": config.model_type, "task": None if task is None else task.name,
        "sizes": _sizes(config), "parameters": sum(row["parameters"] for row in weights), "weights": weights,
        "facts": public_facts(facts), "steps": describe_facts(facts), "files": describe_files(folder),
    }  # fmt: skip
    record = export_file(folder)
    if record.is_file() and "engines" not in read_file(record):
        recorded = read_export(folder)
        unknown = "its files were not recorded"
        difference = find_difference(folder, recorded["files"]) if "files" in recorded else unknown
        found["export"] = {**public_parity(recorded), "unchanged": difference is None, "difference": difference}
    return found


def _sizes(config: PretrainedConfig) -> dict[str, Any]:
    parts = {"": config, **{f"{name}.": getattr(config, name, None) for name in getattr(config, "sub_configs", {})}}
    found = {f"{prefix}{name}": getattr(part, name, None) for prefix, part in parts.items() for name in _SIZES}
    return {name: value for name, value in found.items() if isinstance(value, (int, list, tuple))}


def _weights(file: Path) -> list[dict[str, Any]]:
    rows = []
    with safe_open(file, framework="pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118 - no mapping
            tensor = tensors.get_tensor(name)
            zeros = int((tensor == 0).sum())
            rows.append({
                "name": name, "shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch."),
                "parameters": tensor.numel(), "zeros": zeros / max(1, tensor.numel()), "file": file.name,
            })  # fmt: skip
    return rows
