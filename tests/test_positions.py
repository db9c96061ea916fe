"""Models with learned positions: the length limit may lie behind the last one, and a draft may have fewer than the target."""

from __future__ import annotations

import operator

import pytest
import torch
from tiny import left_padded, tiny_model
from torch import fx
from transformers import GPT2Config, GPT2LMHeadModel, OPTConfig, OPTForCausalLM, PreTrainedModel

from spec_compile import spec_compile
from spec_compile.errors import PositionError
from spec_compile.hf_integration.capture import capture_window
from spec_compile.passes.graph import RuntimeInput, StageGraph, placeholders
from spec_compile.passes.positions import num_positions

POSITIONS, PROMPT = 32, 8
QUICK = {"compile": "none", "progress": False, "adaptive": False}
_IDS = {"vocab_size": 96, "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}


def positioned(kind: str) -> PreTrainedModel:
    """A tiny model with a table of 32 positions; the same weights every time."""
    torch.manual_seed(0)
    if kind == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=1, n_head=4, n_positions=POSITIONS, **_IDS))
    else:
        shape = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "ffn_dim": 96, "word_embed_proj_dim": 64}
        model = OPTForCausalLM(OPTConfig(max_position_embeddings=POSITIONS, **shape, **_IDS))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.12)
    return model.eval()


@pytest.mark.parametrize("kind", ["gpt2", "opt"])
def test_the_last_position_is_read_off_the_graph(kind: str) -> None:
    assert num_positions(capture_window(positioned(kind), 2, 3, "verify", ())) == POSITIONS


@pytest.mark.parametrize("look_up", [lambda table, i: table[i + 3], lambda table, i: torch.index_select(table, 0, i.view(-1)),
                                     lambda table, i: torch.gather(table, 0, i)])  # fmt: skip
def test_other_tables_are_found(look_up) -> None:
    """GPT-J gathers sines and cosines; CTRL indexes them."""
    gm = fx.symbolic_trace(look_up)
    table, index = placeholders(gm)
    table.meta["example_value"], index.meta["binding"] = torch.empty(20, 2), RuntimeInput("position_ids")
    assert num_positions(StageGraph(gm, "verify")) == (17 if operator.add in {n.target for n in gm.graph.nodes} else 20)


def test_rotary_models_have_any_number() -> None:
    assert num_positions(capture_window(tiny_model("llama"), 2, 3, "verify", ())) is None


@pytest.mark.parametrize("kind", ["gpt2", "opt"])
def test_a_limit_behind_the_last_position(kind: str) -> None:
    """The text ends before: plain's text. It does not: an IndexError as plain, and what was made is kept."""
    plain, model = positioned(kind), spec_compile(positioned(kind), draft="ngram", num_steps=3, **QUICK)
    inputs = left_padded(2, PROMPT) | {"do_sample": False, "pad_token_id": 0}
    longest = plain.generate(**inputs, max_length=POSITIONS + 1)
    assert model.generate(**inputs, max_length=POSITIONS + 1).equal(longest)
    ends = [int(row[-3]) for row in longest]
    for eos in ([ends[0], ends[1]], [int(longest[0, PROMPT + 5]), int(longest[1, PROMPT + 5])]):
        settings = inputs | {"eos_token_id": eos, "max_new_tokens": 60}
        assert model.generate(**settings).equal(plain.generate(**settings))
    assert model.spec.stats().mode == "rounds"
    for each in (plain, model):
        with pytest.raises(IndexError):
            each.generate(**inputs, max_new_tokens=60)
    kept = model.spec.partial_sequences()
    assert kept[0, : POSITIONS + 1].equal(longest[0])
    with pytest.raises(PositionError, match=r"prompt has 40 tokens.*positions? embeddings for 32"):
        model.generate(torch.full((1, 40), 5), max_new_tokens=2)
    assert model.generate(**inputs, max_length=20).equal(plain.generate(**inputs, max_length=20))


def test_logits_processors_near_the_last_position_run_plain() -> None:
    plain, model = positioned("gpt2"), spec_compile(positioned("gpt2"), draft="ngram", num_steps=3, **QUICK)
    inputs = {"input_ids": left_padded(1, PROMPT)["input_ids"], "do_sample": False, "repetition_penalty": 1.2}
    assert model.generate(**inputs, max_length=POSITIONS).equal(plain.generate(**inputs, max_length=POSITIONS))
    assert model.spec.stats().mode == "lockstep"
    with pytest.warns(UserWarning, match="32 positions"), pytest.raises(IndexError):
        model.generate(**inputs, max_length=POSITIONS + 9)


@pytest.mark.parametrize("kind", ["gpt2", "opt"])
def test_a_draft_with_fewer_positions_than_the_prompt_drafts_badly(kind: str) -> None:
    plain, model = tiny_model("llama"), spec_compile(tiny_model("llama"), draft=positioned(kind), num_steps=3, **QUICK)
    for length in (20, POSITIONS + 1, 48):
        inputs = left_padded(2, length) | {"do_sample": False, "max_new_tokens": 16}
        assert model.generate(**inputs).equal(plain.generate(**inputs)), length
        assert model.spec.stats().mode == "rounds"
