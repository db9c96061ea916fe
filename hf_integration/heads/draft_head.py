"""The interface of draft heads: small networks that draft from a target's hidden states (EAGLE, EAGLE-3, …).

A head is captured like a causal LM: its attention goes through transformers' AttentionInterface with one ``layer_idx`` a
layer, its projections are plain linears, its forward reads nothing on the host. What a format does not ship (embeddings,
language-model head) is the target's own module, shared and never copied.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PretrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from spec_compile.errors import DraftError
from spec_compile.hf_integration.rope import head_rotary
from spec_compile.hf_integration.taps import NORMED, Tap


class DraftHead(PreTrainedModel):
    """Base class of draft heads.

    Entry i of an EAGLE head's cache is made of the embedding of token i + 1 and the target's state of token i, at rotary
    position i.

    Attributes:
        kind: ``"eagle3"``, ``"eagle"``, ``"dflash"``, ``"mtp"``
        taps: the target's hidden states it reads.
        target_width: features of the concatenated taps, ``len(taps) * Ht``.
        draft_ids: int64 [Vd], the target's token id of every draft id; None when both vocabularies are the same.
        owned: which of ``"embed_tokens"`` and ``"lm_head"`` are the head's own; the others are the target's modules.
        layer_cache: the name by which its layers take their cache, where it is passed by name.
    """

    main_input_name = "input_ids"
    _supports_sdpa = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    kind: str
    taps: tuple[Tap, ...]
    target_width: int
    draft_ids: Tensor | None
    owned: tuple[str, ...]
    layer_cache: str

    def __init__(
        self,
        config: PretrainedConfig,
        target: PreTrainedModel,
        taps: tuple[Tap, ...],
        target_width: int,
        draft_ids: Tensor | None,
        owned: tuple[str, ...],
        rotary: nn.Module | None = None,
    ) -> None:
        """Set what all heads have: embeddings, language-model head, rotary embedding, draft vocabulary.

        Args:
            rotary: the rotary embedding; None for Llama's, of ``config``.

        Raises:
            DraftError: a tap, a width or a vocabulary that does not fit the target, or a rotary embedding that cannot be built.
        """
        super().__init__(config)
        check_fits(config, target, taps, draft_ids, owned)
        self.taps, self.target_width, self.owned = tuple(taps), target_width, owned
        self.register_buffer("draft_ids", draft_ids, persistent=False)
        hidden = config.hidden_size
        embedding, lm_head = target.get_input_embeddings(), target.get_output_embeddings()
        if "embed_tokens" in owned:
            embedding = nn.Embedding(config.vocab_size, hidden)
        if "lm_head" in owned:
            lm_head = nn.Linear(hidden, config.vocab_size if draft_ids is None else draft_ids.shape[0], bias=False)
        self.embed_tokens, self.lm_head = embedding, lm_head
        self.rotary_emb = head_rotary(config) if rotary is None else rotary

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def embed(self, input_ids: Tensor) -> Tensor:
        """Rows of the embedding matrix [..., H]. Never scaled: drafts are trained on the bare rows, also of a Gemma."""
        return F.embedding(input_ids, self.embed_tokens.weight)

    def own_tensors(self) -> dict[str, Tensor]:
        """Tensors that are the head's own, by name: what a checkpoint must hold. Parameters, and routers' biases, which
        transformers keeps as buffers."""
        shared = tuple(f"{name}." for name in ("embed_tokens", "lm_head") if name not in self.owned)
        return {name: value for name, value in self.state_dict(keep_vars=True).items() if not name.startswith(shared)}

    def project(self, states: Tensor) -> Tensor:
        """The target's states [..., len(taps) * Ht] -> the ``hidden_states`` [..., H] of a forward."""
        raise NotImplementedError

    def logits(self, hidden: Tensor) -> Tensor:
        """A forward's output [..., H] -> logits [..., Vd] over the draft vocabulary."""
        raise NotImplementedError

    def feedback(self, hidden: Tensor) -> Tensor:
        """A forward's output [..., H] -> the ``hidden_states`` [..., H] of the next draft step."""
        raise NotImplementedError


def check_fits(
    config: PretrainedConfig, target: PreTrainedModel, taps: tuple[Tap, ...], draft_ids: Tensor | None, owned: tuple[str, ...]
) -> None:
    """Compare a head's sizes with its target's.

    Raises:
        DraftError: names the sizes that differ.
    """
    text = target.config.get_text_config(decoder=True)
    wrong = [tap for tap in taps if tap != NORMED and not 0 <= tap <= text.num_hidden_layers]
    if wrong or not taps:
        raise DraftError(
            f"the draft head reads the target's hidden states {list(taps)}, but the target has {text.num_hidden_layers} layers "
            f"(states 0 to {text.num_hidden_layers}). Was it trained for another target?"
        )
    if draft_ids is not None and (int(draft_ids.min()) < 0 or int(draft_ids.max()) >= text.vocab_size):
        raise DraftError(
            f"the draft vocabulary maps to target ids {int(draft_ids.min())} to {int(draft_ids.max())}, but the target's "
            f"vocabulary has {text.vocab_size}. Was the head trained for another target?"
        )
    if draft_ids is not None and "lm_head" not in owned:
        raise DraftError(f"the head has a draft vocabulary of {draft_ids.shape[0]} tokens but no lm_head of its own.")
    if draft_ids is None and config.vocab_size != text.vocab_size:
        raise DraftError(
            f"the head's vocabulary has {config.vocab_size} tokens, the target's {text.vocab_size}, and no draft vocabulary "
            "maps one to the other. Was it trained for another target?"
        )
    missing = [name for name in ("embed_tokens", "lm_head") if name not in owned]
    if missing and config.hidden_size != text.hidden_size:
        raise DraftError(
            f"the head is {config.hidden_size} wide and has no {' and '.join(missing)} of its own, and the target's are "
            f"{text.hidden_size} wide. Was it trained for another target?"
        )


@contextlib.contextmanager
def like_target(target: PreTrainedModel) -> Iterator[None]:
    """Make new parameters in the target's dtype on its device. Float32 buffers (rotary frequencies) keep their precision."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(target.dtype)
    try:
        with torch.device(target.get_input_embeddings().weight.device):
            yield
    finally:
        torch.set_default_dtype(before)


def layer_sizes_like(target: PreTrainedModel) -> dict[str, object]:
    """Config arguments of decoder layers of the target's sizes, with plain rotary embeddings of the target's base."""
    text = target.config.get_text_config(decoder=True)
    heads = text.num_attention_heads
    theta = (getattr(text, "rope_parameters", None) or {}).get("rope_theta", 10000.0)
    return {
        "vocab_size": text.vocab_size,
        "hidden_size": text.hidden_size,
        "intermediate_size": getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
        "num_attention_heads": heads,
        "num_key_value_heads": getattr(text, "num_key_value_heads", None) or heads,
        "head_dim": getattr(text, "head_dim", None) or text.hidden_size // heads,
        "max_position_embeddings": text.max_position_embeddings,
        "rms_norm_eps": getattr(text, "rms_norm_eps", 1e-6),
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        "pad_token_id": None,
    }


def causal_masks(
    head: DraftHead, embeds: Tensor, attention_mask: Tensor | None, cache: Cache | None, position_ids: Tensor
) -> list[Tensor | None]:
    """The mask of every layer, made by transformers; None under capture, where the attention op knows its windows."""
    config = head.config
    layer_types = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    make = {"full_attention": create_causal_mask, "sliding_attention": create_sliding_window_causal_mask}
    masks = {kind: make[kind](config, embeds, attention_mask, cache, position_ids) for kind in set(layer_types)}
    return [masks[kind] for kind in layer_types[: config.num_hidden_layers]]


def randomise(head: DraftHead, seed: int) -> None:
    """Random weights for tests and speed work: linears keep the scale of their input, norms vary around one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in head.own_tensors().items():
            if name.endswith("norm.weight") or ".fc_norm." in f".{name}":
                drawn = 0.5 + torch.rand(value.shape, generator=generator)
            elif value.dim() == 1:
                drawn = 0.1 * torch.randn(value.shape, generator=generator)
            else:
                drawn = torch.randn(value.shape, generator=generator) * value.shape[-1] ** -0.5
            value.copy_(drawn)
