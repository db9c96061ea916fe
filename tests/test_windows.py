"""Sliding windows, sinks, soft-capping and latent attention far past the window: greedy text through ``generate()`` equals
plain transformers token for token in float32, behind chains and trees that are themselves deeper than the window."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from heads import fit, options_of, reshape
from ngrams import looked_up
from tiny import left_padded, tiny_model
from torch import Tensor
from transformers import PreTrainedModel

from spec_compile import spec_compile
from spec_compile.config import chain
from spec_compile.drafts.ngram import NgramDraft
from spec_compile.hf_integration.heads.eagle3 import random_eagle3_head
from spec_compile.runtime.engine import Engine

FAMILIES = ("mistral", "gemma2", "gemma3_text", "cohere2", "gpt_oss", "deepseek_v3")
WINDOW, PROMPT, NEW_TOKENS = 3, 11, 64
CHAIN, TREE = "5/1/6", "5/3/10"  # both reach past a window of 3 from within
BATCHES = (1, 3, 5)


pytestmark = pytest.mark.usefixtures("one_bucket")


def windowed_model(family: str) -> PreTrainedModel:
    return tiny_model(family, **({} if family == "deepseek_v3" else {"sliding_window": WINDOW}))


@dataclass
class Compiled:
    """A family's model compiled with a head that knows some of the text.

    Attributes:
        inputs: of five ragged rows.
        texts: what plain transformers writes, int64 [5, PROMPT + NEW_TOKENS].
        number: of the family, so that batches take turns.
    """

    model: PreTrainedModel
    inputs: dict[str, Tensor]
    texts: Tensor
    number: int

    def check(self, *whole: int) -> None:
        """Every batch gives the plain texts, those of ``whole`` to the end and the others the first tokens; drafts are refused,
        and accepted past the window."""
        seen: set[int] = set()
        for batch in BATCHES:
            new_tokens = NEW_TOKENS if batch in whole else 16
            inputs = {name: x[:batch] for name, x in self.inputs.items()}
            ours = self.model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)
            assert self.model.spec.stats().mode == "rounds"
            assert torch.equal(ours, self.texts[:batch, : PROMPT + new_tokens]), f"batch {batch}"
            seen |= {length for row in self.model.spec.stats().accept_lengths for length in row}
        assert 1 in seen and max(seen) > WINDOW, sorted(seen)


@pytest.fixture(scope="module", params=FAMILIES)
def compiled(request) -> Compiled:
    reference, model = windowed_model(request.param), windowed_model(request.param)
    inputs = left_padded(5, PROMPT, seed=1)
    texts = reference.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
    head = random_eagle3_head(model, draft_vocab_size=64)
    fit(head, reference, [texts[0]], first=NEW_TOKENS, steps=5, noise=0.1)  # row 0 has no padding and is in every batch
    model = spec_compile(model, draft=head, compile="none", num_steps=3, adaptive=False)
    return Compiled(model, inputs, texts, FAMILIES.index(request.param))


def test_eagle3_chains(compiled: Compiled) -> None:
    reshape(compiled.model, **options_of(CHAIN))
    compiled.check(BATCHES[compiled.number % 3])


def test_eagle3_trees(compiled: Compiled) -> None:
    reshape(compiled.model, **options_of(TREE))
    compiled.check(BATCHES[(compiled.number + 1) % 3])


def test_ngram_drafts(compiled: Compiled, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(NgramDraft, "extend", looked_up(compiled.texts, compiled.inputs["attention_mask"]))
    engine = compiled.model.spec._engine  # the windows are as wide as the chains', so nothing more is captured
    draft = NgramDraft(chain(5), min_ngram=1, max_ngram=3)
    monkeypatch.setattr(compiled.model.spec, "_engine", Engine(engine.target, draft, engine.config))
    compiled.check(*BATCHES)


def test_a_windowed_draft_that_is_the_target_takes_the_fewest_rounds() -> None:
    """A causal LM whose own window differed from the target's would be refused sooner or later."""
    target, draft, reference = (tiny_model("mistral", sliding_window=WINDOW, num_hidden_layers=1) for _ in range(3))
    model = spec_compile(target, draft=draft, num_steps=3, compile="none")
    settings = left_padded(5, PROMPT, seed=1) | {"max_new_tokens": NEW_TOKENS + 1, "do_sample": False}
    assert torch.equal(model.generate(**settings), reference.generate(**settings))
    assert {len(row) for row in model.spec.stats().accept_lengths} == {NEW_TOKENS // 4}
