"""``select_backend``: one provider for each attention node, by hardware and need, with every loser's reason."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from stage_graphs import Input, attention_inputs, find, mla_inputs, names, stage_graph
from tiny import tiny_model

from spec_compile import spec_compile
from spec_compile.errors import BackendError
from spec_compile.hardware import Hardware
from spec_compile.ops import providers
from spec_compile.ops.providers import AttentionNode, Availability
from spec_compile.passes import preference
from spec_compile.passes.backend_option import check_backend, wanted
from spec_compile.passes.graph import CacheSlot, StageGraph
from spec_compile.passes.node_words import layers_in_words, needs, span
from spec_compile.passes.preference import RULES, STAGES, Rule, rule_for
from spec_compile.passes.select_backend import Measured, select_backend
from spec_compile.passes.stage import stage

CPU = Hardware("cpu", "cpu", 4, "CPU")
H200 = Hardware("nvidia", "sm90", 132, "NVIDIA H200")


@dataclass
class StubProvider:
    """A provider whose every answer is given; nothing of a real kernel is needed to test the choice."""

    refuse: Callable[[AttentionNode], str | None] = lambda node: None
    problem: str | None = None
    asked: list[tuple[AttentionNode, Hardware]] = field(default_factory=list)
    probes: int = 0

    def probe(self) -> Availability:
        self.probes += 1
        return Availability("1.0" if self.problem is None else None, self.problem)

    def supports(self, node: AttentionNode, hardware: Hardware) -> str | None:
        self.asked.append((node, hardware))
        return self.refuse(node)


@pytest.fixture
def stubs(monkeypatch: pytest.MonkeyPatch) -> dict[str, StubProvider]:
    """All providers, replaced by stubs that take everything until a test says otherwise, in an order of this file's own."""
    table = (Rule(("cpu",), STAGES, ("torch",), "a CPU"), Rule(("sm90",), STAGES, ("triton", "flashinfer", "torch"), "by hand"))
    monkeypatch.setattr(preference, "RULES", table)
    made = {name: StubProvider() for name in providers.PROVIDERS}
    monkeypatch.setattr(providers, "load", lambda name, *_: made[name])
    return made


def layers(q, k, v, k_cache, v_cache, page_table, cache_len, sinks, **caches):
    """Four layers: plain, sliding, plain, soft-capped with sinks."""
    op, args = torch.ops.spec_compile.attention, (page_table, cache_len, None, 0.5)
    q = op(q, k, v, k_cache, v_cache, *args, 0, 0.0, None)
    q = op(q, k, v, caches["k_cache_1"], caches["v_cache_1"], *args, 16, 0.0, None)
    q = op(q, k, v, caches["k_cache_2"], caches["v_cache_2"], *args, 0, 0.0, None)
    return op(q, k, v, caches["k_cache_3"], caches["v_cache_3"], *args, 0, 30.0, sinks)


def four_layers(kind: str = "verify") -> StageGraph:
    batch = 1 if kind == "prefill" else 2
    caches = {f"{part}_cache_{layer}": CacheSlot(layer, part) for layer in (1, 2, 3) for part in ("k", "v")}
    graph = stage_graph(layers, kind, **attention_inputs(batch=batch), sinks=torch.randn(4), **caches)
    return stage(graph)


def a_node(**changes: object) -> AttentionNode:
    fields = {
        "op": "attention", "stage": "verify", "batch": 2, "num_tokens": 4, "num_q_heads": 8, "num_kv_heads": 2,
        "head_dim": 64, "v_head_dim": 64, "page_size": 16, "window": 0, "softcap": 0.0, "has_sinks": False,
        "is_tree": False, "dtype": torch.bfloat16, "kv_dtype": torch.bfloat16,
    }  # fmt: skip
    return AttentionNode(**{**fields, **changes})


def latent_layer(q, kv, kv_cache, page_table, cache_len):
    return torch.ops.spec_compile.mla_attention(q, kv, kv_cache, page_table, cache_len, None, 0.3, 6)


def mixed_widths(q, k, v, k_cache, v_cache, page_table, cache_len):
    return torch.ops.spec_compile.attention(
        q, k, v, k_cache, v_cache, page_table, cache_len, None, 0.5, 0, 0.0, None
    ).bfloat16()


# ----------------------------------------------------------------------------------------------------------------------
# What the user asks for


def test_a_name_speaks_for_every_stage_and_a_dict_for_those_it_names():
    hybrid = {"prefill": "torch", "verify": "triton"}
    assert {wanted("torch", stage) for stage in STAGES} == {"torch"}
    assert [wanted(hybrid, stage) for stage in ("prefill", "verify", "draft")] == ["torch", "triton", "auto"]
    assert wanted({"verify": "tune"}, "verify") == "tune"


def test_extending_a_draft_follows_drafting_unless_it_is_named():
    assert wanted({"draft": "triton"}, "draft_extend") == "triton"
    assert wanted({"draft": "triton", "draft_extend": "torch"}, "draft_extend") == "torch"
    assert wanted({"draft_extend": "torch"}, "draft") == "auto"
    assert wanted({"verify": "torch"}, "draft_extend") == "auto"


@pytest.mark.parametrize("backend", ["fa99", {"verify": "fa99"}, {"verify": None}])
def test_an_unknown_provider_is_an_error_that_lists_the_known_ones(backend):
    with pytest.raises(BackendError, match=r"fa99|None") as error:
        wanted(backend, "prefill")  # whatever stage is asked about
    assert all(name in str(error.value) for name in (*providers.PROVIDERS, "auto", "tune"))


@pytest.mark.parametrize("backend", [["torch"], None, {"verify": ["torch"]}, {1: "torch", "decode": "torch"}])
def test_what_is_no_name_is_an_error_of_ours(backend):
    with pytest.raises(BackendError, match=r"dict of these per stage|unknown stages"):
        check_backend(backend)


@pytest.mark.parametrize("draft", [None, "ngram"])
@pytest.mark.parametrize("stage", ["draft", "draft_extend"])
def test_stages_of_a_draft_mean_nothing_without_one(draft: str | None, stage: str):
    with pytest.raises(BackendError, match=f"'{stage}' names 'torch' for a draft model or head, and this call has none"):
        spec_compile(tiny_model("llama", num_hidden_layers=1), draft=draft, backend={stage: "torch"}, compile="none")


def test_a_provider_of_delta_rules_alone_speaks_of_its_stages():
    """``fla`` has no attention: named for a stage it takes the stage's delta rules, and attention there is automatic."""
    assert "fla" not in providers.PROVIDERS
    for backend in ({"prefill": "fla"}, {"gdn_prefill": "fla"}, {"prefill": "triton", "gdn_prefill": "fla"}):
        assert wanted(backend, "gdn_prefill") == "fla" and wanted(backend, "gdn_verify") == wanted(backend, "verify") == "auto"
        assert wanted(backend, "prefill") == ("triton" if len(backend) == 2 else "auto")
    assert wanted({"verify": "fla"}, "gdn_verify") == "fla", "which it refuses, with its reason"
    assert wanted({"prefill": "flashinfer"}, "gdn_prefill") == "auto", "a name that attention providers have is of attention"
    for backend in ("fla", {"draft": "fla"}):
        with pytest.raises(BackendError, match=r"delta rules.*which ones: backend={'gdn_prefill': 'fla'}\.$"):
            check_backend(backend)
    with pytest.raises(BackendError, match=r"for gdn_prefill; choose .* fla"):
        check_backend({"gdn_prefill": "flash"})


def test_an_unknown_stage_is_an_error_that_lists_the_known_ones():
    with pytest.raises(BackendError, match=r"verfy.*prefill, verify, draft, draft_extend"):
        check_backend({"verfy": "torch"})


# ----------------------------------------------------------------------------------------------------------------------
# The table


def device(arch: str) -> Hardware:
    vendor = "cpu" if arch == "cpu" else "amd" if arch.startswith("gfx") else "nvidia"
    return Hardware(vendor, arch, 100, arch)


ARCHS = (
    "cpu",
    "sm75",
    "sm80",
    "sm86",
    "sm89",
    "sm90",
    "sm100",
    "sm103",
    "sm110",
    "sm120",
    "sm121",
    "gfx90a",
    "gfx942",
    "gfx950",
)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("arch", ARCHS)
def test_every_hardware_and_stage_has_an_order_that_ends_with_plain_torch(arch: str, stage: str):
    order = rule_for(a_node(stage=stage), device(arch)).providers
    assert order[-1] == "torch" and len(set(order)) == len(order)
    assert set(order) <= set(providers.PROVIDERS)


@pytest.mark.parametrize(("arch", "first"), [("cpu", "torch"), ("sm80", "triton"), ("gfx942", "aiter"), ("gfx90a", "triton")])
def test_the_first_row_that_fits_gives_the_order(arch: str, first: str):
    assert rule_for(a_node(), device(arch)).providers[0] == first


def test_rows_say_why_and_name_what_exists():
    for rule in RULES:
        assert rule.reason and set(rule.stages) <= set(STAGES) and set(rule.hardware) <= {*ARCHS, "sm87", "nvidia", "amd"}


def test_a_row_may_speak_about_some_nodes_only(monkeypatch: pytest.MonkeyPatch, stubs):
    """Short contexts with one provider, long ones with the other, as a measured table would have it."""
    long = Rule(("sm90",), STAGES, ("torch", "triton"), "over 4096 slots", lambda node: (node.max_context or 0) > 4096)
    monkeypatch.setattr(preference, "RULES", (long, *preference.RULES))
    for max_context, expected in ((None, "triton"), (4096, "triton"), (8192, "torch")):
        (choice, *_) = select_backend(four_layers(), H200, "auto", 64, max_context=max_context)
        assert (choice.provider, choice.node.max_context) == (expected, max_context)
    assert "over 4096 slots" in choice.reason


# ----------------------------------------------------------------------------------------------------------------------
# The choice


def test_the_first_that_supports_the_node_wins_and_every_loser_has_its_reason(stubs):
    stubs["triton"].refuse = lambda node: "no soft-capping" if node.softcap else None
    stubs["flashinfer"].refuse = lambda node: "no soft-capping either"
    plain, sliding, capped = select_backend(four_layers(), H200, "auto", 64)
    assert (plain.provider, sliding.provider, capped.provider) == ("triton", "triton", "torch")
    assert set(plain.losers) == set(providers.PROVIDERS) - {"triton"}
    assert plain.losers["torch"] == "triton comes first" and plain.losers["flashinfer"] == "no soft-capping either"
    assert capped.losers["triton"] == "no soft-capping"
    assert plain.losers["aiter"] == "not in the order for sm90"
    assert plain.reason == "first of triton, flashinfer, torch on sm90; by hand"


def test_only_those_that_might_win_are_probed(stubs):
    select_backend(four_layers(), H200, "auto", 64)
    assert [name for name, stub in stubs.items() if stub.probes] == ["triton"]


def test_a_provider_that_is_not_installed_loses_with_the_command_that_installs_it(stubs):
    stubs["triton"].problem = "Triton is not installed: pip install triton"
    stubs["flashinfer"].refuse = lambda node: "not this"
    choices = select_backend(four_layers(), H200, "auto", 64)
    assert {c.provider for c in choices} == {"torch"}
    assert {c.losers["triton"] for c in choices} == {"Triton is not installed: pip install triton"}


def test_what_it_cannot_do_counts_before_whether_it_is_installed(stubs):
    """Nobody should install something that would not help."""
    stubs["triton"].problem = "Triton is not installed: pip install triton"
    stubs["triton"].refuse = lambda node: "no heads of 8"
    (choice, *_) = select_backend(four_layers(), H200, "auto", 64)
    assert choice.losers["triton"] == "no heads of 8" and not stubs["triton"].probes


def test_layers_that_need_the_same_share_a_choice(stubs):
    choices = select_backend(four_layers(), H200, "auto", 64)
    assert [c.layers for c in choices] == [(0, 2), (1,), (3,)]
    assert [c.node.window for c in choices] == [0, 16, 0]


def test_no_provider_is_an_error_that_names_the_node_and_everyones_reason(stubs):
    for name, stub in stubs.items():
        stub.refuse = lambda node, name=name: f"{name} is on strike"
    with pytest.raises(BackendError) as error:
        select_backend(four_layers(), H200, "auto", 64)
    text = str(error.value)
    for part in ("verify graph", "layers 0, 2", "4/2 heads", "triton: triton is on strike", "torch: torch is on strike"):
        assert part in text


def test_a_dict_chooses_for_the_graphs_own_stage(stubs):
    backend = {"prefill": "torch"}
    assert {c.provider for c in select_backend(four_layers("prefill"), H200, backend, 64)} == {"torch"}
    assert {c.provider for c in select_backend(four_layers("draft"), H200, backend, 64)} == {"triton"}


@pytest.mark.parametrize(
    ("layers", "words"),
    [((3,), "3"), ((0, 1, 2, 3), "0–3"), ((1, 3), "1, 3"), ((0, 2, 4, 6, 8, 10), "0, 2, 4, …, 10"), ((4, 5), "4–5")],
)
def test_layers_in_words(layers: tuple[int, ...], words: str):
    assert span(layers) == words
    assert layers_in_words(layers) == f"{'layer' if len(layers) == 1 else 'layers'} {words}"


# ----------------------------------------------------------------------------------------------------------------------
# A forced provider


def test_a_forced_provider_is_never_replaced_by_another(stubs):
    stubs["triton"].refuse = lambda node: "no soft-capping" if node.softcap else None
    with pytest.raises(BackendError, match="no soft-capping"):
        select_backend(four_layers(), H200, "triton", 64)


def test_a_forced_provider_that_cannot_is_an_error_that_says_who_can(stubs):
    stubs["torch"].refuse = lambda node: "no sliding windows" if node.window else None
    stubs["flashinfer"].problem = "FlashInfer is not installed: pip install flashinfer-python"
    with pytest.raises(BackendError) as error:
        select_backend(four_layers("draft"), H200, {"draft": "torch"}, 64)
    text = str(error.value)
    for part in ("backend='torch'", "attention in the draft graph", "(layer 1;", "window 16", "sm90", "no sliding windows"):
        assert part in text
    assert "nearest that can is triton: backend={'draft': 'triton'}" in text


def test_the_nearest_is_the_first_of_the_order_that_is_installed_and_can(stubs):
    stubs["triton"].problem = "pip install the-first"
    stubs["aiter"].refuse = lambda node: "AMD only"
    with pytest.raises(BackendError, match="nearest that can is flashinfer") as error:
        select_backend(four_layers("prefill"), H200, "aiter", 64)
    assert "pip install the-first" not in str(error.value)


def test_where_nobody_installed_can_the_error_has_the_command_of_the_nearest_that_could(stubs):
    for name, stub in stubs.items():
        stub.refuse = lambda node, name=name: None if name == "triton" else "cannot"
    stubs["triton"].problem = "Triton is not installed: pip install triton"
    with pytest.raises(BackendError, match="nearest that could is triton, but: Triton is not installed: pip install triton"):
        select_backend(four_layers(), H200, "torch", 64)
    stubs["triton"].refuse = lambda node: "cannot"
    with pytest.raises(BackendError, match="No provider can"):
        select_backend(four_layers(), H200, "torch", 64)


def test_a_forced_provider_that_is_not_installed_is_an_error_with_the_command(stubs):
    stubs["flashinfer"].problem = "FlashInfer is not installed: pip install flashinfer-python"
    with pytest.raises(BackendError, match="pip install flashinfer-python"):
        select_backend(four_layers(), H200, "flashinfer", 64)


def test_forcing_is_the_reason_and_nobody_else_was_asked_for(stubs):
    (choice, *_) = select_backend(four_layers(), H200, {"verify": "torch"}, 64)
    assert choice.provider == "torch" and choice.reason == "forced by backend='torch'"
    assert choice.losers == {name: "not asked for" for name in providers.PROVIDERS if name != "torch"}


# ----------------------------------------------------------------------------------------------------------------------
# Tuning


@dataclass
class FakeTuner:
    """Answers with given times and remembers whom it was asked about."""

    times: dict[str, float]
    failed: dict[str, str] = field(default_factory=dict)
    asked: list[tuple[str, ...]] = field(default_factory=list)

    def __call__(self, node: AttentionNode, names: tuple[str, ...]) -> Measured:
        self.asked.append(names)
        return Measured(self.times, self.failed, "measured by hand")


def test_tuning_takes_the_fastest_and_tells_the_others_times(stubs):
    tuner = FakeTuner({"triton": 9.0, "flashinfer": 7.25, "torch": 80.0})
    (choice, *_) = select_backend(four_layers(), H200, {"verify": "tune"}, 64, tuner=tuner)
    assert choice.provider == "flashinfer" and choice.reason == "fastest, 7.2 µs a call; measured by hand"
    assert (choice.losers["triton"], choice.losers["torch"]) == ("9.0 µs", "80.0 µs")
    assert set(choice.losers) == set(providers.PROVIDERS) - {"flashinfer"}


def test_only_those_that_can_and_are_installed_are_timed(stubs):
    stubs["flashinfer"].problem = "pip install flashinfer-python"
    tuner = FakeTuner({"triton": 2.0, "torch": 1.0})
    choices = select_backend(four_layers(), H200, "tune", 64, tuner=tuner)
    assert tuner.asked == [("triton", "torch")] * 3 and {c.provider for c in choices} == {"torch"}
    assert choices[0].losers["flashinfer"] == "pip install flashinfer-python"


def test_one_candidate_needs_no_timing(stubs):
    for name in ("flashinfer", "torch"):
        stubs[name].refuse = lambda node: "cannot"
    tuner = FakeTuner({})
    (choice, *_) = select_backend(four_layers(), H200, "tune", 64, tuner=tuner)
    assert choice.provider == "triton" and "only one that can" in choice.reason and tuner.asked == []


def test_who_could_not_be_timed_loses_with_the_reason(stubs):
    tuner = FakeTuner({"torch": 5.0}, {"triton": "out of memory", "flashinfer": "nvcc died"})
    (choice, *_) = select_backend(four_layers(), H200, "tune", 64, tuner=tuner)
    assert choice.provider == "torch" and choice.losers["triton"] == "out of memory"
    all_failed = FakeTuner({}, {"triton": "out of memory", "flashinfer": "nvcc died", "torch": "out of memory"})
    (choice, *_) = select_backend(four_layers(), H200, "tune", 64, tuner=all_failed)
    assert choice.provider == "triton" and choice.reason.startswith("nothing could be timed (out of memory): first of triton")
    assert choice.losers["flashinfer"] == "nvcc died"


def test_tuning_on_a_cpu_is_automatic_and_says_so(stubs):
    tuner = FakeTuner({})
    (choice, *_) = select_backend(four_layers(), CPU, "tune", 64, tuner=tuner)
    assert choice.provider == "torch" and "tuning measures GPUs only" in choice.reason and tuner.asked == []


def test_without_a_pool_nothing_is_measured_and_the_reason_says_so(stubs):
    (choice, *_) = select_backend(four_layers(), H200, "tune", 64)
    assert choice.provider == "triton" and "nothing was measured yet" in choice.reason


# ----------------------------------------------------------------------------------------------------------------------
# What it leaves in the graph


def test_targets_are_untouched_and_every_node_carries_its_provider(stubs):
    stubs["triton"].refuse = lambda node: "no sinks" if node.has_sinks else None
    graph = four_layers()
    before = graph.gm.code
    select_backend(graph, H200, "auto", 64)
    assert graph.gm.code == before and names(graph) == ["attention"] * 4
    assert [n.meta["provider"] for n in find(graph, "attention")] == ["triton", "triton", "triton", "flashinfer"]
    assert [n.meta["attention_node"].window for n in find(graph, "attention")] == [0, 16, 0, 0]
    assert graph.report[-1] == "select_backend: 2 layers -> triton; 1 layers -> triton; 1 layers -> flashinfer"


# ----------------------------------------------------------------------------------------------------------------------
# What a provider is told


def test_a_window_node_is_described_by_its_shapes_and_constants(stubs):
    *_, capped = select_backend(four_layers(), H200, "auto", 64)
    assert capped.node == AttentionNode(
        op="attention", stage="verify", batch=2, num_tokens=3, num_q_heads=4, num_kv_heads=2, head_dim=8, v_head_dim=8,
        page_size=64, window=0, softcap=30.0, has_sinks=True, is_tree=False, dtype=torch.float32,
        kv_dtype=torch.float32,
    )  # fmt: skip
    assert stubs["triton"].asked[-1] == (capped.node, H200)


def test_the_caches_type_and_the_bound_of_a_row_are_part_of_a_node(stubs):
    (choice, *_) = select_backend(four_layers(), H200, "auto", 32, kv_dtype=torch.float8_e4m3fn, max_context=2048)
    assert (choice.node.dtype, choice.node.kv_dtype) == (torch.float32, torch.float8_e4m3fn)
    assert (choice.node.page_size, choice.node.max_context) == (32, 2048)
    assert "float8_e4m3fn cache" in needs(choice.node) and "at most 2048 slots" in needs(choice.node)


def test_packed_prompts_have_no_fixed_shape(stubs):
    node = select_backend(four_layers("prefill"), H200, "auto", 16)[1].node
    assert (node.op, node.batch, node.num_tokens, node.window) == ("prefill_attention", None, None, 16)
    assert (node.num_q_heads, node.num_kv_heads, node.head_dim, node.page_size) == (4, 2, 8, 16)


@pytest.mark.parametrize("kind", ["verify", "prefill"])
def test_latent_attention_is_one_key_value_head_whose_values_are_narrower(stubs, kind: str):
    graph = stage(stage_graph(latent_layer, kind, **mla_inputs(batch=1)))
    (choice,) = select_backend(graph, H200, "auto", 64)
    assert choice.node.op == ("mla_attention" if kind == "verify" else "mla_prefill_attention")
    assert (choice.node.num_q_heads, choice.node.num_kv_heads) == (4, 1)
    assert (choice.node.head_dim, choice.node.v_head_dim) == (8, 6)


@pytest.mark.parametrize("tree", [False, True])
@pytest.mark.parametrize("latent", [False, True], ids=["attention", "mla"])
def test_trees_are_told_from_chains(stubs, latent: bool, tree: bool):
    if latent:
        graph = stage_graph(latent_layer, "verify", **mla_inputs())
    else:
        graph = stage_graph(mixed_widths, "verify", **attention_inputs())
    (choice,) = select_backend(stage(graph, tree=tree), H200, "auto", 64)
    assert choice.node.is_tree == tree


def test_value_heads_of_another_width_and_low_precision_are_seen(stubs):
    inputs = attention_inputs()
    half = {n: Input(n, torch.zeros(2, 3, h, d).bfloat16()) for n, h, d in [("q", 4, 8), ("k", 2, 8), ("v", 2, 5)]}
    graph = stage(stage_graph(mixed_widths, "verify", **{**inputs, **half}))
    (choice,) = select_backend(graph, H200, "auto", 64)
    assert (choice.node.head_dim, choice.node.v_head_dim) == (8, 5)
    assert choice.node.dtype == choice.node.kv_dtype == torch.bfloat16


@pytest.mark.parametrize("backend", [{"prefill": "fla"}, {"gdn_prefill": "fla"}, {"gdn_verify": "triton"}])
def test_providers_of_delta_rules_mean_nothing_to_a_model_without_them(backend: dict[str, str]) -> None:
    with pytest.raises(BackendError, match="for gated delta nets, and this model has none: leave that entry out"):
        spec_compile(tiny_model("llama", num_hidden_layers=1), draft=None, backend=backend, compile="none")
