"""``generate()``'s options behind an EAGLE head that is often right: the same text as plain transformers."""

from __future__ import annotations

import pytest
import torch
from heads import fit, options_of, reshape
from tiny import left_padded, tiny_model
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from spec_compile import spec_compile
from spec_compile.hf_integration.heads.eagle3 import random_eagle3_head

PROMPT, NEW_TOKENS = 11, 24
SHAPES = ("3/1/4", "5/4/8")


@pytest.fixture(scope="module")
def pair() -> tuple[PreTrainedModel, PreTrainedModel]:
    """A model with sliding windows and sinks, and the same compiled with a head that was taught three of its answers."""
    reference, model = tiny_model("gpt_oss"), tiny_model("gpt_oss")
    head = random_eagle3_head(model, draft_vocab_size=80)
    inputs = left_padded(3, PROMPT)
    texts = reference.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
    rows = zip(texts, inputs["attention_mask"], strict=True)
    fit(head, reference, [row[int((mask == 0).sum()) :] for row, mask in rows], first=NEW_TOKENS)
    return reference, spec_compile(model, draft=head, num_steps=3, compile="none", adaptive=False)


def check(pair: tuple, shape: str, mode: str = "rounds", **settings: object) -> Tensor:
    reference, model = pair
    reshape(model, **options_of(shape))
    inputs, settings = left_padded(3, PROMPT), {"do_sample": False} | settings
    plain, ours = (m.generate(**inputs, **settings) for m in (reference, model))
    assert model.spec.stats().mode == mode
    assert torch.equal(plain, ours), f"{shape}, {settings}"
    return plain


@pytest.mark.parametrize("shape", SHAPES)
def test_lengths_and_ends(pair: tuple, shape: str) -> None:
    """One token, a window more or less, an end forbidden for a while, answers copied, a length that cuts a window."""
    text = check(pair, shape, max_new_tokens=NEW_TOKENS)
    assert max(n for row in pair[1].spec.stats().accept_lengths for n in row) > 2, "windows must be accepted"
    for new_tokens in (1, 2, 5, 6, 7):
        check(pair, shape, max_new_tokens=new_tokens)
    ends = sorted({int(text[0, PROMPT + 6]), int(text[1, PROMPT + 3]), int(text[2, PROMPT + 9])})
    early = check(pair, shape, max_new_tokens=NEW_TOKENS, eos_token_id=ends, pad_token_id=0)
    for forbidden in (5, 9):
        later = check(pair, shape, max_new_tokens=NEW_TOKENS, eos_token_id=ends, min_new_tokens=forbidden, pad_token_id=0)
    assert not torch.equal(early, later[:, : early.shape[1]]), "the ban must matter"
    check(pair, shape, max_new_tokens=9, num_beams=1, num_return_sequences=1, use_cache=True)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_last_position_of_the_model_can_be_reached(pair: tuple, shape: str) -> None:
    """Windows reach past the end of the text; nothing there is asked for a position that the model does not have."""
    reference, model = pair
    reshape(model, **options_of(shape))
    inputs = left_padded(3, 246, seed=4)
    plain, ours = (m.generate(**inputs, max_length=256, do_sample=False) for m in (reference, model))
    assert torch.equal(plain, ours) and ours.shape[1] == reference.config.max_position_embeddings


@pytest.mark.parametrize("shape", SHAPES)
def test_sequences_of_one_prompt(pair: tuple, shape: str) -> None:
    """Sampled rows of one prompt differ, and are decided by the seed."""
    model = pair[1]
    reshape(model, **options_of(shape))

    def sampled() -> Tensor:
        torch.manual_seed(5)
        return model.generate(left_padded(1, PROMPT)["input_ids"], do_sample=True, num_return_sequences=3, max_new_tokens=12)

    text = sampled()
    assert text.shape == (3, PROMPT + 12) and len({tuple(row) for row in text.tolist()}) == 3
    assert torch.equal(text, sampled())


class Shown(BaseStreamer):
    """Keeps what a streamer is given."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.ended = False

    def put(self, value: Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.ended = True


@pytest.mark.parametrize("shape", SHAPES)
def test_a_streamer_sees_every_token_once(pair: tuple, shape: str) -> None:
    reshape(pair[1], **options_of(shape))
    shown = []
    for model in pair:
        streamer = Shown()
        model.generate(**left_padded(3, PROMPT), max_new_tokens=NEW_TOKENS, do_sample=False, streamer=streamer)
        assert streamer.ended and len(streamer.tokens) == 3 * (PROMPT + NEW_TOKENS)
        shown.append(streamer.tokens)
    assert shown[0] == shown[1]


# ----------------------------------------------------------------------------------------------------------------------
# Lockstep: rows agree on one path, drafted as a chain whatever the engine's rounds are


class Every(LogitsProcessor):
    """Forbids whatever stood three tokens before: a processor that reads the whole text."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores.scatter(1, input_ids[:, -3:-2], float("-inf"))


@pytest.mark.parametrize("shape", SHAPES)
def test_lockstep(pair: tuple, shape: str) -> None:
    check(pair, shape, "lockstep", max_new_tokens=NEW_TOKENS, repetition_penalty=1.3)
    check(pair, shape, "lockstep", max_new_tokens=NEW_TOKENS, logits_processor=[Every()])
    check(pair, shape, "lockstep", max_new_tokens=NEW_TOKENS, repetition_penalty=1.0 + 1e-6)
    check(pair, shape, max_new_tokens=8)  # rounds over the same buffers afterwards


def test_lockstep_scores(pair: tuple) -> None:
    """One row, so that nobody has to agree: drafts are accepted in lockstep too, and scores are transformers' own."""
    reference, model = pair
    reshape(model, **options_of("5/4/8"))
    asked = {"output_scores": True, "output_logits": True, "return_dict_in_generate": True, "max_new_tokens": NEW_TOKENS}
    inputs = {name: x[:1] for name, x in left_padded(3, PROMPT).items()}
    plain, ours = (m.generate(**inputs, do_sample=False, **asked) for m in (reference, model))
    assert model.spec.stats().mode == "lockstep" and torch.equal(plain.sequences, ours.sequences)
    assert max(n for row in model.spec.stats().accept_lengths for n in row) > 1, "a chain's drafts must be accepted here too"
    for name in ("scores", "logits"):
        torch.testing.assert_close(torch.stack(getattr(ours, name)), torch.stack(getattr(plain, name)), rtol=1e-4, atol=1e-4)
