"""FlashInfer's ragged prefill: prompts whose keys and values are at hand, packed without padding.

The wrapper is planned on the host from the prompts' lengths (flashinfer/prefill.py, BatchPrefillWithRaggedKVCacheWrapper.plan)
and keeps its plan, so that the layers of a prefill share it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from spec_compile.hardware import detect_hardware

FA2_WORKSPACE = 128 << 20  # partial results of split keys; what FlashInfer's documentation recommends
FA3_WORKSPACE = 1 << 10  # it splits nothing (PrefillSM90Plan)


@dataclass
class _Planned:
    """A wrapper and the lengths it is planned for."""

    wrapper: Any
    lengths: Tensor | None = None


_PLANNED: dict[tuple, _Planned] = {}  # one wrapper per device and constants: full and sliding layers take turns


def ragged_prefill(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, scale: float, window: int, softcap: float, with_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """Causal attention of packed prompts.

    Args:
        q: [T, Hq, D]; k, v: [T, Hkv, D]. Any strides with a contiguous last dim.
        lengths: int32 [B + 1] on the host, prompt boundaries. Layers of one prefill pass the same tensor.
        window: sliding window in tokens, self included; 0 means none.

    Returns:
        [T, Hq, D], and with ``with_lse`` the float32 [T, Hq] natural log-sum-exp of the scaled (and capped) logits.
    """
    from flashinfer.prefill import BatchPrefillWithRaggedKVCacheWrapper  # seconds; by warm-up

    (_, heads, dim), kv_heads = q.shape, k.shape[1]
    key = (q.device, q.dtype, heads, kv_heads, dim, scale, window, softcap)
    with torch.cuda.device_of(q):
        if key not in _PLANNED:
            # FlashInfer's "fa3" is its Hopper kernel; "fa2" runs on any device from SM80 on.
            backend = "fa3" if detect_hardware(q.device).arch == "sm90" else "fa2"
            size = FA3_WORKSPACE if backend == "fa3" else FA2_WORKSPACE
            workspace = torch.empty(size, dtype=torch.uint8, device=q.device)
            _PLANNED[key] = _Planned(BatchPrefillWithRaggedKVCacheWrapper(workspace, "NHD", backend=backend))
        planned = _PLANNED[key]
        if planned.lengths is not lengths:
            planned.wrapper.plan(
                lengths,
                lengths,
                num_qo_heads=heads,
                num_kv_heads=kv_heads,
                head_dim_qk=dim,
                causal=True,
                sm_scale=scale,
                window_left=window - 1 if window > 0 else -1,
                logits_soft_cap=softcap,
                q_data_type=q.dtype,
            )
            planned.lengths = lengths
        result = planned.wrapper.run(q, k, v, return_lse=with_lse, lse_base="ln")
    return result if with_lse else (result, None)
