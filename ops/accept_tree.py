"""Verification of token trees: the walk from the root along the children the target would have chosen itself.

Shapes: B rows, N window tokens (the root is node 0), V vocabulary, E the most tokens a round emits (num_steps + 1).

A tree is given by ``window_ids`` int64 [B, N] and ``parents`` int32 [B, N] (window indices, -1 for the root, a parent
stands before its children), as ``build_tree`` makes them. Of siblings with one token the first counts.

Every op here returns the same three: ``emitted`` int64 [B, E], of which the first ``accept_length`` count and the others
repeat the last of them; ``path`` int32 [B, E], the window indices of the nodes that stay (``path[:, 0]`` is the root, -1
behind the accepted ones), as ``kv_commit`` takes it; ``accept_length`` int32 [B], 1..E.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from spec_compile.ops.sampling import TARGET_STREAM, race


def _walk(
    window_ids: Tensor, parents: Tensor, max_accept: int, choose: Callable[[Tensor, int], Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Go down from the root while the token chosen at a node is one of its children's.

    Args:
        choose: the token that the target puts behind node [B] at depth j: int64 [B].
    """
    batch = window_ids.shape[0]
    node = torch.zeros(batch, dtype=torch.int64, device=window_ids.device)
    token = choose(node, 0)
    emitted, path = [token], [node]
    for depth in range(1, max_accept):
        hits = (parents == node[:, None]) & (window_ids == token[:, None])  # [B, N]
        alive = hits.any(1)  # never again: a row that has stopped asks the same once more
        node = torch.where(alive, hits.int().argmax(1), node)  # argmax takes the first
        token = torch.where(alive, choose(node, depth), token)
        emitted.append(token)
        path.append(torch.where(alive, node, -1))
    path = torch.stack(path, 1).to(torch.int32)  # [B, E]
    return torch.stack(emitted, 1), path, (path >= 0).sum(1, dtype=torch.int32)


def _empty_triple(window_ids: Tensor, max_accept: int) -> tuple[Tensor, Tensor, Tensor]:
    batch = window_ids.shape[0]
    emitted = window_ids.new_empty(batch, max_accept)
    return emitted, emitted.new_empty(batch, max_accept, dtype=torch.int32), emitted.new_empty(batch, dtype=torch.int32)


# ----------------------------------------------------------------------------------------------------------------------
# accept_tree_greedy


@torch.library.custom_op("spec_compile::accept_tree_greedy", mutates_args=())
def accept_tree_greedy(
    window_ids: Tensor, parents: Tensor, target_ids: Tensor, max_accept: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The longest path from the root on which every token is the target's own choice, and one token more.

    Args:
        window_ids, parents: the tree.
        target_ids: int64 [B, N], the target's choice behind each node.
        max_accept: E, at least 1; deeper nodes are not looked at.

    Returns:
        emitted, path, accept_length; ``emitted[b, j]`` is ``target_ids[b, path[b, j]]``.
    """
    return _walk(window_ids, parents, max_accept, lambda node, depth: target_ids.gather(1, node[:, None])[:, 0])


@accept_tree_greedy.register_fake
def accept_tree_greedy_fake(window_ids, parents, target_ids, max_accept) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_triple(window_ids, max_accept)


@accept_tree_greedy.register_kernel("cuda")
def accept_tree_greedy_cuda(window_ids, parents, target_ids, max_accept) -> tuple[Tensor, Tensor, Tensor]:
    from spec_compile.ops.kernels import accept_tree as kernels  # here, so that machines without Triton can import this module

    return kernels.accept_tree_greedy(window_ids, parents, target_ids, max_accept)


# ----------------------------------------------------------------------------------------------------------------------
# accept_tree_sampled


@torch.library.custom_op("spec_compile::accept_tree_sampled", mutates_args=())
def accept_tree_sampled(
    window_ids: Tensor, parents: Tensor, target_probs: Tensor, seed: Tensor, position: Tensor, max_accept: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Exact speculative sampling on a tree whose nodes were chosen without chance.

    At each node on the way the target draws a token; if a child has it, the way goes on there, else the round ends with it.
    The tokens drawn are the target's own samples, each given those before it, whatever the tree is: so their distribution is
    the target's, as long as the tree depends on nothing that is drawn in this round. It is also the rule of the literature
    (SpecInfer, 2305.09781; EAGLE's verification): accept the first child x with p(x), else zero x, renormalise and go to the
    next. Both take child i with probability p(x_i), siblings being different, and leave p without the children.

    The noise is keyed by the token's position, as everywhere in ``ops.sampling``, so the text does not depend on what was
    drafted: a tree, a chain and no draft at all emit the same tokens for one seed.

    Args:
        window_ids, parents: the tree.
        target_probs: float32 [B, N, V].
        seed: int64 [B].
        position: int32 [B], the root's position (``cache_len``); the token behind a node of depth d uses the noise of
            ``position + 1 + d``.
        max_accept: E, at least 1.

    Returns:
        emitted, path, accept_length.
    """
    row = torch.arange(window_ids.shape[0], device=window_ids.device)
    first = position.long() + 1
    # A node's token is drawn when the walk gets there: E races a row and not N, and on a CPU the noise is what costs.
    return _walk(
        window_ids,
        parents,
        max_accept,
        lambda node, depth: race(target_probs[row, node], seed, first + depth, TARGET_STREAM),
    )


@accept_tree_sampled.register_fake
def accept_tree_sampled_fake(window_ids, parents, target_probs, seed, position, max_accept) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_triple(window_ids, max_accept)


@accept_tree_sampled.register_kernel("cuda")
def accept_tree_sampled_cuda(window_ids, parents, target_probs, seed, position, max_accept) -> tuple[Tensor, Tensor, Tensor]:
    from spec_compile.ops.kernels import accept_tree as kernels

    return kernels.accept_tree_sampled(window_ids, parents, target_probs, seed, position, max_accept)
