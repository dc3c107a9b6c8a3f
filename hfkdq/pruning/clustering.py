# SPDX-License-Identifier: Apache-2.0
"""Weights that take few different values, found by k-means."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..bars import progress_bar
from ..facts import read_facts, record_fact
from ..modeling.own_modules import as_pretrained_
from ..specs import ModulePatterns, module_matches, unmatched

FACT = "clustering"
_BY_DEFAULT = (nn.Linear, Conv1D, nn.Embedding)
_POSSIBLE = (*_BY_DEFAULT, nn.Conv1d, nn.Conv2d)
# In one dimension each iteration is cheap, and nearly all weights settle long before.
_MOST_ITERATIONS = 1000
# After so many, empty clusters are put to use even if the others still move.
_PATIENCE = 100


@torch.no_grad()
def cluster_weights(
    model: PreTrainedModel,
    clusters: int = 32,
    *,
    target_modules: ModulePatterns = None,
    exclude_modules: ModulePatterns = None,
) -> PreTrainedModel:
    r"""Replaces the weights of every chosen layer by at most `clusters` different values, in place, as the final step.

    Every weight becomes the mean of its cluster, of those that k-means finds in one dimension over the weights \\(w\\)
    of a layer, from centroids \\(c\\) spread evenly from the smallest to the largest weight: the minimum of
    \\(\sum_i \min_j (w_i - c_j)^2\\) that Lloyd's algorithm reaches (Han et al., "Deep Compression: Compressing Deep
    Neural Networks with Pruning, Trained Quantization and Huffman Coding", 2016). Where outliers leave centroids without
    weights, the clusters with the largest error are cut at their mean instead, as many as there is room for. Weights that are exactly zero stay
    zero: where there are any, zero is one of the centroids and does not move. A weight with few enough values already
    stays as it is, so that clustering twice changes nothing.

    The model keeps its dtype and size; the file is small only once it is compressed, which [`compressed_size`]
    measures. Training undoes the clustering. Nothing is random.

    Args:
        model (`PreTrainedModel`): the model; norms, biases and whatever is no such layer stay.
        clusters (`int`, defaults to 32): how many values, at least 2. 32 of them are told apart by 5 bits.
        target_modules (`str` or list of `str`, *optional*): which linear layers, embeddings and convolutions; a string
            is a regular expression for the full name, a list holds names or their last parts. All linear layers and
            embeddings by default.
        exclude_modules (`str` or list of `str`, *optional*): which of them not.

    Returns:
        `PreTrainedModel`: the same model. `model.config.hfkdq["clustering"]` records `clusters`, `modules` (how many
        were clustered), and `relative_error`: the squared error as a share of the variance, over all of them.

    Raises:
        TypeError: `model` is no `PreTrainedModel`.
        ValueError: fewer than 2 clusters, no module matches, weights that are not finite floating-point numbers, a
            weight that is chosen under one name and excluded under another, or a model with fake quantizers. The
            model is then as it was.

    Example:
        ```python
        >>> from transformers import BertConfig, BertModel
        >>> from hfkdq.pruning.clustering import cluster_weights
        >>> config = BertConfig(hidden_size=32, num_attention_heads=2, intermediate_size=64, num_hidden_layers=1)
        >>> model = cluster_weights(BertModel(config), clusters=16)
        >>> len(model.encoder.layer[0].output.dense.weight.unique())
        16

        ```
    """
    if not isinstance(as_pretrained_(model), PreTrainedModel):
        raise TypeError(f"cluster_weights needs a Transformers PreTrainedModel, got {type(model).__name__}.")
    if isinstance(clusters, bool) or not isinstance(clusters, int) or clusters < 2:
        raise ValueError(f"clusters={clusters!r} must be an integer of at least 2, such as 32.")
    if "quantization" in read_facts(model):
        raise ValueError(
            "The model carries fake quantizers: its weights take few values already, and clusters would not be "
            "among them. Cluster the plain model, and quantize it afterwards if it is to be both."
        )
    chosen = _chosen(model, target_modules, exclude_modules)
    weights = {id(module.weight): cast(Tensor, module.weight) for module in chosen.values()}
    error = spread = 0.0
    for weight in progress_bar(weights.values(), desc="Clustering weights", unit="weight"):
        clustered = cluster_values(weight, clusters)
        values = weight.double() if weight.device.type != "mps" else weight.float()
        error += float((clustered - values).square().sum())
        spread += float((values - values.mean()).square().sum())
        weight.copy_(clustered)
    fact = {"clusters": clusters, "modules": len(chosen), "relative_error": error / spread if spread else 0.0}
    record_fact(model, FACT, fact)
    return model


@torch.no_grad()
def cluster_values(weight: Tensor, clusters: int) -> Tensor:
    """The tensor with every value replaced by the nearest centroid of k-means, as [`cluster_weights`] describes.
    `weight` is finite, of any shape; the result has the same shape, dtype and device, and at most `clusters`
    values."""
    # Sorted, each value once: of bfloat16 there are few, and the assignment to centroids becomes a cut in order.
    values, counts = torch.unique(weight.detach(), return_counts=True)
    if len(values) <= clusters:
        return weight.detach().clone()
    # On the CPU, where float64 exists and sums do not depend on the order of threads.
    centroids = _lloyd(values.cpu().double(), counts.cpu(), clusters)
    wide = torch.promote_types(weight.dtype, torch.float32)
    nearest = torch.bucketize(weight.detach().to(wide), _between(centroids).to(weight.device, wide))
    return centroids.to(weight.device, weight.dtype)[nearest]


def _between(centroids: Tensor) -> Tensor:
    return (centroids[1:] + centroids[:-1]) / 2


def _lloyd(values: Tensor, counts: Tensor, clusters: int) -> Tensor:
    """Ascending centroids of `values`, ascending float64, of which there are `counts`."""
    centroids = torch.linspace(float(values[0]), float(values[-1]), clusters, dtype=torch.float64)
    zero = int(torch.searchsorted(values, 0.0))
    has_zero = zero < len(values) and float(values[zero]) == 0.0
    fixed = int(centroids.abs().argmin()) if has_zero else None
    # Sums up to each value: what a cluster sums up to is the difference of two of them.
    sums = torch.stack([counts.double(), values * counts, values.square() * counts])
    sums = torch.cat([sums.new_zeros(3, 1), sums.cumsum(dim=1)], dim=1)  # (3, values + 1)
    ends = torch.tensor([0, len(values)])
    before = None
    for iteration in range(1, _MOST_ITERATIONS + 1):
        if fixed is not None:
            centroids[fixed] = 0.0
        edges = torch.cat([ends[:1], torch.searchsorted(values, _between(centroids), right=True), ends[1:]])
        settled = before is not None and torch.equal(edges, before)
        if settled or iteration % _PATIENCE == 0:
            cut = _cut_worst(edges, sums, values, clusters, zero if has_zero else None)
            if settled and len(cut) == 0:
                break
            if len(cut):
                edges = torch.cat([edges, cut]).unique()
                fixed = int(torch.searchsorted(edges, zero, right=True)) - 1 if has_zero else None
                centroids = torch.zeros(len(edges) - 1, dtype=torch.float64)
        before = edges
        size, total, _ = sums[:, edges].diff(dim=1)
        # A centroid that nothing is nearest to stays, and may find values later.
        centroids = torch.where(size > 0, total / size.clamp(min=1), centroids)
    return centroids


def _cut_worst(edges: Tensor, sums: Tensor, values: Tensor, clusters: int, zero: int | None) -> Tensor:
    """The means of the clusters with the largest error, as many as are empty: where to split them."""
    size, total, squares = sums[:, edges].diff(dim=1)
    error = squares - total.square() / size.clamp(min=1)
    error[edges.diff() < 2] = 0.0  # of one value, or none
    cuts = torch.searchsorted(values, total / size.clamp(min=1), right=True)
    if zero is not None:  # the centroid stays at zero, which has a side below and one above
        cell = int(torch.searchsorted(edges, zero, right=True)) - 1
        sides = torch.stack([edges[cell], torch.tensor(zero), torch.tensor(zero + 1), edges[cell + 1]])
        number, sum_of, side_error = sums[:, sides].diff(dim=1)[:, ::2]
        means = sum_of / number.clamp(min=1)
        below, above = torch.searchsorted(values, means[:1], right=True), torch.searchsorted(values, means[1:])
        error[cell] = 0.0
        error, cuts = torch.cat([error, side_error]), torch.cat([cuts, below, above])
    empty = clusters - int((size > 0).sum())
    return cuts[error.topk(min(empty, int((error > 0).sum()))).indices]


def _chosen(model: PreTrainedModel, target: ModulePatterns, exclude: ModulePatterns) -> dict[str, Any]:
    """The modules to cluster by name, those that share a weight once; all that can be wrong with them is found here."""
    possible = {name: module for name, module in model.named_modules() if isinstance(module, _POSSIBLE)}
    plain = {n for n, module in possible.items() if isinstance(module, _BY_DEFAULT)}
    wanted = {n: m for n, m in possible.items() if (n in plain if target is None else module_matches(n, target))}
    excluded = {id(module.weight): name for name, module in possible.items() if module_matches(name, exclude)}
    chosen: dict[int, tuple[str, nn.Module]] = {}
    for name, module in wanted.items():
        if module_matches(name, exclude):
            continue
        if id(module.weight) in excluded:
            raise ValueError(
                f"{name} is chosen and {excluded[id(module.weight)]} is excluded, but they share one weight. Choose "
                "both or exclude both."
            )
        chosen.setdefault(id(module.weight), (name, module))
    lost = [*unmatched(target, possible), *unmatched(exclude, possible)]
    if not chosen or lost:
        raise ValueError(
            f"target_modules={target!r}, exclude_modules={exclude!r} match no linear layer, embedding or convolution of "
            f"{type(model).__name__}. It has, for example: {', '.join(list(possible)[:3]) or 'none'}."
        )
    for name, owner in chosen.values():
        weight = cast(Tensor, owner.weight)
        if not weight.is_floating_point() or weight.is_meta or not bool(weight.isfinite().all()):
            raise ValueError(
                f"The weight of {name} is {weight.dtype} on {weight.device}; clustering needs finite floating-point "
                "numbers in memory. Load the model without quantization_config and without offloading, and look for "
                "infinite or undefined weights."
            )
    return dict(chosen.values())
