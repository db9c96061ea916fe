"""What ``bench_attention.py`` measures: the cells of its grid, in the order in which they are measured."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from spec_compile.ops.providers import AttentionNode

PAGE_SIZE = 64  # the library's default


@dataclass(frozen=True)
class Cell:
    """One attention call of a verify window: every row has ``context`` committed tokens and ``tokens`` new ones."""

    batch: int
    context: int
    tokens: int
    tree: bool
    head_dim: int
    group: int  # query heads per key/value head
    kv_heads: int = 8

    @property
    def spec(self) -> tuple[int, int, int]:
        """(head_dim, group, tokens): what kernels are compiled for."""
        return self.head_dim, self.group, self.tokens

    @property
    def key(self) -> tuple[int, ...]:
        return self.batch, self.context, self.tokens, int(self.tree), self.head_dim, self.group, self.kv_heads

    @property
    def capacity(self) -> int:
        """Slots a row could hold, as the library would reserve for this context: the next power of two."""
        return max(PAGE_SIZE, 1 << (self.context + self.tokens - 1).bit_length())

    @property
    def pages(self) -> int:
        """Of one layer's cache: those that hold something, and page 0."""
        return 1 + self.batch * -(-(self.context + self.tokens) // PAGE_SIZE)

    @property
    def layer_bytes(self) -> int:
        """Of one layer's keys and values, in 16-bit elements."""
        return 2 * 2 * self.pages * PAGE_SIZE * self.kv_heads * self.head_dim

    @property
    def bytes_moved(self) -> int:
        """What a call must read and write once: the context's and the window's keys and values, queries, output."""
        window = self.tokens * (2 * 2 * self.kv_heads + 2 * self.kv_heads * self.group)  # k, v in and out; q in, o out
        return 2 * self.batch * self.head_dim * (2 * self.kv_heads * self.context + window)

    def node(self, dtype: torch.dtype = torch.bfloat16) -> AttentionNode:
        """The node that the selection pass would see."""
        return AttentionNode(
            op="attention",
            stage="verify",
            batch=self.batch,
            num_tokens=self.tokens,
            num_q_heads=self.kv_heads * self.group,
            num_kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            v_head_dim=self.head_dim,
            page_size=PAGE_SIZE,
            window=0,
            softcap=0.0,
            has_sinks=False,
            is_tree=self.tree,
            dtype=dtype,
            kv_dtype=dtype,
            max_context=self.capacity,
        )

    def __str__(self) -> str:
        shape = "tree" if self.tree else "chain"
        return f"B{self.batch} ctx {self.context} N{self.tokens} {shape} D{self.head_dim} G{self.group}"


def cell_of(row: dict[str, Any]) -> Cell:
    """The cell that a result row belongs to."""
    return Cell(**{name: row[name] for name in Cell.__dataclass_fields__})


@dataclass(frozen=True)
class Grid:
    """The axes. Values stand in order of importance: a run that is cut off should have measured the first ones."""

    batch: tuple[int, ...] = (1, 8, 32, 4, 64)
    context: tuple[int, ...] = (1024, 4096, 16384, 32768)
    tokens: tuple[int, ...] = (8, 1, 4, 16, 64)
    head_dim: tuple[int, ...] = (128, 64, 256)
    group: tuple[int, ...] = (4, 8, 1)
    kv_heads: int = 8
    budget: tuple[tuple[int, float], ...] = ((2048, 11.0), (16384, 27.0))  # (context, most µs) of BUDGET_SHAPE

    def cells(self) -> list[Cell]:
        """Every cell of the grid, specs in order of importance. A tree of one token is a chain and left out."""
        axes = (self.head_dim, self.group, self.tokens)
        ranked = itertools.product(*(enumerate(axis) for axis in axes))
        specs = sorted(ranked, key=lambda spec: (sum(rank for rank, _ in spec), spec))
        return [
            Cell(batch, context, tokens, tree, head_dim, group, self.kv_heads)
            for (_, head_dim), (_, group), (_, tokens) in specs
            for tree in (False, True)[: 1 if tokens == 1 else 2]
            for context in self.context
            for batch in self.batch
        ]

    def budget_cells(self) -> list[tuple[Cell, float]]:
        """Cells with a time to keep: batch 1, a chain of 8, head dim 128, 4 query heads a key/value head."""
        return [(Cell(1, context, 8, False, 128, 4, self.kv_heads), most) for context, most in self.budget]

    def all_cells(self) -> list[Cell]:
        """Those with a budget first (they need not be in the grid), then the grid."""
        return list(dict.fromkeys([*(cell for cell, _ in self.budget_cells()), *self.cells()]))

    def describe(self) -> dict[str, Any]:
        return asdict(self)


GRIDS = {
    "full": Grid(),
    "tiny": Grid((1, 3), (70, 130), (4, 1), (16,), (2,), kv_heads=2, budget=()),  # to test the way through, on a CPU too
}


def by_spec(cells: Iterable[Cell]) -> dict[tuple[int, int, int], list[Cell]]:
    """Cells grouped by what is compiled for them; a worker takes a group, so that nothing is compiled twice."""
    groups: dict[tuple[int, int, int], list[Cell]] = {}
    for cell in cells:
        groups.setdefault(cell.spec, []).append(cell)
    return groups
