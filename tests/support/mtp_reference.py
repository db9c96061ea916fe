"""Qwen's and MiMo's MTP modules in plain tensors, straight from the published names.

Written from vLLM models/qwen3_next_mtp.py, models/qwen3_next.py and models/mimo_mtp.py and SGLang models/qwen3_5_mtp.py;
no code of the library and no module of transformers takes part. One row, no cache: every step runs over all entries again.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PretrainedConfig


class Module:
    """One MTP module over its published tensors, in float64."""

    def __init__(self, tensors: Mapping[str, Tensor], config: PretrainedConfig, embedding: Tensor, lm_head: Tensor) -> None:
        self.mimo = "model.mtp_layers.0.input_proj.weight" in tensors
        prefix = "model.mtp_layers.0." if self.mimo else "mtp."
        self.weights = {name.removeprefix(prefix).removeprefix("layers.0."): value.double() for name, value in tensors.items()}
        self.config, self.embedding, self.lm_head = config, embedding.double(), lm_head.double()

    def chain(self, ids: Tensor, states: Tensor, steps: int) -> list[Tensor]:
        """Logits [T, V] of the entries made of ``ids`` [T + steps] and ``states`` [T, H], then of ``steps`` more [1, V], each
        made of the next id and what the entry before put out."""
        count = states.shape[0]
        given = [(ids[i], states[i].double()) for i in range(count)]
        out = []
        for step in range(steps + 1):
            hidden = self.forward(given)
            out.append((hidden if step == 0 else hidden[-1:]) @ self.lm_head.T)
            if step < steps:
                given.append((ids[count + step], hidden[-1]))
        return out

    def forward(self, entries: list[tuple[Tensor, Tensor]]) -> Tensor:
        """Entries (id [], state [H]) at positions 0, 1, … -> [T, H] behind the last norm."""
        embeds = self.embedding[torch.stack([token for token, _ in entries])]
        states = torch.stack([state for _, state in entries])
        if self.mimo:
            both = [self.norm("hidden_layernorm", states), self.norm("token_layernorm", embeds)]
        else:
            both = [self.norm("pre_fc_norm_embedding", embeds), self.norm("pre_fc_norm_hidden", states)]
        hidden = self.linear("input_proj" if self.mimo else "fc", torch.cat(both, -1))
        hidden = hidden + self.attention(self.norm("input_layernorm", hidden))
        hidden = hidden + self.feed_forward(self.norm("post_attention_layernorm", hidden))
        return self.norm("final_layernorm" if self.mimo else "norm", hidden)

    def norm(self, name: str, x: Tensor) -> Tensor:
        weight = self.weights[f"{name}.weight"]
        normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.config.rms_norm_eps)
        return normed * (weight if self.mimo else 1 + weight)

    def linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias"))

    def attention(self, x: Tensor) -> Tensor:
        """Grouped queries; Qwen's have norms, and a gate of as many features beside each head's query."""
        config, length = self.config, x.shape[0]
        size, groups = config.head_dim, config.num_attention_heads // config.num_key_value_heads
        query = self.linear("self_attn.q_proj", x).view(length, config.num_attention_heads, -1)
        key, value = (self.linear(f"self_attn.{name}_proj", x).view(length, -1, size) for name in "kv")
        gate = None
        if not self.mimo:
            query, gate = query[..., :size], query[..., size:]
            query, key = self.norm("self_attn.q_norm", query), self.norm("self_attn.k_norm", key)
        query, key = self.rotate(query), self.rotate(key)
        key, value = (part.repeat_interleave(groups, 1) for part in (key, value))  # [T, heads, D]
        scores = torch.einsum("qhd,khd->hqk", query, key) * size**-0.5
        past = torch.ones(length, length, dtype=torch.bool).tril()
        out = torch.einsum("hqk,khd->qhd", scores.masked_fill(~past, float("-inf")).softmax(-1), value)
        if gate is not None:
            out = out * gate.sigmoid()
        return self.linear("self_attn.o_proj", out.flatten(1))

    def rotate(self, x: Tensor) -> Tensor:
        """Rotary embedding of the first part of each head, halves against halves; x [T, heads, D] at 0 … T - 1."""
        rope = self.config.rope_parameters
        size = int(x.shape[-1] * rope.get("partial_rotary_factor", 1.0))
        frequencies = rope["rope_theta"] ** (-torch.arange(0, size, 2).double() / size)
        angles = (torch.arange(x.shape[0]).double()[:, None] * frequencies)[:, None]  # [T, 1, size / 2]
        first, second = x[..., : size // 2], x[..., size // 2 : size]
        turned = [first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()]
        return torch.cat([*turned, x[..., size:]], -1)

    def feed_forward(self, x: Tensor) -> Tensor:
        if "mlp.gate.weight" not in self.weights:
            return self.mlp("mlp", x)
        chances = self.linear("mlp.gate", x).softmax(-1)  # [T, E]
        best, chosen = chances.topk(self.config.num_experts_per_tok, -1)
        best = best / best.sum(-1, keepdim=True)
        rows = []
        for token, weights, experts in zip(x, best, chosen.tolist(), strict=True):
            rows.append(sum(w * self.mlp(f"mlp.experts.{e}", token) for w, e in zip(weights, experts, strict=True)))
        return torch.stack(rows) + self.linear("mlp.shared_expert_gate", x).sigmoid() * self.mlp("mlp.shared_expert", x)

    def mlp(self, name: str, x: Tensor) -> Tensor:
        return self.linear(f"{name}.down_proj", F.silu(self.linear(f"{name}.gate_proj", x)) * self.linear(f"{name}.up_proj", x))
