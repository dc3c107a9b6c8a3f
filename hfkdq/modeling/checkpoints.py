# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of anybody's: what is damaged is found and named before anything is loaded, and no code of theirs runs."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from fnmatch import fnmatch
from inspect import signature
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub import list_repo_files
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from ..files import looks_local, refuse_missing
from ..schema import brief, check_depth

_HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")
_PICKLES = (
    ("pytorch_model*.bin", "*.pt", "*.pth", "*.ckpt"),
    "a pickle, which may hold code. If you trust it, load it with from_pretrained of Transformers and write it with "
    "save_pretrained, which makes safetensors",
)
_RUN = (
    ("*.onnx", "openvino_*.xml"),
    "a file that is run and has no weights for PyTorch. Name the checkpoint that it was made of; to measure the file there are "
    "hfkdq report and hfkdq bench",
)
_FOLDERS = ("", "onnx/", "openvino/")
INDEX = "model.safetensors.index.json"
_PLAIN: ContextVar[bool] = ContextVar("plain_weights", default=False)


@contextmanager
def plain_weights() -> Iterator[None]:
    """While it lasts, `from_pretrained` loads float weights without the fake quantizers that a configuration records."""
    token = _PLAIN.set(True)
    try:
        yield
    finally:
        _PLAIN.reset(token)


def wants_plain_weights() -> bool:
    """Whether this is within [`plain_weights`]."""
    return _PLAIN.get()


def hub_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the arguments of `from_pretrained` that say where files are, for the configuration alone."""
    return {key: arguments[key] for key in _HUB_ARGUMENTS if key in arguments}


def load_config(path: str, config_class: type[PretrainedConfig] | None = None, **kwargs: Any) -> PretrainedConfig:
    """The configuration of a checkpoint; its files are looked through first, if it is a folder.

    Args:
        path (`str`): a folder or a model id on the Hub.
        config_class (`type`, *optional*): its class, where it is one of the user's own.
        kwargs (*optional*): of `from_pretrained`; those that say where files are count.

    Raises:
        FileNotFoundError: `path` is one of this machine, and nothing is there.
        ValueError: a file is damaged; one line names it.
        OSError: there is no such model on the Hub, the folder has no configuration, or its weights are pickles.
    """
    refuse_missing(str(path))
    folder = Path(path, kwargs.get("subfolder") or "")
    if folder.is_dir():
        _check_configured(folder)
        check_json(folder, ["config.json", "generation_config.json", INDEX])
        _check_weights(folder)
    try:
        if config_class is not None:
            return config_class.from_pretrained(path, **hub_arguments(kwargs))
        # Without False Transformers asks at the terminal whether to run the code of a checkpoint.
        return AutoConfig.from_pretrained(path, trust_remote_code=False, **hub_arguments(kwargs))
    except (OSError, ValueError, ImportError):
        raise
    except Exception as error:
        raise _damaged(f"The configuration of {path}", error) from error


def load_weights(model_class: type[PreTrainedModel], path: str, **kwargs: Any) -> PreTrainedModel:
    """What `model_class.from_pretrained` gives, of safetensors alone and with every weight; without a pooler that was not saved.

    Raises:
        ValueError: weights are missing, of other shapes or damaged.
        OSError: there are no safetensors.
    """
    # Weights of other shapes are let in to be named: Transformers refuses them without saying which.
    kwargs = {"use_safetensors": True, **kwargs, "ignore_mismatched_sizes": True, "output_loading_info": True}
    try:
        with completed_by(model_class), plain_weights():
            model, told = model_class.from_pretrained(path, **kwargs)
    except OSError:
        _refuse_others(path, _PICKLES, _RUN, **hub_arguments(kwargs))
        raise
    except (ValueError, ImportError, NotImplementedError):
        raise
    except Exception as error:
        raise _damaged(f"{path}, loaded as {model_class.__name__},", error) from error
    pooler = getattr(model, "pooler", None)
    whole = {f"pooler.{name}" for name in pooler.state_dict()} if isinstance(pooler, nn.Module) else set()
    if (
        whole
        and whole == {*told["missing_keys"]}
        and "add_pooling_layer" not in kwargs
        and _may_have_pooler(model_class)
    ):
        return load_weights(model_class, path, **kwargs, add_pooling_layer=False)
    wrong = {"lacks": told["missing_keys"], "has other shapes for": told["mismatched_keys"]}
    for what, names in wrong.items():
        if names:
            first = next(iter(sorted(map(str, names))))
            raise ValueError(
                f"{path} {what} {len(names)} of the weights of {model_class.__name__}, such as {first}; they would be random. "
                "Save it again where it was made, or download it again."
            )
    return model


def without_pooler(model: object) -> dict[str, Any]:
    """What its class is to be called with to have no pooler either, where a model has none."""
    has_none = isinstance(model, PreTrainedModel) and getattr(model, "pooler", model) is None
    return {"add_pooling_layer": False} if has_none and _may_have_pooler(type(model)) else {}


def _may_have_pooler(model_class: type) -> bool:
    return "add_pooling_layer" in signature(model_class).parameters


def check_json(folder: Path, names: Iterable[str]) -> None:
    """Refuses JSON files of a folder that cannot be read; those that are not there are no fault.

    Raises:
        ValueError: one of them; one line names it.
    """
    for file in [folder / name for name in names]:
        if not file.is_file():
            continue
        try:
            data = json.loads(file.read_text(encoding="utf-8"))
            check_depth(data if isinstance(data, (dict, list)) else {})
        except (ValueError, RecursionError) as error:
            raise _damaged(file, error) from error
        if not isinstance(data, dict):
            raise ValueError(f"{file} is damaged: it holds no object. Save it again, or download it again.")


def checkpoint_class(config: PretrainedConfig) -> type[PreTrainedModel]:
    """The class that a checkpoint's configuration names: of Transformers, or registered with one of its Auto classes.

    Raises:
        ValueError: it names none, or one that is neither.
    """
    names = config.architectures or []
    name = names[0] if isinstance(names, list) and names else None
    model_class = getattr(transformers, name, None) if isinstance(name, str) else None
    registered = {cls.__name__: cls for cls in _registered(type(config))}
    model_class = registered.get(str(name), model_class)
    if not (isinstance(model_class, type) and issubclass(model_class, PreTrainedModel)):
        raise ValueError(
            f"The configuration names {repr(names)[:200] if names else 'nothing'} as its architecture, which transformers {transformers.__version__} does "
            "not have. Load the model yourself, with the code it was made with; a class of your own that is registered with "
            "an Auto class (AutoModelFor....register) is found, and load_pruned and load_quantized take one as model=."
        )
    return model_class


def _registered(config_class: type) -> list[type]:
    """The classes of the user's own that were registered with an Auto class for a configuration."""
    mappings = [getattr(one, "_extra_content", {}).get(config_class) for one in vars(modeling_auto).values()]
    return [cls for entry in mappings if entry for cls in (entry if isinstance(entry, tuple) else (entry,))]


def _check_configured(folder: Path) -> None:
    """Refuses a folder that is no checkpoint of a whole model."""
    if (folder / "config.json").is_file():
        return
    inner = sorted(file.parent.name for file in folder.glob("*/config.json"))
    if (folder / "adapter_config.json").is_file():
        advice = "It holds an adapter of PEFT: load it on its base model, call merge_and_unload(), and save that."
    else:
        advice = (
            f"It holds {', '.join(inner[:4])}: name one of them." if inner else "Name a folder of save_pretrained."
        )
    raise OSError(f"{folder} has no config.json, so it is no checkpoint of Transformers. {advice}")


def _check_weights(folder: Path) -> None:
    """Refuses weights that are cut off or missing, by their headers."""
    files = sorted(folder.glob("*.safetensors"))
    for file in files:
        try:
            with safe_open(file, framework="pt"):
                pass
        except (SafetensorError, OSError, ValueError) as error:
            raise _damaged(file, error) from error
    index = folder / INDEX
    if index.is_file():
        parts = json.loads(index.read_text(encoding="utf-8")).get("weight_map")
        if not isinstance(parts, dict) or not all(isinstance(name, str) for name in parts.values()):
            raise ValueError(f"{index} is damaged: it has no map of weights. Save it again, or download it again.")
        missing = sorted({name for name in parts.values() if not (folder / name).is_file()})
        if missing:
            raise ValueError(f"{folder} lacks {', '.join(missing[:4])}, which its index names. Download it again.")
    _refuse_others(str(folder), _PICKLES)


def _refuse_others(path: str, *kinds: tuple[tuple[str, ...], str], **where: Any) -> None:
    """Refuses a folder, or a repository of the Hub, that has its weights in files of these kinds alone."""
    folder, names = Path(path), list[str]()
    if folder.is_dir():
        names = [file.relative_to(folder).as_posix() for part in _FOLDERS for file in folder.glob(f"{part}*")]
    elif not looks_local(path):
        with suppress(Exception):  # requests and httpx share no error class
            names = list_repo_files(path, revision=where.get("revision"), token=where.get("token"))
    near = sorted(name for name in names if name[: name.rfind("/") + 1] in _FOLDERS)
    if any(name.endswith(".safetensors") for name in near):
        return
    for patterns, advice in kinds:
        for name in near:
            if any(fnmatch(name.rpartition("/")[2], pattern) for pattern in patterns):
                raise OSError(f"{path} has its weights in {name} alone, {advice}.")


@contextmanager
def completed_by(model_class: type[PreTrainedModel]) -> Iterator[None]:
    """Says, where a class of one's own is loaded that Transformers 5 cannot load, what it lacks (`ValueError`)."""
    try:
        yield
    except AttributeError as error:
        if "all_tied_weights_keys" not in str(error):  # which post_init makes
            raise
        raise ValueError(
            f"{model_class.__name__} is not complete: its __init__ does not call self.post_init(), without which Transformers 5 "
            "loads no model. Call it at the end of __init__; what is saved already can then be loaded."
        ) from error


def _damaged(what: Any, error: BaseException) -> ValueError:
    """One line about something that cannot be read."""
    return ValueError(
        f"{what} is damaged ({type(error).__name__}: {brief(error)}). Save it again, or download it again."
    )
