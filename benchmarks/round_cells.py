"""What bench_round.py measures: cells, their order, the budgets, and what another engine published."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import report

from spec_compile.config import RoundShape, SpecConfig, chain

NONE = chain(0)
CHAIN, SMALL_TREE, LARGE_TREE = chain(5), RoundShape(5, 4, 8), RoundShape(6, 10, 32)
ACCEPT = 4.0  # the simulated accept length that rounds are timed at
BATCHES = (1, 8, 32, 64, 4, 16, 2)  # the most wanted first
CONTEXTS = (512, 2048, 8192)


@dataclass(frozen=True)
class Cell:
    """Rounds of one shape for ``batch`` rows whose prompts have ``context`` tokens."""

    rounds: RoundShape
    batch: int
    context: int

    def __str__(self) -> str:
        return f"{label(self.rounds)} x{self.batch} @{self.context}"

    @property
    def accept(self) -> float:
        """The simulated accept length it is timed at."""
        return min(ACCEPT, self.rounds.num_steps + 1.0)


def parse_rounds(text: str) -> RoundShape:
    """``none`` or SGLang's three numbers, num_steps/topk/num_draft_tokens.

    Raises:
        ValueError: another text.
        ConfigError: numbers that do not go together.
    """
    if text == "none":
        return NONE
    match = re.fullmatch(r"(\d+)/(\d+)/(\d+)", text)
    if match is None:
        raise ValueError(f"{text!r}: rounds are 'none' or STEPS/TOPK/TOKENS, as in 5/1/6")
    steps, topk, tokens = map(int, match.groups())
    return SpecConfig(num_steps=steps, topk=topk, num_draft_tokens=tokens).round_shape(steps)


def label(rounds: RoundShape) -> str:
    return str(rounds) if rounds.num_steps else "none"


def accept_lengths(rounds: RoundShape) -> list[float]:
    """Accept lengths that tokens/s are given for: 1, 2, 3, 4 and the most a round can emit."""
    most = float(rounds.num_steps + 1)
    return sorted({accept for accept in (1.0, 2.0, 3.0, ACCEPT) if accept < most} | {most})


# ----------------------------------------------------------------------------------------------------------------------
# Budgets, on one H200: most milliseconds a round

BUDGETS = {
    "llama-3.1-8b": {
        Cell(CHAIN, 1, 512): 5.8,
        Cell(CHAIN, 8, 512): 6.5,
        Cell(CHAIN, 32, 512): 8.9,
        Cell(SMALL_TREE, 1, 512): 6.8,
        Cell(CHAIN, 1, 2048): 6.0,
    }
}
IDLE = 0.02  # most idle share between rounds, in every cell that has a budget
TOKENS_PER_SECOND = (Cell(CHAIN, 1, 512), 680.0)  # at ACCEPT
MEMORY = 2 * 2**30  # bytes beyond weights and KV, all buckets captured
RATIO = 1.3  # parts over this times their floor deserve a sentence

PARTS = (
    Cell(CHAIN, 1, 512),
    Cell(CHAIN, 8, 512),
    Cell(CHAIN, 32, 512),
    Cell(SMALL_TREE, 1, 512),
    Cell(LARGE_TREE, 1, 512),
    Cell(LARGE_TREE, 32, 512),
    Cell(CHAIN, 1, 2048),
    Cell(NONE, 1, 512),
)

_OTHER = report.PUBLISHED["ms_and_tokens_per_second"]
PUBLISHED: dict[Cell, tuple[float, float | None]] = {  # ms a step, tokens/s; report.PUBLISHED says where from
    **{Cell(NONE, batch, 512): figures for batch, figures in _OTHER["ours"].items()},
    **{Cell(CHAIN, batch, 512): figures for batch, figures in _OTHER["ours_eagle"].items()},
    Cell(NONE, 64, 512): (6.71, None),
    Cell(NONE, 1, 2048): (5.07, None),
    Cell(NONE, 8, 2048): (5.63, None),
    Cell(NONE, 1, 8192): (5.33, None),
    Cell(NONE, 8, 8192): (7.13, None),
}


# ----------------------------------------------------------------------------------------------------------------------
# Order


@dataclass(frozen=True)
class Stage:
    """Cells that one engine serves: one round shape over one pool."""

    rounds: RoundShape
    context: int
    cells: tuple[Cell, ...]


def in_order(cells: Iterable[Cell], shape: str) -> list[Stage]:
    """All cells, the most important first, neighbours of one round shape and context together.

    Budgets come first, then what they are compared with, short prompts before long ones, trees behind chains.
    """
    budgets = list(BUDGETS.get(shape, {}))
    kinds = (CHAIN, NONE, SMALL_TREE, LARGE_TREE)

    def rank(cell: Cell) -> tuple:
        place = BATCHES.index(cell.batch) if cell.batch in BATCHES else len(BATCHES)
        kind = kinds.index(cell.rounds) if cell.rounds in kinds else len(kinds)
        if cell in budgets:
            return (0, budgets.index(cell))
        return (1 + (kind == len(kinds)), cell.context, kind, place)

    stages: list[Stage] = []
    for cell in sorted(cells, key=rank):
        last = stages[-1] if stages else None
        if last is not None and (last.rounds, last.context) == (cell.rounds, cell.context):
            stages[-1] = Stage(cell.rounds, cell.context, (*last.cells, cell))
        else:
            stages.append(Stage(cell.rounds, cell.context, (cell,)))
    return stages


def grid(rounds: Sequence[RoundShape], batches: Sequence[int], contexts: Sequence[int]) -> list[Cell]:
    return [Cell(shape, batch, context) for shape in rounds for context in contexts for batch in batches]
