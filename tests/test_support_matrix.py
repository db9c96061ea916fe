"""The support matrix: cells are the providers' own answers, and the page in ``docs/`` is what they say today."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from spec_compile import cli, doctor, support_matrix
from spec_compile.hardware import Hardware
from spec_compile.ops import providers
from spec_compile.ops.providers import AttentionNode, Availability
from spec_compile.support_matrix import COLUMNS, DEVICES, MODES, SupportRow, markdown, preferred_stages, summary, support_rows

PAGE = Path(__file__).resolve().parents[1] / "docs" / "support-matrix.md"
H200 = next(device for device in DEVICES if device.arch == "sm90")


def test_the_page_is_what_the_providers_say_today():
    """When this fails: ``spec-compile doctor --markdown > docs/support-matrix.md``."""
    assert PAGE.read_text(encoding="utf-8") == markdown()


def test_the_command_prints_the_page(capsys: pytest.CaptureFixture):
    assert cli.main(["doctor", "--markdown"]) == 0
    assert capsys.readouterr().out == PAGE.read_text(encoding="utf-8")


def test_the_page_needs_nothing_installed():
    """The same page from a process in which no kernel package can be imported."""
    code = (
        "import sys\n"
        "class Nothing:\n"
        "    def find_spec(self, name, *rest):\n"
        "        if name.split('.')[0] in ('triton', 'flashinfer', 'flash_attn', 'aiter', 'fla'):\n"
        "            raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Nothing())\n"
        "from spec_compile.support_matrix import markdown; sys.stdout.write(markdown())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout == PAGE.read_text(encoding="utf-8")


@pytest.mark.parametrize("device", DEVICES, ids=lambda d: d.arch)
def test_every_cell_is_the_providers_own_answer(device: Hardware):
    """Asked again in the simplest way, for the columns that are one question."""
    for row in support_rows(device):
        supports = providers.load(row.provider).supports
        answers = {mode: supports(node, device) is None for mode, node in MODES.items()}
        if row.refusal is not None:
            assert not any(answers.values()) and row.cells == {}
            continue
        assert {mode: row.cells[mode] == "yes" for mode in MODES} == answers
        fp8 = [m for m in MODES if answers[m] and supports(replace(MODES[m], kv_dtype=torch.float8_e4m3fn), device) is None]
        able = [m for m in MODES if answers[m]]
        assert row.cells["fp8 cache"] == ("yes" if fp8 == able else ", ".join(fp8) or "no")
        assert set(row.cells) == set(COLUMNS)


def picky(node: AttentionNode, hardware: Hardware) -> str | None:
    """Chains and prompts, no trees; windows in prefill alone; heads of 64 everywhere, of 128 in prefill and chains."""
    if node.is_tree:
        return "no trees"
    if node.window and node.op != "prefill_attention":
        return "no window"
    if node.op.startswith("mla"):
        return None if node.op == "mla_attention" else "no latent prompts"
    if node.head_dim == 64:
        return None if node.op == "attention" else "no 64"
    return None if node.head_dim == 128 and node.page_size >= 64 and node.dtype == torch.bfloat16 else "no"


@pytest.fixture
def one_provider(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    made = SimpleNamespace(supports=picky, probe=lambda: Availability("1"))
    monkeypatch.setattr(providers, "load", lambda *_: made)
    return made


def test_cells_say_in_which_modes(one_provider: SimpleNamespace):
    (row,) = support_rows(H200, ("any",))
    assert (row.cells["prefill"], row.cells["chain"], row.cells["tree"]) == ("yes", "yes", "no")
    assert row.cells["sliding window"] == "prefill" and row.cells["sinks"] == "yes"
    assert row.cells["latent (MLA)"] == "chain"
    assert row.cells["head dims"] == "128; 64 (chain)" and row.cells["page sizes"] == "64–256"
    assert row.cells["types"] == "bfloat16"
    assert summary(row).startswith("prefill, chain, sliding window (prefill), sinks,")


def test_one_that_can_do_nothing_has_a_reason_and_no_cells(one_provider: SimpleNamespace):
    one_provider.supports = lambda node, hardware: f"not on {hardware.arch}"
    assert support_rows(H200, ("any",)) == [SupportRow("any", "not on sm90", {})]


def test_places_in_the_order():
    assert preferred_stages("torch", Hardware("cpu", "cpu", 1, "CPU")) == dict.fromkeys(support_matrix.STAGES, 1)
    assert preferred_stages("triton", Hardware("cpu", "cpu", 1, "CPU")) == {}


def doctors_report(hardware: Hardware, monkeypatch: pytest.MonkeyPatch) -> dict[str, doctor.Check]:
    monkeypatch.setattr(doctor, "_main_device", lambda: hardware)
    return {check.name: check for check in doctor.examine() if check.group == "Attention kernels"}


@pytest.mark.parametrize("device", DEVICES, ids=lambda d: d.arch)
def test_doctor_says_what_the_page_says(device: Hardware, monkeypatch: pytest.MonkeyPatch):
    kernels = doctors_report(device, monkeypatch)
    assert set(kernels) == set(providers.PROVIDERS)
    for row in support_rows(device):
        check = kernels[row.provider]
        if row.refusal is None:
            assert summary(row) in check.detail
            first = all(place == 1 for place in preferred_stages(row.provider, device).values())
            assert ("first choice for prefill, verify, draft, draft_extend" in check.detail) == (
                first and len(preferred_stages(row.provider, device)) == len(support_matrix.STAGES)
            )
        else:
            assert check.status == "optional" and check.detail == f"not on {device.arch}: {row.refusal}"


@pytest.mark.parametrize("device", DEVICES, ids=lambda d: d.arch)
def test_doctor_says_who_runs_delta_rules(device: Hardware, monkeypatch: pytest.MonkeyPatch):
    absent = Availability(None, "not installed: pip install it")
    monkeypatch.setattr(providers.load_for(support_matrix.DELTA_MODES["prefill"], "fla"), "probe", lambda: absent)
    monkeypatch.setattr(doctor, "_main_device", lambda: device)
    rules = {check.name: check for check in doctor.examine() if check.group == "Gated delta nets"}
    assert set(rules) == set(providers.REGISTRY["gated_delta_rule"])
    fla = rules["fla"]
    assert fla.status == "optional"
    if device.is_cuda:
        assert fla.detail == f"not installed: pip install it; on {device.arch}: prefill"
    else:
        assert fla.detail.startswith("not on cpu: fla's kernels need a CUDA or ROCm device")
    assert rules["torch"].status == "ok" and rules["torch"].detail.startswith(torch.__version__)


def test_doctor_tells_what_is_missing_from_what_is_of_no_use(monkeypatch: pytest.MonkeyPatch):
    """The command that installs stands where it would help, and only there."""
    absent = Availability(None, "not installed: pip install it")
    made = SimpleNamespace(supports=lambda node, hardware: "no GPU" if hardware.arch == "cpu" else None, probe=lambda: absent)
    monkeypatch.setattr(providers, "load", lambda *_: made)
    for check in doctors_report(H200, monkeypatch).values():
        assert check.status == "optional" and check.detail.startswith("not installed: pip install it; on sm90: prefill, chain,")
    for check in doctors_report(Hardware("cpu", "cpu", 1, "CPU"), monkeypatch).values():
        assert check.status == "optional" and check.detail == "not on cpu: no GPU"
