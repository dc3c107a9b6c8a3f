# SPDX-License-Identifier: Apache-2.0
"""All that is known of Transformers models: tasks, inputs and outputs, masks, batches, layers, heads, checkpoints.

Read from configurations and structure where these tell it, from small tables of names where they do not.
"""

from .bypass import bypass_
from .channels import find_channels, is_convolutional
from .checkpoints import check_json, checkpoint_class, hub_arguments, load_config
from .heads import ATTENTION_INPUTS, find_heads
from .hidden_width import HIDDEN_FAMILIES, find_hidden, hidden_field, norms_of
from .layers import (
    DEPTH_FIELDS,
    PER_LAYER_FIELDS,
    CountedStack,
    evenly_spaced_layers,
    find_layer_stack,
    find_layer_stacks,
)
from .neurons import WIDTH_FIELDS, find_neurons, width_fields
from .numbering import refit_
from .probing import (
    Numbers,
    Shapes,
    build_empty,
    build_model,
    build_shapes,
    config_with,
    numbers_of,
    set_fields_,
    shapes_of,
)
from .proof import Probe, differing
from .recorded_shapes import build_recorded, has_recorded_shapes, load_checkpoint, record_shapes
from .units import NoStructure, Slice, UnitGroup, resize_

__all__ = [
    "ATTENTION_INPUTS",
    "DEPTH_FIELDS",
    "HIDDEN_FAMILIES",
    "PER_LAYER_FIELDS",
    "WIDTH_FIELDS",
    "CountedStack",
    "NoStructure",
    "Numbers",
    "Probe",
    "Shapes",
    "Slice",
    "UnitGroup",
    "build_empty",
    "build_model",
    "build_recorded",
    "build_shapes",
    "bypass_",
    "check_json",
    "checkpoint_class",
    "config_with",
    "differing",
    "evenly_spaced_layers",
    "find_channels",
    "find_heads",
    "find_hidden",
    "find_layer_stack",
    "find_layer_stacks",
    "find_neurons",
    "has_recorded_shapes",
    "hidden_field",
    "hub_arguments",
    "is_convolutional",
    "load_checkpoint",
    "load_config",
    "norms_of",
    "numbers_of",
    "record_shapes",
    "refit_",
    "resize_",
    "set_fields_",
    "shapes_of",
    "width_fields",
]
