"""Pass 5b: layers with a sliding window read the page table of their small pool.

Needs: a pool of ``pages_per_row`` pages a row exists; attention is generic. Leaves true: attention nodes whose window needs
fewer pages than a whole text (``ops.page_table.ring_pages``, which the pool is allocated by too) take a table that goes round
these pages, computed once per graph; every other node keeps the runtime input ``page_table``.
"""

from __future__ import annotations

import torch
from torch import fx

from spec_compile.ops.page_table import ring_pages
from spec_compile.passes.graph import StageGraph, fake
from spec_compile.passes.node_description import provided_nodes

_WINDOWED = ("attention", "prefill_attention")
_PAGE_TABLE, _WINDOW = 5, -3  # positions among their arguments


def ring_tables(graph: StageGraph, page_size: int, pages_per_row: int) -> StageGraph:
    """Give every attention node the page table that its window asks for.

    Args:
        page_size: slots a page.
        pages_per_row: pages that a row has in layers that hold whole texts, M.
    """
    rings: dict[tuple[fx.Node, int], fx.Node] = {}
    windowed = [getattr(torch.ops.spec_compile, name) for name in _WINDOWED]
    layers = 0
    for node in provided_nodes(graph):
        if getattr(node.target, "overloadpacket", node.target) not in windowed:
            continue
        pages = ring_pages(node.args[_WINDOW], page_size, pages_per_row)
        if pages == pages_per_row:
            continue
        whole = node.args[_PAGE_TABLE]
        if (whole, pages) not in rings:
            with graph.gm.graph.inserting_before(node):
                ring = graph.gm.graph.call_function(torch.ops.spec_compile.ring_page_table.default, (whole, pages))
            ring.meta["example_value"] = fake(whole).new_empty(fake(whole).shape)
            rings[whole, pages] = ring
        node.update_arg(_PAGE_TABLE, rings[whole, pages])
        layers += 1
    if layers:
        sizes = " or ".join(str(pages) for _, pages in rings)
        graph.note(f"ring_tables: {layers} layers with a sliding window have {sizes} pages a row of {pages_per_row}")
    graph.gm.recompile()
    return graph
