"""What a forward is handed while it is captured: stand-ins for the tensors that only our ops name, and a cache."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor
from transformers.cache_utils import Cache

from spec_compile.hf_integration.taps import Tap

STATE_PARTS = ("conv", "conv_window", "state", "kv_window", "gate_window")  # of a recurrent layer


@dataclass
class CaptureContext:
    """The tensors our ops name besides what the model computes. Their values are never read: the graph is rebound to real
    ones."""

    page_table: Tensor
    cache_len: Tensor
    state_slot: Tensor
    positions: tuple[Tensor, Tensor] | None  # stand-ins in masks; None where the model's attention reads windows from its call
    slots: dict[tuple[int, str], Tensor]  # (layer, "k" | "v" | "kv" | one of STATE_PARTS) -> stand-in
    cache: Cache = field(init=False)  # what the forward sees: its layers store nothing
    states: dict[Tap, Tensor] = field(default_factory=dict)  # tapped hidden states
    recurrent_layer: int = -1  # the one that is running

    def slot(self, layer_idx: int, part: str) -> Tensor:
        return self.slots[layer_idx, part]
