"""Models by name, their features, their parts and their weights."""

from kdfast.models.default_tap import default_tap
from kdfast.models.factory import (
    aliases,
    architecture,
    create_model,
    fixed_input_size,
    input_size,
    published_classes,
    resolve_name,
)
from kdfast.models.folding import fold_batch_norms
from kdfast.models.head_files import MountedHeads, load_heads, save_head, shapes_of
from kdfast.models.heads import ConvHead, DeepHead, LinearHead, parameter_count
from kdfast.models.inputs import InputAdapter
from kdfast.models.masked import masked_dense
from kdfast.models.slim import extract_slim, reset, split_masks
from kdfast.models.splice import Splice
from kdfast.models.split import split_at
from kdfast.models.stages import default_stages, pair_stages
from kdfast.models.taps import Taps, classifier_name, find_layer, penultimate
from kdfast.models.transnet import TransNet
from kdfast.models.weights import checksum, load_weights, read_weights, save_weights, unwrap

__all__ = [
    "ConvHead",
    "DeepHead",
    "InputAdapter",
    "LinearHead",
    "MountedHeads",
    "Splice",
    "Taps",
    "TransNet",
    "aliases",
    "architecture",
    "checksum",
    "classifier_name",
    "create_model",
    "default_stages",
    "default_tap",
    "extract_slim",
    "find_layer",
    "fixed_input_size",
    "fold_batch_norms",
    "input_size",
    "load_heads",
    "load_weights",
    "masked_dense",
    "pair_stages",
    "parameter_count",
    "penultimate",
    "published_classes",
    "read_weights",
    "reset",
    "resolve_name",
    "save_head",
    "save_weights",
    "shapes_of",
    "split_at",
    "split_masks",
    "unwrap",
]
