"""A compiled target with its draft: buffers sized for the request, rounds run or replayed."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from spec_compile.config import RoundShape, SpecConfig, chain
from spec_compile.errors import SpecCompileError
from spec_compile.ops.sampling import TARGET_STREAM
from spec_compile.runtime.device_time import eager_milliseconds
from spec_compile.runtime.draft import MOST_PENDING, Draft
from spec_compile.runtime.graphs import GraphCache
from spec_compile.runtime.model_runner import ModelRunner
from spec_compile.runtime.policy import DraftPolicy
from spec_compile.runtime.programs import Programs
from spec_compile.runtime.progress import Progress
from spec_compile.runtime.round import Accepted, RoundRecord, commit, run_round
from spec_compile.runtime.state import DecodeState, SamplingPlan, new_state

log = logging.getLogger("spec_compile")

# A window of three tokens costs a CPU about what one does: the widest that MKL still multiplies at memory speed.
_SHORT_DRAFT = 2
_CATCH_UP = "catch up"
_SMALLEST_CAPACITY = 1024  # so that short calls do not make longer ones reallocate and recapture


@dataclass
class Request:
    """One ``generate()`` call as the device sees it; one entry a row in every list.

    Attributes:
        prompts: int64 [len] on the CPU, without padding.
        end_len: most tokens, prompt included.
        min_len: tokens before which end-of-sequence is forbidden (0: never).
        eos_ids: end-of-sequence ids; empty when only the length ends a row.
        seed: of every row's randomness.
    """

    prompts: list[Tensor]
    end_len: list[int]
    min_len: list[int]
    eos_ids: list[int]
    seed: list[int]
    plan: SamplingPlan
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0


class Engine:
    """Owns every buffer, program and graph of one ``spec_compile``d model."""

    def __init__(self, target: ModelRunner, draft: Draft | None, config: SpecConfig) -> None:
        self.target, self.draft, self.config = target, draft, config
        self.compiler, self.hardware, self.device = target.options.compiler, target.options.hardware, target.device
        self.shape = draft.shape if draft is not None else chain(0)
        self._rates: Tensor | None = None  # float32 [R, num_steps] where acceptance is simulated
        self.graphs = GraphCache(self.device) if self.hardware.is_cuda and config.cuda_graphs else None
        self.capture_seconds = 0.0
        self.last_round: RoundRecord | None = None  # the one launched last, in this call
        self._buffers: DecodeState | None = None
        self._policies: dict[tuple, DraftPolicy] = {}
        self._plain_rounds = 0  # since the draft head last saw all tokens
        self._warmed: set[tuple] = set()  # rounds compiled, where there is no graph to tell

    def on_device(self) -> AbstractContextManager:
        """Make the model's GPU the current one."""
        return torch.cuda.device(self.device) if self.hardware.is_cuda else nullcontext()

    @property
    def compile_seconds(self) -> float:
        """Time spent so far on tracing, compiling, choosing kernels and capturing graphs."""
        return self.compiler.seconds + self.capture_seconds

    @property
    def reach(self) -> int:
        """Slots that a round may touch past the last token that counts: the verified window's, or those of the draft."""
        return max(self.shape.num_draft_tokens, 0 if self.draft is None else self.draft.reach) + 2

    def bucket(self, batch: int) -> int:
        """Rows of the graph that serves ``batch`` rows: the next power of two on a GPU, the batch itself on a CPU."""
        return 1 << (batch - 1).bit_length() if self.hardware.is_cuda else batch

    def admit(self, request: Request) -> DecodeState:
        """Make room for the request and prefill it: afterwards each row has its first new token.

        Raises:
            SpecCompileError: the KV pool does not fit into the device's memory.
        """
        rows = self.bucket(len(request.prompts))
        self.last_round = None  # its tensors would keep the memory of graphs that reserve() voids
        self.reserve(rows, max(request.end_len) + self.reach)
        self._buffers.clear()
        self.forget()  # before rounds are run over the cleared state
        self.prepare(self._buffers.rows(rows), request.plan)
        self._plain_rounds, self.last_round = 0, None  # the warm-up's rounds belong to no request
        self._prefill(self.fill(rows, request), request)
        return self._buffers.rows(rows)

    def forget(self) -> None:
        """Nothing is left of the last request, wherever it ended."""
        self._plain_rounds = 0
        if self.draft is not None:
            self.draft.forget()

    def reserve(self, rows: int, capacity: int) -> None:
        """Grow the pools and the state to ``rows`` × ``capacity`` if they are smaller; graphs over the old ones are void.

        Pools keep the most rows and the longest text seen, so that requests taking turns do not make them move. Where that
        rectangle does not fit, they are made anew for this request alone.

        Raises:
            SpecCompileError: not even that fits. No pool is left, and a smaller request can still run.
        """
        capacity = max(_SMALLEST_CAPACITY, 1 << (capacity - 1).bit_length())
        largest = (rows, capacity)
        if self._buffers is not None:
            largest = (max(rows, self._buffers.tokens.shape[0]), max(capacity, self._buffers.tokens.shape[1]))
        reason = ""
        for size in dict.fromkeys([largest, (rows, capacity)]):
            try:
                self._allocate(*size)
                return
            except torch.OutOfMemoryError as error:
                self._drop_pools()  # the target's may have grown when the draft's could not
                reason = str(error).splitlines()[0]
            except BaseException:  # an interrupt: pools that moved, under buffers and graphs that do not know of it
                self._drop_pools()
                raise
        raise SpecCompileError(
            f"no memory for a KV pool of {rows} rows × {capacity} tokens on {self.device} ({reason}): generate fewer rows or "
            "tokens at once (max_new_tokens is reserved up front), or free memory. Nothing was generated yet."
        )

    def _allocate(self, rows: int, capacity: int) -> None:
        moved = self.target.programs.reserve(rows, capacity, self.shape.num_draft_tokens)
        if self.draft is not None:
            moved = self.draft.reserve(rows, capacity) or moved
        if not moved and self._buffers is not None:
            return
        if self.graphs is not None:
            self.graphs.clear()
        if self.hardware.is_cuda:
            self._warmed.clear()  # kernels are chosen anew, and some of them built
        pages = self.target.programs.pool.page_table.shape[1]
        self._buffers = new_state(rows, capacity, pages, self.shape.num_steps, self.device)
        self._rates = self._simulated_rates(rows)

    def _drop_pools(self) -> None:
        if self.graphs is not None:
            self.graphs.clear()
        self._warmed.clear()
        self._buffers = None
        for programs in self.programs():
            programs.drop_pool()

    def programs(self) -> list[Programs]:
        """The target's, then those of the draft's models."""
        return [self.target.programs, *(() if self.draft is None else self.draft.programs)]

    def _simulated_rates(self, rows: int) -> Tensor | None:
        rates = self.config.simulated_rates(self.shape.num_steps)
        return None if rates is None else torch.tensor([rates] * rows, dtype=torch.float32, device=self.device)

    def prepare(self, state: DecodeState, plan: SamplingPlan) -> None:
        """Compile and capture every round this plan may use, over a cleared state, before the first token."""
        self.target.prefill_program(argmax=plan.ids_only)
        shapes, rows = self.round_shapes(), state.cache_len.shape[0]
        with Progress("compiling", len(shapes), self.config.progress) as progress:
            for shape in shapes:
                progress.advance(f"rounds of {shape.num_draft_tokens} tokens × {rows} rows")
                if self.draft is not None and shape.num_steps > 0:
                    self.draft.prepare(rows, plan, shape)
                name = f"{rows} rows × {shape.num_draft_tokens} tokens ({shape})"
                self._warm(self._key(state, plan, shape), name, functools.partial(self._round, state, plan, shape))
            if self._catches_up:
                self._warm((rows, _CATCH_UP), f"{rows} rows, catch up", functools.partial(self.draft.catch_up, state))
            if self.chooses and self.graphs is not None:
                self._measure(state, plan)

    def round_shapes(self) -> list[RoundShape]:
        """Shapes a round may have, by rising number of drafts: plain decoding first where that is a choice."""
        if not self.chooses:
            return [self.shape]
        steps = self.shape.num_steps
        if self.draft.reports_match_length:
            return [chain(n) for n in sorted({0, steps} if self.hardware.is_cuda else {0, min(_SHORT_DRAFT, steps), steps})]
        if self.shape.is_tree:
            return [chain(0), chain(min(_SHORT_DRAFT, steps)), self.shape]
        return [chain(n) for n in sorted({0, min(_SHORT_DRAFT, steps), steps})]

    @property
    def chooses(self) -> bool:
        """Whether rounds may leave drafts out: not where the draft is a model that would miss the tokens of such a round
        (a causal LM, a DFlash head), nor on a CPU for a head, nor where a mean accept length is decreed for every round."""
        if self.draft is None or not self.config.adaptive or self.config.simulate_accept_length is not None:
            return False
        return self.draft.can_skip and (self.draft.reports_match_length or self.hardware.is_cuda)

    @property
    def _catches_up(self) -> bool:
        """Whether rounds leave out a draft that reads the target's hidden states, and has to be told of them later."""
        return self.chooses and bool(self.draft.taps)

    def policy(self, state: DecodeState, plan: SamplingPlan) -> DraftPolicy:
        """What chooses among ``round_shapes`` for this bucket and plan; it remembers earlier requests."""
        key = state.cache_len.shape[0], plan
        if key not in self._policies:
            self._policies[key] = DraftPolicy(tuple(self.round_shapes()))
        return self._policies[key]

    def _warm(self, key: tuple, name: str, step: Callable[[], object]) -> None:
        """Compile or capture ``step`` unless that was done."""
        if key in self._warmed:
            return
        if self.graphs is None:
            with self.compiler.counting():
                step()  # compiles
        else:
            self._capture(key, name, step)
        self._warmed.add(key)

    def _capture(self, key: tuple, name: str, step: Callable[[], object]) -> None:
        start, compiled = time.perf_counter(), self.compiler.seconds
        try:
            self.graphs.capture(key, name, step)
        except RuntimeError as error:  # out of memory, or an operation of the model that cannot be captured
            self.graphs.clear()
            self.graphs = None
            log.warning(
                "the CUDA graph of %s could not be captured (%s); rounds are launched kernel by kernel from now on, which "
                "costs several milliseconds each. After freeing memory, call spec_compile() again to get graphs back.",
                name,
                str(error).splitlines()[0],
            )
            step()
        self.capture_seconds += time.perf_counter() - start - (self.compiler.seconds - compiled)

    def _measure(self, state: DecodeState, plan: SamplingPlan) -> None:
        """Time every shape over the cleared state, so that the first choices know what rounds cost."""
        policy, start = self.policy(state, plan), time.perf_counter()
        for shape in policy.shapes:
            if shape not in policy.round_ms:
                policy.round_ms[shape] = eager_milliseconds(functools.partial(self.launch, state, plan, shape))
        self.capture_seconds += time.perf_counter() - start

    def _catch_up(self, state: DecodeState) -> None:
        """Tell the head of the tokens that plain rounds emitted."""
        if self.graphs is None:
            self.draft.catch_up(state)
        else:
            self.graphs.replay((state.cache_len.shape[0], _CATCH_UP))
        self._plain_rounds = 0

    @staticmethod
    def _key(state: DecodeState, plan: SamplingPlan, shape: RoundShape) -> tuple:
        return state.cache_len.shape[0], shape, plan

    def _round(self, state: DecodeState, plan: SamplingPlan, shape: RoundShape) -> RoundRecord:
        rates = None if self._rates is None else self._rates[: state.cache_len.shape[0]]
        return run_round(self.target, self.draft, state, plan, shape, simulated_rates=rates)

    def launch(self, state: DecodeState, plan: SamplingPlan, shape: RoundShape) -> None:
        """Run one round, or enqueue it on a GPU; its result will stand in ``state.out``."""
        if self.target.taps:
            plain = shape.num_steps == 0
            if self._plain_rounds == MOST_PENDING or (self._plain_rounds > 0 and not plain):
                self._catch_up(state)
            self._plain_rounds += plain
        if self.graphs is None:
            self.last_round = self._round(state, plan, shape)
        else:
            self.last_round = self.graphs.replay(self._key(state, plan, shape))

    def fill(self, rows: int, request: Request) -> DecodeState:
        """A state of ``rows`` rows that holds the request's prompts, the rest padding; nothing is computed."""
        self._buffers.clear()
        state = self._buffers.rows(rows)
        batch = len(request.prompts)
        for row, prompt in enumerate(request.prompts):
            state.tokens[row, : len(prompt)] = prompt.to(self.device)
        for tensor, values in (
            (state.cache_len, [len(p) - 1 for p in request.prompts]),
            (state.end_len, request.end_len),
            (state.position_end, [min(end, self.target.num_positions or end) for end in request.end_len]),
            (state.min_len, request.min_len),
            (state.seed, request.seed),
        ):
            tensor[:batch] = torch.tensor(values, dtype=tensor.dtype, device=self.device)
        state.page_table[:batch] = self.target.programs.pool.page_table[:batch]
        state.state_slot[:batch] = torch.arange(1, batch + 1, dtype=torch.int32, device=self.device)
        state.finished[:batch] = False
        state.eos_ids[: len(request.eos_ids)] = torch.tensor(request.eos_ids, dtype=torch.int64, device=self.device)
        state.temperature.fill_(request.temperature)
        state.top_k.fill_(request.top_k)
        state.top_p.fill_(request.top_p)
        state.min_p.fill_(request.min_p)
        return state

    def _prefill(self, state: DecodeState, request: Request) -> None:
        """Prefill is the round whose root is the prompt's last token and whose window is that token alone."""
        plan, batch = request.plan, len(request.prompts)
        live = state.rows(batch)
        result, states = self.fill_caches(live, request, argmax=plan.ids_only)
        emitted = state.tokens.new_zeros(state.tokens.shape[0], 1)
        emitted[:batch, 0], first_probs = self.first_tokens(result, live, plan)
        slot_probs = None
        if first_probs is not None:
            slot_probs = first_probs.new_zeros(emitted.shape)
            slot_probs[:batch, 0] = first_probs
        accepted = Accepted(emitted, torch.ones_like(state.cache_len), None, slot_probs)
        commit(self.draft, state, accepted, state.cache_len.clone(), self.window_states(states, state))

    def fill_caches(self, live: DecodeState, request: Request, *, argmax: bool) -> tuple[Tensor, Tensor | None]:
        """Run the prompts through the target and the draft; the target's results for the last tokens, see ``prefill``."""
        draft, most = self.draft, self.config.max_prefill_tokens

        def see(first: int, group: list[Tensor], states: Tensor) -> None:
            draft.prefill(group, live.page_table[first : first + len(group)], states, most, first)

        result, states = self.target.prefill(
            request.prompts, live.page_table, argmax=argmax, max_tokens=most, on_group=see if self.target.taps else None
        )
        if draft is not None and not self.target.taps:
            draft.prefill(request.prompts, live.page_table, None, most, 0)
        return result, states

    def window_states(self, states: Tensor | None, state: DecodeState) -> Tensor | None:
        """The last prompt tokens' states [batch, D] in the first slot of a window: [rows, num_steps + 1, D], so that the
        program which extends the draft after a round serves here too."""
        if states is None:
            return None
        window = states.new_zeros(state.tokens.shape[0], self.shape.num_steps + 1, states.shape[1])
        window[: states.shape[0], 0] = states
        return window

    def what_changed(self) -> Iterator[str]:
        """Names of what of the target or the draft is no longer as it was captured."""
        yield from self.target.programs.what_changed()
        for programs in () if self.draft is None else self.draft.programs:
            yield from (f"the draft's {name}" for name in programs.what_changed())

    def captured(self) -> list[tuple[str, int]]:
        """(name, bytes) of every captured graph; they share one pool, so the bytes add up to its size."""
        return [(r.name, r.nbytes) for r in self.graphs.rounds.values()] if self.graphs is not None else []

    def kv_bytes(self) -> int:
        """Bytes of the KV pools, the draft's and recurrent states included."""
        pools = [pool for programs in self.programs() for pool in (programs.pool, programs.states)]
        return sum(pool.nbytes for pool in pools if pool is not None)

    def release(self) -> None:
        """Free pools, buffers and graphs."""
        if self.graphs is not None:
            self.graphs.clear()
        self._buffers = self.last_round = None
        for programs in self.programs():
            programs.release()

    @staticmethod
    def first_tokens(result: Tensor, state: DecodeState, plan: SamplingPlan) -> tuple[Tensor, Tensor | None]:
        """The tokens behind the prompts, int64 [B], from prefill's ids [B] or logits [B, V]; when sampled, one
        probability of each row (``Accepted.slot_probs``)."""
        if plan.ids_only:
            return result, None
        logits = plan.restrict(result[:, None], state)  # [B, 1, V]
        if not plan.do_sample:
            return logits[:, 0].argmax(-1), None
        probs = plan.probabilities(logits, state)[:, 0]
        ids = torch.ops.spec_compile.sample_token(probs, state.seed, state.cache_len + 1, TARGET_STREAM)
        return ids, probs[:, 0]
