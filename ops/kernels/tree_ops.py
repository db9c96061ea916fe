"""Triton kernels of ``ops/tree.py``: one launch an op. Launchers take their op's arguments, documented at the op.

Names in shape comments: R rows of logits, V draft vocabulary, S slices of it, B rows, K topk, C candidates, N window tokens.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from spec_compile.ops.kernels.round_ops import _rows
from spec_compile.ops.kernels.split_kv import COUNTERS

VOCAB_BLOCK = 2048
LARGE_VOCAB_BLOCK = 8192  # when the rows alone fill the device: fewer partial results to merge
MANY_PROGRAMS = 1024


@triton.jit
def _rank_key(value, index):
    """int64 that orders float32 values, ties to the lower int32 index. No key is as low as the lowest int64."""
    bits = tl.where(value == 0.0, 0.0, value).to(tl.int32, bitcast=True)  # -0.0 is 0.0
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered.to(tl.int64) << 32) | (0x7FFFFFFF - index).to(tl.int64)


@triton.jit
def _key_value(key):
    ordered = (key >> 32).to(tl.int32)
    return (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _key_index(key):
    return 0x7FFFFFFF - key.to(tl.int32)


@triton.jit
def _best_keys(keys, K, BLOCK_K: tl.constexpr):
    """The K largest of int64 ``keys`` (which are all different), in falling order: [BLOCK_K], rubbish behind K."""
    place = tl.arange(0, BLOCK_K)
    lowest = -0x8000000000000000
    best = tl.full((BLOCK_K,), lowest, tl.int64)
    for k in range(0, K):
        key = tl.max(keys, 0)
        best = tl.where(place == k, key, best)
        keys = tl.where(keys == key, lowest, keys)
    return best


# ----------------------------------------------------------------------------------------------------------------------
# draft_topk


@triton.jit
def _merge_slices(key_ptr, stat_ptr, draft_ids_ptr, ids_ptr, logprobs_ptr, K, S, HAS_IDS: tl.constexpr,
                  BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_S: tl.constexpr):  # fmt: skip
    """A row's result from its slices'; the pointers are the row's. Reads bypass L1 (.cg): other programs wrote this."""
    part, every, place = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K)
    peaks = tl.load(stat_ptr + part, mask=part < S, other=float("-inf"), cache_modifier=".cg")
    totals = tl.load(stat_ptr + S + part, mask=part < S, other=0.0, cache_modifier=".cg")
    peak = tl.max(peaks, 0)
    shift = tl.where(peak == float("-inf"), 0.0, peak)
    total = tl.sum(totals * tl.exp(peaks - shift), 0)
    keys = tl.load(key_ptr + every, mask=every < S * K, other=-0x8000000000000000, cache_modifier=".cg")
    best = _best_keys(keys, K, BLOCK_K)
    logprob = (_key_value(best) - shift) - tl.log(total)
    logprob = tl.where(logprob == logprob, tl.minimum(logprob, 0.0), float("-inf"))
    tl.store(logprobs_ptr + place, logprob, mask=place < K)
    ids = tl.where(place < K, _key_index(best), 0).to(tl.int64)
    if HAS_IDS:
        ids = tl.load(draft_ids_ptr + ids)
    tl.store(ids_ptr + place, ids, mask=place < K)


@triton.jit
def _draft_topk_kernel(logits_ptr, draft_ids_ptr, ids_ptr, logprobs_ptr, key_ptr, stat_ptr, counter_ptr, V, K, S, stride_r,
                       HAS_IDS: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_K: tl.constexpr,
                       BLOCK_M: tl.constexpr, BLOCK_S: tl.constexpr):  # fmt: skip
    """Program (row, slice): the slice's K best and its sum of exponentials; the row's last program merges them.

    key_ptr: int64 [R, S, K]; stat_ptr: float32 [R, 2, S].
    """
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    token = part * BLOCK_V + tl.arange(0, BLOCK_V)
    inside = token < V
    logits = tl.load(logits_ptr + row * stride_r + token, mask=inside, other=float("-inf")).to(tl.float32)
    real = tl.where(logits == logits, logits, float("-inf"))
    peak = tl.max(real, 0)
    shift = tl.where(peak == float("-inf"), 0.0, peak)
    keys = tl.where(inside, _rank_key(real, token), -0x8000000000000000)
    best = _best_keys(keys, K, BLOCK_K)
    place = tl.arange(0, BLOCK_K)
    tl.store(key_ptr + (row * S + part) * K + place, best, mask=place < K)
    tl.store(stat_ptr + row * 2 * S + part, peak)
    tl.store(stat_ptr + row * 2 * S + S + part, tl.sum(tl.exp(logits - shift), 0))  # a NaN stays one
    # All threads' stores come before the one thread's release; whoever sees the last count has acquired them all.
    tl.debug_barrier()
    arrived = tl.atomic_add(counter_ptr + row, 1, sem="acq_rel", scope="gpu")
    if arrived == S - 1:
        tl.store(counter_ptr + row, 0)  # ready for the next launch
        _merge_slices(key_ptr + row * S * K, stat_ptr + row * 2 * S, draft_ids_ptr, ids_ptr + row * K, logprobs_ptr + row * K,
                      K, S, HAS_IDS, BLOCK_K, BLOCK_M, BLOCK_S)  # fmt: skip


def draft_topk(logits: Tensor, k: int, draft_ids: Tensor | None) -> tuple[Tensor, Tensor]:
    rows, vocab_size = logits.shape
    device = logits.device
    logits = _rows(logits)
    block = VOCAB_BLOCK if rows * triton.cdiv(vocab_size, VOCAB_BLOCK) <= MANY_PROGRAMS else LARGE_VOCAB_BLOCK
    block = min(block, triton.next_power_of_2(vocab_size))
    parts = triton.cdiv(vocab_size, block)
    ids = torch.empty(rows, k, dtype=torch.int64, device=device)
    logprobs = torch.empty(rows, k, dtype=torch.float32, device=device)
    keys = torch.empty(rows, parts, k, dtype=torch.int64, device=device)
    stats = torch.empty(rows, 2, parts, dtype=torch.float32, device=device)
    with torch.cuda.device_of(logits):
        _draft_topk_kernel[(rows, parts)](
            logits, draft_ids.contiguous() if draft_ids is not None else ids, ids, logprobs, keys, stats,
            COUNTERS.take(device, rows), vocab_size, k, parts, logits.stride(0), HAS_IDS=draft_ids is not None,
            BLOCK_V=block, BLOCK_K=triton.next_power_of_2(k), BLOCK_M=triton.next_power_of_2(parts * k),
            BLOCK_S=triton.next_power_of_2(parts), num_warps=max(1, min(8, block // 256)),
        )  # fmt: skip
    return ids, logprobs


# ----------------------------------------------------------------------------------------------------------------------
# expand_beam


@triton.jit(do_not_specialize=["first", "slot"])  # one kernel for all levels but the first
def _expand_beam_kernel(ids_ptr, logprobs_ptr, beam_ptr, candidate_tokens_ptr, candidate_scores_ptr, candidate_parents_ptr,
                        mask_ptr, beam_tokens_ptr, next_beam_ptr, beam_parent_ptr, P, W, first, slot,
                        stride_ct, stride_cs, stride_cp, stride_mb, stride_mp, FIRST: tl.constexpr, K: tl.constexpr,
                        BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_W: tl.constexpr):  # fmt: skip
    """Program (row). ``first``: the level's first candidate; ``slot``: the new beam's first slot; FIRST: at level 0."""
    row = tl.program_id(0).to(tl.int64)
    count: tl.constexpr = K if FIRST else K * K
    i = tl.arange(0, BLOCK)
    inside = i < count
    token = tl.load(ids_ptr + row * count + i, mask=inside, other=0)
    score = tl.load(logprobs_ptr + row * count + i, mask=inside, other=0.0)
    score = tl.where(score < 0.0, score, tl.where(score == score, 0.0, float("-inf")))
    parent = tl.full((BLOCK,), -1, tl.int32)
    if not FIRST:
        parent = tl.load(beam_ptr + row * K + i // K, mask=inside, other=0)
        score += tl.load(candidate_scores_ptr + row * stride_cs + parent, mask=inside, other=0.0)
    tl.store(candidate_tokens_ptr + row * stride_ct + first + i, token, mask=inside)
    tl.store(candidate_scores_ptr + row * stride_cs + first + i, score, mask=inside)
    tl.store(candidate_parents_ptr + row * stride_cp + first + i, parent, mask=inside)

    best = _best_keys(tl.where(inside, _rank_key(score, i), -0x8000000000000000), K, BLOCK_K)
    place = tl.arange(0, BLOCK_K)
    used = place < K
    chosen = tl.where(used, _key_index(best), 0)
    node = tl.zeros_like(chosen) if FIRST else chosen // K
    tl.store(beam_tokens_ptr + row * K + place, tl.load(ids_ptr + row * count + chosen, mask=used, other=0), mask=used)
    tl.store(next_beam_ptr + row * K + place, first + chosen, mask=used)
    tl.store(beam_parent_ptr + row * K + place, node.to(tl.int64), mask=used)
    if slot < P:
        word = tl.arange(0, BLOCK_W)[None, :]
        own = (slot + place)[:, None]
        stored = used[:, None] & (word < W)
        bits = tl.where(own // 32 == word, 1 << (own % 32), 0)
        mask_ptr += row * stride_mb
        if not FIRST:
            bits |= tl.load(mask_ptr + (slot - K + node)[:, None] * stride_mp + word, mask=stored, other=0)
        tl.store(mask_ptr + own * stride_mp + word, bits, mask=stored)


def expand_beam(
    ids: Tensor,
    logprobs: Tensor,
    beam: Tensor | None,
    candidate_tokens: Tensor,
    candidate_scores: Tensor,
    candidate_parents: Tensor,
    draft_mask: Tensor,
    level: int,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, topk = candidate_tokens.shape[0], ids.shape[1]
    slots, words = draft_mask.shape[1:]
    beam_tokens = torch.empty(batch, topk, dtype=torch.int64, device=ids.device)
    next_beam = torch.empty(batch, topk, dtype=torch.int32, device=ids.device)
    beam_parent = torch.empty_like(beam_tokens)
    block = triton.next_power_of_2(topk if beam is None else topk * topk)
    with torch.cuda.device_of(ids):
        _expand_beam_kernel[(batch,)](
            ids.contiguous(), logprobs.contiguous(), beam.contiguous() if beam is not None else next_beam,
            candidate_tokens, candidate_scores, candidate_parents, draft_mask, beam_tokens, next_beam, beam_parent,
            slots, words, 0 if beam is None else topk + (level - 1) * topk * topk, level * topk,
            candidate_tokens.stride(0), candidate_scores.stride(0), candidate_parents.stride(0), *draft_mask.stride()[:2],
            FIRST=beam is None, K=topk, BLOCK=block, BLOCK_K=triton.next_power_of_2(topk),
            BLOCK_W=triton.next_power_of_2(max(words, 1)), num_warps=max(1, min(8, block // 256)),
        )  # fmt: skip
    return beam_tokens, next_beam, beam_parent


# ----------------------------------------------------------------------------------------------------------------------
# build_tree


@triton.jit
def _chosen_candidates(score, inside, count):
    """bool [BLOCK]: the ``count`` best of scores that are not positive, ties to the lower index.

    The threshold is found by halving a range of bit patterns: at most 31 sums, a dozen when the scores differ. Sorting C
    candidates takes more steps.
    """
    # Magnitudes order like their bits, and the least is best. NaN counts as -inf.
    magnitude = tl.where(score < 0.0, -score, 0.0)
    magnitude = tl.where(score == score, magnitude, float("inf")).to(tl.int32, bitcast=True)
    magnitude = tl.where(inside, magnitude, 0x7FFFFFFF)
    low, high = tl.full((), 0, tl.int32), tl.full((), 0x7F800000, tl.int32)
    while low < high:
        middle = low + ((high - low) >> 1)
        found = tl.sum((magnitude <= middle).to(tl.int32), 0)
        high = tl.where(found < count, high, middle)
        low = tl.where(found < count, middle + 1, tl.where(found == count, middle, low))  # as many as wanted: done
    better = magnitude < high
    tie = magnitude == high
    left = count - tl.sum(better.to(tl.int32), 0)
    return better | (tie & (tl.cumsum(tie.to(tl.int32), 0) <= left))


@triton.jit
def _build_tree_kernel(candidate_tokens_ptr, candidate_scores_ptr, candidate_parents_ptr, root_ptr, window_ptr, parents_ptr,
                       depth_ptr, mask_ptr, C, N, W, stride_ct, stride_cs, stride_cp, BLOCK_C: tl.constexpr,
                       BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr):  # fmt: skip
    """Program (row)."""
    row = tl.program_id(0).to(tl.int64)
    candidate = tl.arange(0, BLOCK_C)
    inside = candidate < C
    score = tl.load(candidate_scores_ptr + row * stride_cs + candidate, mask=inside, other=0.0)
    chosen = _chosen_candidates(score, inside, N - 1)
    place = tl.cumsum(chosen.to(tl.int32), 0)  # slot 0 is the root's
    parents_ptr += row * N
    tl.store(parents_ptr + place, candidate, mask=chosen)  # only to hand them from C lanes to N
    tl.debug_barrier()

    slot = tl.arange(0, BLOCK_N)
    drafted = (slot > 0) & (slot < N)
    mine = tl.load(parents_ptr + slot, mask=drafted, other=-1)  # [BLOCK_N]; the root is candidate -1
    token = tl.load(candidate_tokens_ptr + row * stride_ct + mine, mask=drafted, other=0)
    token = tl.where(slot == 0, tl.load(root_ptr + row), token)
    tl.store(window_ptr + row * N + slot, token, mask=slot < N)
    above = tl.load(candidate_parents_ptr + row * stride_cp + mine, mask=drafted, other=-1)
    column = tl.arange(0, BLOCK_N)[None, :]
    # The same candidates along the other axis, read again: a transposed layout costs shared memory, a load does not.
    other = tl.load(parents_ptr + column, mask=(column > 0) & (column < N), other=-1)
    is_parent = (other == above[:, None]) & (other >= 0)
    parents = tl.where(drafted, tl.sum(tl.where(is_parent, column, 0), 1), -1)  # [BLOCK_N]
    tl.debug_barrier()  # everyone has read the candidates
    tl.store(parents_ptr + slot, parents, mask=slot < N)
    tl.debug_barrier()
    above_all = tl.load(parents_ptr + column, mask=column < N, other=-1)  # [1, BLOCK_N]

    word = tl.arange(0, BLOCK_W)[None, :]
    bits = tl.where((slot // 32)[:, None] == word, 1 << (slot % 32)[:, None], 0)
    depth = tl.zeros((BLOCK_N,), tl.int32)
    hop = parents
    while (tl.max(hop, 0) >= 0) & (tl.max(depth, 0) < N):
        bits |= tl.where((hop >= 0)[:, None] & ((hop // 32)[:, None] == word), 1 << (hop % 32)[:, None], 0)
        depth += (hop >= 0).to(tl.int32)
        # parents[hop]: of all columns the one that is hop; none gives -1
        hop = tl.max(tl.where(column == hop[:, None], above_all, -1), 1)
    tl.store(depth_ptr + row * N + slot, depth, mask=slot < N)
    stored = (slot < N)[:, None] & (word < W)
    tl.store(mask_ptr + (row * N + slot)[:, None] * W + word, bits, mask=stored)


def build_tree(
    candidate_tokens: Tensor, candidate_scores: Tensor, candidate_parents: Tensor, root: Tensor, num_draft_tokens: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, num_candidates = candidate_tokens.shape
    device, words = candidate_tokens.device, triton.cdiv(num_draft_tokens, 32)
    window_ids = torch.empty(batch, num_draft_tokens, dtype=torch.int64, device=device)
    parents = torch.empty(batch, num_draft_tokens, dtype=torch.int32, device=device)
    depth = torch.empty_like(parents)
    mask = torch.empty(batch, num_draft_tokens, words, dtype=torch.int32, device=device)
    block_c, block_n = triton.next_power_of_2(num_candidates), triton.next_power_of_2(num_draft_tokens)
    with torch.cuda.device_of(candidate_tokens):
        _build_tree_kernel[(batch,)](
            candidate_tokens, candidate_scores, candidate_parents, root.contiguous(), window_ids, parents, depth, mask,
            num_candidates, num_draft_tokens, words, candidate_tokens.stride(0), candidate_scores.stride(0),
            candidate_parents.stride(0), BLOCK_C=block_c, BLOCK_N=block_n, BLOCK_W=triton.next_power_of_2(words),
            num_warps=max(1, min(8, max(block_c // 128, block_n // 16))),
        )  # fmt: skip
    return window_ids, parents, depth, mask
