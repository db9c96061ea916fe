"""The demo's half with a trained head: what it prints, and its flow with a random head on a tiny model."""

from __future__ import annotations

import dataclasses

import pytest
from rich.text import Text
from test_cli import word_model, word_tokenizer

from spec_compile import cli, demo_head
from spec_compile.demo_report import PromptResult
from spec_compile.draft_tree import DraftTree
from spec_compile.hf_integration import demo_model
from spec_compile.hf_integration.checkpoints.eagle3_speculators import save_speculators_eagle3
from spec_compile.hf_integration.heads.eagle3 import random_eagle3_head

RUN = ("demo", "--compile", "none", "--max-new-tokens", "10", "--device", "cpu", "--dtype", "float32", "--prompt", "w1 w2 w1")


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """The demo finds a tiny model and a random head for it."""
    save_speculators_eagle3(random_eagle3_head(word_model(), draft_vocab_size=40), tmp_path)
    monkeypatch.setattr(demo_model, "load_demo_model", lambda dtype, device: (word_model(), word_tokenizer(chat=True)))
    monkeypatch.setattr(demo_model, "demo_draft_dir", lambda: tmp_path)
    monkeypatch.setenv("COLUMNS", "100")


def test_the_demo_runs_the_head_as_chain_and_tree(tiny, capsys):
    assert cli.main([*RUN, "--prompt", "w9", "--prompt", "w5 w6"]) == 0
    text = capsys.readouterr().out
    first, second = text.split("A trained EAGLE-3 head on ")
    assert second.startswith("'prompt 1' and 'prompt 3'") and "prompt 2" in first
    for words in (
        "Rounds of chain 5",
        "Rounds of tree 5/8/32",
        "31 tokens drafted",
        "] known",
        "└─ ",
        " plain generate() here",
    ):
        assert words in second
    assert "NO" not in second and second.count("yes") == 2


def test_a_head_that_changes_the_text_fails_the_demo(tiny, monkeypatch, capsys):
    from spec_compile import demo

    real = demo.measure

    def wrong(session, title, inputs, count):
        found = real(session, title, inputs, count)
        of_head = session.model.spec.stats().accept_lengths and session.model.spec._engine.target.taps
        return dataclasses.replace(found, plain_tokens=[*found.plain_tokens, 0]) if of_head else found

    monkeypatch.setattr(demo, "measure", wrong)
    assert cli.main([*RUN]) == 1
    assert "NO: chain 5, tree 5/8/32" in capsys.readouterr().out


def test_no_head_and_other_drafts_leave_it_out(tiny, capsys):
    for more in (["--no-head"], ["--draft", "none"]):
        assert cli.main([*RUN, *more]) == 0
        assert "EAGLE-3" not in capsys.readouterr().out


# root w0, children w1 (kept) and w2; w1's children w3 and w4, of which the less likely one was kept
TREE = DraftTree([4, 5, 6, 7, 8], [-1, 0, 0, 1, 1], [0, 1, 1, 2, 2], [0.0, -0.1, -2.4, -0.4, -1.2], [0, 1, 4], 9)


def test_tree_picture_has_a_line_a_token_and_marks_the_path():
    lines = demo_head.tree_picture(TREE, word_tokenizer(), colour=False).plain.splitlines()
    assert lines[:5] == ["['w0'] known", "├─ ['w1'] 90%", "│  ├─ 'w3' 67%", "│  └─ ['w4'] 30%", "└─ 'w2' 9%"]
    assert lines[5].startswith("4 tokens drafted, 2 kept (in brackets), and the model's own: 'w5'.")


def test_tree_picture_in_colour_shades_the_path_only():
    picture = demo_head.tree_picture(TREE, word_tokenizer(), colour=True)
    shaded = [picture.plain[span.start : span.end] for span in picture.spans if span.style == demo_head._KEPT]
    assert isinstance(picture, Text) and shaded == ["'w0'", "'w1'", "'w4'"]


def test_the_longest_path_is_shown_and_of_equals_one_a_chain_would_have_lost():
    straight = DraftTree([4, 5, 6], [-1, 0, 1], [0, 1, 2], [0.0, -0.1, -0.1], [0, 1, 2], 9)
    short = DraftTree([4, 5], [-1, 0], [0, 1], [0.0, -0.1], [0], 9)
    assert demo_head.pick([short, straight, TREE, straight]) is TREE
    assert demo_head.pick([short, straight]) is straight


def result(seconds: float, lengths: list[int], tokens: tuple[int, ...] = (1, 2)) -> PromptResult:
    return PromptResult("a prompt", [1, 2], list(tokens), 2.0, seconds, lengths)


@pytest.mark.parametrize(
    ("seconds", "device", "word", "explained"),
    [
        (1.0, "cpu", "faster", False),
        (2.01, "cpu", "as fast", False),
        (3.0, "cpu", "slower", True),
        (3.0, "cuda", "slower", False),
    ],
)
def test_verdict_says_what_was_measured(seconds, device, word, explained):
    text = demo_head.head_verdict({"chain 5": [result(seconds, [2])]}, device).plain
    assert f"The head as chain 5 was {word}" in text and f"{seconds:.1f} s against 2.0 s" in text
    assert ("made for GPUs" in text) == explained
