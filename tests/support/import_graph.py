"""Which file of the package imports which: the whole graph, its circles, and what goes against the layers.

``python tests/support/import_graph.py`` prints what is wrong in a checkout and exits with 1; ``test_imports.py`` holds the
project to none. Imports count wherever they stand: at the top, inside functions, under ``TYPE_CHECKING``. A string that names a
module counts too, because registries and ``import_module`` import by name. Packages that Python runs on the way to a module do
not: ``import spec_compile.ops.tree`` runs ``ops/__init__.py``, which says nothing about what tree needs.
"""

from __future__ import annotations

import ast
import sys
from dataclasses import dataclass
from pathlib import Path

ROOMS = ("spec_compile", "hf_integration", "passes", "ops")  # top folders; all but the first are spec_compile.<folder>

# From the bottom to the top. Each file imports from its own layer and from those before it. A file belongs to the longest
# prefix of its module's name; the modules of one layer stand in one line.
LAYERS: tuple[tuple[str, ...], ...] = (
    tuple(f"spec_compile.{leaf}" for leaf in ("cache_dir", "errors", "hardware", "logs", "user_warning", "versions")),
    ("spec_compile.ops",),
    ("spec_compile.passes",),
    ("spec_compile.hf_integration",),
    ("spec_compile.runtime", "spec_compile.config", "spec_compile.draft_tree"),
    ("spec_compile.drafts",),
    ("spec_compile",),  # the public face: api, handle, explain
    tuple(
        f"spec_compile.{name}"
        for name in ("cli", "demo", "demo_head", "demo_report", "doctor", "family_matrix", "support_matrix")
    ),
)


@dataclass(frozen=True)
class Import:
    """One file importing another: two module names, and where it stands.

    Attributes:
        at_once: it runs when the importing file is imported, not in a function or for a type checker alone.
    """

    importer: str
    imported: str
    line: int
    at_once: bool


def modules(root: Path) -> dict[str, Path]:
    """Every module of the package by its dotted name; packages stand for their ``__init__.py``."""
    found = {}
    for room in ROOMS:
        base = ["spec_compile"] if room == "spec_compile" else ["spec_compile", room]
        for path in sorted((root / room).rglob("*.py")):
            inside = path.relative_to(root / room).with_suffix("").parts
            found[".".join([*base, *(inside[:-1] if inside[-1] == "__init__" else inside)])] = path
    return found


def file_imports(name: str, source: str, known: set[str]) -> list[Import]:
    """Imports of other files of the package in ``source``, wherever they stand.

    Raises:
        ValueError: a relative import, which hides the room from readers.
    """
    found = []
    for node in ast.walk(ast.parse(source)):
        targets: list[str] = []
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                raise ValueError(f"{name}, line {node.lineno}: a relative import hides the room; write the full name")
            # ``from a import b`` is a.b where that is a module, else something that a defines.
            wholes = [f"{node.module}.{alias.name}" for alias in node.names]
            targets = [whole if whole in known else node.module for whole in wholes]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.count(".") >= 2:
            targets = [node.value]
        at_once = isinstance(node, ast.Import | ast.ImportFrom) and node.col_offset == 0
        found += [Import(name, x, node.lineno, at_once) for x in dict.fromkeys(targets) if x in known and x != name]
    return found


def import_graph(root: Path) -> list[Import]:
    """All imports between files of the package in the checkout ``root``."""
    files = modules(root)
    return [edge for name, path in files.items() for edge in file_imports(name, path.read_text(encoding="utf-8"), set(files))]


def layer(module: str) -> int:
    """Index of ``module``'s layer in ``LAYERS``."""
    fits = [
        (len(prefix), index)
        for index, names in enumerate(LAYERS)
        for prefix in names
        if module == prefix or module.startswith(f"{prefix}.")
    ]
    return max(fits)[1]


def upward(edges: list[Import]) -> set[tuple[str, str]]:
    """(importer, imported) where the imported file is of a higher layer."""
    return {(edge.importer, edge.imported) for edge in edges if layer(edge.imported) > layer(edge.importer)}


def circles(edges: list[Import]) -> set[tuple[str, ...]]:
    """Groups of files that import each other, directly or around a corner: strongly connected components, sorted."""
    after: dict[str, set[str]] = {}
    for edge in edges:
        after.setdefault(edge.importer, set()).add(edge.imported)
        after.setdefault(edge.imported, set())
    reach = {name: _reachable(name, after) for name in after}
    groups = {tuple(sorted({name} | {other for other in reach[name] if name in reach[other]})) for name in after}
    return {group for group in groups if len(group) > 1}


def _reachable(start: str, after: dict[str, set[str]]) -> set[str]:
    seen: set[str] = set()
    waiting = [start]
    while waiting:
        for name in after[waiting.pop()] - seen:
            seen.add(name)
            waiting.append(name)
    return seen


def main() -> int:
    edges = import_graph(Path(__file__).resolve().parents[2])
    for group in sorted(circles(edges)):
        print("circle:", " <-> ".join(group))
        for edge in edges:
            if edge.importer in group and edge.imported in group:
                print(f"  {edge.importer}:{edge.line} imports {edge.imported}")
    wrong = upward(edges)
    for edge in edges:
        if (edge.importer, edge.imported) in wrong:
            print(f"upward: {edge.importer}:{edge.line} imports {edge.imported}")
    return 1 if wrong or circles(edges) else 0


if __name__ == "__main__":
    sys.exit(main())
