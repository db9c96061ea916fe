"""EAGLE-1 draft heads (Li et al. 2024, arXiv 2401.15077); EAGLE-2 is the same weights with a dynamic tree (2406.16858).

x = fc(cat[embedding of token i + 1, state of token i]) goes through one decoder layer without its input norm; there is no final
norm, and what comes out is read by the target's language-model head and fed to the next step. The state is the target's after
its final norm. Compared with SafeAILab/EAGLE eagle/model/cnets1.py (tests/test_draft_eagle.py).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from spec_compile.errors import DraftError
from spec_compile.hf_integration.heads.draft_head import DraftHead, causal_masks
from spec_compile.hf_integration.taps import NORMED


class EagleHead(DraftHead):
    """An EAGLE-1/2 head; parameters carry the published names."""

    kind = "eagle"

    def __init__(
        self,
        config: LlamaConfig,
        target: PreTrainedModel,
        fc_bias: bool = True,
        draft_ids: Tensor | None = None,
        owned: tuple[str, ...] = (),
    ) -> None:
        """Build a head with PyTorch's default weights; make it inside ``like_target``.

        Raises:
            DraftError: the head does not fit the target.
        """
        text = target.config.get_text_config(decoder=True)
        hidden = config.hidden_size
        if hidden != text.hidden_size:
            raise DraftError(f"the head reads states of {hidden} features, the target's have {text.hidden_size}.")
        super().__init__(config, target, (NORMED,), hidden, draft_ids, owned)
        self.fc = nn.Linear(2 * hidden, hidden, bias=fc_bias)
        self.layers = nn.ModuleList([LlamaDecoderLayer(config, layer_idx) for layer_idx in range(config.num_hidden_layers)])
        self.layers[0].input_layernorm = nn.Identity()

    def project(self, states: Tensor) -> Tensor:
        return states

    def forward(
        self,
        input_ids: Tensor,
        hidden_states: Tensor,
        position_ids: Tensor,
        cache: Cache | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """As ``Eagle3Head.forward``: [B, N] ids and positions, [B, N, H] states -> [B, N, H]."""
        embeds = self.embed(input_ids).to(hidden_states.dtype)
        hidden = self.fc(torch.cat([embeds, hidden_states], -1))
        masks = causal_masks(self, embeds, attention_mask, cache, position_ids)
        rotary = self.rotary_emb(hidden, position_ids)
        for layer, mask in zip(self.layers, masks, strict=True):
            hidden = layer(hidden, mask, position_ids, cache, position_embeddings=rotary)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        return self.lm_head(hidden)

    def feedback(self, hidden: Tensor) -> Tensor:
        return hidden
