"""Figures of the last ``generate()`` call."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class SpecStats:
    """What one ``generate()`` call did.

    Attributes:
        rounds: target forwards after prefill.
        emitted_tokens: new tokens of all rows, prefill's first token included; neither padding behind a row's end nor what
            a stopping criterion cut off.
        accept_length: emitted tokens per row and verify, the bonus token included (plain decoding is 1.0).
        acceptance_by_position: share of verified drafts accepted at draft position 1, 2, …
        accept_lengths: per row, the accept length of each of its rounds in order.
        tokens_per_second: emitted tokens over the whole call's wall time.
        ms_per_round: wall time of a round.
        host_ms_per_round: host time of a round that was not spent waiting for the device.
        gpu_idle_fraction: share of the decoding time in which the device ran no round; None on a CPU.
        prefill_ms: wall time to the first token, compile time excluded.
        total_ms: wall time of the call, compile and capture time excluded.
        compile_seconds, capture_seconds: paid so far by this model (all calls); capture includes timing the shapes of rounds.
        graphs: (name, bytes) of every captured CUDA graph.
        kv_bytes: size of the KV pools.
        mode: ``"rounds"``, ``"lockstep"`` (logits processors, scores) or ``"plain"`` (ran as plain transformers).
        simulated: acceptance was simulated; the text is not the model's.
    """

    rounds: int = 0
    emitted_tokens: int = 0
    accept_length: float = 0.0
    acceptance_by_position: list[float] = field(default_factory=list)
    accept_lengths: list[list[int]] = field(default_factory=list)
    tokens_per_second: float = 0.0
    ms_per_round: float = 0.0
    host_ms_per_round: float = 0.0
    gpu_idle_fraction: float | None = None
    prefill_ms: float = 0.0
    total_ms: float = 0.0
    compile_seconds: float = 0.0
    capture_seconds: float = 0.0
    graphs: list[tuple[str, int]] = field(default_factory=list)
    kv_bytes: int = 0
    mode: str = "rounds"
    simulated: bool = False


def acceptance(accept_lengths: list[list[int]], drafted: list[list[int]]) -> list[float]:
    """Share of rounds that accepted draft 1, 2, …, of the rounds that drafted so far.

    Args:
        accept_lengths: per row and round, emitted tokens with the bonus.
        drafted: per row and round, tokens drafted.
    """
    longest = max((d for row in drafted for d in row), default=0)
    tried, hit = [0] * longest, [0] * longest
    for lengths, counts in zip(accept_lengths, drafted, strict=True):
        for length, count in zip(lengths, counts, strict=True):
            for position in range(count):
                tried[position] += 1
                hit[position] += length - 1 > position
    return [h / t if t else 0.0 for h, t in zip(hit, tried, strict=True)]
