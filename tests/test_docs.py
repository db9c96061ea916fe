"""The documentation is true as far as a machine can tell: links, anchors, commands, named files, options."""

from __future__ import annotations

import ast
import dataclasses
import re
import shlex
from pathlib import Path

import pytest

from spec_compile.cli import build_parser
from spec_compile.config import SpecConfig

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").glob("*.md")])


def prose(page: Path) -> str:
    """The page without its code blocks."""
    return re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.S | re.M)


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and mkdocs make them."""
    titles = re.findall(r"^#+ (.*)$", prose(page), re.M)
    return {re.sub(r"\s", "-", re.sub(r"[^\w\s-]", "", title.lower()).strip()) for title in titles}


def commands(page: Path) -> list[str]:
    """Lines of a page's bash blocks, without comments."""
    blocks = re.findall(r"^```bash\n(.*?)^```", page.read_text(encoding="utf-8"), re.S | re.M)
    lines = [line.split("  #")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_anchors_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        found = page if not path else page.parent / path
        assert found.exists(), f"{page.name} links to {target}, which is not there"
        assert not anchor or anchor in anchors(found), f"{page.name} links to {target}: no such heading"


def test_the_front_page_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 130


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_can_be_parsed(page: Path) -> None:
    """``make`` targets exist, ``spec-compile`` accepts its arguments, scripts are there and know their options."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for line in commands(page):
        for command in line.split("&&"):
            words = shlex.split(command)
            words = words[: words.index(">")] if ">" in words else words
            while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                words.pop(0)
            name = Path(words[0]).name
            if name == "make":
                for target in (word for word in words[1:] if "=" not in word):
                    assert re.search(rf"^{re.escape(target)}:", makefile, re.M), f"{page.name}: make has no {target}"
            elif name == "spec-compile":
                build_parser().parse_args(words[1:])
            elif name in ("python", "python3") and words[1].endswith(".py"):
                source = (ROOT / words[1]).read_text(encoding="utf-8")
                for option in (word for word in words[2:] if word.startswith("--")):
                    assert f'"{option}"' in source, f"{page.name}: {words[1]} has no {option}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_blocks_are_python(page: Path) -> None:
    for block in re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.S | re.M):
        if not block.startswith(" "):  # an excerpt from inside a function
            ast.parse(block)


@pytest.mark.parametrize("name", ["docs/architecture.md", "CONTRIBUTING.md"])
def test_files_that_are_named_are_there(name: str) -> None:
    text = prose(ROOT / name)
    named = set(re.findall(r"`((?:spec_compile|hf_integration|passes|ops|tests|benchmarks)/[\w/.]*)`", text))
    assert len(named) >= 5
    assert [path for path in sorted(named) if not (ROOT / path).exists()] == []


def test_every_option_is_on_the_options_page() -> None:
    text = (ROOT / "docs" / "options.md").read_text(encoding="utf-8")
    table = "\n".join(line for line in text.splitlines() if line.startswith("| `"))
    assert [f.name for f in dataclasses.fields(SpecConfig) if f"`{f.name}`" not in table] == []


def test_every_page_is_in_the_sites_menu() -> None:
    listed = set(re.findall(r": ([\w-]+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.M))
    assert listed == {page.name for page in (ROOT / "docs").glob("*.md")}
