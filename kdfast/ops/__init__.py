"""Fused ops with plain-torch twins (`kdfast.ops.reference`), CPU and CUDA.

`KDFAST_OPS=auto|fused|reference` or `use(...)` chooses the path, `active()` tells it.
"""

from kdfast.ops import reference
from kdfast.ops._key import Key
from kdfast.ops._library import active, use
from kdfast.ops.attention import attention_loss, attention_map
from kdfast.ops.augment import crop_flip
from kdfast.ops.noise import sigma_noise, standard_normal
from kdfast.ops.split_reset import split_reset_

__all__ = [
    "Key",
    "active",
    "attention_loss",
    "attention_map",
    "crop_flip",
    "reference",
    "sigma_noise",
    "split_reset_",
    "standard_normal",
    "use",
]
