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
        "        if name.split('.')[0] in ('triton', 'flashinfer', 'flash_attn', 'aiter'):\n"
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
    monkeypatch.setattr(providers, "load", lambda name: made)
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
    assert summary(support_rows(H200, ("any",))[0]) == "nothing here: not on sm90"


def test_places_in_the_order():
    assert preferred_stages("torch", Hardware("cpu", "cpu", 1, "CPU")) == dict.fromkeys(support_matrix.STAGES, 1)
    assert preferred_stages("triton", Hardware("cpu", "cpu", 1, "CPU")) == {}


def test_doctor_says_what_each_provider_does_on_this_machine(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    kernels = {check.name: check for check in doctor.examine() if check.group == "Attention kernels"}
    assert set(kernels) == set(providers.PROVIDERS)
    rows = {row.provider: row for row in support_rows(Hardware("cpu", "cpu", torch.get_num_threads(), "CPU"))}
    for name, check in kernels.items():
        assert summary(rows[name]) in check.detail
    assert (
        kernels["torch"].status == "ok" and "first choice for prefill, verify, draft, draft_extend" in kernels["torch"].detail
    )
    assert kernels["triton"].status == "optional" and "nothing here: " in kernels["triton"].detail
