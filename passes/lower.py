"""Pass 8: provider ops in, generic ops out; what a provider computes once per graph, computed once.

Needs: ``select_backend`` has run. Leaves true: no generic attention op is in the graph; a plan op stands before the first
attention op that uses it.
"""

from __future__ import annotations

import operator

from torch import Tensor, fx

from spec_compile.errors import BackendError
from spec_compile.ops import providers
from spec_compile.ops.providers import Lowered
from spec_compile.ops.torch_private import detect_fake_mode
from spec_compile.passes.graph import StageGraph, fake, finish
from spec_compile.passes.node_description import provided_nodes

Plans = dict[tuple, tuple[fx.Node, ...]]  # (plan op, row arguments, constants) -> the nodes of its outputs


def lower(graph: StageGraph) -> StageGraph:
    """Replace each generic attention op by its provider's.

    Raises:
        BackendError: a node has no provider, or a provider handed back the generic op.
    """
    plans: Plans = {}
    for node in provided_nodes(graph):
        name = node.meta.get("provider")
        if name is None:
            raise BackendError(f"node {node.name} of the {graph.stage} graph has no provider; run select_backend.")
        described = node.meta["attention_node"]
        lowered = providers.as_lowered(providers.load_for(described, name).lower(described))
        node.target = lowered.op
        if lowered.plan is not None:
            node.args = (*node.args, *_plan_outputs(node, lowered, plans))
    left = provided_nodes(graph)
    if left:
        raise BackendError(f"generic ops are left in the {graph.stage} graph: {[n.name for n in left]}.")
    shared = f", {len(plans)} planned once for all layers" if plans else ""
    graph.note(f"lower: every generic op is a provider's{shared}")
    return finish(graph)


def _plan_outputs(node: fx.Node, lowered: Lowered, plans: Plans) -> tuple[fx.Node, ...]:
    """The outputs of ``lowered``'s plan; computed before ``node`` if it is the first to need them."""
    rows = lowered.row_arguments(node.args)
    key = (lowered.plan, rows, tuple((type(arg), arg) for arg in lowered.plan_args))  # 1 == 1.0 == True
    if key not in plans:
        graph = node.graph
        with graph.inserting_before(node):
            call = graph.call_function(lowered.plan, (*rows, *lowered.plan_args))
            fakes = [fake(arg) if isinstance(arg, fx.Node) else arg for arg in call.args]
            with detect_fake_mode(fakes):
                value = lowered.plan(*fakes)
            call.meta["example_value"] = value
            plans[key] = (call,)
            if not isinstance(value, Tensor):
                plans[key] = tuple(graph.call_function(operator.getitem, (call, i)) for i in range(len(value)))
                for output, tensor in zip(plans[key], value, strict=True):
                    output.meta["example_value"] = tensor
    return plans[key]
