"""No host sync in a round: whole rounds over fake tensors of a device that is not the host's.

Data on that device cannot be read, so whatever needs a value (``item``, ``tolist``, ``nonzero``, ``if tensor``) raises, and so
does every tensor that crosses between host and device. Model graphs are captured for real, then bound to fakes. What the
custom ops do inside is their fakes' business here; their kernels are held to the same on a GPU, by CUDA-graph capture.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tiny import tiny_model
from torch import Tensor, fx
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from spec_compile.config import RoundShape, chain
from spec_compile.drafts.causal_lm import CausalLMDraft
from spec_compile.drafts.dflash import DFlashDraft
from spec_compile.drafts.dflash_runner import DFlashRunner
from spec_compile.drafts.eagle import EagleDraft
from spec_compile.drafts.head_runner import HeadRunner
from spec_compile.drafts.mtp_layers import MtpLayersDraft
from spec_compile.drafts.ngram import NgramDraft
from spec_compile.drafts.pending import PendingStates
from spec_compile.hardware import Hardware
from spec_compile.hf_integration.heads.dflash import random_dflash_head
from spec_compile.hf_integration.heads.eagle3 import random_eagle3_head
from spec_compile.hf_integration.heads.mtp import random_mtp_layers
from spec_compile.hf_integration.taps import Tap
from spec_compile.runtime.draft import MOST_PENDING, Draft, Proposal, RoundInputs
from spec_compile.runtime.model_runner import ModelRunner
from spec_compile.runtime.options import RuntimeOptions
from spec_compile.runtime.program import SegmentCompiler
from spec_compile.runtime.programs import Programs
from spec_compile.runtime.round import run_round
from spec_compile.runtime.state import DecodeState, SamplingPlan, new_state

# Builds of torch without CUDA cannot even pretend to have one; there the meta device stands in for the GPU.
DEVICE = torch.device("cuda" if torch.backends.cuda.is_built() else "meta")
ROWS, NUM_STEPS, CAPACITY = 2, 3, 128
TREE = RoundShape(NUM_STEPS, 3, 8)
CPU = Hardware("cpu", "cpu", 1, "CPU")
OPTIONS = RuntimeOptions(CPU, SegmentCompiler("none", CPU))


class HostSync(AssertionError):
    """A tensor crossed between host and device."""


class NothingCrosses(TorchDispatchMode):
    """Raises for ops that take or give tensors of both sides. A host scalar is no transfer: kernels get it by value."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = [t for t in tree_leaves((args, kwargs or {})) if isinstance(t, Tensor) and (t.dim() > 0 or t.device == DEVICE)]
        sides = {t.device.type for t in given + [t for t in tree_leaves(result) if isinstance(t, Tensor)]}
        if len(sides) > 1:
            raise HostSync(f"{func} runs between {' and '.join(sorted(sides))}")
        return result


class NothingIsUploaded(TorchFunctionMode):
    """Raises for tensors made of Python values: on a GPU that is a copy from pageable host memory."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (torch.tensor, torch.as_tensor, torch.from_numpy):
            raise HostSync(f"{func.__name__} uploads from the host")
        return func(*args, **(kwargs or {}))


class FakeRounds:
    """A target with the drafts that have a model, captured once, weights, caches and states replaced by fakes on ``DEVICE``.

    One of the target's layers is recurrent, the other has attention. MTP layers have a smaller target.
    """

    def __init__(self) -> None:
        self.mode = FakeTensorMode(allow_non_fake_inputs=False)
        self._fakes: dict[int, Tensor] = {}
        model = tiny_model("qwen3_5_text")
        head = random_eagle3_head(model, draft_vocab_size=64)
        self.target, draft = self._runner(model, "verify"), self._runner(tiny_model("llama", num_hidden_layers=1), "draft")
        block_head = random_dflash_head(model, NUM_STEPS + 3, num_hidden_layers=2, taps=head.taps)
        self.tapped = self._runner(model, "verify", taps=head.taps)
        blocks = DFlashRunner(block_head, OPTIONS)
        heads = HeadRunner(head, OPTIONS)
        for argmax in (True, False):
            for num_tokens in (NUM_STEPS + 1, 1):
                self.target.window_program(ROWS, num_tokens, argmax=argmax)
                self.tapped.window_program(ROWS, num_tokens, argmax=argmax)
            self.tapped.window_program(ROWS, TREE.num_draft_tokens, argmax=argmax, tree=True)
            for num_tokens, stage in ((2, "draft_extend"), (1, "draft")):
                draft.window_program(ROWS, num_tokens, argmax=argmax, stage=stage)
        self.drafts = {
            "none": None,
            "ngram": NgramDraft(chain(NUM_STEPS), 1, 3),
            "causal_lm": CausalLMDraft(draft, chain(NUM_STEPS), 96),
        }
        for kind, shape in (("eagle chain", chain(NUM_STEPS)), ("eagle tree", TREE)):
            eagle = self.drafts[kind] = EagleDraft(heads, shape, 96)
            eagle.reserve(ROWS, CAPACITY)
            eagle.prepare(ROWS, SamplingPlan(), shape)
            self._fake_buffers(eagle)
        heads.extend_program(ROWS, MOST_PENDING)
        small = tiny_model("llama", num_hidden_layers=1)
        layers = random_mtp_layers(small, NUM_STEPS).heads
        in_turn = [HeadRunner(layer, OPTIONS) for layer in layers]
        self.small = self._runner(small, "verify", taps=layers[0].taps)
        mtp = self.drafts["mtp layers"] = MtpLayersDraft(tuple(in_turn), chain(NUM_STEPS), 96)
        mtp.reserve(ROWS, CAPACITY)
        mtp.prepare(ROWS, SamplingPlan(), mtp.shape)
        self._fake_buffers(mtp)
        for runner in in_turn:
            runner.extend_program(ROWS, NUM_STEPS - 1 + MOST_PENDING, all_states=True)
        for argmax, num_tokens in ((True, 1), (True, NUM_STEPS + 1), (False, NUM_STEPS + 1)):
            self.small.window_program(ROWS, num_tokens, argmax=argmax)
        dflash = self.drafts["dflash"] = DFlashDraft(blocks, chain(NUM_STEPS), 96)
        dflash.reserve(ROWS, CAPACITY)
        dflash.prepare(ROWS, SamplingPlan(), dflash.shape)
        dflash.block_mask = self._fake(dflash.block_mask)
        for runner in (self.target, self.tapped, self.small, draft, heads, blocks, *in_turn):
            self._to_device(runner.programs)
        head.draft_ids = self._fake(head.draft_ids)

    @staticmethod
    def _runner(model: PreTrainedModel, stage: str, taps: tuple[Tap, ...] = ()) -> ModelRunner:
        runner = ModelRunner(model, stage, OPTIONS, taps)
        runner.programs.reserve(ROWS, CAPACITY, TREE.num_draft_tokens)
        return runner

    def _fake_buffers(self, draft: EagleDraft | MtpLayersDraft) -> None:
        for name, value in vars(draft).items():
            if isinstance(value, Tensor):
                setattr(draft, name, self._fake(value))
        draft.pending = PendingStates(self._fake(draft.pending.states), self._fake(draft.pending.count))

    def _target(self, draft: Draft | None) -> ModelRunner:
        """The target that puts out what ``draft`` reads."""
        taps = () if draft is None else draft.taps
        return next(runner for runner in (self.target, self.tapped, self.small) if runner.taps == taps)

    def _to_device(self, programs: Programs) -> None:
        for program in programs.built.values():
            program.bound = [self._fake(b) if isinstance(b, Tensor) else b for b in program.bound]
            _move(program.gm)
        if programs.states is not None:
            for name, value in vars(programs.states).items():
                setattr(programs.states, name, self._fake(value) if isinstance(value, Tensor) else value)
        caches = programs.pool.caches
        caches.update({key: self._fake(cache) for key, cache in caches.items()})

    def _fake(self, tensor: Tensor) -> Tensor:
        """The same fake for the same memory: a cache that two programs share stays one."""
        key = tensor.data_ptr()
        if key not in self._fakes or self._fakes[key].shape != tensor.shape:
            with self.mode:
                self._fakes[key] = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=DEVICE)
        return self._fakes[key]

    def run(self, draft: Draft | str | None, plan: SamplingPlan, *, simulate: bool = False) -> DecodeState:
        """One round over a fake state; returns it. ``draft``: one of ``drafts`` by name, or any other."""
        draft = self.drafts[draft] if isinstance(draft, str) else draft
        with torch.no_grad(), self.mode:
            rates = torch.empty(ROWS, NUM_STEPS, device=DEVICE) if simulate else None
            state = new_state(ROWS, CAPACITY, 1, NUM_STEPS, DEVICE)
            with NothingCrosses(), NothingIsUploaded():
                run_round(
                    self._target(draft), draft, state, plan, chain(0) if draft is None else draft.shape, simulated_rates=rates
                )
        return state


def _move(gm: fx.GraphModule) -> None:
    """Devices that the capture on a CPU wrote into the graph, as a capture on ``DEVICE`` would have written them."""
    for module in gm.modules():
        if isinstance(module, fx.GraphModule):
            for node in module.graph.nodes:
                node.args = fx.node.map_aggregate(node.args, _moved)
                node.kwargs = fx.node.map_aggregate(node.kwargs, _moved)
            module.recompile()


def _moved(argument: object) -> object:
    return DEVICE if isinstance(argument, torch.device) or argument == "cpu" else argument


@pytest.fixture(scope="module")
def rounds() -> FakeRounds:
    return FakeRounds()


PLANS = {
    "greedy": SamplingPlan(),
    "greedy, min_len": SamplingPlan(use_min_len=True),
    "sampling": SamplingPlan(do_sample=True),
    "top-k": SamplingPlan(do_sample=True, max_top_k=8),
    "top-p": SamplingPlan(do_sample=True, use_top_p=True),
    "min-p": SamplingPlan(do_sample=True, use_min_p=True),
    "everything": SamplingPlan(do_sample=True, max_top_k=8, use_top_p=True, use_min_p=True, use_min_len=True),
}
ON_DEVICE = f"fake {DEVICE.type}"


@pytest.mark.parametrize("plan", PLANS.values(), ids=[f"{ON_DEVICE}, {name}" for name in PLANS])
@pytest.mark.parametrize("kind", ["none", "ngram", "causal_lm", "eagle chain", "eagle tree", "dflash", "mtp layers"])
def test_a_round_never_waits_for_the_device(rounds: FakeRounds, kind: str, plan: SamplingPlan):
    state = rounds.run(kind, plan)
    assert state.out.device.type == DEVICE.type and state.cache_len.device.type == DEVICE.type


@pytest.mark.parametrize("plan", [PLANS["greedy"], PLANS["sampling"]], ids=["greedy", "sampling"])
@pytest.mark.parametrize("kind", ["causal_lm", "eagle chain", "eagle tree", "dflash", "mtp layers"])
def test_simulated_acceptance_neither(rounds: FakeRounds, kind: str, plan: SamplingPlan):
    rounds.run(kind, plan, simulate=True)


@pytest.mark.parametrize("kind", ["eagle chain", "mtp layers"])
def test_a_plain_round_and_catching_up_neither(rounds: FakeRounds, kind: str):
    draft = rounds.drafts[kind]
    with torch.no_grad(), rounds.mode:
        state = new_state(ROWS, CAPACITY, 1, NUM_STEPS, DEVICE)
        with NothingCrosses(), NothingIsUploaded():
            run_round(rounds._target(draft), draft, state, PLANS["greedy"], chain(0))
            draft.catch_up(state)


# ----------------------------------------------------------------------------------------------------------------------
# Negative controls: each of these, planted in a round, must make the test above fail


def item(state: DecodeState) -> None:
    state.cache_len.max().item()


def tolist(state: DecodeState) -> None:
    state.cache_len.tolist()


def condition(state: DecodeState) -> None:
    if state.finished.all():
        pass


def nonzero(state: DecodeState) -> None:
    state.finished.nonzero()


def boolean_index(state: DecodeState) -> None:
    state.tokens[~state.finished]


def unique(state: DecodeState) -> None:
    state.tokens.unique()


def to_host(state: DecodeState) -> None:
    state.cache_len.cpu()


def from_host(state: DecodeState) -> None:
    state.cache_len.copy_(torch.arange(ROWS, dtype=torch.int32))


def host_operand(state: DecodeState) -> None:
    state.cache_len + torch.arange(ROWS)


def host_index(state: DecodeState) -> None:
    state.tokens[torch.arange(ROWS)]


def upload(state: DecodeState) -> None:
    torch.tensor([1, 2], device=DEVICE)


FAULTS = {
    item: DataDependentOutputException,
    tolist: DataDependentOutputException,
    condition: DataDependentOutputException,
    nonzero: DynamicOutputShapeException,
    boolean_index: DynamicOutputShapeException,
    unique: DynamicOutputShapeException,
    to_host: HostSync,
    from_host: HostSync,
    host_operand: RuntimeError,  # "Expected all tensors to be on the same device", worded and typed by version
    host_index: HostSync,
    upload: HostSync,
}


class FaultyDraft(NgramDraft):
    """An n-gram draft that does something else before it proposes."""

    def __init__(self, fault: Callable[[DecodeState], None]) -> None:
        super().__init__(chain(NUM_STEPS), 1, 3)
        self.fault = fault

    def propose(self, state: DecodeState, plan: SamplingPlan, shape: RoundShape, inputs: RoundInputs) -> Proposal:
        self.fault(state)
        return super().propose(state, plan, shape, inputs)


@pytest.mark.parametrize("fault,error", FAULTS.items(), ids=lambda value: value.__name__)
def test_a_planted_sync_is_caught(rounds: FakeRounds, fault: Callable, error: type[Exception]):
    with pytest.raises(error):
        rounds.run(FaultyDraft(fault), PLANS["greedy"])


def test_an_innocent_addition_is_not(rounds: FakeRounds):
    rounds.run(FaultyDraft(lambda state: state.cache_len + state.cache_len * 2), PLANS["greedy"])


def test_real_tensors_cannot_slip_in(rounds: FakeRounds):
    real = torch.zeros(ROWS, dtype=torch.int32)
    with pytest.raises((AssertionError, RuntimeError), match=r"(?i)fake"):
        rounds.run(FaultyDraft(lambda state: state.cache_len.add_(real)), PLANS["greedy"])
