"""What transformers calls while a forward is being captured: our attention function, mask function and cache.

transformers routes every attention through three surfaces that are the same from 5.17 to 5.24: ``AttentionInterface``
(the attention itself), ``AttentionMaskInterface`` (who builds the mask; ours tells what kind it is, see ``mask_windows``) and
``Cache`` (who stores keys and values; ours hands them straight through, because the attention op appends). A capture works on
a private copy of the model's modules, whose configuration names ours: the model itself is never switched.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

from spec_compile.errors import CaptureError
from spec_compile.hf_integration.capture_context import STATE_PARTS, CaptureContext
from spec_compile.hf_integration.mask_windows import position_mask, position_stand_ins
from spec_compile.hf_integration.own_attention import masks_hold_windows
from spec_compile.hf_integration.recurrent_layers import RECURRENT, PassThroughStates, recurrent_capture
from spec_compile.hf_integration.transformers_private import attention_name, experts_name

NAME = "spec_compile"

# Keyword arguments of an attention call that change nothing we do not already express.
_HARMLESS_KWARGS = {
    "dropout", "is_causal", "position_ids", "cache_position", "output_attentions", "output_hidden_states",
    "use_cache", "cache", "past_key_values", "position_embeddings", "sliding_window", "layer_idx", "num_items_in_batch",
    "return_dict", "logits_to_keep", "training", "attention_dropout", "cu_seq_lens_q", "cu_seq_lens_k",
    "max_length_q", "max_length_k", "output_router_logits", "block_sequence_ids", "scaling", "softcap", "s_aux",
}  # fmt: skip


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
    if attention_mask is not None and context.positions is None:
        raise CaptureError(f"{type(module).__name__} passes its own attention mask; only causal masks can be captured.")
    if module.training and kwargs.get("dropout"):
        raise CaptureError(f"{type(module).__name__} drops attention weights in training mode (p={kwargs['dropout']}).")
    unknown = {name for name, value in kwargs.items() if value is not None and name not in _HARMLESS_KWARGS}
    if unknown:
        raise CaptureError(f"{type(module).__name__} passes {sorted(unknown)} to its attention, which no op expresses.")
    if getattr(module, "is_causal", True) is False:
        raise CaptureError(f"{type(module).__name__} is not causal; speculative decoding needs a causal language model.")
    layer = module.layer_idx
    scale = float(scaling) if scaling is not None else query.shape[-1] ** -0.5
    window = (kwargs.get("sliding_window") or 0) if context.positions is None else 0  # else the mask knows: read_windows
    if hasattr(module, "kv_b_proj"):
        if window or softcap or s_aux is not None:
            raise CaptureError(
                f"{type(module).__name__}: latent attention with windows, softcap or sinks, which no op expresses."
            )
        return _latent_attention(module, query, scale, layer, context, attention_mask), None
    out = torch.ops.spec_compile.attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        context.slot(layer, "k"),
        context.slot(layer, "v"),
        context.page_table,
        context.cache_len,
        attention_mask,  # until read_windows puts a window in its place
        scale,
        window,
        float(softcap or 0.0),
        s_aux,
    )
    return out, None


def _latent_attention(
    module: nn.Module, query: Tensor, scale: float, layer: int, context: CaptureContext, attention_mask: Tensor | None
) -> Tensor:
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
        attention_mask,
        scale,
        module.kv_lora_rank,
    )
    return torch.einsum("bnhc,hdc->bnhd", out, weight[:, nope:])


def mask_of_positions(*args, mask_function: Callable[..., Tensor], use_vmap: bool = False, **kwargs) -> Tensor | None:
    """What kind of mask it is, as a formula in positions; causality, windows and trees are the op's business."""
    if use_vmap:  # transformers sets it exactly when a model adds its own mask function
        raise CaptureError("the model combines the causal mask with a mask function of its own, which no op expresses.")
    return None if _context.positions is None else position_mask(mask_function, *_context.positions)


AttentionInterface.register(NAME, attention_function)
AttentionMaskInterface.register(NAME, mask_of_positions)


def check_layer_types(config: PretrainedConfig) -> None:
    """Refuse by name what the graph alone would show less clearly.

    Raises:
        CaptureError: a layer type that is neither full nor sliding attention, nor recurrent.
    """
    layer_types = (getattr(config, "layer_types", None) or [])[: config.num_hidden_layers]
    unknown = sorted(set(layer_types) - {"full_attention", "sliding_attention", RECURRENT})
    if unknown:
        raise CaptureError(
            f"{config.model_type} has layers of type {unknown}; only full and sliding attention and gated delta nets can be "
            "captured."
        )


def recurrent_layers(config: PretrainedConfig) -> list[int]:
    """Indices of the layers that keep a recurrent state instead of keys and values."""
    layer_types = getattr(config, "layer_types", None) or []
    return [i for i, layer_type in enumerate(layer_types[: config.num_hidden_layers]) if layer_type == RECURRENT]


@contextlib.contextmanager
def capturable_experts(model: PreTrainedModel) -> Iterator[None]:
    """Keep host syncs out of mixture-of-experts layers: transformers' grouped GEMM falls back to a loop over experts that
    reads their sizes on the host for every dtype but bfloat16; its batched GEMM does not."""
    before = experts_name(model.config)
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
        model: a private copy, or nobody else may run it meanwhile.
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
        positions=position_stand_ins(device) if masks_hold_windows(model) else None,
        slots={
            (i, part): torch.zeros(1, 1, 1, 1, device=device)
            for i in range(num_layers)
            for part in (STATE_PARTS if i in recurrent else parts)
        },
    )
    context.cache = CaptureCache(num_layers, recurrent, context)
    original = attention_name(model.config)
    model.set_attn_implementation(NAME)
    _context = context
    try:
        with capturable_experts(model), recurrent_capture(model, recurrent, context):
            yield context
    finally:
        _context = None
        model.set_attn_implementation(original)
