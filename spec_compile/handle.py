"""``model.spec``: the loop behind ``generate()``, what it chose, what it measured, and how to switch it off."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping
from types import TracebackType

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel
from transformers.generation.utils import GenerateDecoderOnlyOutput

from spec_compile.draft_tree import DraftTree, read_tree
from spec_compile.errors import SpecCompileError
from spec_compile.explain import explain
from spec_compile.hf_integration.binding import bind_generate
from spec_compile.hf_integration.forward_wrappers import changes_numerics
from spec_compile.hf_integration.generate import GenerateCall, added_inputs, read_call, what_differs, why_plain
from spec_compile.hf_integration.transformers_private import SAMPLE
from spec_compile.runtime.dead_ends import check_prompts, dead_ends
from spec_compile.runtime.decode import Timing, decode
from spec_compile.runtime.engine import Engine, Request
from spec_compile.runtime.lockstep import decode_lockstep
from spec_compile.runtime.state import MAX_EOS_IDS, SamplingPlan
from spec_compile.runtime.stats import SpecStats, acceptance
from spec_compile.runtime.transcript import Transcript
from spec_compile.runtime.turns import PATIENCE, Turns
from spec_compile.user_warning import warn_user
from spec_compile.versions import version_remedy

_NAMED_CHANGES = 3  # of a model that changed behind its graphs
_AWAY = (
    "another thread's call of the same model has been in its stopping criteria, streamer or logits processors for "
    f"{PATIENCE:g} s and may be waiting for this one"
)


class SpecHandle:
    """Attached as ``model.spec`` by ``spec_compile``.

    Buffers and graphs serve one call at a time: calls of other threads wait, and a call from within a call (a criterion or
    streamer that generates with the same model, in its own thread or in one that it waits for) runs plain. Results never
    hold a cache: that field is None.
    """

    def __init__(self, model: PreTrainedModel, engine: Engine) -> None:
        self._model, self._engine = model, engine
        self._enabled = True
        self._stats = SpecStats()
        self._told: set[str] = set()
        self._told_since_rounds: set[str] = set()  # about changes of the model: said again after each
        self._turns = Turns()  # on the buffers
        self._transcript: Transcript | None = None
        self._original_class = bind_generate(model, self._loop, self._say_plain, self._say_unreached)

    # ------------------------------------------------------------------------------------------------------------------
    # What users call

    def __repr__(self) -> str:
        draft = self._engine.draft
        state = "removed" if not self._bound() else "on" if self._enabled else "off"
        return f"<spec_compile {state}: draft {'none' if draft is None else draft.kind}, {self._engine.hardware.name}>"

    def explain(self) -> str:
        """Which provider runs which layers in which graph, why, and why not the others."""
        return explain(self._engine)

    def stats(self) -> SpecStats:
        """Figures of the last ``generate()`` call."""
        return self._stats

    def last_tree(self) -> DraftTree | None:
        """The tree of drafts that the first row verified last; None if that round verified none, as chains never do.

        In a streamer or stopping criterion the tree of the round that ran last: a look at every round. On a GPU, where rounds
        are launched ahead, it may be one round further than the text, after ``generate()`` too. Waits for the device.
        """
        return read_tree(self._engine.last_round)

    def partial_sequences(self) -> Tensor | None:
        """Tokens of the last call so far, int64 [B, P + n]: what an exception or Ctrl-C left of it."""
        return None if self._transcript is None else self._transcript.sequences()

    def disable(self) -> _Switch:
        """Plain ``generate()`` from now on, or within ``with model.spec.disable():``."""
        return _Switch(self, False)

    def enable(self) -> _Switch:
        """Speculative ``generate()`` from now on, or within ``with model.spec.enable():``."""
        return _Switch(self, True)

    def remove(self) -> None:
        """Give the model its own class back and free pools and graphs. The weights stay where they are.

        Waits for a call that another thread has running.

        Raises:
            SpecCompileError: from within a running call, whose buffers these are, or while one may be waiting for this thread.
        """
        if self._turns.is_mine():
            raise SpecCompileError("model.spec.remove() from within generate(): call it when generate() has returned.")
        with self._turns.take() as turn:
            if not turn:
                raise SpecCompileError(f"model.spec.remove(): {_AWAY}. Call it when that generate() has returned.")
            if self._bound():
                self._model.__class__ = self._original_class
                del self._model.spec
                self._engine.release()

    def _bound(self) -> bool:
        return self._model.__dict__.get("spec") is self

    def generate_loop(self, model: PreTrainedModel, input_ids: Tensor, **kwargs) -> object:
        """The loop as a callable for ``generate(custom_generate=model.spec.generate_loop)``.

        transformers hands no streamer to a custom loop; plain ``model.generate(streamer=…)`` does.
        """
        return getattr(type(model), SAMPLE)(model, input_ids, **kwargs)

    # ------------------------------------------------------------------------------------------------------------------
    # The loop

    def _why_not_now(self) -> str | None:
        if not self._bound():
            return "model.spec.remove() came first"
        if reason := changes_numerics(self._model):
            return reason
        changed = list(itertools.islice(self._engine.what_changed(), _NAMED_CHANGES + 1))
        if changed:
            named = ", ".join(changed[:_NAMED_CHANGES]) + (" and more" if len(changed) > _NAMED_CHANGES else "")
            return (
                f"graphs hold the model as they found it, and these were moved, replaced or changed since: {named}. "
                "Undo that, or call spec_compile(model, ...) again for the model as it is now"
            )
        with torch.inference_mode(False), self._engine.on_device():  # what a trace makes is kept
            differs = self._engine.target.training_differs()
        if differs is not None:
            return f"the model is in training mode, in which this computes otherwise: {differs}; call model.eval()"
        return None

    def _say_plain(self, reason: str, told: set[str] | None = None) -> None:
        self._stats = SpecStats(mode="plain", plain_because=reason)
        if self._enabled:
            self._say_once(f"this generate() call runs as plain transformers: {reason}.", told)

    def _say_once(self, text: str, told: set[str] | None = None) -> None:
        told = self._told if told is None else told
        if text not in told:
            told.add(text)
            warn_user(text)

    def _say_incompatible(self, what: str) -> None:
        """What the installed transformers does otherwise than any release that was tested: said in every call."""
        self._stats = SpecStats(mode="plain", plain_because=what)
        if self._enabled:
            warn_user(f"{what}, so this generate() call runs as plain transformers. {version_remedy()}")

    def _say_unreached(self, given: Mapping[str, object]) -> None:
        """A public call came back without any of the loops that the model's class has."""
        if given.get("custom_generate") is not None:
            self._say_plain("custom_generate is not accelerated")
        elif given.get("cache_implementation") == "paged":
            self._say_plain("cache_implementation='paged' is not accelerated")
        else:
            self._say_incompatible(f"generate() of transformers {transformers.__version__} did not use the loop it used to")

    def _loop(
        self,
        model: PreTrainedModel,
        plain: Callable[..., object],
        given: Mapping[str, object] | None,
        input_ids: Tensor,
        logits_processor,
        stopping_criteria,
        generation_config,
        synced_gpus: bool = False,
        streamer=None,
        **model_kwargs,
    ) -> object:
        def run_plain() -> object:
            return plain(
                input_ids,
                logits_processor=logits_processor,
                stopping_criteria=stopping_criteria,
                generation_config=generation_config,
                synced_gpus=synced_gpus,
                streamer=streamer,
                **model_kwargs,
            )

        if not self._enabled:
            self._stats = SpecStats(mode="plain")
            return run_plain()
        if self._turns.is_mine():
            self._say_plain("another call of the same model is running around it")
            return run_plain()
        if added := added_inputs(model_kwargs, given):
            self._say_incompatible(
                f"transformers {transformers.__version__} gives the model inputs {added}, which nobody asked for"
            )
            return run_plain()
        reason = why_plain(model, input_ids, generation_config, synced_gpus, model_kwargs, given)
        if reason is None:
            call = read_call(input_ids, logits_processor, stopping_criteria, generation_config, streamer, model_kwargs)
            if len(call.eos_ids) > MAX_EOS_IDS:
                reason = f"more than {MAX_EOS_IDS} eos_token_id values are not accelerated"
            elif (limit := self._engine.target.longest_text) is not None and call.max_length > limit:
                reason = (
                    f"texts of more than {limit} tokens are not accelerated: the cache that this model's configuration makes "
                    f"keeps no more, while its attention mask reaches further back"
                )
            elif call.exact_order and call.max_length > (self._engine.target.num_positions or call.max_length) + 1:
                reason = (
                    f"texts that may pass the model's {self._engine.target.num_positions} positions are not accelerated with "
                    "logits processors, scores or logits"
                )
        told = self._told
        if reason is None:
            with self._turns.take() as turn:
                reason = self._why_not_now() if turn else _AWAY
                told = self._told_since_rounds if turn else self._told
                if reason is None:
                    told.clear()
                    for note in what_differs(generation_config):
                        self._say_once(f"{note}.")
                    # Buffers outlive the call: they must not be inference tensors even if the caller is in inference mode.
                    with torch.inference_mode(False), torch.no_grad(), self._engine.on_device():
                        return self._run(call)
        self._say_plain(reason, told)
        return run_plain()

    def _run(self, call: GenerateCall) -> object:
        engine, compiled_before = self._engine, self._engine.compile_seconds
        transcript = Transcript(call, lambda: engine.compile_seconds - compiled_before, self._turns.away)
        self._transcript = transcript
        check_prompts(call, engine.target.num_positions)
        request = _request(call, engine)
        started = time.perf_counter()
        scores = logits = None
        if call.exact_order:
            if engine.config.simulates:
                self._say_once("a call with logits processors, scores or logits accepts drafts for real: nothing is SIMULATED.")
            outcome = decode_lockstep(engine, request, transcript)
            scores, logits = outcome.scores, outcome.raw_logits
            lengths, drafted = outcome.accept_lengths, outcome.drafted
            timing = Timing(rounds=outcome.rounds)
        else:
            timing = Timing()
            lengths, drafted = self._run_rounds(request, transcript, timing)
        if call.streamer is not None:
            with self._turns.away():
                call.streamer.end()
        total = time.perf_counter() - started - (engine.compile_seconds - compiled_before)
        self._stats = self._figures(transcript, lengths, drafted, timing, total, call)
        sequences = transcript.sequences()
        if not call.generation_config.return_dict_in_generate:
            return sequences
        return GenerateDecoderOnlyOutput(sequences=sequences, scores=scores, logits=logits)

    def _run_rounds(self, request: Request, transcript: Transcript, timing: Timing) -> tuple[list[list[int]], list[list[int]]]:
        """Rounds until the transcript is complete; per row, the accept length and the drafts of each of its rounds."""
        lengths: list[list[int]] = [[] for _ in transcript.rows]
        drafted: list[list[int]] = [[] for _ in transcript.rows]
        for number, result in enumerate(decode(self._engine, request, timing)):
            for row, new in enumerate(result.tokens):
                if new and number > 0:
                    lengths[row].append(len(new))
                    drafted[row].append(result.drafted)
            ends = dead_ends(result, request, transcript.call, self._engine.target.num_positions)
            if transcript.extend(result.tokens, result.finished, ends):
                break
        for row, count in enumerate(transcript.counts):
            _cut(lengths[row], drafted[row], len(transcript.rows[row]) - count)
        return lengths, drafted

    def _figures(
        self,
        transcript: Transcript,
        lengths: list[list[int]],
        drafted: list[list[int]],
        timing: Timing,
        total: float,
        call: GenerateCall,
    ) -> SpecStats:
        engine = self._engine
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
            mode="lockstep" if call.exact_order else "rounds",
            simulated=engine.config.simulates and not call.exact_order,
        )


class _Switch:
    """Sets the loop on or off at once; as a context manager, puts it back afterwards."""

    def __init__(self, handle: SpecHandle, enabled: bool) -> None:
        self._handle, self._before = handle, handle._enabled
        handle._enabled = enabled

    def __enter__(self) -> SpecHandle:
        return self._handle

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self._handle._enabled = self._before


def _cut(lengths: list[int], drafted: list[int], surplus: int) -> None:
    """Take the last ``surplus`` tokens of a row out of its rounds' accept lengths."""
    while surplus > 0 and lengths:
        lengths[-1], surplus = lengths[-1] - surplus, surplus - lengths[-1]
        if lengths[-1] <= 0:
            lengths.pop()
            drafted.pop()


def _request(call: GenerateCall, engine: Engine) -> Request:
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
