# SPDX-License-Identifier: Apache-2.0
"""HiddenStateKD: distances, layer maps, stages and the nearest layer, against sums by hand."""

import pytest
import torch
from torch.nn import functional as F

from hfkdq.objectives import HiddenStateKD
from hfkdq.objectives.layers import layer_map
from hfkdq.objectives.projections import Projections
from hfkdq.schedules import BottomUp, TopDown
from tests import tiny


def pair(**kwargs):
    return tiny.bert(0, layers=2), tiny.bert(1, layers=4, **kwargs)


def states(student, teacher):
    batch = tiny.batch(student)
    outs = [m(**batch, output_hidden_states=True) for m in (student, teacher)]
    return batch, outs, batch["attention_mask"] == 1


def value(objective, student, teacher, progress=0.0):
    objective.attach(student, teacher)
    batch, outs, _ = states(student, teacher)
    return objective(*outs, batch, progress=progress)


DISTANCES = {
    "mse": lambda s, t: F.mse_loss(s, t, reduction="none").mean(-1),
    "cosine": lambda s, t: 1 - (s * t).sum(-1) / (s.norm(dim=-1) * t.norm(dim=-1)),
    "normalized_mse": lambda s, t: (
        (s / s.norm(dim=-1, keepdim=True) - t / t.norm(dim=-1, keepdim=True)).pow(2).sum(-1)
    ),
}


@pytest.mark.parametrize("distance", DISTANCES)
def test_distances_by_hand(distance):
    student, teacher = pair()
    _, (ours, theirs), valid = states(student, teacher)
    d = DISTANCES[distance]
    expected = [d(ours.hidden_states[s], theirs.hidden_states[t])[valid].mean() for s, t in ((1, 2), (2, 4))]
    torch.testing.assert_close(value(HiddenStateKD(distance=distance), student, teacher), sum(expected) / 2)


@pytest.mark.parametrize(
    ("layers", "expected"),
    [("uniform", {1: 2, 2: 4, 3: 6}), ("last", {1: 4, 2: 5, 3: 6}), ("skip", {1: 2, 2: 4, 3: 6})],
)
def test_strategies(layers, expected):
    assert layer_map(layers, tiny.bert(), 3, 6) == expected


def test_skip_leaves_the_rest_at_the_top_out():
    assert layer_map("skip", tiny.bert(), 3, 8) == {1: 2, 2: 4, 3: 6}
    assert layer_map("last", tiny.bert(), 3, 8) == {1: 6, 2: 7, 3: 8}
    for layers in ("skip", "last"):
        with pytest.raises(ValueError, match="as many layers"):
            layer_map(layers, tiny.bert(), 4, 3)


def test_embeddings_are_one_pair_more():
    student, teacher = pair()
    _, (ours, theirs), valid = states(student, teacher)
    pairs = ((0, 0), (1, 2), (2, 4))
    expected = [DISTANCES["mse"](ours.hidden_states[s], theirs.hidden_states[t])[valid].mean() for s, t in pairs]
    torch.testing.assert_close(value(HiddenStateKD(embeddings=True), student, teacher), sum(expected) / 3)


def test_the_nearest_layer_is_found_for_every_layer():
    student, teacher = pair()
    _, (ours, theirs), valid = states(student, teacher)
    distances = torch.stack(
        [
            torch.stack(
                [DISTANCES["mse"](ours.hidden_states[s], theirs.hidden_states[t])[valid].mean() for t in range(1, 5)]
            )
            for s in (1, 2)
        ]
    )
    assert distances.argmin(1).tolist() != [1, 3]  # else it could not be told from the uniform map
    torch.testing.assert_close(
        value(HiddenStateKD(layers="dynamic"), student, teacher), distances.min(1).values.mean()
    )


def test_one_projection_serves_all_layers_that_may_be_the_nearest():
    student, teacher = pair(hidden=48)
    HiddenStateKD(layers="dynamic").attach(student, teacher)
    assert len(getattr(student, Projections.NAME).maps) == 2


@pytest.mark.parametrize(
    ("active", "progress", "counted"),
    [
        (BottomUp(), 0.0, [0]),
        (BottomUp(), 0.5, [0, 1]),
        (BottomUp(cumulative=False), 0.5, [1]),
        (TopDown(), 0.0, [1]),
        (TopDown(), 1.0, [0, 1]),
        (TopDown(cumulative=False), 1.0, [0]),
        (lambda progress, layers: [1.0, 3.0], 0.0, [0, 1, 1, 1]),
    ],
)
def test_stages_take_the_pairs_in_turn(active, progress, counted):
    student, teacher = pair()
    _, (ours, theirs), valid = states(student, teacher)
    single = [
        DISTANCES["mse"](ours.hidden_states[s], theirs.hidden_states[t])[valid].mean() for s, t in ((1, 2), (2, 4))
    ]
    expected = sum(single[i] for i in counted) / len(counted)
    torch.testing.assert_close(value(HiddenStateKD(active=active), student, teacher, progress), expected)


def test_projections_are_learned_for_every_pair_or_for_none():
    student, teacher = pair()
    HiddenStateKD(projection=True).attach(student, teacher)
    assert len(getattr(student, Projections.NAME).maps) == 2
    with pytest.raises(ValueError, match="projection=False"):
        HiddenStateKD(projection=False).attach(*pair(hidden=48))


def test_frames_of_sound_without_padding():
    student, teacher = tiny.wav2vec2_ctc(0), tiny.wav2vec2_ctc(1)
    mask = torch.ones(2, 2000, dtype=torch.long)
    mask[1, 1000:] = 0
    batch = {"input_values": torch.randn(2, 2000) * mask, "attention_mask": mask}
    objective = HiddenStateKD()
    objective.attach(student, teacher)
    outs = [m(**batch, output_hidden_states=True) for m in (student, teacher)]
    mean = objective(*outs, batch)
    count = objective.positions(batch)
    frames = [int(student._get_feat_extract_output_lengths(torch.tensor(n))) for n in (2000, 1000)]
    assert count == sum(frames)
    expected = []
    for s, t in ((1, 1), (2, 2)):
        d = DISTANCES["mse"](outs[0].hidden_states[s], outs[1].hidden_states[t])
        expected.append(torch.cat([d[i, :n] for i, n in enumerate(frames)]).mean())
    torch.testing.assert_close(mean, sum(expected) / 2)


def test_an_unknown_distance_is_refused():
    with pytest.raises(ValueError, match="distance='l3'"):
        HiddenStateKD(distance="l3")
