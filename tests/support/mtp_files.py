"""Checkpoints of small targets with an MTP head beside the model, named and split as their families publish them.

Names: vLLM models/{deepseek_mtp,qwen3_next_mtp,mimo_mtp}.py and SGLang models/qwen3_5_mtp.py; experts of Qwen3.5
stand one by one and those of Qwen3.6 stacked (ISEEKYAN/mbridge pull request 145).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tiny import RECURRENT_FAMILIES
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

HIDDEN, VOCAB, HEADS, KV_HEADS, HEAD_DIM, EXPERTS, EXPERT, INTER = 64, 96, 4, 2, 16, 4, 48, 96  # of tiny.py
MTP_FAMILIES = ("deepseek_v3", "glm4_moe", "glm4_moe_lite", "qwen2", *RECURRENT_FAMILIES)  # MiMo-7B is Qwen2's architecture


def _published_shapes(family: str, layer: int, number: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the MTP tensors behind a target of ``layer`` layers, of its layer ``number`` if there are several."""
    h, heads, kv = HIDDEN, HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    latent, gated = family in ("deepseek_v3", "glm4_moe_lite"), family in RECURRENT_FAMILIES
    if latent:
        attention = {"q_a_proj.weight": (24, h), "q_a_layernorm.weight": (24,), "q_b_proj.weight": (HEADS * 24, 24)}
        attention |= {"kv_a_proj_with_mqa.weight": (24, h), "kv_a_layernorm.weight": (16,)}
        attention |= {"kv_b_proj.weight": (HEADS * 32, 16), "o_proj.weight": (h, heads)}
    else:
        attention = {"q_proj.weight": (heads * (1 + gated), h), "k_proj.weight": (kv, h), "v_proj.weight": (kv, h)}
        attention |= {"o_proj.weight": (h, heads)}
        if family == "qwen2":
            attention |= {"q_proj.bias": (heads,), "k_proj.bias": (kv,), "v_proj.bias": (kv,)}
        else:
            attention |= {"q_norm.weight": (HEAD_DIM,), "k_norm.weight": (HEAD_DIM,)}

    def mlp(inner: int) -> dict[str, tuple[int, ...]]:
        return {"gate_proj.weight": (inner, h), "up_proj.weight": (inner, h), "down_proj.weight": (h, inner)}

    if family in ("qwen2", "qwen3_5_text"):
        feed_forward = mlp(INTER)
    else:
        shared = "shared_expert" if gated else "shared_experts"
        feed_forward = {"gate.weight": (EXPERTS, h)}
        feed_forward |= {f"experts.{i}.{name}": shape for i in range(EXPERTS) for name, shape in mlp(EXPERT).items()}
        feed_forward |= {f"{shared}.{name}": shape for name, shape in mlp(EXPERT).items()}
        feed_forward |= {"shared_expert_gate.weight": (1, h)} if gated else {"gate.e_score_correction_bias": (EXPERTS,)}
    block = {f"self_attn.{name}": shape for name, shape in attention.items()}
    block |= {f"mlp.{name}": shape for name, shape in feed_forward.items()}
    block |= {"input_layernorm.weight": (h,), "post_attention_layernorm.weight": (h,)}

    if gated:
        named = {"fc.weight": (h, 2 * h), "norm.weight": (h,)}
        named |= {"pre_fc_norm_embedding.weight": (h,), "pre_fc_norm_hidden.weight": (h,)}
        return {f"mtp.{name}": shape for name, shape in (named | {f"layers.{number}.{n}": s for n, s in block.items()}).items()}
    if family == "qwen2":
        named = {"input_proj.weight": (h, 2 * h), "final_layernorm.weight": (h,)}
        named |= {"token_layernorm.weight": (h,), "hidden_layernorm.weight": (h,)}
        return {f"model.mtp_layers.{number}.{name}": shape for name, shape in (named | block).items()}
    named = {"eh_proj.weight": (h, 2 * h), "enorm.weight": (h,), "hnorm.weight": (h,), "shared_head.norm.weight": (h,)}
    return {f"model.layers.{layer + number}.{name}": shape for name, shape in (named | block).items()}


def published(family: str, target: PreTrainedModel, seed: int = 0, layers: int = 1) -> dict[str, Tensor]:
    """Random MTP tensors as the family's checkpoints have them; DeepSeek's and GLM's hold copies of the target's matrices."""
    generator = torch.Generator().manual_seed(seed)
    layer, out = target.config.num_hidden_layers, {}
    shapes = {name: shape for number in range(layers) for name, shape in _published_shapes(family, layer, number).items()}
    for name, shape in shapes.items():
        value = torch.randn(shape, generator=generator)
        if "norm" in name:
            value = 0.4 * value + (0 if family in RECURRENT_FAMILIES else 1)  # Qwen's norms multiply by 1 + weight
        else:
            value = 0.3 * value if len(shape) == 1 else 1.5 * value * shape[-1] ** -0.5
        out[name] = value
    for prefix in [name.removesuffix("eh_proj.weight") for name in out if name.endswith(".eh_proj.weight")]:
        out[f"{prefix}embed_tokens.weight"] = target.get_input_embeddings().weight.detach().clone()
        out[f"{prefix}shared_head.head.weight"] = target.get_output_embeddings().weight.detach().clone()
    return out


def write_checkpoint(
    directory: Path,
    target: PreTrainedModel,
    tensors: Mapping[str, Tensor],
    nested: bool = False,
    dtype: torch.dtype = torch.float32,
) -> PreTrainedModel:
    """The target's own files with ``tensors`` in a shard of their own, and the target as transformers loads it from there.

    Args:
        dtype: what the target is loaded in.
        nested: the model's tensors are ``model.language_model.*``, as in Qwen3.5's repositories.
    """
    target.save_pretrained(directory)
    own = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    if nested:
        own = {name.replace("model.", "model.language_model.", 1): value for name, value in own.items()}
    shards = {"model-00001-of-00002.safetensors": own, "model-00002-of-00002.safetensors": dict(tensors)}
    for file, held in shards.items():
        save_file(held, directory / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, held in shards.items() for name in held}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, attn_implementation="sdpa").eval()
    model.generation_config.eos_token_id = None
    return model
