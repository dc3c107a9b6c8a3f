# SPDX-License-Identifier: Apache-2.0
"""Loading pruned models whose configuration alone does not describe them."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ..facts import read_facts
from ..modeling import load_checkpoint, load_config
from ..modeling.own_modules import own_class
from .progress import UNFINISHED
from .sharing import restore_sharing_


def load_pruned(path: str, model: nn.Module | type[PreTrainedModel] | None = None, **kwargs: Any) -> PreTrainedModel:
    """Loads a checkpoint with the shapes that its configuration records, layer by layer, and the layers that are shared.

    No code comes from the checkpoint: the class is that of Transformers, or yours, built with smaller tensors. What plain
    `from_pretrained` can load, this loads as well.

    Args:
        path (`str`): a folder that `save_pretrained` or a Trainer wrote, or a model id on the Hub.
        model (`PreTrainedModel` or its class, or `nn.Module`, *optional*): a class of your own, or a model of it as it was
            before it was pruned, that is not registered with an Auto class. A model stays as it is; another of its class
            is returned.
        kwargs (*optional*): passed to `from_pretrained`; `dtype` is that of the file by default.

    Returns:
        `PreTrainedModel`: the model, in eval mode.

    Raises:
        TypeError: `model` is neither.
        ValueError: the record does not fit the class, the configuration names no class of Transformers, or the checkpoint
            is from the middle of a training that prunes layers or the hidden width.

    Example:
        ```python
        from hfkdq import load_pruned

        model = load_pruned("out/pruned")
        ```
    """
    own = own_class(model)
    config = load_config(path, None if own is None else own.config_class, **kwargs)
    unfinished = read_facts(config).get(UNFINISHED)
    if unfinished is not None:
        raise ValueError(
            f"{path} is from the middle of a training that prunes structure={unfinished.get('structure')!r}. Its weights alone are "
            "another model than the one that was trained: go on with trainer.train(resume_from_checkpoint=...), or save the "
            "model when the training has ended."
        )
    return restore_sharing_(load_checkpoint(path, config, own, **{"dtype": "auto", **kwargs}))
