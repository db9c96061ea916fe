"""DFlash heads against z-lab's, speculators' and transformers' own modules: the same weights, the same logits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from draft_files import HIDDEN, LAYERS, VOCAB, expected, largest_difference, reference, target_for, write
from paged_heads import paged
from torch import Tensor
from torch._dynamo.exc import BackendCompilerFailed
from transformers import DynamicCache

from spec_compile.errors import DraftError
from spec_compile.hf_integration.attention_interface import capture_context
from spec_compile.hf_integration.checkpoints.detect import load_draft_head
from spec_compile.hf_integration.heads.dflash import DFlashHead, default_dflash_taps, random_dflash_head
from spec_compile.hf_integration.taps import NORMED
from spec_compile.ops.kv_cache import kv_write

WEIGHTS = reference("draft_dflash.safetensors")
BLOCK, TOLERANCE = 4, 1e-5
_LAYER = {"hidden_size": HIDDEN, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
_LAYER |= {"rms_norm_eps": 1e-5, "max_position_embeddings": 64, "num_hidden_layers": 2}
_ROPE = {"rope_type": "default", "rope_theta": 500.0}


def published(*names: str) -> dict[str, Tensor]:
    """A head's tensors, with the named ones."""
    optional = {"lm_head.weight", "embed_tokens.weight", "target_lm_head.weight", "d2t", "t2d", "states", "input_ids"} - set(
        names
    )
    return {name: value for name, value in WEIGHTS.items() if not name.startswith("expected.") and name not in optional}


def zlab(**config: object):
    settings = {"mask_token_id": VOCAB - 1, "target_layer_ids": [1, 5]}
    flat = {"architectures": ["DFlashDraftModel"], "model_type": "qwen3", "block_size": BLOCK, "num_target_layers": LAYERS}
    return {**flat, **_LAYER, "rope_theta": 500.0, "vocab_size": VOCAB, "dflash_config": settings, **config}, published()


def transformers():
    names = {"fc.weight": "encoder.fc.weight", "hidden_norm.weight": "encoder.output_norm_enc.weight"}
    config = {"architectures": ["MuseGlimmerAssistantModel"], "model_type": "muse_glimmer_assistant", **_LAYER}
    config |= {"block_size": BLOCK, "mask_token_id": VOCAB - 1, "target_layer_ids": [1, 5], "rope_parameters": _ROPE}
    config |= {"layer_types": ["full_attention"] * 2}
    return config, {names.get(name, name): value for name, value in published().items()}


_WINDOWED = {"model_type": "qwen3", **_LAYER, "rope_parameters": _ROPE, "vocab_size": VOCAB, "sliding_window": 8}
_WINDOWED |= {"use_sliding_window": True, "layer_types": ["full_attention", "sliding_attention"]}


def speculators(**config: object):
    layer = {"model_type": "qwen3", **_LAYER, "rope_parameters": _ROPE, "vocab_size": VOCAB}
    flat = {"architectures": ["DFlashSpeculator"], "speculators_model_type": "dflash", "transformer_layer_config": layer}
    flat |= {"block_size": BLOCK, "mask_token_id": VOCAB - 1, "aux_hidden_state_layer_ids": [2, 6], "draft_vocab_size": 24}
    return {**flat, **config}, published("lm_head.weight", "d2t", "t2d")


CASES: dict[str, Callable] = {"zlab": zlab, "transformers": transformers, "speculators": speculators}


def block_logits(head: DFlashHead, cached: bool = True) -> list[Tensor]:
    """Logits of every slot of a block behind T tokens, then of one behind T + 2, the way tests/data made them."""
    ids, states = WEIGHTS["input_ids"], WEIGHTS["states"]
    length, outs, cache = ids.shape[1] - 3, [], DynamicCache()
    with torch.no_grad():
        for first, last in ((0, length), (length, length + 2)):
            if not cached:
                cache, first = DynamicCache(), 0
            context = head.project(states[:, first:last])
            for layer, (keys, values) in enumerate(head.context_kv(context, torch.arange(first, last)[None])):
                cache.update(keys.transpose(1, 2), values.transpose(1, 2), layer)
            outs.append(head.logits(head(head.block(ids[:, last]), torch.arange(last, last + BLOCK)[None], cache)))
            cache.crop(-BLOCK)
    return outs


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_the_published_module(case: str, cached: bool, tmp_path: Path):
    head = load_draft_head(write(tmp_path, *CASES[case]()), target_for(WEIGHTS))
    assert (head.kind, head.block_size, head.num_drafts, head.mask_token_id) == ("dflash", BLOCK, BLOCK - 1, VOCAB - 1)
    assert largest_difference(block_logits(head, cached), expected(WEIGHTS, case)) < TOLERANCE


@pytest.mark.parametrize("case", CASES)
def test_all_three_conventions_of_layer_ids_name_the_same_states(case: str, tmp_path: Path):
    """z-lab and transformers count outputs, [1, 5]; speculators counts states, [2, 6]."""
    assert load_draft_head(write(tmp_path, *CASES[case]()), target_for(WEIGHTS)).taps == (2, 6)


def test_ids_that_a_config_leaves_out(tmp_path: Path):
    target = target_for(WEIGHTS)
    config, tensors = zlab(dflash_config={"mask_token_id": VOCAB - 1})
    assert load_draft_head(write(tmp_path / "zlab", config, tensors), target).taps == default_dflash_taps(LAYERS, 2) == (2, 6)
    wide = {"fc.weight": torch.ones(HIDDEN, 3 * HIDDEN)}
    config, tensors = speculators(aux_hidden_state_layer_ids=None)
    assert load_draft_head(write(tmp_path / "speculators", config, tensors | wide), target).taps == (2, 4, 5)
    assert default_dflash_taps(36, 5) == (2, 10, 18, 26, 34)  # z-lab's Qwen3-8B head lists outputs 1, 9, 17, 25, 33


def swap_layers(tensors: dict[str, Tensor]) -> None:
    first = {name: value for name, value in tensors.items() if name.startswith("layers.0.")}
    for name, value in first.items():
        other = name.replace("layers.0.", "layers.1.")
        tensors[name], tensors[other] = tensors[other], value


FLIPS: dict[str, Callable[[dict, dict], object]] = {
    "rope base": lambda config, tensors: config.update(rope_theta=10000.0),
    "epsilon": lambda config, tensors: config.update(rms_norm_eps=0.1),
    "mask token": lambda config, tensors: config["dflash_config"].update(mask_token_id=3),
    "hidden norm": lambda config, tensors: tensors.update({"hidden_norm.weight": torch.ones(HIDDEN)}),
    "layers swapped": lambda config, tensors: swap_layers(tensors),
}


@pytest.mark.parametrize("flip", FLIPS)
def test_a_flipped_setting_is_seen(flip: str, tmp_path: Path):
    config, tensors = zlab()
    FLIPS[flip](config, tensors)
    head = load_draft_head(write(tmp_path, config, tensors), target_for(WEIGHTS))
    assert largest_difference(block_logits(head), expected(WEIGHTS, "zlab")) > 50 * TOLERANCE


def test_a_block_sees_all_of_itself(tmp_path: Path):
    """A causal block would not let the second slot depend on how many masks follow it."""
    head = load_draft_head(write(tmp_path, *zlab()), target_for(WEIGHTS))
    with torch.no_grad():
        short, long = (head(head.block(torch.tensor([5]))[:, :n], torch.arange(n)[None])[0, 1] for n in (2, BLOCK))
    assert (short - long).abs().max() > 1e-3


def test_heads_that_draft_from_the_roots_slot_too(tmp_path: Path):
    head = load_draft_head(write(tmp_path, *speculators(sample_from_anchor=True)), target_for(WEIGHTS))
    assert (head.first_slot, head.num_drafts) == (0, BLOCK)


_SETTINGS = {"mask_token_id": VOCAB - 1, "target_layer_ids": [1, 5]}


@pytest.mark.parametrize("name", ["sample_from_anchor", "query_zero_predicts_next"])
@pytest.mark.parametrize("inside", [True, False])
def test_every_spelling_of_drafts_from_the_roots_slot_is_read(name: str, inside: bool, tmp_path: Path):
    """SGLang's issues 40144, 40181 and 40203: read the other way, every draft stands one place off."""
    said = {"dflash_config": _SETTINGS | {name: True}} if inside else {name: True}
    head = load_draft_head(write(tmp_path, *zlab(**said)), target_for(WEIGHTS))
    assert (head.first_slot, head.num_drafts) == (0, BLOCK)
    with pytest.raises(DraftError, match="its config says both"):
        other = {"query_zero_predicts_next": False} if name == "sample_from_anchor" else {"sample_from_anchor": False}
        load_draft_head(write(tmp_path, *zlab(**said, **other)), target_for(WEIGHTS))


def test_the_last_layers_state_is_the_one_that_the_formats_own_module_reads(tmp_path: Path):
    """z-lab's and transformers' modules index transformers' hidden states, which end behind the final norm; speculators' come
    from vLLM, which hands the last layer's output over as it is."""
    named = {"mask_token_id": VOCAB - 1, "target_layer_ids": [1, LAYERS - 1]}
    assert load_draft_head(write(tmp_path / "a", *zlab(dflash_config=named)), target_for(WEIGHTS)).taps == (2, NORMED)
    last = speculators(aux_hidden_state_layer_ids=[2, LAYERS])
    assert load_draft_head(write(tmp_path / "b", *last), target_for(WEIGHTS)).taps == (2, LAYERS)


def test_states_that_stand_beside_the_layers_must_be_the_same(tmp_path: Path):
    name = "eagle_aux_hidden_state_layer_ids"
    assert load_draft_head(write(tmp_path / "a", *zlab(**{name: [2, 6]})), target_for(WEIGHTS)).taps == (2, 6)
    with pytest.raises(DraftError, match=r"target_layer_ids=\[1, 5\] are the states \[2, 6\], and .* says \[1, 5\]"):
        load_draft_head(write(tmp_path / "b", *zlab(**{name: [1, 5]})), target_for(WEIGHTS))


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: zlab(dflash_config={"target_layer_ids": [1, 5]}), "no mask_token_id"),
        (lambda: zlab(block_size=None), "no block_size"),
        (lambda: zlab(dflash_config={"mask_token_id": 64, "target_layer_ids": [1, 5]}), "mask token 64 is not among the 64"),
        (lambda: zlab(dflash_config={"mask_token_id": 1, "target_layer_ids": [1, 8]}), r"states \[2, 9\]"),
        (lambda: zlab(dflash_config={"mask_token_id": 1, "projector_type": "domino"}), "'domino' has no reader"),
        (
            lambda: zlab(use_sliding_window=True, sliding_window=8, layer_types=["full_attention", "sliding_attention"]),
            "sliding-window layers",
        ),
        (lambda: ({**transformers()[0], "layer_types": None}, transformers()[1]), "sliding-window layers"),
        (
            lambda: zlab(dflash_config=_SETTINGS | {"use_swa": True, "swa_window_size": 512}),
            "use_swa=True: sliding-window layers",
        ),
        (lambda: zlab(is_causal=True), "is_causal=True: sliding-window layers and causal blocks are not read"),
        (lambda: zlab(dflash_config=_SETTINGS | {"causal": True}), "causal=True: sliding-window layers and causal blocks"),
        (
            lambda: speculators(sliding_window_non_causal=True, transformer_layer_config=_WINDOWED),
            r"layer_types=\['full_attention', 'sliding_attention'\]: sliding-window layers",
        ),
        (
            lambda: (zlab()[0], zlab()[1] | {"markov_head.markov_w1.weight": torch.ones(2)}),
            "unknown: markov_head.markov_w1.weight",
        ),
        (lambda: speculators(transformer_layer_config=None), "without transformer_layer_config"),
    ],
)
def test_what_does_not_fit_is_named(make: Callable, text: str, tmp_path: Path):
    with pytest.raises(DraftError, match=text):
        load_draft_head(write(tmp_path, *make()), target_for(WEIGHTS))


def test_told_by_its_tensors(tmp_path: Path):
    config, tensors = zlab(architectures=["Qwen3ForCausalLM"])
    head = load_draft_head(write(tmp_path, config, tensors), target_for(WEIGHTS))
    assert largest_difference(block_logits(head), expected(WEIGHTS, "zlab")) < TOLERANCE


def test_the_context_in_pages_gives_the_same_logits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Context keys and values through kv_write, a block through the attention op with a tree mask of ones."""
    head = load_draft_head(write(tmp_path, *zlab()), target_for(WEIGHTS))
    ids, states = WEIGHTS["input_ids"], WEIGHTS["states"]
    everything = torch.full((1, BLOCK, 1), (1 << BLOCK) - 1, dtype=torch.int32)
    op, outs = torch.ops.spec_compile.attention, []
    monkeypatch.setattr(torch.ops.spec_compile, "attention", lambda *args: op(*args[:7], everything, *args[8:]))
    with torch.no_grad(), paged(head, batch=1, capacity=24) as context:
        for first, last in ((0, 10), (10, 12)):
            pairs = head.context_kv(head.project(states[:, first:last]), torch.arange(first, last)[None])
            for layer, (keys, values) in enumerate(pairs):
                caches = [context.slots[layer, part] for part in "kv"]
                kv_write(keys, values, *caches, context.page_table, context.cache_len)
            context.cache_len = torch.tensor([last], dtype=torch.int32)
            outs.append(head.logits(head(head.block(ids[:, last]), torch.arange(last, last + BLOCK)[None], context.cache)))
    assert largest_difference(outs, expected(WEIGHTS, "zlab")) < TOLERANCE


def test_a_block_is_captured_with_one_attention_op_a_layer():
    head = random_dflash_head(target_for(WEIGHTS), BLOCK, num_hidden_layers=3)
    graphs = []

    class Stop(Exception):
        pass

    def backend(gm, example_inputs):
        graphs.append([str(node.target) for node in gm.graph.nodes])  # torch 2.15 clears the graph when this raises
        raise Stop

    ids, positions = head.block(torch.tensor([4, 5])), torch.arange(BLOCK).expand(2, -1)
    with torch.no_grad(), capture_context(head, 2) as context:

        def forward(ids: Tensor, positions: Tensor) -> Tensor:
            return head.logits(head(ids, positions, context.cache))

        with pytest.raises(BackendCompilerFailed, match="Stop"):
            torch.compile(forward, backend=backend, fullgraph=True)(ids, positions)
    (targets,) = graphs
    assert sum("spec_compile.attention" in target for target in targets) == 3
