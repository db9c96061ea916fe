"""What transformers calls while a forward is being captured: our attention function, mask function and cache.

transformers routes every attention through three surfaces that are the same from 5.17 to 5.24: ``AttentionInterface``
(the attention itself), ``AttentionMaskInterface`` (who builds the mask; ours builds none) and ``Cache`` (who stores keys
and values; ours hands them straight through, because the attention op appends). All three are active only inside
``capture_context``: outside it the model's own attention implementation is back in place and its forward is untouched.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from inspect import signature

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

from spec_compile.errors import CaptureError
from spec_compile.hf_integration.recurrent_layers import RECURRENT, STATE_PARTS, PassThroughStates, recurrent_capture
from spec_compile.ops import attention as attention_ops  # registers the ops that the graph will hold

NAME = "spec_compile"

# Keyword arguments of an attention call that change nothing we do not already express.
_HARMLESS_KWARGS = {
    "dropout", "is_causal", "position_ids", "cache_position", "output_attentions", "output_hidden_states",
    "use_cache", "cache", "past_key_values", "position_embeddings", "sliding_window", "layer_idx", "num_items_in_batch",
    "return_dict", "logits_to_keep", "training", "attention_dropout", "cu_seq_lens_q", "cu_seq_lens_k",
    "max_length_q", "max_length_k", "output_router_logits", "block_sequence_ids", "scaling", "softcap", "s_aux",
}  # fmt: skip


@dataclass
class CaptureContext:
    """The tensors our ops name besides what the model computes. Their values are never read: the graph is rebound to real
    ones."""

    page_table: Tensor
    cache_len: Tensor
    state_slot: Tensor
    windows: list[int]
    slots: dict[tuple[int, str], Tensor]  # (layer, "k" | "v" | "kv" | one of STATE_PARTS) -> stand-in
    cache: CaptureCache = field(init=False)
    recurrent_layer: int = -1  # the one that is running

    def slot(self, layer_idx: int, part: str) -> Tensor:
        return self.slots[layer_idx, part]


_context: CaptureContext | None = None  # read by functions that transformers calls; set only by capture_context


class PassThroughLayer(CacheLayerMixin):
    """A cache layer that stores nothing: the attention op appends. It remembers its last pair, for latent attention."""

    is_compileable = True
    is_sliding = False
    supports_early_init = False

    def __init__(self) -> None:
        super().__init__()
        self.is_initialized = True

    def lazy_initialization(self, *args, **kwargs) -> None:
        pass

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        self.latest = (key_states, value_states)
        return key_states, value_states

    def get_seq_length(self) -> int:
        return 0  # positions are always explicit

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length


class CaptureCache(Cache):
    """The cache a captured forward sees."""

    def __init__(self, num_layers: int, recurrent: list[int], context: CaptureContext) -> None:
        layers = [PassThroughStates(i, context) if i in recurrent else PassThroughLayer() for i in range(num_layers)]
        super().__init__(layers=layers)


def attention_function(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """transformers' attention contract: query [B, Hq, N, D], key and value [B, Hkv, N, D] -> ([B, N, Hq, Dv], None)."""
    context = _context
    if context is None:
        raise CaptureError("the spec_compile attention function was called outside capture; use the model's own attention.")
    if attention_mask is not None:
        raise CaptureError(f"{type(module).__name__} passes its own attention mask; only causal masks can be captured.")
    unknown = {name for name, value in kwargs.items() if value is not None and name not in _HARMLESS_KWARGS}
    if unknown:
        raise CaptureError(f"{type(module).__name__} passes {sorted(unknown)} to its attention, which no op expresses.")
    if getattr(module, "is_causal", True) is False:
        raise CaptureError(f"{type(module).__name__} is not causal; speculative decoding needs a causal language model.")
    layer = module.layer_idx
    scale = float(scaling) if scaling is not None else query.shape[-1] ** -0.5
    if hasattr(module, "kv_b_proj"):
        if context.windows[layer] or softcap or s_aux is not None:
            raise CaptureError(
                f"{type(module).__name__}: latent attention with windows, softcap or sinks, which no op expresses."
            )
        return _latent_attention(module, query, scale, layer, context), None
    out = torch.ops.spec_compile.attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        context.slot(layer, "k"),
        context.slot(layer, "v"),
        context.page_table,
        context.cache_len,
        None,
        scale,
        context.windows[layer],
        float(softcap or 0.0),
        s_aux,
    )
    return out, None


def _latent_attention(module: nn.Module, query: Tensor, scale: float, layer: int, context: CaptureContext) -> Tensor:
    """DeepSeek's MLA with its up-projections absorbed into query and output, so that the cache holds latents only.

    The key/value expansion that transformers traced before this call becomes dead code. Source: DeepSeek-V2, section 2.1.
    """
    if type(module.kv_b_proj) is not nn.Linear or module.kv_b_proj.bias is not None:
        raise CaptureError(
            f"{type(module).__name__}: kv_b_proj is a {type(module.kv_b_proj).__name__}, and only a plain linear without bias "
            "can be absorbed into the latent attention. Merge adapters first (model.merge_and_unload())."
        )
    latent, rotary = context.cache.layers[layer].latest  # [B, 1, N, C], [B, 1, N, R]
    nope, v_head = module.qk_nope_head_dim, module.v_head_dim
    weight = module.kv_b_proj.weight.view(module.num_heads, nope + v_head, module.kv_lora_rank)  # [Hq, nope + Dv, C]
    q_nope, q_rotary = query.transpose(1, 2).split([nope, query.shape[-1] - nope], -1)  # [B, N, Hq, ...]
    q_latent = torch.einsum("bnhd,hdc->bnhc", q_nope, weight[:, :nope])
    out = torch.ops.spec_compile.mla_attention(
        torch.cat([q_latent, q_rotary], -1),
        torch.cat([latent[:, 0], rotary[:, 0]], -1),
        context.slot(layer, "kv"),
        context.page_table,
        context.cache_len,
        None,
        scale,
        module.kv_lora_rank,
    )
    return torch.einsum("bnhc,hdc->bnhd", out, weight[:, nope:])


def no_mask(*args, use_vmap: bool = False, **kwargs) -> None:
    """Build no mask: causality, windows and trees are the op's business."""
    if use_vmap:  # transformers sets it exactly when a model adds its own mask function
        raise CaptureError("the model combines the causal mask with a mask function of its own, which no op expresses.")
    return None


AttentionInterface.register(NAME, attention_function)
AttentionMaskInterface.register(NAME, no_mask)


def layer_windows(config: PretrainedConfig) -> list[int]:
    """Sliding window of every layer in tokens, self included; 0 means unlimited, or a layer without attention.

    Read from the config, never from the attention call: some models (phimoe) put the window only into the mask.

    Raises:
        CaptureError: a layer type that is neither full nor sliding attention, nor recurrent.
    """
    num_layers = config.num_hidden_layers
    # A config keeps attributes its class does not know: a stray key of another family's is none of this model's.
    declared = hasattr(type(config), "sliding_window") or "sliding_window" in signature(type(config).__init__).parameters
    sliding = (declared and config.sliding_window) or 0
    layer_types = getattr(config, "layer_types", None)
    if layer_types is None:
        return [sliding] * num_layers
    known = {"full_attention": 0, "sliding_attention": sliding, RECURRENT: 0}
    unknown = sorted(set(layer_types) - set(known))
    if unknown:
        raise CaptureError(
            f"{config.model_type} has layers of type {unknown}; only full and sliding attention and gated delta nets can be "
            "captured."
        )
    return [known[layer_type] for layer_type in layer_types[:num_layers]]


def recurrent_layers(config: PretrainedConfig) -> list[int]:
    """Indices of the layers that keep a recurrent state instead of keys and values."""
    layer_types = getattr(config, "layer_types", None) or []
    return [i for i, layer_type in enumerate(layer_types[: config.num_hidden_layers]) if layer_type == RECURRENT]


@contextlib.contextmanager
def capturable_experts(model: PreTrainedModel) -> Iterator[None]:
    """Keep host syncs out of mixture-of-experts layers: transformers' grouped GEMM falls back to a loop over experts that
    reads their sizes on the host for every dtype but bfloat16; its batched GEMM does not."""
    before = getattr(model.config, "_experts_implementation", None)
    device = model.get_input_embeddings().weight.device
    if before != "grouped_mm" or device.type != "cuda" or model.dtype == torch.bfloat16:
        yield
        return
    model.set_experts_implementation("batched_mm")
    try:
        yield
    finally:
        model.set_experts_implementation(before)


@contextlib.contextmanager
def capture_context(model: PreTrainedModel, batch: int) -> Iterator[CaptureContext]:
    """Make ``model``'s forward emit our ops for the duration of the block.

    Args:
        batch: rows of the forward to be captured.
    """
    global _context
    config = model.config.get_text_config(decoder=True)
    device = model.get_input_embeddings().weight.device
    num_layers, recurrent = config.num_hidden_layers, recurrent_layers(config)
    parts = ("k", "v", "kv")
    context = CaptureContext(
        page_table=torch.zeros(batch, 1, dtype=torch.int32, device=device),
        cache_len=torch.zeros(batch, dtype=torch.int32, device=device),
        state_slot=torch.zeros(batch, dtype=torch.int32, device=device),
        windows=layer_windows(config),
        slots={
            (i, part): torch.zeros(1, 1, 1, 1, device=device)
            for i in range(num_layers)
            for part in (STATE_PARTS if i in recurrent else parts)
        },
    )
    context.cache = CaptureCache(num_layers, recurrent, context)
    original = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    _context = context
    try:
        with capturable_experts(model), recurrent_capture(model, recurrent, context):
            yield context
    finally:
        _context = None
        model.set_attn_implementation(original)


__all__ = ["CaptureContext", "attention_ops", "capture_context", "layer_windows", "recurrent_layers"]
