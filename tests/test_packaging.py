"""What a stranger gets: a wheel with all rooms, the licence, and commands that agree."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from spec_compile.versions import TESTED, is_tested

ROOT = Path(__file__).resolve().parents[1]

ROOMS = ("spec_compile", "hf_integration", "passes", "ops")


def room_files() -> list[tuple[str, Path]]:
    return [(room, path) for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]


@pytest.mark.parametrize(("room", "foreign"), [("ops", "transformers"), ("passes", "transformers")])
def test_lower_rooms_do_not_know_transformers(room, foreign):
    for name, path in room_files():
        if name != room:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert all(n.split(".")[0] != foreign for n in names), f"{path.relative_to(ROOT)}:{node.lineno} imports {foreign}"


def test_importing_the_package_or_its_help_needs_no_torch():
    code = (
        "import sys, spec_compile, spec_compile.cli; spec_compile.cli.build_parser().format_help(); "
        "print([m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "[]"


def test_every_folder_of_a_room_is_a_listed_package():
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    folders = set()
    for room, path in room_files():
        inside = path.parent.relative_to(ROOT / room).parts
        folders.add(".".join(["spec_compile", *([room] if room != "spec_compile" else []), *inside]))
    assert folders == listed


def test_wheel_has_every_room_and_the_licence(tmp_path):
    """Builds the wheel with the setuptools of this environment, from a copy, because a build writes beside its sources."""
    pytest.importorskip("setuptools", minversion="77")
    source = tmp_path / "source"
    for name in (*ROOMS, "pyproject.toml", "README.md", "LICENSE"):
        _copy(ROOT / name, source / name)
    code = "import setuptools.build_meta as b; print(b.build_wheel('dist'))"
    (source / "dist").mkdir()
    done = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    (wheel,) = (source / "dist").glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    for room, path in room_files():
        inside = path.relative_to(ROOT / room).as_posix()
        assert f"spec_compile/{'' if room == 'spec_compile' else room + '/'}{inside}" in names
    assert "spec_compile/py.typed" in names
    for path in (ROOT / "hf_integration" / "heads" / "smollm2-135m-eagle3").iterdir():
        assert f"spec_compile/hf_integration/heads/{path.parent.name}/{path.name}" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not [name for name in names if name.startswith(("tests/", "benchmarks/", "ops/", "passes/"))]


def _copy(source: Path, target: Path) -> None:
    import shutil

    if source.is_dir():
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, target)


def test_paths_of_the_first_release_stay_importable() -> None:
    """Heads and checkpoints have folders of their own now; scripts name the files that were there before."""
    from spec_compile.hf_integration import checkpoints, dflash, draft_checkpoint, draft_head, eagle3, mtp, mtp_checkpoint

    assert checkpoints.detect.load_draft_head is draft_checkpoint.load_draft_head
    assert checkpoints.mtp.load_mtp_head is mtp_checkpoint.load_mtp_head
    assert issubclass(eagle3.Eagle3Head, draft_head.DraftHead) and issubclass(dflash.DFlashHead, draft_head.DraftHead)
    assert issubclass(mtp.MtpHead, draft_head.DraftHead)


def test_licence_is_apache_2():
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text and "END OF TERMS AND CONDITIONS" in text


def test_makefile_and_library_name_the_same_model_package():
    from spec_compile.hf_integration.demo_model import MODEL_PACKAGE

    assert re.search(r"^DEMO_MODEL \?= (\S+)$", (ROOT / "Makefile").read_text(), re.M).group(1) == MODEL_PACKAGE


def test_ci_runs_the_commands_of_the_readme():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    commands = [line for line in script.read_text().splitlines() if line and not line.startswith(("#", "set ", "cd "))]
    assert commands == ["make check", "make test"]
    assert all(command in (ROOT / "README.md").read_text() for command in commands)


def pins(name: str) -> dict[str, list[str]]:
    """The versions of each package in a constraints file, markers aside."""
    found: dict[str, list[str]] = {}
    for line in (ROOT / name).read_text().splitlines():
        if line and not line.startswith("#"):
            package, version = line.partition(";")[0].strip().split("==")
            found.setdefault(package, []).append(version)
    return found


@pytest.mark.parametrize("name", sorted(TESTED))
def test_the_range_the_lock_and_what_was_tested_agree(name: str) -> None:
    """What pip accepts ends at the newest tested release and begins at the oldest; the lock is one of those between."""
    dependencies = map(Requirement, tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"])
    (allowed,) = [d.specifier for d in dependencies if d.name == name]
    oldest, *_, newest = map(Version, TESTED[name])
    assert all(map(allowed.contains, TESTED[name])) and is_tested(name, f"{newest}.post1+cpu")
    for outside in (f"{newest.major}.{newest.minor + 1}", f"{oldest.major}.{oldest.minor - 1}.9"):
        assert not allowed.contains(outside) and not is_tested(name, outside)
    assert set(pins("constraints.txt")[name]) <= set(TESTED[name])
    assert pins("constraints-oldest.txt")[name] == [str(oldest)]


def test_the_lock_has_everything_that_the_commands_install() -> None:
    locked = {package.lower().replace("_", "-") for package in pins("constraints.txt")}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = {Requirement(line).name for line in [*project["dependencies"], *extras["demo"], *extras["test"]]}
    assert wanted <= locked


def test_workflows_run_the_oldest_the_locked_and_the_newest() -> None:
    text = (ROOT / ".github" / "workflows" / "tests.yml").read_text()
    for arguments in ("CONSTRAINTS=constraints-oldest.txt VENV=.venv-oldest", "LATEST=1"):
        assert arguments in text and arguments in (ROOT / "docs" / "install.md").read_text()
    assert "make test ${{ matrix.arguments }}" in text and "make check" in text


def test_readme_links_lead_somewhere():
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", (ROOT / "README.md").read_text())
    missing = [link for link in links if not link.startswith(("http://", "https://")) and not (ROOT / link).exists()]
    assert missing == []


def test_every_test_file_has_a_name_of_its_own() -> None:
    """Pytest imports them by name: of two alike, in tests/ and tests/gpu/, only one is collected."""
    names = [path.name for path in Path(__file__).parent.rglob("test_*.py")]
    assert len(names) == len(set(names))
