"""Triton kernels of the small ops of a round. Launchers take their op's arguments, documented at the op.

Random numbers are those of ``ops/sampling.py``: uniforms are bit-identical, exponentials up to a logarithm's last bits.

Names in shape comments: B rows, N window tokens, K = N - 1 drafts, V vocabulary, S slices of the vocabulary, L caches.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from spec_compile.ops.kernels.cache_dtype import to_cache
from spec_compile.ops.kernels.online_softmax import any_broken, is_finite

MAX_NGRAM_BLOCK = 4096
VOCAB_BLOCK = 2048
MOVE_BLOCK = 256  # words of a cache row that one program moves
MOVE_ROWS = 8  # rows in flight: enough for the usual accepted path

# ----------------------------------------------------------------------------------------------------------------------
# Randomness


@triton.jit
def _mix_64(x):
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit
def _noise_key(seed, position, stream: tl.constexpr):
    """uint64 hash of int64 seeds and positions."""
    salt = tl.full((), stream + 1, tl.uint64) * 0x9E3779B97F4A7C15
    key = _mix_64(seed.to(tl.uint64, bitcast=True) + salt)
    return _mix_64(key + position.to(tl.uint64, bitcast=True) * 0x9E3779B97F4A7C15)


@triton.jit
def _unit_interval(bits):
    """31 random bits in an int32 to float32 in (0, 1)."""
    return tl.minimum((bits.to(tl.float32) + 0.5) * 4.656612873077393e-10, 0.9999999403953552)


@triton.jit
def _uniform(seed, position, stream: tl.constexpr):
    return _unit_interval((_noise_key(seed, position, stream) >> 33).to(tl.int32))


@triton.jit
def _exponential(key, token):
    """Exponential noise of int32 vocabulary ids; ``key`` is the uint64 of (seed, position, stream)."""
    x = token.to(tl.uint32, bitcast=True) * 0x9E3779B1 + key.to(tl.uint32)
    x = (x ^ (x >> 17)) * 0xED5AD4BB + (key >> 32).to(tl.uint32)
    x = (x ^ (x >> 11)) * 0xAC4C1B51
    x = (x ^ (x >> 15)) * 0x31848BAB
    x = x ^ (x >> 14)
    u = _unit_interval((x >> 1).to(tl.int32, bitcast=True))
    # -log1p(-u). The hardware logarithm is inexact near 1, just where races are won: a series there.
    series = u * (1.0 + u * (0.5 + u * (0.33333333 + u * (0.25 + u * (0.2 + u * 0.16666667)))))
    return tl.where(u < 0.0625, series, -tl.log(1.0 - u))


# ----------------------------------------------------------------------------------------------------------------------
# Acceptance


@triton.jit
def _accept_greedy_kernel(window_ptr, target_ptr, length_ptr, N, BLOCK_N: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    slot = tl.arange(0, BLOCK_N)
    inside = slot < N - 1
    drafted = tl.load(window_ptr + row * N + slot + 1, mask=inside, other=0)
    chosen = tl.load(target_ptr + row * N + slot, mask=inside, other=0)
    tl.store(length_ptr + row, tl.min(tl.where(inside & (drafted == chosen), N, slot), 0) + 1)


@triton.jit
def _count_accepted(window_ptr, draft_ptr, target_ptr, seed, first, N, V, stride_dn, stride_tn,
                    STREAM: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """Drafts accepted before the first rejection; the pointers are the row's."""
    slot = tl.arange(0, BLOCK_N)
    inside = slot < N - 1
    token = tl.load(window_ptr + slot + 1, mask=inside, other=-1)
    valid = inside & (token >= 0) & (token < V)
    ratio = tl.load(target_ptr + slot.to(tl.int64) * stride_tn + token, mask=valid, other=0.0)
    # Rounded as the CPU rounds it, so that both accept the same drafts.
    ratio = tl.div_rn(ratio, tl.load(draft_ptr + slot.to(tl.int64) * stride_dn + token, mask=valid, other=1.0))
    hit = valid & (_uniform(seed, first + slot, STREAM) < ratio)
    return tl.min(tl.where(hit, N, slot), 0)


@triton.jit
def _best(weights, noise, token, inside):
    """The race's winner in one slice: (score, token). Weight 0 scores -1, so it wins only where all do; NaN wins everywhere."""
    score = tl.where(weights > 0, weights / noise, tl.where(weights == weights, -1.0, float("inf")))
    score, index = tl.max(tl.where(inside, score, -2.0), 0, return_indices=True)
    return score, index


@triton.jit
def _race_kernel(window_ptr, draft_ptr, target_ptr, seed_ptr, position_ptr, length_ptr, score_ptr, winner_ptr,
                 N, V, stride_db, stride_dn, stride_tb, stride_tn,
                 OFFSET: tl.constexpr, HAS_DRAFT: tl.constexpr, ACCEPT: tl.constexpr, STREAM: tl.constexpr,
                 BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr):  # fmt: skip
    """Program (row, slice): the slice's winner of the residual's race, and of the target's, which may have to stand in.

    Every program repeats the acceptance tests of its row; that is cheaper than a launch in between. Without drafts
    (N is 1) this is plain sampling.
    """
    row, part, parts = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    window_ptr += row * N
    draft_ptr += row * stride_db
    target_ptr += row * stride_tb
    seed = tl.load(seed_ptr + row)
    first = tl.load(position_ptr + row).to(tl.int64) + OFFSET
    accepted = 0
    if HAS_DRAFT:
        accepted = _count_accepted(window_ptr, draft_ptr, target_ptr, seed, first, N, V, stride_dn, stride_tn, ACCEPT, BLOCK_N)
    token = part * BLOCK_V + tl.arange(0, BLOCK_V)
    inside = token < V
    target_ptr += tl.cast(accepted, tl.int64) * stride_tn
    target = tl.load(target_ptr + token, mask=inside, other=0.0)
    noise = _exponential(_noise_key(seed, first + accepted, STREAM), token)
    score, index = _best(target, noise, token, inside)
    place = row * parts + part
    fallback = place + tl.num_programs(0).to(tl.int64) * parts  # scores and winners: [2, B, S]
    tl.store(score_ptr + fallback, score)
    tl.store(winner_ptr + fallback, part * BLOCK_V + index)
    if HAS_DRAFT:  # noqa: SIM102 - decided when the kernel is compiled, the next condition on the device
        if accepted < N - 1:
            draft_ptr += accepted.to(tl.int64) * stride_dn
            rejected = tl.load(window_ptr + accepted + 1)
            has_q = is_finite(tl.load(draft_ptr + rejected, mask=(rejected >= 0) & (rejected < V), other=0.0))
            draft = tl.load(draft_ptr + token, mask=inside, other=0.0)
            weights = target - tl.where(has_q, draft, 0.0)  # p alone decides where q is not finite
            score, index = _best(weights, noise, token, inside)
    tl.store(score_ptr + place, score)
    tl.store(winner_ptr + place, part * BLOCK_V + index)
    if part == 0:
        tl.store(length_ptr + row, accepted + 1)


@triton.jit
def _emit_kernel(window_ptr, length_ptr, score_ptr, winner_ptr, emitted_ptr, N, S, BLOCK_N: tl.constexpr,
                 BLOCK_S: tl.constexpr):  # fmt: skip
    """Program (row): merge the slices' winners and write the emitted tokens."""
    row, rows = tl.program_id(0).to(tl.int64), tl.num_programs(0).to(tl.int64)
    part = tl.arange(0, BLOCK_S)
    score, index = tl.max(tl.load(score_ptr + row * S + part, mask=part < S, other=-2.0), 0, return_indices=True)
    place = row * S + index
    if score < 0:  # no residual mass was left
        _, index = tl.max(tl.load(score_ptr + (rows + row) * S + part, mask=part < S, other=-2.0), 0, return_indices=True)
        place = (rows + row) * S + index
    last = tl.load(winner_ptr + place).to(tl.int64)
    accepted = tl.load(length_ptr + row) - 1
    slot = tl.arange(0, BLOCK_N)
    drafted = tl.load(window_ptr + row * N + slot + 1, mask=slot < accepted, other=0)
    tl.store(emitted_ptr + row * N + slot, tl.where(slot < accepted, drafted, last), mask=slot < N)


# ----------------------------------------------------------------------------------------------------------------------
# Token history


@triton.jit
def _commit_tokens_kernel(tokens_ptr, cache_len_ptr, finished_ptr, emitted_ptr, length_ptr, end_ptr, eos_ptr, probs_ptr,
                          path_ptr, count_ptr, status_ptr, N, C, E, stride_tokens, probs_stride_b, probs_stride_n,
                          NO_DISTRIBUTION: tl.constexpr, HAS_PROBS: tl.constexpr, HAS_PATH: tl.constexpr, BLOCK_N: tl.constexpr,
                          BLOCK_E: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    cache_len = tl.load(cache_len_ptr + row)
    finished = tl.load(finished_ptr + row) != 0
    known = cache_len + 1
    limit = tl.minimum(tl.load(end_ptr + row), C)
    slot, which = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_E)
    emitted = tl.load(emitted_ptr + row * N + slot, mask=slot < N, other=-1)
    eos = tl.load(eos_ptr + which, mask=which < E, other=-1)
    is_eos = tl.max((emitted[:, None] == eos[None, :]).to(tl.int32), 1) * (emitted >= 0).to(tl.int32)
    first_eos = tl.min(tl.where(is_eos != 0, slot, N), 0)
    count = tl.minimum(tl.minimum(tl.load(length_ptr + row), limit - known), tl.minimum(N, first_eos + 1))
    count = tl.where(finished, 0, tl.maximum(count, 0))
    drawable = N
    if HAS_PROBS:
        behind = slot
        if HAS_PATH:
            behind = tl.maximum(tl.load(path_ptr + row * N + slot, mask=slot < N, other=0), 0)
        prob = tl.load(probs_ptr + row * probs_stride_b + behind.to(tl.int64) * probs_stride_n, mask=slot < count, other=0.0)
        drawable = tl.min(tl.where(is_finite(prob), N, slot), 0)
    status = tl.where(drawable < count, NO_DISTRIBUTION, 0)
    count = tl.minimum(count, drawable)
    status = tl.where(finished | (first_eos < count) | (known + count >= limit), 1, status)
    tl.store(tokens_ptr + row * stride_tokens + known + slot, emitted, mask=slot < count)
    tl.store(cache_len_ptr + row, cache_len + count)
    tl.store(finished_ptr + row, tl.minimum(status, 1).to(tl.uint8))
    tl.store(count_ptr + row, count)
    tl.store(status_ptr + row, status)


@triton.jit
def _ngram_kernel(tokens_ptr, cache_len_ptr, draft_ptr, length_ptr, K, stride_tokens, MIN: tl.constexpr,
                  MAX: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Program (row): score every earlier end of an n-gram by (matched length, position) and keep the best."""
    row = tl.program_id(0).to(tl.int64)
    tokens_ptr += row * stride_tokens
    last = tl.load(cache_len_ptr + row)
    best = tl.full((BLOCK,), -1, tl.int64)
    for start in range(0, last, BLOCK):
        end = start + tl.arange(0, BLOCK)
        alive = end < last
        matched = tl.zeros((BLOCK,), tl.int64)
        for i in tl.static_range(MAX):
            # last - i < 0 implies end - i < 0, so the suffix token needs no check of its own
            alive = alive & (end >= i)
            wanted = tl.load(tokens_ptr + tl.maximum(last - i, 0))
            alive = alive & (tl.load(tokens_ptr + end - i, mask=alive, other=0) == wanted)
            matched += alive.to(tl.int64)
        best = tl.maximum(best, tl.where(matched >= MIN, matched * 0x100000000 + end, -1))
    winner = tl.max(best, 0)
    end = tl.where(winner < 0, last - 1, winner.to(tl.int32))  # without a match the cycle is the root alone
    step = tl.arange(0, BLOCK_K)
    draft = tl.load(tokens_ptr + end + 1 + step % (last - end), mask=step < K, other=0)
    tl.store(draft_ptr + row * K + step, draft, mask=step < K)
    tl.store(length_ptr + row, tl.where(winner < 0, 0, winner >> 32).to(tl.int32))


# ----------------------------------------------------------------------------------------------------------------------
# Paged caches


@triton.jit
def _place(table_ptr, position, page_size, M):
    """Flat slot of a row's positions; those the row cannot hold lie in page 0."""
    index = position // page_size
    page = tl.load(table_ptr + index, mask=index < M, other=0).to(tl.int64)
    return page * page_size + position % page_size


@triton.jit
def _kv_write_kernel(k_ptr, v_ptr, k_cache_ptr, v_cache_ptr, table_ptr, cache_len_ptr, N, M, page_size,
                     k_stride_b, k_stride_n, k_stride_h, v_stride_b, v_stride_n, v_stride_h,
                     HEADS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
                     BLOCK_DV: tl.constexpr):  # fmt: skip
    """Program (row, window token): one slot's keys and values of all heads, through ``ops.attention.hide_broken``."""
    row, slot = tl.program_id(0).to(tl.int64), tl.program_id(1)
    place = _place(table_ptr + row * M, tl.load(cache_len_ptr + row) + slot, page_size, M)
    head, d, dv = tl.arange(0, BLOCK_H)[:, None], tl.arange(0, BLOCK_D)[None, :], tl.arange(0, BLOCK_DV)[None, :]
    k_ok, v_ok = (head < HEADS) & (d < D), (head < HEADS) & (dv < DV)
    k = tl.load(k_ptr + row * k_stride_b + slot * k_stride_n + head * k_stride_h + d, mask=k_ok, other=0.0)
    v = tl.load(v_ptr + row * v_stride_b + slot * v_stride_n + head * v_stride_h + dv, mask=v_ok, other=0.0)
    broken = any_broken(to_cache(v, v_cache_ptr.dtype.element_ty))
    k = to_cache(tl.where(broken, float("nan"), k), k_cache_ptr.dtype.element_ty)
    v = to_cache(tl.where(broken, 0.0, v), v_cache_ptr.dtype.element_ty)
    tl.store(k_cache_ptr + (place * HEADS + head) * D + d, k, mask=k_ok)
    tl.store(v_cache_ptr + (place * HEADS + head) * DV + dv, v, mask=v_ok)


@triton.jit
def _kv_commit_kernel(address_ptr, table_ptr, cache_len_ptr, path_ptr, N, M, L, page_size, WORD: tl.constexpr,
                      BLOCK_N: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Program (row, cache, piece of a cache row): move the path's slots in groups of ROWS.

    Sources never stand before their destinations, so a group cannot read what an earlier one wrote; within a group
    everything is read before a barrier and written behind it.
    """
    row, cache, piece = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    every = tl.arange(0, BLOCK_N)
    path = tl.load(path_ptr + row * N + every, mask=every < N, other=-1)
    moved = tl.max(tl.where(path > every, every + 1, 0), 0)  # nothing behind the last moved slot: chains cost nothing
    base = tl.load(address_ptr + cache).to(tl.pointer_type(WORD))
    width = tl.load(address_ptr + L + cache)
    word = (piece * BLOCK + tl.arange(0, BLOCK))[None, :]
    cache_len = tl.load(cache_len_ptr + row)
    table_ptr += row * M
    for start in range(0, moved, ROWS):
        to = start + tl.arange(0, ROWS)
        source = tl.load(path_ptr + row * N + to, mask=to < N, other=-1)
        mask = (source > to)[:, None] & (word < width)
        from_place = _place(table_ptr, cache_len + tl.maximum(source, 0), page_size, M)
        to_place = _place(table_ptr, cache_len + to, page_size, M)
        values = tl.load(base + from_place[:, None] * width + word, mask=mask)
        tl.debug_barrier()
        tl.store(base + to_place[:, None] * width + word, values, mask=mask)


# ----------------------------------------------------------------------------------------------------------------------
# Launchers


def _rows(x: Tensor) -> Tensor:
    """``x`` with a contiguous last dim; other strides are passed on."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def accept_greedy(window_ids: Tensor, target_ids: Tensor) -> Tensor:
    batch, num_tokens = window_ids.shape
    length = torch.empty(batch, dtype=torch.int32, device=window_ids.device)
    with torch.cuda.device_of(window_ids):
        _accept_greedy_kernel[(batch,)](
            window_ids.contiguous(), target_ids.contiguous(), length, num_tokens,
            BLOCK_N=triton.next_power_of_2(num_tokens), num_warps=1,
        )  # fmt: skip
    return length


def _race(window_ids, draft_probs, target_probs, seed, position, offset, accept_stream, stream) -> tuple[Tensor, Tensor]:
    """(emitted int64 [B, N], accept_length int32 [B]); window_ids int64 [B, N], target_probs float32 [B, N, V]."""
    batch, num_tokens, vocab_size = target_probs.shape
    device = target_probs.device
    parts = triton.cdiv(vocab_size, VOCAB_BLOCK)
    score = torch.empty(2, batch, parts, dtype=torch.float32, device=device)
    winner = torch.empty(2, batch, parts, dtype=torch.int32, device=device)
    emitted = torch.empty(batch, num_tokens, dtype=torch.int64, device=device)
    length = torch.empty(batch, dtype=torch.int32, device=device)
    has_draft = draft_probs is not None and num_tokens > 1
    target_probs = _rows(target_probs)
    draft_probs = _rows(draft_probs) if has_draft else target_probs
    block_n = triton.next_power_of_2(num_tokens)
    with torch.cuda.device_of(target_probs):
        _race_kernel[(batch, parts)](
            window_ids, draft_probs, target_probs, seed.contiguous(), position.contiguous(), length, score, winner,
            num_tokens, vocab_size, draft_probs.stride(0), draft_probs.stride(1), target_probs.stride(0),
            target_probs.stride(1), OFFSET=offset, HAS_DRAFT=has_draft, ACCEPT=accept_stream, STREAM=stream,
            BLOCK_N=block_n, BLOCK_V=VOCAB_BLOCK, num_warps=4,
        )  # fmt: skip
        _emit_kernel[(batch,)](
            window_ids, length, score, winner, emitted, num_tokens, parts,
            BLOCK_N=block_n, BLOCK_S=triton.next_power_of_2(parts), num_warps=1,
        )  # fmt: skip
    return emitted, length


def sample_token(probs: Tensor, seed: Tensor, position: Tensor, stream: int) -> Tensor:
    no_window = seed  # never read: there are no drafts
    return _race(no_window, None, probs.float()[:, None], seed, position, 0, 0, stream)[0][:, 0]


def accept_sampled(window_ids, draft_probs, target_probs, seed, position, accept_stream, stream) -> tuple[Tensor, Tensor]:
    return _race(window_ids.contiguous(), draft_probs, target_probs, seed, position, 1, accept_stream, stream)


def commit_tokens(
    tokens, cache_len, finished, emitted, accept_length, end_len, eos_ids, slot_probs, path, no_distribution
) -> tuple[Tensor, Tensor]:
    batch, num_tokens = emitted.shape
    count = torch.empty(batch, dtype=torch.int32, device=tokens.device)
    status = torch.empty_like(count)
    has_probs, has_path = slot_probs is not None, path is not None
    slot_probs = slot_probs if has_probs else emitted  # never read, like ``count`` for the path
    with torch.cuda.device_of(tokens):
        _commit_tokens_kernel[(batch,)](
            tokens, cache_len, finished.view(torch.uint8), emitted.contiguous(), accept_length.contiguous(),
            end_len.contiguous(), eos_ids.contiguous(), slot_probs, path.contiguous() if has_path else count, count, status,
            num_tokens, tokens.shape[1], eos_ids.shape[0], tokens.stride(0), *slot_probs.stride(),
            NO_DISTRIBUTION=no_distribution, HAS_PROBS=has_probs,
            HAS_PATH=has_path, BLOCK_N=triton.next_power_of_2(num_tokens),
            BLOCK_E=triton.next_power_of_2(max(eos_ids.shape[0], 1)), num_warps=1,
        )  # fmt: skip
    return count, status


def ngram_propose(tokens: Tensor, cache_len: Tensor, num_steps: int, min_ngram: int, max_ngram: int) -> tuple[Tensor, Tensor]:
    batch, capacity = tokens.shape
    draft = torch.empty(batch, num_steps, dtype=torch.int64, device=tokens.device)
    length = torch.empty(batch, dtype=torch.int32, device=tokens.device)
    tokens = _rows(tokens)
    block = min(MAX_NGRAM_BLOCK, max(128, triton.next_power_of_2(capacity)))
    with torch.cuda.device_of(tokens):
        _ngram_kernel[(batch,)](
            tokens, cache_len.contiguous(), draft, length, num_steps, tokens.stride(0), MIN=min_ngram, MAX=max_ngram,
            BLOCK_K=triton.next_power_of_2(num_steps), BLOCK=block, num_warps=max(1, min(16, block // 256)),
        )  # fmt: skip
    return draft, length


def kv_write(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, page_table: Tensor, cache_len: Tensor) -> None:
    batch, num_tokens, heads, dim = k.shape
    k, v, page_table = _rows(k), _rows(v), page_table.contiguous()
    with torch.cuda.device_of(k):
        _kv_write_kernel[(batch, num_tokens)](
            k, v, k_cache, v_cache, page_table, cache_len.contiguous(), num_tokens, page_table.shape[1],
            k_cache.shape[1], *k.stride()[:3], *v.stride()[:3], HEADS=heads, D=dim, DV=v.shape[3],
            BLOCK_H=triton.next_power_of_2(heads), BLOCK_D=triton.next_power_of_2(dim),
            BLOCK_DV=triton.next_power_of_2(v.shape[3]), num_warps=4,
        )  # fmt: skip


# Address tables by (device, addresses, widths). Never evicted: a captured graph reads its table at every replay.
_address_tables: dict[tuple, Tensor] = {}


def _address_table(caches: list[Tensor]) -> tuple[Tensor, int, int]:
    """(int64 [2, L]: addresses and row widths in words, bytes of a word, widest row) of the caches."""
    row_bytes = [cache[0, 0].numel() * cache.element_size() for cache in caches]
    word_bytes = next(size for size in (8, 4, 2, 1) if all(n % size == 0 for n in row_bytes))
    widths = [n // word_bytes for n in row_bytes]
    device = caches[0].device
    key = (device, tuple(cache.data_ptr() for cache in caches), tuple(widths))
    if key not in _address_tables:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("kv_commit meets these caches for the first time inside a graph capture; warm up first.")
        _address_tables[key] = torch.tensor([key[1], key[2]], dtype=torch.int64, device=device)
    return _address_tables[key], word_bytes, max(widths)


def kv_commit(caches: list[Tensor], page_table: Tensor, cache_len: Tensor, path: Tensor) -> None:
    batch, num_tokens = path.shape
    addresses, word_bytes, widest = _address_table(caches)
    word = {8: tl.int64, 4: tl.int32, 2: tl.int16, 1: tl.int8}[word_bytes]
    page_table = page_table.contiguous()
    with torch.cuda.device_of(path):
        _kv_commit_kernel[(batch, len(caches), triton.cdiv(widest, MOVE_BLOCK))](
            addresses, page_table, cache_len.contiguous(), path.contiguous(), num_tokens, page_table.shape[1],
            len(caches), caches[0].shape[1], WORD=word, BLOCK_N=triton.next_power_of_2(num_tokens), ROWS=MOVE_ROWS,
            BLOCK=MOVE_BLOCK, num_warps=4,
        )  # fmt: skip
