"""Calling FlashInfer's paged kernels for a window of tokens: XQA, its plan and its workspace; trtllm-gen on SM100.

XQA's facts are read from flashinfer-python 0.7.2.post1: flashinfer/xqa.py, flashinfer/jit/xqa.py, data/csrc/xqa/mha.cu.

Shapes: B rows, N window tokens, Hq and Hkv heads, D head dim, P pages, M pages a row can hold, W = ceil(N / 32) mask words.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from spec_compile.hardware import detect_hardware
from spec_compile.ops.kernels.split_kv import COUNTERS

# XQA's tiles: keys a program takes at a time, packed query rows of a program when N > 1.
KEY_TILE, ROW_TILE = 256, 32
# The window length to build for. FlashInfer names a module by its length, but only modules of up to 32 packed rows have the
# length compiled in (SPEC_Q_SEQ_LEN, read by the FP8 tensor-core kernel alone). A longer one serves every N > 1, so that
# drafts of changing sizes cost one build of nvcc; rounding N up instead would cost padded queries in every call.
BUILD_TOKENS = 64
TRTLLM_WORKSPACE = 128 << 20  # what FlashInfer's documentation recommends

# ----------------------------------------------------------------------------------------------------------------------
# Plan


@triton.jit
def _xqa_plan_kernel(
    cache_len_ptr, tree_ptr, seq_len_ptr, mask_ptr, capacity, stride_tree_b, stride_tree_n, stride_tree_w,
    N: tl.constexpr, WORDS: tl.constexpr, BLOCK_N: tl.constexpr, HAS_TREE: tl.constexpr,
):  # fmt: skip
    """Program (row): its key count, and its mask shifted by what hangs over its last page."""
    row = tl.program_id(0).to(tl.int64)
    end = tl.load(cache_len_ptr + row) + N
    over = tl.maximum(end - capacity, 0)
    tl.store(seq_len_ptr + row, tl.minimum(end, capacity))
    token, bit = tl.arange(0, BLOCK_N), tl.arange(0, 32)
    for word in tl.static_range(WORDS):
        column = word * 32 + bit
        source = tl.maximum(column - over, 0)
        if HAS_TREE:
            place = token[:, None] * stride_tree_n + (source // 32)[None, :] * stride_tree_w
            bits = tl.load(tree_ptr + row * stride_tree_b + place, mask=(token < N)[:, None], other=0)
            seen = ((bits >> (source % 32)[None, :]) & 1) != 0
        else:
            seen = source[None, :] <= token[:, None]
        seen = (seen | (column < over)[None, :]) & (column < N)[None, :]
        packed = tl.sum(seen.to(tl.int32) << bit[None, :], 1)
        tl.store(mask_ptr + (row * N + token) * WORDS + word, packed, mask=token < N)


def xqa_plan(cache_len: Tensor, tree_mask: Tensor | None, num_tokens: int, capacity: int) -> tuple[Tensor, Tensor]:
    """(int32 [B, 1] key counts, int32 [B, N, W] masks) of rows that can hold ``capacity`` slots."""
    batch, words = cache_len.shape[0], -(-num_tokens // 32)
    seq_lens = torch.empty(batch, 1, dtype=torch.int32, device=cache_len.device)
    mask = torch.empty(batch, num_tokens, words, dtype=torch.int32, device=cache_len.device)
    strides = (0, 0, 0) if tree_mask is None else tree_mask.stride()
    with torch.cuda.device_of(cache_len):
        _xqa_plan_kernel[(batch,)](
            cache_len.contiguous(), mask if tree_mask is None else tree_mask, seq_lens, mask, capacity, *strides,
            N=num_tokens, WORDS=words, BLOCK_N=triton.next_power_of_2(num_tokens), HAS_TREE=tree_mask is not None,
            num_warps=1 if num_tokens <= 16 else 4,
        )  # fmt: skip
    return seq_lens, mask


# ----------------------------------------------------------------------------------------------------------------------
# XQA


@dataclass(frozen=True)
class XqaGrid:
    """How one launch is cut up (``launchMHAFlashInfer``).

    Attributes:
        tiles: slices of packed query rows, over all key/value heads and rows; XQA counts a semaphore for each.
        splits: programs that share a tile's keys.
        sm_count: what to tell XQA of the multiprocessors, so that it makes so many splits.
        scratch_bytes: what the splits of all tiles leave to be merged.
    """

    tiles: int
    splits: int
    sm_count: int
    scratch_bytes: int


def xqa_grid(batch: int, num_tokens: int, kv_heads: int, group: int, dim: int, capacity: int, num_sms: int) -> XqaGrid:
    """The grid of a launch over rows that can hold ``capacity`` slots.

    XQA splits keys until each multiprocessor has a program of every key/value head, but does not count that more than 32
    packed rows make several tiles of a head. Told of fewer multiprocessors, it fills them once: on an H200 a window of 16
    tokens (32/8 heads, 8 rows of 2048) took 39 us instead of 60.

    Each split leaves its rows' output in 16 bits, their maxima and their sums; parts lie at multiples of their own size
    (the multi-block part of ``kernel_mha_impl``).
    """
    slices = 1 if num_tokens == 1 else -(-num_tokens * group // ROW_TILE)
    sm_count = max(1, num_sms // slices)
    splits = min(max(1, sm_count // (batch * kv_heads)), -(-capacity // KEY_TILE))
    tiles = batch * kv_heads * slices
    if splits == 1:
        return XqaGrid(tiles, splits, sm_count, 0)
    rows = group if num_tokens == 1 else ROW_TILE
    padded_dim = next(size for size in (64, 128, 256) if size >= dim)
    output, stats = rows * padded_dim * 2, -(-rows // 32) * 128
    parts = tiles * splits
    return XqaGrid(tiles, splits, sm_count, 2 * parts * stats + (parts + 1) * output)


def xqa(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor,
    seq_lens: Tensor,
    mask: Tensor,
    scale: float,
    window: int,
    sinks: Tensor | None,
    out: Tensor,
) -> None:
    """Attention of each row's last N tokens over all its keys, in one launch. Nothing behind a row's last key is read.

    Args:
        q: [B, N, Hq, D], contiguous, float16 or bfloat16; out: the same.
        k_cache, v_cache: [P, page_size, Hkv, D], of q's dtype or float8_e4m3fn (scale 1), of equal strides.
        page_table: int32 [B, M], contiguous.
        seq_lens: int32 [B, 1]; mask: int32 [B, N, W]; see ``xqa_plan``.
        scale: multiplies q·k.
        window: sliding window in tokens, self included, for a chain; 0 means none.
        sinks: float32 [Hq], or None.
    """
    from flashinfer.xqa import get_xqa_module  # seconds; by warm-up

    batch, num_tokens, heads, dim = q.shape
    page_size, kv_heads = k_cache.shape[1:3]
    group, capacity = heads // kv_heads, page_table.shape[1] * page_size
    grid = xqa_grid(batch, num_tokens, kv_heads, group, dim, capacity, detect_hardware(q.device).num_sms)
    build_tokens = 1 if num_tokens == 1 else BUILD_TOKENS
    module = get_xqa_module(q.dtype, k_cache.dtype, page_size, dim, group, window > 0, q.dtype, build_tokens)
    with torch.cuda.device_of(q):
        module.xqa(
            # The Hopper kernel for e4m3 caches (up to 1.8 times as fast) rounds queries and weights to e4m3 too, and a NaN
            # behind a row's last key gets into its result (seen on an H200). The generic one does neither.
            run_sm90_fp8_mha=False,
            sm_count=grid.sm_count,
            num_kv_heads=kv_heads,
            sliding_win_size=window,
            q_scale=scale * dim**0.5,  # XQA divides by sqrt(D) itself
            output=out,
            rcp_out_scale=1.0,
            q=q,
            sinks=sinks,
            k_cache=k_cache,
            v_cache=v_cache,
            k_sf_cache=None,
            v_sf_cache=None,
            page_table=page_table,
            max_seq_len=capacity,
            seq_lens=seq_lens,
            batch_size=batch,
            kv_scale=1.0,
            semaphores=COUNTERS.take(q.device, grid.tiles),  # zero before and after each launch
            workspace_buffer=torch.empty(max(grid.scratch_bytes, 16), dtype=torch.uint8, device=q.device),
            enable_pdl=True,  # the prologue overlaps the end of the append: 0.4 us of 16 on an H200
            q_seq_len=num_tokens,
            q_cu_seq_lens=None,
            mask=mask.view(torch.uint16) if num_tokens > 1 else None,  # [B, N, 2 W]: the same bits, little-endian
        )


# ----------------------------------------------------------------------------------------------------------------------
# trtllm-gen


@functools.cache
def _trtllm_workspace(device: torch.device) -> Tensor:
    return torch.zeros(TRTLLM_WORKSPACE, dtype=torch.uint8, device=device)


def trtllm_gen(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor,
    seq_lens: Tensor,
    mask: Tensor,
    scale: float,
    window: int,
    sinks: Tensor | None,
    out: Tensor,
) -> None:
    """``xqa`` for chains on SM100, through trtllm-gen; ``mask`` is ignored there. From its documentation: never run."""
    from flashinfer.decode import trtllm_batch_decode_with_kv_cache

    trtllm_batch_decode_with_kv_cache(
        query=q.flatten(0, 1),
        kv_cache=(k_cache, v_cache),
        workspace_buffer=_trtllm_workspace(q.device),
        block_tables=page_table,
        seq_lens=seq_lens.flatten(),
        max_seq_len=page_table.shape[1] * k_cache.shape[1],
        bmm1_scale=scale,
        window_left=window - 1 if window > 0 else -1,
        sinks=sinks,
        kv_layout="NHD",
        q_len_per_req=q.shape[1],
        backend="trtllm-gen",
        out=out.flatten(0, 1),
    )
