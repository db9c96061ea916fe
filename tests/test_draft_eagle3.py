"""EAGLE-3 heads against the published modules: the same weights, the same logits, for every variant (tests/data/README.md)."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from draft_files import HIDDEN, LAYERS, VOCAB, draft_logits, expected, largest_difference, reference, target_for, write
from torch import Tensor

from spec_compile.errors import DraftError
from spec_compile.hf_integration.checkpoints.detect import load_draft_head
from spec_compile.hf_integration.taps import NORMED, decoder_layers, tapped

WEIGHTS = reference("draft_eagle3.safetensors")
TOLERANCE = 1e-5
_SIZES = {"hidden_size": HIDDEN, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
_SIZES |= {"rms_norm_eps": 1e-5, "max_position_embeddings": 64, "num_hidden_layers": 1, "vocab_size": VOCAB}
_CORE = r"layers\.0\.(self_attn\.[qkvo]_proj\.weight|mlp\..*|.*norm\.weight)"
_TENSORS = rf"{_CORE}|fc\.weight|norm\.weight|lm_head\.weight|d2t|t2d"


def pick(pattern: str) -> dict[str, Tensor]:
    """Weights whose name matches; norms on queries and keys only where the pattern names them."""
    found = {name: value for name, value in WEIGHTS.items() if re.fullmatch(pattern, name)}
    return {
        name: value for name, value in found.items() if "q_norm" in pattern or ("q_norm" not in name and "k_norm" not in name)
    }


def safeailab(**config: object) -> tuple[dict[str, object], dict[str, Tensor]]:
    """Config and tensors as SafeAILab and SpecForge publish them."""
    published = {"architectures": ["LlamaForCausalLMEagle3"], "model_type": "llama", "draft_vocab_size": 24}
    published |= {**_SIZES, "rope_theta": 500.0, "rope_scaling": None, **config}
    return published, {name.replace("layers.0.", "midlayer."): value for name, value in pick(_TENSORS).items()}


def speculators(more: str = "", layer: Mapping[str, object] | None = None, **config: object):
    """Config and tensors as speculators publishes them; ``more``: further tensors, a pattern."""
    sizes = {"model_type": "llama", **_SIZES, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}, **(layer or {})}
    published = {"architectures": ["Eagle3DraftModel"], "speculators_model_type": "eagle3", "draft_vocab_size": 24}
    published |= {"transformer_layer_config": sizes, "eagle_aux_hidden_state_layer_ids": [1, 2, 3], **config}
    return published, pick(rf"{_TENSORS}|embed_tokens\.weight{'|' if more else ''}{more}")


def full_vocabulary():
    config, tensors = safeailab(draft_vocab_size=VOCAB)
    maps = {"d2t": torch.zeros(VOCAB, dtype=torch.int64), "t2d": torch.ones(VOCAB, dtype=torch.bool)}
    return config, {**tensors, **maps, "lm_head.weight": WEIGHTS["lm_head_full.weight"]}


def wide():
    config, tensors = safeailab(target_hidden_size=48)
    return config, {**tensors, "fc.weight": WEIGHTS["fc_wide.weight"], "embed_tokens.weight": WEIGHTS["embed_tokens.weight"]}


def scaled_rope(**scaling: object):
    return safeailab(rope_scaling={"original_max_position_embeddings": 16, **scaling})


def specforge_fc_norm():
    config, tensors = safeailab(fc_norm=True)
    return config, tensors | pick(r"fc_norm\..*")


_FC_NORM, _SECOND_LAYER = (
    r"fc_norm\..*",
    r"layers\.1\.(self_attn\.[qkvo]_proj\.weight|mlp\..*|(input|post_attention)_layernorm.*)",
)
_QWEN3 = {"model_type": "qwen3", "use_sliding_window": False}
_SLIDING = {"model_type": "qwen3", "use_sliding_window": True, "sliding_window": 4, "layer_types": ["sliding_attention"]}
_QK = r"layers\.0\.self_attn\.(q_norm|k_norm)\.weight"
CASES: dict[str, Callable[[], tuple[dict[str, object], dict[str, Tensor]]]] = {
    "safeailab": safeailab,
    "safeailab_full_vocabulary": full_vocabulary,
    "safeailab_target_hidden_size": wide,
    "specforge": safeailab,
    "specforge_fc_norm": specforge_fc_norm,
    "specforge_llama3": lambda: scaled_rope(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0),
    "specforge_yarn": lambda: scaled_rope(
        type="yarn", factor=4.0, beta_fast=32.0, beta_slow=1.0, mscale=1.0, mscale_all_dim=0.0
    ),
    "speculators": speculators,
    "speculators_norm_before_residual": lambda: speculators(norm_before_residual=True),
    "speculators_norm_before_fc": lambda: speculators(r"input_norm\.weight", norm_before_fc=True),
    "speculators_fc_norm": lambda: speculators(_FC_NORM, fc_norm=True),
    "speculators_norm_output": lambda: speculators(norm_output=True),
    "speculators_two_layers": lambda: speculators(_SECOND_LAYER, {"num_hidden_layers": 2}),
    "speculators_attention_bias": lambda: speculators(r"layers\.0\.self_attn\..*bias", {"attention_bias": True}),
    "speculators_qwen3": lambda: speculators(_QK, _QWEN3),
    "speculators_qwen3_sliding": lambda: speculators(_QK, _SLIDING),
}


def logits(directory: Path, config: Mapping[str, object], tensors: Mapping[str, Tensor]) -> list[Tensor]:
    is_wide = "target_hidden_size" in config
    target = target_for(WEIGHTS, 48 if is_wide else HIDDEN)
    head = load_draft_head(write(directory, config, tensors), target)
    assert head is not None and head.kind == "eagle3"
    return draft_logits(head, WEIGHTS, "states_wide" if is_wide else "states")


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_the_published_module(case: str, tmp_path: Path):
    got = logits(tmp_path, *CASES[case]())
    assert largest_difference(got, expected(WEIGHTS, case)) < TOLERANCE


def test_norm_output_of_the_flat_config_means_what_it_means_to_speculators(tmp_path: Path):
    """SGLang, vLLM and (since its pull request 879) SpecForge write it into the flat config."""
    wanted = expected(WEIGHTS, "speculators_norm_output")
    for number, config in enumerate(({"norm_output": True}, {"eagle_config": {"return_hidden_post_norm": True}})):
        assert largest_difference(logits(tmp_path / str(number), *safeailab(**config)), wanted) < TOLERANCE


@pytest.mark.parametrize(
    ("case", "flag"),
    [(f"speculators_{flag}", flag) for flag in ("norm_before_residual", "norm_before_fc", "fc_norm")],
)
def test_the_flat_config_knows_the_flags_of_speculators(case: str, flag: str, tmp_path: Path):
    config, tensors = safeailab(**{flag: True})
    more = {"norm_before_fc": r"input_norm\.weight", "fc_norm": _FC_NORM}.get(flag)
    assert (
        largest_difference(logits(tmp_path, config, tensors | (pick(more) if more else {})), expected(WEIGHTS, case))
        < TOLERANCE
    )


def test_names_of_older_exports(tmp_path: Path):
    """SGLang's aux_norm_* for fc_norm.*, and a prefix ``model.``."""
    config, tensors = specforge_fc_norm()
    old = {f"fc_norm.{i}.": f"aux_norm_{level}." for i, level in enumerate(("low", "mid", "high"))}
    renamed = {}
    for name, value in tensors.items():
        start = next((start for start in old if name.startswith(start)), "")
        renamed["model." + old.get(start, "") + name.removeprefix(start)] = value
    assert largest_difference(logits(tmp_path, config, renamed), expected(WEIGHTS, "specforge_fc_norm")) < TOLERANCE


# Every case with one thing turned over: a reader that ignored the flag would still pass the parity test of another case.
_LAYER = "transformer_layer_config"
FLIPS: dict[str, tuple[str, Callable[[dict, dict], object]]] = {
    "norm_before_residual on": ("speculators", lambda config, tensors: config.update(norm_before_residual=True)),
    "norm_before_residual off": (
        "speculators_norm_before_residual",
        lambda config, tensors: config.update(norm_before_residual=False),
    ),
    "norm_output on": ("speculators", lambda config, tensors: config.update(norm_output=True)),
    "norm_output off": ("speculators_norm_output", lambda config, tensors: config.update(norm_output=False)),
    "norm_before_fc on": ("speculators", lambda config, tensors: config.update(norm_before_fc=True)),
    "norm_before_fc off": ("speculators_norm_before_fc", lambda config, tensors: config.update(norm_before_fc=False)),
    "fc_norm on": ("speculators", lambda config, tensors: config.update(fc_norm=True)),
    "fc_norm off": ("speculators_fc_norm", lambda config, tensors: config.update(fc_norm=False)),
    "fc_norm without its tensors": (
        "specforge_fc_norm",
        lambda config, tensors: [tensors.pop(f"fc_norm.{i}.weight") for i in range(3)],
    ),
    "window ignored": (
        "speculators_qwen3_sliding",
        lambda config, tensors: config[_LAYER].update(layer_types=["full_attention"], use_sliding_window=False),
    ),
    "rope base": ("specforge", lambda config, tensors: config.update(rope_theta=10000.0)),
    "llama3 rope lost": ("specforge_llama3", lambda config, tensors: config.update(rope_scaling=None)),
    "yarn rope lost": ("specforge_yarn", lambda config, tensors: config.update(rope_scaling=None)),
    "epsilon": ("safeailab", lambda config, tensors: config.update(rms_norm_eps=0.1)),
    "embedding of its own ignored": (
        "speculators",
        lambda config, tensors: tensors.update({"embed_tokens.weight": tensors["embed_tokens.weight"].flip(0)}),
    ),
}


@pytest.mark.parametrize("flip", FLIPS)
def test_a_flipped_flag_is_seen(flip: str, tmp_path: Path):
    case, turn = FLIPS[flip]
    config, tensors = CASES[case]()
    turn(config, tensors)
    try:
        got = logits(tmp_path, config, tensors)
    except DraftError as error:
        assert str(tmp_path) in str(error) or "exclude" in str(error)
    else:
        assert largest_difference(got, expected(WEIGHTS, case)) > 50 * TOLERANCE


@pytest.mark.parametrize(
    ("case", "lost", "text"),
    [
        ("speculators_two_layers", "layers.1.*", "num_hidden_layers is 1 by its tensors and 2 by its config"),
        ("speculators_attention_bias", ".*proj.bias", "attention_bias is False by its tensors and True by its config"),
        ("speculators_attention_bias", ".*o_proj.bias", "attention_bias is of some projections by its tensors and True"),
        ("speculators_qwen3", ".*[qk]_norm.weight", "norms on queries and keys is False by its tensors and True by its config"),
        ("speculators_qwen3", ".*q_norm.weight", "norms on queries and keys is False"),
        ("speculators_qwen3", ".*k_norm.weight", "missing: layers.0.self_attn.k_norm.weight"),
    ],
)
def test_what_shows_in_the_names_must_be_what_the_config_says(case: str, lost: str, text: str, tmp_path: Path):
    config, tensors = CASES[case]()
    kept = {name: value for name, value in tensors.items() if not re.fullmatch(lost, name)}
    assert len(kept) < len(tensors)
    with pytest.raises(DraftError, match=text):
        logits(tmp_path, config, kept)


@pytest.mark.parametrize(
    ("make", "taps"),
    [
        (lambda: safeailab(), (2, 4, 5)),
        (lambda: safeailab(eagle_config={"eagle_aux_hidden_state_layer_ids": [0, 3, 6]}), (1, 4, 7)),
        (lambda: safeailab(eagle_config={"eagle_aux_hidden_state_layer_ids": [4, 6, 8]}), (4, 6, 8)),
        (lambda: safeailab(eagle_config={"eagle_aux_hidden_state_layer_ids": []}), (2, 4, 5)),
        (lambda: safeailab(eagle_aux_hidden_state_layer_ids=[1, 3, 6]), (1, 3, 6)),
        (lambda: safeailab(eagle_aux_hidden_state_layer_ids=[], eagle_config={"use_aux_hidden_state": True}), (2, 4, 5)),
        (lambda: speculators(), (1, 2, 3)),
        (lambda: speculators(eagle_aux_hidden_state_layer_ids=[0, 3, 8]), (0, 3, 8)),
        (lambda: speculators(eagle_aux_hidden_state_layer_ids=None), (2, 4, 5)),
    ],
    ids=[
        "default",
        "eagle_config counts outputs",
        "but not with the boundary behind the last layer",
        "eagle_config's empty list",
        "the top counts inputs",
        "the top's empty list",
        "speculators counts inputs",
        "first and last",
        "speculators default",
    ],
)
def test_which_states_a_head_reads(make, taps: tuple[int, ...], tmp_path: Path):
    head = load_draft_head(write(tmp_path, *make()), target_for(WEIGHTS))
    assert head.taps == taps and head.target_width == 3 * HIDDEN


def test_the_ids_of_eagle_config_are_outputs_of_those_layers(tmp_path: Path):
    """SGLang's and SpecForge's id i is what layer i puts out; speculators' and vLLM's id i is what goes into layer i."""
    target, ids = target_for(WEIGHTS), [0, 3, LAYERS - 1]
    outputs, inputs, hooks = {}, {}, []
    for number, layer in enumerate(decoder_layers(target)):

        def keep(module, args, kwargs, out, number=number):
            outputs[number] = out if isinstance(out, Tensor) else out[0]
            inputs[number] = args[0] if args else kwargs["hidden_states"]

        hooks.append(layer.register_forward_hook(keep, with_kwargs=True))
    for flat in (True, False):
        key = {"eagle_aux_hidden_state_layer_ids": ids}
        head = load_draft_head(
            write(tmp_path / str(flat), *(safeailab(eagle_config=key) if flat else speculators(**key))), target
        )
        with torch.no_grad(), tapped(target, head.taps) as states:
            target(torch.arange(3, 12)[None])
        wanted = outputs if flat else inputs
        for tap, layer in zip(head.taps, ids, strict=True):
            torch.testing.assert_close(states[tap], wanted[layer])
    for hook in hooks:
        hook.remove()
    assert len(outputs) == LAYERS


def test_what_the_last_layer_puts_out_is_not_yet_normed():
    target = target_for(WEIGHTS)
    with torch.no_grad():
        target.model.norm.weight.uniform_(0.2, 3.0)
        with tapped(target, (LAYERS, NORMED)) as states:
            out = target(torch.arange(3, 12)[None], output_hidden_states=True)
        torch.testing.assert_close(target.model.norm(states[LAYERS]), states[NORMED])
    torch.testing.assert_close(states[NORMED], out.hidden_states[-1])
    assert (states[LAYERS] - states[NORMED]).abs().max() > 0.1


def test_ids_that_stand_twice_must_mean_the_same_states(tmp_path: Path):
    key = "eagle_aux_hidden_state_layer_ids"
    both = safeailab(eagle_config={key: [0, 3, 6]}, **{key: [1, 4, 7]})
    assert load_draft_head(write(tmp_path / "same", *both), target_for(WEIGHTS)).taps == (1, 4, 7)
    with pytest.raises(
        DraftError, match=r"stands twice.*\[0, 3, 6\] in eagle_config.*states \[1, 4, 7\], and \[0, 3, 6\] at the"
    ):
        both = safeailab(eagle_config={key: [0, 3, 6]}, **{key: [0, 3, 6]})
        load_draft_head(write(tmp_path / "other", *both), target_for(WEIGHTS))


def test_the_draft_vocabulary_is_a_map_of_offsets(tmp_path: Path):
    head = load_draft_head(write(tmp_path, *safeailab()), target_for(WEIGHTS))
    assert head.draft_ids.tolist() == WEIGHTS["t2d"].nonzero().flatten().tolist()
    full = load_draft_head(write(tmp_path / "full", *full_vocabulary()), target_for(WEIGHTS))
    assert full.draft_ids is None and full.owned == ("lm_head",)


def test_what_a_head_does_not_ship_is_the_targets(tmp_path: Path):
    target = target_for(WEIGHTS)
    head = load_draft_head(write(tmp_path, *safeailab()), target)
    assert head.get_input_embeddings() is target.get_input_embeddings() and head.owned == ("lm_head",)
    # speculators ships a copy of the target's embedding, which need not be held twice
    assert (
        load_draft_head(write(tmp_path / "copy", *speculators()), target).get_input_embeddings()
        is target.get_input_embeddings()
    )
