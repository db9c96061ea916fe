"""EAGLE-3 draft heads (Li et al. 2025, arXiv 2503.01840), with every variant that published checkpoints use.

One wide layer reads the token's embedding next to three of the target's hidden states (projected by ``fc``); more layers, if
any, are ordinary. Compared in tests/test_draft_eagle3.py with SafeAILab/EAGLE eagle/model/cnets.py, sgl-project/SpecForge
specforge/modeling/draft/llama3_eagle.py and vllm-project/speculators src/speculators/models/eagle3.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, PretrainedConfig, PreTrainedModel, Qwen3Config
from transformers.cache_utils import Cache
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaDecoderLayer, LlamaMLP, LlamaRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, Qwen3DecoderLayer, Qwen3MLP

from spec_compile.errors import DraftError
from spec_compile.hf_integration.caches import cache_argument
from spec_compile.hf_integration.heads.draft_head import DraftHead, causal_masks, layer_sizes_like, like_target, randomise


@dataclass(frozen=True)
class Eagle3Options:
    """What changes the mathematics of a head besides its config. No checkpoint's weights show these; its config must.

    Attributes:
        norm_before_residual: the first layer's residual is hidden_norm(h) instead of h.
        norm_before_fc: one RMSNorm over the concatenated states before ``fc`` (gpt-oss heads).
        fc_norm: one RMSNorm for each of the concatenated states before ``fc`` ("EAGLE-3.1").
        norm_output: the next draft step is fed with norm(h) instead of h.
        fc_bias: ``fc`` has a bias.
    """

    norm_before_residual: bool = False
    norm_before_fc: bool = False
    fc_norm: bool = False
    norm_output: bool = False
    fc_bias: bool = False

    def __post_init__(self) -> None:
        if self.norm_before_fc and self.fc_norm:
            raise DraftError("norm_before_fc and fc_norm exclude each other: one norms the concatenation, the other its parts.")


class Eagle3FirstLayer(nn.Module):
    """A decoder layer whose attention reads cat[norm(embedding), norm(h)], 2H wide."""

    def __init__(self, config: PretrainedConfig, norm_before_residual: bool) -> None:
        super().__init__()
        attention, mlp = {"llama": (LlamaAttention, LlamaMLP), "qwen3": (Qwen3Attention, Qwen3MLP)}[config.model_type]
        self.self_attn = attention(config, layer_idx=0)
        for name in ("q_proj", "k_proj", "v_proj"):
            linear = getattr(self.self_attn, name)
            wide = nn.Linear(2 * config.hidden_size, linear.out_features, bias=linear.bias is not None)
            setattr(self.self_attn, name, wide)
        self.mlp = mlp(config)
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hidden_norm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.norm_before_residual = norm_before_residual

    def forward(self, hidden: Tensor, embeds: Tensor, **attention_args) -> Tensor:
        """hidden, embeds [B, N, H] -> [B, N, H]."""
        normed = self.hidden_norm(hidden)
        residual = normed if self.norm_before_residual else hidden
        attended, _ = self.self_attn(torch.cat([self.input_layernorm(embeds), normed], -1), **attention_args)
        hidden = residual + attended
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class Eagle3Head(DraftHead):
    """An EAGLE-3 head; parameters carry the published names, the first layer's are ``layers.0``."""

    kind = "eagle3"

    def __init__(
        self,
        config: LlamaConfig | Qwen3Config,
        target: PreTrainedModel,
        taps: tuple[int, ...],
        options: Eagle3Options,
        draft_ids: Tensor | None = None,
        owned: tuple[str, ...] = ("lm_head",),
        target_hidden_size: int | None = None,
    ) -> None:
        """Build a head with PyTorch's default weights; make it inside ``like_target``.

        Args:
            config: one decoder layer's sizes; ``model_type`` llama, or qwen3 for norms on queries and keys.
            taps, draft_ids, owned: see ``DraftHead``.
            target_hidden_size: width of one tapped state; the target's hidden size unless given.

        Raises:
            DraftError: the head does not fit the target, or its config is of another model type.
        """
        if config.model_type not in ("llama", "qwen3"):
            raise DraftError(f"an EAGLE-3 head with layers of model_type {config.model_type!r}; llama and qwen3 are known.")
        text = target.config.get_text_config(decoder=True)
        width = target_hidden_size or text.hidden_size
        if width != text.hidden_size:
            raise DraftError(f"the head reads states of {width} features, the target's have {text.hidden_size}.")
        super().__init__(config, target, taps, len(taps) * width, draft_ids, owned)
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.options = options
        self.fc = nn.Linear(self.target_width, hidden, bias=options.fc_bias)
        self.input_norm = LlamaRMSNorm(self.target_width, eps) if options.norm_before_fc else None
        self.fc_norm = nn.ModuleList([LlamaRMSNorm(width, eps) for _ in taps]) if options.fc_norm else None
        layer = {"llama": LlamaDecoderLayer, "qwen3": Qwen3DecoderLayer}[config.model_type]
        others = [layer(config, layer_idx) for layer_idx in range(1, config.num_hidden_layers)]
        self.layers = nn.ModuleList([Eagle3FirstLayer(config, options.norm_before_residual), *others])
        self.layer_cache = cache_argument(self.layers[0].self_attn.forward)
        self.norm = LlamaRMSNorm(hidden, eps)

    def project(self, states: Tensor) -> Tensor:
        if self.input_norm is not None:
            states = self.input_norm(states)
        if self.fc_norm is not None:
            chunks = states.chunk(len(self.fc_norm), dim=-1)
            states = torch.cat([norm(chunk) for norm, chunk in zip(self.fc_norm, chunks, strict=True)], -1)
        return self.fc(states)

    def forward(
        self,
        input_ids: Tensor,
        hidden_states: Tensor,
        position_ids: Tensor,
        cache: Cache | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """One pass over N slots of B rows.

        Args:
            input_ids: int64 [B, N] target ids; slot i holds token i + 1.
            hidden_states: [B, N, H] from ``project`` or ``feedback``; slot i holds the state of token i.
            position_ids: int64 [B, N] rotary positions.
            attention_mask: as in transformers: None for causal, or a mask [B, 1, N, S] that is used as it is.

        Returns:
            [B, N, H], for ``logits`` and ``feedback``.
        """
        embeds = self.embed(input_ids).to(hidden_states.dtype)
        masks = causal_masks(self, embeds, attention_mask, cache, position_ids)
        rotary = self.rotary_emb(hidden_states, position_ids)
        shared = {self.layer_cache: cache, "position_embeddings": rotary}
        hidden = self.layers[0](hidden_states, embeds, attention_mask=masks[0], **shared)
        for layer, mask in zip(self.layers[1:], masks[1:], strict=True):
            hidden = layer(hidden, attention_mask=mask, position_ids=position_ids, **shared)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        return self.lm_head(self.norm(hidden))

    def feedback(self, hidden: Tensor) -> Tensor:
        return self.norm(hidden) if self.options.norm_output else hidden


def default_taps(num_layers: int) -> tuple[int, int, int]:
    """States 2, L // 2 and L - 3: what SafeAILab, SpecForge, SGLang and vLLM read when a config says nothing.

    Source: SafeAILab/EAGLE eagle/model/modeling_llama_kv.py. Below six layers they are cut to what the target has.
    """
    wanted = (2, num_layers // 2, num_layers - 3)
    return tuple(min(max(tap, 0), num_layers) for tap in wanted)


def random_eagle3_head(
    target: PreTrainedModel,
    draft_vocab_size: int | None = None,
    seed: int = 0,
    *,
    num_hidden_layers: int = 1,
    qk_norm: bool = False,
    taps: tuple[int, ...] | None = None,
    draft_ids: Tensor | None = None,
    own_embedding: bool = False,
    attention_bias: bool = False,
    rope_parameters: dict[str, object] | None = None,
    sliding_window: int | None = None,
    **options: bool,
) -> Eagle3Head:
    """An untrained head of the target's sizes, for tests and for speed work with simulated acceptance.

    Args:
        draft_vocab_size: tokens of the draft vocabulary, drawn by ``seed`` and ascending; None: the target's vocabulary and
            its language-model head.
        qk_norm: Qwen3's norms on queries and keys.
        draft_ids: int64 [Vd], the draft vocabulary itself instead of a drawn one.
        rope_parameters: as in transformers' configs; unless given, plain rotary embeddings of the target's base.
        sliding_window: of every layer, in tokens; makes it a head with Qwen3's layers, the only ones known to have windows.
        options: fields of ``Eagle3Options``.
    """
    text = target.config.get_text_config(decoder=True)
    sizes = layer_sizes_like(target) | {"num_hidden_layers": num_hidden_layers, "attention_bias": attention_bias}
    if rope_parameters is not None:
        sizes["rope_parameters"] = rope_parameters
    if sliding_window is not None:
        qk_norm = True
        sizes |= {"use_sliding_window": True, "sliding_window": sliding_window}
        sizes["layer_types"] = ["sliding_attention"] * num_hidden_layers
    if draft_ids is None and draft_vocab_size is not None:
        drawn = torch.randperm(text.vocab_size, generator=torch.Generator().manual_seed(seed))
        draft_ids = drawn[:draft_vocab_size].sort().values
    device = target.get_input_embeddings().weight.device
    with like_target(target):
        head = Eagle3Head(
            (Qwen3Config if qk_norm else LlamaConfig)(**sizes),
            target,
            default_taps(text.num_hidden_layers) if taps is None else taps,
            Eagle3Options(**options),
            None if draft_ids is None else draft_ids.to(device),
            (*(["embed_tokens"] if own_embedding else []), *([] if draft_ids is None else ["lm_head"])),
        )
    randomise(head, seed)
    return head.eval()
