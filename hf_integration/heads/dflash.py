"""DFlash draft heads (Chen et al. 2026, arXiv 2602.06036): a block of tokens in one forward.

The target's states of every committed token become keys and values of each layer (``context_kv``): that is all the cache holds.
A block, the root and masks behind it, attends to that context and to all of itself, and its slots are the next tokens. What a
block wrote behind the context is never kept. Compared in tests/test_draft_dflash.py with z-lab/dflash dflash/model.py,
speculators src/speculators/models/dflash and transformers' DFlash assistant.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Qwen3Config
from transformers.cache_utils import Cache
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer, Qwen3RMSNorm

from spec_compile.errors import DraftError
from spec_compile.hf_integration.caches import cache_argument
from spec_compile.hf_integration.heads.draft_head import DraftHead, layer_sizes_like, like_target, randomise
from spec_compile.hf_integration.taps import Tap


class DFlashHead(DraftHead):
    """A DFlash head; parameters carry the published names.

    Entry i of its cache is made of the target's state of token i alone, at rotary position i.

    Attributes:
        block_size: slots of a block, the root's included.
        mask_token_id: the token of every slot behind the root.
        first_slot: the first slot whose logits are a draft: 1, or 0 for heads that sample from the root's slot too.
    """

    kind = "dflash"

    def __init__(
        self,
        config: Qwen3Config,
        target: PreTrainedModel,
        taps: tuple[Tap, ...],
        block_size: int,
        mask_token_id: int,
        draft_ids: Tensor | None = None,
        owned: tuple[str, ...] = (),
        first_slot: int = 1,
    ) -> None:
        """Build a head with PyTorch's default weights; make it inside ``like_target``.

        Raises:
            DraftError: the head does not fit the target, or has layers with a sliding window.
        """
        text = target.config.get_text_config(decoder=True)
        if config.model_type != "qwen3":
            raise DraftError("a DFlash head without norms on its queries and keys, which no known head is.")
        if "sliding_attention" in config.layer_types:
            raise DraftError(
                "a DFlash head with sliding-window layers; published definitions disagree on a block's window, and only full "
                "attention is read."
            )
        super().__init__(config, target, taps, len(taps) * text.hidden_size, draft_ids, owned)
        rows = self.embed_tokens.weight.shape[0]
        if not 0 <= mask_token_id < rows:
            raise DraftError(f"the head's mask token {mask_token_id} is not among the {rows} embedded tokens.")
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.block_size, self.mask_token_id, self.first_slot = block_size, mask_token_id, first_slot
        self.fc = nn.Linear(self.target_width, hidden, bias=False)
        self.hidden_norm = Qwen3RMSNorm(hidden, eps)
        self.layers = nn.ModuleList([Qwen3DecoderLayer(config, layer_idx) for layer_idx in range(config.num_hidden_layers)])
        self.layer_cache = cache_argument(self.layers[0].forward)
        self.norm = Qwen3RMSNorm(hidden, eps)

    @property
    def num_drafts(self) -> int:
        """Tokens drafted by one block."""
        return self.block_size - self.first_slot

    def project(self, states: Tensor) -> Tensor:
        return self.hidden_norm(self.fc(states))

    def context_kv(self, context: Tensor, position_ids: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of committed tokens, one pair a layer, rotated and ready for the cache.

        Args:
            context: [B, N, H] from ``project``.
            position_ids: int64 [B, N].

        Returns:
            keys and values [B, N, Hkv, D] of every layer.
        """
        batch, num_tokens, _ = context.shape
        cos, sin = self.rotary_emb(context, position_ids)
        pairs = []
        for layer in self.layers:
            attention = layer.self_attn
            keys = attention.k_norm(attention.k_proj(context).view(batch, num_tokens, -1, attention.head_dim))
            keys, _ = apply_rotary_pos_emb(keys, keys, cos, sin, unsqueeze_dim=2)
            pairs.append((keys, attention.v_proj(context).view(batch, num_tokens, -1, attention.head_dim)))
        return pairs

    def block(self, root: Tensor) -> Tensor:
        """root int64 [B] -> the block's tokens int64 [B, block_size]."""
        masks = root.new_full((root.shape[0], self.block_size - 1), self.mask_token_id)
        return torch.cat([root[:, None], masks], 1)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        cache: Cache | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """One block of N slots of B rows behind a cached context.

        Every slot sees the whole context and the whole block. Outside capture no mask says so; a captured forward must be run
        with a tree mask whose bits are all set, because the attention op without a mask is causal.

        Args:
            input_ids: int64 [B, N] from ``block``.
            position_ids: int64 [B, N], cache_len and on.
            cache: holds ``context_kv``; the block's own keys and values are appended and must be dropped afterwards.
            attention_mask: a mask [B, 1, N, S] that is used as it is, e.g. for ragged rows.

        Returns:
            [B, N, H], for ``logits``.
        """
        hidden = self.embed_tokens(input_ids)
        shared = {self.layer_cache: cache, "position_embeddings": self.rotary_emb(hidden, position_ids)}
        for layer in self.layers:
            hidden = layer(hidden, attention_mask, position_ids, is_causal=False, **shared)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        return self.lm_head(self.norm(hidden))


def default_dflash_taps(num_target_layers: int, num_layers: int) -> tuple[int, ...]:
    """The states behind layers spread evenly from 1 to L - 3, as many as the head has layers.

    Source: z-lab/dflash dflash/model.py build_target_layer_ids. Shallow targets give no negative ids here.
    """
    if num_layers == 1:
        return (num_target_layers // 2 + 1,)
    step = (num_target_layers - 4) / (num_layers - 1)
    return tuple(min(max(round(1 + i * step), 0), num_target_layers - 1) + 1 for i in range(num_layers))


def random_dflash_head(
    target: PreTrainedModel,
    block_size: int = 8,
    seed: int = 0,
    *,
    num_hidden_layers: int = 2,
    taps: tuple[Tap, ...] | None = None,
    mask_token_id: int | None = None,
) -> DFlashHead:
    """An untrained head of the target's sizes, for tests and for speed work with simulated acceptance."""
    text = target.config.get_text_config(decoder=True)
    sizes = layer_sizes_like(target) | {"num_hidden_layers": num_hidden_layers}
    wanted = default_dflash_taps(text.num_hidden_layers, num_hidden_layers) if taps is None else taps
    mask = text.vocab_size - 1 if mask_token_id is None else mask_token_id
    with like_target(target):
        head = DFlashHead(Qwen3Config(**sizes), target, wanted, block_size, mask)
    randomise(head, seed)
    return head.eval()
