"""MTP rounds through ``generate()``: greedy text equals plain transformers token for token in float32, chains and trees."""

from __future__ import annotations

import pytest
from mtp_files import MTP_FAMILIES
from test_eagle_families import Pair, check_rounds, make_pair
from tiny import tiny_model

from spec_compile.hf_integration.mtp import random_mtp_head

pytestmark = pytest.mark.usefixtures("one_bucket")

CHAIN, TREE = "3/1/4", "3/2/6"
CASES = ([(CHAIN, 1), (TREE, 3), (CHAIN, 5)], [(TREE, 1), (CHAIN, 3), (TREE, 5)])  # families take turns


@pytest.fixture(scope="module", params=MTP_FAMILIES)
def pair(request) -> Pair:
    reference, model = tiny_model(request.param), tiny_model(request.param)
    head = random_mtp_head(model, hidden_first=request.param == "qwen2", own_lm_head=True)
    return make_pair(reference, model, head, CASES[MTP_FAMILIES.index(request.param) % 2])


def test_heads_that_know_nothing_and_heads_that_know_the_text(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    check_rounds(pair, monkeypatch)
