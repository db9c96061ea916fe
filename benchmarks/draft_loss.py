"""The training objective of an EAGLE-3 head: training-time test (Li et al., arXiv 2503.01840) against the target's
distribution.

While drafting, a head is fed its own states, so it is trained on them: step 0 reads true target states at every position at
once, step j reads what step j - 1 gave at the same anchor. An anchor i stands for a round whose root is token i + 1:

    step j at anchor i: input token i + 1 + j, position i + j, state of step j - 1 at i  ->  foresees token i + 2 + j
    keys: those of step 0 up to i (true states), and of steps 1 … j at i itself (a diagonal each)

which is what drafting from a cache of i + 1 true entries computes (tests/test_train_draft.py compares the two). The head's own
forward runs here: its cache is replaced by one that remembers steps, its attention by one that knows the diagonals.

Shapes: B packed rows, S tokens, T steps, H/Ht draft and target hidden, V/Vd target and draft vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from draft_data import Packed
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from spec_compile.hf_integration.heads.draft_head import DraftHead
from spec_compile.hf_integration.taps import Tap, tapped

ATTENTION = "training_time_test"


def own_document(packed: Packed) -> Tensor:
    """bool [B, 1, S, S]: which token sees which: itself and what stands before it in the same document."""
    same = packed.document[:, :, None] == packed.document[:, None, :]
    return same.tril()[:, None]


def shifted(x: Tensor, by: int) -> Tensor:
    """``x`` [B, S, …] moved ``by`` places to the front along S, zeros behind."""
    return torch.cat([x[:, by:], torch.zeros_like(x[:, :by])], 1)


# ----------------------------------------------------------------------------------------------------------------------
# The teacher


@torch.no_grad()
def target_states(target: PreTrainedModel, taps: tuple[Tap, ...], packed: Packed) -> tuple[Tensor, Tensor]:
    """Tapped states [B, S, len(taps) * Ht] and the state that the language-model head reads, [B, S, Ht] (after the norm)."""
    visible = own_document(packed)
    bias = torch.zeros_like(visible, dtype=target.dtype).masked_fill_(~visible, torch.finfo(target.dtype).min)
    with tapped(target, taps) as states:
        last = target.base_model(
            input_ids=packed.ids, attention_mask=bias, position_ids=packed.position, use_cache=False
        ).last_hidden_state
    return torch.cat([states[tap] for tap in taps], -1), last


@torch.no_grad()
def log_normaliser(target: PreTrainedModel, last: Tensor, rows: int = 4) -> Tensor:
    """log of the sum of the target's exponentiated logits over the whole vocabulary, float32 [B, S]."""
    head = target.get_output_embeddings()
    return torch.cat([head(chunk).float().logsumexp(-1) for chunk in last.split(rows)])


def teacher_probs(head_rows: Tensor, last: Tensor, normaliser: Tensor) -> Tensor:
    """The target's probabilities of the draft vocabulary, [B, S, Vd]; what they lack of 1 lies outside that vocabulary.

    Args:
        head_rows: [Vd, Ht], the rows of the target's lm_head.
    """
    logits = nn.functional.linear(last, head_rows)
    return (logits.float() - normaliser[..., None]).exp().to(last.dtype)


# ----------------------------------------------------------------------------------------------------------------------
# Training-time test


class StepCache:
    """Stands for a key/value cache; ``update`` returns all steps' keys and values, step by step: [B, Hkv, (j + 1) * S, D]."""

    def __init__(self) -> None:
        self._keys: dict[int, list[Tensor]] = {}
        self._values: dict[int, list[Tensor]] = {}

    def update(self, key: Tensor, value: Tensor, layer: int, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        self._keys.setdefault(layer, []).append(key.to(value.dtype))  # autocast leaves keys wider
        self._values.setdefault(layer, []).append(value)
        return torch.cat(self._keys[layer], 2), torch.cat(self._values[layer], 2)


def step_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, scaling: float, **_: object
) -> tuple[Tensor, None]:
    """Attention over the first S keys as the mask says and over the diagonals of the further blocks of S keys.

    Args:
        query: [B, Hq, S, D].
        key, value: [B, Hkv, (j + 1) * S, D].
        attention_mask: bool [B, 1, S, S].

    Returns:
        [B, S, Hq, D], None.
    """
    length = query.shape[2]
    q = query.to(value.dtype).unflatten(1, (key.shape[1], -1))  # [B, Hkv, G, S, D]
    keys, values = key.unflatten(2, (-1, length)), value.unflatten(2, (-1, length))  # [B, Hkv, j + 1, S, D]
    true = torch.einsum("bhgsd,bhtd->bhgst", q, keys[:, :, 0]).float() * scaling
    true = true.masked_fill(~attention_mask[:, :, None], float("-inf"))
    own = (q[:, :, None] * keys[:, :, 1:, None]).float().sum(-1) * scaling  # [B, Hkv, j, G, S]
    weights = torch.cat([true, own.permute(0, 1, 3, 4, 2)], -1).softmax(-1).to(value.dtype)  # [B, Hkv, G, S, S + j]
    out = torch.einsum("bhgst,bhtd->bhgsd", weights[..., :length], values[:, :, 0])
    diagonal = weights[..., length:].permute(0, 1, 4, 2, 3)[..., None]  # [B, Hkv, j, G, S, 1]
    out = out + (diagonal * values[:, :, 1:, None]).sum(2)
    return out.flatten(1, 2).transpose(1, 2).contiguous(), None


@contextlib.contextmanager
def training_attention(head: DraftHead) -> Iterator[None]:
    """Let ``head`` attend as training-time test needs it, within the block."""
    ALL_ATTENTION_FUNCTIONS.register(ATTENTION, step_attention)
    before = head.config._attn_implementation
    head.config._attn_implementation = ATTENTION
    try:
        yield
    finally:
        head.config._attn_implementation = before


def step_logits(head: DraftHead, packed: Packed, states: Tensor, steps: int) -> Iterator[Tensor]:
    """Yield each step's logits [B, S, Vd] at every anchor, within ``training_attention``.

    Args:
        states: [B, S, len(taps) * Ht].
    """
    visible, cache = own_document(packed), StepCache()
    fed = head.project(states)
    for step in range(steps):
        hidden = head(
            input_ids=shifted(packed.ids, step + 1), hidden_states=fed, position_ids=packed.position + step,
            cache=cache, attention_mask=visible,
        )  # fmt: skip
        yield head.logits(hidden)
        fed = head.feedback(hidden)


def foresees_answer(packed: Packed, step: int) -> Tensor:
    """bool [B, S]: anchors whose draft of ``step`` is a token of the same document that the model wrote."""
    by = step + 2
    return (shifted(packed.document, by) == packed.document) & shifted(packed.answer, by)


def step_losses(head: DraftHead, packed: Packed, states: Tensor, probs: Tensor, steps: int) -> Tensor:
    """Mean cross-entropy of each step, float32 [T].

    What the target gives to tokens outside the draft vocabulary no head can foresee: it adds nothing, so an anchor counts by
    the probability that lies inside.

    Args:
        probs: [B, S, Vd], the target's distribution of the token behind each token.
    """
    losses = []
    for step, logits in enumerate(step_logits(head, packed, states, steps)):
        valid = foresees_answer(packed, step)
        wanted = shifted(probs, step + 1)
        loss = -(wanted.float() * logits.float().log_softmax(-1)).sum(-1)
        losses.append((loss * valid).sum() / valid.sum().clamp(min=1))
    return torch.stack(losses)


# ----------------------------------------------------------------------------------------------------------------------
# Validation


@torch.no_grad()
def draft_hits(head: DraftHead, packed: Packed, states: Tensor, steps: int) -> Tensor:
    """bool [B, S, T]: whether the likeliest draft of each step at each anchor is the text's own next token."""
    hits = []
    for step, logits in enumerate(step_logits(head, packed, states, steps)):
        drafted = logits.argmax(-1)
        drafted = drafted if head.draft_ids is None else head.draft_ids[drafted]
        hits.append((drafted == shifted(packed.ids, step + 2)) & foresees_answer(packed, step))
    return torch.stack(hits, -1)


def chain_rounds(hits: list[list[bool]], prompt_len: int, length: int) -> list[int]:
    """Accept lengths of the rounds in which a chain would have written this text.

    Exact, not an estimate: a chain accepts a draft if and only if it is the token that the target writes there, and all it has
    seen by then is this text.

    Args:
        hits: per token of the text, per step, as ``draft_hits`` gives them.
        length: tokens of the text, prompt included; prefill has written token ``prompt_len``.
    """
    rounds, root = [], prompt_len
    while root < length - 1:
        accepted = 0
        for hit in hits[root - 1]:
            if not hit:
                break
            accepted += 1
        rounds.append(min(accepted + 1, length - 1 - root))
        root += accepted + 1
    return rounds
