# SPDX-License-Identifier: Apache-2.0
import copy

import pytest
import torch
from torch import nn
from transformers import (
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
    RobertaModel,
    ViTModel,
    set_seed,
)

from benchmarks.models.entries import ENTRIES
from hfkdq import PruningSpec, prune
from hfkdq.facts import read_facts, record_fact
from hfkdq.modeling import bypass_, find_layer_stack, find_layer_stacks, load_checkpoint
from hfkdq.students import make_student

from . import tiny
from .families import FAMILIES


def _roberta(layers):
    settings = tiny.bert_config(layers=layers).to_dict()
    return RobertaForSequenceClassification(RobertaConfig(**{**settings, "model_type": "roberta"})).eval()


def _gpt2(layers):
    config = GPT2Config(vocab_size=95, n_positions=64, n_embd=32, n_layer=layers, n_head=2)
    return GPT2LMHeadModel(config).eval()


def _qwen2(layers):
    config = Qwen2Config(
        vocab_size=95, hidden_size=32, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=4, use_sliding_window=True,
        layer_types=["full_attention" if i % 3 == 0 else "sliding_attention" for i in range(layers)],
    )  # fmt: skip
    return Qwen2ForCausalLM(config).eval()


MAKERS = [tiny.bert, tiny.bert_mlm, tiny.distilbert, tiny.vit, tiny.llama, _roberta, _gpt2, _qwen2]


def _logits(model):
    with torch.no_grad():
        return model(**tiny.batch(model)).logits


@pytest.mark.parametrize("make", MAKERS)
def test_a_student_is_the_teacher_without_some_layers(make, tmp_path):
    teacher = make(layers=5)
    teacher.config.use_cache = False  # layers know their place in the cache; those of the reference keep the old one
    student = make_student(teacher, layers=[1, 4, 5])
    assert type(student) is type(teacher)
    assert student.config.num_hidden_layers == 3

    # The reference is the teacher with the other layers cut out in place.
    cut = copy.deepcopy(teacher)
    stack = find_layer_stack(cut)
    for index in (2, 1):
        del stack.layers[index]
    cut.config = student.config
    cut.base_model.config = student.config
    assert torch.equal(_logits(student), _logits(cut))
    assert student.state_dict().keys() == cut.state_dict().keys()
    assert all(torch.equal(tensor, cut.state_dict()[name]) for name, tensor in student.state_dict().items())

    student.save_pretrained(tmp_path)
    assert torch.equal(_logits(type(student).from_pretrained(tmp_path)), _logits(student))


@pytest.mark.parametrize(
    ("total", "count", "layers"),
    [
        (4, 4, [1, 2, 3, 4]),
        (4, 2, [2, 4]),
        (4, 1, [4]),
        (4, 3, [1, 3, 4]),
        (3, 2, [2, 3]),  # 1.5 is rounded up
        (5, 2, [3, 5]),  # 2.5 too
        (6, 4, [2, 3, 5, 6]),
    ],
)
def test_layers_are_evenly_spaced_by_default(total, count, layers):
    teacher = tiny.bert(layers=total)
    student = make_student(teacher, count)
    assert read_facts(student) == {"student": {"teacher_layers": total, "layers": layers}}
    for layer, number in zip(find_layer_stack(student).layers, layers, strict=True):
        expected = find_layer_stack(teacher).layers[number - 1].state_dict()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in layer.state_dict().items())


def test_teacher_and_student_share_nothing():
    teacher = tiny.bert(layers=4).train()
    teacher.requires_grad_(False)
    weights, config = copy.deepcopy(teacher.state_dict()), teacher.config.to_dict()
    student = make_student(teacher, 2)
    assert not student.training
    assert teacher.training
    assert all(parameter.requires_grad for parameter in student.parameters())
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.zero_()
    student.config.id2label[0] = "changed"
    assert teacher.config.to_dict() == config
    assert all(torch.equal(tensor, weights[name]) for name, tensor in teacher.state_dict().items())


def test_what_was_recorded_of_the_teacher_is_not_said_of_the_student():
    teacher = tiny.bert(layers=4)
    record_fact(teacher, "pruning", {"achieved_sparsity": 0.5})
    record_fact(teacher, "student", {"teacher_layers": 12, "layers": [3, 6, 9, 12]})
    before = read_facts(teacher)
    student = make_student(teacher, 2)
    assert read_facts(student) == {"student": {"teacher_layers": 4, "layers": [2, 4]}}
    assert read_facts(teacher) == before


def test_the_random_number_generator_is_left_alone():
    teacher = tiny.llama(layers=4)
    state = torch.get_rng_state()
    make_student(teacher, 2)
    assert torch.equal(torch.get_rng_state(), state)


def test_dtype_and_attention_implementation_stay():
    teacher = tiny.llama(layers=4).to(torch.bfloat16)
    teacher.set_attn_implementation("eager")
    student = make_student(teacher, 2)
    assert {parameter.dtype for parameter in student.parameters()} == {torch.bfloat16}
    assert student.config._attn_implementation == "eager"
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize("tied", [True, False])
def test_tied_weights_stay_tied(tied):
    set_seed(0)
    config = tiny.llama(layers=3).config
    config.tie_word_embeddings = tied
    teacher = type(tiny.llama())(config)
    student = make_student(teacher, 2)
    assert (student.lm_head.weight is student.model.embed_tokens.weight) is tied
    assert torch.equal(student.lm_head.weight, teacher.lm_head.weight)


def test_lists_with_an_entry_per_layer_follow_their_layers():
    teacher = _qwen2(5)
    student = make_student(teacher, layers=[1, 2, 4])
    assert student.config.layer_types == ["full_attention", "sliding_attention", "full_attention"]
    assert len(teacher.config.layer_types) == 5


def test_positions_that_yolos_adds_between_layers_follow_their_layers():
    config = tiny.yolos().config
    config.num_hidden_layers = 4
    teacher = type(tiny.yolos())(config).eval()
    for name, parameter in teacher.named_parameters():
        if "mid_position" in name:  # they start alike
            nn.init.normal_(parameter)
    student = make_student(teacher, layers=[1, 3, 4])
    own, theirs = ({k: v for k, v in m.state_dict().items() if "mid_position" in k} for m in (student, teacher))
    assert own.keys() == theirs.keys()
    assert own
    for name in own:
        torch.testing.assert_close(own[name], theirs[name][[0, 2]], rtol=0, atol=0)
    with torch.no_grad():
        student(pixel_values=torch.randn(1, 3, 16, 16))


def test_the_generation_settings_come_along():
    teacher = tiny.llama(layers=3)
    teacher.generation_config.max_new_tokens = 7
    student = make_student(teacher, 2)
    assert student.generation_config.max_new_tokens == 7
    ids = student.generate(**tiny.batch(student), do_sample=False, eos_token_id=None)
    assert ids.shape[1] == 17


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "num_layers=None"),
        ({"num_layers": 0}, "student can have 1 to 4"),
        ({"num_layers": 5}, "student can have 1 to 4"),
        ({"num_layers": 2.0}, r"num_layers=2\.0"),
        ({"num_layers": 2, "layers": [1, 2]}, "Pass one of them"),
        ({"layers": []}, "1 to 4"),
        ({"layers": [0, 1]}, "1 to 4"),
        ({"layers": [4, 5]}, "1 to 4"),
        ({"layers": [2, 1]}, "each larger than the one before"),
        ({"layers": [2, 2]}, "each larger than the one before"),
        ({"layers": ["1"]}, "1 to 4"),
    ],
)
def test_bad_choices_of_layers_say_what_is_possible(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_student(tiny.bert(layers=4), **arguments)


@pytest.mark.parametrize("family", ["t5", "bart", "whisper", "detr"])
def test_encoder_and_decoder_are_cut_apart(family):
    teacher = FAMILIES[family].make()
    encoder, decoder = find_layer_stacks(teacher)
    student = make_student(teacher, layers=[2], decoder_layers=[2, 3])
    assert student.config.hfkdq["student"] == {
        "teacher_layers": 2, "layers": [2], "teacher_decoder_layers": 3, "decoder_layers": [2, 3],
    }  # fmt: skip
    found = {stack.name: stack.layers for stack in find_layer_stacks(student)}
    for stack, kept in ((encoder, [2]), (decoder, [2, 3])):
        assert len(found[stack.name]) == len(kept)
        for layer, number in zip(found[stack.name], kept, strict=True):
            own = {n: t for n, t in layer.state_dict().items() if "relative_attention_bias" not in n}
            expected = stack.layers[number - 1].state_dict()
            assert all(torch.equal(tensor, expected[name]) for name, tensor in own.items())
    for name, tensor in student.state_dict().items():
        if not name.startswith(tuple(found)) or "relative_attention_bias" in name:
            assert torch.equal(tensor, teacher.state_dict()[name]), name
    # As if the layers that are missing handed on their input.
    for stack, gone in ((encoder, [0]), (decoder, [0])):
        for place in gone:
            bypass_(stack.layers[place], True)
    if family != "t5":  # the layer that is passed by would still give its own position biases to the others
        torch.testing.assert_close(FAMILIES[family].outputs(student), FAMILIES[family].outputs(teacher))


def test_what_is_not_said_of_an_encoder_decoder_stays_whole():
    teacher = FAMILIES["whisper"].make()
    assert make_student(teacher, num_decoder_layers=2).config.encoder_layers == 2
    assert make_student(teacher, num_layers=1).config.decoder_layers == 3
    with pytest.raises(ValueError, match="num_layers of the encoder, num_decoder_layers of the decoder"):
        make_student(teacher)
    with pytest.raises(ValueError, match="one stack of layers"):
        make_student(tiny.bert(), num_decoder_layers=1)


@pytest.mark.parametrize("family", ["rt-detr", "d-fine"])
def test_layers_that_have_heads_of_their_own_take_them_along(family, tmp_path):
    """After each layer of RT-DETR's decoder its own heads predict classes and move the boxes on."""
    entry = ENTRIES[family]
    teacher, batch = entry.make(), {"pixel_values": entry.batch()["pixel_values"]}
    student = make_student(teacher, decoder_layers=[1, 3])
    facts = student.config.hfkdq["student"]
    assert (facts["teacher_decoder_layers"], facts["decoder_layers"], facts["layers"]) == (4, [1, 3], [1])
    student.save_pretrained(tmp_path)
    loaded = type(student).from_pretrained(tmp_path)
    decoder = teacher.model.decoder
    for name, lists in list(decoder.named_children()):
        if isinstance(lists, nn.ModuleList) and len(lists) == 4:
            setattr(decoder, name, nn.ModuleList([lists[0], lists[2]]))
    if family == "d-fine":
        decoder.eval_idx = 1
    with torch.no_grad():
        expected, found, again = teacher(**batch), student(**batch), loaded(**batch)
    for key in ("logits", "pred_boxes"):
        torch.testing.assert_close(found[key], expected[key])
        torch.testing.assert_close(again[key], found[key])


def test_a_layer_that_can_stand_first_alone_stays_where_layers_are_spaced_evenly():
    """Conditional DETR's first decoder layer projects the positions of its queries, which no other does."""
    student = make_student(ENTRIES["conditional-detr"].make(), num_decoder_layers=1)
    assert student.config.hfkdq["student"]["decoder_layers"] == [1]


@pytest.mark.skipif(not ENTRIES["rf-detr"].exists, reason="RF-DETR is of Transformers 5")
def test_outputs_of_all_layers_side_by_side_are_those_of_the_layers_that_are_left():
    student = make_student(ENTRIES["rf-detr"].make(), num_decoder_layers=1)
    assert student.config.hfkdq["student"]["decoder_layers"] == [2]


def test_only_transformers_models_are_copied():
    with pytest.raises(TypeError, match="got Linear"):
        make_student(nn.Linear(2, 2), 1)


def test_a_teacher_with_tensors_of_its_own_is_refused():
    teacher = tiny.bert(layers=4)
    teacher.classifier.activation_quantizer = nn.BatchNorm1d(1)
    with pytest.raises(ValueError, match=r"differ in 5 tensors, such as classifier\.activation_quantizer"):
        make_student(teacher, 2)


def test_a_decoder_that_the_cache_cannot_hold_generates_without(caplog):
    teacher = tiny.t5(layers=2)
    ids = torch.tensor([[5, 6, 7, 3]])
    with caplog.at_level("WARNING"):
        student = make_student(teacher, num_layers=1)
    assert "use_cache=False" in caplog.text
    assert student.generate(ids, max_new_tokens=4).shape[1] <= 5
    caplog.clear()
    with caplog.at_level("WARNING"):
        both = make_student(teacher, num_layers=1, num_decoder_layers=1)
    assert not caplog.text
    assert both.generation_config.use_cache is not False
    with torch.no_grad():
        cached, plain = (both.generate(ids, max_new_tokens=4, use_cache=use) for use in (True, False))
    assert torch.equal(cached, plain)


@pytest.mark.parametrize("model_class", [BertModel, RobertaModel, ViTModel])
def test_an_encoder_without_a_pooler_stays_without(model_class, tmp_path):
    """Such as encoders of embeddings: the weights of a pooler would be random, and nothing reads them."""
    sizes = dict(hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=64)
    more = dict(image_size=8, patch_size=4) if model_class is ViTModel else dict(vocab_size=len(tiny.VOCABULARY))
    model_class(model_class.config_class(**sizes, **more), add_pooling_layer=False).save_pretrained(tmp_path / "saved")
    model = load_checkpoint(str(tmp_path / "saved"))
    batch = (
        {"pixel_values": torch.randn(2, 3, 8, 8)}
        if model_class is ViTModel
        else {"input_ids": torch.arange(12).view(2, 6) + 3}
    )
    student = make_student(model, 2)
    pruned = prune(copy.deepcopy(student), PruningSpec(sparsity=0.5, structure="neuron"))
    for made in (model, student, pruned):
        assert made.pooler is None
        made.save_pretrained(tmp_path / "made")
        again = load_checkpoint(str(tmp_path / "made"))
        assert again.pooler is None
        assert torch.equal(again(**batch).last_hidden_state, made.eval()(**batch).last_hidden_state)


@pytest.mark.parametrize("lost", ["layer.0.output", "pooler.dense.bias"])
def test_other_weights_that_lack_are_refused(lost, tmp_path):
    model = BertModel(tiny.bert_config())
    model.save_pretrained(tmp_path, state_dict={k: v for k, v in model.state_dict().items() if lost not in k})
    with pytest.raises(ValueError, match="they would be random"):
        load_checkpoint(str(tmp_path))
