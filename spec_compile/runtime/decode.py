"""The decode loop: launch a round, and while the device works on it read the one before."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from spec_compile.config import RoundShape
from spec_compile.ops.accept import GOING_ON, NO_DISTRIBUTION
from spec_compile.runtime.engine import Engine, Request
from spec_compile.runtime.state import DecodeState


@dataclass(frozen=True)
class RoundResult:
    """What one round appended, on the host.

    Attributes:
        tokens: per row, the appended ids (empty for a finished row).
        finished: per row, whether it is finished now.
        drafted: tokens that had been drafted; 0 for prefill and plain rounds.
        match_length: how many tokens each row's next proposal has matched, 0 for a draft that has no match length.
        no_distribution: rows that stopped in this round, because the probabilities of their next token are not finite.
    """

    tokens: list[list[int]]
    finished: list[bool]
    drafted: int
    match_length: list[int]
    no_distribution: list[int] = field(default_factory=list)


@dataclass
class Timing:
    """Host-side clock of one request's rounds, in seconds; on a GPU also each round's shape with the events around it."""

    decode: float = 0.0
    waiting: float = 0.0
    rounds: int = 0
    events: list[tuple[RoundShape, torch.cuda.Event, torch.cuda.Event]] = field(default_factory=list)

    def round_milliseconds(self) -> list[float]:
        """From each round's start to the next one's on the device, waits for the host included; empty on a CPU."""
        if self.events:
            self.events[-1][1].synchronize()
        return [begin.elapsed_time(following) for (_, begin, _), (_, following, _) in itertools.pairwise(self.events)]

    def idle_fraction(self) -> float | None:
        """Share of the time from the first round's start to the last one's end in which no round ran; None on a CPU.

        A round's own time is the shortest one of its shape (a tenth may be shorter): the events around a round also count the
        wait for its launch when the host comes late, and that wait is what is looked for.
        """
        if len(self.events) < 2:
            return None
        self.events[-1][2].synchronize()
        times: dict[RoundShape, list[float]] = {}
        for shape, begin, end in self.events:
            times.setdefault(shape, []).append(begin.elapsed_time(end))
        own = sum(sorted(alike)[len(alike) // 10] * len(alike) for alike in times.values())
        return max(0.0, 1.0 - own / self.events[0][1].elapsed_time(self.events[-1][2]))


def decode(engine: Engine, request: Request, timing: Timing) -> Iterator[RoundResult]:
    """Yield prefill's result, then every round's, until all rows are finished or the caller stops asking."""
    state = engine.admit(request)
    batch = len(request.prompts)
    first = _read(state.out, batch, 0)
    yield first
    if all(first.finished):
        return
    loop = _decode_async if engine.hardware.is_cuda else _decode_sync
    yield from loop(engine, request, state, timing, first)


def _read(out: Tensor, batch: int, drafted: int) -> RoundResult:
    table = out[:batch].tolist()
    return RoundResult(
        tokens=[row[: row[-3]] for row in table],
        finished=[row[-2] != GOING_ON for row in table],
        no_distribution=[i for i, row in enumerate(table) if row[-2] == NO_DISTRIBUTION],
        drafted=drafted,
        match_length=[row[-1] for row in table],
    )


def _decode_sync(
    engine: Engine, request: Request, state: DecodeState, timing: Timing, last: RoundResult
) -> Iterator[RoundResult]:
    """On a CPU the host knows each round's result at once."""
    policy = engine.policy(state, request.plan)
    while not all(last.finished):
        live = [i for i, done in enumerate(last.finished) if not done]
        match_length = _match_length(engine, last, live)
        shape = policy.choose(match_length)
        begin = time.perf_counter()
        engine.launch(state, request.plan, shape)
        last = _read(state.out, len(request.prompts), shape.num_steps)
        seconds = time.perf_counter() - begin
        policy.observe(match_length, shape, _accept_lengths(last, live, shape), seconds * 1e3)
        timing.decode += seconds
        timing.rounds += 1
        yield last


def _match_length(engine: Engine, last: RoundResult, live: list[int]) -> int | None:
    """The longest match length of a live row's next proposal; None for a draft that has no match length."""
    knows = engine.draft is not None and engine.draft.reports_match_length
    return max((last.match_length[i] for i in live), default=0) if knows else None


@dataclass(frozen=True)
class _Flight:
    """A launched round whose result the host has not read."""

    shape: RoundShape
    match_length: int | None
    begin: torch.cuda.Event
    end: torch.cuda.Event
    slot: int


def _accept_lengths(result: RoundResult, live: list[int], shape: RoundShape) -> list[int]:
    """Of rows whose drafts were judged to the end: one that ended within its window was cut off, not refused."""
    lengths = [(len(result.tokens[i]), result.finished[i]) for i in live if result.tokens[i]]
    return [length for length, finished in lengths if not finished or length > shape.num_steps]


def _decode_async(
    engine: Engine, request: Request, state: DecodeState, timing: Timing, last: RoundResult
) -> Iterator[RoundResult]:
    """On a GPU the host runs one round behind: it reads round r - 1 while round r runs.

    The round launched after the last useful one changes nothing, because every row is finished by then.
    """
    batch = len(request.prompts)
    policy = engine.policy(state, request.plan)
    slots = [torch.empty(state.out.shape, dtype=state.out.dtype, device="cpu", pin_memory=True) for _ in range(2)]
    copied = [torch.cuda.Event() for _ in range(2)]
    started = time.perf_counter()
    pending: _Flight | None = None
    step = 0
    while not all(last.finished):
        live = [i for i, done in enumerate(last.finished) if not done]
        match_length = _match_length(engine, last, live)  # of the round before the one in flight: a round late
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        flight = _Flight(policy.choose(match_length), match_length, begin, end, step % 2)
        begin.record()
        engine.launch(state, request.plan, flight.shape)
        slots[flight.slot].copy_(state.out, non_blocking=True)
        end.record()
        copied[flight.slot].record()
        timing.events.append((flight.shape, begin, end))
        if pending is not None:
            waiting = time.perf_counter()
            copied[pending.slot].synchronize()
            timing.waiting += time.perf_counter() - waiting
            last = _read(slots[pending.slot], batch, pending.shape.num_steps)
            lengths = _accept_lengths(last, live, pending.shape)
            policy.observe(pending.match_length, pending.shape, lengths, pending.begin.elapsed_time(pending.end))
            timing.rounds += 1
            timing.decode = time.perf_counter() - started
            yield last
        pending = flight
        step += 1
