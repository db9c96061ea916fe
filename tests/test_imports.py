"""The walls of the house: no file imports upward, and no two import each other, not in a function nor for types alone."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from import_graph import LAYERS, ROOMS, Import, circles, file_imports, import_graph, layer, modules, upward

ROOT = Path(__file__).resolve().parents[1]

# What stood here when the walls were drawn. Both lists shrink and never grow.
CIRCLES_LEFT = {
    ("spec_compile.cli", "spec_compile.demo", "spec_compile.demo_head"),
}
UPWARD_LEFT: set[tuple[str, str]] = set()


@pytest.fixture(scope="module")
def graph() -> list[Import]:
    return import_graph(ROOT)


def test_no_files_import_each_other(graph: list[Import]) -> None:
    assert circles(graph) == CIRCLES_LEFT


def test_nothing_imports_upward(graph: list[Import]) -> None:
    assert upward(graph) == UPWARD_LEFT


def test_every_room_and_every_layer_has_files() -> None:
    files = modules(ROOT)
    assert {path.relative_to(ROOT).parts[0] for path in files.values()} == set(ROOMS)
    assert {layer(name) for name in files} == set(range(len(LAYERS)))


@pytest.mark.parametrize("leaf", LAYERS[0])
def test_leaves_import_nothing_of_the_project(leaf: str, graph: list[Import]) -> None:
    assert [edge for edge in graph if edge.importer == leaf] == []


def test_the_package_of_ops_imports_every_file_that_defines_one(graph: list[Import]) -> None:
    defining = {
        name
        for name, path in modules(ROOT).items()
        if name.startswith("spec_compile.ops.") and not name.startswith("spec_compile.ops.providers.")
        if "library.custom_op(" in path.read_text(encoding="utf-8")
    }
    assert defining == {edge.imported for edge in graph if edge.importer == "spec_compile.ops"}


def test_files_that_call_ops_have_them_registered(graph: list[Import]) -> None:
    """Importing anything of ``spec_compile.ops`` does; every file comes to something of it as it is imported."""
    needs_ops = {name for name, path in modules(ROOT).items() if "torch.ops.spec_compile" in path.read_text(encoding="utf-8")}
    assert len(needs_ops) >= 20
    has_ops = {name for name in modules(ROOT) if name.split(".")[1:2] == ["ops"]}
    while more := {edge.importer for edge in graph if edge.at_once and edge.imported in has_ops} - has_ops:
        has_ops |= more
    assert needs_ops - has_ops == set()


# ----------------------------------------------------------------------------------------------------------------------
# The check can fail: what it must see, planted in a copy of the package, each between files that have nothing else to do
# with each other

PLANTED_CIRCLES = {
    # at the top of both files
    ("spec_compile.ops.ngram", "spec_compile.ops.page_table"): (
        "from spec_compile.ops import page_table",
        "import spec_compile.ops.ngram",
    ),
    # one way in a function
    ("spec_compile.passes.fuse_linears", "spec_compile.passes.narrow_logits"): (
        "from spec_compile.passes.narrow_logits import narrow_logits",
        "def planted():\n    from spec_compile.passes.fuse_linears import fuse_linears",
    ),
    # both ways for types alone
    ("spec_compile.hf_integration.own_attention", "spec_compile.hf_integration.taps"): (
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from spec_compile.hf_integration.taps import Tap",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from spec_compile.hf_integration import own_attention",
    ),
    # one way by the module's name in a string, as registries do
    ("spec_compile.runtime.kv_pool", "spec_compile.runtime.turns"): (
        "import spec_compile.runtime.turns",
        'PLANTED = "spec_compile.runtime.kv_pool"',
    ),
    # around a corner, three files
    (
        "spec_compile.ops.kernels.decode_config",
        "spec_compile.ops.kernels.online_softmax",
        "spec_compile.ops.kernels.round_inputs",
    ): (
        "import spec_compile.ops.kernels.online_softmax",
        "from spec_compile.ops.kernels import round_inputs",
        "from spec_compile.ops.kernels.decode_config import DecodeConfig",
    ),
}
PLANTED_UPWARD = {
    ("spec_compile.ops.kernels.tree_mask", "spec_compile.passes.dead_code"): "from spec_compile.passes import dead_code",
    ("spec_compile.ops.kernels.cache_dtype", "spec_compile"): "from spec_compile import spec_compile",
    ("spec_compile.passes.positions", "spec_compile.hf_integration.taps"): (
        "def planted():\n    import spec_compile.hf_integration.taps"
    ),
    ("spec_compile.hf_integration.rope", "spec_compile.runtime.stats"): (
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from spec_compile.runtime.stats import SpecStats"
    ),
    ("spec_compile.runtime.graphs", "spec_compile.drafts.names"): "from spec_compile.drafts.names import check_name",
    ("spec_compile.drafts.names", "spec_compile.explain"): "def planted():\n    from spec_compile.explain import explain",
    ("spec_compile.explain", "spec_compile.cli"): "from spec_compile.cli import main",
    ("spec_compile.errors", "spec_compile.ops.tree"): "import spec_compile.ops.tree",
}


def test_the_check_sees_what_is_planted(tmp_path: Path, graph: list[Import]) -> None:
    for room in ROOMS:
        shutil.copytree(ROOT / room, tmp_path / room, ignore=shutil.ignore_patterns("__pycache__", "*.safetensors"))
    files = modules(tmp_path)
    plants = [plant for group, sources in PLANTED_CIRCLES.items() for plant in zip(group, sources, strict=True)]
    plants += [(importer, source) for (importer, _), source in PLANTED_UPWARD.items()]
    for name, source in plants:
        files[name].write_text(f"{files[name].read_text(encoding='utf-8')}\n\n{source}\n", encoding="utf-8")
    planted = import_graph(tmp_path)
    assert upward(planted) - upward(graph) == set(PLANTED_UPWARD)
    wrong = upward(planted)  # these close circles of their own with what imports downward; each is seen above
    downward = [edge for edge in planted if (edge.importer, edge.imported) not in wrong or edge in graph]
    assert circles(downward) - circles(graph) == set(PLANTED_CIRCLES)


@pytest.mark.parametrize(
    ("source", "imported"),
    [
        ("from spec_compile.passes.graph import x", {"spec_compile.passes.graph"}),
        ("from spec_compile import config", {"spec_compile.config"}),
        ("from spec_compile import spec_compile", {"spec_compile"}),
        ("if True:\n    import spec_compile.passes.graph as g, torch", {"spec_compile.passes.graph"}),
        ("log = getLogger('spec_compile.passes')", set()),
        ("import transformers\nfrom torch import fx", set()),
    ],
)
def test_what_counts_as_an_import(source: str, imported: set[str]) -> None:
    known = {"spec_compile", "spec_compile.config", "spec_compile.passes", "spec_compile.passes.graph"}
    assert {edge.imported for edge in file_imports("spec_compile.ops.tree", source, known)} == imported


def test_relative_imports_are_refused() -> None:
    with pytest.raises(ValueError, match=r"spec_compile\.ops\.tree, line 1: .* write the full name"):
        file_imports("spec_compile.ops.tree", "from .attention import cache_slots", set())
