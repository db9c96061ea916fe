"""fla as provider of prompts of gated delta nets, without a GPU: what it refuses, and what it asks of fla.

fla's function is stood in for by ``fla_in_torch``; ``tests/gpu/test_gdn.py`` runs the real one.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from gdn_contract import Heads, Implementation, check_prompts, close
from tiny import tiny_model
from torch.library import opcheck

from spec_compile.errors import BackendError
from spec_compile.hardware import Hardware
from spec_compile.ops import linear_attention as ops
from spec_compile.ops import providers
from spec_compile.ops.providers import DeltaNode, Lowered, delta_fla
from spec_compile.ops.providers.delta_examples import example_arguments
from spec_compile.passes.select_backend import choose
from spec_compile.runtime.model_runner import ModelRunner
from spec_compile.runtime.options import RuntimeOptions
from spec_compile.runtime.program import SegmentCompiler

pytest.importorskip("triton", reason="the kernel before fla's needs it")

from fla_in_torch import install

H200 = Hardware("nvidia", "sm90", 132, "NVIDIA H200")
CPU = torch.device("cpu")
NODE = DeltaNode("gdn_prefill", "prefill", None, None, 16, 32, 128, 128, False, torch.bfloat16)
# Several key heads: a single token of one head alone may have q · k near 0, and then any rounding is large.
SMALL = replace(NODE, num_k_heads=8, num_v_heads=16, head_dim=8, v_head_dim=12)


# ----------------------------------------------------------------------------------------------------------------------
# What it can do, and what it says when it cannot


@pytest.mark.parametrize("arch", ["sm80", "sm90", "sm120"])
@pytest.mark.parametrize(
    "changes", [{}, {"dtype": torch.float16}, {"num_v_heads": 16}, {"head_dim": 256}, {"v_head_dim": 512}, {"head_dim": 24}]
)
def test_supports(changes: dict, arch: str) -> None:
    assert delta_fla.supports(replace(NODE, **changes), Hardware("nvidia", arch, 132, arch)) is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"op": "gdn_verify", "batch": 1, "num_tokens": 4}, "prompts only"),
        ({"op": "gdn_verify", "batch": 1, "num_tokens": 4, "is_tree": True}, "prompts only"),
        ({"dtype": torch.float32}, "round products of torch.float32"),
        ({"state_dtype": torch.bfloat16}, "returns float32 states, not torch.bfloat16"),
        ({"head_dim": 272}, "key dim 272 is beyond 256"),
        ({"num_v_heads": 40}, "multiple of 16 key heads"),
    ],
)
def test_refuses_with_a_reason(changes: dict, words: str) -> None:
    assert words in delta_fla.supports(replace(NODE, **changes), H200)


def test_devices() -> None:
    assert delta_fla.supports(NODE, Hardware("amd", "gfx942", 304, "MI300X")) is None
    assert "CUDA or ROCm device, not CPU" in delta_fla.supports(NODE, Hardware("cpu", "cpu", 2, "CPU"))
    assert "8.0 or newer, not sm75" in delta_fla.supports(NODE, Hardware("nvidia", "sm75", 40, "T4"))


# ----------------------------------------------------------------------------------------------------------------------
# Probing and choosing


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """As if these modules were there, in versions of their distributions; tests take some away."""
    made = {"fla": "0.6.0", "einops": "0.8.1"}
    distributions = {"fla-core": "fla"}
    find_spec, real_version = importlib.util.find_spec, importlib.metadata.version

    def version(name: str) -> str:
        if name not in distributions:
            return real_version(name)
        if distributions[name] not in made:
            raise importlib.metadata.PackageNotFoundError(name)
        return made[distributions[name]]

    def spec(name: str) -> object | None:
        return (object() if name in made else None) if name in ("fla", "einops") else find_spec(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(importlib.util, "find_spec", spec)
    return made


def test_probe_imports_nothing(installed: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "fla", raising=False)
    availability = delta_fla.probe()
    assert availability.ok and availability.version == "0.6.0"
    assert "fla" not in sys.modules


@pytest.mark.parametrize(
    ("name", "version", "words"),
    [
        ("fla", None, "flash-linear-attention is not installed: pip install 'spec-compile[fla]'"),
        ("fla", "0.5.1", "fla-core 0.5.1 is not a 0.6"),
        ("fla", "0.7.0", "fla-core 0.7.0 is not a 0.6"),
        ("einops", None, "pip install einops"),
    ],
)
def test_probe_says_what_to_install(installed: dict[str, str], name: str, version: str | None, words: str) -> None:
    installed.pop(name) if version is None else installed.update({name: version})
    assert words in delta_fla.probe().problem


def test_it_can_be_named_and_stands_in_the_order_of_prompts(installed: dict[str, str]) -> None:
    automatic = choose(NODE, (0, 1), H200)
    assert automatic.provider == "triton" and automatic.losers["fla"] == "triton comes first"
    assert choose(NODE, (0, 1), H200, "fla").provider == "fla"
    window = replace(NODE, op="gdn_verify", stage="verify", batch=1, num_tokens=4)
    assert "prompts only" in choose(window, (0,), H200).losers["fla"]
    with pytest.raises(BackendError, match=r"prompts only(.|\n)*backend={'gdn_verify': 'triton'}"):
        choose(window, (0,), H200, "fla")
    with pytest.raises(BackendError, match=r"torch.float32(.|\n)*backend={'gdn_prefill': 'triton'}"):
        choose(replace(NODE, dtype=torch.float32), (0,), H200, "fla")
    del installed["fla"]
    with pytest.raises(BackendError, match=r"pip install 'spec-compile\[fla\]'"):
        choose(NODE, (0,), H200, "fla")


# ----------------------------------------------------------------------------------------------------------------------
# The ops


pytestmark = pytest.mark.usefixtures("fresh_seed")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("lengths", [(1,), (5, 0, 2, 70), (0, 3, 0)], ids=str)
def test_prompts(lengths: tuple[int, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The common contract: outputs, and states in their rows' slots and nowhere else."""
    rule = install(monkeypatch)
    fla = Implementation(ops.conv_verify, ops.gdn_verify, ops.gdn_commit, ops.conv_prefill, delta_fla.lower(NODE))
    check_prompts(fla, lengths, heads=Heads(8, 16, 8, 12), dtype=dtype, rounded=2)
    assert len(rule.launches) == 1


def test_a_prefill_plans_once_and_for_itself_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers share the boundaries, for which fla makes its list of chunks once; the next prefill's are another tensor, though
    they were written into the same one."""
    rule = install(monkeypatch)
    lowered = delta_fla.lower(SMALL)
    layers = [example_arguments(SMALL, CPU, num_tokens=9, live=True) for _ in range(2)]
    slots, cu_seqlens = torch.tensor([1, 0], dtype=torch.int32), torch.tensor([0, 4, 9], dtype=torch.int32)
    layers = [(*args[:8], slots, cu_seqlens, args[10]) for args in layers]
    for middle in (4, 7):
        cu_seqlens[1] = middle
        lowered.over_layers(layers)
        for args in layers:
            expected = torch.zeros_like(args[7])
            ops.gdn_prefill(*args[:7], expected, *args[8:])
            close(args[7], expected.double(), torch.bfloat16, 2)
    first, again, other, _ = (launch["cu_seqlens"] for launch in rule.launches)
    assert first is again and other is not first and len(rule.remembered) == 2


def test_one_thread_at_a_time_calls_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither fla's memory of lists nor Triton's autotuner is made for several; the launches themselves do not wait."""
    rule, inside, most = install(monkeypatch), 0, 0

    def slow(*args: object, **options: object) -> tuple[torch.Tensor, torch.Tensor]:
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        time.sleep(0.05)
        inside -= 1
        return rule(*args, **options)

    monkeypatch.setattr(sys.modules["fla.ops.gated_delta_rule"], "chunk_gated_delta_rule", slow)
    lowered = delta_fla.lower(SMALL)
    calls = [example_arguments(SMALL, CPU, num_tokens=3, live=True) for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        outs = list(pool.map(lambda args: lowered(*args), calls))
    assert most == 1 and len(rule.launches) == 4
    for out, args in zip(outs, calls, strict=True):
        close(out, ops.gdn_prefill(*args).double(), torch.bfloat16, 2)


def test_what_is_not_dense_in_its_last_dim_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)
    args = example_arguments(SMALL, CPU, live=True)
    lowered = delta_fla.lower(SMALL)
    turned = [x.transpose(0, 2).contiguous().transpose(0, 2) for x in args[:3]]
    assert all(x.stride(-1) != 1 for x in turned)
    torch.testing.assert_close(lowered(*turned, *args[3:]), lowered(*args), rtol=0, atol=0)


def test_warm_up_tunes_for_a_long_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its kernels are tuned by their first call, whose length is not in the key; few tokens here."""
    rule = install(monkeypatch)
    monkeypatch.setattr(delta_fla, "_TUNED_FOR", 33)
    delta_fla.warm_up(SMALL, CPU)
    (launch,) = rule.launches
    assert launch["q"].shape == (1, 33, 8, 8) and launch["v"].shape == (1, 33, 16, 12)
    assert launch["q"].dtype == torch.bfloat16 and launch["scale"] == 8**-0.5


def test_registration(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)
    args = example_arguments(SMALL, CPU, live=True)
    opcheck(torch.ops.spec_compile.gdn_prefill_rows, (args[9],))
    opcheck(torch.ops.spec_compile.gdn_prefill_fla, (*args, args[9].long()))


def test_the_schema_is_the_generic_ops_and_the_rows() -> None:
    lowered = delta_fla.lower(NODE)
    assert isinstance(lowered, Lowered)
    ours = str(lowered.op._schema).replace("gdn_prefill_fla", "gdn_prefill")
    assert ours.replace(", Tensor rows)", ")") == str(ops.gdn_prefill._opoverload._schema)
    assert "fla" in providers.names(NODE) and "fla" not in providers.PROVIDERS


# ----------------------------------------------------------------------------------------------------------------------
# In a model


def test_a_models_prompts(installed: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU in name: prompts of a bfloat16 model with two recurrent layers are fla's where that was asked for."""
    rule = install(monkeypatch)
    monkeypatch.setattr(delta_fla, "_TUNED_FOR", 4)
    kinds = ["linear_attention", "linear_attention", "full_attention"]
    model = tiny_model("qwen3_5_text", num_hidden_layers=3, layer_types=kinds).bfloat16()
    prompts = [torch.arange(3, 9), torch.tensor([7]), torch.arange(20, 25)]
    logits, states = {}, {}
    for name, hardware in (("torch", Hardware("cpu", "cpu", 1, "CPU")), ("fla", H200)):
        backend = {"prefill": "torch", "verify": "torch", "gdn_prefill": name, "gdn_verify": "torch"}
        options = RuntimeOptions(hardware, SegmentCompiler("none", hardware), backend=backend, page_size=16)
        runner = ModelRunner(model, "verify", options)
        runner.programs.reserve(3, 32, most_tokens=4)
        logits[name], _ = runner.prefill(prompts, runner.programs.pool.page_table, argmax=False, max_tokens=64)
        states[name] = runner.programs.states.state.clone()
    prefills = [launch for launch in rule.launches if launch["q"].shape[1] == 12]
    assert len(prefills) == 2 and prefills[0]["cu_seqlens"] is prefills[1]["cu_seqlens"]
    pairs = [(logits["fla"], logits["torch"])]
    pairs += [(states["fla"][layer, slot], states["torch"][layer, slot]) for layer in (0, 1) for slot in (1, 2, 3)]
    for found, expected in pairs:  # bfloat16 in every layer; rows of one another's would be off by about 1
        assert expected.norm() > 0 and (found - expected).norm() < 0.05 * expected.norm()
