"""The contract every attention provider keeps: fresh random problems, checked against the generic ops in float64.

A problem is made so that what must not be read or written shows: every cache slot that no row has committed is NaN, pages are
shuffled, outputs start as NaN, padding rows share page 0, query, key and value are views of one projection. ``check`` runs on
any device: ``tests/gpu`` calls it for every installed provider, CPU tests for the torch provider and for Triton's interpreter.

The error bound. Two roundings to the inputs' dtype are part of every provider's method: the softmax weights before they meet
the values, and the output. Each is off by at most u, half a step (2^-8 in bfloat16, 2^-11 in float16), so an output as a whole
may be off by 2 u of its norm. Of a single head's output vector 8 u are allowed, because the sum over keys of rounded weights
can be larger than its result. Scores and sums are in float32 everywhere and do not count. One key too many or too few among S
moves the output by about 1/sqrt(S), 2 % at 2048 keys: far outside. In float32 the bound is one of sums of some thousand terms.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from spec_compile.ops import attention as generic
from spec_compile.ops import providers
from spec_compile.ops.providers import AttentionNode

NAN = float("nan")
# Of the whole output and of one head's vector, relative to the norm of the expected one.
BOUNDS = {
    torch.bfloat16: (2 * 2**-8, 8 * 2**-8),
    torch.float16: (2 * 2**-11, 8 * 2**-11),
    torch.float32: (1e-5, 1e-4),
}


@dataclass(frozen=True)
class Case:
    """One attention problem; ``lengths`` are committed tokens (windows) or prompt lengths (``packed``)."""

    lengths: tuple[int, ...]
    num_tokens: int = 1
    heads: tuple[int, int] = (8, 2)
    dims: tuple[int, int] = (64, 64)  # of keys and of values; (C + R, C) when latent
    page_size: int = 16
    tree: bool = False
    window: int = 0
    softcap: float = 0.0
    sinks: bool = False
    padding_rows: int = 0  # appended rows of length 0 whose pages are all page 0
    spare_columns: int = 1  # of the page table, behind the last that a row needs
    packed: bool = False  # prefill
    latent: bool = False  # MLA
    stage: str = "verify"
    outliers: bool = False  # new keys and values beyond what float8 holds
    broken: bool = False  # in every row a token behind the first whose values (or keys, in one head) are no numbers

    @property
    def op(self) -> str:
        return ("mla_" if self.latent else "") + ("prefill_" if self.packed else "") + "attention"

    @property
    def columns(self) -> int:
        """Of the page table: pages of the longest row, its window included, and spare ones."""
        appended = 0 if self.packed else self.num_tokens
        return -(-(max(self.lengths) + appended) // self.page_size) + self.spare_columns

    @property
    def live(self) -> slice:
        """Rows of the output that mean something: all but the padding rows, whose keys race on page 0."""
        return slice(None) if self.packed else slice(len(self.lengths))

    def node(self, dtype: torch.dtype, kv_dtype: torch.dtype | None = None) -> AttentionNode:
        """The node that a provider is asked about."""
        return AttentionNode(
            op=self.op,
            stage="prefill" if self.packed else self.stage,
            batch=None if self.packed else len(self.lengths) + self.padding_rows,
            num_tokens=None if self.packed else self.num_tokens,
            num_q_heads=self.heads[0],
            num_kv_heads=1 if self.latent else self.heads[1],
            head_dim=self.dims[0],
            v_head_dim=self.dims[1],
            page_size=self.page_size,
            window=self.window,
            softcap=self.softcap,
            has_sinks=self.sinks,
            is_tree=self.tree,
            dtype=dtype,
            kv_dtype=kv_dtype or dtype,
            max_context=self.columns * self.page_size,
        )


# ----------------------------------------------------------------------------------------------------------------------
# Making a problem


def random_trees(batch: int, num_tokens: int, device: str) -> Tensor:
    """int32 [batch, num_tokens, words]: packed ancestors (self included) of random trees."""
    bits = torch.zeros(batch, num_tokens, -(-num_tokens // 32) * 32, dtype=torch.int64)
    for row in bits:
        for token in range(num_tokens):
            if token:
                row[token] = row[int(torch.randint(token, ()))]
            row[token, token] = 1
    words = (bits.unflatten(-1, (-1, 32)) << torch.arange(32)).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(device, torch.int32)


def page_tables(case: Case, device: str) -> tuple[Tensor, Tensor, int]:
    """(table the provider gets, table the reference gets, number of pages).

    Padding rows share page 0, so the reference, which reads back what it wrote, gets private pages for them.
    """
    rows, padding = len(case.lengths), case.padding_rows
    pages = (rows + padding) * case.columns + 4
    table = (torch.randperm(pages - 1)[: (rows + padding) * case.columns] + 1).view(-1, case.columns).to(device, torch.int32)
    given = table.clone()
    given[rows:] = 0
    return given, table, pages


def filled_cache(pages: int, table: Tensor, case: Case, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """[pages, page_size, *shape]: NaN everywhere but in the committed slots of the rows."""
    cache = torch.full((pages, case.page_size, *shape), NAN, device=table.device)
    for row, length in enumerate(() if case.packed else case.lengths):
        slots = generic.cache_slots(table[row : row + 1], case.page_size)[0, :length]
        cache.flatten(0, 1)[slots] = torch.randn(length, *shape, device=table.device)
    return cache.to(dtype)


def fused_qkv(lead: tuple[int, ...], case: Case, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Views of one fused projection, as models make them: [*lead, heads, dims]."""
    (hq, hkv), (d, dv) = case.heads, case.dims
    fused = torch.randn(*lead, (hq + hkv) * d + hkv * dv, device=device)
    if case.outliers:
        fused[..., hq * d :] *= torch.where(torch.rand(fused[..., hq * d :].shape, device=device) < 0.01, 1000.0, 1.0)
    q, k, v = fused.to(dtype).split([hq * d, hkv * d, hkv * dv], dim=-1)
    return q.unflatten(-1, (hq, d)), k.unflatten(-1, (hkv, d)), v.unflatten(-1, (hkv, dv))


@dataclass
class Problem:
    """A case with its tensors.

    Attributes:
        new: q and what is appended: (q, k, v), or (q, kv) when latent.
        caches: (k, v), or one latent cache.
        rows: (page_table, cache_len, tree_mask) or (page_table, cu_seqlens), as the provider gets them.
        tail: scale and the other constants.
        private: the reference's page table; it differs from the provider's in the padding rows.
    """

    case: Case
    new: list[Tensor]
    caches: list[Tensor]
    rows: list[Tensor | None]
    tail: list
    private: Tensor
    broken: Tensor | None = None  # bool, the new tokens that are no numbers: [rows, num_tokens] or [T]

    @property
    def args(self) -> tuple:
        """The generic op's arguments."""
        return (*self.new, *self.caches, *self.rows, *self.tail)

    def expected(self) -> tuple[Tensor, list[Tensor]]:
        """The generic op's output and caches in float64."""
        caches = [cache.double() for cache in self.caches]
        # A row's own window is seen as the cache holds it, so that N tokens at once and one by one see the same numbers.
        q, new = self.new[0], [generic.to_cache(x, self.caches[0].dtype) for x in self.new[1:]]
        tail = [x.double() if isinstance(x, Tensor) else x for x in self.tail]
        reference = getattr(torch.ops.spec_compile, self.case.op)
        out = reference(q.double(), *[x.double() for x in new], *caches, self.private, *self.rows[1:], *tail)
        unshared = self.private[len(self.case.lengths) :].flatten().long()
        for cache in caches:
            cache[unshared] = NAN  # pages that exist for the reference only
        return out, caches

    def unclear_slots(self) -> Tensor:
        """Flat cache slots of broken tokens, which a provider may hold as they are or as ``hide_broken`` makes them."""
        if self.broken is None:
            return torch.zeros(0, dtype=torch.int64, device=self.private.device)
        at = self.broken.nonzero()
        if self.case.packed:
            row, position = generic.packed_rows(self.rows[1], self.broken.shape[0])
            row, position = row[at[:, 0]], position[at[:, 0]]
        else:
            row, position = at[:, 0], self.rows[1].long()[at[:, 0]] + at[:, 1]
        return generic.cache_slots(self.private, self.case.page_size)[row, position]


def make_problem(case: Case, dtype: torch.dtype, device: str, kv_dtype: torch.dtype | None = None) -> Problem:
    """Random tensors for ``case``; caches in ``kv_dtype``, by default in ``dtype``."""
    (hq, hkv), (d, dv) = case.heads, case.dims
    given, private, pages = page_tables(case, device)
    if case.packed:
        lead: tuple[int, ...] = (sum(case.lengths),)
        cu_seqlens = torch.tensor([0, *case.lengths], device=device).cumsum(0).to(torch.int32)
        rows: list[Tensor | None] = [given, cu_seqlens]
    else:
        lead = (len(case.lengths) + case.padding_rows, case.num_tokens)
        cache_len = torch.tensor([*case.lengths, *[0] * case.padding_rows], dtype=torch.int32, device=device)
        rows = [given, cache_len, random_trees(lead[0], case.num_tokens, device) if case.tree else None]
    if case.latent:
        new = [torch.randn(*lead, hq, d, device=device).to(dtype), torch.randn(*lead, d, device=device).to(dtype)]
        shapes: list[tuple[int, ...]] = [(d,)]
        tail: list = [d**-0.5, dv]
    else:
        new = list(fused_qkv(lead, case, dtype, device))
        shapes = [(hkv, d), (hkv, dv)]
        sinks = torch.randn(hq, device=device).to(dtype) if case.sinks else None
        tail = [d**-0.5, case.window, case.softcap, sinks]
    caches = [filled_cache(pages, private, case, shape, kv_dtype or dtype) for shape in shapes]
    broken = break_tokens(new, case, lead) if case.broken else None
    return Problem(case, new, caches, rows, tail, private, broken)


def break_tokens(new: list[Tensor], case: Case, lead: tuple[int, ...]) -> Tensor:
    """Make a token of every row one that is no number, its last if it sees no other: bool [*lead]; keys and values in place."""
    broken = torch.zeros(lead, dtype=torch.bool, device=new[0].device)
    if case.packed:
        ends = torch.tensor(case.lengths).cumsum(0).tolist()
        places = [(end - 1 - length // 2,) for end, length in zip(ends, case.lengths, strict=True) if length > 1]
    else:
        places = [(row, case.num_tokens - 1 - row % max(case.num_tokens - 1, 1)) for row in range(len(case.lengths))]
    for number, at in enumerate(places):
        broken[at] = True
        values = new[-1][at]  # [Hkv, Dv], or latent [C + R]
        bad = (NAN, float("inf"), -float("inf"))[number % 3]
        if case.latent:
            values[: case.dims[1]][number % case.dims[1] :: 7] = bad
        else:
            values[0, number % case.dims[1] :: 7] = bad
            new[1][at][-1] = bad  # the last head's keys
    return broken


def settle(out: Tensor, expected: Tensor, live: slice) -> tuple[Tensor, Tensor]:
    """Both with 0 in those head vectors that hold a NaN: they must be the same ones, and some are (tokens see themselves)."""
    lost = [(~x.isfinite()).any(-1, keepdim=True) for x in (out[live], expected[live])]
    assert torch.equal(*lost), "NaN reached tokens that do not see it, or was lost to those that do"
    assert lost[0].any() and not lost[0].all()
    out, expected = out.clone(), expected.clone()
    out[live], expected[live] = out[live].masked_fill(lost[0], 0.0), expected[live].masked_fill(lost[0], 0.0)
    return out, expected


# ----------------------------------------------------------------------------------------------------------------------
# Checking


@contextlib.contextmanager
def poisoned_empty() -> Iterator[None]:
    """``torch.empty`` returns NaN inside, so that an element nobody wrote shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that some operation has no deterministic form is not the point here
            yield
    finally:
        torch.use_deterministic_algorithms(False)


def errors(out: Tensor, expected: Tensor) -> tuple[float, float]:
    """Relative error of the whole and of the worst head vector; NaN in either compares as false with any bound."""
    difference = out.double() - expected
    worst = difference.norm(dim=-1) / expected.norm(dim=-1).clamp(min=1e-30)
    return (difference.norm() / expected.norm()).item(), worst.max().item()


def check_output(out: Tensor, expected: Tensor, case: Case, dtype: torch.dtype) -> tuple[float, float]:
    """Live rows within the bound, padding rows finite. Returns the errors."""
    assert out.shape == expected.shape and out.dtype == dtype and out.is_contiguous()
    assert torch.isfinite(out).all(), "elements that are not finite: never written, or computed from a dead slot"
    found = errors(out[case.live], expected[case.live])
    assert found[0] <= BOUNDS[dtype][0] and found[1] <= BOUNDS[dtype][1], f"errors {found}, bounds {BOUNDS[dtype]}"
    return found


def same_cache(cache: Tensor, expected: Tensor) -> bool:
    """Bitwise up to NaN, page 0 aside."""
    return torch.allclose(cache[1:].double(), expected[1:], rtol=0, atol=0, equal_nan=True)


def check(
    provider: str, case: Case, dtype: torch.dtype, device: str, kv_dtype: torch.dtype | None = None
) -> tuple[float, float]:
    """``provider`` on a fresh problem, twice: the second call meets what the first left behind (counters, appended rows).

    Args:
        kv_dtype: of the caches, where it is not ``dtype``.

    Returns:
        Relative error of the whole output and of its worst head vector.
    """
    op = lowered(provider, case.node(dtype, kv_dtype))
    problem = make_problem(case, dtype, device, kv_dtype)
    expected, caches = problem.expected()
    outs = []
    for _ in range(2):
        with poisoned_empty():
            outs.append(op(*problem.args))
    assert torch.equal(*(x[case.live].nan_to_num() for x in outs)), "two calls on the same inputs differ"
    out = outs[0]
    if case.broken:
        out, expected = settle(out, expected, case.live)
    found = check_output(out, expected, case, dtype)
    unclear = problem.unclear_slots()
    for cache, want in zip(problem.caches, caches, strict=True):
        cache, want = cache.clone(), want.clone()
        cache.flatten(0, 1)[unclear], want.flatten(0, 1)[unclear] = 0, 0
        assert same_cache(cache, want), "the caches differ from the reference's: lost, misplaced or stray writes"
    return found


def lowered(provider: str, node: AttentionNode) -> Callable[..., Tensor]:
    """What the library puts in the generic op's place, plan included: called like the generic op."""
    return providers.as_lowered(providers.load(provider).lower(node))


# ----------------------------------------------------------------------------------------------------------------------
# The cases

CASES = {
    "outliers": Case((40, 0, 200), 8, (8, 2), (128, 128), 64, tree=True, outliers=True, padding_rows=1),
    "n1": Case((512, 0, 37, 1500), heads=(32, 8), dims=(128, 128), page_size=64, stage="draft"),
    "n2_draft": Case((512, 1, 37, 64), 2, (8, 8), (64, 64), 64, stage="draft", padding_rows=4),
    "chain8": Case((2047, 64, 63, 700), 8, (32, 8), (128, 128), 64, spare_columns=9),
    "chain8_batch1": Case((4096,), 8, (32, 8), (128, 128), 64, spare_columns=64),
    "tree8_batch1": Case((2047,), 8, (32, 8), (128, 128), 64, tree=True, spare_columns=40),
    # Few rows and long prefixes, which providers split: windows, sinks and soft-capping must survive the merge.
    "split_window_sinks": Case((3000,), 8, (16, 2), (64, 64), 64, tree=True, window=1500, sinks=True),
    "split_softcap_d256": Case((2500,), 4, (8, 2), (256, 256), 64, softcap=50.0),
    "split_sinks_padding": Case((4000, 70), 6, (8, 2), (64, 64), 64, tree=True, sinks=True, padding_rows=1, spare_columns=40),
    "many_rows": Case(tuple(range(0, 600, 20)), heads=(32, 8), dims=(128, 128), padding_rows=2),
    "tree": Case((700, 3, 0, 15, 16, 17), 13, (6, 2), page_size=16, tree=True, padding_rows=2),
    "tree_group8": Case((900, 65, 128), 16, (16, 2), (128, 128), 64, tree=True, padding_rows=1),
    "tree_group1": Case((900, 65, 128), 4, (4, 4), (64, 64), 64, tree=True),
    "tree64": Case((100, 900), 64, (8, 2), (128, 128), 32, tree=True, spare_columns=8),
    "tree64_window_sinks": Case((100, 900), 64, (8, 2), (128, 128), 32, tree=True, window=90, sinks=True, spare_columns=8),
    "tree40_group7": Case((333, 20), 40, (14, 2), (64, 64), 16, tree=True),
    "tree_sinks": Case((333, 20, 0), 8, (16, 2), (64, 64), 64, tree=True, sinks=True),
    "window": Case((1000, 5, 128, 129), 5, (8, 2), (64, 64), 64, window=128),
    "window_sinks": Case((1000, 5, 128, 129), 5, (8, 2), (64, 64), 64, window=128, sinks=True),
    "window_below_page": Case((1000, 5, 128), 5, (8, 2), (64, 64), 128, tree=True, window=9),
    "softcap": Case((300, 77), 4, (8, 2), (128, 128), 64, softcap=30.0, tree=True),
    "softcap_chain": Case((300, 77), 4, (8, 2), (128, 128), 64, softcap=30.0),
    "softcap_sinks": Case((300, 77), 4, (8, 8), (64, 64), softcap=30.0, tree=True, sinks=True, padding_rows=1),
    "d80": Case((200, 33), 6, (9, 3), (80, 80), tree=True),
    "d96_dv64": Case((200, 33), 3, (6, 2), (96, 64), 256),
    "d256": Case((200, 450), 9, (8, 2), (256, 256), 64, tree=True),
    "d256_softcap": Case((200, 450), 9, (8, 2), (256, 256), tree=True, softcap=50.0),
    "d16": Case((200, 450), 2, (4, 4), (16, 16)),
    "chain100": Case((70, 0), 100, (4, 2), (64, 64)),
    "prefill": Case((300, 0, 1, 129, 64), 0, (8, 2), (128, 128), 64, packed=True),
    "prefill_one": Case((1000,), 0, (8, 2), (64, 64), 16, packed=True),
    "prefill_group1": Case((130, 700), 0, (4, 4), (128, 128), 64, packed=True),
    "prefill_window": Case((700, 50, 300), 0, (8, 2), (64, 64), 64, packed=True, window=100),
    "prefill_window_sinks": Case((700, 50, 300), 0, (6, 2), packed=True, window=100, sinks=True),
    "prefill_window_large": Case((700, 50, 300), 0, (6, 2), (128, 128), packed=True, window=300),
    "prefill_softcap": Case((257, 3), 0, (8, 2), (128, 128), 64, packed=True, softcap=20.0),
    "prefill_softcap_sinks": Case((257, 3), 0, (3, 1), (80, 80), packed=True, softcap=20.0, sinks=True),
    "prefill_d96_dv64": Case((257, 130), 0, (4, 4), (96, 64), 128, packed=True),
    "prefill_d256": Case((200, 150), 0, (4, 2), (256, 256), packed=True),
    "latent": Case((300, 0, 77), 6, (5, 1), (576, 512), 64, tree=True, padding_rows=1, latent=True),
    "latent_chain": Case((300, 0, 77), 6, (5, 1), (576, 512), 64, padding_rows=1, latent=True),
    "latent_128_heads": Case((300, 0, 77), 6, (128, 1), (576, 512), 64, tree=True, padding_rows=1, latent=True),
    # What is masked is not felt, though it be NaN: a refused draft's keys and values, wherever in the window it stands.
    "broken_chain": Case((300, 0, 77), 6, (8, 2), (128, 128), 64, padding_rows=1, broken=True),
    "broken_tree": Case((300, 0, 77, 16), 13, (8, 2), (64, 64), 16, tree=True, padding_rows=1, broken=True),
    "broken_split": Case((3000,), 8, (16, 2), (64, 64), 64, tree=True, window=1500, sinks=True, broken=True),
    "broken_window_softcap": Case((1000, 5, 128), 5, (8, 2), (128, 128), 64, window=9, softcap=30.0, broken=True),
    "broken_latent": Case((300, 0, 77), 6, (5, 1), (576, 512), 64, tree=True, padding_rows=1, latent=True, broken=True),
    "broken_prefill": Case((300, 0, 1, 129, 64), 0, (8, 2), (128, 128), 64, packed=True, broken=True),
    "broken_prefill_window": Case((700, 50, 300), 0, (8, 2), (64, 64), 64, packed=True, window=100, broken=True),
    "latent_prefill": Case((100, 0, 70), 0, (5, 1), (576, 512), 64, packed=True, latent=True),
}

# What each provider refuses of them on an H200 in bfloat16 and float16; everything else must run.
_LATENT = {"latent", "latent_chain", "latent_128_heads", "latent_prefill", "broken_latent"}
_UNEQUAL_DIMS = {"d96_dv64", "prefill_d96_dv64"}
MAY_REFUSE: dict[str, set[str]] = {
    "torch": set(),
    "triton": set(),
    "fa4": _LATENT,
    "flashinfer": _LATENT
    | _UNEQUAL_DIMS
    | {"softcap", "softcap_chain", "softcap_sinks", "d256_softcap", "split_softcap_d256", "prefill_softcap_sinks"}
    | {"tree64_window_sinks", "window_below_page", "split_window_sinks", "broken_split", "broken_window_softcap"},
}
# Prompts go whole to these libraries' kernels, which apply their causal mask to scores: in a tile with a NaN, tokens before it
# get NaN too. A prompt's last token sees it in any case, and only that one's logits are used.
FEELS_MASKED_PROMPTS = {"fa4", "flashinfer"}
