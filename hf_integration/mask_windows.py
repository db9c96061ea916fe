"""Sliding windows, read off the masks that a forward itself makes, whatever its configuration says.

transformers describes a mask by a function of positions, "may query i see key j", and a model hands the result to its
attention. During capture the function is asked about two stand-ins for positions, so that the mask in the graph is a formula
in them. Behind capture that formula is evaluated at positions of our choice, which tells what kind of mask a layer was given.
"""

from __future__ import annotations

import operator
from collections.abc import Callable

import torch
from torch import Tensor, fx
from transformers import DynamicCache, PretrainedConfig

from spec_compile.errors import CaptureError
from spec_compile.ops import OPS
from spec_compile.passes.graph import RuntimeInput, StageGraph, placeholders

_MASK = {  # where an op takes its tree mask, and its window
    OPS.attention: (7, 9),
    OPS.mla_attention: (5, None),
}
_FAR = 1 << 40  # a position far behind every context
_UNLIMITED = 1 << 31  # no window is as wide: so far back means all the way
_PARTS = 64  # of an interval that one evaluation looks at


def position_stand_ins(device: torch.device) -> tuple[Tensor, Tensor]:
    """Positions of queries int64 [1, 1, 2, 1] and of keys [1, 1, 1, 2], as transformers shapes them."""
    positions = torch.arange(2, device=device)
    return positions.view(1, 1, 2, 1), positions.view(1, 1, 1, 2)


def position_mask(mask_function: Callable[..., Tensor], query: Tensor, key: Tensor) -> Tensor:
    """bool [1, 1, Q, K]: which of ``query`` [1, 1, Q, 1] sees which of ``key`` [1, 1, 1, K], by a function of transformers."""
    first = torch.zeros_like(query)  # row and head: causal masks are the same in all
    return mask_function(first, first, query, key)


def read_windows(gm: fx.GraphModule, stand_ins: tuple[Tensor, Tensor]) -> None:
    """Replace the mask that capture left in every attention op's ``tree_mask`` by the op's ``window``.

    Raises:
        CaptureError: a mask that is neither causal nor a sliding window, or that the model made itself.
    """
    query, key = (next((n for n in placeholders(gm) if n.meta["binding"] is t), None) for t in stand_ins)
    windows: dict[fx.Node, int] = {}
    for node in gm.graph.nodes:
        if node.target not in _MASK or not isinstance(mask := node.args[_MASK[node.target][0]], fx.Node):
            continue
        if mask not in windows:
            windows[mask] = _window_of(lambda q, k, mask=mask: _evaluate(mask, {query: q, key: k}), stand_ins[0].device)
        mask_index, window_index = _MASK[node.target]
        node.update_arg(mask_index, None)
        if window_index is not None:
            node.update_arg(window_index, windows[mask])
        elif windows[mask]:
            raise CaptureError(f"latent attention with a sliding window of {windows[mask]}, which no op expresses.")


def longest_text(graph: StageGraph, config: PretrainedConfig) -> int | None:
    """Tokens up to which transformers' cache keeps all that the masks of ``graph`` let a token see; None for any number.

    The cache keeps as many tokens of a layer as the configuration says, not as its mask says. Where that is less (Moshi), a
    token sees more from within a prompt than behind it, and no window says both.
    """
    layers = DynamicCache(config=config).layers
    limits = []
    for node in graph.gm.graph.nodes:
        if node.target is OPS.attention:
            layer, window = node.args[3].meta["binding"].layer, node.args[9]
            kept = getattr(layers[layer], "sliding_window", None) if layer < len(layers) else None
            limits += [kept] if kept and not 0 < window <= kept else []
    return min(limits, default=None)


def _evaluate(node: fx.Node, known: dict[fx.Node, Tensor]) -> object:
    """The value of ``node``, a formula in ``known``."""
    if node in known:
        return known[node]
    if node.op == "placeholder":
        if isinstance(node.meta["binding"], Tensor):
            return node.meta["binding"]
        name = node.meta["binding"].name if isinstance(node.meta["binding"], RuntimeInput) else "a cache"
        raise CaptureError(f"it passes its own attention mask, made of {name}; only causal masks can be captured.")
    if node.target is operator.getitem and _is_prefix(node.args[1]):  # cut to the length of the keys
        return _evaluate(node.args[0], known)
    if node.op not in ("call_function", "call_method"):
        raise CaptureError(f"it passes its own attention mask ({node.target}); only causal masks can be captured.")
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda arg: _evaluate(arg, known))
    known[node] = (
        getattr(args[0], node.target)(*args[1:], **kwargs) if node.op == "call_method" else node.target(*args, **kwargs)
    )
    return known[node]


def _is_prefix(index: object) -> bool:
    parts = index if isinstance(index, tuple) else (index,)
    return all(
        part is Ellipsis or (isinstance(part, slice) and part.start in (None, 0) and part.step is None) for part in parts
    )


def _window_of(evaluate: Callable[[Tensor, Tensor], object], device: torch.device) -> int:
    """The window of a mask in tokens, self included; 0 where every token sees all before it."""

    def visible(queries: list[int], keys: list[int]) -> Tensor:
        places = (torch.tensor(positions, device=device) for positions in (queries, keys))
        query, key = (place.view(shape) for place, shape in zip(places, ((1, 1, -1, 1), (1, 1, 1, -1)), strict=True))
        out = evaluate(query, key)
        shape = (1, 1, len(queries), len(keys))
        if not isinstance(out, Tensor) or out.dtype != torch.bool or out.shape != shape:
            raise CaptureError("it passes its own attention mask; only causal masks can be captured.")
        return out[0, 0].cpu()

    seen, hidden = 0, _UNLIMITED  # distances at which a far token sees another, and at which it does not
    if bool(visible([_FAR], [_FAR - hidden])):
        window = 0
    else:
        while hidden - seen > 1:
            distances = sorted({seen + (hidden - seen) * part // _PARTS for part in range(_PARTS + 1)} - {seen, hidden})
            cut = int(visible([_FAR], [_FAR - distance for distance in distances]).sum())
            seen, hidden = ([seen, *distances][cut], [*distances, hidden][cut])
        window = hidden
    queries = [0, 1, 2, 5, 4095, 12345, _FAR] + [window * i + j for i in (1, 2, 3) for j in (-1, 0, 1)]
    queries = sorted({q for q in queries if q >= 0})
    keys = sorted(
        {k for q in queries for k in (0, q // 2, *range(q - window - 2, q - window + 3), *range(q - 2, q + 3)) if k >= 0}
    )
    q, k = torch.tensor(queries, device="cpu")[:, None], torch.tensor(keys, device="cpu")
    if not torch.equal(visible(queries, keys), (k <= q) & ((q - k < window) if window else True)):
        raise CaptureError("its attention mask is neither causal nor a sliding window, and no op expresses another.")
    return window
