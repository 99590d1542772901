"""Fused ops with plain-torch twins (`kdfast.ops.reference`), CPU and CUDA.

`KDFAST_OPS=auto|fused|reference` or `use(...)` chooses the path, `active()` tells it.
"""

from kdfast.ops import reference
from kdfast.ops._key import Key
from kdfast.ops._library import active, use
from kdfast.ops.attention import attention_loss, attention_map
from kdfast.ops.augment import crop_flip
from kdfast.ops.contrast import (
    contrastive_constants,
    contrastive_loss,
    contrastive_update_,
    draw_negatives,
)
from kdfast.ops.fsp import fsp_loss, fsp_matrix
from kdfast.ops.logits import cohort_loss, distillation_loss, soft_target_loss
from kdfast.ops.noise import sigma_noise, standard_normal
from kdfast.ops.split import split_conv2d
from kdfast.ops.split_mask import SplitMask
from kdfast.ops.split_reset import split_reset_
from kdfast.ops.transnet import gated_relu

__all__ = [
    "Key",
    "SplitMask",
    "active",
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
    "reference",
    "sigma_noise",
    "soft_target_loss",
    "split_conv2d",
    "split_reset_",
    "standard_normal",
    "use",
]
