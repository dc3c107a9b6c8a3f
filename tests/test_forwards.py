# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from transformers.utils import ModelOutput

from hfkdq.modeling.forwards import (
    as_output,
    base_of,
    forward_columns,
    output_kwargs,
    return_dict_kwargs,
    without_gradient,
)

from . import tiny


def test_a_wrapped_model_takes_what_its_base_takes():
    peft = pytest.importorskip("peft")
    model = tiny.bert()
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["query"]))
    assert base_of(wrapped) is model
    assert base_of(model) is model
    assert forward_columns(wrapped) == forward_columns(model) >= {"input_ids", "token_type_ids", "labels"}


def test_outputs_have_names_whatever_the_configuration_asks_for():
    model, batch = tiny.bert(), tiny.batch(tiny.bert())
    assert return_dict_kwargs(model) == {}
    model.config.return_dict = False
    assert isinstance(model(**batch), tuple)
    assert isinstance(model(**batch, **return_dict_kwargs(model)), ModelOutput)
    assert as_output({"logits": torch.ones(2)}).logits.sum() == 2


def test_outputs_that_lead_to_no_weight_are_noticed():
    model, batch = tiny.bert(), tiny.batch(tiny.bert())
    output = model(**batch, output_hidden_states=True)
    assert not without_gradient(output, {"logits", "hidden_states"})
    output["hidden_states"] = tuple(state.detach() for state in output.hidden_states)
    assert without_gradient(output, {"logits", "hidden_states"})
    assert not without_gradient(output, {"logits"})  # nobody reads the hidden states


def test_a_model_is_asked_for_what_is_read_and_gives_it():
    model, batch = tiny.bert(layers=4), tiny.batch(tiny.bert())
    assert output_kwargs(frozenset({"logits"}), {"hidden_states": None, "attentions": None}) == {}
    needs, indices = frozenset({"hidden_states"}), {"hidden_states": {2, 4}, "attentions": None}
    whole = model(**batch, output_hidden_states=True).hidden_states
    chosen = model(**batch, **output_kwargs(needs, indices)).hidden_states
    assert len(chosen) == 5
    assert torch.equal(chosen[2], whole[2])
    assert torch.equal(chosen[4], whole[4])
