"""``SPEC_COMPILE_LOGS``: what it prints, and that it is quiet without."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from stage_graphs import Input, parameter, stage_graph

from spec_compile.logs import configure_logs
from spec_compile.passes.fuse_linears import fuse_linears


@pytest.fixture(autouse=True)
def _logger() -> Iterator[None]:
    """The process-wide logger as it was."""
    log = logging.getLogger("spec_compile.passes")
    before = log.level, log.handlers, log.propagate
    yield
    log.setLevel(before[0])
    log.handlers, log.propagate = before[1:]


def run_a_pass() -> None:
    def forward(x, up, gate):
        return F.linear(x, up) * F.linear(x, gate)

    x = Input("input_ids", torch.randn(2, 8))
    fuse_linears(stage_graph(forward, "verify", x=x, up=parameter(6, 8), gate=parameter(6, 8)))


@pytest.mark.parametrize(
    ("setting", "line", "graph"), [("", False, False), ("passes", True, False), (" , +passes", True, True)]
)
def test_passes_tell_what_they_did(setting: str, line: bool, graph: bool, capsys) -> None:
    configure_logs(setting)
    run_a_pass()
    printed = capsys.readouterr().err
    assert ("spec_compile.passes [verify] fuse_linears: 1 groups\n" in printed) is line
    assert ("fused_weight_0" in printed) is graph, "the graph behind the pass"
    assert bool(printed) is line


def test_a_topic_that_does_not_exist_is_named_with_those_that_do(capsys) -> None:
    with pytest.warns(
        UserWarning,
        match=r"SPEC_COMPILE_LOGS=\+pass: there is no such topic; choose from passes, \+passes, linears, \+linears\.",
    ):
        configure_logs("+pass,passes")
    run_a_pass()
    assert "fuse_linears" in capsys.readouterr().err, "the topics that do exist are on"


def test_the_environment_is_read_on_import() -> None:
    code = "import logging, spec_compile; logging.getLogger('spec_compile.passes').info('a line')"
    for setting, printed in (("passes", "spec_compile.passes a line\n"), ("", "")):
        environment = {**os.environ, "SPEC_COMPILE_LOGS": setting}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        assert done.stderr == printed
