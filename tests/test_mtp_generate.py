"""MTP rounds through ``generate()``: greedy text equals plain transformers token for token in float32, chains and trees."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from mtp_files import MTP_FAMILIES, published, write_checkpoint
from near_ties import assert_equal_up_to_near_ties
from test_eagle_families import Pair, check_rounds, make_pair
from tiny import left_padded, tiny_model

from spec_compile import spec_compile
from spec_compile.hf_integration.heads.mtp import random_mtp_head

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


@pytest.mark.parametrize("family", ["deepseek_v3", "glm4_moe"])
def test_a_bfloat16_model_whose_routers_are_in_float32(family: str, tmp_path: Path) -> None:
    """As transformers loads it from 5.24 on: the routers' matrices stay in float32, in the model and in its MTP head."""
    target = tiny_model(family)
    model = write_checkpoint(tmp_path, target, published(family, target), dtype=torch.bfloat16)
    inputs, settings = left_padded(2, 9), {"max_new_tokens": 12, "do_sample": False}
    plain = model.generate(**inputs, **settings)
    spec_compile(model, draft="mtp", num_steps=3, compile="none", progress=False)
    ours = model.generate(**inputs, **settings)
    assert model.spec.stats().mode == "rounds"
    model.spec.remove()
    assert_equal_up_to_near_ties(model, inputs, plain, ours)
