"""Pass 5: provider ops in, generic ops out.

Needs: ``select_backend`` has run. Leaves true: no generic attention op is in the graph.
"""

from __future__ import annotations

from spec_compile.errors import BackendError
from spec_compile.ops import providers
from spec_compile.passes.graph import StageGraph, finish
from spec_compile.passes.select_backend import attention_nodes


def lower(graph: StageGraph) -> StageGraph:
    """Replace each generic attention op by its provider's.

    Raises:
        BackendError: a node has no provider, or a provider handed back the generic op.
    """
    for node in attention_nodes(graph):
        name = node.meta.get("provider")
        if name is None:
            raise BackendError(f"attention node {node.name} of the {graph.stage} graph has no provider; run select_backend.")
        node.target = providers.load(name).lower(node.meta["attention_node"])
    left = attention_nodes(graph)
    if left:
        raise BackendError(f"generic attention ops are left in the {graph.stage} graph: {[n.name for n in left]}.")
    graph.note("lower: every attention node is a provider's op")
    return finish(graph)
