# SPDX-License-Identifier: Apache-2.0
"""Where Transformers models keep their layers, neurons, heads, channels and hidden width.

Read from configurations and structure where these tell it, from small tables of names where they do not.
"""

from .channels import find_channels
from .checkpoints import check_json, hub_arguments, load_config
from .depth import DEPTH_FIELDS, CountedStack, fields_of_depth, find_layer_stacks
from .groups import Slice, UnitGroup, resize_
from .heads import ATTENTION_INPUTS, find_heads
from .neurons import WIDTH_FIELDS, find_neurons, width_fields
from .probing import PER_LAYER_FIELDS, Numbers, Shapes, build_model, build_shapes, config_with, numbers_of, shapes_of
from .reloading import has_recorded_shapes, load_checkpoint, record_shapes
from .residual import HIDDEN_FAMILIES, find_hidden, hidden_field, norms_of
from .stacks import LayerStack, checkpoint_class, evenly_spaced_layers, find_layer_stack

__all__ = [
    "ATTENTION_INPUTS",
    "DEPTH_FIELDS",
    "HIDDEN_FAMILIES",
    "PER_LAYER_FIELDS",
    "WIDTH_FIELDS",
    "CountedStack",
    "LayerStack",
    "Numbers",
    "Shapes",
    "Slice",
    "UnitGroup",
    "build_model",
    "build_shapes",
    "check_json",
    "checkpoint_class",
    "config_with",
    "evenly_spaced_layers",
    "fields_of_depth",
    "find_channels",
    "find_heads",
    "find_hidden",
    "find_layer_stack",
    "find_layer_stacks",
    "find_neurons",
    "has_recorded_shapes",
    "hidden_field",
    "hub_arguments",
    "load_checkpoint",
    "load_config",
    "norms_of",
    "numbers_of",
    "record_shapes",
    "resize_",
    "shapes_of",
    "width_fields",
]
