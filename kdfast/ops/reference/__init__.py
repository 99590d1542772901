"""Plain-torch twins of the fused ops: the formula, the fallback and the oracle of the tests.

Same names and signatures as `kdfast.ops`, any device, differentiable to any order by autograd.
Half types are computed in float32.
"""

from kdfast.ops.reference.attention import EPS, attention_loss, attention_map, match_size
from kdfast.ops.reference.contrast import (
    contrastive_constants,
    contrastive_loss,
    contrastive_update_,
    draw_negatives,
)
from kdfast.ops.reference.split import split_conv2d

__all__ = [
    "EPS",
    "attention_loss",
    "attention_map",
    "contrastive_constants",
    "contrastive_loss",
    "contrastive_update_",
    "draw_negatives",
    "match_size",
    "split_conv2d",
]
