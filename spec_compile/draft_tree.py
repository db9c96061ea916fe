"""A look at one round: the tree that was drafted, and the path through it that the target kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from spec_compile.runtime.round import RoundRecord


@dataclass(frozen=True)
class DraftTree:
    """One row's verified window as a tree. Lists have one entry a token; token 0 is the root, which was known before.

    Attributes:
        tokens: ids.
        parents: index of each token's parent, -1 for the root.
        depth: 0 for the root.
        logprobs: what the draft gave each token behind its ancestors, natural logarithm over the draft's vocabulary; 0 for
            the root.
        path: indices of the tokens that stand, root first.
        next_token: the target's own, behind the path. The round emitted ``tokens[i]`` for i in ``path[1:]`` and this one.
    """

    tokens: list[int]
    parents: list[int]
    depth: list[int]
    logprobs: list[float]
    path: list[int]
    next_token: int

    @property
    def accept_length(self) -> int:
        """Tokens the round emitted."""
        return len(self.path)

    def children(self, index: int) -> list[int]:
        """Children of a token, the draft's likeliest first."""
        found = [i for i, parent in enumerate(self.parents) if parent == index]
        return sorted(found, key=lambda i: (-self.logprobs[i], i))


def read_tree(record: RoundRecord | None) -> DraftTree | None:
    """The first row's tree of a round that has run; None without one. Copies from the device."""
    if record is None or record.tree is None or record.accepted.path is None:
        return None
    tokens, parents = record.window[0].tolist(), record.tree.parents[0].tolist()
    # The window is the N - 1 best candidates, ties to the lower index, in the candidates' order: see ops.tree.build_tree.
    scores = record.tree.candidate_scores[0].tolist()
    best = sorted(range(len(scores)), key=lambda i: (-scores[i], i))[: len(tokens) - 1]
    cumulative = [0.0, *(scores[i] for i in sorted(best))]
    length = int(record.accepted.accept_length[0])
    return DraftTree(
        tokens=tokens,
        parents=parents,
        depth=record.tree.depth[0].tolist(),
        logprobs=[cumulative[i] - cumulative[parent] if parent >= 0 else 0.0 for i, parent in enumerate(parents)],
        path=record.accepted.path[0, :length].tolist(),
        next_token=int(record.accepted.emitted[0, length - 1]),
    )
