"""``docs/adding-a-provider.md`` is true: a provider that is one file and its rows runs in a model, forced, chosen, mixed."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import toy_provider
from tiny import left_padded, tiny_model
from torch import Tensor, fx
from transformers import PreTrainedModel

from spec_compile import spec_compile
from spec_compile.errors import BackendError
from spec_compile.ops import attention as generic
from spec_compile.ops import providers
from spec_compile.ops.providers import as_lowered
from spec_compile.ops.providers.examples import example_arguments
from spec_compile.passes import preference
from spec_compile.passes.preference import RULES, STAGES, Rule
from spec_compile.support_matrix import MODES, support_rows

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    """One file (``toy_provider.py``) and its row in the registry."""
    monkeypatch.setitem(providers.PROVIDERS, "toy", "toy_provider")
    toy_provider.CALLS.clear()


def expected(family: str = "llama", inputs: dict | None = None) -> Tensor:
    return tiny_model(family).generate(**(inputs or left_padded(3, 11)), max_new_tokens=12, do_sample=False)


def compiled(backend: object, draft: str | PreTrainedModel | None = "ngram", family: str = "llama") -> PreTrainedModel:
    model = tiny_model(family)
    return spec_compile(
        model, draft=draft, backend=backend, compile="none", adaptive=False, min_ngram=1, num_steps=3, page_size=16
    )


def generated(model: PreTrainedModel) -> Tensor:
    return model.generate(**left_padded(3, 11), max_new_tokens=12, do_sample=False)


def who_runs(model: PreTrainedModel) -> dict[str, set[str]]:
    """Providers by graph name, the draft's graphs too."""
    engine = model.spec._engine
    return {
        f"{role}: {name}": {choice.provider for choice in choices}
        for role, programs in zip(("verify", "draft"), engine.programs(), strict=False)
        for name, choices in programs.choices.items()
    }


# ----------------------------------------------------------------------------------------------------------------------
# One file and a row


def test_named_per_stage_it_runs_there_and_nowhere_else(toy: None):
    model = compiled({"verify": "toy"})
    assert torch.equal(generated(model), expected())
    assert who_runs(model) == {"verify: prefill": {"torch"}, "verify: verify, 3 rows × 4 tokens": {"toy"}}
    rounds = toy_provider.CALLS["plan"]
    assert rounds >= 3 and toy_provider.CALLS["attention"] == 2 * rounds, "two layers, one plan a round"
    assert toy_provider.CALLS["warm_up verify"] == 1
    assert "toy: forced by backend='toy'" in model.spec.explain()


def test_forced_where_it_cannot_run_it_is_an_error_at_once_that_names_who_can(toy: None):
    with pytest.raises(BackendError, match=r"the toy has no prefill_attention(.|\n)*nearest that can is torch"):
        compiled("toy")
    with pytest.raises(BackendError, match=r"verify graph(.|\n)*attends to everything(.|\n)*nearest that can is torch"):
        compiled({"verify": "toy"}, family="gpt_oss")


def test_a_row_in_the_table_makes_it_automatic(toy: None, monkeypatch: pytest.MonkeyPatch):
    row = Rule(("cpu",), STAGES, ("toy", "torch"), "because a test says so")
    monkeypatch.setattr(preference, "RULES", (row, *RULES))
    model = compiled("auto")
    assert torch.equal(generated(model), expected())
    assert who_runs(model) == {"verify: prefill": {"torch"}, "verify: verify, 3 rows × 4 tokens": {"toy"}}
    text = model.spec.explain()
    assert "not toy: the toy has no prefill_attention" in text and "toy: first of toy, torch on cpu; because a test" in text


def test_layers_it_refuses_go_to_the_next(toy: None, monkeypatch: pytest.MonkeyPatch):
    """Gemma 2: sliding and full layers in turn, all with soft-capping; Gemma 3 without: a hybrid inside one graph."""
    row = Rule(("cpu",), STAGES, ("toy", "torch"), "because a test says so")
    monkeypatch.setattr(preference, "RULES", (row, *RULES))
    model = compiled("auto", family="gemma3_text")
    assert torch.equal(generated(model), expected("gemma3_text"))
    verify = model.spec._engine.target.programs.choices["verify, 3 rows × 4 tokens"]
    assert {choice.provider: choice.layers for choice in verify} == {"torch": (0,), "toy": (1,)}


def test_the_support_matrix_has_it(toy: None):
    (row,) = support_rows(preference_cpu(), ("toy",))
    assert (row.cells["prefill"], row.cells["chain"], row.cells["tree"]) == ("no", "yes", "yes")
    assert row.cells["sinks"] == row.cells["sliding window"] == "no"


def preference_cpu():
    from spec_compile.hardware import detect_hardware

    return detect_hardware("cpu")


@pytest.mark.parametrize("mode", ["chain", "tree"])
def test_it_keeps_the_ops_contract(toy: None, mode: str):
    node = replace(MODES[mode], num_tokens=5, dtype=torch.float32, kv_dtype=torch.float32, batch=2, head_dim=16, v_head_dim=16)
    args = example_arguments(node, torch.device("cpu"), context=70)
    copies = [a.clone() if isinstance(a, Tensor) else a for a in args]
    out = as_lowered(providers.load("toy").lower(node))(*args)
    torch.testing.assert_close(out, generic.attention(*copies), rtol=1e-5, atol=1e-5)


# ----------------------------------------------------------------------------------------------------------------------
# Hybrids: each stage's metadata is made by the provider that runs it


def targets(gm: fx.GraphModule) -> set[str]:
    return {str(n.target) for n in gm.graph.nodes if n.op == "call_function"}


def test_in_a_hybrid_each_stage_runs_on_its_own_providers_metadata(toy: None):
    """Prefill with one, verify with another (SGLang PR 9573). There the padding fill value comes from the decode backend even
    where the prefill backend runs; here a graph holds the plan of its own provider and no other's."""
    model = compiled({"prefill": "torch", "verify": "toy", "draft": "torch"}, draft=tiny_model("llama", seed=1))
    assert torch.equal(generated(model), expected())
    assert who_runs(model) == {
        "verify: prefill": {"torch"},
        "verify: verify, 3 rows × 4 tokens": {"toy"},
        "draft: prefill": {"torch"},
        "draft: draft_extend, 3 rows × 2 tokens": {"torch"},
        "draft: draft, 3 rows × 1 tokens": {"torch"},
    }
    engine = model.spec._engine
    planned = {}
    for role, programs in zip(("verify", "draft"), engine.programs(), strict=False):
        for (stage, *_), program in programs.built.items():
            planned[role, stage] = any("toy_plan" in target for target in targets(program.gm))
    assert planned == {
        ("verify", "prefill"): False, ("verify", "verify"): True, ("draft", "prefill"): False,
        ("draft", "draft_extend"): False, ("draft", "draft"): False,
    }  # fmt: skip


def test_drafting_on_one_and_verifying_on_another(toy: None):
    model = compiled({"draft": "toy"}, draft=tiny_model("llama"))
    assert torch.equal(generated(model), expected())
    runs = who_runs(model)
    assert runs["draft: draft, 3 rows × 1 tokens"] == runs["draft: draft_extend, 3 rows × 2 tokens"] == {"toy"}
    assert runs["verify: verify, 3 rows × 4 tokens"] == {"torch"}
    assert model.spec.stats().accept_length > 3.5, "the target as its own draft is right: both read the same caches' contents"


# ----------------------------------------------------------------------------------------------------------------------
# The page


def test_the_pages_example_is_the_torch_provider():
    """Python blocks that are marked as taken from a file stand in it word for word."""
    page = (ROOT / "docs" / "adding-a-provider.md").read_text(encoding="utf-8")
    quoted = re.findall(r"<!-- from (\S+) -->\n```python\n(.*?)```", page, re.S)
    assert len(quoted) >= 4
    for name, block in quoted:
        source = (ROOT / name).read_text(encoding="utf-8")
        for part in re.split(r"\n *# …\n", block):
            assert part.strip("\n") in source, f"{name} no longer has:\n{part}"


def test_the_pages_links_lead_somewhere():
    for page in (ROOT / "docs").glob("*.md"):
        links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8"))
        assert [x for x in links if not x.startswith("http") and not (page.parent / x).exists()] == [], page.name
