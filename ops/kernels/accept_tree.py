"""Triton kernels of ``ops/accept_tree.py`` and ``ops/simulate.py``: one launch an op, one program a row decides.

Launchers take their op's arguments, documented at the op. Names in shape comments: B rows, N window tokens, V vocabulary,
S slices of it, E the most tokens a round emits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from spec_compile.ops.kernels.round_ops import VOCAB_BLOCK, _best, _exponential, _noise_key, _rows, _uniform
from spec_compile.ops.kernels.split_kv import COUNTERS
from spec_compile.ops.sampling import ACCEPT_STREAM, TARGET_STREAM


@triton.jit
def _at(values, index, place):
    """values[place] of a vector in registers (0 when ``place`` is nowhere)."""
    return tl.sum(tl.where(index == place, values, 0), 0)


@triton.jit
def _child(window, parents, index, node, token, N):
    """The first child of ``node`` that has ``token``; N when there is none."""
    return tl.min(tl.where((parents == node) & (window == token), index, N), 0)


@triton.jit
def _greedy_kernel(window_ptr, parents_ptr, target_ptr, emitted_ptr, path_ptr, length_ptr, N, E,
                   BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    index, slot = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_E)
    inside = index < N
    window = tl.load(window_ptr + row * N + index, mask=inside, other=0)
    parents = tl.load(parents_ptr + row * N + index, mask=inside, other=-2)  # -2: no slot's child
    target = tl.load(target_ptr + row * N + index, mask=inside, other=0)
    emitted = tl.zeros((BLOCK_E,), tl.int64)
    path = tl.full((BLOCK_E,), -1, tl.int32)
    node, length = tl.full((), 0, tl.int32), tl.full((), 0, tl.int32)
    while (node < N) & (length < E):
        token = _at(target, index, node)
        emitted = tl.where(slot >= length, token, emitted)
        path = tl.where(slot == length, node, path)
        node = _child(window, parents, index, node, token, N)
        length += 1
    tl.store(emitted_ptr + row * E + slot, emitted, mask=slot < E)
    tl.store(path_ptr + row * E + slot, path, mask=slot < E)
    tl.store(length_ptr + row, length)


@triton.jit
def _sampled_kernel(window_ptr, parents_ptr, probs_ptr, seed_ptr, position_ptr, score_ptr, winner_ptr, counter_ptr,
                    emitted_ptr, path_ptr, length_ptr, N, E, V, stride_pb, stride_pn, STREAM: tl.constexpr,
                    BLOCK_V: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_N: tl.constexpr,
                    BLOCK_E: tl.constexpr):  # fmt: skip
    """Program (slice, node, row): the winner of the node's race in the slice; the row's last program walks the tree.

    All nodes race although few are visited: side by side they take less time than one behind the other would.

    score_ptr: float32 [B, N, S]; winner_ptr: int32 [B, N, S].
    """
    part, at, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    parts = tl.num_programs(0)
    parents_ptr += row * N
    depth, above = tl.full((), 0, tl.int32), tl.load(parents_ptr + at)
    while (above >= 0) & (depth < N):
        depth += 1
        above = tl.load(parents_ptr + above)
    token = part * BLOCK_V + tl.arange(0, BLOCK_V)
    inside = token < V
    probs = tl.load(probs_ptr + row * stride_pb + at.to(tl.int64) * stride_pn + token, mask=inside, other=0.0)
    position = tl.load(position_ptr + row).to(tl.int64) + 1 + depth
    noise = _exponential(_noise_key(tl.load(seed_ptr + row), position, STREAM), token)
    score, best = _best(probs, noise, token, inside)
    score_ptr += row * N * parts
    winner_ptr += row * N * parts
    tl.store(score_ptr + at * parts + part, score)
    tl.store(winner_ptr + at * parts + part, part * BLOCK_V + best)
    # All threads' stores come before the one thread's release; whoever sees the last count has acquired them all.
    tl.debug_barrier()
    arrived = tl.atomic_add(counter_ptr + row, 1, sem="acq_rel", scope="gpu")
    if arrived == N * parts - 1:
        tl.store(counter_ptr + row, 0)  # ready for the next launch
        index, slot, which = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_S)
        window = tl.load(window_ptr + row * N + index, mask=index < N, other=0)
        parents = tl.load(parents_ptr + index, mask=index < N, other=-2)  # -2: no slot's child
        emitted = tl.zeros((BLOCK_E,), tl.int64)
        path = tl.full((BLOCK_E,), -1, tl.int32)
        node, length = tl.full((), 0, tl.int32), tl.full((), 0, tl.int32)
        while (node < N) & (length < E):
            # Reads bypass L1 (.cg): other programs wrote what is read here.
            scores = tl.load(score_ptr + node * parts + which, mask=which < parts, other=-2.0, cache_modifier=".cg")
            _, first = tl.max(scores, 0, return_indices=True)
            chosen = tl.load(winner_ptr + node * parts + first, cache_modifier=".cg").to(tl.int64)
            emitted = tl.where(slot >= length, chosen, emitted)
            path = tl.where(slot == length, node, path)
            node = _child(window, parents, index, node, chosen, N)
            length += 1
        tl.store(emitted_ptr + row * E + slot, emitted, mask=slot < E)
        tl.store(path_ptr + row * E + slot, path, mask=slot < E)
        tl.store(length_ptr + row, length)


@triton.jit
def _simulate_kernel(window_ptr, parents_ptr, depth_ptr, target_ptr, rates_ptr, seed_ptr, position_ptr, emitted_ptr,
                     path_ptr, length_ptr, N, E, T, stride_rb, stride_rt, IS_TREE: tl.constexpr, STREAM: tl.constexpr,
                     BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    index, slot = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_E)
    inside = index < N
    tested = slot < tl.minimum(T, E - 1)
    rate = tl.load(rates_ptr + row * stride_rb + slot * stride_rt, mask=tested, other=0.0)
    first = tl.load(position_ptr + row).to(tl.int64) + 1
    stands = tested & (_uniform(tl.load(seed_ptr + row), first + slot, STREAM) < rate)
    wanted = tl.min(tl.where(stands, E, slot), 0)
    if IS_TREE:
        parents = tl.load(parents_ptr + row * N + index, mask=inside, other=-1)
        depth = tl.load(depth_ptr + row * N + index, mask=inside, other=0)
    else:
        parents, depth = index - 1, index
    reach = tl.where(inside & (depth <= wanted), depth, -1)
    last = tl.max(reach, 0)
    node = tl.min(tl.where(reach == last, index, N), 0)  # the first of the deepest
    bonus = tl.load(target_ptr + row * N + node)
    path = tl.full((BLOCK_E,), -1, tl.int32)
    behind = tl.zeros((BLOCK_E,), tl.int32)  # the node behind each one on the path
    for up in range(0, last + 1):
        path = tl.where(slot == last - up, node, path)
        behind = tl.where(slot == last - up - 1, node, behind)
        node = tl.maximum(_at(parents, index, node), 0)
    drafted = tl.load(window_ptr + row * N + behind)
    tl.store(emitted_ptr + row * E + slot, tl.where(slot < last, drafted, bonus), mask=slot < E)
    tl.store(path_ptr + row * E + slot, path, mask=slot < E)
    tl.store(length_ptr + row, last + 1)


# ----------------------------------------------------------------------------------------------------------------------
# Launchers


def _outputs(window_ids: Tensor, max_accept: int) -> tuple[Tensor, Tensor, Tensor]:
    batch, device = window_ids.shape[0], window_ids.device
    emitted = torch.empty(batch, max_accept, dtype=torch.int64, device=device)
    return emitted, torch.empty_like(emitted, dtype=torch.int32), torch.empty(batch, dtype=torch.int32, device=device)


def accept_tree_greedy(
    window_ids: Tensor, parents: Tensor, target_ids: Tensor, max_accept: int
) -> tuple[Tensor, Tensor, Tensor]:
    batch, num_tokens = window_ids.shape
    triple = _outputs(window_ids, max_accept)
    with torch.cuda.device_of(window_ids):
        _greedy_kernel[(batch,)](
            window_ids.contiguous(), parents.contiguous(), target_ids.contiguous(), *triple, num_tokens, max_accept,
            BLOCK_N=triton.next_power_of_2(num_tokens), BLOCK_E=triton.next_power_of_2(max_accept), num_warps=1,
        )  # fmt: skip
    return triple


def accept_tree_sampled(
    window_ids: Tensor, parents: Tensor, target_probs: Tensor, seed: Tensor, position: Tensor, max_accept: int
) -> tuple[Tensor, Tensor, Tensor]:
    batch, num_tokens, vocab_size = target_probs.shape
    device, parts = target_probs.device, triton.cdiv(vocab_size, VOCAB_BLOCK)
    triple = _outputs(window_ids, max_accept)
    score = torch.empty(batch, num_tokens, parts, dtype=torch.float32, device=device)
    winner = torch.empty(batch, num_tokens, parts, dtype=torch.int32, device=device)
    probs = _rows(target_probs)
    with torch.cuda.device_of(window_ids):
        _sampled_kernel[(parts, num_tokens, batch)](
            window_ids.contiguous(), parents.contiguous(), probs, seed.contiguous(), position.contiguous(), score, winner,
            COUNTERS.take(device, batch), *triple, num_tokens, max_accept, vocab_size, probs.stride(0), probs.stride(1),
            STREAM=TARGET_STREAM, BLOCK_V=VOCAB_BLOCK, BLOCK_S=triton.next_power_of_2(parts),
            BLOCK_N=triton.next_power_of_2(num_tokens), BLOCK_E=triton.next_power_of_2(max_accept), num_warps=4,
        )  # fmt: skip
    return triple


def simulate_accept(
    window_ids: Tensor,
    parents: Tensor | None,
    depth: Tensor | None,
    target_ids: Tensor,
    rates: Tensor,
    seed: Tensor,
    position: Tensor,
    max_accept: int,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, num_tokens = window_ids.shape
    triple = _outputs(window_ids, max_accept)
    is_tree = parents is not None and depth is not None
    nothing = window_ids  # never read
    with torch.cuda.device_of(window_ids):
        _simulate_kernel[(batch,)](
            window_ids.contiguous(), parents.contiguous() if is_tree else nothing, depth.contiguous() if is_tree else nothing,
            target_ids.contiguous(), rates, seed.contiguous(), position.contiguous(), *triple, num_tokens, max_accept,
            rates.shape[1], *rates.stride(), IS_TREE=is_tree, STREAM=ACCEPT_STREAM,
            BLOCK_N=triton.next_power_of_2(num_tokens), BLOCK_E=triton.next_power_of_2(max_accept), num_warps=1,
        )  # fmt: skip
    return triple
