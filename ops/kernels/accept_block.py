"""Triton kernel of ``ops/accept_block.py``: one launch, the row's last program decides.

Names in shape comments: B rows, N window tokens, K = N - 1 drafts, V vocabulary, S slices of it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from spec_compile.ops.kernels.online_softmax import is_finite
from spec_compile.ops.kernels.round_ops import VOCAB_BLOCK, _best, _exponential, _noise_key, _rows, _uniform
from spec_compile.ops.kernels.split_kv import COUNTERS
from spec_compile.ops.sampling import ACCEPT_STREAM, TARGET_STREAM


@triton.jit
def _reach(window_ptr, draft_ptr, target_ptr, N, V, stride_dn, stride_tn, BLOCK_N: tl.constexpr):
    """``reach_of_drafts`` of a row, and 1 where a draft's q is finite: [BLOCK_N] each; the pointers are the row's."""
    slot = tl.arange(0, BLOCK_N)
    drafted = slot < N - 1
    token = tl.load(window_ptr + slot + 1, mask=drafted, other=0)
    valid = drafted & (token >= 0) & (token < V)
    target = tl.load(target_ptr + slot.to(tl.int64) * stride_tn + token, mask=valid, other=0.0)
    # Rounded as the CPU rounds it, so that both keep the same drafts.
    draft = tl.load(draft_ptr + slot.to(tl.int64) * stride_dn + token, mask=valid, other=1.0)
    has_q = tl.where(is_finite(draft), 1, 0)
    ratio = tl.where(has_q > 0, tl.div_rn(target, draft), 0.0)
    reach, last = tl.full((BLOCK_N,), 1.0, tl.float32), tl.full((), 1.0, tl.float32)
    for j in range(0, N - 1):
        product = last * tl.sum(tl.where(slot == j, ratio, 0.0), 0)
        last = tl.where(product == product, tl.minimum(product, 1.0), 0.0)  # 0 / 0, 0 * inf
        reach = tl.where(slot == j + 1, last, reach)
    return reach, has_q


@triton.jit
def _winner(score_ptr, winner_ptr, S, BLOCK_S: tl.constexpr):
    """(score, token) of the best slice. Reads bypass L1 (.cg): other programs wrote this."""
    part = tl.arange(0, BLOCK_S)
    scores = tl.load(score_ptr + part, mask=part < S, other=-2.0, cache_modifier=".cg")
    score, index = tl.max(scores, 0, return_indices=True)
    return score, tl.load(winner_ptr + index, cache_modifier=".cg")


@triton.jit
def _accept_block_kernel(window_ptr, draft_ptr, target_ptr, seed_ptr, position_ptr, mass_ptr, score_ptr, winner_ptr,
                         counter_ptr, emitted_ptr, length_ptr, N, V, S, stride_db, stride_dn, stride_tb, stride_tn,
                         ACCEPT: tl.constexpr, STREAM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr,
                         BLOCK_S: tl.constexpr):  # fmt: skip
    """Program (slice, slot, row): what is left of the target in the slice, and who wins its race, should the block end there.

    mass_ptr: float32 [B, N, S]; score_ptr: float32 [B, N, 2, S] and winner_ptr: int32 [B, N, 2, S], of what is left and of
    the target alone, which may have to stand in.
    """
    part, at, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    window_ptr += row * N
    draft_ptr += row * stride_db
    target_ptr += row * stride_tb
    mass_ptr += row * N * S
    score_ptr += row * N * 2 * S
    winner_ptr += row * N * 2 * S
    seed = tl.load(seed_ptr + row)
    first = tl.load(position_ptr + row).to(tl.int64) + 1
    slot = tl.arange(0, BLOCK_N)
    reach, has_q = _reach(window_ptr, draft_ptr, target_ptr, N, V, stride_dn, stride_tn, BLOCK_N)

    token = part * BLOCK_V + tl.arange(0, BLOCK_V)
    inside = token < V
    target = tl.load(target_ptr + at.to(tl.int64) * stride_tn + token, mask=inside, other=0.0)
    noise = _exponential(_noise_key(seed, first + at, STREAM), token)
    weights = target
    if at < N - 1:
        draft = tl.load(draft_ptr + at.to(tl.int64) * stride_dn + token, mask=inside, other=0.0)
        draft = tl.where(tl.sum(tl.where(slot == at, has_q, 0), 0) > 0, draft, 0.0)
        left = tl.sum(tl.where(slot == at, reach, 0.0), 0) * target - draft
        weights = tl.where(left > 0, left, tl.where(left == left, 0.0, left))
    score, index = _best(weights, noise, token, inside)
    tl.store(mass_ptr + at * S + part, tl.sum(weights, 0))
    tl.store(score_ptr + at * 2 * S + part, score)
    tl.store(winner_ptr + at * 2 * S + part, part * BLOCK_V + index)
    score, index = _best(target, noise, token, inside)
    tl.store(score_ptr + (at * 2 + 1) * S + part, score)
    tl.store(winner_ptr + (at * 2 + 1) * S + part, part * BLOCK_V + index)
    # All threads' stores come before the one thread's release; whoever sees the last count has acquired them all.
    tl.debug_barrier()
    arrived = tl.atomic_add(counter_ptr + row, 1, sem="acq_rel", scope="gpu")
    if arrived == N * S - 1:
        tl.store(counter_ptr + row, 0)  # ready for the next launch
        every = slot[:, None] * S + tl.arange(0, BLOCK_S)[None, :]
        used = (slot < N)[:, None] & (tl.arange(0, BLOCK_S) < S)[None, :]
        mass = tl.sum(tl.load(mass_ptr + every, mask=used, other=0.0, cache_modifier=".cg"), 1)  # [BLOCK_N]
        mass = tl.where(mass == mass, mass, reach)  # p is not finite: the block ends here as behind its last draft
        accept = tl.where(slot == N - 1, reach, tl.div_rn(mass, mass + (1.0 - reach)))
        chance = _uniform(seed, first + slot - 1, ACCEPT)  # slot j stands for the first j drafts
        kept = (slot > 0) & (slot < N) & (chance < accept)  # NaN compares false
        accepted = tl.max(tl.where(kept, slot, 0), 0)
        score, last = _winner(score_ptr + accepted * 2 * S, winner_ptr + accepted * 2 * S, S, BLOCK_S)
        if score < 0:  # nothing is left
            score, last = _winner(score_ptr + (accepted * 2 + 1) * S, winner_ptr + (accepted * 2 + 1) * S, S, BLOCK_S)
        drafted = tl.load(window_ptr + slot + 1, mask=slot < accepted, other=0)
        emitted = tl.where(slot < accepted, drafted, last.to(tl.int64))
        tl.store(emitted_ptr + row * N + slot, emitted, mask=slot < N)
        tl.store(length_ptr + row, accepted + 1)


def accept_block(
    window_ids: Tensor, draft_probs: Tensor, target_probs: Tensor, seed: Tensor, position: Tensor
) -> tuple[Tensor, Tensor]:
    batch, num_tokens, vocab_size = target_probs.shape
    device, parts = target_probs.device, triton.cdiv(vocab_size, VOCAB_BLOCK)
    emitted = torch.empty(batch, num_tokens, dtype=torch.int64, device=device)
    length = torch.empty(batch, dtype=torch.int32, device=device)
    mass = torch.empty(batch, num_tokens, parts, dtype=torch.float32, device=device)
    score = torch.empty(batch, num_tokens, 2, parts, dtype=torch.float32, device=device)
    winner = torch.empty(batch, num_tokens, 2, parts, dtype=torch.int32, device=device)
    draft_probs, target_probs = _rows(draft_probs), _rows(target_probs)
    with torch.cuda.device_of(window_ids):
        _accept_block_kernel[(parts, num_tokens, batch)](
            window_ids.contiguous(), draft_probs, target_probs, seed.contiguous(), position.contiguous(), mass, score, winner,
            COUNTERS.take(device, batch), emitted, length, num_tokens, vocab_size, parts, draft_probs.stride(0),
            draft_probs.stride(1), target_probs.stride(0), target_probs.stride(1), ACCEPT=ACCEPT_STREAM, STREAM=TARGET_STREAM,
            BLOCK_N=triton.next_power_of_2(num_tokens), BLOCK_V=VOCAB_BLOCK, BLOCK_S=triton.next_power_of_2(parts), num_warps=4,
        )  # fmt: skip
    return emitted, length
