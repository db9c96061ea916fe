"""DFlash heads that are right some of the time."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, Qwen3Config

from spec_compile.hf_integration.heads.dflash import DFlashHead
from spec_compile.hf_integration.heads.draft_head import layer_sizes_like, like_target, randomise


def own_vocabulary(
    target: PreTrainedModel, block_size: int, draft_ids: Tensor, *, first_slot: int = 1, seed: int = 0
) -> DFlashHead:
    """A random head of two layers with a language-model head of its own, over ``draft_ids`` int64 [Vd] of the target's ids."""
    config = Qwen3Config(**layer_sizes_like(target) | {"num_hidden_layers": 2})
    layers = target.config.get_text_config(decoder=True).num_hidden_layers
    with like_target(target):
        head = DFlashHead(config, target, (1, layers), block_size, 3, draft_ids, ("lm_head",), first_slot)
    randomise(head, seed)
    return head.eval()


@torch.no_grad()
def block_states(head: DFlashHead, states: Tensor, root: Tensor) -> Tensor:
    """The head's plain forward of one block: the outputs [1, num_drafts, H] that drafts are read from.

    Args:
        states: [1, L, n * Ht], of all tokens before the root.
        root: int64 [1].
    """
    cache, length = DynamicCache(), states.shape[1]
    for layer, (keys, values) in enumerate(head.context_kv(head.project(states), torch.arange(length)[None])):
        cache.update(keys.transpose(1, 2), values.transpose(1, 2), layer)
    positions = torch.arange(length, length + head.block_size)[None]
    return head(head.block(root), positions, cache)[:, head.first_slot :]


@torch.no_grad()
def fit_blocks(head: DFlashHead, states: list[Tensor], texts: list[Tensor], first: int, noise: float = 0.6) -> None:
    """Teach the head's language-model head the ends of texts by least squares: right often enough, and in a moment.

    Args:
        states: [1, L, n * Ht] each, the target's of a text.
        texts: int64 [L] each, without padding.
        first: only roots among the last so many tokens of each are taught.
        noise: what is added to the solution, in its own standard deviations, so that it is not always right.
    """
    features, wanted = [], []
    where = {int(token): i for i, token in enumerate(head.draft_ids)}
    for seen, tokens in zip(states, texts, strict=True):
        for root in range(len(tokens) - first, len(tokens) - 1):
            hidden = head.norm(block_states(head, seen[:, :root], tokens[root : root + 1]))[0]
            for feature, answer in zip(hidden, tokens[root + 1 :].tolist(), strict=False):
                if answer in where:
                    features.append(feature)
                    wanted.append(where[answer])
    x = torch.stack(features).double()  # [S, H]
    y = torch.nn.functional.one_hot(torch.tensor(wanted), len(where)).double()
    solution = torch.linalg.solve(x.T @ x + 0.05 * torch.eye(x.shape[1]), x.T @ y)  # [H, Vd]
    solution += noise * solution.std() * torch.randn(solution.shape, generator=torch.Generator().manual_seed(0))
    head.lm_head.weight.copy_(10 * solution.T)
