"""Device functions over packed tree masks: depth of a token, and which window tokens a tile's queries see."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def popcount(x):
    """Set bits of an int32 tensor; in plain arithmetic because the interpreter has no ``popc``."""
    x = x.to(tl.uint32, bitcast=True)
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    x = x + (x >> 8)
    return ((x + (x >> 16)) & 0x3F).to(tl.int32)


@triton.jit
def token_depth(mask_ptr, token, valid, stride_n, stride_w, WORDS: tl.constexpr):
    """Number of ancestors of each window token: bits in its mask row, itself excluded."""
    count = tl.zeros_like(token)
    for word in tl.static_range(WORDS):
        count += popcount(tl.load(mask_ptr + token * stride_n + word * stride_w, mask=valid, other=0))
    return count - 1


@triton.jit
def visible_columns(mask_ptr, token, valid, col, col_ok, stride_n, stride_w, WORDS: tl.constexpr, HAS_TREE: tl.constexpr):
    """bool [tokens, columns]: window token ``token`` sees window token ``col``; without a tree it is causal."""
    if HAS_TREE:
        visible = (token[:, None] < 0) & (col[None, :] < 0)  # nothing yet
        for word in tl.static_range(WORDS):
            bits = tl.load(mask_ptr + token * stride_n + word * stride_w, mask=valid, other=0)
            hit = ((bits[:, None] >> (col % 32)[None, :]) & 1) != 0
            visible = visible | (hit & (col // 32 == word)[None, :])
    else:
        visible = col[None, :] <= token[:, None]
    return visible & col_ok[None, :]


@triton.jit
def visible_in_word(mask_ptr, token, valid, start, col, col_ok, WORDS: tl.constexpr, HAS_TREE: tl.constexpr):
    """``visible_columns`` of contiguous masks for columns from ``start`` on that lie in one word of them."""
    if HAS_TREE:
        bits = tl.load(mask_ptr + token * WORDS + start // 32, mask=valid, other=0)
        visible = ((bits[:, None] >> (col % 32)[None, :]) & 1) != 0
    else:
        visible = col[None, :] <= token[:, None]
    return visible & col_ok[None, :]
