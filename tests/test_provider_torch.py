"""The ``torch`` provider's CPU path against the generic reference ops, and what it must not do to be fast.

Slots that no row has written are NaN, so reading one shows in the result.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from spec_compile.hardware import Hardware
from spec_compile.ops import attention as generic
from spec_compile.ops.providers import AttentionNode, torch_sdpa

HEADS, KV_HEADS, DIM, V_DIM = 6, 2, 8, 5
LATENT, ROTARY = 6, 2
SCALE = 0.35
CAPACITY = 48
LENGTHS = [0, 1, 7, 13, 30]

PAGES = pytest.mark.parametrize("page_size", [CAPACITY, 4], ids=["one page a row", "pages of 4"])
TREES = pytest.mark.parametrize("tree", [False, True], ids=["chain", "tree"])


pytestmark = pytest.mark.usefixtures("fresh_seed")


def page_table(rows: int, page_size: int) -> Tensor:
    """Shuffled pages; page 0 stays the null page."""
    pages = CAPACITY // page_size
    return (torch.randperm(rows * pages) + 1).view(rows, pages).to(torch.int32)


def filled_cache(table: Tensor, page_size: int, lengths: list[int], shape: tuple[int, ...], dtype) -> Tensor:
    """Random below each row's length, NaN anywhere else."""
    cache = torch.full((table.numel() + 1, page_size, *shape), float("nan"), dtype=dtype)
    for row, length in enumerate(lengths):
        for slot in range(length):
            cache[table[row, slot // page_size], slot % page_size] = torch.randn(shape, dtype=dtype)
    return cache


def random_tree(batch: int, num_tokens: int) -> Tensor:
    """int32 [B, N, 1]: each token's parent is any earlier token."""
    mask = torch.zeros(batch, num_tokens, 1, dtype=torch.int32)
    for row in range(batch):
        for i in range(num_tokens):
            parent = int(mask[row, random.randrange(i), 0]) if i else 0
            mask[row, i, 0] = parent | 1 << i
    return mask


def decode_args(num_tokens: int, page_size: int, dtype=torch.float64, v_dim: int = V_DIM, lengths=None) -> list[Tensor]:
    """q, k, v, k_cache, v_cache, page_table, cache_len."""
    lengths = LENGTHS if lengths is None else lengths
    batch, table = len(lengths), page_table(len(lengths), page_size)
    new = [torch.randn(batch, num_tokens, h, d, dtype=dtype) for h, d in [(HEADS, DIM), (KV_HEADS, DIM), (KV_HEADS, v_dim)]]
    caches = [filled_cache(table, page_size, lengths, (KV_HEADS, d), dtype) for d in (DIM, v_dim)]
    return [*new, *caches, table, torch.tensor(lengths, dtype=torch.int32)]


def compare(op: Callable, reference: Callable, args: list, caches: slice, tolerance: float, **kwargs) -> None:
    """Same output, same caches; the reference runs in float64 on the same numbers."""
    exact = [a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]
    exact[caches] = [c.clone() for c in exact[caches]]
    expected = reference(*exact, **kwargs)
    out = op(*args, **kwargs)
    assert out.dtype == args[0].dtype and out.is_contiguous()
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)
    for ours, theirs in zip(args[caches], exact[caches], strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=0, equal_nan=True)


# ----------------------------------------------------------------------------------------------------------------------
# Windows behind a prefix


@PAGES
@TREES
@pytest.mark.parametrize("num_tokens", [1, 6])
@pytest.mark.parametrize("window", [0, 1, 5, 100], ids=lambda w: f"window{w}")
@pytest.mark.parametrize("softcap,with_sinks", [(0.0, False), (2.0, False), (0.0, True), (3.0, True)])
def test_attention(page_size: int, tree: bool, num_tokens: int, window: int, softcap: float, with_sinks: bool):
    args = decode_args(num_tokens, page_size)
    mask = random_tree(len(LENGTHS), num_tokens) if tree else None
    sinks = torch.randn(HEADS, dtype=torch.float64) if with_sinks else None
    args += [mask, SCALE, window, softcap, sinks]
    compare(torch_sdpa.attention_torch, generic.attention, args, slice(3, 5), 1e-10)


@PAGES
@TREES
@pytest.mark.parametrize("num_tokens", [1, 6])
def test_latent_attention(page_size: int, tree: bool, num_tokens: int):
    table = page_table(len(LENGTHS), page_size)
    cache = filled_cache(table, page_size, LENGTHS, (LATENT + ROTARY,), torch.float64)
    q = torch.randn(len(LENGTHS), num_tokens, HEADS, LATENT + ROTARY, dtype=torch.float64)
    kv = torch.randn(len(LENGTHS), num_tokens, LATENT + ROTARY, dtype=torch.float64)
    mask = random_tree(len(LENGTHS), num_tokens) if tree else None
    args = [q, kv, cache, table, torch.tensor(LENGTHS, dtype=torch.int32), mask, SCALE, LATENT]
    compare(torch_sdpa.mla_attention_torch, generic.mla_attention, args, slice(2, 3), 1e-10)


@PAGES
@pytest.mark.parametrize("v_dim", [DIM, V_DIM])
@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 3e-2), (torch.float16, 4e-3)])
def test_attention_in_lower_precision(page_size: int, v_dim: int, dtype: torch.dtype, tolerance: float):
    args = [*decode_args(4, page_size, dtype, v_dim), None, SCALE, 9, 0.0, None]
    compare(torch_sdpa.attention_torch, generic.attention, args, slice(3, 5), tolerance)


def test_projections_may_be_views_of_one_fused_result():
    args = decode_args(4, 4, v_dim=DIM)
    fused = torch.cat([x.flatten(2) for x in args[:3]], -1)  # [B, N, (Hq + 2 Hkv) * D]
    sizes = [HEADS * DIM, KV_HEADS * DIM, KV_HEADS * DIM]
    args[:3] = [x.unflatten(-1, (-1, DIM)) for x in fused.split(sizes, -1)]
    assert not args[0].is_contiguous()
    compare(torch_sdpa.attention_torch, generic.attention, [*args, None, SCALE, 0, 0.0, None], slice(3, 5), 1e-10)


def test_padding_rows_write_the_null_page_only():
    args = decode_args(3, 4)
    args[5][1:3], args[6][1:3] = 0, 0  # rows 1 and 2 pad
    before = args[3].clone(), args[4].clone()
    torch_sdpa.attention_torch(*args, None, SCALE, 0, 0.0, None)
    live = {int(p) for row in (0, 3, 4) for p in args[5][row]}
    untouched = [p for p in range(1, before[0].shape[0]) if p not in live]
    for cache, old in zip(args[3:5], before, strict=True):
        torch.testing.assert_close(cache[untouched], old[untouched], rtol=0, atol=0, equal_nan=True)


def test_a_window_up_to_the_last_slot_of_a_row():
    args = decode_args(6, 4, lengths=[CAPACITY - 6, CAPACITY - 7])
    compare(torch_sdpa.attention_torch, generic.attention, [*args, None, SCALE, 0, 0.0, None], slice(3, 5), 1e-10)


# ----------------------------------------------------------------------------------------------------------------------
# Packed prompts


def packed(lengths: list[int], dims: list[tuple[int, ...]]) -> tuple[list[Tensor], Tensor]:
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    return [torch.randn(sum(lengths), *shape, dtype=torch.float64) for shape in dims], bounds


PROMPTS = [1, 9, 4, 20]


@PAGES
@pytest.mark.parametrize("window", [0, 1, 6, 100], ids=lambda w: f"window{w}")
@pytest.mark.parametrize("softcap,with_sinks", [(0.0, False), (2.0, False), (0.0, True)])
@pytest.mark.parametrize("v_dim", [DIM, V_DIM])
def test_prefill_attention(page_size: int, window: int, softcap: float, with_sinks: bool, v_dim: int):
    new, bounds = packed(PROMPTS, [(HEADS, DIM), (KV_HEADS, DIM), (KV_HEADS, v_dim)])
    table = page_table(len(PROMPTS), page_size)
    caches = [filled_cache(table, page_size, [0] * 4, (KV_HEADS, d), torch.float64) for d in (DIM, v_dim)]
    sinks = torch.randn(HEADS, dtype=torch.float64) if with_sinks else None
    args = [*new, *caches, table, bounds, SCALE, window, softcap, sinks]
    compare(torch_sdpa.prefill_attention_torch, generic.prefill_attention, args, slice(3, 5), 1e-10)


@PAGES
def test_latent_prefill_attention(page_size: int):
    (q, kv), bounds = packed(PROMPTS, [(HEADS, LATENT + ROTARY), (LATENT + ROTARY,)])
    table = page_table(len(PROMPTS), page_size)
    cache = filled_cache(table, page_size, [0] * 4, (LATENT + ROTARY,), torch.float64)
    args = [q, kv, cache, table, bounds, SCALE, LATENT]
    compare(torch_sdpa.mla_prefill_attention_torch, generic.mla_prefill_attention, args, slice(2, 3), 1e-10)


# ----------------------------------------------------------------------------------------------------------------------
# A decode step costs what a row has, not what it could hold


@dataclass
class Allocations(TorchDispatchMode):
    """Bytes of every storage that an op brings into being."""

    sizes: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        known = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        result = func(*args, **kwargs)
        fresh = {
            t.untyped_storage()._cdata: t.untyped_storage().nbytes()
            for t in tree_leaves(result)
            if isinstance(t, Tensor) and t.untyped_storage()._cdata not in known
        }
        self.sizes += fresh.values()
        return result


def step_allocations(length: int, capacity: int, heads: int = HEADS, v_dim: int = DIM, softcap: float = 0.0) -> list[int]:
    """What one float32 decode step over a single row allocates; the op's own function, so that its insides are seen."""
    q, k, v = (torch.randn(1, 1, h, d) for h, d in [(heads, DIM), (KV_HEADS, DIM), (KV_HEADS, v_dim)])
    caches = [torch.randn(2, capacity, KV_HEADS, d) for d in (DIM, v_dim)]
    table, cache_len = torch.ones(1, 1, dtype=torch.int32), torch.tensor([length], dtype=torch.int32)
    with Allocations() as seen:
        torch_sdpa.attention_torch._init_fn(q, k, v, *caches, table, cache_len, None, SCALE, 0, softcap, None)
    return seen.sizes


def test_the_counter_sees_copies_and_expansions():
    cache = torch.randn(64, 8)
    with Allocations() as seen:
        cache.view(8, 64).t()
        assert seen.sizes == [], "views are free"
        cache.clone()
        cache[:, None].expand(64, 3, 8).reshape(-1)
    assert seen.sizes == [cache.nbytes, 3 * cache.nbytes]


def test_a_decode_step_neither_copies_nor_expands_the_cache():
    length = 1000
    keys = (length + 1) * KV_HEADS * DIM * 4
    assert max(step_allocations(length, 2048)) < keys / 8, "keys and values are read where they lie"


def test_a_decode_step_does_not_repeat_keys_for_grouped_queries():
    assert sum(step_allocations(1000, 2048, heads=32)) < 1001 * KV_HEADS * DIM * 4


@pytest.mark.parametrize("v_dim", [DIM, V_DIM])
@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_allocations_do_not_grow_with_the_capacity(v_dim: int, softcap: float):
    small, large = (step_allocations(40, capacity, v_dim=v_dim, softcap=softcap) for capacity in (64, 4096))
    assert sorted(small) == sorted(large)


# ----------------------------------------------------------------------------------------------------------------------
# The provider's face


def test_it_runs_every_node_anywhere():
    node = AttentionNode(
        op="attention", stage="verify", batch=3, num_tokens=5, num_q_heads=7, num_kv_heads=7, head_dim=3, v_head_dim=11,
        page_size=1, window=2, softcap=1.0, has_sinks=True, is_tree=True, dtype=torch.float64, kv_dtype=torch.float16,
    )  # fmt: skip
    assert torch_sdpa.probe().ok and torch_sdpa.probe().version == torch.__version__
    for hardware in (Hardware("cpu", "cpu", 1, ""), Hardware("nvidia", "sm75", 1, ""), Hardware("amd", "gfx90a", 1, "")):
        assert torch_sdpa.supports(node, hardware) is None


@pytest.mark.parametrize("op", ["attention", "mla_attention", "prefill_attention", "mla_prefill_attention"])
def test_lowered_ops_take_the_generic_ops_arguments(op: str):
    node = AttentionNode(
        op=op, stage="verify", batch=1, num_tokens=1, num_q_heads=1, num_kv_heads=1, head_dim=8, v_head_dim=8,
        page_size=64, window=0, softcap=0.0, has_sinks=False, is_tree=False, dtype=torch.float32, kv_dtype=torch.float32,
    )  # fmt: skip
    lowered = torch_sdpa.lower(node)._schema
    reference = getattr(torch.ops.spec_compile, op).default._schema
    assert str(lowered) == str(reference).replace(f"::{op}(", f"::{op}_torch(")


def test_opcheck():
    args = decode_args(3, 4, torch.float32)
    for cache in args[3:5]:
        cache.nan_to_num_(0.0)
    sinks, tree = torch.randn(HEADS), random_tree(len(LENGTHS), 3)
    opcheck(torch_sdpa.attention_torch, (*args, None, SCALE, 0, 0.0, None))
    opcheck(torch_sdpa.attention_torch, (*args, tree, SCALE, 3, 2.0, sinks))
    q, (latent_cache, latent) = args[0], (args[3][:, :, 0].contiguous(), torch.randn(len(LENGTHS), 3, DIM))
    opcheck(torch_sdpa.mla_attention_torch, (q, latent, latent_cache, *args[5:], tree, SCALE, LATENT))
    flat, bounds = [x.flatten(0, 1) for x in args[:3]], torch.arange(0, 18, 3, dtype=torch.int32)
    opcheck(torch_sdpa.prefill_attention_torch, (*flat, *args[3:6], bounds, SCALE, 2, 2.0, sinks))
    opcheck(
        torch_sdpa.mla_prefill_attention_torch,
        (flat[0], latent.flatten(0, 1), latent_cache, args[5], bounds, SCALE, LATENT),
    )
