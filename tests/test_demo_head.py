"""The EAGLE-3 head that comes with the package for the demo model: it loads, it fits, its card shows its measured figures."""

from __future__ import annotations

import json

import draft_report
import pytest
import torch
from draft_prompts import HELD_OUT
from eval_draft import SYSTEMS, accept_lengths
from transformers import LlamaConfig, LlamaForCausalLM

from spec_compile import spec_compile
from spec_compile.errors import DraftError, MissingDependencyError
from spec_compile.hf_integration.checkpoints.detect import load_draft_head
from spec_compile.hf_integration.demo_model import demo_draft_dir, load_demo_model

MOST_BYTES = 24e6


def demo_shaped_target(vocab_size: int = 49152) -> LlamaForCausalLM:
    """As wide, deep and many-worded as the demo model, thin elsewhere."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab_size, hidden_size=576, intermediate_size=16, num_hidden_layers=30, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, tie_word_embeddings=True, max_position_embeddings=8192,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def test_the_head_fits_the_demo_model_and_is_small():
    head = load_draft_head(str(demo_draft_dir()), demo_shaped_target())
    assert head.kind == "eagle3" and head.taps == (2, 15, 27) and head.owned == ("lm_head",)
    ids = head.draft_ids
    assert ids.shape == (8192,) and bool((ids.diff() > 0).all()) and int(ids.max()) < 49152
    assert 2 in ids.tolist(), "a head that cannot draft the end of an answer"
    assert all(bool(torch.isfinite(value).all()) for value in head.own_tensors().values())
    assert sum(path.stat().st_size for path in demo_draft_dir().iterdir()) < MOST_BYTES


def test_another_target_is_refused():
    with pytest.raises(DraftError, match="vocabulary"):
        load_draft_head(str(demo_draft_dir()), demo_shaped_target(vocab_size=4096))


def test_the_card_is_made_from_the_measurements_beside_it():
    folder = demo_draft_dir()
    log, result = (json.loads((folder / name).read_text()) for name in ("training.json", "accept.json"))
    again = [json.loads((folder / name).read_text()) for name in ("accept_cpu.json", "accept_cpu_tree.json")]
    assert (folder / "README.md").read_text() == draft_report.model_card(log, result, *again)
    assert {"training.png", "accept.png"} <= {path.name for path in folder.iterdir()}


def test_it_meets_its_goal():
    """Held-out prompts, greedy: 2.3 as a chain of 5 and 2.7 as a tree 5/8/32, and better than n-grams on every set."""
    cells = json.loads((demo_draft_dir() / "accept.json").read_text())["cells"]
    for system, goal in (("chain", 2.3), ("tree", 2.7)):
        assert draft_report.pooled(cells, system=system, temperature=0.0)["accept_length"] >= goal
        for group in HELD_OUT:
            figures = [draft_report.pooled(cells, system=s, temperature=0.0, set=group) for s in (system, "ngram")]
            assert figures[0]["accept_length"] > figures[1]["accept_length"] and figures[0]["rounds"] > 0
    for system, goal, name in (("chain", 2.3, "accept_cpu.json"), ("tree", 2.7, "accept_cpu_tree.json")):
        cells = json.loads((demo_draft_dir() / name).read_text())["cells"]
        assert draft_report.pooled(cells, system=system, temperature=0.0)["accept_length"] >= goal, f"{name}: on a CPU"


@pytest.fixture(scope="module")
def real_model():
    try:
        return load_demo_model(quiet=True)
    except MissingDependencyError as error:
        pytest.skip(str(error))


@pytest.mark.slow
def test_it_drafts_for_the_real_model(real_model):
    """Measured again here, as a tree, on one prompt of two sets and few tokens."""
    model, tokenizer = real_model
    prompts = [HELD_OUT["code"][0], HELD_OUT["maths"][0]]
    options = SYSTEMS["tree"].options
    spec_compile(model, draft=str(demo_draft_dir()), compile="none", adaptive=False, progress=False, **options)
    rounds = [length for row in accept_lengths(model, tokenizer, prompts, 0.0, 32) for length in row]
    assert sum(rounds) / len(rounds) >= 2.3
