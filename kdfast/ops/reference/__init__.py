"""Plain-torch twins of the fused ops: the formula, the fallback and the oracle of the tests.

Same names and signatures as `kdfast.ops`, any device, differentiable to any order by autograd.
Half types are computed in float32.
"""

from kdfast.ops.reference.attention import EPS, attention_loss, attention_map, match_size
from kdfast.ops.reference.augment import crop_flip
from kdfast.ops.reference.noise import sigma_noise, standard_normal, up_sample
from kdfast.ops.reference.split_reset import split_reset_

__all__ = [
    "EPS",
    "attention_loss",
    "attention_map",
    "crop_flip",
    "match_size",
    "sigma_noise",
    "split_reset_",
    "standard_normal",
    "up_sample",
]
