"""Pass 3: the hidden states a draft reads leave the graph behind the logits, as one tensor.

Needs: a graph whose outputs are the logits, the tapped states [.., Ht] in order, and whatever else Dynamo returns (what the
forward left in Python objects).
Leaves true: the outputs are (logits,) or (logits, states [.., num_taps * Ht]).
"""

from __future__ import annotations

import torch

from spec_compile.passes.graph import StageGraph, fake, finish


def tap_hidden_states(graph: StageGraph, num_taps: int) -> StageGraph:
    """Keep the logits and the concatenation of the ``num_taps`` outputs behind them."""
    output = graph.gm.graph.output_node()
    logits, *others = output.args[0] if isinstance(output.args[0], tuple | list) else (output.args[0],)
    taps = others[:num_taps]
    if len(taps) > 1:
        with graph.gm.graph.inserting_before(output):
            states = graph.gm.graph.call_function(torch.cat, (taps, -1))
        states.meta["example_value"] = torch.cat([fake(tap) for tap in taps], -1)
        taps = [states]
    output.args = ((logits, *taps),)
    if num_taps:
        graph.note(f"tap_hidden_states: {num_taps} states leave the graph as {tuple(fake(taps[0]).shape)}")
    return finish(graph)
