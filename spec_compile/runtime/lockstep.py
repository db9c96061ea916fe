"""The loop for calls whose every token must be produced for all rows together: logits processors, scores, raw logits.

Each slot of a verified window goes through the processors exactly as in plain ``generate()`` — whole batch, full text,
once per emitted token — and is then sampled; the next slot counts only if every row drew what was drafted. So any
processor or criterion is exact, stateful ones included, and sampling keeps the target's distribution whatever the draft is
("sample and match"). The price: rows wait for each other, and the host sees every token.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from spec_compile.config import RoundShape, chain
from spec_compile.runtime.draft import RoundInputs, Verified
from spec_compile.runtime.engine import Engine, Request
from spec_compile.runtime.round import round_inputs, verify
from spec_compile.runtime.state import DecodeState, SamplingPlan
from spec_compile.runtime.transcript import Transcript

_GREEDY = SamplingPlan()  # drafts are greedy: any draft is exact here


@dataclass
class LockstepResult:
    """What the loop leaves besides the transcript.

    Attributes:
        scores, raw_logits: float32 [B, V] a token, where asked for.
        rounds: verifies.
        accept_lengths: per row, emitted tokens of each verify until its end.
        drafted: the same of drafts.
    """

    scores: tuple | None
    raw_logits: tuple | None
    rounds: int = 0
    accept_lengths: list[list[int]] = field(default_factory=list)
    drafted: list[list[int]] = field(default_factory=list)


def decode_lockstep(engine: Engine, request: Request, transcript: Transcript) -> LockstepResult:
    """Run a call to its end; ``transcript`` holds every token shown so far even if a processor raises."""
    call = transcript.call
    config = call.generation_config
    wanted = config.return_dict_in_generate
    result = LockstepResult(
        scores=() if wanted and config.output_scores else None,
        raw_logits=() if wanted and config.output_logits else None,
        accept_lengths=[[] for _ in transcript.rows],
        drafted=[[] for _ in transcript.rows],
    )
    state, slots, states = _admit(engine, request)  # slots: logits [B, 1, V] behind the prompts; states: what drafts read
    window = None
    while True:
        before = transcript.counts
        done, taken = _walk(slots, window, transcript, result)
        if window is not None:
            result.rounds += 1
            for row, (old, new) in enumerate(zip(before, transcript.counts, strict=True)):
                if new > old:
                    result.accept_lengths[row].append(new - old)
                    result.drafted[row].append(window.shape[1] - 1)
        if done:
            return result
        _advance(engine, state, transcript, taken, states)
        if window is not None and engine.target.programs.states is not None:  # prefill leaves its states where they belong
            engine.target.programs.states.commit(state.state_slot, None, torch.full_like(state.cache_len, taken))
        inputs = round_inputs(state, _shape(engine))
        window = _window(engine, state, transcript, inputs)
        slots, states = verify(engine.target, window, state, inputs, argmax=False)


def _admit(engine: Engine, request: Request) -> tuple[DecodeState, Tensor, Tensor | None]:
    """A state of exactly the call's rows, the logits behind the prompts, and the tapped states there."""
    batch = len(request.prompts)
    engine.last_round = None  # as in admit(); rounds of this loop leave none
    engine.reserve(engine.bucket(batch), max(request.end_len) + engine.reach)
    engine.forget()
    state = engine.fill(batch, request)
    if engine.draft is not None:
        engine.draft.prepare(batch, _GREEDY, _shape(engine))
    logits, states = engine.fill_caches(state, request, argmax=False)
    return state, logits[:, None], engine.window_states(states, state)


def _shape(engine: Engine) -> RoundShape:
    """Rows agree on one path here, so drafts are chains, whatever the engine's rounds are."""
    return chain(engine.shape.num_steps)


def _walk(slots: Tensor, window: Tensor | None, transcript: Transcript, result: LockstepResult) -> tuple[bool, int]:
    """Emit tokens from the window's logits [B, N, V] as far as the drafts hold; (call complete, tokens emitted)."""
    call = transcript.call
    for slot in range(slots.shape[1]):
        token, scores = _choose(slots[:, slot], transcript, result)
        if call.has_eos:
            token = token * transcript.unfinished + call.pad_id * (1 - transcript.unfinished)
        if transcript.append(token, scores):
            return True, slot + 1
        drafted = None if window is None or slot + 1 == slots.shape[1] else window[:, slot + 1]
        if drafted is None or not torch.equal(drafted, token):
            break
    return False, slot + 1


def _choose(logits: Tensor, transcript: Transcript, result: LockstepResult) -> tuple[Tensor, tuple | None]:
    """One column of tokens, int64 [B], by transformers' own steps."""
    call, text = transcript.call, transcript.text
    raw = logits.to(copy=True, dtype=torch.float32, device=text.device)
    with transcript.away():
        scores = call.logits_processor(text, raw)
    if result.scores is not None:
        result.scores += (scores,)
    if result.raw_logits is not None:
        result.raw_logits += (raw,)
    if call.do_sample:
        return torch.multinomial(torch.softmax(scores, -1), num_samples=1).squeeze(1), result.scores
    return scores.argmax(-1), result.scores


def _advance(engine: Engine, state: DecodeState, transcript: Transcript, taken: int, states: Tensor | None) -> None:
    """Write the last ``taken`` tokens of every row into the state and move on."""
    new = transcript.text[:, -taken:].to(state.tokens.device)
    at = state.cache_len.long()[:, None] + 1 + torch.arange(taken, device=state.tokens.device)
    state.tokens.scatter_(1, at, new)
    start = state.cache_len.clone()
    state.cache_len += taken
    if engine.draft is not None:
        engine.draft.extend(state, Verified(start, torch.full_like(start, taken), states))


def _window(engine: Engine, state: DecodeState, transcript: Transcript, inputs: RoundInputs) -> Tensor:
    """The next window, int64 [B, N]; finished rows are drafted as the padding they will get."""
    if engine.draft is None:
        return inputs.root
    window = engine.draft.propose(state, _GREEDY, _shape(engine), inputs).window
    if transcript.call.has_eos:
        live = transcript.unfinished.to(window.device)[:, None] > 0
        live = torch.cat([torch.ones_like(live), live.expand(-1, window.shape[1] - 1)], 1)  # the root is known
        window = torch.where(live, window, torch.full_like(window, transcript.call.pad_id))
    return window
