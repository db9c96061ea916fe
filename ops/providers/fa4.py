"""The ``fa4`` provider: FlashAttention-4 (``flash_attn.cute``) for prompts and for the bulk of a window's prefix.

Prompts go to FA4 whole, packed (causal, sliding windows, softcap, sinks). A window op (verify, draft) is a cascade
(``ops/cascade.py``) of two launches a layer: FA4, without a mask, over the slots every window token sees, folded into batch
rows; then one Triton kernel for the window under its tree, the edge of a sliding window, the sinks and the merge. So FA4 needs
one simple specialization whatever the mask, trees included, and works in parallel along the keys of a row also on Hopper, where
its own split-KV is refused ("SplitKV not supported on SM 9.0", flash-attn-4 4.0.0b36, interface.py). The folded page tables
are planned once per round for all layers.

FA4's facts in comments are read from flash-attn-4 4.0.0b36. Nothing of it is imported before ``probe()`` or the first call.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import inspect
import os
from dataclasses import dataclass
from types import ModuleType

import torch
from packaging.version import Version
from torch import Tensor

from spec_compile.cache_dir import cache_dir
from spec_compile.hardware import Hardware, detect_hardware
from spec_compile.ops import attention as generic
from spec_compile.ops import cascade
from spec_compile.ops.kv_cache import kv_write_packed
from spec_compile.ops.providers.contract import AttentionNode, Availability
from spec_compile.ops.providers.examples import example_arguments
from spec_compile.ops.providers.lowered import Lowered, lowered_op
from spec_compile.ops.torch_private import OpOverload

NAME = "fa4"

INSTALL = "pip install 'spec-compile[fa4]'"
MINIMUM = Version("4.0.0b36")
ARCHES = ("sm90", "sm100", "sm103", "sm110")
_BLACKWELL = ("sm100", "sm103", "sm110")
_DTYPES = (torch.float16, torch.bfloat16)
# What we pass to FA4's forward; a version without one of these is refused by name. The public functions take no out=, lse=
# and tile_mn=, and what the forward returns besides differs between versions, so both outputs are ours.
_PARAMETERS = (
    "q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "seqused_k", "max_seqlen_q", "max_seqlen_k", "page_table",
    "softmax_scale", "causal", "softcap", "window_size_left", "window_size_right", "learnable_sink", "tile_mn",
    "num_splits", "out", "lse",
)  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------------
# The provider


@functools.cache
def probe() -> Availability:
    """Whether FlashAttention-4 is installed, new enough, imports, and has the interface that is used here."""
    try:
        version = importlib.metadata.version("flash-attn-4")
    except importlib.metadata.PackageNotFoundError:
        return Availability(None, f"flash-attn-4 is not installed: {INSTALL}")
    if Version(version) < MINIMUM:
        return Availability(version, f"flash-attn-4 {version} is too old, {MINIMUM} or newer is needed: {INSTALL}")
    try:
        forward = _interface()._flash_attn_fwd
    except Exception as error:  # a missing dependency shows as anything from ImportError to OSError
        problem = f"flash-attn-4 {version} does not import ({type(error).__name__}: {error}); reinstall it: {INSTALL}"
        return Availability(version, problem)
    missing = [name for name in _PARAMETERS if name not in inspect.signature(forward).parameters]
    if missing:
        return Availability(
            version,
            f"flash-attn-4 {version} has another interface than {MINIMUM} (its forward takes no {', '.join(missing)}): "
            f"pip install 'flash-attn-4=={MINIMUM}'",
        )
    return Availability(version)


@functools.cache
def _interface() -> ModuleType:
    """``flash_attn.cute.interface``. Its compiled kernels (seconds each) are kept on disk unless the user said otherwise."""
    os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "1")  # read at import
    os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_DIR", str(cache_dir() / "fa4"))
    return importlib.import_module("flash_attn.cute.interface")


def supports(node: AttentionNode, hardware: Hardware) -> str | None:
    """None when the provider can run ``node`` on ``hardware``, otherwise the reason why not."""
    if hardware.arch not in ARCHES:
        return f"FlashAttention-4 with paged caches runs on {', '.join(ARCHES)}, not on {hardware.arch}"
    if node.op in ("mla_attention", "mla_prefill_attention"):
        return "latent attention (MLA) is not implemented over FlashAttention-4"
    if node.dtype not in _DTYPES:
        return f"dtype {node.dtype} is not float16 or bfloat16"
    if node.kv_dtype != node.dtype:
        return f"the cache's dtype {node.kv_dtype} differs from the queries' {node.dtype}"
    if node.page_size < 16 or node.page_size & (node.page_size - 1):  # BLOCK_E in ops/kernels/cascade.py, and what triton takes
        return f"page size {node.page_size} is not a power of two of at least 16"
    if node.num_q_heads % node.num_kv_heads:
        return f"{node.num_q_heads} query heads are not a multiple of {node.num_kv_heads} key/value heads"
    return _head_dims_problem(node, hardware.arch)


def _head_dims_problem(node: AttentionNode, arch: str) -> str | None:
    """The limits of FA4's kernels (interface.py ``_validate_head_dims``; paged caches want multiples of 16)."""
    dims = (node.head_dim, node.v_head_dim)
    if any(dim % 16 or not 16 <= dim <= 256 for dim in dims):
        return f"head dims {dims[0]} and {dims[1]} are not multiples of 16 within 16..256"
    if arch in _BLACKWELL and max(dims) > 128 and dims not in ((192, 128), (256, 256)):
        return f"head dims {dims[0]} and {dims[1]} are neither up to 128 nor (192, 128) nor (256, 256), as {arch} needs"
    return None


def lower(node: AttentionNode) -> OpOverload | Lowered:
    """The op that takes the place of ``spec_compile::<node.op>``, for window ops with a plan of folded page tables."""
    ops = torch.ops.spec_compile
    if node.op == "prefill_attention":
        return ops.prefill_attention_fa4.default
    rows = node.num_tokens * node.num_q_heads // node.num_kv_heads
    plan_args = (node.num_tokens, rows, node.num_kv_heads, node.page_size, node.window)
    return Lowered(ops.attention_fa4.default, ops.attention_fa4_plan.default, plan_args)


def warm_up(node: AttentionNode, device: torch.device) -> None:
    """Compile FA4 and the Triton kernels as ``node`` needs them, with as many folds as its rows' capacity asks for."""
    args = list(example_arguments(node, device))
    if node.op == "prefill_attention":
        lower(node)(*args)
        return
    capacity = node.max_context or node.page_size
    args[5] = args[5].new_zeros(args[5].shape[0], -(-capacity // node.page_size))
    lower(node)(*args)


# ----------------------------------------------------------------------------------------------------------------------
# How the bulk of the prefix is cut: from static data only, so that every replay of a captured graph does what was captured


@dataclass(frozen=True)
class Splits:
    """How many ways along its keys a row's bulk is cut.

    Attributes:
        folds: pseudo rows of each row.
        native: FA4's own split-KV of each pseudo row.
    """

    folds: int
    native: int


MAX_SPLITS = 32
FOLD_SLOTS = 64  # of a fold in the longest row, at least, and at least a page: pages are not cut
COPIED_FOLD_SLOTS = 1024  # where every fold needs a copy of the queries: see ``choose_splits``
NATIVE_SPLIT_SLOTS = 128  # a tile of FA4's on Blackwell


def choose_splits(hardware: Hardware, batch: int, num_kv_heads: int, rows: int, capacity: int, page_size: int) -> Splits:
    """Enough programs to fill the device, and a page for each fold of a row whose bulk has ``capacity`` slots.

    On an H200 (32/8 heads of 128 dims, 8 tokens) FA4 takes 6.3 us for one row of 2048 keys in 8 folds, 6.0 in 16, 8.8 in 32; of
    16384 keys 24.1, 20.2 and 22.6; for 8 rows of 16384 keys 155 us in one fold, 122 in 2, 125 in 4: one program a
    multiprocessor is best. 8 rows of 2048 keys gain 3.6 us of 24.1 by a second fold, of 512 keys 0.1, less than copying the
    queries takes.

    Args:
        rows: packed queries of a row and key/value head: N * Hq / Hkv.
        capacity: slots that a row's bulk could have.
        page_size: slots in a page; a fold has whole pages (``ops.cascade.fold_prefix``).
    """
    wanted = min(hardware.num_sms // (batch * num_kv_heads * -(-rows // _tile_m(rows))), MAX_SPLITS)
    if batch == 1:  # the queries of one row are broadcast to its folds
        return Splits(max(1, min(wanted, capacity // max(FOLD_SLOTS, page_size))), 1)
    if hardware.arch in _BLACKWELL:
        return Splits(1, max(1, min(wanted, capacity // NATIVE_SPLIT_SLOTS)))
    return Splits(max(1, min(wanted, capacity // max(COPIED_FOLD_SLOTS, page_size))), 1)


def _tile_m(rows: int) -> int:
    return 64 if rows <= 64 else 128


def choose_tile(arch: str, rows: int, head_dim: int, v_head_dim: int) -> tuple[int, int] | None:
    """(query rows, keys) of FA4's tiles; None leaves them to FA4.

    FA4 itself takes 128 or 192 query rows on Hopper; with 64, 8 tokens of a group of 4 heads took 6.0 us instead of 7.4 (H200,
    2048 keys). The keys are as many as fit into shared memory beside 128 query rows, as in FA4's ``_tile_size_fwd_sm90``.
    """
    if arch in _BLACKWELL:
        return None
    widest = max(head_dim, v_head_dim)
    return _tile_m(rows), 128 if widest <= 128 else 112 if widest <= 192 else 80


@torch.library.custom_op("spec_compile::attention_fa4_plan", mutates_args=())
def attention_fa4_plan(
    page_table: Tensor,
    cache_len: Tensor,
    tree_mask: Tensor | None,
    num_tokens: int,
    rows: int,
    num_kv_heads: int,
    page_size: int,
    window: int,
) -> tuple[Tensor, Tensor]:
    """The folded page tables of a round, shared by all layers of the same shape and window.

    Args:
        page_table: int32 [B, M]; cache_len: int32 [B]; tree_mask: not read.
        num_tokens: N; rows: packed queries of a row and key/value head, N * Hq / Hkv.

    Returns:
        int32 [B * folds, columns] page tables and int32 [B * folds] lengths: ``ops.cascade.fold_prefix``.
    """
    folds = _splits(page_table, num_kv_heads, rows, page_size, window).folds
    return cascade.fold_prefix(page_table, cache_len, folds, num_tokens, page_size, window)


@attention_fa4_plan.register_fake
def attention_fa4_plan_fake(page_table, cache_len, tree_mask, num_tokens, rows, num_kv_heads, page_size, window):
    folds = _splits(page_table, num_kv_heads, rows, page_size, window).folds
    columns = cascade.folded_columns(page_table.shape[1], folds, page_size, window)
    pseudo_rows = page_table.shape[0] * folds
    return page_table.new_empty(pseudo_rows, columns), page_table.new_empty(pseudo_rows)


def _splits(page_table: Tensor, num_kv_heads: int, rows: int, page_size: int, window: int) -> Splits:
    batch, capacity = page_table.shape[0], page_table.shape[1] * page_size
    reach = min(capacity, window) if window > 0 else capacity
    return choose_splits(detect_hardware(page_table.device), batch, num_kv_heads, rows, reach, page_size)


# ----------------------------------------------------------------------------------------------------------------------
# The lowered ops


def _attention(
    q, k, v, k_cache, v_cache, page_table, cache_len, tree_mask, scale, window, softcap, sinks, folded_table, folded_len
) -> Tensor:
    """``attention`` as a cascade: FA4 over the folded bulk of the prefix, one Triton kernel for the rest.

    Args:
        folded_table, folded_len: outputs of ``attention_fa4_plan``.
    """
    batch, num_tokens, num_heads, head_dim = q.shape
    num_kv_heads, page_size, v_dim = k.shape[2], k_cache.shape[1], v.shape[3]
    rows, folds = num_tokens * num_heads // num_kv_heads, folded_table.shape[0] // batch
    if batch == 1:
        queries = q.expand(folds, -1, -1, -1)
    else:  # no four strides address row b of every fold, so more than one fold takes a copy
        queries = q[:, None].expand(-1, folds, -1, -1, -1).reshape(batch * folds, num_tokens, num_heads, head_dim)
    partial, partial_lse = bulk_attention(
        queries, k_cache, v_cache, folded_table, folded_len, scale, softcap,
        native_splits=_splits(page_table, num_kv_heads, rows, page_size, window).native,
        tile=choose_tile(detect_hardware(q.device).arch, rows, head_dim, v_dim),
    )  # fmt: skip
    return cascade.cascade_merge(
        q, k, v, k_cache, v_cache, page_table, cache_len, tree_mask, scale, window, softcap, sinks,
        partial, partial_lse,
    )  # fmt: skip


attention_fa4 = lowered_op(generic.attention, "fa4", _attention, extra=("folded_table", "folded_len"))


def bulk_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    scale: float,
    softcap: float,
    *,
    native_splits: int,
    tile: tuple[int, int] | None,
) -> tuple[Tensor, Tensor]:
    """Every query over every slot of its pseudo row, by FA4.

    Args:
        q: [B * folds, N, Hq, D]; page_table: int32 [B * folds, columns]; lengths: int32 [B * folds].
        native_splits, tile: see ``Splits`` and ``choose_tile``.

    Returns:
        [B * folds, N, Hq, Dv] in q's dtype, and float32 [B * folds, Hq, N] natural log-sum-exp, -inf where a row is empty.
    """
    rows, num_tokens, num_heads, _ = q.shape
    out = torch.empty(rows, num_tokens, num_heads, v_cache.shape[3], dtype=q.dtype, device=q.device)
    lse = torch.empty(rows, num_heads, num_tokens, dtype=torch.float32, device=q.device)
    _interface()._flash_attn_fwd(
        q, k_cache, v_cache, page_table=page_table, seqused_k=lengths, softmax_scale=scale, causal=False,
        softcap=softcap, tile_mn=tile, num_splits=native_splits, out=out, lse=lse,
    )  # fmt: skip
    return out, lse


def _prefill_attention(q, k, v, k_cache, v_cache, page_table, cu_seqlens, scale, window, softcap, sinks) -> Tensor:
    """``prefill_attention``: one launch fills the pages, FA4 attends to the packed prompts."""
    kv_write_packed(k, v, k_cache, v_cache, page_table, cu_seqlens, window)
    out = torch.empty(q.shape[0], q.shape[1], v.shape[2], dtype=q.dtype, device=q.device)
    # FA4 sizes its grid by the packed length; this bound only has to be one, and above a tile, because FA4 compiles once
    # more for prompts that fit one tile.
    bound = max(q.shape[0], 1024)
    _interface()._flash_attn_fwd(
        q, k, v, cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens, max_seqlen_q=bound, max_seqlen_k=bound,
        softmax_scale=scale, causal=True, softcap=softcap, window_size_left=window - 1 if window > 0 else None,
        learnable_sink=sinks, out=out,
    )  # fmt: skip
    return out


prefill_attention_fa4 = lowered_op(generic.prefill_attention, "fa4", _prefill_attention)
