"""Merging partial attention results inside the kernel that made them: the last program of a tile to arrive does it.

Method: FlashDecoding's split-KV reduction (Dao et al. 2023), without its second launch.
"""

from __future__ import annotations

import threading

import torch
import triton
import triton.language as tl
from torch import Tensor

from spec_compile.ops.kernels.online_softmax import normalize


@triton.jit
def merge_splits(
    part_acc_ptr,  # float32 [S, BLOCK_R, DV]
    part_stat_ptr,  # float32 [S, 2, BLOCK_R]
    sinks_ptr,
    out_ptr,  # [N, HKV * G, DV]
    live,
    head,
    m_tile,
    N: tl.constexpr,
    G: tl.constexpr,
    HKV: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    MERGE_STAGES: tl.constexpr,
    HAS_SINKS: tl.constexpr,
):
    """Combine a tile's partial results. Reads bypass L1 (.cg): other programs wrote what is read here."""
    local = tl.arange(0, BLOCK_R)
    row = m_tile * BLOCK_M + local
    row_ok = row < G * N
    dv = tl.arange(0, BLOCK_DV)
    ok = row_ok[:, None] & (dv < DV)[None, :]
    part_ptr = part_acc_ptr + local[:, None] * DV + dv[None, :]
    peak = tl.full([BLOCK_R], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_R], tl.float32)
    acc = tl.zeros([BLOCK_R, BLOCK_DV], tl.float32)
    # One split a turn, online: a tile of several splits at once would be summed across warps, through shared memory.
    for split in tl.range(0, live, num_stages=MERGE_STAGES):
        stat = part_stat_ptr + split * (2 * BLOCK_R) + local
        part_peak = tl.load(stat, mask=row_ok, other=float("-inf"), cache_modifier=".cg")
        part_total = tl.load(stat + BLOCK_R, mask=row_ok, other=0.0, cache_modifier=".cg")
        part = tl.load(part_ptr + split * (BLOCK_R * DV), mask=ok, other=0.0, cache_modifier=".cg")
        new_peak = tl.maximum(peak, part_peak)
        shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        alpha = tl.exp2(peak - shift)
        beta = tl.exp2(part_peak - shift)
        total = total * alpha + part_total * beta
        acc = acc * alpha[:, None] + part * beta[:, None]
        peak = new_peak
    sink = tl.full([BLOCK_R], float("-inf"), tl.float32)
    if HAS_SINKS:
        sink = tl.load(sinks_ptr + head * G + row % G, mask=row_ok, other=0.0).to(tl.float32) * 1.4426950408889634
    o_rows = out_ptr + ((row // G) * HKV * G + head * G + row % G) * DV
    o = normalize(peak, total, acc, sink)
    tl.store(o_rows[:, None] + dv[None, :], o, mask=row_ok[:, None] & (dv < DV)[None, :])


class ArrivalCounters:
    """Zeroed int32 counters that kernels leave zeroed. Each call gets the next stretch of the buffer, so that graphs captured
    from different calls can run at the same time (until a lap later: thousands of calls). Any thread may call."""

    SIZE = 1 << 20

    def __init__(self) -> None:
        self._buffers: dict[torch.device, Tensor] = {}
        self._next: dict[torch.device, int] = {}
        self._lock = threading.Lock()

    def prepare(self, device: torch.device) -> None:
        """Make the buffer of ``device``; must happen outside CUDA-graph capture."""
        with self._lock:  # a second buffer would free the first in the middle of its use
            if device not in self._buffers:
                self._buffers[device] = torch.zeros(self.SIZE, dtype=torch.int32, device=device)

    def take(self, device: torch.device, count: int) -> Tensor:
        if device not in self._buffers:
            if count > self.SIZE or (device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
                return torch.zeros(count, dtype=torch.int32, device=device)  # a buffer of the graph's own
            self.prepare(device)
        slot = max(32, triton.next_power_of_2(count))
        if slot > self.SIZE:
            return torch.zeros(count, dtype=torch.int32, device=device)
        with self._lock:
            start = self._next.get(device, 0)
            if start + slot > self.SIZE:
                start = 0
            self._next[device] = start + slot
        return self._buffers[device][start : start + count]


COUNTERS = ArrivalCounters()
