"""``backend="tune"``: what is timed, what is remembered, and when it is timed again. Timers are fake: no GPU is needed."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny import left_padded, tiny_model
from torch import Tensor

from spec_compile import spec_compile
from spec_compile.hardware import Hardware
from spec_compile.ops import providers
from spec_compile.ops.providers import AttentionNode, Availability, DeltaNode, Lowered, delta_examples
from spec_compile.ops.providers.examples import CACHE_PLACES, example_arguments
from spec_compile.passes import select_backend
from spec_compile.runtime import tune
from spec_compile.runtime.model_runner import ModelRunner
from spec_compile.runtime.options import RuntimeOptions
from spec_compile.runtime.program import SegmentCompiler
from spec_compile.runtime.tune import AttentionTuner, num_layers

H200 = Hardware("nvidia", "sm90", 132, "NVIDIA H200")
CPU = torch.device("cpu")
TIMES = {"triton": 10.5, "torch": 90.0}

NODE = AttentionNode(
    op="attention", stage="verify", batch=2, num_tokens=4, num_q_heads=4, num_kv_heads=2, head_dim=16, v_head_dim=16,
    page_size=16, window=0, softcap=0.0, has_sinks=False, is_tree=False, dtype=torch.bfloat16, kv_dtype=torch.bfloat16,
    max_context=64,
)  # fmt: skip
DELTA_NODE = DeltaNode("gdn_verify", "verify", 2, 4, 2, 4, 16, 24, False, torch.bfloat16)


class Stopwatch:
    """Gives the times it was made with and counts what it was asked to time."""

    def __init__(self, times: dict[str, float | Exception]) -> None:
        self.times, self.asked = times, []

    def __call__(self, node: AttentionNode, name: str, device: torch.device) -> float:
        self.asked.append((node, name))
        result = self.times[name]
        if isinstance(result, Exception):
            raise result
        return result


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "not yet" / "tuning.json"


def tuner(path: Path, times: dict | None = None, hardware: Hardware = H200) -> AttentionTuner:
    return AttentionTuner(hardware, CPU, False, path, Stopwatch(TIMES if times is None else times))


# ----------------------------------------------------------------------------------------------------------------------
# Remembering


def test_every_candidate_is_timed_once_and_remembered_across_processes(path: Path):
    first = tuner(path)
    measured = first(NODE, ("triton", "torch"))
    assert measured.microseconds == TIMES and measured.failed == {} and "measured now on this NVIDIA H200" in measured.source
    assert first.time_candidate.asked == [(NODE, "triton"), (NODE, "torch")]
    second = tuner(path, {})  # would fail if it timed anything
    again = second(NODE, ("triton", "torch"))
    assert again.microseconds == TIMES and "measured earlier" in again.source and second.time_candidate.asked == []


@pytest.mark.parametrize(
    "change",
    [
        lambda t, n, names: (t, replace(n, max_context=128), names),
        lambda t, n, names: (t, replace(n, batch=1), names),
        lambda t, n, names: (t, replace(n, kv_dtype=torch.float8_e4m3fn), names),
        lambda t, n, names: (t, n, ("torch",)),
        lambda t, n, names: (tuner(t.path, hardware=replace(H200, name="NVIDIA H100")), n, names),
        lambda t, n, names: (tuner(t.path, hardware=replace(H200, arch="sm100")), n, names),
    ],
    ids=["context", "batch", "cache type", "candidates", "device", "arch"],
)
def test_another_question_is_timed_anew(path: Path, change: Callable):
    names = ("triton", "torch")
    tuner(path)(NODE, names)
    fresh, node, names = change(tuner(path), NODE, names)
    fresh(node, names)
    assert [name for _, name in fresh.time_candidate.asked] == list(names)
    assert len(json.loads(path.read_text())) == 2, "the earlier answer is kept"


@pytest.mark.parametrize("what", ["torch", "triton", "provider", "sources"])
def test_other_versions_are_timed_anew(path: Path, what: str, monkeypatch: pytest.MonkeyPatch):
    import triton

    tuner(path)(NODE, ("triton", "torch"))
    if what == "torch":
        monkeypatch.setattr(torch, "__version__", "99.0")
    elif what == "triton":
        monkeypatch.setattr(triton, "__version__", "99.0")
    elif what == "sources":
        monkeypatch.setattr(tune, "source_hash", lambda: "another")
    else:
        real = providers.load
        newer = SimpleNamespace(probe=lambda: Availability("99.0"))
        monkeypatch.setattr(providers, "load", lambda name, *_: newer if name == "triton" else real(name, *_))
    fresh = tuner(path)
    fresh(NODE, ("triton", "torch"))
    assert len(fresh.time_candidate.asked) == 2


@pytest.mark.parametrize(
    "content", ["", "{", "[1, 2]", '{"a": 1}', '{"a": {"microseconds": {"triton": "fast"}, "failed": {}}}', b"\xff\xfe"]
)
def test_a_file_that_is_not_ours_is_replaced(path: Path, content: str | bytes):
    path.parent.mkdir()
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert tuner(path)(NODE, ("triton", "torch")).microseconds == TIMES
    assert [entry["microseconds"] for entry in json.loads(path.read_text()).values()] == [TIMES]


def test_a_directory_that_cannot_be_written_costs_nothing_but_the_memory(path: Path):
    path.parent.write_text("a file where a directory should be")
    assert tuner(path)(NODE, ("triton", "torch")).microseconds == TIMES
    assert path.parent.read_text().startswith("a file")


def test_the_file_is_never_half_written(path: Path):
    """A reader beside many writers always finds JSON, and nothing is left behind."""
    names, seen, stop = ("triton", "torch"), [], threading.Event()

    def read() -> None:
        while not stop.is_set():
            if path.exists():
                seen.append(len(json.loads(path.read_text())))

    reader = threading.Thread(target=read)
    reader.start()
    for batch in range(1, 30):
        tuner(path)(replace(NODE, batch=batch), names)
    stop.set()
    reader.join()
    assert len(json.loads(path.read_text())) == 29 and [p.name for p in path.parent.iterdir()] == [path.name]
    assert seen == sorted(seen)


def test_the_file_lies_in_the_users_cache_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("SPEC_COMPILE_CACHE_DIR", str(tmp_path))
    assert AttentionTuner(H200, CPU).path == tmp_path / "attention-tuning.json"


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no"), RuntimeError("nvcc died\nof something"), ValueError("bad")])
def test_one_that_fails_loses_and_stays_out_while_another_ran(path: Path, error: Exception):
    measured = tuner(path, {"triton": error, "torch": 90.0})(NODE, ("triton", "torch"))
    assert measured.microseconds == {"torch": 90.0} and set(measured.failed) == {"triton"}
    assert "\n" not in measured.failed["triton"]
    again = tuner(path, {})(NODE, ("triton", "torch"))  # would raise if it timed anything
    assert again.microseconds == measured.microseconds and again.failed == measured.failed


def test_where_all_fail_nothing_is_remembered(path: Path):
    failing = {"triton": RuntimeError("no"), "torch": torch.OutOfMemoryError("no")}
    measured = tuner(path, failing)(NODE, ("triton", "torch"))
    assert not measured.microseconds and set(measured.failed) == {"triton", "torch"} and not path.exists()


# ----------------------------------------------------------------------------------------------------------------------
# What is timed


def test_layers_are_many_enough_to_leave_the_cache_and_few_enough_to_fit():
    mib = 2**20
    assert num_layers(1 * mib, 50 * mib, 100_000 * mib) == 16
    assert num_layers(30 * mib, 50 * mib, 100_000 * mib) == 5, "three times the L2 cache"
    assert num_layers(900 * mib, 50 * mib, 100_000 * mib) == 4
    assert num_layers(900 * mib, 50 * mib, 8_000 * mib) == 2, "a quarter of what is free"
    assert num_layers(9000 * mib, 50 * mib, 8_000 * mib) == 1
    assert num_layers(2 * mib, 50 * mib, 100_000 * mib, 128) == 75, "states are small: more layers"


@pytest.fixture
def small_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "_memory", lambda device: (1 << 16, 1 << 30))


def test_a_windows_rows_are_three_quarters_full_on_pages_of_their_own(small_device: None):
    layers = tune.example_layers(NODE, CPU)
    assert len(layers) >= 4
    table, lengths = layers[0][5], layers[0][6]
    assert lengths.tolist() == [44, 44], "48 of 64 slots, the window of 4 included"
    assert len(set(table.flatten().tolist())) == table.numel() and int(table.min()) == 1
    caches = [layer[place] for layer in layers for place in CACHE_PLACES["attention"]]
    assert len({cache.data_ptr() for cache in caches}) == len(caches), "each layer has its own"
    assert all(int(cache.count_nonzero()) > 0.9 * cache.numel() for cache in caches)
    assert all(layer[5] is table for layer in layers), "one page table for all, so that one plan serves all"


@pytest.mark.parametrize("op", ["attention", "mla_attention", "prefill_attention", "mla_prefill_attention"])
@pytest.mark.parametrize("kv_dtype", [torch.bfloat16, torch.float8_e4m3fn], ids=["bf16", "fp8"])
def test_example_arguments_are_those_of_the_generic_op(op: str, kv_dtype: torch.dtype):
    packed, latent = "prefill" in op, "mla" in op
    node = replace(
        NODE, op=op, kv_dtype=kv_dtype, is_tree=not packed, has_sinks=True, window=9,
        **({"batch": None, "num_tokens": None, "stage": "prefill"} if packed else {}),
        **({"num_kv_heads": 1, "head_dim": 24, "v_head_dim": 16} if latent else {}),
    )  # fmt: skip
    for context in (None, 20):
        args = example_arguments(node, CPU, context=0 if packed and context else context)
        out = getattr(torch.ops.spec_compile, op)(*args)  # the schema accepts them, and they mean something
        assert out.shape[-2:] == (4, 16) and bool(out.isfinite().all())
        assert all(args[place].dtype == kv_dtype for place in CACHE_PLACES[op])
        assert (int(args[CACHE_PLACES[op][0]].shape[0]) == 1) == (context is None)


def test_a_chain_as_a_tree_is_a_chain():
    """40 tokens: more than one mask word, and bit 31 of a signed one."""
    node = replace(NODE, num_tokens=40, is_tree=True, dtype=torch.float32, kv_dtype=torch.float32)
    args = list(example_arguments(node, CPU, context=10))
    assert args[7].shape == (2, 40, 2) and args[7].dtype == torch.int32
    tree = torch.ops.spec_compile.attention(*args)
    args[7] = None
    assert torch.equal(tree, torch.ops.spec_compile.attention(*args))


def test_a_layers_time_is_the_graphs_divided_by_its_layers_with_one_plan(small_device: None, monkeypatch: pytest.MonkeyPatch):
    """The whole of ``microseconds`` on a CPU, with the clock replaced: one plan, one call a layer."""
    calls: list[str] = []

    def plan(*args: object) -> tuple[Tensor, Tensor]:
        calls.append("plan")
        assert args[-1] == 7 and args[2] is None
        return torch.zeros(1), torch.ones(1)

    class Op:
        _schema = torch.ops.spec_compile.attention.default._schema

        def __call__(self, *args: object) -> None:
            calls.append("op")
            assert len(args) == 14 and args[-1].item() == 1

    provider = SimpleNamespace(warm_up=lambda node, device: calls.append("warm"), lower=lambda node: Lowered(Op(), plan, (7,)))
    monkeypatch.setattr(providers, "load", lambda *_: provider)
    monkeypatch.setattr(torch.cuda, "device", lambda device: torch.no_grad())
    clocks = {"graph": 0, "eager": 0}

    def clock(kind: str) -> Callable:
        def milliseconds(step: Callable[[], object]) -> float:
            clocks[kind] += 1
            step()
            return 0.5

        return milliseconds

    monkeypatch.setattr(tune, "graph_milliseconds", clock("graph"))
    monkeypatch.setattr(tune, "eager_milliseconds", clock("eager"))
    layers = len(tune.example_layers(NODE, CPU))
    assert tune.microseconds(NODE, "any", CPU) == 500.0 / layers
    assert calls == ["warm", "plan", *["op"] * layers] and clocks == {"graph": 1, "eager": 0}


def test_prompts_are_timed_as_they_run_without_a_graph(small_device: None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "device", lambda device: torch.no_grad())
    monkeypatch.setattr(tune, "eager_milliseconds", lambda step: step() or 1.0)
    prompt = replace(NODE, op="prefill_attention", stage="prefill", batch=None, num_tokens=None)
    layers = tune.example_layers(prompt, CPU)
    assert layers[0][6].tolist() == [0, 48], "one prompt, three quarters of a row"
    assert tune.microseconds(prompt, "torch", CPU) == 1000.0 / len(layers)


def test_delta_rules_are_timed_over_states_of_their_own(small_device: None, monkeypatch: pytest.MonkeyPatch):
    """The same way, by providers of delta rules; their file entry is another than that of any attention node."""
    layers = tune.example_layers(DELTA_NODE, CPU)
    own = [layer[place] for layer in layers for place in delta_examples.STATE_PLACES["gdn_verify"]]
    assert len(layers) >= 4 and len({tensor.data_ptr() for tensor in own}) == len(own)
    assert sum(layer[7].nbytes for layer in layers) > 1.5 * (1 << 16), "past the L2 cache"
    assert all(int(layer[7].count_nonzero()) > 0.9 * layer[7].numel() for layer in layers)
    assert layers[0][10].tolist() == [1, 2], "rows of their own"
    monkeypatch.setattr(torch.cuda, "device", lambda device: torch.no_grad())
    monkeypatch.setattr(tune, "graph_milliseconds", lambda step: step() or 0.5)
    monkeypatch.setattr(tune, "eager_milliseconds", lambda step: step() or 1.0)
    assert tune.microseconds(DELTA_NODE, "torch", CPU) == 500.0 / len(layers)
    prompt = replace(DELTA_NODE, op="gdn_prefill", stage="prefill", batch=None, num_tokens=None)
    assert tune.microseconds(prompt, "torch", CPU) == 1000.0 / len(tune.example_layers(prompt, CPU))


def test_delta_rules_are_remembered_and_chosen_by_their_times(path: Path, monkeypatch: pytest.MonkeyPatch):
    big = replace(DELTA_NODE, num_k_heads=16, num_v_heads=32, head_dim=128, v_head_dim=128)
    usable = SimpleNamespace(probe=lambda: Availability("0.7.2"), supports=lambda node, hardware: None)
    real = providers.load_for
    monkeypatch.setattr(providers, "load_for", lambda node, name: usable if name == "flashinfer" else real(node, name))
    choice = select_backend.choose(big, (0,), H200, "tune", tuner(path, {"triton": 9.0, "flashinfer": 7.0, "torch": 99.0}))
    assert choice.provider == "flashinfer" and choice.losers["triton"] == "9.0 µs"
    again = select_backend.choose(big, (0,), H200, "tune", tuner(path, {}))  # would fail if it timed anything
    assert again.provider == "flashinfer" and "measured earlier" in again.reason
    other = tuner(path, {"triton": 1.0, "flashinfer": 2.0, "torch": 3.0})
    assert select_backend.choose(replace(big, num_tokens=8), (0,), H200, "tune", other).provider == "triton"


# ----------------------------------------------------------------------------------------------------------------------
# In a model


def test_a_runner_tunes_over_its_pool_and_not_before(path: Path):
    """A GPU in name, both candidates on the CPU: what is timed is the pool's real shape, once a stage and capacity."""
    timed = tuner(path, {"torch": 3.0, "triton": 5.0})
    backend = {"verify": "tune", "prefill": "torch"}
    options = RuntimeOptions(H200, SegmentCompiler("none", H200), backend=backend, page_size=16, tuner=timed)
    runner = ModelRunner(tiny_model("llama"), "verify", options)
    assert timed.time_candidate.asked == []
    runner.programs.reserve(2, 40)
    runner.window_program(2, 3, argmax=True)
    nodes = [node for node, _ in timed.time_candidate.asked]
    assert {(n.stage, n.batch, n.num_tokens, n.max_context) for n in nodes} == {("verify", 2, 3, 48)}
    assert [c.provider for c in runner.programs.choices["verify, 2 rows × 3 tokens"]] == ["torch"]
    runner.window_program(2, 3, argmax=False)
    assert len(timed.time_candidate.asked) == len(nodes), "the same shape was remembered"


def test_on_a_cpu_tuning_is_automatic_and_explain_says_so():
    model = spec_compile(tiny_model("llama"), backend="tune", compile="none", adaptive=False)
    plain = tiny_model("llama").generate(**left_padded(2, 9), max_new_tokens=6, do_sample=False)
    assert torch.equal(model.generate(**left_padded(2, 9), max_new_tokens=6, do_sample=False), plain)
    text = model.spec.explain()
    assert "torch: tuning measures GPUs only: first of torch on cpu" in text
