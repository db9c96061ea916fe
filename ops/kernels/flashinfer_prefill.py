"""FlashInfer's ragged prefill: prompts whose keys and values are at hand, packed without padding.

The wrapper is planned on the host from the prompts' lengths (flashinfer/prefill.py, BatchPrefillWithRaggedKVCacheWrapper.plan)
and keeps its plan, so that the layers of a prefill share it. Models and threads share the wrappers: a lock makes "plan if
needed, then run" one step, and each CUDA stream has wrappers and a workspace of its own, because what a plan or a run writes
on the device is read by kernels that are still queued.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from spec_compile.hardware import detect_hardware

FA2_WORKSPACE = 128 << 20  # partial results of split keys; what FlashInfer's documentation recommends
FA3_WORKSPACE = 1 << 10  # it splits nothing (PrefillSM90Plan)
MAX_WRAPPERS = 16  # each has 8 MiB on the device and as much of the host's pinned memory


@dataclass
class _Planned:
    """A wrapper and what it is planned for.

    Attributes:
        workspace: shared by the wrappers of a stream, whose kernels run one after the other.
        lengths: what the wrapper is planned for.
        copied: recorded behind the copy of the plan to the device, on CUDA.
    """

    wrapper: Any
    workspace: Tensor
    lengths: Tensor | None = None
    copied: torch.cuda.Event | None = None

    def wait_for_copy(self) -> None:
        """A plan goes to the device from a pinned buffer, asynchronously: before that is written again or freed."""
        if self.copied is not None:
            self.copied.synchronize()


# One wrapper per device, stream and constants (full and sliding layers take turns); the one used last comes last.
_PLANNED: dict[tuple, _Planned] = {}
_LOCK = threading.Lock()


def ragged_prefill(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, scale: float, window: int, softcap: float, with_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """Causal attention of packed prompts.

    Any thread may call it, on any stream.

    Args:
        q: [T, Hq, D]; k, v: [T, Hkv, D]. Any strides with a contiguous last dim.
        lengths: int32 [B + 1] on the host, prompt boundaries. Layers of one prefill pass the same tensor.
        window: sliding window in tokens, self included; 0 means none.

    Returns:
        [T, Hq, D], and with ``with_lse`` the float32 [T, Hq] natural log-sum-exp of the scaled (and capped) logits.
    """
    (_, heads, dim), kv_heads = q.shape, k.shape[1]
    with torch.cuda.device_of(q), _LOCK:
        planned = _wrapper(q.device, (q.dtype, heads, kv_heads, dim, scale, window, softcap))
        if planned.lengths is not lengths:
            planned.wait_for_copy()
            planned.lengths = None  # until the plan is made, should it fail
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
            if q.is_cuda:
                planned.copied = planned.copied or torch.cuda.Event()
                planned.copied.record()
            planned.lengths = lengths
        result = planned.wrapper.run(q, k, v, return_lse=with_lse, lse_base="ln")
    return result if with_lse else (result, None)


def _wrapper(device: torch.device, constants: tuple) -> _Planned:
    """The current stream's wrapper for ``constants``; the one that rested longest makes room for a new one."""
    from flashinfer.prefill import BatchPrefillWithRaggedKVCacheWrapper  # seconds; by warm-up

    stream = _stream(device)
    key = (device, stream, *constants)
    planned = _PLANNED.pop(key, None)
    if planned is None:
        while len(_PLANNED) >= MAX_WRAPPERS:
            _PLANNED.pop(next(iter(_PLANNED))).wait_for_copy()
        # FlashInfer's "fa3" is its Hopper kernel; "fa2" runs on any device from SM80 on.
        backend = "fa3" if detect_hardware(device).arch == "sm90" else "fa2"
        workspace = next((other.workspace for own, other in _PLANNED.items() if own[:2] == (device, stream)), None)
        if workspace is None:
            size = FA3_WORKSPACE if backend == "fa3" else FA2_WORKSPACE
            workspace = torch.empty(size, dtype=torch.uint8, device=device)
        planned = _Planned(BatchPrefillWithRaggedKVCacheWrapper(workspace, "NHD", backend=backend), workspace)
    _PLANNED[key] = planned
    return planned


def _stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
