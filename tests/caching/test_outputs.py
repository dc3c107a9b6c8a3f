# SPDX-License-Identifier: Apache-2.0
"""What was cached of a teacher is what the teacher says, for every kind of head, at the positions that count."""

from __future__ import annotations

import pytest
import torch
from transformers import BertModel, DataCollatorWithPadding

from hfkdq.caching import CachedCollator, CachedTeacher, cache_info, cache_teacher_outputs
from hfkdq.losses.divergences import TopLogits, coarse_log_probabilities
from hfkdq.objectives import HiddenStateKD, LogitKD
from tests import tiny
from tests.caching.common import KINDS, both, cached, frames_of, language_rows, padder, speech

HALF = dict(rtol=2**-10, atol=2e-4)  # twice what rounding to float16 may do, and float32 sums in another order


def counted(kind, teacher, batch, shape):
    """Which entries of the first two axes of an output count; all but padding."""
    if kind == "ctc":
        return frames_of(teacher, batch)
    if kind == "seq2seq":
        return batch["labels"] != -100
    if kind in ("tokens", "causal", "causal, left", "span"):
        return batch["attention_mask"] == 1
    return torch.ones(shape[:2], dtype=torch.bool)


@pytest.mark.parametrize("kind", KINDS)
def test_cached_outputs_are_those_of_the_live_teacher(kind, tmp_path):
    make, rows, collator = KINDS[kind]
    teacher, collator = make(), collator()
    dataset = cached(teacher, rows(), collator, tmp_path)
    batch, found, live = both(teacher, dataset, collator)
    expected = {"span": ["start_logits", "end_logits"], "detection": ["logits", "pred_boxes"]}.get(kind, ["logits"])
    assert list(found) == expected
    for name in expected:
        assert found[name].dtype == torch.float32
        assert found[name].shape == live[name].shape
        valid = counted(kind, teacher, batch, live[name].shape)
        assert valid.any()
        torch.testing.assert_close(found[name][valid], live[name][valid].float(), **HALF)
        assert (found[name][~valid] == 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_cells_hold_no_padding(kind, tmp_path):
    make, rows, collator = KINDS[kind]
    dataset = cached(make(), rows(), collator(), tmp_path)
    output = cache_info(dataset).outputs[0]
    row = dataset[1]
    values = len(row[output.column]) // (2 if output.shape else 1)
    positions = {
        "tokens": "input_ids", "causal": "input_ids", "causal, left": "input_ids", "span": "input_ids", "seq2seq": "labels",
    }  # fmt: skip
    if kind in positions:
        assert values == len(row[positions[kind]]) * int(torch.tensor(output.shape).prod())
    elif kind == "ctc":
        assert values == 12 * int(make()._get_feat_extract_output_lengths(len(row["input_values"])))


def objectives_for(kind):
    yield LogitKD(divergence="mse") if kind == "regression" else LogitKD(temperature=1.5)
    if kind not in ("seq2seq", "detection", "regression"):
        yield HiddenStateKD()


@pytest.mark.parametrize("kind", KINDS)
def test_objectives_attach_to_the_outline_and_give_the_same_loss(kind, tmp_path):
    make, rows, collator = KINDS[kind]
    teacher, student, collator = make(1), make(0), collator()
    needs = frozenset({"logits", "hidden_states"}) if kind not in ("seq2seq", "detection") else frozenset({"logits"})
    layers = (0, 1, 2) if "hidden_states" in needs else ()
    dataset = cached(teacher, rows(), collator, tmp_path, hidden_states=layers)
    batch, found, live = both(teacher, dataset, collator, needs=needs)
    standing = CachedTeacher(cache_info(dataset), "cpu")
    own = {name: value for name, value in batch.items() if not name.startswith("teacher_")}
    out = student(**own, **({"output_hidden_states": True} if "hidden_states" in needs else {}))
    for objective in objectives_for(kind):
        of_cached, of_live = objective.copy(), objective.copy()
        of_cached.attach(student, standing.outline)
        of_live.attach(student, teacher)
        if "hidden_states" in objective.needs:
            standing.check({"hidden_states": of_cached.indices("hidden_states")[1]})
        mean, count = of_cached(out, found, batch), of_cached.positions(batch)
        expected, expected_count = of_live(out, live, batch), of_live.positions(batch)
        assert expected > 1e-4
        torch.testing.assert_close(mean, expected, rtol=3e-3, atol=1e-5)
        assert torch.as_tensor(count).equal(torch.as_tensor(expected_count))
        mean.backward(retain_graph=True)
        assert all(torch.isfinite(p.grad).all() for p in student.parameters() if p.grad is not None)


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_likeliest_tokens_and_the_rest_are_exact(side, tmp_path):
    teacher, collator = tiny.llama(1), KINDS["causal" if side == "right" else "causal, left"][2]()
    dataset = cached(teacher, language_rows(), collator, tmp_path, top_k=7, temperature=2.0)
    assert dataset.column_names[-3:] == ["teacher_top_log_probabilities", "teacher_top_indices", "teacher_row_check"]
    batch, found, live = both(teacher, dataset, collator)
    assert isinstance(found.logits, TopLogits)
    valid = batch["attention_mask"] == 1
    logits = live.logits[valid]
    indices = (logits / 2.0).softmax(-1).topk(7).indices
    assert torch.equal(found.logits.indices[valid], indices)
    probabilities = (logits / 2.0).softmax(-1)
    top = probabilities.gather(-1, indices)
    by_hand = torch.cat([top, 1 - top.sum(-1, keepdim=True)], dim=-1)
    torch.testing.assert_close(found.logits.log_probabilities[valid].exp(), by_hand, rtol=2e-3, atol=1e-4)
    # Together they are a distribution over different classes, at padding too.
    assert torch.equal(found.logits.indices[~valid], torch.arange(7).expand(int((~valid).sum()), 7))
    torch.testing.assert_close(
        found.logits.log_probabilities.exp().sum(-1), torch.ones(valid.shape), rtol=0, atol=4e-3
    )
    torch.testing.assert_close(
        found.logits.log_probabilities[valid], coarse_log_probabilities(logits, indices, 2.0), rtol=2e-3, atol=2e-3
    )


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_top_k_distillation_from_the_cache_is_that_from_the_teacher(dtype, tmp_path):
    teacher, student, collator = tiny.llama(1), tiny.llama(0), KINDS["causal"][2]()
    dataset = cached(teacher, language_rows(), collator, tmp_path, top_k=7, temperature=2.0, dtype=dtype)
    batch, found, live = both(teacher, dataset, collator)
    student_out = student(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    of_cached, of_live = LogitKD(), LogitKD(top_k=7)
    of_cached.attach(student, CachedTeacher(cache_info(dataset), "cpu").outline)
    of_live.attach(student, teacher)
    expected = of_live(student_out, live, batch)
    torch.testing.assert_close(of_cached(student_out, found, batch), expected, rtol=5e-3, atol=1e-4)
    with pytest.raises(ValueError, match=r"cached at temperature 2\.0"):
        LogitKD(temperature=3.0).attach(student, CachedTeacher(cache_info(dataset), "cpu").outline)


def test_large_vocabularies_are_cut_by_default_and_whole_on_request(tmp_path):
    collator = KINDS["causal"][2]()
    teacher, rows = tiny.llama(vocab=1030), language_rows(4)
    info = cache_info(cached(teacher, rows, collator, tmp_path / "auto"))
    assert (info.key["top_k"], info.outputs[0].shape, info.outputs[1].shape) == (64, (65,), (64,))
    assert info.outline.temperature == 1.0
    whole = cache_info(cached(teacher, rows, collator, tmp_path / "whole", top_k=None))
    assert (whole.key["top_k"], [o.name for o in whole.outputs], whole.outputs[0].shape) == (None, ["logits"], (1030,))
    assert whole.outline.temperature is None
    classes = cached(tiny.bert(labels=1030), tiny.text_dataset(4), None, tmp_path / "c", processing_class=padder())
    assert cache_info(classes).key["top_k"] is None


@pytest.mark.parametrize("kind", ["class", "tokens", "span", "detection", "ctc"])
def test_int8_is_off_by_half_a_scale_at_most(kind, tmp_path):
    make, rows, collator = KINDS[kind]
    teacher, collator = make(), collator()
    dataset = cached(teacher, rows(), collator, tmp_path, dtype="int8")
    batch, found, live = both(teacher, dataset, collator)
    for name in found:
        values = live[name].float()
        valid = counted(kind, teacher, batch, values.shape)
        for row in range(len(values)):
            # A class per example and a span have one scale, all else one per position.
            groups = [values[row][valid[row]]] if values.dim() == 2 else values[row][valid[row]]
            got = [found[name][row][valid[row]]] if values.dim() == 2 else found[name][row][valid[row]]
            for exact, near in zip(groups, got, strict=True):
                bound = (exact.max() - exact.min()) / 510
                assert (exact - near).abs().max() <= bound * 1.001 + 1e-5
                assert near.min() == pytest.approx(float(exact.min()), abs=1e-5)


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_only_the_layers_asked_for_are_cached(dtype, tmp_path):
    teacher, collator = tiny.bert(layers=4), KINDS["class"][2]()
    rows = tiny.text_dataset(10)
    dataset = cached(teacher, rows, collator, tmp_path, hidden_states=[3, 0], dtype=dtype)
    needs = frozenset({"logits", "hidden_states"})
    batch, found, live = both(teacher, dataset, collator, needs=needs)
    assert [state is None for state in found.hidden_states] == [False, True, True, False]
    valid = batch["attention_mask"] == 1
    for layer in (0, 3):
        tolerance = HALF if dtype == "float16" else dict(rtol=0, atol=0.05)
        torch.testing.assert_close(found.hidden_states[layer][valid], live.hidden_states[layer][valid], **tolerance)
    standing = CachedTeacher(cache_info(dataset), "cpu")
    assert standing.layers == (0, 3)
    assert len(standing.outline.states()) == 5
    standing.check({"hidden_states": frozenset({3}), "attentions": frozenset()})
    with pytest.raises(ValueError, match=r"\[1\] are not cached; \[0, 3\] are.*hidden_states=\[1, 3\]"):
        standing.check({"hidden_states": frozenset({1, 3})})
    with pytest.raises(ValueError, match=r"hidden_states=\[0, 1, 2, 3, 4\]"):
        standing.check({"hidden_states": None})
    with pytest.raises(ValueError, match="no attention probabilities"):
        standing.check({"attentions": None})
    assert "hidden_states" not in standing(batch, frozenset({"logits"}), {}, 1)
    only = standing(batch, needs, {"hidden_states": frozenset({3})}, 1)
    assert [state is None for state in only.hidden_states] == [True, True, True, False]


def test_a_model_without_a_head_has_hidden_states_alone(tmp_path):
    teacher = BertModel(tiny.bert_config()).eval()
    rows, collator = tiny.text_dataset(4).remove_columns("labels"), DataCollatorWithPadding(padder())
    info = cache_info(cached(teacher, rows, collator, tmp_path, hidden_states=[2]))
    assert [o.name for o in info.outputs] == ["hidden_state_2"]
    with pytest.raises(ValueError, match="returns no logits"):
        cached(teacher, rows, collator, tmp_path / "none")


def test_hidden_states_of_sound_follow_frames_before_the_adapter(tmp_path):
    teacher = speech(add_adapter=True, num_adapter_layers=1, adapter_stride=2, output_hidden_size=16)
    _, rows, collator = KINDS["ctc"]
    collator = collator()
    dataset = cached(teacher, rows(), collator, tmp_path, hidden_states=[1])
    assert [o.positions for o in cache_info(dataset).outputs] == ["adapted_frames", "frames"]
    needs = frozenset({"logits", "hidden_states"})
    batch, found, live = both(teacher, dataset, collator, needs=needs, rows=(2, 0, 1))
    lengths = batch["attention_mask"].sum(1)
    for row in range(3):
        n = int(teacher._get_feat_extract_output_lengths(lengths[row], add_adapter=False))
        torch.testing.assert_close(found.hidden_states[1][row, :n], live.hidden_states[1][row, :n], **HALF)
        # The adapter's convolution reaches into what it was padded with, in the last frame.
        n = int(teacher._get_feat_extract_output_lengths(lengths[row], add_adapter=True)) - 1
        torch.testing.assert_close(found.logits[row, :n], live.logits[row, :n], **HALF)
    assert found.logits.shape == live.logits.shape


def test_a_teacher_with_a_tokenizer_of_its_own_reads_its_own_columns(tmp_path):
    def own(row):
        ids = [2, *row["input_ids"], *row["input_ids"], 3]
        return {"teacher_input_ids": ids, "teacher_attention_mask": [1] * len(ids)}

    def collate(features):
        pad = DataCollatorWithPadding(padder())
        batch = pad([{k: v for k, v in f.items() if not k.startswith("teacher_")} for f in features])
        other = pad([{k[8:]: v for k, v in f.items() if k.startswith("teacher_")} for f in features])
        return {**batch, **{f"teacher_{k}": v for k, v in other.items()}}

    teacher, rows = tiny.bert(), tiny.text_dataset(8).map(own)
    dataset = cached(teacher, rows, collate, tmp_path, hidden_states=[2])
    info = cache_info(dataset)
    assert info.inputs == ("teacher_input_ids",)
    needs = frozenset({"logits", "hidden_states"})
    batch, found, live = both(teacher, dataset, collate, needs=needs)
    torch.testing.assert_close(found.logits, live.logits, **HALF)
    valid = batch["teacher_attention_mask"] == 1
    torch.testing.assert_close(found.hidden_states[2][valid], live.hidden_states[2][valid], **HALF)
    assert {"teacher_input_ids", "teacher_attention_mask"} <= CachedTeacher(info, "cpu").columns


def test_padding_to_a_multiple_leaves_values_where_they_belong(tmp_path):
    for kind in ("causal", "causal, left", "ctc"):
        make, rows, collator = KINDS[kind]
        teacher, wide = make(), collator()
        dataset = cached(teacher, rows(), collator(), tmp_path / kind)
        wide.pad_to_multiple_of = 1000 if kind == "ctc" else 16
        batch, found, live = both(teacher, dataset, wide)
        assert found.logits.shape == live.logits.shape
        valid = counted(kind, teacher, batch, live.logits.shape)
        torch.testing.assert_close(found.logits[valid], live.logits[valid], **HALF)


def test_a_teacher_is_loaded_from_its_folder_and_none_is_needed_afterwards(tmp_path):
    teacher, rows = tiny.bert(), tiny.text_dataset(8)
    teacher.save_pretrained(tmp_path / "model")
    dataset = cache_teacher_outputs(
        str(tmp_path / "model"), rows, processing_class=padder(), folder=tmp_path / "cache", accelerator=None
    )
    collator = DataCollatorWithPadding(padder())
    info = cache_info(dataset)
    batch = CachedCollator(collator, info)([dataset[i] for i in range(4)])
    standing = CachedTeacher(info, "cpu")
    assert standing.name == "BertForSequenceClassification"
    assert standing.fingerprint.startswith("BertForSequenceClassification ")
    assert standing.first_bad_step == 0
    standing.raise_if_bad(3)
    live = teacher(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    torch.testing.assert_close(standing(batch, frozenset({"logits"}), {}, 1).logits, live, **HALF)
