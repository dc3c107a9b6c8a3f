# SPDX-License-Identifier: Apache-2.0
"""Lets torch keep what a file kept where a model takes the best k of many, so that ties are told apart from errors.

Detectors of two stages keep the places of an image that score best as their queries. Two scores that are closer than
rounding have no order, and what is computed of one place cannot be compared with what is computed of another. Choices
are found in the graph and by running; nothing is known of architectures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from transformers import PreTrainedModel

from ..modeling.forwards import hooked, return_dict_kwargs
from ..quantization import quantized_modules
from .inputs import Tensors, model_inputs
from .rope import rope_by_length
from .runner import SINGLE
from .runtime import OnnxSession
from .session import Session
from .verify import run_torch

# Masked scores are infinite, or the largest number that there is.
_MASKED = 1e30


@dataclass
class Choices:
    """How a file chose, beside torch that was to choose among the same. `score_difference` is the largest difference of
    scores, both in torch, as a share of the largest score; no more than the tolerance where torch follows the file."""

    rows: int = 0  # that were chosen, over all batches
    other_rows: int = 0  # in whose place torch has another
    score_difference: float = 0.0
    not_followed: int = 0  # batches in which the difference was more, so that torch kept its own


class OtherChoice(RuntimeError):
    """A file differs from torch and keeps others, by scores that are no tie."""


def follow_choices(
    folder: Path, model: PreTrainedModel, batches: Sequence[Tensors], expected: Sequence[Tensors], tolerance: float,
    load: Callable[[Path], Session] = OnnxSession,
) -> tuple[list[Tensors], Choices | None]:  # fmt: skip
    """What a model gives for batches where it chooses as the file in a folder does that `load` runs, and how it did.

    `expected` is what it gives by its own choice, and stays where that is the same or better by more than `tolerance`
    (a share of the largest score). There are no choices in a file without any, or that chooses elsewhere than torch.
    """
    own, found = list(expected), Choices()
    with _choosing(folder, load) as names_and_session:
        if names_and_session is None:
            return own, None
        names, session = names_and_session
        chosen = [_chosen(session, names, batch) for batch in batches]
    # Now that there is no session, whose waiting threads slow torch down many times over.
    for index, (batch, theirs) in enumerate(zip(batches, chosen, strict=True)):
        if theirs is None:
            continue
        following = _Following(theirs)
        try:
            with following:
                outputs = run_torch(model, [batch])[0]
        except LookupError:
            return list(expected), None
        if following.index != len(names):
            return list(expected), None
        close = following.difference <= tolerance
        found.rows += following.rows
        found.other_rows += following.other_rows
        found.score_difference = max(found.score_difference, following.difference)
        found.not_followed += not close
        if close and following.other_rows:
            own[index] = outputs
    return own, found


def scored_by(model: PreTrainedModel, batch: Tensors) -> list[str]:
    """The quantized modules that a model computes scores with, to keep the best, with none between them and the scores; by name.

    None are found where the model cannot be run with gradients.
    """
    found: dict[Any, str] = {}

    def leaf(value: Any, name: str) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        cut = value.detach().requires_grad_()
        found[cut] = name
        return cut.clone()  # which may be changed in place

    hooks = [
        module.register_forward_hook(lambda _, given, out, name=name: tree_map(lambda value: leaf(value, name), out))
        for name, module in quantized_modules(model).items()
    ]
    names: dict[str, None] = {}
    with hooked(hooks), torch.enable_grad(), rope_by_length(model), _Scores() as seen, suppress(RuntimeError):
        model(**model_inputs(model, batch), **return_dict_kwargs(model))
    for scores in seen.scores:
        names.update(dict.fromkeys(found[value] for value in _leaves(scores) if value in found))
    return list(names)


class _Scores(TorchFunctionMode):
    """Keeps what torch chooses the best of."""

    def __init__(self) -> None:
        super().__init__()
        self.scores: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.topk, Tensor.topk):
            self.scores.append(args[0] if args else kwargs["input"])
        return func(*args, **kwargs)


def _leaves(value: Tensor) -> Iterator[Tensor]:
    """The tensors without a history that another was computed of, as far as gradients know."""
    if value.grad_fn is None:
        yield value
    waiting: list[Any] = [value.grad_fn]
    seen: set[Any] = {None}
    while waiting:
        node = waiting.pop()
        if node not in seen:
            seen.add(node)
            waiting += [before for before, _ in node.next_functions]
            if hasattr(node, "variable"):
                yield node.variable


@contextmanager
def _choosing(folder: Path, load: Callable[[Path], Session]) -> Iterator[tuple[list[str], Session] | None]:
    """The names of what the file chooses, in its order, and a session of a copy that gives them too; `None` without."""
    path = folder / f"{SINGLE}.onnx"
    file = onnx.load(path, load_external_data=False) if path.is_file() else onnx.ModelProto()  # but several parts
    nodes = [node for node in file.graph.node if node.op_type == "TopK" and len(node.output) == 2]
    if not nodes:
        yield None
        return
    given = {value.name for value in file.graph.output}
    for number, node in enumerate(nodes):
        node.output[1] = node.output[1] or f"top_k_{number}"
        if node.output[1] not in given:
            file.graph.output.append(onnx.helper.make_tensor_value_info(node.output[1], onnx.TensorProto.INT64, None))
    copy = folder / f"{SINGLE}_choosing.onnx"  # beside the weights, which may be in a file of their own
    try:
        onnx.save(file, copy)
        yield [node.output[1] for node in nodes], load(copy)
    finally:
        copy.unlink(missing_ok=True)


def _chosen(session: Session, names: Sequence[str], batch: Tensors) -> list[Tensor] | None:
    """What a file chooses for a batch; `None` if it does not take its sizes."""
    try:
        outputs = session({key: value.numpy() for key, value in batch.items()})
    except (RuntimeError, ValueError):  # which the comparison will tell of
        return None
    return [torch.from_numpy(outputs[name]) for name in names]


class _Following(TorchDispatchMode):
    """Puts the choices of a file, in the order of the calls, in the place of torch's own.

    `LookupError` where torch chooses of another shape, or more often.
    """

    def __init__(self, chosen: Sequence[Tensor]) -> None:
        super().__init__()
        self._chosen = chosen
        self.index, self.rows, self.other_rows, self.difference = 0, 0, 0, 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is not torch.ops.aten.topk.default:
            return out
        given = dict(zip(("self", "k", "dim", "largest", "sorted"), args, strict=False)) | (kwargs or {})
        dim, (values, own) = given.get("dim", -1), out
        if self.index == len(self._chosen) or self._chosen[self.index].shape != own.shape:
            raise LookupError("The file chooses elsewhere than torch.")
        theirs = self._chosen[self.index]
        taken = given["self"].gather(dim, theirs)
        pair = [one if given.get("sorted", True) else one.sort(dim).values for one in (values, taken)]
        known = pair[0].abs() < _MASKED
        scale = pair[0][known].abs().amax() if known.any() else 1.0
        apart = torch.where(pair[0] == pair[1], 0.0, (pair[0] - pair[1]).abs() / scale)
        self.index += 1
        self.rows += own.numel()
        self.other_rows += int((own != theirs).sum())
        self.difference = max(self.difference, float(apart.nan_to_num(nan=torch.inf).amax()))
        return torch.return_types.topk((taken, theirs))
