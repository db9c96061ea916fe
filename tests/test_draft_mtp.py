"""MTP heads of every published format against independent modules: the same tensors, the same logits.

DeepSeek's and GLM's against transformers' own ``MtpModel``, which reads the same files with its own conversions; Qwen's and
MiMo's against plain tensor code (mtp_reference.py).
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from draft_files import draft_logits, largest_difference
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from mtp_files import MTP_FAMILIES, VOCAB, published, write_checkpoint
from mtp_reference import Module
from safetensors.torch import load_file, save_file
from tiny import tiny_model
from torch import Tensor
from transformers import PreTrainedModel

from spec_compile import spec_compile
from spec_compile.errors import DraftError
from spec_compile.hf_integration.caches import cache_argument
from spec_compile.hf_integration.checkpoints.detect import _files_of_any_model, load_draft_head
from spec_compile.hf_integration.checkpoints.mtp import find_mtp, load_mtp_head
from spec_compile.hf_integration.heads.mtp import MtpHead, random_mtp_head
from spec_compile.hf_integration.taps import NORMED, decoder_layers

TOLERANCE = 2e-5
PREFILL, STEPS = 10, 2


def inputs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(3, VOCAB, (1, PREFILL + STEPS), generator=generator)
    return {"input_ids": ids, "states": torch.randn(1, PREFILL, 64, generator=generator)}


@torch.no_grad()
def transformers_logits(target: PreTrainedModel, given: dict[str, Tensor]) -> list[Tensor]:
    """transformers' own module over the target's own checkpoint, its one layer applied again and again."""
    from transformers.cache_utils import MtpCache
    from transformers.modeling_layers import MtpModel

    # Which tensors are the head's it takes from the family's large models: layer 61 of DeepSeek-V3, 46 and 92 of GLM-4.5.
    target._keys_to_ignore_on_load_unexpected = [rf"model\.layers\.{target.config.num_hidden_layers}\."]
    model = MtpModel.from_pretrained(target)
    cache, out = MtpCache(config=target.config.get_mtp_config()), []
    ids, states, positions = given["input_ids"], given["states"], torch.arange(1, PREFILL + STEPS + 1)[None]
    first = 0
    for step in range(STEPS + 1):
        last = PREFILL + step
        embeds, here = model.embed_tokens(ids[:, first:last]), positions[:, first:last]
        states = model.layers[0](
            embeds,
            states,
            position_embeddings=model.rotary_emb(embeds, position_ids=here),
            position_ids=here,
            **{cache_argument(model.layers[0].forward): cache},
            **model.create_masks_for_mtp_layer(0, embeds, cache, here),
        )
        out.append(model._project_to_logits(states))
        first, states = last, states[:, -1:]
    return out


def plain_logits(target: PreTrainedModel, given: dict[str, Tensor], tensors: dict[str, Tensor]) -> list[Tensor]:
    embedding, lm_head = target.get_input_embeddings().weight.detach(), target.get_output_embeddings().weight.detach()
    module = Module(tensors, target.config.get_text_config(decoder=True), embedding, lm_head)
    return [logits[None].float() for logits in module.chain(given["input_ids"][0], given["states"][0], STEPS)]


@dataclass
class Loaded:
    """A family, a target of it, the head as read from the target's checkpoint, and the reference's logits."""

    family: str
    target: PreTrainedModel
    head: MtpHead
    wanted: list[Tensor]


@pytest.fixture(scope="module", params=MTP_FAMILIES)
def loaded(request, tmp_path_factory) -> Loaded:
    family = request.param
    target = tiny_model(family)
    tensors = published(family, target)
    target = write_checkpoint(tmp_path_factory.mktemp(family), target, tensors, nested=family.startswith("qwen3_5"))
    head = load_mtp_head(target)
    if family not in ("deepseek_v3", "glm4_moe", "glm4_moe_lite"):
        return Loaded(family, target, head, plain_logits(target, inputs(), tensors))
    model = target
    if family == "glm4_moe_lite":  # DeepSeek's layer by another config; transformers has no MTP module for it
        same = {name: getattr(target.config, name) for name in ("rms_norm_eps", "routed_scaling_factor")}
        model = tiny_model("deepseek_v3", **same)
        model.set_input_embeddings(target.get_input_embeddings())
        model.set_output_embeddings(target.get_output_embeddings())
        model = write_checkpoint(tmp_path_factory.mktemp("as_deepseek"), model, tensors)
    return Loaded(family, target, head, transformers_logits(model, inputs()))


def test_logits_are_those_of_the_reference(loaded: Loaded) -> None:
    """Prefill, then two steps fed with the head's own output over its cache."""
    family, head, wanted = loaded.family, loaded.head, loaded.wanted
    assert head.kind == "mtp" and head.taps == (NORMED,) and head.owned == () and head.draft_ids is None
    assert head.hidden_first == (family == "qwen2")
    got = draft_logits(head, inputs())
    assert [x.shape for x in got] == [x.shape for x in wanted]
    assert largest_difference(got, wanted) < TOLERANCE


def _order(head: MtpHead) -> None:
    head.hidden_first = not head.hidden_first


def _norms(head: MtpHead) -> None:
    head.enorm, head.hnorm = head.hnorm, head.enorm


def _fed_before_the_norm(head: MtpHead) -> None:
    kept: list[Tensor] = []
    head.norm.register_forward_pre_hook(lambda _, args: kept.append(args[0]))
    head.feedback = lambda _: kept[-1][:, -1:]


def _one_plus_weight(head: MtpHead) -> None:
    for norm in (head.enorm, head.hnorm, head.norm):
        norm.weight.data += 1


def _ids_not_shifted(head: MtpHead) -> None:
    embed = head.embed
    head.embed = lambda ids: embed(ids.roll(1, 1))


@pytest.mark.parametrize("flip", [_order, _norms, _fed_before_the_norm, _one_plus_weight, _ids_not_shifted])
def test_no_convention_can_be_flipped_unnoticed(flip: Callable[[MtpHead], None], loaded: Loaded) -> None:
    head = loaded.head
    twin = MtpHead(loaded.target, sparse=hasattr(head.layers[0].mlp, "experts"), hidden_first=head.hidden_first)
    twin.load_state_dict(head.state_dict())
    assert largest_difference(draft_logits(twin.eval(), inputs()), loaded.wanted) < TOLERANCE
    flip(twin)
    last = slice(1, None) if flip is _fed_before_the_norm else slice(None)  # the prefill is fed by the target
    assert largest_difference(draft_logits(twin, inputs())[last], loaded.wanted[last]) > 500 * TOLERANCE


# ----------------------------------------------------------------------------------------------------------------------
# What is read, and what is refused


def rewrite(directory: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    """Change the MTP tensors of a checkpoint that ``write_checkpoint`` made, and its index."""
    file, index = directory / "model-00002-of-00002.safetensors", directory / "model.safetensors.index.json"
    before, listed = load_file(file), json.loads(index.read_text())
    after = change(before)
    save_file(after, file)
    kept = {name: shard for name, shard in listed["weight_map"].items() if name not in before}
    index.write_text(json.dumps({"weight_map": kept | dict.fromkeys(after, file.name)}))


def same_head(a: MtpHead, b: MtpHead) -> bool:
    ours, theirs = a.own_tensors(), b.own_tensors()
    return ours.keys() == theirs.keys() and all(torch.equal(value, theirs[name]) for name, value in ours.items())


def test_stacked_experts_are_read_too(tmp_path: Path) -> None:
    """Qwen3.6 stores them as transformers holds them; the order of the experts and of their parts must be the same."""
    target = tiny_model("qwen3_next")
    target = write_checkpoint(tmp_path, target, published("qwen3_next", target))
    head = load_mtp_head(target)

    def stack(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        experts = "mtp.layers.0.mlp.experts."
        out = {name: value for name, value in tensors.items() if not name.startswith(experts)}
        each = [[tensors[f"{experts}{i}.{part}_proj.weight"] for part in ("gate", "up", "down")] for i in range(4)]
        out[f"{experts}gate_up_proj"] = torch.stack([torch.cat([gate, up]) for gate, up, _ in each])
        return out | {f"{experts}down_proj": torch.stack([down for _, _, down in each])}

    rewrite(tmp_path, stack)
    assert same_head(head, load_mtp_head(target))


def test_a_directory_without_an_index_and_pickled_weights(tmp_path: Path) -> None:
    target = tiny_model("qwen2")
    target = write_checkpoint(tmp_path / "model", target, published("qwen2", target))
    head = load_mtp_head(target)
    both = {**load_file(tmp_path / "model/model-00001-of-00002.safetensors"), **published("qwen2", target)}
    for name in ("model.safetensors", "pytorch_model.bin"):
        directory = tmp_path / name
        directory.mkdir()
        torch.save(both, directory / name) if name.endswith("bin") else save_file(both, directory / name)
        assert same_head(head, load_mtp_head(target, directory))


def as_numbers(scales: Tensor) -> Tensor:
    return scales


def as_powers(scales: Tensor) -> Tensor:
    """UE8M0, as DeepSeek-V3.1 and later store them (huggingface/transformers' pull request 46763)."""
    return (2.0 ** torch.ceil(torch.log2(scales))).to(torch.float8_e8m0fnu)


def as_exponents(scales: Tensor) -> Tensor:
    return as_powers(scales).view(torch.uint8)


ROWS, COLUMNS = 32, 24  # of a block


def in_eight_bits(tensors: dict[str, Tensor], stored: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """Projections in float8_e4m3fn; blocks at the edges are smaller than the others."""
    out = dict(tensors)
    for name, value in tensors.items():
        if not (name.endswith("_proj.weight") and "eh_proj" not in name):
            continue
        blocks = [value[i : i + ROWS].split(COLUMNS, 1) for i in range(0, value.shape[0], ROWS)]
        scales = stored(torch.stack([torch.stack([block.abs().max() / 448 for block in row]) for row in blocks]))
        numbers = (scales.view(torch.float8_e8m0fnu) if scales.dtype == torch.uint8 else scales).float()
        spread = numbers.repeat_interleave(ROWS, 0).repeat_interleave(COLUMNS, 1)[: value.shape[0], : value.shape[1]]
        out[name] = (value / spread).to(torch.float8_e4m3fn)
        out[f"{name}_scale_inv"] = scales
    return out


def say(directory: Path, **config: object) -> None:
    """Add to a checkpoint's config."""
    said = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**said, **config}))


@pytest.mark.parametrize("stored", [as_numbers, as_powers, as_exponents])
def test_eight_bit_matrices_are_multiplied_by_their_blocks_scales(stored: Callable, tmp_path: Path) -> None:
    """DeepSeek-V3's own files, and those whose scales are powers of two."""
    target = tiny_model("deepseek_v3")
    target = write_checkpoint(tmp_path, target, published("deepseek_v3", target))
    plain = load_mtp_head(target).own_tensors()
    say(tmp_path, quantization_config={"quant_method": "fp8", "weight_block_size": [ROWS, COLUMNS], "scale_fmt": "ue8m0"})
    rewrite(tmp_path, lambda tensors: in_eight_bits(tensors, stored))
    read = load_mtp_head(target).own_tensors()
    assert read.keys() == plain.keys()
    for name, value in read.items():
        error = (value - plain[name]).abs() / plain[name].abs().amax()
        # e4m3 has three bits behind the point; a power of two leaves up to half of its range unused
        assert error.max() < (0.04 if stored is as_numbers else 0.08), name
    assert not torch.equal(read["layers.0.self_attn.o_proj.weight"], plain["layers.0.self_attn.o_proj.weight"])


def test_scales_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    target = tiny_model("deepseek_v3")
    target = write_checkpoint(tmp_path, target, published("deepseek_v3", target))
    say(tmp_path, quantization_config={"weight_block_size": [ROWS, COLUMNS]})
    rewrite(tmp_path, lambda tensors: in_eight_bits(tensors, lambda scales: scales.to(torch.int8)))
    with pytest.raises(DraftError, match=r"scales of MTP tensor layers\.0\..* are stored as int8, which is not read"):
        load_mtp_head(target)
    say(tmp_path, quantization_config={"weight_block_size": [64, 64]})
    with pytest.raises(DraftError, match=r"has scales \[\d+, \d+\]; with one for 64 x 64 numbers \(weight_block_size"):
        load_mtp_head(target)


def test_what_a_config_says_of_its_mtp_layers_is_accounted_for(tmp_path: Path) -> None:
    target = tiny_model("qwen2")
    target = write_checkpoint(tmp_path, target, published("qwen2", target))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        say(tmp_path, num_nextn_predict_layers=1, mtp_layer_types=["full_attention"], mtp_hidden_states_first=True)
        load_mtp_head(target)
    say(tmp_path, mtp_layer_types=["sliding_attention"])
    with pytest.raises(DraftError, match=r"mtp_layer_types=\['sliding_attention'\]\. It changes what the head computes"):
        load_mtp_head(target)
    say(tmp_path, mtp_layer_types=None, mtp_gate=True)
    with pytest.warns(UserWarning, match="keys that are not read: mtp_gate"):
        load_mtp_head(target)


@pytest.mark.parametrize("family", ["qwen2", "qwen3_5_text", "glm4_moe"])
def test_every_layer_of_several_is_read(family: str, tmp_path: Path) -> None:
    """Each as if the checkpoint held it alone. Qwen's share all but the layer itself, and keep that once."""
    target = tiny_model(family)
    tensors = published(family, target, layers=3)
    target = write_checkpoint(tmp_path / "all", target, tensors)
    layers = load_mtp_head(target)
    assert [type(head) for head in layers.heads] == [MtpHead] * 3
    layer = {"qwen2": r"mtp_layers\.{}\.", "qwen3_5_text": r"mtp\.layers\.{}\.", "glm4_moe": r"model\.layers\.{}\."}[family]
    first = 2 if family == "glm4_moe" else 0
    for i, head in enumerate(layers.heads):
        others = [re.compile(layer.format(first + j)) for j in range(3) if j != i]
        alone = {name: x for name, x in tensors.items() if not any(other.search(name) for other in others)}
        write_checkpoint(tmp_path / str(i), target, alone)
        assert same_head(head, load_mtp_head(target, tmp_path / str(i)))
    a, b = (head.own_tensors() for head in layers.heads[:2])
    once = {name for name, value in a.items() if value is b[name]}
    shared = {"eh_proj.weight", "enorm.weight", "hnorm.weight", "norm.weight"}
    assert once == (shared if family == "qwen3_5_text" else set())
    assert not torch.equal(a["layers.0.self_attn.o_proj.weight"], b["layers.0.self_attn.o_proj.weight"])


def test_a_shared_matrix_of_8_bits_is_shared_without_its_scales(tmp_path: Path) -> None:
    target = tiny_model("qwen3_5_text")
    tensors = published("qwen3_5_text", target, layers=2)
    narrow = tensors["mtp.fc.weight"].to(torch.float8_e4m3fn)
    scales = torch.ones(1, 1)  # of a block larger than the matrix
    target = write_checkpoint(tmp_path, target, tensors | {"mtp.fc.weight": narrow, "mtp.fc.weight_scale_inv": scales})
    first, second = load_mtp_head(target).heads
    assert second.eh_proj is first.eh_proj
    assert torch.equal(first.eh_proj.weight, narrow.float())


def test_of_several_layers_the_broken_one_is_named(tmp_path: Path) -> None:
    target = tiny_model("glm4_moe")
    tensors = published("glm4_moe", target, layers=2)
    target = write_checkpoint(
        tmp_path, target, {name: x for name, x in tensors.items() if name != "model.layers.3.hnorm.weight"}
    )
    with pytest.raises(DraftError, match=r"MTP layer 2 of 2' was read as a mtp head, but .* missing: hnorm\.weight"):
        load_mtp_head(target)


def test_matrices_of_the_heads_own(tmp_path: Path) -> None:
    """Copies of the target's are shared; others are the head's."""
    target = tiny_model("glm4_moe")
    target = write_checkpoint(tmp_path, target, published("glm4_moe", target))
    assert load_mtp_head(target).lm_head is target.get_output_embeddings()
    rewrite(tmp_path, lambda tensors: {n: 2 * x if "shared_head.head" in n else x for n, x in tensors.items()})
    head = load_mtp_head(target)
    assert head.owned == ("lm_head",)
    torch.testing.assert_close(head.lm_head.weight, 2 * target.get_output_embeddings().weight)


@pytest.mark.parametrize("family", ["deepseek_v3", "glm4_moe", "glm4_moe_lite"])
def test_types_are_those_of_the_targets_layers(family: str, tmp_path: Path) -> None:
    """transformers keeps routers' biases in float32 whatever the model's type, and from 5.24 on their matrices as well."""
    target = tiny_model(family)
    target = write_checkpoint(tmp_path, target, published(family, target), dtype=torch.bfloat16)
    head = load_mtp_head(target)
    dtypes = {name: value.dtype for name, value in head.own_tensors().items()}
    assert dtypes["layers.0.mlp.gate.e_score_correction_bias"] == torch.float32
    theirs = decoder_layers(target)[-1].state_dict()
    assert {name: value.dtype for name, value in theirs.items()} == {
        name.removeprefix("layers.0."): dtype for name, dtype in dtypes.items() if name.startswith("layers.0.")
    }
    outside = {dtype for name, dtype in dtypes.items() if not name.startswith("layers.0.")}
    assert outside == {torch.bfloat16} and head.dtype == torch.bfloat16
    if family != "glm4_moe_lite":  # transformers has no MTP module for it
        given = {name: value.bfloat16() if value.is_floating_point() else value for name, value in inputs().items()}
        got, wanted = draft_logits(head, given), transformers_logits(target, given)
        assert largest_difference(got[:1], wanted[:1]) < 0.02, "behind a fed-back state a rounding may pick another expert"


def test_a_path_is_a_head_where_its_model_is_the_targets(tmp_path: Path) -> None:
    """A smaller sibling with a head of its own is a draft model; cut-out modules are heads whatever their config says."""
    target = tiny_model("qwen2")
    write_checkpoint(tmp_path / "own", target, published("qwen2", target))
    assert load_draft_head(tmp_path / "own", target).kind == "mtp"
    assert load_draft_head(tmp_path / "own", tiny_model("qwen2", num_hidden_layers=3)) is None
    (tmp_path / "cut").mkdir()
    save_file(published("qwen2", target), tmp_path / "cut" / "model.safetensors")
    (tmp_path / "cut" / "config.json").write_text('{"num_hidden_layers": 7}')
    assert load_draft_head(tmp_path / "cut", target).kind == "mtp"
    architecture = {"architectures": ["MiMoMTP"], "num_hidden_layers": 7}
    (tmp_path / "own" / "config.json").write_text(json.dumps(architecture))
    assert load_draft_head(tmp_path / "own", target).kind == "mtp"


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    target = tiny_model("qwen2")
    with pytest.raises(DraftError, match="this target was built from a config"):
        load_mtp_head(target)
    bare = write_checkpoint(tmp_path / "bare", target, {})
    with pytest.raises(DraftError, match=r"looked for mtp\.fc\.weight, .*; it holds \d+ tensors \(lm_head\.weight"):
        load_mtp_head(bare)
    (tmp_path / "gguf").mkdir()
    (tmp_path / "gguf" / "model.gguf").touch()
    with pytest.raises(DraftError, match=r"it holds no \.safetensors or \.bin file\. GGUF files are not read"):
        load_mtp_head(target, tmp_path / "gguf")
    model = write_checkpoint(tmp_path / "model", target, published("qwen2", target))
    (tmp_path / "model" / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(DraftError, match=r"MTP tensors are in model-00002-of-00002\.safetensors, which is not there"):
        load_mtp_head(model)


def test_of_a_hub_repository_only_the_heads_files_are_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the commit that the target was loaded from; the order of looking is index before single file."""
    target = tiny_model("qwen2")
    directory = tmp_path / "cached"
    target = write_checkpoint(directory, target, published("qwen2", target))
    head, fetched = load_mtp_head(target), []

    def download(name: str, file: str, revision: str | None, local_files_only: bool) -> str:
        assert (name, revision, local_files_only) == ("somebody/model", "abc", False)
        if not (directory / file).exists():
            raise EntryNotFoundError(f"{file} is not there")
        fetched.append(file)
        return str(directory / file)

    monkeypatch.setattr("spec_compile.hf_integration.checkpoints.files.hf_hub_download", download)
    target.name_or_path, target.config._commit_hash = "somebody/model", "abc"
    assert same_head(head, load_mtp_head(target))
    assert fetched == ["model.safetensors.index.json", "model-00002-of-00002.safetensors", "config.json"]
    (directory / "model.safetensors.index.json").unlink()
    save_file(published("qwen2", target), directory / "model.safetensors")
    assert same_head(head, load_mtp_head(target))


def test_without_the_hub_what_is_not_cached_is_unknown_and_not_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub's client raises a kind of EntryNotFoundError for both; a cache says nothing of files that a repository lacks."""
    target = write_checkpoint(tmp_path / "cached", tiny_model("qwen2"), published("qwen2", tiny_model("qwen2")))
    head, asked = load_mtp_head(target), []
    target.name_or_path = "somebody/model"

    def offline(_name: str, file: str, revision: str | None, local_files_only: bool) -> str:
        if not (tmp_path / "cached" / file).exists():
            asked.extend([] if local_files_only else [file])
            raise LocalEntryNotFoundError("Please check your connection")
        return str(tmp_path / "cached" / file)

    monkeypatch.setattr("spec_compile.hf_integration.checkpoints.files.hf_hub_download", offline)
    assert same_head(head, load_mtp_head(target))
    # One after another: the config (block sizes stand there), the shard, everything.
    files = ["config.json", "model-00002-of-00002.safetensors", "model.safetensors.index.json"]
    for file in files:
        (tmp_path / "cached" / file).unlink()
        with pytest.raises(DraftError, match=rf"'somebody/model': {file} cannot be read: .*Connect once.* your connection"):
            spec_compile(target, draft="mtp", compile="none")
    assert asked == files, "a hub that does not answer is asked once"
    with pytest.warns(UserWarning, match=r"taken for a causal LM, .*model\.safetensors\.index\.json cannot be read"):
        assert not _files_of_any_model("somebody/model"), "transformers then says what it lacks"
    # A checkpoint of one file has no index, and nothing in a cache says so.
    save_file(published("qwen2", target), tmp_path / "cached" / "model.safetensors")
    target.config.save_pretrained(tmp_path / "cached")
    assert same_head(head, load_mtp_head(target))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {n: x for n, x in t.items() if "hnorm" not in n}, r"missing: hnorm\.weight"),
        (lambda t: t | {"model.layers.2.extra.weight": torch.ones(2)}, r"unknown: layers\.0\.extra\.weight"),
        (
            lambda t: {n: x[:, :-1].contiguous() if "eh_proj" in n else x for n, x in t.items()},
            r"eh_proj\.weight \[64, 127\] instead of",
        ),
        (lambda t: {n: x for n, x in t.items() if ".3.up_proj" not in n}, r"'gate': 4, 'up': 3, 'down': 4"),
        (lambda t: {n: x.to(torch.int8) if "o_proj" in n else x for n, x in t.items()}, r"o_proj\.weight is stored as int8"),
        (lambda t: {n: x.to(torch.float8_e4m3fn) if "o_proj" in n else x for n, x in t.items()}, r"stored as float8_e4m3fn"),
    ],
)
def test_what_does_not_fit_is_named(change: Callable, message: str, tmp_path: Path) -> None:
    target = tiny_model("glm4_moe")
    target = write_checkpoint(tmp_path, target, published("glm4_moe", target))
    rewrite(tmp_path, change)
    with pytest.raises(DraftError, match=message):
        load_mtp_head(target)


def test_other_heads_and_models_are_not_taken_for_mtp() -> None:
    for names in (
        ["fc.weight", "layers.0.self_attn.q_proj.weight"],
        ["midlayer.mlp.up_proj.weight", "d2t"],
        ["lm_head.weight"],
    ):
        assert find_mtp(names) is None
    name = "language_model.model.layers.61.eh_proj.weight"
    assert find_mtp([name]).modules == ({name: "eh_proj.weight"},)


def test_targets_of_other_kinds_are_refused() -> None:
    with pytest.raises(DraftError, match="GPT2LMHeadModel: an MTP head has one decoder layer of the target's kind"):
        random_mtp_head(tiny_model("gpt2"))
