# SPDX-License-Identifier: Apache-2.0
"""Single weights in parameters of more than two axes: all experts of a layer in one tensor, and XLNet's attention."""

import pytest
import torch
from transformers import Trainer

from benchmarks.models.batches import collate, rows
from benchmarks.models.entries import ENTRIES
from hfkdq import PruningCallback, PruningSpec, prune
from hfkdq.facts import read_facts

MODULES = {"gpt-oss": "mlp.experts", "mixtral": "mlp.experts", "qwen3-moe": "mlp.experts", "xlnet": "rel_attn"}
# The axis that what comes in is multiplied along.
INPUTS = {"down_proj": 2, "gate_up_proj": 2, "q": 0, "k": 0, "v": 0, "r": 0}


def found(family):
    """A model, and its weights in such parameters with the axis of their inputs."""
    model = ENTRIES[family].make()
    named = {n: p for n, p in model.named_parameters() if f"{MODULES[family]}." in n and p.dim() == 3}
    weights = {n: (p, 1 if family == "gpt-oss" else INPUTS.get(n.rpartition(".")[2], 2)) for n, p in named.items()}
    weights = {n: pair for n, pair in weights.items() if not n.endswith("seg_embed")}
    if not weights:
        pytest.skip("a linear layer for each expert in this version of Transformers")
    return model, weights


def share(values):
    return float((values == 0).float().mean())


@pytest.mark.parametrize("family", MODULES)
def test_the_smallest_go_and_are_counted_and_saved(family, tmp_path):
    model, weights = found(family)
    expected = {name: values.detach().abs().flatten().sort().values for name, (values, _) in weights.items()}
    prune(model, PruningSpec(sparsity=0.5))
    fact = read_facts(model)["pruning"]
    assert "left_unpruned" not in fact
    assert fact["achieved_sparsity"] == pytest.approx(0.5, abs=0.01)
    for name, (values, _) in weights.items():
        assert share(values) == 0.5
        kept = values.detach().abs().flatten().sort().values[values.numel() // 2 :]
        assert torch.equal(kept, expected[name][values.numel() // 2 :])
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(again[name], values) for name, (values, _) in weights.items())


@pytest.mark.parametrize("family", MODULES)
def test_two_of_four_inputs_in_a_row_stay(family):
    model, weights = found(family)
    prune(model, PruningSpec(structure="n:m"))
    for values, axis in weights.values():
        inputs = values.detach().flatten(1) if axis == 2 and family == "xlnet" else values.detach().movedim(axis, -1)
        groups = inputs.reshape(-1, 4)
        assert bool(((groups == 0).sum(dim=1) == 2).all())


def test_what_they_read_is_not_seen():
    model, _ = found("gpt-oss")
    spec = PruningSpec(sparsity=0.5, criterion="activation", target_modules=["experts"])
    with pytest.raises(ValueError, match=r"experts has its weights in parameters of its own.*criterion='magnitude'"):
        prune(model, spec, [ENTRIES["gpt-oss"].batch()])


def test_what_is_pruned_in_a_training_stays_zero(training_arguments):
    model, weights = found("gpt-oss")
    examples = rows(ENTRIES["gpt-oss"].batch())
    callback = PruningCallback(PruningSpec(sparsity=0.5, criterion="taylor", end=0.5))
    trainer = Trainer(
        model=model,
        args=training_arguments(max_steps=4),
        train_dataset=examples,
        data_collator=collate,
        callbacks=[callback],
    )
    trainer.train()
    assert all(share(values) == pytest.approx(0.5, abs=0.01) for values, _ in weights.values())
