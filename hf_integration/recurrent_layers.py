"""Gated delta nets under capture: their convolution and recurrence become one op each.

transformers calls both by names in the family's modeling module and keeps their states in layers of the cache, from 5.17 to
5.24. Inside ``recurrent_capture`` the names mean our functions and the cache layers store nothing: the ops name their states.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import LinearAttentionCacheLayerMixin

from spec_compile.errors import CaptureError
from spec_compile.hf_integration.capture_context import CaptureContext
from spec_compile.ops import OPS

RECURRENT = "linear_attention"  # transformers' layer type
_CONVOLUTION = "causal_conv1d_fn"
_RULES = ("torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule")


class PassThroughStates(LinearAttentionCacheLayerMixin):
    """A cache layer of a gated delta net that stores nothing. It tells which layer is running, which the functions that
    transformers calls are not told."""

    def __init__(self, layer_idx: int, context: CaptureContext) -> None:
        super().__init__()
        self.layer_idx, self.context = layer_idx, context
        # With earlier states and every one recorded: the general path, also for one token (5.17 reads the attribute).
        self.record_past = True
        self.has_previous_state[0] = self.is_conv_states_initialized[0] = self.is_recurrent_states_initialized[0] = True
        self.conv_states[0], self.recurrent_states[0] = context.slot(layer_idx, "conv"), context.slot(layer_idx, "state")

    def lazy_initialization(self, *args, **kwargs) -> None:
        pass

    def update_conv_state(self, conv_states: Tensor, *args, **kwargs) -> Tensor:
        self.context.recurrent_layer = self.layer_idx
        return conv_states

    def update_recurrent_state(self, recurrent_states: Tensor, *args, **kwargs) -> Tensor:
        return recurrent_states


def modeling_modules(model: PreTrainedModel, layers: list[int]) -> set[str]:
    """Names of the Python modules whose functions the recurrent ``layers`` call; empty without such layers.

    Raises:
        CaptureError: recurrent layers of another kind than gated delta nets.
    """
    if not layers:
        return set()
    found = [m for m in model.modules() if isinstance(getattr(m, "conv1d", None), nn.Module) and hasattr(m, "A_log")]
    names = {type(module).__module__ for module in found}
    known = all(all(hasattr(sys.modules[name], f) for f in (_CONVOLUTION, *_RULES)) for name in names)
    if len(found) != len(layers) or not known:
        raise CaptureError(
            f"{type(model).__name__} has recurrent layers {layers} of a kind that no op expresses; gated delta nets "
            "(Qwen3-Next, Qwen3.5) can be captured."
        )
    return names


@contextlib.contextmanager
def recurrent_capture(model: PreTrainedModel, layers: list[int], context: CaptureContext) -> Iterator[None]:
    """Make the recurrent ``layers`` of ``model`` emit our ops for the duration of the block.

    Other threads may run models of the family meanwhile: to them the names mean what they did.
    """
    names = modeling_modules(model, layers)
    replaced: list[tuple[object, str, Callable]] = []
    functions = {_CONVOLUTION: _convolution(context)} | dict.fromkeys(_RULES, _delta_rule(context))
    for name in names:
        for attribute, function in functions.items():
            original = getattr(sys.modules[name], attribute)
            replaced.append((sys.modules[name], attribute, original))
            setattr(sys.modules[name], attribute, _in_this_thread(function, original))
    try:
        yield
    finally:
        for module, attribute, function in replaced:
            setattr(module, attribute, function)


def _in_this_thread(ours: Callable, original: Callable) -> Callable:
    """``ours`` in the thread that captures, ``original`` in every other."""
    capturing = threading.get_ident()

    @torch.compiler.assume_constant_result  # Dynamo asks when it traces
    def here() -> bool:
        return threading.get_ident() == capturing

    def dispatched(*args, **kwargs):
        return ours(*args, **kwargs) if here() else original(*args, **kwargs)

    return dispatched


def _convolution(context: CaptureContext) -> Callable:
    def causal_conv1d_fn(
        hidden_states: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None, **kwargs
    ) -> Tensor:
        """hidden_states [B, C, N], weight [C, K] -> [B, C, N]."""
        if activation not in ("silu", "swish"):
            raise CaptureError(f"a convolution followed by {activation!r}; only SiLU can be captured.")
        layer = context.recurrent_layer
        out = OPS.conv_verify(
            hidden_states.transpose(1, 2),
            weight,
            bias,
            context.slot(layer, "conv"),
            context.slot(layer, "conv_window"),
            context.state_slot,
            None,
        )
        return out.transpose(1, 2)

    return causal_conv1d_fn


def _delta_rule(context: CaptureContext) -> Callable:
    def gated_delta_rule(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        g: Tensor,
        beta: Tensor,
        initial_state: Tensor | None = None,
        output_final_state: bool = False,
        use_qk_l2norm_in_kernel: bool = False,
        **kwargs,
    ) -> tuple[Tensor, Tensor | None]:
        """query, key [B, N, H, D], value [B, N, Hv, Dv], g and beta [B, N, Hv] -> ([B, N, Hv, Dv], the state)."""
        if not use_qk_l2norm_in_kernel:
            raise CaptureError("a gated delta rule over keys of any length; only unit keys can be captured.")
        layer = context.recurrent_layer
        out = OPS.gated_delta_rule(
            query,
            key,
            value,
            g,
            beta,
            context.slot(layer, "state"),
            context.slot(layer, "kv_window"),
            context.slot(layer, "gate_window"),
            context.state_slot,
            None,
            query.shape[-1] ** -0.5,
        )
        return out, initial_state

    return gated_delta_rule
