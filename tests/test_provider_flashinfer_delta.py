"""FlashInfer as provider of delta rules, without a GPU: what it refuses, and what it asks of FlashInfer.

FlashInfer's function is stood in for by ``flashinfer_in_torch``; ``tests/gpu/test_gdn.py`` runs the real one.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys
from dataclasses import replace

import pytest
import torch
from gdn_contract import Heads, Implementation, check_window, random_pool, random_window, split
from tiny import tiny_model
from torch.library import opcheck

from spec_compile.errors import BackendError
from spec_compile.hardware import Hardware
from spec_compile.ops import linear_attention as ops
from spec_compile.ops import providers
from spec_compile.ops.providers import DeltaNode, delta_flashinfer
from spec_compile.ops.providers.delta_examples import example_arguments
from spec_compile.passes.select_backend import choose
from spec_compile.runtime.model_runner import ModelRunner
from spec_compile.runtime.options import RuntimeOptions
from spec_compile.runtime.program import SegmentCompiler

pytest.importorskip("triton", reason="the kernel that keeps the window needs it")

from flashinfer_in_torch import H200, install_delta_rule

B200 = Hardware("nvidia", "sm100", 148, "NVIDIA B200")
CPU = torch.device("cpu")
HEADS = Heads(1, 2, 128, 128)
NODE = DeltaNode("gdn_verify", "verify", 2, 4, 16, 32, 128, 128, False, torch.bfloat16)
FLASHINFER = Implementation(
    ops.conv_verify, torch.ops.spec_compile.gdn_verify_flashinfer, ops.gdn_commit, ops.conv_prefill, ops.gdn_prefill
)


# ----------------------------------------------------------------------------------------------------------------------
# What it can do, and what it says when it cannot


@pytest.mark.parametrize(
    "changes",
    [{}, {"num_tokens": 1}, {"num_tokens": 16, "batch": 256}, {"num_k_heads": 16, "num_v_heads": 48}, {"v_head_dim": 256}],
)
def test_supports(changes: dict) -> None:
    assert delta_flashinfer.supports(replace(NODE, **changes), H200) is None
    assert delta_flashinfer.supports(replace(NODE, **changes), B200) is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"is_tree": True}, "chains only; triton"),
        ({"op": "gdn_prefill", "batch": None, "num_tokens": None}, "triton computes them"),
        ({"dtype": torch.float16}, "round torch.float16"),
        ({"dtype": torch.float32}, "round torch.float32"),
        ({"head_dim": 64}, "key dim 64"),
        ({"head_dim": 256}, "key dim 256"),
        ({"v_head_dim": 64}, "value dim 64"),
        ({"v_head_dim": 160}, "value dim 160"),
        ({"num_v_heads": 40}, "multiple of 16 key heads"),
        ({"num_tokens": 17}, "longer than 16"),
        ({"state_dtype": torch.bfloat16}, "no kernel for states of torch.bfloat16 on sm90"),
        ({"state_dtype": torch.float16}, "no kernel for states of torch.float16"),
    ],
)
def test_refuses_with_a_reason(changes: dict, words: str) -> None:
    assert words in delta_flashinfer.supports(replace(NODE, **changes), H200)


def test_states_decide_the_kernel() -> None:
    """The decision for 16-bit states stands, though the pool has none: then the reason says so."""
    table = {
        (arch, dtype): delta_flashinfer.state_kernel(arch, dtype)
        for arch in ("sm89", "sm90", "sm100")
        for dtype in (torch.float32, torch.bfloat16)
    }
    assert table == {
        ("sm89", torch.float32): None,
        ("sm89", torch.bfloat16): None,
        ("sm90", torch.float32): "mtp",
        ("sm90", torch.bfloat16): None,
        ("sm100", torch.float32): "mtp",
        ("sm100", torch.bfloat16): "bf16_state",
    }
    assert "keeps states in float32" in delta_flashinfer.supports(replace(NODE, state_dtype=torch.bfloat16), B200)


def test_devices() -> None:
    assert "9.0" in delta_flashinfer.supports(NODE, Hardware("nvidia", "sm89", 142, "NVIDIA L40S"))
    for hardware in (Hardware("cpu", "cpu", 2, "CPU"), Hardware("amd", "gfx942", 304, "MI300X")):
        assert "NVIDIA" in delta_flashinfer.supports(NODE, hardware)


# ----------------------------------------------------------------------------------------------------------------------
# Probing and choosing


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """As if these distributions were there, with modules of theirs; tests take some away."""
    versions = {"flashinfer-python": "0.7.2.post1", "nvidia-cutlass-dsl": "4.8.1"}
    modules = {"flashinfer": "flashinfer-python", "cutlass": "nvidia-cutlass-dsl"}
    find_spec, real_version = importlib.util.find_spec, importlib.metadata.version

    def version(name: str) -> str:
        if name in modules.values() and name not in versions:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions.get(name) or real_version(name)

    def spec(name: str) -> object | None:
        return find_spec(name) if name not in modules else object() if modules[name] in versions else None

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(importlib.util, "find_spec", spec)
    return versions


def test_probe_needs_no_nvcc_and_imports_nothing(installed: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    availability = delta_flashinfer.probe()
    assert availability.ok and availability.version == "0.7.2.post1"
    assert "flashinfer" not in sys.modules and "cutlass" not in sys.modules


@pytest.mark.parametrize(
    ("name", "version", "words"),
    [
        ("flashinfer-python", None, "pip install 'spec-compile[flashinfer]'"),
        ("flashinfer-python", "0.8.0", "flashinfer-python 0.8.0 is not a 0.7.2"),
        ("nvidia-cutlass-dsl", None, "pip install 'nvidia-cutlass-dsl>=4.6.2'"),
        ("nvidia-cutlass-dsl", "4.5.9", "nvidia-cutlass-dsl 4.5.9 is older than 4.6.2"),
    ],
)
def test_probe_says_what_to_install(installed: dict[str, str], name: str, version: str | None, words: str) -> None:
    installed.pop(name) if version is None else installed.update({name: version})
    assert words in delta_flashinfer.probe().problem


def test_triton_comes_first_and_flashinfer_can_be_named(installed: dict[str, str]) -> None:
    automatic = choose(NODE, (0, 1), H200)
    assert automatic.provider == "triton" and automatic.losers["flashinfer"] == "triton comes first"
    assert choose(NODE, (0, 1), H200, "flashinfer").provider == "flashinfer"
    with pytest.raises(BackendError, match=r"chains only(.|\n)*backend={'gdn_verify': 'triton'}"):
        choose(replace(NODE, is_tree=True), (0,), H200, "flashinfer")
    del installed["nvidia-cutlass-dsl"]
    with pytest.raises(BackendError, match="pip install 'nvidia-cutlass-dsl"):
        choose(NODE, (0,), H200, "flashinfer")


# ----------------------------------------------------------------------------------------------------------------------
# The op


pytestmark = pytest.mark.usefixtures("fresh_seed")


@pytest.mark.parametrize("num_tokens", [1, 2, 5])
def test_windows(num_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The common contract: outputs, untouched states, and windows from which the commit goes on."""
    calls = install_delta_rule(monkeypatch)
    check_window(FLASHINFER, rows=2, num_tokens=num_tokens, heads=HEADS, dtype=torch.bfloat16)
    assert len(calls.launches) == 1


@pytest.mark.parametrize("num_tokens", [1, 3])
def test_one_row(num_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain decoding of one request: FlashInfer itself fails there."""
    install_delta_rule(monkeypatch)
    args = arguments(1, num_tokens)
    args[10] = torch.ones(1, dtype=torch.int32)
    args[8:10] = [x.nan_to_num() for x in args[8:10]]
    expected_args = [x.clone() if isinstance(x, torch.Tensor) else x for x in args]
    expected = ops.gdn_verify(*expected_args)
    out = torch.ops.spec_compile.gdn_verify_flashinfer(*args)
    assert out.shape == expected.shape and out.stride() == torch.empty(out.shape).stride()
    torch.testing.assert_close(out, expected, rtol=1e-2, atol=1e-2)
    assert torch.equal(args[8], expected_args[8]) and torch.equal(args[9], expected_args[9])


def arguments(batch: int = 2, num_tokens: int = 3) -> list:
    pool = random_pool(batch, num_tokens + 1, HEADS, torch.bfloat16)
    w = random_window(batch, num_tokens, HEADS, torch.bfloat16)
    mixed = torch.randn(batch, num_tokens, HEADS.channels).bfloat16()
    windows = (pool.state[0].nan_to_num(), pool.kv_window[0], pool.gate_window[0], pool.slots)
    return [*split(mixed, HEADS), w.a, w.b, w.A_log, w.dt_bias, *windows, None, 0.1]


def test_views_of_the_convolutions_output_are_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = install_delta_rule(monkeypatch)
    args = arguments()
    assert not args[2].is_contiguous()
    torch.ops.spec_compile.gdn_verify_flashinfer(*args)
    assert [x.data_ptr() for x in calls.launches[0]["args"][:4]] == [args[i].data_ptr() for i in (0, 1, 2, 7)]


def test_what_is_not_aligned_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """One element off, or rows that are: right all the same."""
    calls = install_delta_rule(monkeypatch)
    args = arguments()
    expected = torch.ops.spec_compile.gdn_verify_flashinfer(*args)
    shifted = list(args)
    for place in (0, 1, 2):
        wide = torch.cat([torch.zeros(*args[place].shape[:2], 4, dtype=torch.bfloat16), args[place].flatten(2)], -1)
        shifted[place] = wide[..., 4:].unflatten(2, args[place].shape[2:])
    for place in (3, 4):
        shifted[place] = args[place].transpose(0, 1).contiguous().transpose(0, 1)
    torch.testing.assert_close(torch.ops.spec_compile.gdn_verify_flashinfer(*shifted), expected, rtol=0, atol=0)
    assert all(x.data_ptr() % 16 == 0 for x in calls.launches[1]["args"][:3])


def test_what_it_would_round_or_read_wrongly_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = install_delta_rule(monkeypatch)
    args = arguments()
    with pytest.raises(BackendError, match="round"):
        torch.ops.spec_compile.gdn_verify_flashinfer(*args[:3], args[3].float(), *args[4:])
    with pytest.raises(BackendError, match="chains only"):
        torch.ops.spec_compile.gdn_verify_flashinfer(*args[:11], torch.zeros(2, 3, 1, dtype=torch.int32), 0.1)
    assert not calls.launches


def test_warm_up_makes_what_capture_must_not_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlashInfer keeps a counter by batch and a kernel by window: both as the node has them."""
    calls = install_delta_rule(monkeypatch)
    delta_flashinfer.warm_up(NODE, CPU)
    q, k, v, _, slots = calls.launches[0]["args"]
    assert q.shape == k.shape == (2, 4, 16, 128) and v.shape == (2, 4, 32, 128) and len(slots) == 2
    assert calls.launches[0]["scale"] == 128**-0.5 and not slots.any()


def test_registration(monkeypatch: pytest.MonkeyPatch) -> None:
    install_delta_rule(monkeypatch)
    args = arguments()
    args[8:10] = [x.nan_to_num() for x in args[8:10]]  # opcheck compares what was not written too
    opcheck(torch.ops.spec_compile.gdn_verify_flashinfer, [x.contiguous() if i < 3 else x for i, x in enumerate(args)])


def test_the_schema_is_the_generic_ops() -> None:
    ours = str(delta_flashinfer.lower(NODE)._schema).replace("gdn_verify_flashinfer", "gdn_verify")
    assert ours == str(ops.gdn_verify._opoverload._schema)
    assert set(providers.names(NODE)) == {"torch", "triton", "flashinfer", "fla"}


def test_example_arguments_mean_something() -> None:
    for op in ("gdn_verify", "gdn_prefill"):
        for live in (False, True):
            node = replace(NODE, op=op, num_k_heads=1, num_v_heads=2, head_dim=8, v_head_dim=12, is_tree=op == "gdn_verify")
            args = example_arguments(node, CPU, live=live, num_tokens=7)
            out = getattr(torch.ops.spec_compile, op)(*args)
            assert bool(out.isfinite().all()) and bool(out.count_nonzero()) == live


# ----------------------------------------------------------------------------------------------------------------------
# In a model


def test_a_models_windows(installed: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU in name: the window of a bfloat16 model is FlashInfer's where that was asked for, and says what ``torch`` says."""
    calls = install_delta_rule(monkeypatch)
    dims = {"linear_num_key_heads": 1, "linear_num_value_heads": 2, "linear_key_head_dim": 128, "linear_value_head_dim": 128}
    model = tiny_model("qwen3_5_text", **dims).bfloat16()
    logits = {}
    for name in ("torch", "flashinfer"):
        backend = {"verify": "torch", "prefill": "torch", "gdn_verify": name}
        options = RuntimeOptions(H200, SegmentCompiler("none", H200), backend=backend, page_size=16)
        runner = ModelRunner(model, "verify", options)
        runner.programs.reserve(2, 32, most_tokens=4)
        torch.manual_seed(0)
        runner.programs.states.state.normal_(), runner.programs.states.conv.normal_()
        program = runner.window_program(2, 3, argmax=False)
        window = {
            "input_ids": torch.arange(3, 9).view(2, 3),
            "position_ids": torch.arange(3).repeat(2, 1),
            "page_table": runner.programs.pool.page_table,
            "cache_len": torch.zeros(2, dtype=torch.int32),
            "state_slot": torch.tensor([1, 2], dtype=torch.int32),
        }
        logits[name] = program(**window)[0]
    assert len(calls.launches) == 2, "the warm-up and the window"
    torch.testing.assert_close(logits["flashinfer"], logits["torch"], rtol=2e-2, atol=2e-2)
