"""Pass 4: compute the language-model head only where its result is used.

Needs: a graph whose first output is the logits [.., V], reached from one linear by elementwise ops.
Leaves true: prefill graphs compute logits of each prompt's last token only ([1, B, V], rows given by the runtime input
``logit_index``); with ``argmax=True`` the output is the greedy token ids and the logits never leave the graph.
"""

from __future__ import annotations

import math

import torch
from torch import fx

from spec_compile.errors import CaptureError
from spec_compile.passes.graph import StageGraph, add_runtime_input, fake, finish

_SLICE, _ALIGNED = 1024, 64  # at most what Inductor reduces without a loop; rows of whole cache lines
_FEW_ROWS = 192  # of more, whole rows fill a device


def narrow_logits(graph: StageGraph, *, argmax: bool) -> StageGraph:
    """Keep the head's work to what the stage reads.

    Args:
        argmax: return int64 token ids (the lowest id on ties, as ``torch.argmax`` does) instead of logits.

    Raises:
        CaptureError: the output is not reached from one linear by elementwise ops.
    """
    output = graph.gm.graph.output_node()
    logits, *states = output.args[0]
    if graph.stage == "prefill":
        head = _head_linear(logits)
        hidden = head.args[0]  # [1, T, H]
        index = add_runtime_input(graph, "logit_index", fake(hidden).new_empty(2, dtype=torch.int64))
        with graph.gm.graph.inserting_before(head):
            rows = graph.gm.graph.call_method("index_select", (hidden, 1, index))
        rows.meta["example_value"] = fake(hidden).index_select(1, fake(index))
        head.update_arg(0, rows)
        graph.note("narrow_logits: the head sees the last token of each prompt")
    if argmax:
        with graph.gm.graph.inserting_before(output):
            logits = greedy_ids(graph.gm.graph, logits)
        graph.note("narrow_logits: greedy; token ids leave the graph, logits do not")
    output.args = ((logits, *states),)
    return finish(graph)


def greedy_ids(graph: fx.Graph, logits: fx.Node) -> fx.Node:
    """The argmax of each row, NaN and ties as ``argmax`` has them; few rows in slices, then over the slices' best.

    Inductor reduces a row with an index in one program: on an H200 56 us for one row of 248320 logits, 28 of 128256. Slices
    are a row each and short enough for one pass: 4 us. 192 rows of 128256 take 30 us in slices and 43 whole, 1024 rows 333
    and 136. A vocabulary without a fitting divisor stays whole.
    """
    *leading, vocab_size = fake(logits).shape
    few = all(isinstance(n, int) for n in leading) and math.prod(leading) <= _FEW_ROWS
    fitting = (n for n in range(_SLICE, 0, -_ALIGNED) if n < vocab_size and vocab_size % n == 0)
    width = next(fitting, None) if few else None
    if width is None:
        return _call(graph, "argmax", logits, -1)
    slices = _call(graph, "unflatten", logits, -1, (vocab_size // width, width))  # [.., S, V / S]
    best_slice = _call(graph, "argmax", _call(graph, "amax", slices, -1), -1, True)  # [.., 1]
    in_slice = _call(graph, "gather", _call(graph, "argmax", slices, -1), -1, best_slice)
    first = _call(graph, "mul", best_slice, width)
    return _call(graph, "squeeze", _call(graph, "add", first, in_slice), -1)


def _call(graph: fx.Graph, method: str, *args: object) -> fx.Node:
    node = graph.call_method(method, args)
    node.meta["example_value"] = getattr(fake(args[0]), method)(*(fake(a) if isinstance(a, fx.Node) else a for a in args[1:]))
    return node


def _head_linear(logits: fx.Node) -> fx.Node:
    """The linear whose last dim is the vocabulary, behind any soft-capping and scaling."""
    node, steps = logits, 0
    while isinstance(node, fx.Node) and steps < 16:
        name = getattr(node.target, "__name__", str(node.target))
        if node.op == "call_function" and name == "linear":
            return node
        node = next((arg for arg in node.args if isinstance(arg, fx.Node) and arg.op != "placeholder"), None)
        steps += 1
    raise CaptureError("the logits are not the result of one linear layer; narrow_logits cannot find the head.")
