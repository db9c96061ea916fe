"""Figures of the last ``generate()`` call."""

from __future__ import annotations

from dataclasses import dataclass, field

from spec_compile.errors import RanPlainError


@dataclass
class SpecStats:
    """What one ``generate()`` call did.

    Attributes:
        rounds: target forwards after prefill.
        emitted_tokens: new tokens of all rows, prefill's first token included; neither padding behind a row's end nor what
            a stopping criterion cut off.
        accept_length: emitted tokens per row and verify, the bonus token included (plain decoding is 1.0).
        acceptance_by_position: share of the rounds that drafted so far in which draft 1, 2, … was accepted.
        accept_lengths: per row, the accept length of each of its rounds in order.
        drafted_rounds: how many of those had drafts to check; adaptive rounds leave them out where they do not pay. None
            without a draft.
        tokens_per_second: emitted tokens over ``total_ms``.
        ms_per_round: wall time of a round.
        host_ms_per_round: host time of a round that was not spent waiting for the device.
        gpu_idle_fraction: share of the decoding time in which the device ran no round; None on a CPU.
        prefill_ms: wall time to the first token, without tracing, compiling and capturing.
        total_ms: wall time of the call, without them.
        compile_seconds, capture_seconds: paid so far by this model, in ``spec_compile()`` and all calls; compiling includes
            tracing, capturing the timing of rounds of each shape.
        graphs: (name, bytes) of every captured CUDA graph.
        kv_bytes: size of the KV pools.
        mode: ``"rounds"``, ``"lockstep"`` (logits processors, scores) or ``"plain"`` (ran as plain transformers).
        simulated: acceptance was simulated; the text is not the model's.
        plain_because: why a plain call was not accelerated; None for others, and where the caller had switched that off.
    """

    rounds: int = 0
    emitted_tokens: int = 0
    accept_length: float = 0.0
    acceptance_by_position: list[float] = field(default_factory=list)
    accept_lengths: list[list[int]] = field(default_factory=list)
    drafted_rounds: int | None = None
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
    plain_because: str | None = None

    def __str__(self) -> str:
        """A few lines to read; ``repr()`` has every field."""
        if self.mode == "plain":
            why = "" if self.plain_because is None else f" ({self.plain_because})"
            return f"plain transformers generate(){why}: nothing was measured"
        if self.total_ms == 0.0:
            return "no generate() call has ended yet"
        how = ", SIMULATED acceptance: the text is not the model's" if self.simulated else ""
        how += ", all rows in lockstep" if self.mode == "lockstep" else ""
        first = f"{self.total_ms / 1e3:.2f} s, {self.prefill_ms:.1f} ms to the first token"
        graphs = f"{len(self.graphs)} CUDA graphs {_mib(sum(size for _, size in self.graphs))}"
        verified = sum(map(len, self.accept_lengths))
        drafted = "" if self.drafted_rounds is None else f", drafts in {self.drafted_rounds} of {verified}"
        lines = [
            ("tokens", f"{self.emitted_tokens} in {self.rounds} rounds{how}"),
            ("accept length", f"{self.accept_length:.2f} tokens a row and round{drafted}"),
            ("by position", " ".join(f"{rate:.2f}" for rate in self.acceptance_by_position)),
            ("speed", f"{self.tokens_per_second:.1f} tokens/s; {first}"),
            ("round", f"{self.ms_per_round:.2f} ms, {self.host_ms_per_round:.2f} ms of it the host's"),
            ("GPU idle", "" if self.gpu_idle_fraction is None else f"{self.gpu_idle_fraction:.1%} of the decoding time"),
            ("compiling", f"{self.compile_seconds + self.capture_seconds:.1f} s so far"),
            ("memory", f"KV cache {_mib(self.kv_bytes)}, {graphs}"),
        ]
        return "\n".join(f"{name:<14} {text}" for name, text in lines if text)


def accelerated(stats: SpecStats) -> SpecStats:
    """``stats`` themselves, of a call whose speed is about to be told.

    Raises:
        RanPlainError: it ran as plain transformers, or reached no loop of ours at all.
    """
    if stats.mode == "plain":
        reason = stats.plain_because or "model.spec is switched off"
    elif stats.total_ms == 0.0:
        reason = "the installed transformers did not reach the decode loop that spec_compile put in place"
    else:
        return stats
    raise RanPlainError(
        f"generate() was to be accelerated and ran as plain transformers: {reason}. `spec-compile doctor` tells whether this "
        "installation can accelerate at all."
    )


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"


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
