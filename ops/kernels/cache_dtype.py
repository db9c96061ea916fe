"""Device function that makes of a value what a cache of a narrower type holds: ``ops.attention.to_cache`` in a kernel."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def to_cache(x, cache_type: tl.constexpr):
    """``x`` in ``cache_type``; saturates where that type's largest value is smaller than that of ``x``'s. NaN stays NaN."""
    if cache_type == tl.float8e4nv:
        x = tl.clamp(x.to(tl.float32), -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL)
    elif cache_type == tl.float16 and x.dtype != tl.float16:
        x = tl.clamp(x.to(tl.float32), -65504.0, 65504.0, propagate_nan=tl.PropagateNan.ALL)
    return x.to(cache_type)
