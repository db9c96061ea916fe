"""Draft heads that are right some of the time, and engines with them."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor
from transformers import PreTrainedModel

from spec_compile.drafts.eagle import EagleDraft
from spec_compile.hf_integration.heads.draft_head import DraftHead
from spec_compile.hf_integration.heads.mtp import MtpLayers
from spec_compile.hf_integration.taps import NORMED, Tap, decoder_layers
from spec_compile.runtime.engine import Engine


@torch.no_grad()
def target_states(target: PreTrainedModel, taps: tuple[Tap, ...], tokens: Tensor) -> Tensor:
    """What transformers itself says the tapped states of ``tokens`` [L] are: [1, L, len(taps) * Ht]."""
    layers, last = decoder_layers(target), []
    handle = layers[-1].register_forward_hook(lambda _, args, out: last.append(out if isinstance(out, Tensor) else out[0]))
    states = target(tokens[None], output_hidden_states=True).hidden_states
    handle.remove()
    known = {**dict(enumerate(states[:-1])), len(layers): last[0], NORMED: states[-1]}
    return torch.cat([known[tap] for tap in taps], -1)


@torch.no_grad()
def drafted_states(head: DraftHead, states: Tensor, tokens: Tensor, steps: int) -> list[Tensor]:
    """The head's plain forward with its own words fed back, as a chain of ``steps`` drafts that are all right reads it.

    Args:
        states: [1, L, n * Ht], of the target.
        tokens: int64 [L].

    Returns:
        For step s the outputs [1, L - 1 - s, H]; the i-th foretells token i + 2 + s.
    """
    length = tokens.shape[0] - 1  # entry i holds token i + 1
    ids, fed = [tokens[1:]], [head.project(states[:, :-1])]
    root = [torch.arange(length)]  # the entry of the target's that a fed-back entry stands behind
    out: list[Tensor] = []
    for step in range(steps):
        first = [i for i, where in enumerate(root) for _ in where]
        block, behind = torch.tensor(first), torch.cat(root)
        own = (block[:, None] >= block) & (behind[:, None] == behind) & (block > 0)  # its own ancestors and itself
        allowed = own | ((block == 0) & (behind[:, None] >= behind))
        mask = torch.zeros(allowed.shape).masked_fill(~allowed, float("-inf"))
        positions = (behind + block)[None]
        hidden = head(torch.cat(ids)[None], torch.cat(fed, 1), positions, attention_mask=mask[None, None])
        out.append(hidden[:, block == step])
        ids.append(tokens[step + 2 :])
        root.append(torch.arange(length - step - 1))
        fed.append(head.feedback(out[-1][:, :-1]))
    return out


def read_by_lm_head(head: DraftHead, hidden: Tensor) -> Tensor:
    """What the head's language-model head reads of a forward's output."""
    kept: list[Tensor] = []
    handle = head.lm_head.register_forward_pre_hook(lambda _, args: kept.append(args[0]))
    head.logits(hidden)
    handle.remove()
    return kept[0]


@torch.no_grad()
def fit(
    head: DraftHead,
    target: PreTrainedModel,
    texts: list[Tensor],
    first: int,
    *,
    steps: int = 3,
    noise: float = 0.6,
    ridge: float = 0.05,
) -> None:
    """Teach the head's language-model head the texts by least squares: right often enough, and in a moment.

    The language-model head must be the draft head's own.

    Args:
        texts: int64 [L] each, without padding.
        first: only the last so many tokens of each are taught; the text is random before.
        noise: what is added to the solution, in its own standard deviations, so that the right token is not always the first.
    """
    known = []
    for tokens in texts:
        states = target_states(target, head.taps, tokens)
        for step, hidden in enumerate(drafted_states(head, states, tokens, steps)):
            answers = tokens[step + 2 :]
            known += list(zip(read_by_lm_head(head, hidden[0, : len(answers)]), answers.tolist(), strict=True))[-first:]
    teach(head, known, noise=noise, ridge=ridge)


@torch.no_grad()
def fit_in_turn(layers: MtpLayers, target: PreTrainedModel, texts: list[Tensor], first: int) -> None:
    """``fit`` for heads that draft in turn: each is taught what stands as far ahead as it looks."""
    known: list[list[tuple[Tensor, int]]] = [[] for _ in layers.heads]
    for tokens in texts:
        states = target_states(target, layers.heads[0].taps, tokens)
        for ahead, (head, pairs) in enumerate(zip(layers.heads, known, strict=True), 1):
            ids = tokens[ahead:]
            states = head(ids[None], states[:, : len(ids)], torch.arange(len(ids))[None])
            pairs += list(zip(states[0, :-1], tokens[ahead + 1 :].tolist(), strict=True))[-first:]
    for head, pairs in zip(layers.heads, known, strict=True):
        teach(head, pairs)


@torch.no_grad()
def teach(head: DraftHead, known: list[tuple[Tensor, int]], *, noise: float = 0.6, ridge: float = 0.05) -> None:
    """Solve for a language-model head that finds the token behind each feature [H]; see ``fit``."""
    ids = torch.arange(head.lm_head.weight.shape[0]) if head.draft_ids is None else head.draft_ids
    where = {int(token): i for i, token in enumerate(ids)}
    known = [(feature, where[answer]) for feature, answer in known if answer in where]
    features, wanted = zip(*known, strict=True)
    x = torch.stack(features).double()  # [S, H]
    y = torch.nn.functional.one_hot(torch.tensor(wanted), len(where)).double()
    solution = torch.linalg.solve(x.T @ x + ridge * torch.eye(x.shape[1]), x.T @ y)  # [H, Vd]
    generator = torch.Generator().manual_seed(0)
    solution += noise * solution.std() * torch.randn(solution.shape, generator=generator)
    head.lm_head.weight.copy_(10 * solution.T)


def reshape(model: PreTrainedModel, **options: object) -> None:
    """Let a compiled model draft rounds of another shape. What was captured stays: capturing is most of a test's time."""
    engine = model.spec._engine
    config = dataclasses.replace(engine.config, **{"topk": 1, "num_draft_tokens": None, "verification": "token", **options})
    draft = EagleDraft(engine.draft.runner, config.round_shape(5), engine.draft.vocab_size)
    model.spec._engine = Engine(engine.target, draft, config)


def options_of(shape: str) -> dict[str, int]:
    """``"5/4/8"`` as options of ``spec_compile``."""
    steps, topk, tokens = map(int, shape.split("/"))
    return {"num_steps": steps, "topk": topk, "num_draft_tokens": tokens}
