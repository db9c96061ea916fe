"""The recurrent states of one model's gated delta nets: a slot a row in every layer, and the buffers of one window."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from spec_compile.errors import CaptureError
from spec_compile.passes.graph import CacheSlot, StageGraph, fake
from spec_compile.runtime.kv_pool import check_room
from spec_compile.runtime.program import Caches


@dataclass(frozen=True)
class StateLayout:
    """What every recurrent layer keeps: the names of ``ops/linear_attention.py``.

    Attributes:
        layers: their indices.
        stored: inputs that the convolution looks back on, K - 1.
    """

    layers: tuple[int, ...]
    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    channels: int
    stored: int
    dtype: torch.dtype


def state_layout(graph: StageGraph) -> StateLayout | None:
    """The layout of a staged prefill graph's recurrent layers; None if it has none.

    Raises:
        CaptureError: recurrent layers that differ in shape.
    """
    ops = torch.ops.spec_compile
    rules = [n for n in graph.gm.graph.nodes if n.op == "call_function" and n.target is ops.gdn_prefill]
    convolutions = [n for n in graph.gm.graph.nodes if n.op == "call_function" and n.target is ops.conv_prefill]
    if not rules:
        return None
    shapes = {
        (*fake(k).shape[1:], *fake(v).shape[1:], fake(x).shape[1], fake(weight).shape[1] - 1, fake(x).dtype)
        for (_, k, v, *_), (x, weight, *_) in zip((n.args for n in rules), (n.args for n in convolutions), strict=True)
    }
    if len(shapes) > 1:
        raise CaptureError(f"recurrent layers of {len(shapes)} different shapes, where one pool needs them alike.")
    key_heads, key_dim, value_heads, value_dim, channels, stored, dtype = shapes.pop()
    layers = tuple(_layer(node) for node in rules)
    return StateLayout(layers, key_heads, value_heads, key_dim, value_dim, channels, stored, dtype)


def _layer(node: fx.Node) -> int:
    bindings = [arg.meta.get("binding") for arg in node.args if isinstance(arg, fx.Node)]
    return next(b.layer for b in bindings if isinstance(b, CacheSlot))


@dataclass
class StatePool:
    """States of ``rows`` rows; row r has slot r + 1, slot 0 is the null slot.

    A window keeps its inputs, never a state a token: for Qwen3-Next's layers that is 28 KiB a token beside 2 MiB.

    Attributes:
        state: float32 [L, S, Hv, Dv, D].
        conv: [L, S, K - 1, C].
        kv_window: [L, S, W, Hk * D + Hv * Dv]; gate_window: float32 [L, S, W, 2 * Hv]; conv_window: [L, S, W, C].
    """

    layout: StateLayout
    state: Tensor
    conv: Tensor
    kv_window: Tensor
    gate_window: Tensor
    conv_window: Tensor

    @property
    def caches(self) -> Caches:
        """(layer, part) -> the layer's [S, …]."""
        parts = ("state", "conv", "kv_window", "gate_window", "conv_window")
        return {(layer, part): getattr(self, part)[i] for i, layer in enumerate(self.layout.layers) for part in parts}

    @property
    def most_tokens(self) -> int:
        return self.conv_window.shape[2]

    @property
    def nbytes(self) -> int:
        return self.state.nbytes + self.conv.nbytes + self.window_bytes

    @property
    def window_bytes(self) -> int:
        return self.kv_window.nbytes + self.gate_window.nbytes + self.conv_window.nbytes

    def commit(self, state_slot: Tensor, path: Tensor | None, count: Tensor) -> None:
        """Advance by the ``count`` [B] tokens of the last window that stand, along ``path`` [B, E] of a tree."""
        torch.ops.spec_compile.gdn_commit(
            self.state, self.conv, self.kv_window, self.gate_window, self.conv_window, state_slot, path, count
        )


def allocate(layout: StateLayout, rows: int, most_tokens: int, device: torch.device) -> StatePool:
    """A zeroed pool for windows of up to ``most_tokens``.

    Raises:
        torch.OutOfMemoryError: the device has no room for it.
    """
    slots = rows + 1
    keys, values = layout.key_heads * layout.key_dim, layout.value_heads * layout.value_dim
    shapes = {
        "state": (layout.value_heads, layout.value_dim, layout.key_dim),
        "conv": (layout.stored, layout.channels),
        "kv_window": (most_tokens, keys + values),
        "gate_window": (most_tokens, 2 * layout.value_heads),
        "conv_window": (most_tokens, layout.channels),
    }
    dtypes = {name: torch.float32 if name in ("state", "gate_window") else layout.dtype for name in shapes}
    count = len(layout.layers) * slots
    wanted = sum(count * math.prod(shape) * dtypes[name].itemsize for name, shape in shapes.items())
    check_room(wanted, "recurrent states", device)
    made = {
        name: torch.zeros(len(layout.layers), slots, *shape, dtype=dtypes[name], device=device)
        for name, shape in shapes.items()
    }
    return StatePool(layout, **made)
