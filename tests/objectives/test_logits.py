# SPDX-License-Identifier: Apache-2.0
"""LogitKD on every head: what is compared, what counts, what is refused."""

import copy
import itertools

import pytest
import torch
import transformers
from torch.nn import functional as F
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    ElectraConfig,
    ElectraForPreTraining,
    FunnelConfig,
    FunnelForPreTraining,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    set_seed,
)

from benchmarks.models.entries import ENTRIES
from hfkdq.losses import DKD, forward_kl
from hfkdq.modeling.examples import tried_on
from hfkdq.objectives import EnsembleKD, LogitKD, TrainingStep
from hfkdq.objectives.logits import in_chunks
from hfkdq.schedules import Linear
from tests import tiny

DIVERGENCES = ["forward_kl", "reverse_kl", "jsd", "soft_ce", "mse", "dkd", "dist"]


def attached(objective, student, teacher):
    objective.attach(student, teacher)
    return objective


def value(objective, student, teacher, batch, **columns):
    inputs = {**batch, **columns}
    mean = objective(student(**batch), teacher(**batch), inputs)
    count = objective.positions(inputs)
    assert int(count) == int(objective.positions(inputs))
    return mean, int(count)


def bernoulli_kl(p, q):
    return p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()


class Recurrent(transformers.PreTrainedModel):
    """A class of one's own, which Transformers lists for no task: a symbol for each frame of a spectrogram."""

    config_class = transformers.Wav2Vec2BertConfig
    main_input_name = "input_features"

    def __init__(self, config):
        super().__init__(config)
        self.gru = torch.nn.GRU(config.feature_projection_input_dim, config.vocab_size, batch_first=True)
        self.post_init()

    def forward(self, input_features, attention_mask=None, labels=None):
        return transformers.modeling_outputs.CausalLMOutput(logits=self.gru(input_features)[0])


def test_a_class_of_ones_own_predicts_what_its_teacher_does():
    set_seed(0)
    config = transformers.Wav2Vec2BertConfig(
        vocab_size=9, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        feature_projection_input_dim=8, conv_depthwise_kernel_size=3,
    )  # fmt: skip
    student, teacher = Recurrent(config).eval(), transformers.Wav2Vec2BertForCTC(config).eval()
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    batch = {"input_features": torch.randn(2, 5, 8), "attention_mask": mask}
    with tried_on(batch, student):
        objectives = [attached(LogitKD(temperature=1.0), *pair) for pair in ((student, teacher), (teacher, student))]
    mean, count = value(objectives[0], student, teacher, batch)
    own, theirs = (model(**batch).logits[mask.bool()] for model in (student, teacher))
    torch.testing.assert_close(
        mean, F.kl_div(own.log_softmax(-1), theirs.log_softmax(-1), log_target=True, reduction="batchmean")
    )
    assert count == value(objectives[1], teacher, student, batch)[1] == 8


def test_several_labels_at_once_are_as_many_sigmoids():
    student, teacher = (tiny.bert(s, problem_type="multi_label_classification") for s in (0, 1))
    batch = tiny.batch(student)
    labels = torch.tensor([[1.0, 0, 1]] * 4)
    mean, count = value(attached(LogitKD(temperature=2.0), student, teacher), student, teacher, batch, labels=labels)
    p, q = ((m(**batch).logits / 2).sigmoid() for m in (teacher, student))
    torch.testing.assert_close(mean, 4 * bernoulli_kl(p, q).mean(), rtol=1e-4, atol=1e-5)
    assert count == 4
    # Yes stands first, so it is the class on the label where that is 1.
    step = TrainingStep({**batch, "labels": labels}, student=student(**batch), teacher=teacher(**batch))
    (prediction,) = attached(LogitKD(), student, teacher).predictions(step)
    assert prediction.target.tolist() == [[0, 1, 0]] * 4
    # Of two classes DKD is alpha * KL of both.
    decoupled, _ = value(
        attached(LogitKD(divergence=DKD(alpha=1, beta=8)), student, teacher), student, teacher, batch, labels=labels
    )
    torch.testing.assert_close(decoupled, mean, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("settings", [dict(labels=1), dict(labels=2, problem_type="regression")])
def test_numbers_are_compared_as_such(settings):
    student, teacher = (tiny.bert(s, **settings) for s in (0, 1))
    batch = tiny.batch(student)
    mean, _ = value(attached(LogitKD(divergence="mse"), student, teacher), student, teacher, batch)
    torch.testing.assert_close(mean, F.mse_loss(student(**batch).logits, teacher(**batch).logits))
    for divergence in set(DIVERGENCES) - {"mse"}:
        with pytest.raises(ValueError, match=r'Use LogitKD\(divergence="mse"\)'):
            LogitKD(divergence=divergence).attach(student, teacher)


@pytest.mark.parametrize("divergence", ["forward_kl", "mse", "dkd"])
def test_spans_are_distributions_over_the_text_without_its_padding(divergence):
    student, teacher = tiny.bert_qa(0), tiny.bert_qa(1)
    batch = tiny.batch(student)
    spans = dict(start_positions=torch.tensor([1, 2, 3, 99]), end_positions=torch.tensor([2, 3, 4, 99]))
    objective = attached(LogitKD(divergence=divergence), student, teacher)
    mean, count = value(objective, student, teacher, batch, **spans)
    outs = student(**batch), teacher(**batch)
    lengths = batch["attention_mask"].sum(1).tolist()
    single = []
    for row, length in enumerate(lengths):
        for part in ("start", "end"):
            s, t = (out[f"{part}_logits"][row : row + 1, :length] for out in outs)
            target = spans[f"{part}_positions"][row : row + 1].clamp(max=9)
            if divergence == "dkd" and int(target) >= length:  # an answer that was cut off
                continue
            single.append(objective._divergence(s, t, 2.0, target=target))
    if divergence == "dkd":
        torch.testing.assert_close(torch.cat(single).isfinite().all(), torch.tensor(True))
        assert torch.isfinite(mean)
    else:
        torch.testing.assert_close(mean, torch.cat(single).mean(), rtol=1e-4, atol=1e-5)
    assert count == 4


def sound(rows=3, samples=2000):
    generator = torch.Generator().manual_seed(0)
    mask = torch.ones(rows, samples, dtype=torch.long)
    mask[1, 1500:], mask[2, 900:] = 0, 0
    return {"input_values": torch.randn(rows, samples, generator=generator) * mask, "attention_mask": mask}


def test_frames_of_sound_count_as_far_as_the_sound_goes():
    student, teacher = tiny.wav2vec2_ctc(0), tiny.wav2vec2_ctc(1, hidden=48)
    batch = sound()
    mean, count = value(attached(LogitKD(), student, teacher), student, teacher, batch)
    frames = [int(student._get_feat_extract_output_lengths(torch.tensor(n))) for n in (2000, 1500, 900)]
    assert count == sum(frames)
    divergence = forward_kl(student(**batch).logits, teacher(**batch).logits, 2.0)
    expected = torch.cat([divergence[i, :n] for i, n in enumerate(frames)]).mean()
    torch.testing.assert_close(mean, expected)
    whole = {"input_values": batch["input_values"]}
    mean, count = value(attached(LogitKD(), student, teacher), student, teacher, whole)
    assert count == 3 * frames[0]


def brute_force_match(student, teacher):
    """The cheapest pairing of one image's queries, by trying all of them."""
    ps, pt = student.logits[0].softmax(-1), teacher.logits[0].softmax(-1)
    seen = 1 - pt[:, -1]

    def corners(b):
        return b[0] - b[2] / 2, b[1] - b[3] / 2, b[0] + b[2] / 2, b[1] + b[3] / 2

    def giou(a, b):
        (ax0, ay0, ax1, ay1), (bx0, by0, bx1, by1) = corners(a), corners(b)
        inter = max(0, min(ax1, bx1) - max(ax0, bx0)) * max(0, min(ay1, by1) - max(ay0, by0))
        union = (ax1 - ax0) * (ay1 - ay0) + (bx1 - bx0) * (by1 - by0) - inter
        hull = (max(ax1, bx1) - min(ax0, bx0)) * (max(ay1, by1) - min(ay0, by0))
        return inter / union - (hull - union) / hull

    def cost(i, j):
        a, b = student.pred_boxes[0, i].tolist(), teacher.pred_boxes[0, j].tolist()
        box = 5 * sum(abs(x - y) for x, y in zip(a, b, strict=True)) - 2 * giou(a, b)
        return float(((ps[i] - pt[j]).abs().sum() + seen[j] * box).detach())

    count = len(ps)
    return min(itertools.permutations(range(count)), key=lambda p: sum(cost(i, j) for j, i in enumerate(p))), seen


def test_object_queries_are_matched_before_they_are_compared():
    student, teacher = tiny.yolos(0, queries=4), tiny.yolos(1, queries=4, hidden=48)
    objective, orders = attached(LogitKD(), student, teacher), set()
    for seed in range(4):
        batch = {"pixel_values": torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(seed))}
        outs = student(**batch), teacher(**batch)
        for name in ("logits", "pred_boxes"):
            outs[1][name] = outs[1][name].roll(seed, dims=1)
        mean = objective(*outs, batch)
        count = objective.positions(batch)
        order, seen = brute_force_match(*outs)
        orders.add(order)
        divergence = forward_kl(outs[0].logits[0, list(order)], outs[1].logits[0], 2.0)
        shares = 0.1 + 0.9 * seen
        torch.testing.assert_close(mean, (divergence * shares).sum() / shares.sum(), rtol=1e-4, atol=1e-5)
        assert count == 1
    assert len(orders) > 1  # else the test could not tell


def test_the_order_of_the_teachers_queries_does_not_matter_and_their_numbers_may_differ():
    student, teacher = tiny.yolos(0, queries=4), tiny.yolos(1, queries=7)
    objective = attached(LogitKD(), student, teacher)
    batch = {"pixel_values": torch.randn(2, 3, 16, 16)}
    outs = student(**batch), teacher(**batch)
    mean = objective(*outs, batch)
    order = torch.randperm(7)
    outs[1].logits, outs[1].pred_boxes = outs[1].logits[:, order], outs[1].pred_boxes[:, order]
    torch.testing.assert_close(objective(*outs, batch), mean)


@pytest.mark.parametrize("texts", [1, 3])
def test_boxes_in_which_texts_are_looked_for_are_matched_too(texts):
    """OWL-ViT has a number for each text that it is given, and none for no object."""
    model = ENTRIES["owlvit"].make()
    batch = {"pixel_values": torch.randn(4, 3, 32, 32), "input_ids": torch.randint(4, 60, (4 * texts, 12))}
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    teacher = copy.deepcopy(model)
    with tried_on(batch, model):
        objective = attached(LogitKD(), model, teacher)
    outs = [model(**batch) for _ in range(2)]
    assert outs[0].logits.shape == (4, 16, texts)
    for name, value in (("logits", torch.randn(4, 16, texts)), ("pred_boxes", torch.rand(4, 16, 4))):
        outs[0][name], outs[1][name] = value, value.roll(5, dims=1)
    same = objective(*outs, batch)
    torch.testing.assert_close(same, torch.zeros(()), rtol=0, atol=1e-5)  # logarithms up to 10, times 4
    outs[1].logits = -outs[1].logits
    assert objective(*outs, batch) > 1e-3


def labelled(model, batch):
    labels = torch.where(batch["attention_mask"].bool(), batch["input_ids"] % 3, -100)
    labels[0, :3] = -100
    return labels


@pytest.mark.parametrize("per", ["token", "sample"])
def test_means_over_tokens_and_over_the_tokens_of_each_sample(per):
    student, teacher = tiny.bert_tokens(0), tiny.bert_tokens(1)
    batch = tiny.batch(student)
    labels = labelled(student, batch)
    mean, count = value(attached(LogitKD(per=per), student, teacher), student, teacher, batch, labels=labels)
    divergence = forward_kl(student(**batch).logits, teacher(**batch).logits, 2.0)
    rows = [divergence[i][labels[i] != -100] for i in range(4)]
    if per == "token":
        torch.testing.assert_close(mean, torch.cat(rows).mean())
        assert count == (labels != -100).sum()
    else:
        torch.testing.assert_close(mean, torch.stack([row.mean() for row in rows]).mean())
        assert count == 4


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("make", [tiny.bert_tokens, tiny.llama], ids=["tags", "next tokens"])
def test_padding_changes_no_value(make, divergence):
    student, teacher = make(0), make(1)
    batch = tiny.batch(student)
    labels = labelled(student, batch)
    objective = attached(LogitKD(divergence=divergence), student, teacher)
    mean, count = value(objective, student, teacher, batch, labels=labels)
    mean.backward()
    assert sum(float(p.grad.abs().sum()) for p in student.parameters() if p.grad is not None) > 0
    longer = {
        "input_ids": F.pad(batch["input_ids"], (0, 5), value=7),
        "attention_mask": F.pad(batch["attention_mask"], (0, 5)),
    }
    again, same = value(objective, student, teacher, longer, labels=F.pad(labels, (0, 5), value=-100))
    torch.testing.assert_close(again, mean, rtol=1e-4, atol=1e-5)
    assert same == count


def test_the_class_on_the_label_of_a_language_model_is_the_next_token():
    student, teacher = tiny.llama(0), tiny.llama(1)
    batch = tiny.batch(student)
    labels = labelled(student, batch)
    divergence = DKD(alpha=1.0, beta=0.0)
    objective = attached(LogitKD(divergence=divergence), student, teacher)
    mean, _ = value(objective, student, teacher, batch, labels=labels)
    valid = labels[:, 1:] != -100
    ours, theirs = (model(**batch).logits[:, :-1][valid] for model in (student, teacher))
    torch.testing.assert_close(mean, divergence(ours, theirs, 2.0, target=labels[:, 1:][valid]).mean())


def test_the_likeliest_tokens_and_the_rest():
    student, teacher = tiny.llama(0), tiny.llama(1)
    batch = tiny.batch(student)
    labels = labelled(student, batch)
    values = {
        k: value(attached(LogitKD(top_k=k), student, teacher), student, teacher, batch, labels=labels)[0]
        for k in (1, 8, 94, None)
    }
    assert 0 < values[1] < values[8] < values[94] <= values[None] * 1.0001
    torch.testing.assert_close(values[94], values[None], rtol=1e-3, atol=1e-4)


def test_large_vocabularies_are_taken_in_chunks(monkeypatch):
    student, teacher = tiny.llama(0), tiny.llama(1)
    batch = tiny.batch(student)
    labels = labelled(student, batch)
    objective = attached(LogitKD(), student, teacher)
    mean, _ = value(objective, student, teacher, batch, labels=labels)
    mean.backward()
    expected = [p.grad.clone() for p in student.parameters()]
    student.zero_grad()
    seen = []

    def small(function, *tensors):
        def watched(*rows):
            seen.append(len(rows[0]))
            return function(*rows)

        return in_chunks(watched, *tensors, elements=500)

    monkeypatch.setattr("hfkdq.objectives.logits.in_chunks", small)
    again, _ = value(objective, student, teacher, batch, labels=labels)
    again.backward()
    assert max(seen) == 5
    torch.testing.assert_close(again, mean)
    for p, gradient in zip(student.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, gradient)


def test_standardized_logits_do_not_depend_on_their_scale():
    student, teacher = tiny.bert(0), tiny.bert(1)
    batch = tiny.batch(student)
    objective = attached(LogitKD(standardize=True), student, teacher)
    outs = student(**batch), teacher(**batch)
    mean = objective(*outs, batch)
    outs[1].logits = 7 * outs[1].logits + 2
    torch.testing.assert_close(objective(*outs, batch), mean, rtol=1e-4, atol=1e-5)


def test_the_temperature_follows_its_schedule():
    student, teacher = tiny.bert(0), tiny.bert(1)
    batch = tiny.batch(student)
    objective = attached(LogitKD(temperature=Linear(4, 2)), student, teacher)
    for progress, temperature in ((0.0, 4.0), (0.5, 3.0), (1.0, 2.0)):
        expected = forward_kl(student(**batch).logits, teacher(**batch).logits, temperature).mean()
        found = objective(student(**batch), teacher(**batch), batch, progress=progress)
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("objective", "student", "teacher", "message"),
    [
        (LogitKD(), tiny.bert, tiny.bert_tokens, "predict different things"),
        (LogitKD(), tiny.bert, tiny.bert_qa, "predict different things"),
        (LogitKD(), tiny.bert_qa, lambda: tiny.bert(labels=2), "predict different things"),
        (LogitKD(), tiny.llama, tiny.bert_mlm, "predict different things"),
        (LogitKD(), tiny.llama, tiny.t5, "predict different things"),
        (LogitKD(), tiny.yolos, tiny.vit, "predict different things"),
        (LogitKD(), lambda: tiny.bert(labels=1), lambda: tiny.bert(labels=3), "predict different things"),
        (LogitKD(), lambda: tiny.wav2vec2_ctc(vocab_size=9), tiny.wav2vec2_ctc, "same labels or vocabulary"),
        (LogitKD(divergence="dist"), tiny.bert_qa, tiny.bert_qa, "makes no sense"),
        (LogitKD(divergence="dkd"), tiny.wav2vec2_ctc, tiny.wav2vec2_ctc, "makes no sense"),
        (LogitKD(divergence="dist"), tiny.yolos, tiny.yolos, "makes no sense"),
        (LogitKD(top_k=3), tiny.bert, tiny.bert, "leaves none out"),
        (LogitKD(top_k=4, divergence="mse"), tiny.llama, tiny.llama, "top_k"),
        (LogitKD(top_k=4, divergence="dkd"), tiny.llama, tiny.llama, "top_k"),
        (LogitKD(top_k=4, standardize=True), tiny.llama, tiny.llama, "top_k"),
    ],
)
def test_pairs_that_make_no_sense_are_refused_at_attach(objective, student, teacher, message):
    with pytest.raises(ValueError, match=message):
        objective.attach(student(), teacher())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(divergence="kl"), "'forward_kl', 'reverse_kl'"),
        (dict(per="batch"), "per must be"),
        (dict(top_k=0), "top_k must be"),
        (dict(temperature=Linear(1, 0)), "temperature must be larger"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        LogitKD(**settings)


def test_float_labels_where_the_configuration_says_classes():
    student, teacher = tiny.bert(0), tiny.bert(1)
    batch = tiny.batch(student)
    objective = attached(LogitKD(), student, teacher)
    with pytest.raises(ValueError, match=r"config\.problem_type"):
        objective(student(**batch), teacher(**batch), {**batch, "labels": torch.rand(4, 3)})


# ---------------------------------------------------------------------- heads by what they mean


def electra(seed):
    set_seed(seed)
    config = ElectraConfig(
        vocab_size=96, embedding_size=16, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        initializer_range=0.3,
    )  # fmt: skip
    return ElectraForPreTraining(config).eval()


def funnel(seed):
    set_seed(seed)
    config = FunnelConfig(
        vocab_size=96,
        block_sizes=[1, 1],
        num_decoder_layers=1,
        d_model=32,
        n_head=4,
        d_head=8,
        d_inner=48,
        initializer_std=0.3,
    )
    return FunnelForPreTraining(config).eval()


@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence")  # of Funnel itself
@pytest.mark.parametrize("make", [electra, funnel])
def test_replaced_tokens_are_a_yes_or_no_for_each(make):
    student, teacher = make(0), make(1)
    batch = tiny.batch(student)
    labels = batch["input_ids"] % 2
    mean, count = value(attached(LogitKD(), student, teacher), student, teacher, batch, labels=labels)
    p, q = ((m(**batch).logits / 2).sigmoid() for m in (teacher, student))
    attended = batch["attention_mask"].bool()
    torch.testing.assert_close(mean, 4 * bernoulli_kl(p, q)[attended].mean(), rtol=1e-4, atol=1e-5)
    assert count == attended.sum()


def segformer(seed, hidden=16):
    set_seed(seed)
    config = SegformerConfig(
        image_size=16, num_channels=3, num_encoder_blocks=2, depths=[1, 1], sr_ratios=[1, 1], hidden_sizes=[hidden, 2 * hidden],
        patch_sizes=[3, 3], strides=[2, 2], num_attention_heads=[1, 2], mlp_ratios=[2, 2], decoder_hidden_size=hidden,
        num_labels=5, initializer_range=0.3,
    )  # fmt: skip
    return SegformerForSemanticSegmentation(config).eval()


def test_pixels_that_have_a_label_count_in_every_image_alike():
    student, teacher = segformer(0), segformer(1, hidden=24)
    batch = {"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))}
    labels = torch.randint(0, 5, (2, 16, 16), generator=torch.Generator().manual_seed(1))
    labels[1, 8:] = 255
    objective = attached(LogitKD(), student, teacher)
    mean, count = value(objective, student, teacher, batch, labels=labels)
    outs = [model(**batch).logits.movedim(1, -1) for model in (student, teacher)]
    assert outs[0].shape == (2, 8, 8, 5)
    pixels = forward_kl(*outs, 2.0)
    torch.testing.assert_close(mean, (pixels[0].mean() + pixels[1, :4].mean()) / 2)
    assert count == 2
    torch.testing.assert_close(value(objective, student, teacher, batch)[0], pixels.mean())
    decoupled = attached(LogitKD(divergence="dkd"), student, teacher)
    assert value(decoupled, student, teacher, batch, labels=labels)[0].isfinite()


def test_maps_of_another_size_are_brought_to_the_students():
    student, teacher = segformer(0), segformer(1)
    objective = attached(LogitKD(), student, teacher)
    maps = torch.randn(1, 5, 4, 4)
    whole = F.interpolate(maps, size=(8, 8), mode="bilinear", align_corners=False)
    batch = {"pixel_values": torch.zeros(1, 3, 16, 16)}
    own, theirs = (type("Out", (), {"logits": x}) for x in (torch.randn(1, 5, 8, 8), maps))
    expected = forward_kl(own.logits.movedim(1, -1), whole.movedim(1, -1), 2.0).mean()
    torch.testing.assert_close(objective(own, theirs, batch), expected)


def test_vectors_of_examples_are_compared_by_their_likeness():
    def clip(seed, width):
        set_seed(seed)
        config = CLIPVisionConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4,
            projection_dim=width,
        )  # fmt: skip
        return CLIPVisionModelWithProjection(config).eval()

    student, teacher = clip(0, 16), clip(1, 24)
    batch = {"pixel_values": torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))}
    objective = attached(LogitKD(temperature=1.0), student, teacher)
    mean, count = value(objective, student, teacher, batch)
    likeness = [F.normalize(m(**batch).image_embeds, dim=-1) for m in (student, teacher)]
    others = [(x @ x.T / 0.07)[~torch.eye(4, dtype=torch.bool)].reshape(4, 3) for x in likeness]
    torch.testing.assert_close(mean, forward_kl(*others).mean(), rtol=1e-4, atol=1e-5)
    assert count == 4


@pytest.mark.parametrize("family", ["CLIP", "Siglip"])
def test_pairs_of_image_and_text(family):
    tower = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2)
    settings = dict(
        text_config=dict(tower, vocab_size=96, max_position_embeddings=16),
        vision_config=dict(tower, image_size=8, patch_size=4),
    )

    def made(seed):
        set_seed(seed)
        return getattr(transformers, f"{family}Model")(getattr(transformers, f"{family}Config")(**settings)).eval()

    student, teacher = made(0), made(1)
    batch = {
        "input_ids": torch.randint(5, 90, (4, 6), generator=torch.Generator().manual_seed(0)),
        "pixel_values": torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)),
    }
    with tried_on(batch, student):
        objective = attached(LogitKD(), student, teacher)
    found, count = value(objective, student, teacher, batch)
    ours, theirs = (m(**batch).logits_per_image for m in (student, teacher))
    if family == "CLIP":
        expected = (forward_kl(ours, theirs, 2.0) + forward_kl(ours.T, theirs.T, 2.0)).mean() / 2
    else:
        expected = 4 * bernoulli_kl((theirs / 2).sigmoid(), (ours / 2).sigmoid()).mean()
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)
    assert count == 4


@pytest.mark.parametrize("divergence", ["forward_kl", "dkd"])
def test_soft_labels_beside_it_leave_the_classes_what_they_are(divergence):
    """As mixing two examples makes them."""
    student, teacher = tiny.vit(0), tiny.vit(1)
    batch = tiny.batch(student)
    soft = torch.tensor([[0.7, 0.3, 0.0], [0.0, 0.1, 0.9], [1.0, 0.0, 0.0], [0.2, 0.2, 0.6]])
    objective = attached(LogitKD(divergence=divergence), student, teacher)
    found, _ = value(objective, student, teacher, batch, labels=soft)
    expected, _ = value(objective, student, teacher, batch, labels=soft.argmax(-1))
    torch.testing.assert_close(found, expected)


def test_rows_without_a_label_count_by_the_teachers_own_certainty():
    student, teachers = tiny.bert(0), {"a": tiny.bert(1), "b": tiny.bert(2)}
    batch = tiny.batch(student)
    objective = attached(EnsembleKD(), student, teachers)
    outs = {name: model(**batch) for name, model in teachers.items()}

    def of(labels):
        columns = batch if labels is None else {**batch, "labels": torch.tensor(labels)}
        rows = [{k: v[i : i + 1] for k, v in columns.items()} for i in range(4)]
        parts = [{n: type("Out", (), {"logits": o.logits[i : i + 1]}) for n, o in outs.items()} for i in range(4)]
        own = student(**batch).logits
        return [objective(type("Out", (), {"logits": own[i : i + 1]}), parts[i], rows[i]).item() for i in range(4)]

    labelled, bare, mixed = of([0, 1, 2, 0]), of(None), of([0, -100, 2, -100])
    assert mixed == pytest.approx([labelled[0], bare[1], labelled[2], bare[3]])
    assert labelled != pytest.approx(bare)
    soft = {**batch, "labels": F.one_hot(torch.tensor([0, 1, 2, 0]), 3).float()}
    assert objective(student(**batch), outs, soft).item() == pytest.approx(sum(labelled) / 4, rel=1e-5)


def test_the_first_token_after_padding_on_the_left_is_predicted_by_nothing():
    student, teacher = tiny.llama(0), tiny.llama(1)
    batch = tiny.batch(student)
    count = batch["attention_mask"].sum(1)
    left = {
        key: torch.stack([row.roll(10 - int(n)) for row, n in zip(x, count, strict=True)]) for key, x in batch.items()
    }
    objective = attached(LogitKD(), student, teacher)
    expected, _ = value(objective, student, teacher, batch)
    for labels in (None, left["input_ids"].masked_fill(left["attention_mask"] == 0, -100)):
        columns = {} if labels is None else {"labels": labels}
        positions = torch.cat([torch.arange(10)[None] - 10 + n for n in count]).clamp(min=0)
        found, _ = value(objective, student, teacher, {**left, "position_ids": positions}, **columns)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", [tiny.llama, tiny.t5])
def test_of_a_padded_vocabulary_the_common_ids_count_on_request(make):
    student, teacher = make(0, vocab=96), make(1, vocab=104)
    with pytest.raises(ValueError, match=r"common_ids=True.* student\.resize_token_embeddings\(104\)"):
        LogitKD().attach(student, teacher)
    objective = attached(LogitKD(common_ids=True, divergence="dkd"), student, teacher)
    batch = tiny.batch(student)
    batch = batch if make is tiny.llama else {**batch, "decoder_input_ids": batch["input_ids"]}
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    found, _ = value(objective, student, teacher, batch, labels=labels)
    outs = student(**batch), teacher(**batch)
    outs[1].logits = outs[1].logits[..., :96]
    same = attached(LogitKD(divergence="dkd"), student, make(1, vocab=96))
    torch.testing.assert_close(found, same(*outs, {**batch, "labels": labels}))
