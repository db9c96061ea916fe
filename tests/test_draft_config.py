"""Draft configs: every key that is in one is read, or refused, or known to mean nothing, or named in a warning."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import test_draft_dflash as dflash
import test_draft_eagle as eagle
import test_draft_eagle3 as eagle3
import torch
from draft_files import target_for, write
from test_draft_eagle3 import WEIGHTS
from transformers import LlamaConfig, Qwen3Config

from spec_compile.errors import DraftError
from spec_compile.hf_integration.checkpoints.config import account_for
from spec_compile.hf_integration.checkpoints.detect import load_draft_head
from spec_compile.hf_integration.heads.draft_head import DraftHead

FORMATS: dict[str, tuple[Callable, dict]] = {
    "safeailab": (eagle3.safeailab, WEIGHTS),
    "speculators": (eagle3.speculators, WEIGHTS),
    "eagle": (eagle.published, eagle.WEIGHTS),
    "zlab": (dflash.zlab, dflash.WEIGHTS),
    "dflash speculators": (dflash.speculators, dflash.WEIGHTS),
}


def load(directory: Path, case: str, config: dict[str, object], tensors: dict | None = None) -> DraftHead:
    make, weights = FORMATS[case]
    published, held = make(**config)
    return load_draft_head(write(directory, published, held | (tensors or {})), target_for(weights))


# What transformers writes into a layer's config, today and before, and what trainers and exporters add.
_WRITTEN = {
    **{key: value for key, value in Qwen3Config().to_dict().items() if key not in ("architectures", "model_type")},
    "torch_dtype": "bfloat16", "temperature": 1.0, "top_k": 50, "num_beams": 1, "tie_encoder_decoder": False,
    "speculators_version": "0.9.0", "_name_or_path": "somewhere", "num_experts_per_tok": 8, "router_aux_loss_coef": 0.01,
    "moe_intermediate_size": 768, "n_group": 8, "image_token_id": 151655, "auto_map": {"AutoModel": "m.M"},
}  # fmt: skip
_SIZES = set(LlamaConfig().to_dict()) & {"hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"}
_SIZES |= {
    "head_dim",
    "num_hidden_layers",
    "vocab_size",
    "rope_parameters",
    "max_position_embeddings",
    "rms_norm_eps",
    "layer_types",
}


@pytest.mark.parametrize("case", FORMATS)
def test_what_transformers_and_exporters_write_is_no_news(case: str, tmp_path: Path):
    boilerplate = {key: value for key, value in _WRITTEN.items() if key not in _SIZES}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(tmp_path, case, boilerplate)


def test_sections_of_modelopt_are_no_news(tmp_path: Path):
    said = {"use_aux_hidden_state": True, "use_input_layernorm_in_first_layer": True, "use_last_layernorm": True}
    said |= {"use_mtp_layernorm": False, "eagle_aux_hidden_state_layer_ids": [], "parallel_draft_step": 1}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load(tmp_path, "safeailab", {"eagle_config": said}).taps == (2, 4, 5)


@pytest.mark.parametrize("mode", ["gqa", "mha"])
def test_an_attention_mode_that_the_numbers_of_heads_tell_is_no_news(mode: str, tmp_path: Path):
    """SpecForge's ``mha`` is ``gqa`` with as many key/value heads as query heads (its docs on DFlash-family attention)."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(tmp_path, "zlab", {"attention_mode": mode})


@pytest.mark.parametrize("case", FORMATS)
def test_an_unknown_key_is_named_in_one_warning(case: str, tmp_path: Path):
    with pytest.warns(UserWarning, match=r"keys that are not read: residual_scale, training\.stage\. If one") as seen:
        load(tmp_path, case, {"residual_scale": 0.5, "training": {"stage": 2, "resumed": False}, "quiet": None})
    assert len(seen) == 1


@pytest.mark.parametrize(
    ("case", "config", "text"),
    [
        ("safeailab", {"projector_type": "domino"}, r"projector_type='domino'. It changes what the head computes"),
        ("safeailab", {"eagle_config": {"parallel_draft_step": 4}}, r"eagle_config\.parallel_draft_step=4"),
        ("safeailab", {"target_layer_ids": [1, 3, 6]}, r"target_layer_ids=\[1, 3, 6\]"),
        ("safeailab", {"is_neox_style": False}, "is_neox_style=False"),
        ("safeailab", {"training": {"norm_before_fc": True}}, r"training\.norm_before_fc=True. It is read at the top"),
        ("safeailab", {"use_aux_hidden_state": False}, "use_aux_hidden_state=false"),
        ("speculators", {"use_aux_norm": True}, "use_aux_norm=True"),
        ("speculators", {"eagle_config": {"eagle_aux_hidden_state_layer_ids": [0, 1]}}, r"eagle_config\.eagle_aux.*at the top"),
        ("speculators", {"aux_hidden_state_layer_ids": [2, 3, 4]}, r"config says aux_hidden_state_layer_ids=\[2, 3, 4\]"),
        ("eagle", {"norm_output": True}, "norm_output=True"),
        ("eagle", {"eagle_config": {"norm_before_fc": True}}, r"eagle_config\.norm_before_fc=True"),
        ("zlab", {"input_embedding_scale": 50.5}, r"input_embedding_scale=50\.5"),
        ("zlab", {"markov_rank": 256}, "markov_rank=256"),
        ("dflash speculators", {"target_layer_ids": [1, 5]}, r"target_layer_ids=\[1, 5\]"),
        ("dflash speculators", {"dflash_config": {"sample_from_anchor": True}}, "sample_from_anchor=True.*at the top"),
    ],
)  # fmt: skip
def test_a_key_that_changes_what_the_head_computes_is_refused_where_it_is_not_read(
    case: str, config: dict[str, object], text: str, tmp_path: Path
):
    with pytest.raises(DraftError, match=text):
        load(tmp_path, case, config)


def test_the_flags_of_a_speculators_layer_stand_elsewhere():
    understood = {"": ("norm_before_residual",), "transformer_layer_config": ()}
    with pytest.raises(
        DraftError, match=r"transformer_layer_config\.norm_before_residual=True\. It is read at the top: move it"
    ):
        account_for("here", {"transformer_layer_config": {"norm_before_residual": True}}, understood)


# ----------------------------------------------------------------------------------------------------------------------
# Rotary embeddings


def _frequencies(theta: float) -> torch.Tensor:
    return 1.0 / theta ** (torch.arange(0, 8, 2).float() / 8)


_BY_TYPE = {"full_attention": {"rope_type": "default", "rope_theta": 1e6}, "sliding_attention": {"rope_type": "default"}}


@pytest.mark.parametrize(
    ("rope", "theta", "factor"),
    [
        ({"rope_theta": 1e6}, 1e6, 1),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, 1e6, 1),
        ({"rope_theta": 1e6, "rope_parameters": {"rope_type": "default"}}, 1e6, 1),
        ({"rope_theta": None, "rope_scaling": {"rope_type": "default", "rope_theta": 1e6}}, 1e6, 1),
        ({"rope_theta": None}, 1e4, 1),
        ({"rope_theta": 1e6, "rope_scaling": {"type": "linear", "factor": 2.0}}, 1e6, 2),
        ({"rope_theta": 1e6, "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}}, 1e6, 1),
        ({"rope_parameters": _BY_TYPE}, 1e6, 1),
        # What Qwen3.5's config says of itself; every module that heads are trained with rotates all of them.
        ({"rope_theta": 1e6, "partial_rotary_factor": 0.25}, 1e6, 1),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.25}}, 1e6, 1),
        ({"rope_theta": 1e6, "rope_scaling": {"type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5}}, 1e6, 2),
    ],
)
def test_a_heads_rotary_embedding_is_what_its_config_means(rope: dict, theta: float, factor: float, tmp_path: Path):
    head = load(tmp_path, "safeailab", rope)
    torch.testing.assert_close(head.rotary_emb.inv_freq, _frequencies(theta) / factor)


@pytest.mark.parametrize(
    ("rope", "text"),
    [
        ({"rope_scaling": {"rope_type": "deepseek_yarn", "factor": 4.0}}, "'deepseek_yarn', which transformers does not know"),
        ({"rope_scaling": {"type": "su", "factor": 4.0}}, "type 'su', which transformers does not know"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "type 'dynamic': its frequencies follow the length"),
        ({"rope_scaling": {"type": "yarn"}}, "Missing required keys .*'yarn'"),
        ({"rope_scaling": 2.0}, r"rope_scaling=2\.0, which must be an object"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_type": "yarn"}}, "two rotary"),
        ({"rope_parameters": {"sliding_attention": {"rope_type": "default"}}}, "by layer type"),
    ],
)  # fmt: skip
def test_a_rotary_embedding_that_cannot_be_had_is_named(rope: dict, text: str, tmp_path: Path):
    with pytest.raises(DraftError, match=text):
        load(tmp_path, "safeailab", rope)
