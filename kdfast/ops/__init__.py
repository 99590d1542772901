"""Fused ops with plain-torch twins (`kdfast.ops.reference`), CPU and CUDA.

`KDFAST_OPS=auto|fused|reference` or `use(...)` chooses the path, `active()` tells it.
"""

from kdfast.ops import reference
from kdfast.ops._key import Key
from kdfast.ops._library import active, use
from kdfast.ops.attention import attention_loss, attention_map
from kdfast.ops.noise import sigma_noise, standard_normal

__all__ = [
    "Key",
    "active",
    "attention_loss",
    "attention_map",
    "reference",
    "sigma_noise",
    "standard_normal",
    "use",
]
