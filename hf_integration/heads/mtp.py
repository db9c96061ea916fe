"""MTP draft heads: the multi-token-prediction module that many models are trained with and ship (DeepSeek-V3, 2412.19437, 2.2).

x = eh_proj(cat[enorm(embedding of token i + 1), hnorm(state of token i)]) goes through one decoder layer of the target's own
kind, then a norm; what comes out is read by the language-model head and fed to the next step. The state is the target's after
its final norm. MiMo concatenates the other way round. One trained layer drafts every step, each from the one before; of
several (``MtpLayers``) each drafts one.

Conventions: transformers modeling_layers.py (MtpLayer, MtpModel), vLLM models/qwen3_next_mtp.py and models/mimo_mtp.py, SGLang
models/deepseek_nextn.py and models/qwen3_5_mtp.py. Compared in tests/test_draft_mtp.py.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache

from spec_compile.errors import DraftError
from spec_compile.hf_integration.caches import cache_argument
from spec_compile.hf_integration.heads.draft_head import DraftHead, causal_masks, like_target, randomise
from spec_compile.hf_integration.taps import NORMED, decoder_layers


class MtpHead(DraftHead):
    """An MTP head around one decoder layer of the target's own class; parameters carry DeepSeek's names, the layer's are
    ``layers.0``.

    Norms are of the target's class too: Qwen3-Next's and Qwen3.5's multiply by 1 + weight.

    Attributes:
        hidden_first: the projection reads cat[state, embedding] instead of cat[embedding, state].
    """

    kind = "mtp"

    def __init__(
        self, target: PreTrainedModel, *, sparse: bool, hidden_first: bool = False, owned: tuple[str, ...] = ()
    ) -> None:
        """Build a head without weights; make it inside ``like_target`` and fill it.

        Args:
            sparse: its layer has experts, if the target's family has layers with and without.
            owned: see ``DraftHead``.

        Raises:
            DraftError: the target's layers are of a kind that no MTP head has.
        """
        layers = decoder_layers(target)
        rotary = getattr(target.get_decoder(), "rotary_emb", None)
        config = mtp_config(target, sparse)
        per_layer_type = any(isinstance(value, dict) for value in (getattr(config, "rope_parameters", None) or {}).values())
        if rotary is None or per_layer_type or not hasattr(layers[-1], "input_layernorm"):
            raise DraftError(
                f"{type(target).__name__}: an MTP head has one decoder layer of the target's kind, and these have no rotary "
                "embedding that all layers share, or no input_layernorm. Draft with an EAGLE-3 head, a causal LM or 'ngram'."
            )
        hidden, eps = config.hidden_size, config.rms_norm_eps
        super().__init__(config, target, (NORMED,), hidden, None, owned, rotary)
        layer, norm = type(layers[-1]), type(layers[-1].input_layernorm)
        self.hidden_first = hidden_first
        self.enorm, self.hnorm, self.norm = (norm(hidden, eps=eps) for _ in range(3))
        self.eh_proj = nn.Linear(2 * hidden, hidden, bias=False)
        self.layers = nn.ModuleList([layer(config, 0)])
        self.layer_cache = cache_argument(self.layers[0].forward)
        in_float32 = {name for other in layers for name, value in other.state_dict().items() if value.dtype == torch.float32}
        for name, value in self.layers[0].state_dict(keep_vars=True).items():
            if name in in_float32:  # routers' biases, whatever the model's type
                value.data = value.data.float()

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return True  # the layer's module can; transformers looks for attention in this one

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return True

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
        """As ``Eagle3Head.forward``: [B, N] ids and positions, [B, N, H] states -> [B, N, H], behind the last norm."""
        embeds = self.embed(input_ids).to(hidden_states.dtype)
        pair = [self.enorm(embeds), self.hnorm(hidden_states)]
        hidden = self.eh_proj(torch.cat(pair[::-1] if self.hidden_first else pair, -1))
        (mask,) = causal_masks(self, embeds, attention_mask, cache, position_ids)
        # Qwen3.5's rotary embedding takes three streams of positions; of text they are the same.
        rotary_ids = position_ids.expand(3, -1, -1) if hasattr(self.rotary_emb, "mrope_section") else position_ids
        hidden = self.layers[0](
            hidden,
            attention_mask=mask,
            position_ids=position_ids,
            position_embeddings=self.rotary_emb(hidden, rotary_ids),
            **{self.layer_cache: cache},
        )
        return self.norm(hidden)

    def logits(self, hidden: Tensor) -> Tensor:
        return self.lm_head(hidden)

    def feedback(self, hidden: Tensor) -> Tensor:
        return hidden


class MtpLayers(nn.Module):
    """MTP heads that were trained together and draft in turn: step j of a round is head j's, see ``drafts.mtp_layers``.

    Attributes:
        heads: one a step, two at least. A single head, passed as ``draft=`` itself, drafts every step of a round.

    Raises:
        DraftError: fewer than two heads.
    """

    def __init__(self, heads: Sequence[MtpHead]) -> None:
        super().__init__()
        if len(heads) < 2:
            raise DraftError(
                f"MtpLayers of {len(heads)} heads: heads in turn are two or more; pass a single one as draft= itself."
            )
        self.heads = nn.ModuleList(heads)


def mtp_config(target: PreTrainedModel, sparse: bool) -> PretrainedConfig:
    """The target's config cut down to one layer with full attention, with or without experts."""
    config = copy.deepcopy(target.config.get_text_config(decoder=True))
    config.num_hidden_layers = 1
    one_layer = {
        "layer_types": ["full_attention"],  # also where the target alternates with linear attention
        "mlp_layer_types": ["sparse" if sparse else "dense"],
        "first_k_dense_replace": 0 if sparse else 1,
        "mlp_only_layers": [] if sparse else [0],
        "decoder_sparse_step": 1,
    }
    for name, value in one_layer.items():
        if getattr(config, name, None) is not None:
            setattr(config, name, value)
    return config


def random_mtp_head(
    target: PreTrainedModel, seed: int = 0, *, hidden_first: bool = False, own_lm_head: bool = False
) -> MtpHead:
    """An untrained head, for tests and for speed work with simulated acceptance; it has experts if the target's last layer has.

    Args:
        own_lm_head: do not share the target's language-model head.
    """
    sparse = hasattr(getattr(decoder_layers(target)[-1], "mlp", None), "experts")
    with like_target(target):
        head = MtpHead(target, sparse=sparse, hidden_first=hidden_first, owned=("lm_head",) if own_lm_head else ())
    randomise(head, seed)
    return head.eval()


def random_mtp_layers(target: PreTrainedModel, num_layers: int, seed: int = 0, **options: bool) -> MtpLayers:
    """``num_layers`` untrained heads that draft in turn; options as for ``random_mtp_head``."""
    return MtpLayers([random_mtp_head(target, seed + i, **options) for i in range(num_layers)])
