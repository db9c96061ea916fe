"""Options: what is out of its domain is named before anything is compiled."""

from __future__ import annotations

import pathlib

import pytest
from tiny import tiny_model
from transformers import BertConfig, BertLMHeadModel, BertModel, PreTrainedModel

from spec_compile import SpecConfig, spec_compile
from spec_compile.drafts import make
from spec_compile.drafts.names import check_name
from spec_compile.errors import ConfigError, DraftError, SpecCompileError
from spec_compile.hf_integration.checkpoints import detect
from spec_compile.runtime import kv_pool


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("num_steps", "3", "int or None"),
        ("num_steps", 3.5, "int or None"),
        ("num_steps", True, "int or None"),
        ("page_size", 64.0, "int"),
        ("seed", "x", "int or None"),
        ("adaptive", "no", "bool"),
        ("compile", 3, "str"),
        ("simulate_accept_length", "2", "float or None"),
    ],
)
def test_a_value_of_another_type_is_named_with_the_type_wanted(option: str, value: object, expected: str):
    with pytest.raises(ConfigError, match=rf"^{option}={value!r}: expected {expected}\.$"):
        SpecConfig(**{option: value})


@pytest.mark.parametrize("seed", [2**62, -(2**70)])
def test_a_seed_has_room_for_the_rows_behind_it(seed: int):
    with pytest.raises(ConfigError, match=rf"^seed={seed}: a number of at most 62 bits"):
        SpecConfig(seed=seed)


def test_a_whole_number_is_a_fine_float():
    assert SpecConfig(simulate_accept_length=3).simulate_accept_length == 3


def test_an_ngram_has_a_bound():
    """Buffers of a round grow with it."""
    with pytest.raises(ConfigError, match=r"max_ngram=65: need .* max_ngram <= 64"):
        SpecConfig(max_ngram=65)
    assert SpecConfig(min_ngram=64, max_ngram=64).max_ngram == 64


def test_a_rate_is_a_number():
    with pytest.raises(ConfigError, match=r"simulate_accept_rates=\[True\]: probabilities from 0 to 1"):
        SpecConfig(simulate_accept_rates=[True])


@pytest.mark.parametrize(("option", "meant"), [("num_step", "num_steps"), ("pagesize", "page_size")])
def test_a_mistyped_option_is_told_its_name(option: str, meant: str):
    with pytest.raises(ConfigError, match=rf"unknown options \['{option}'\]: did you mean {meant}\? SpecConfig has"):
        spec_compile(tiny_model("llama", num_hidden_layers=1), **{option: 3})


def test_weights_without_values_are_refused_with_the_remedy():
    with pytest.raises(ConfigError, match=r"on the meta device.*from_pretrained"):
        spec_compile(tiny_model("llama", num_hidden_layers=1, device="meta"), compile="none")


def test_config_must_be_a_config():
    with pytest.raises(ConfigError, match="config=dict object: pass a SpecConfig"):
        spec_compile(tiny_model("llama"), config={"num_steps": 3})


@pytest.mark.parametrize(
    ("draft", "message"),
    [
        ("/no/such/model", "no such directory"),
        ("./nope", "no such directory"),
        ("out/run3/checkpoint", "no such directory"),
        ("checkpoints/", "no such directory"),
        ("ngrams", "did you mean 'ngram'"),
        ("NGRAM", "did you mean 'ngram'"),
        ("MTP", "did you mean 'mtp'"),
        ("NEXTN", "did you mean 'mtp'"),
        ("none", "draft=None to draft nothing"),
        ("", "draft=None to draft nothing"),
        ("EAGLE3", "path or hub id of an EAGLE-3 head"),
        ("draft_model", "path or hub id of a smaller causal LM"),
        ("medusa", "not supported"),
        (__file__, "is a file: pass the directory"),
    ],
)
def test_a_draft_that_is_not_there_is_said_to_be_so_without_the_hub(draft: str, message: str, monkeypatch: pytest.MonkeyPatch):
    def ask(name: str) -> None:
        raise AssertionError(f"the hub was asked for {name!r}")

    monkeypatch.setattr(detect, "_config_from_hub", ask)
    with pytest.raises(DraftError, match=message):
        spec_compile(tiny_model("llama", num_hidden_layers=1), draft=draft, compile="none")


@pytest.mark.parametrize("draft", ["someone/model_mtp", "someone/eagle3", "gpt2", "someone/ngrams", "me/ngram"])
def test_what_may_be_a_repository_goes_to_the_hub(draft: str):
    check_name(draft)


@pytest.mark.parametrize(
    ("kind", "why"), [(BertModel, "no causal language"), (BertLMHeadModel, "BertSelfAttention is not causal")]
)
def test_a_model_that_is_not_causal_is_the_drafts_fault(kind: type[PreTrainedModel], why: str):
    small = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    draft = kind(BertConfig(**small)).eval()
    with pytest.raises(DraftError, match=rf"^draft={kind.__name__} object.*{why}.*Use 'ngram'") as said:
        spec_compile(tiny_model("llama", num_hidden_layers=1), draft=draft, compile="none")
    assert "spec_compile() out" not in str(said.value), "that would be advice about the target"


@pytest.mark.parametrize(("size", "told"), [(80, True), (128, True), (96, False), (100, False)])
def test_a_draft_of_another_vocabulary_is_told_once(size: int, told: bool, monkeypatch: pytest.MonkeyPatch):
    said: list[str] = []
    monkeypatch.setattr(make.log, "warning", lambda text, *args: said.append(text % args))
    draft = tiny_model("llama", num_hidden_layers=1, vocab_size=size)
    spec_compile(tiny_model("llama", num_hidden_layers=1), draft=draft, compile="none")
    wanted = f"draft=LlamaForCausalLM object has a vocabulary of {size} tokens, the target of 96: do they share a tokenizer?"
    assert said == ([wanted] if told else [])


def test_an_empty_directory_holds_no_draft(tmp_path: pathlib.Path):
    with pytest.raises(DraftError, match=r"the directory is empty; looked for config\.json"):
        spec_compile(tiny_model("llama", num_hidden_layers=1), draft=tmp_path, compile="none")


def test_a_draft_in_the_home_directory(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    tiny_model("llama", num_hidden_layers=1).save_pretrained(tmp_path / "draft")
    model = spec_compile(tiny_model("llama", num_hidden_layers=1), draft="~/draft", compile="none")
    assert "causal_lm" in model.spec.explain()


def test_a_drafts_path_may_be_a_path(tmp_path: pathlib.Path):
    tiny_model("llama").save_pretrained(tmp_path)
    model = spec_compile(tiny_model("llama"), draft=tmp_path, compile="none")
    assert "causal_lm" in model.spec.explain()


def test_more_than_the_machine_has_is_an_error_and_not_the_end(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(kv_pool, "_available_memory", lambda: 4 << 20)
    model = spec_compile(tiny_model("llama"), compile="none")
    prompt = {"input_ids": tiny_model("llama").dummy_inputs["input_ids"][:1, :3] + 3}
    with pytest.raises(SpecCompileError, match=r"KV pool of 1 rows × 8192 tokens on cpu \(.* available\)"):
        model.generate(**prompt, max_new_tokens=5000, do_sample=False)
    assert model.generate(**prompt, max_new_tokens=4, do_sample=False).shape[1] == 7, "a smaller request still runs"
