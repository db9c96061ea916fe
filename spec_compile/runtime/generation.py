"""One ``generate()`` call over an engine: rounds until the transcript is complete, and the figures of it."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from spec_compile.hf_integration.generate import GenerateCall
from spec_compile.runtime.dead_ends import check_prompts, dead_ends
from spec_compile.runtime.decode import Timing, decode
from spec_compile.runtime.engine import Engine, Request
from spec_compile.runtime.lockstep import decode_lockstep
from spec_compile.runtime.state import SamplingPlan
from spec_compile.runtime.stats import SpecStats, acceptance
from spec_compile.runtime.transcript import Transcript


@dataclass(frozen=True)
class Generated:
    """What a call gives beside its tokens, which stand in the transcript.

    Attributes:
        scores, logits: a tensor [B, V] a token where the caller asked for them, None otherwise.
    """

    stats: SpecStats
    scores: tuple[Tensor, ...] | None = None
    logits: tuple[Tensor, ...] | None = None


def run_call(engine: Engine, transcript: Transcript) -> Generated:
    """Generate what ``transcript.call`` asks for, in rounds, or token by token where processors must see every token in order.

    What an exception leaves is in the transcript.

    Raises:
        PositionError: a text would pass the last of the model's positions.
        SamplingError: probabilities are not finite.
        SpecCompileError: the KV pool does not fit into memory.
    """
    call, compiled_before = transcript.call, engine.compile_seconds
    check_prompts(call, engine.target.num_positions)
    request = read_request(call, engine)
    started = time.perf_counter()
    scores = logits = None
    if call.exact_order:
        outcome = decode_lockstep(engine, request, transcript)
        scores, logits = outcome.scores, outcome.raw_logits
        lengths, drafted = outcome.accept_lengths, outcome.drafted
        timing = Timing(rounds=outcome.rounds)
    else:
        timing = Timing()
        lengths, drafted = _run_rounds(engine, request, transcript, timing)
    if call.streamer is not None:
        with transcript.away():
            call.streamer.end()  # type: ignore[no-untyped-call]
    total = time.perf_counter() - started - (engine.compile_seconds - compiled_before)
    return Generated(_figures(engine, transcript, lengths, drafted, timing, total), scores, logits)


def read_request(call: GenerateCall, engine: Engine) -> Request:
    """The device's view of a call."""
    batch, padded = call.input_ids.shape
    ids = call.input_ids.cpu()
    base = engine.config.seed
    if base is None:  # torch.manual_seed keeps its meaning; greedy calls draw nothing, so torch's generator stays where it is
        random = call.do_sample or engine.config.simulates
        base = int(torch.randint(2**62, (1,), device="cpu")) if random else 0
    plan = SamplingPlan(
        do_sample=call.do_sample,
        max_top_k=0 if call.top_k == 0 else 1 << (call.top_k - 1).bit_length(),
        use_top_p=call.top_p < 1.0,
        use_min_p=call.min_p > 0.0,
        use_min_len=call.min_length > 0,
        remove_invalid=call.remove_invalid,
        block=call.do_sample and engine.config.verification == "block",
    )
    most = call.max_length if engine.target.num_positions is None else engine.target.num_positions + 1
    return Request(
        prompts=[ids[row, padded - length :] for row, length in enumerate(call.prompt_lens)],
        # Behind the last position a text has one token more, which nobody reads.
        end_len=[min(length + call.max_length - padded, most) for length in call.prompt_lens],
        min_len=[length + call.min_length - padded if call.min_length else 0 for length in call.prompt_lens],
        eos_ids=call.eos_ids,
        seed=[base + row for row in range(batch)],
        plan=plan,
        temperature=call.temperature,
        top_k=call.top_k,
        top_p=call.top_p,
        min_p=call.min_p,
    )


def _run_rounds(
    engine: Engine, request: Request, transcript: Transcript, timing: Timing
) -> tuple[list[list[int]], list[list[int]]]:
    """Rounds until the transcript is complete; per row, the accept length and the drafts of each of its rounds."""
    lengths: list[list[int]] = [[] for _ in transcript.rows]
    drafted: list[list[int]] = [[] for _ in transcript.rows]
    for number, result in enumerate(decode(engine, request, timing)):
        for row, new in enumerate(result.tokens):
            if new and number > 0:
                lengths[row].append(len(new))
                drafted[row].append(result.drafted)
        ends = dead_ends(result, request, transcript.call, engine.target.num_positions)
        if transcript.extend(result.tokens, result.finished, ends):
            break
    for row, count in enumerate(transcript.counts):
        _cut(lengths[row], drafted[row], len(transcript.rows[row]) - count)
    return lengths, drafted


def _cut(lengths: list[int], drafted: list[int], surplus: int) -> None:
    """Take the last ``surplus`` tokens of a row out of its rounds' accept lengths."""
    while surplus > 0 and lengths:
        lengths[-1], surplus = lengths[-1] - surplus, surplus - lengths[-1]
        if lengths[-1] <= 0:
            lengths.pop()
            drafted.pop()


def _figures(
    engine: Engine,
    transcript: Transcript,
    lengths: list[list[int]],
    drafted: list[list[int]],
    timing: Timing,
    total: float,
) -> SpecStats:
    verifies = sum(len(row) for row in lengths)
    rounds = max(timing.rounds, 1)
    decode_seconds = timing.decode or total
    emitted = sum(transcript.counts)
    return SpecStats(
        rounds=timing.rounds,
        emitted_tokens=emitted,
        accept_length=sum(map(sum, lengths)) / verifies if verifies else 0.0,
        acceptance_by_position=acceptance(lengths, drafted),
        accept_lengths=lengths,
        drafted_rounds=None if engine.draft is None else sum(count > 0 for row in drafted for count in row),
        tokens_per_second=emitted / total if total > 0 else 0.0,
        ms_per_round=decode_seconds / rounds * 1e3,
        host_ms_per_round=(decode_seconds - timing.waiting) / rounds * 1e3,
        gpu_idle_fraction=timing.idle_fraction(),
        prefill_ms=(total - timing.decode) * 1e3 if timing.decode else total * 1e3,
        total_ms=total * 1e3,
        compile_seconds=engine.compiler.seconds,
        capture_seconds=engine.capture_seconds,
        graphs=engine.captured(),
        kv_bytes=engine.kv_bytes(),
        mode="lockstep" if transcript.call.exact_order else "rounds",
        simulated=engine.config.simulates and not transcript.call.exact_order,
    )
