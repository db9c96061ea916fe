"""The sweep over architectures: what it says of a few, and what the page that it made says of all."""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from pathlib import Path

import pytest
from bench_scripts import FOLDER, run_script
from tiny import FAMILIES, RECURRENT_FAMILIES

PAGE = Path(__file__).parent.parent / "docs" / "architectures.md"
ROW = re.compile(r"^\| `(?P<model_type>[^`]+)` \| \w* \| (?P<result>[\w ]+) \| (?P<note>.*) \|$", re.MULTILINE)


@pytest.fixture(scope="module")
def rows() -> dict[str, re.Match]:
    return {row["model_type"]: row for row in ROW.finditer(PAGE.read_text(encoding="utf-8"))}


def test_no_text_differs_and_every_refusal_has_a_reason(rows: dict[str, re.Match]) -> None:
    assert len(rows) > 150
    assert {row["result"] for row in rows.values()} <= {"accelerated", "plain", "refused", "plain fails", "not built"}
    assert all(row["note"] for row in rows.values() if row["result"] != "accelerated")


@pytest.mark.parametrize("family", [*FAMILIES, *RECURRENT_FAMILIES])
def test_the_families_of_the_tests_are_accelerated_there(rows: dict[str, re.Match], family: str) -> None:
    assert rows[family]["result"] == "accelerated"


def test_the_sweep_tells_accelerated_from_refused(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    done = run_script(str(FOLDER / "sweep_architectures.py"), "--only", "llama,bloom,blt", "--out", str(page))
    assert done.returncode == 0, done.stderr
    results = {row["model_type"]: row["result"] for row in ROW.finditer(page.read_text(encoding="utf-8"))}
    assert results == {"llama": "accelerated", "bloom": "refused", "blt": "not built"}
    assert "layers [] reach the attention interface" in page.read_text(encoding="utf-8")


def test_who_does_not_answer_is_not_taken_for_a_model_that_cannot_be_built(monkeypatch, capsys) -> None:
    """A hang or a crash may be ours."""
    spec = importlib.util.spec_from_file_location("sweep_architectures", FOLDER / "sweep_architectures.py")
    script = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, script)
    spec.loader.exec_module(script)
    monkeypatch.setattr(script, "_child", lambda model_type, results: os._exit(1))
    assert script.main(["--only", "llama"]) == 1
    assert re.search(r"^llama +no answer +no answer within", capsys.readouterr().out, re.MULTILINE)
