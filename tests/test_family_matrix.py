"""Model families × drafts × kernels in ``docs/support-matrix.md``: nothing is ticked that no test shows."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from attention_contract import CASES
from test_attention_contract import SMALL
from tiny import FAMILIES as TINY
from tiny import RECURRENT_FAMILIES

from spec_compile import family_matrix
from spec_compile.family_matrix import (
    CONTRACT,
    CPU_CONTRACT,
    DELTA_CONTRACTS,
    DRAFTS,
    FAMILIES,
    MODES,
    PROOFS,
    TESTED_ARCHES,
    Proof,
)
from spec_compile.hardware import Hardware
from spec_compile.ops import providers
from spec_compile.support_matrix import DEVICES

ROOT = Path(__file__).resolve().parents[1]
TESTED = [device for device in DEVICES if device.arch in TESTED_ARCHES]


@pytest.fixture(scope="module")
def collected() -> set[str]:
    """Ids of every test of the modules that the table names, as pytest collects them."""
    named = [*(proof.test for proof in PROOFS), CONTRACT, CPU_CONTRACT, *DELTA_CONTRACTS.values()]
    modules = sorted({test.split("::")[0] for test in named})
    command = [sys.executable, "-m", "pytest", "-o", "addopts=", "--collect-only", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run([*command, *modules], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return {line for line in done.stdout.splitlines() if "::" in line}


def missing(ticked: tuple[Proof, ...], collected: set[str]) -> list[str]:
    return [test for proof in ticked for test in map(proof.test_id, proof.families) if test not in collected]


def test_every_draft_that_is_ticked_has_its_test(collected: set[str]) -> None:
    assert missing(PROOFS, collected) == []
    for proof in PROOFS:
        assert set(proof.families) <= set(FAMILIES) and set(proof.drafts) <= set(DRAFTS), proof


def test_a_tick_without_a_test_is_found(collected: set[str]) -> None:
    renamed = Proof(("n-gram",), "tests/test_families.py::test_of_another_name[{family}]", ("llama",))
    stranger = Proof(("n-gram",), PROOFS[0].test, ("llama", "a family nobody tests"))
    assert missing((renamed, stranger), collected) == [
        "tests/test_families.py::test_of_another_name[llama]",
        "tests/test_families.py::test_ngram_drafts[a family nobody tests]",
    ]


@pytest.mark.parametrize("device", TESTED, ids=lambda device: device.arch)
def test_every_kernel_that_is_ticked_has_its_contract_cases(device: Hardware, collected: set[str]) -> None:
    """And the provider takes them: a case it refuses is skipped, and shows nothing."""
    for family in FAMILIES:
        for mode in MODES:
            for name in family_matrix.kernels(family, mode, device):
                for test in family_matrix.contract_tests(family, mode, name, device):
                    assert test in collected, (family, mode, name)
            for name in family_matrix.kernels(family, mode, device, delta=True):
                assert DELTA_CONTRACTS[name, mode] in collected, (family, mode, name)
    cases, dtype, which = (SMALL, "float32", 1) if device.arch == "cpu" else (CASES, "bfloat16", 0)
    for (feature, mode), named in family_matrix.CONTRACTS.items():
        case = cases[named[which]]
        node = case.node(getattr(torch, dtype))
        assert case.tree == (mode == "tree") and not case.packed
        shown = {None: True, "window": case.window, "sinks": case.sinks, "softcap": case.softcap, "latent": case.latent}
        assert shown[feature], (feature, mode)
        for family in FAMILIES:
            if feature in (FAMILIES[family].features or (None,)):
                for name in family_matrix.kernels(family, mode, device):
                    assert providers.load(name).supports(node, device) is None, (name, named)


def test_every_family_of_the_list_is_a_row() -> None:
    assert set(FAMILIES) == {*TINY, *RECURRENT_FAMILIES}
    page = (ROOT / "docs" / "support-matrix.md").read_text(encoding="utf-8")
    assert family_matrix.section(DEVICES).rstrip() in page
