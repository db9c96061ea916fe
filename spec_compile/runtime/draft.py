"""What every kind of draft offers to the engine and its rounds; ``drafts/`` has one file a kind."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from spec_compile.config import RoundShape
from spec_compile.hf_integration.taps import Tap
from spec_compile.runtime.programs import Programs
from spec_compile.runtime.state import DecodeState, SamplingPlan

MOST_PENDING = 32  # plain rounds after which a draft head has to be told of their tokens


@dataclass(frozen=True)
class Tree:
    """Where the tokens of a verified window hang; the root is token 0 and everybody stands behind its ancestors.

    Attributes:
        parents: int32 [B, N], window index of each token's parent, -1 for the root.
        depth: int32 [B, N], 0 for the root.
        mask: int32 [B, N, W], packed ancestor bits, self included.
        candidate_scores: float32 [B, C], cumulative log-probabilities of all candidates; the window is the N - 1 best in their
            order (``ops.tree.build_tree``).
    """

    parents: Tensor
    depth: Tensor
    mask: Tensor
    candidate_scores: Tensor


@dataclass(frozen=True)
class RoundInputs:
    """What a round knows before it drafts; see ``ops.round_inputs``.

    Attributes:
        root: int64 [B, 1], the newest token, which is in no cache yet.
        position_ids: int64 [B, num_steps + 1], of the root and of what is one, two, … tokens behind it.
        lens: int32 [num_steps + 1, B], ``cache_len`` and 1, 2, … more.
    """

    root: Tensor
    position_ids: Tensor
    lens: Tensor


@dataclass(frozen=True)
class Proposal:
    """Drafted tokens and the distribution they were drawn from.

    Attributes:
        window: int64 [B, N], the root and the drafts.
        probs: float32 [B, N - 1, V] when the tokens were sampled from it (q is ``full``); None when they were not drawn at
            all (q is ``one-hot``). Verification is exact for what is said here, and only for that.
        tree: how they hang together; None for a chain.
    """

    window: Tensor
    probs: Tensor | None = None
    tree: Tree | None = None


@dataclass(frozen=True)
class Verified:
    """What a round committed, for the draft's ``extend``.

    Attributes:
        start: int32 [B], ``cache_len`` before the commit: the position of the window's root.
        count: int32 [B], tokens committed; 0 in finished and padding rows.
        states: [B, E, n * Ht], the tapped states of the committed tokens' predecessors (slot j: what the target saw when it
            emitted token j); garbage behind ``count``. None if the draft taps nothing.
    """

    start: Tensor
    count: Tensor
    states: Tensor | None


class Draft(Protocol):
    """A source of drafts. Everything but ``prefill`` and ``prepare`` runs inside the round: static shapes, no host sync.

    Attributes:
        kind: ``"ngram"``, ``"causal_lm"``, ``"eagle3"``, … for reports.
        shape: the rounds it was asked for.
        taps: hidden states of the target it reads, see ``Tap``.
        programs: of its models, one each; empty without one.
        reach: slots behind a row's newest token that it may write.
        can_skip: rounds may leave it out, after which ``catch_up`` tells it of their tokens; else it drafts in every one.
        reports_match_length: ``extend`` says how many tokens the next proposal has matched.
    """

    kind: str
    shape: RoundShape
    taps: tuple[Tap, ...]
    programs: tuple[Programs, ...]
    reach: int
    can_skip: bool
    reports_match_length: bool

    def reserve(self, rows: int, capacity: int) -> bool:
        """Make room for ``rows`` rows of ``capacity`` tokens; True when buffers moved (captured graphs are void)."""

    def forget(self) -> None:
        """A new request begins."""

    def prepare(self, rows: int, plan: SamplingPlan, shape: RoundShape) -> None:
        """Build whatever rounds of ``shape`` need for ``rows`` rows, before capture."""

    def prefill(
        self, prompts: list[Tensor], page_table: Tensor, states: Tensor | None, max_tokens: int, first_row: int
    ) -> None:
        """See some rows' prompts; runs once a request, outside the round.

        Args:
            page_table: int32 [rows, M], of these rows.
            states: [T, n * Ht], the tapped states of the packed prompts.
            max_tokens: process at most this many tokens at once.
            first_row: the state's row of the first prompt; the others follow.
        """

    def propose(self, state: DecodeState, plan: SamplingPlan, shape: RoundShape, inputs: RoundInputs) -> Proposal:
        """Draft behind each row's root token."""

    def extend(self, state: DecodeState, verified: Verified) -> Tensor | None:
        """Called when tokens were committed. int32 [B]: the length of the match that the next proposal continues, 0 for none;
        None of a draft that does not report it."""

    def catch_up(self, state: DecodeState) -> None:
        """See the tokens of rounds that left the draft out: before it drafts again, and after ``MOST_PENDING`` such rounds."""
