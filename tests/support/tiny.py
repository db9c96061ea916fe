"""Small random models of every family that must work, and the prompts they are tested on."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

_COMMON = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
_SLIDING = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
_FAMILIES: dict[str, dict[str, object]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "qwen3_moe": {**_MOE, "decoder_sparse_step": 1},
    "mistral": {"sliding_window": 16},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    "gemma2": {**_SLIDING, "query_pre_attn_scalar": 16, "attn_logit_softcapping": 2.0},
    "gemma3_text": {**_SLIDING, "query_pre_attn_scalar": 16},
    "gpt_oss": {**_SLIDING, "num_local_experts": 4, "num_experts_per_tok": 2},
    "phi3": {"sliding_window": None},
    "gpt2": {},
    "olmo2": {},
    "cohere2": {**_SLIDING, "logit_scale": 0.5},
    "granite": {"attention_multiplier": 0.3, "logits_scaling": 2.0, "residual_multiplier": 0.7},
    "deepseek_v3": {
        "num_key_value_heads": 4,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 48,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "kv_lora_rank": 16,
        "q_lora_rank": 24,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 16,
        "n_group": 1,
        "topk_group": 1,
    },
}
_ROUTED = {name: _FAMILIES["deepseek_v3"][name] for name in (
    "n_routed_experts", "num_experts_per_tok", "moe_intermediate_size", "n_shared_experts", "n_group", "topk_group",
)}  # fmt: skip
_FAMILIES |= {
    "glm4_moe": {**_ROUTED, "first_k_dense_replace": 1, "use_qk_norm": True},
    "glm4_moe_lite": {**_FAMILIES["deepseek_v3"], "mlp_layer_types": ["dense", "sparse"]},
}
_LATENT = ("deepseek_v3", "glm4_moe_lite")  # their configs follow head_dim from others
_DELTA = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 4, "layer_types": ["linear_attention", "full_attention"], "partial_rotary_factor": 0.5,
}  # fmt: skip
_DELTA_MOE = {**_DELTA, **_MOE, "shared_expert_intermediate_size": 48}
_RECURRENT = {"qwen3_next": {**_DELTA_MOE, "decoder_sparse_step": 1}, "qwen3_5_text": _DELTA, "qwen3_5_moe_text": _DELTA_MOE}
FAMILIES = tuple(_FAMILIES)
RECURRENT_FAMILIES = tuple(_RECURRENT)
_EAGER = {"gemma2", "gpt_oss"}  # soft-capping and sinks have no SDPA form in transformers


def tiny_model(family: str, seed: int = 0, device: str = "cpu", **overrides: object) -> PreTrainedModel:
    """A random float32 model of ``family``, a model type of transformers; the same seed gives the same weights."""
    if family == "gpt2":
        settings = {"vocab_size": 96, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256}
        settings |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    else:
        settings = {**_COMMON, **(_FAMILIES | _RECURRENT)[family]}
        if family in _LATENT:
            settings.pop("head_dim")
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **{**settings, **overrides})
    attention = "eager" if family in _EAGER else "sdpa"
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:  # transformers' initialisation is so flat that greedy text hangs on rounding
                parameter.normal_(0, 0.12)
            elif family == "gpt_oss" and parameter.shape == (config.num_attention_heads,):
                parameter.normal_(0, 1.0)  # sinks that matter
        if family.startswith("gemma"):  # tied and scaled by sqrt(hidden_size): larger ones only repeat the last token
            model.get_input_embeddings().weight.normal_(0, 0.02)
    model.generation_config.eos_token_id = None
    return model.to(device)


def left_padded(batch: int, length: int, vocab_size: int = 96, seed: int = 0) -> dict[str, Tensor]:
    """Ragged random prompts: row 0 full, the others shorter by different amounts, padded on the left with 0."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, vocab_size, (batch, length), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(1, batch):
        mask[row, : (3 * row) % (length - 1)] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def ids_inside_windows(text: Tensor, accept_lengths: list[list[int]], prompt: int) -> list[int]:
    """Per row with one: an id whose first occurrence stands inside an accepted window, tokens before and behind it."""
    found = []
    for row, lengths in zip(text[:, prompt:].tolist(), accept_lengths, strict=True):
        start = 1  # prefill's token
        for length in lengths:
            inner = range(start + 1, min(start + length - 1, len(row)))
            fresh = [row[i] for i in inner if row[i] not in row[:i]]
            if fresh:
                found.append(fresh[0])
                break
            start += length
    return found
