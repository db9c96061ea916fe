"""How many positions a model has: what its graph looks up by ``position_ids`` in a table, learned or computed beforehand."""

from __future__ import annotations

import operator

import torch
import torch.nn.functional as F
from torch import fx

from spec_compile.passes.graph import RuntimeInput, StageGraph, fake

_SAME_VALUES = {
    "view",
    "reshape",
    "unsqueeze",
    "squeeze",
    "flatten",
    "to",
    "long",
    "int",
    "contiguous",
    "expand",
    "repeat",
    "clone",
}
_SUMS = (operator.add, operator.iadd, torch.add)


def num_positions(graph: StageGraph) -> int | None:
    """Positions 0..n - 1 that every table of the graph has an entry for; None where positions are computed with (rotary).

    Known are embeddings, ``gather``, ``index_select`` and indexing with ``position_ids`` or with what only adds a constant to
    them (OPT looks up two rows further). A model that looks positions up in another way gives None.
    """
    found = [limit for node in graph.gm.graph.nodes if (limit := _limit(node)) is not None]
    return min(found, default=None)


def _limit(node: fx.Node) -> int | None:
    """The first position that ``node`` cannot look up; None if it is no look-up."""
    args = node.args
    if node.target is F.embedding or node.target is torch.embedding:
        index, table, dim = (args[0], args[1], 0) if node.target is F.embedding else (args[1], args[0], 0)
    elif node.target in (torch.gather, "gather", torch.index_select, "index_select") and len(args) == 3:
        table, dim, index = args
    elif node.target is operator.getitem:
        index, table, dim = args[1], args[0], 0
        index = index[0] if isinstance(index, tuple) and index else index
    else:
        return None
    offset = _offset(index)
    shape = getattr(fake(table), "shape", None) if isinstance(table, fx.Node) else None
    return None if offset is None or not shape else int(shape[dim]) - offset


def _offset(node: object) -> int | None:
    """What was added to ``position_ids`` to give ``node``; None if it is something else."""
    if not isinstance(node, fx.Node):
        return None
    if node.op == "placeholder":
        binding = node.meta.get("binding")
        return 0 if isinstance(binding, RuntimeInput) and binding.name == "position_ids" else None
    if not node.args:
        return None
    if (node.op == "call_method" and node.target in _SAME_VALUES) or node.target is operator.getitem:
        return _offset(node.args[0])
    if node.target in _SUMS or (node.op == "call_method" and node.target == "add"):
        left, right = node.args[0], node.args[1]
        base, more = (left, right) if isinstance(right, int) else (right, left)
        offset = _offset(base)
        return offset + more if offset is not None and isinstance(more, int) else None
    return None
