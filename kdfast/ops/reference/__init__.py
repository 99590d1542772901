"""Plain-torch twins of the fused ops: the formula, the fallback and the oracle of the tests.

Same names and signatures as `kdfast.ops`, any device, differentiable to any order by autograd.
Half types are computed in float32.
"""

from kdfast.ops.reference.attention import EPS, attention_loss, attention_map, match_size
from kdfast.ops.reference.noise import sigma_noise, standard_normal, up_sample

__all__ = [
    "EPS",
    "attention_loss",
    "attention_map",
    "match_size",
    "sigma_noise",
    "standard_normal",
    "up_sample",
]
