"""Draft checkpoints on disk: how a format is told, which files are read, and that nothing is skipped in silence."""

from __future__ import annotations

import json
import warnings
import zipfile
from pathlib import Path

import pytest
import test_draft_dflash as dflash
import test_draft_eagle as eagle
import test_draft_eagle3 as eagle3
import torch
from draft_files import HIDDEN, LAYERS, VOCAB, target_for, write
from huggingface_hub.errors import EntryNotFoundError
from safetensors.torch import load_file, save_file
from tiny import tiny_model
from transformers import PreTrainedModel

from spec_compile import spec_compile
from spec_compile.errors import DraftError
from spec_compile.hf_integration.checkpoints.detect import load_draft_head
from spec_compile.hf_integration.checkpoints.eagle3_speculators import save_speculators_eagle3
from spec_compile.hf_integration.checkpoints.files import files_by_name
from spec_compile.hf_integration.heads.eagle3 import Eagle3Head, random_eagle3_head


def target(**overrides: object) -> PreTrainedModel:
    return tiny_model("llama", vocab_size=VOCAB, hidden_size=HIDDEN, num_hidden_layers=6, **overrides)


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, Eagle3Head]:
    head = random_eagle3_head(target(), draft_vocab_size=24, fc_norm=True, taps=(1, 3, 5))
    save_speculators_eagle3(head, tmp_path, "somebody/target")
    return tmp_path, head


def edit(directory: Path, config: dict | None = None, tensors: dict | None = None, drop: tuple[str, ...] = ()) -> Path:
    published = json.loads((directory / "config.json").read_text()) | (config or {})
    loaded = load_file(directory / "model.safetensors") | (tensors or {})
    return write(directory, published, {name: value for name, value in loaded.items() if name not in drop})


def same(head: Eagle3Head, other: Eagle3Head) -> bool:
    mine, others = head.own_tensors(), other.own_tensors()
    return mine.keys() == others.keys() and all(torch.equal(value, others[name]) for name, value in mine.items())


@pytest.mark.parametrize(
    "made",
    [
        {},
        {"draft_vocab_size": 24, "norm_before_residual": True, "norm_output": True},
        {"qk_norm": True, "num_hidden_layers": 2, "norm_before_fc": True, "attention_bias": True},
        {"own_embedding": True, "fc_norm": True, "fc_bias": True, "taps": (0, 6)},
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}},
    ],
    ids=lambda made: " ".join(made) or "plain",
)
def test_saved_and_loaded_is_the_same_head(made: dict, tmp_path: Path):
    model = target()
    head = random_eagle3_head(model, seed=3, **made)
    save_speculators_eagle3(head, tmp_path)
    loaded = load_draft_head(tmp_path, model)
    assert same(head, loaded) and loaded.options == head.options
    assert (loaded.taps, loaded.owned, loaded.config.rope_parameters) == (head.taps, head.owned, head.config.rope_parameters)
    assert loaded.draft_ids is None if head.draft_ids is None else torch.equal(loaded.draft_ids, head.draft_ids)
    ids, states = torch.arange(9)[None], torch.randn(1, 9, head.target_width)
    with torch.no_grad():
        out, wanted = (h.logits(h(ids, h.project(states), ids)) for h in (loaded, head))
    assert torch.equal(out, wanted)


def test_a_head_takes_the_targets_dtype(saved: tuple[Path, Eagle3Head]):
    head = load_draft_head(saved[0], target().bfloat16())
    assert {value.dtype for value in head.own_tensors().values()} == {torch.bfloat16} and head.dtype == torch.bfloat16
    assert head.rotary_emb.inv_freq.dtype == torch.float32


def test_pytorch_files_and_shards(saved: tuple[Path, Eagle3Head]):
    directory, head = saved
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    torch.save(tensors, directory / "pytorch_model.bin")
    torch.save({"lr": 1.0}, directory / "training_args.bin")
    assert same(head, load_draft_head(directory, target()))
    (directory / "pytorch_model.bin").unlink()
    names = sorted(tensors)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in shards.items():
        save_file({name: tensors[name] for name in part}, directory / file)
    weight_map = {name: file for file, part in shards.items() for name in part}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    save_file({"stray": torch.ones(1)}, directory / "not_in_the_index.safetensors")
    assert same(head, load_draft_head(directory, target()))


@pytest.mark.parametrize("architectures", [["LlamaForCausalLM"], None, ["Eagle3LlamaForCausalLM"]])
def test_eagle3_is_told_by_its_tensors_when_the_config_says_llama(saved: tuple[Path, Eagle3Head], architectures):
    """Official SafeAILab repositories."""
    directory, head = saved
    config = {**head.config.to_dict(), "architectures": architectures, "fc_norm": True}
    config["eagle_config"] = {"eagle_aux_hidden_state_layer_ids": [0, 2, 4]}
    loaded = load_draft_head(write(directory, config, load_file(directory / "model.safetensors")), target())
    assert same(head, loaded) and loaded.taps == (1, 3, 5)


def test_the_config_comes_before_the_tensor_names(saved: tuple[Path, Eagle3Head]):
    directory, _ = saved
    with pytest.raises(DraftError, match="speculators_model_type='mtp' has no reader"):
        load_draft_head(edit(directory, {"speculators_model_type": "mtp"}), target())
    with pytest.raises(DraftError, match="'DSparkDraftModel' has no reader"):
        load_draft_head(edit(directory, {"speculators_model_type": None, "architectures": ["DSparkDraftModel"]}), target())


def test_an_ordinary_model_is_no_head(tmp_path: Path):
    model = target()
    model.save_pretrained(tmp_path / "lm")
    tiny_model("llama", num_hidden_layers=1).save_pretrained(tmp_path / "one_layer")
    (tmp_path / "empty").mkdir()
    for name in ("lm", "one_layer", "empty"):
        assert load_draft_head(tmp_path / name, model) is None


@pytest.mark.parametrize("zipped", [True, False])
def test_a_model_in_a_bin_file_of_either_kind_is_a_draft(tmp_path: Path, zipped: bool):
    """The older kind is no zip archive and cannot be mapped into memory. Files beside it may hold anything."""
    sizes = {"vocab_size": VOCAB, "hidden_size": HIDDEN, "num_hidden_layers": 2}
    model, draft = tiny_model("llama", **sizes), tiny_model("llama", **sizes, seed=1)
    draft.config.save_pretrained(tmp_path)
    torch.save(draft.state_dict(), tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    assert zipfile.is_zipfile(tmp_path / "pytorch_model.bin") == zipped
    assert set(files_by_name(str(tmp_path))) == set(draft.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_draft_head(tmp_path, model) is None
    (tmp_path / "openvino_model.bin").write_bytes(b"no tensors")
    with pytest.warns(UserWarning, match=r"taken for a causal LM, .*openvino_model\.bin cannot be read"):
        spec_compile(model, draft=str(tmp_path), compile="none")
    loaded = model.spec._engine.draft.programs[0].model.state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in draft.state_dict().items())


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_damaged_file_of_a_causal_lm_is_named(name: str, tmp_path: Path):
    target = tiny_model("llama", num_hidden_layers=1)
    target.config.save_pretrained(tmp_path)
    (tmp_path / name).write_bytes(b"garbage")
    with warnings.catch_warnings():
        warnings.simplefilter("error" if name == "model.safetensors" else "ignore")
        with pytest.raises(DraftError, match=name.replace(".", r"\.")):
            spec_compile(target, draft=str(tmp_path), compile="none", progress=False)


def test_what_does_not_fit_is_named(saved: tuple[Path, Eagle3Head]):
    directory, head = saved
    for edits, text in [
        ({"drop": ("norm.weight", "fc_norm.1.weight")}, "missing: fc_norm.1.weight, norm.weight"),
        ({"tensors": {"layers.0.gate.weight": torch.ones(2)}}, "unknown: layers.0.gate.weight"),
        ({"tensors": {"norm.weight": torch.ones(7)}}, r"of another shape: norm.weight \[7\] instead of \[32\]"),
        ({"config": {"target_hidden_size": 48}}, "states of 48 features, the target's have 32"),
        (
            {"config": {"eagle_aux_hidden_state_layer_ids": [1, 3, 7]}},
            r"states \[1, 3, 7\], but the target has 6 layers",
        ),
        ({"tensors": {"d2t": head.draft_ids}}, "d2t and t2d name different draft vocabularies"),
        ({"tensors": {"d2t": torch.zeros(24, dtype=torch.int64)}}, "d2t and t2d name different draft vocabularies"),
        ({"tensors": {"d2t": -torch.arange(24)}}, "two draft ids to one target id"),
        ({"drop": ("d2t", "t2d")}, "lm_head has 24 rows, the target's 64, and no tensor d2t"),
        ({"drop": ("lm_head.weight",)}, "draft vocabulary of 24 tokens but no lm_head"),
        ({"tensors": {"embed_tokens.weight": torch.ones(50, HIDDEN)}}, "embeds 50 tokens, the target has 64"),
        ({"config": {"transformer_layer_config": None}}, "without transformer_layer_config"),
        ({"config": {"norm_before_fc": True}}, "exclude each other"),
    ]:
        before = {file: (directory / file).read_bytes() for file in ("config.json", "model.safetensors")}
        with pytest.raises(DraftError, match=text):
            load_draft_head(edit(directory, **edits), target())
        for file, data in before.items():
            (directory / file).write_bytes(data)


def test_ids_outside_the_targets_vocabulary(saved: tuple[Path, Eagle3Head]):
    with pytest.raises(DraftError, match="vocabulary has 20"):
        load_draft_head(saved[0], tiny_model("llama", vocab_size=20, hidden_size=HIDDEN, num_hidden_layers=6))


def test_broken_files(saved: tuple[Path, Eagle3Head]):
    directory, _ = saved
    (directory / "model.safetensors").write_bytes(b"not a safetensors file")
    with pytest.raises(DraftError, match=r"model\.safetensors cannot be read"):
        load_draft_head(directory, target())
    (directory / "model.safetensors").unlink()
    with pytest.raises(DraftError, match=r"holds no \.safetensors or \.bin file"):
        load_draft_head(directory, target())
    for text, said in (("{", "cannot be read"), ("[1]", "holds a list, not an object")):
        (directory / "config.json").write_text(text)
        with pytest.raises(DraftError, match=rf"config\.json {said}"):
            load_draft_head(directory, target())


def test_what_looks_like_a_head_and_is_none_known_says_what_was_seen(tmp_path: Path):
    config = {"architectures": ["SomeModel"], "draft_vocab_size": 24, "num_hidden_layers": 3}
    with pytest.raises(DraftError, match=r"has draft_vocab_size.*\['SomeModel'\].*blocks\.0\.weight"):
        load_draft_head(write(tmp_path, config, {"blocks.0.weight": torch.ones(2)}), target())


def test_medusa_heads_are_recognised(tmp_path: Path):
    directory = write(tmp_path, {"medusa_num_heads": 1}, {"0.0.linear.weight": torch.ones(2, 2)})
    with pytest.raises(DraftError, match="Medusa"):
        load_draft_head(directory, target())


def test_an_assistant_that_reads_the_targets_cache_is_refused_by_name(tmp_path: Path):
    """By its path, and as an object: what transformers would build by that name."""
    config = {"architectures": ["Gemma4AssistantForCausalLM"], "model_type": "gemma4_assistant"}
    for draft in (str(write(tmp_path, config, {"pre_projection.weight": torch.ones(2, 2)})), target()):
        if not isinstance(draft, str):
            draft.__class__ = type("Gemma4AssistantForCausalLM", (type(draft),), {})
        with pytest.raises(DraftError, match=r"Gemma4AssistantForCausalLM.*without keys and values of its own.*draft='ngram'"):
            spec_compile(target(), draft=draft, compile="none")


def test_a_hub_id_that_cannot_be_fetched(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DraftError, match="'somebody/no-such-head' is none of 'ngram', 'mtp' and None, no directory and no"):
        load_draft_head("somebody/no-such-head", target())


@pytest.mark.parametrize("kind", ["a head", "a head whose config is that of a large model", "a large model"])
def test_a_hub_id_is_fetched_only_if_it_can_be_a_head(
    saved: tuple[Path, Eagle3Head], monkeypatch: pytest.MonkeyPatch, kind: str
):
    """Of an ordinary model the config and the index of its shards are read, which transformers reads next."""
    directory, head = saved
    asked, fetched = [], []

    def download(name: str, file: str, revision: str | None = None, local_files_only: bool = False) -> str:
        asked.append(file)
        if not (directory / file).exists():
            raise EntryNotFoundError(f"{file} is not there")
        return str(directory / file)

    module = "spec_compile.hf_integration.checkpoints.detect"
    monkeypatch.setattr(f"{module}.hf_hub_download", download)
    monkeypatch.setattr("spec_compile.hf_integration.checkpoints.files.hf_hub_download", download)
    monkeypatch.setattr(f"{module}.snapshot_download", lambda name, allow_patterns: fetched.append(name) or str(directory))
    if kind != "a head":
        config = {**head.config.to_dict(), "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 32, "layer_types": None}
        (directory / "config.json").write_text(json.dumps(config | {"eagle_aux_hidden_state_layer_ids": [1, 3, 5]}))
    if kind == "a large model":
        (directory / "model.safetensors").unlink()
        index = {"weight_map": {"model.layers.31.self_attn.q_proj.weight": "model-00002-of-00002.safetensors"}}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    loaded = load_draft_head("somebody/head", target())
    assert fetched == ([] if kind == "a large model" else ["somebody/head"])
    assert loaded is None if kind == "a large model" else same(head, loaded)
    assert kind != "a large model" or asked == ["config.json", "model.safetensors.index.json"]


# Many exporters leave the target's config beside the head: SafeAILab's own EAGLE3-Vicuna1.3-13B says 40 layers
# (NickL77/BaldEagle's issue 6, sgl-project/SpecForge's 129).
@pytest.mark.parametrize("case", ["safeailab", "safeailab, whole vocabulary", "eagle", "zlab"])
def test_a_head_is_told_by_its_tensors_whatever_number_of_layers_its_config_says(case: str, tmp_path: Path):
    make = {"safeailab": eagle3.safeailab, "eagle": eagle.published, "zlab": dflash.zlab}.get(case, eagle3.full_vocabulary)
    config, tensors = make()
    weights = {"eagle": eagle.WEIGHTS, "zlab": dflash.WEIGHTS}.get(case, eagle3.WEIGHTS)
    kind = "dflash" if case == "zlab" else case if case == "eagle" else "eagle3"
    config = {key: value for key, value in config.items() if key not in ("draft_vocab_size", "dflash_config")}
    config |= {"architectures": ["LlamaForCausalLM"], "num_hidden_layers": LAYERS}
    if case == "zlab":  # its module builds what its config says
        with pytest.raises(DraftError, match="num_hidden_layers is 2 by its tensors and 8 by its config"):
            load_draft_head(write(tmp_path, config | {"mask_token_id": 1}, tensors), target_for(weights))
        return
    head = load_draft_head(write(tmp_path, config, tensors), target_for(weights))
    assert head.kind == kind and head.config.num_hidden_layers == 1


def test_layer_types_of_the_target_are_cut_to_the_heads(tmp_path: Path):
    config, tensors = eagle3.safeailab(num_hidden_layers=LAYERS, layer_types=["full_attention"] * LAYERS)
    norms = eagle3.pick(r"layers\.0\.self_attn\.(q_norm|k_norm)\.weight")
    head = load_draft_head(write(tmp_path, config, tensors | norms), target_for(eagle3.WEIGHTS))
    assert head.config.layer_types == ["full_attention"] and head.config.model_type == "qwen3"


@pytest.mark.parametrize("broken", ["weights missing", "weights of other shapes"])
def test_a_causal_lm_that_transformers_would_make_up_is_no_draft(broken: str, tmp_path: Path):
    draft = tiny_model("llama", vocab_size=VOCAB, hidden_size=HIDDEN, num_hidden_layers=2)
    draft.save_pretrained(tmp_path)
    held = load_file(tmp_path / "model.safetensors")
    if broken == "weights missing":
        held = {name: value for name, value in held.items() if ".1.mlp" not in name}
    else:
        held["model.norm.weight"] = torch.ones(HIDDEN + 1)
    save_file(held, tmp_path / "model.safetensors", metadata={"format": "pt"})
    text = r"3 of its weights are not in its files: model\.layers\.1\.mlp\.down_proj" if "missing" in broken else "mismatch"
    with pytest.raises(DraftError, match=text):
        spec_compile(target(), draft=str(tmp_path), compile="none")
