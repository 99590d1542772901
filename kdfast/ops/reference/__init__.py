"""Plain-torch twins of the fused ops: the formula, the fallback and the oracle of the tests.

Same names and signatures as `kdfast.ops`, any device, differentiable to any order by autograd.
Half types are computed in float32.
"""

from kdfast.ops.reference.attention import EPS, attention_loss, attention_map, match_size
from kdfast.ops.reference.augment import crop_flip
from kdfast.ops.reference.contrast import (
    contrastive_constants,
    contrastive_loss,
    contrastive_update_,
    draw_negatives,
)
from kdfast.ops.reference.fsp import fsp_loss, fsp_matrix, pool_to
from kdfast.ops.reference.logits import cohort_loss, distillation_loss, soft_target_loss
from kdfast.ops.reference.noise import sigma_noise, standard_normal, up_sample
from kdfast.ops.reference.split import split_conv2d
from kdfast.ops.reference.split_reset import split_reset_
from kdfast.ops.reference.transnet import SCALE_EPS, gated_relu

__all__ = [
    "EPS",
    "SCALE_EPS",
    "attention_loss",
    "attention_map",
    "cohort_loss",
    "contrastive_constants",
    "contrastive_loss",
    "contrastive_update_",
    "crop_flip",
    "distillation_loss",
    "draw_negatives",
    "fsp_loss",
    "fsp_matrix",
    "gated_relu",
    "match_size",
    "pool_to",
    "sigma_noise",
    "soft_target_loss",
    "split_conv2d",
    "split_reset_",
    "standard_normal",
    "up_sample",
]
