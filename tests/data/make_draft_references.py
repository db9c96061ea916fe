"""Logits of the published draft modules on small random weights: writes the files tests/test_draft_*.py compare with.

The modules run as their authors wrote them (versions in README.md): this script only makes weights, feeds them and keeps what
comes out. Every EAGLE case sees the same text: T tokens with the target's states (prefill), then two draft steps fed with its
own output: a case holds the logits [1, T, Vd], [1, 1, Vd], [1, 1, Vd].

    PYTHONPATH=<SafeAILab/EAGLE>:<sgl-project/SpecForge>:<z-lab/dflash> python make_draft_references.py

needs clones of the three and ``pip install speculators``.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import DynamicCache, LlamaConfig, Qwen3Config

HERE = Path(__file__).parent
H, HT_WIDE, INTER, HEADS, KV_HEADS, V, VD, T, BLOCK, EPS = 32, 48, 48, 4, 2, 64, 24, 10, 4, 1e-5
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 16}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 32.0, "beta_slow": 1.0}
YARN |= {"mscale": 1.0, "mscale_all_dim": 0.0}
BASE = {"vocab_size": V, "hidden_size": H, "intermediate_size": INTER, "num_attention_heads": HEADS}
BASE |= {"num_key_value_heads": KV_HEADS, "rms_norm_eps": EPS, "max_position_embeddings": 64, "num_hidden_layers": 1}


def layer_weights(prefix: str, width: int) -> dict[str, tuple[int, ...]]:
    """Shapes of a decoder layer whose attention reads ``width`` features."""
    kv = KV_HEADS * H // HEADS
    shapes = {"q_proj.weight": (H, width), "k_proj.weight": (kv, width), "v_proj.weight": (kv, width), "o_proj.weight": (H, H)}
    shapes |= {"q_proj.bias": (H,), "k_proj.bias": (kv,), "v_proj.bias": (kv,), "o_proj.bias": (H,)}
    shapes |= {"q_norm.weight": (H // HEADS,), "k_norm.weight": (H // HEADS,)}
    named = {f"{prefix}.self_attn.{name}": shape for name, shape in shapes.items()}
    named |= {f"{prefix}.mlp.{name}_proj.weight": (INTER, H) for name in ("gate", "up")}
    named |= {f"{prefix}.mlp.down_proj.weight": (H, INTER)}
    return named | {f"{prefix}.{name}.weight": (H,) for name in ("input_layernorm", "hidden_norm", "post_attention_layernorm")}


def draw(shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, Tensor]:
    """Random weights that float16 holds exactly, so that the file is small and the references are run in float32."""
    generator = torch.Generator().manual_seed(seed)
    out = {}
    for name, shape in shapes.items():
        value = torch.randn(shape, generator=generator)
        if "norm" in name:
            value = 1 + 0.4 * value
        elif len(shape) == 1:
            value = 0.3 * value
        else:
            value = value * 1.5 * shape[-1] ** -0.5
        out[name] = value.half().float()
    return out


def eagle3_weights() -> dict[str, Tensor]:
    """Every tensor any EAGLE-3 case uses, and the inputs."""
    shapes = layer_weights("layers.0", 2 * H) | layer_weights("layers.1", H)
    shapes |= {"fc.weight": (H, 3 * H), "fc_wide.weight": (H, 3 * HT_WIDE), "norm.weight": (H,), "input_norm.weight": (3 * H,)}
    shapes |= {f"fc_norm.{i}.weight": (H,) for i in range(3)}
    shapes |= {"lm_head.weight": (VD, H), "lm_head_full.weight": (V, H), "embed_tokens.weight": (V, H)}
    shapes |= {"states": (1, T + 2, 3 * H), "states_wide": (1, T + 2, 3 * HT_WIDE)}
    weights = draw(shapes, seed=3)
    generator = torch.Generator().manual_seed(5)
    ids = torch.randperm(V, generator=generator)[:VD].sort().values
    weights["d2t"] = ids - torch.arange(VD)
    weights["t2d"] = torch.zeros(V, dtype=torch.bool).index_fill(0, ids, True)
    weights["input_ids"] = torch.randint(0, V, (1, T + 2), generator=generator)
    return weights


def load(module: nn.Module, weights: dict[str, Tensor], renames: dict[str, str]) -> nn.Module:
    """Fill every parameter and buffer of ``module``; ``renames`` maps a start of its names to a start of ours."""
    state = module.state_dict()
    for name, value in state.items():
        source = next((new + name.removeprefix(old) for old, new in renames.items() if name.startswith(old)), name)
        if source not in weights:
            if name.startswith("verifier_") or name.endswith("inv_freq"):  # nothing in a forward without labels reads them
                continue
            raise KeyError(f"{type(module).__name__}: no weight for {name}")
        value.copy_(weights[source])
    return module.eval().float()


def cached_steps(
    model: nn.Module, weights: dict[str, Tensor], states: Tensor, head: Callable[[Tensor], Tensor]
) -> list[Tensor]:
    """SafeAILab's interface: a forward with a cache of tuples."""
    ids = weights["input_ids"]
    hidden, cache = model(states[:, :T], input_ids=ids[:, :T], use_cache=True)
    outs, hidden = [head(hidden)], hidden[:, -1:]
    for step in range(2):
        position = torch.tensor([[T + step]])
        hidden, cache = model(
            hidden, input_ids=ids[:, T + step : T + step + 1], past_key_values=cache, position_ids=position, use_cache=True
        )
        outs.append(head(hidden))
    return outs


def safeailab_config(**more: object) -> SimpleNamespace:
    config = {**BASE, "hidden_act": "silu", "pretraining_tp": 1, "rope_scaling": None, "rope_theta": 500.0, "pad_token_id": 0}
    return SimpleNamespace(**config, **more)


def safeailab_eagle3(weights: dict[str, Tensor], wide: bool = False, full: bool = False) -> list[Tensor]:
    from eagle.model.cnets import Model

    config = safeailab_config(draft_vocab_size=V if full else VD)
    if wide:
        config.target_hidden_size = HT_WIDE
    model = Model(config)
    own = {"d2t": torch.zeros(V, dtype=torch.int64), "t2d": torch.ones(V, dtype=torch.bool)} if full else {}
    renames = (
        {"midlayer.": "layers.0."} | ({"fc.": "fc_wide."} if wide else {}) | ({"lm_head.": "lm_head_full."} if full else {})
    )
    load(model, weights | own, renames)
    return cached_steps(model, weights, weights["states_wide" if wide else "states"], lambda h: model.lm_head(model.norm(h)))


def specforge_eagle3(weights: dict[str, Tensor], rope: dict[str, object] | None = None, **flags: object) -> list[Tensor]:
    """One training-time-test pass: column T - 1 of step j is the j-th draft step after T tokens."""
    from specforge.modeling.draft.llama3_eagle import LlamaForCausalLMEagle3

    rope = {"rope_theta": 500.0, **(rope or {"rope_type": "default"})}
    model = LlamaForCausalLMEagle3(LlamaConfig(**BASE, draft_vocab_size=VD, rope_parameters=rope, pad_token_id=0, **flags))
    load(model, weights, {"midlayer.": "layers.0."})
    ids, states = weights["input_ids"], weights["states"]
    hidden = model.project_hidden_states(states)
    mask = model.prepare_decoder_attention_mask(torch.ones(1, T + 2, dtype=torch.bool), hidden, 1, T + 2, 0)
    cache: list[list[Tensor]] = [[], []]
    outs = []
    for step in range(3):
        tokens = torch.cat([ids[:, step:], ids.new_zeros(1, step)], 1)
        hidden = model.backbone(model.embed_input_ids(tokens), hidden, cache, mask, torch.arange(T + 2)[None])
        logits = model.compute_logits(hidden)
        outs.append(logits[:, :T] if step == 0 else logits[:, T - 1 : T])
    return outs


def speculators_eagle3(
    weights: dict[str, Tensor], qwen3: bool = False, layer: dict | None = None, **flags: object
) -> list[Tensor]:
    """speculators' training forward without labels; its logits are read where its lm_head makes them."""
    from speculators.models.eagle3.core import Eagle3DraftModel, Eagle3SpeculatorConfig

    sizes = {**BASE, "head_dim": H // HEADS, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}, **(layer or {})}
    transformer = (Qwen3Config if qwen3 else LlamaConfig)(**sizes, pad_token_id=None)
    transformer._attn_implementation = "eager"
    config = Eagle3SpeculatorConfig(
        transformer_layer_config=transformer, draft_vocab_size=VD, eagle_aux_hidden_state_layer_ids=[1, 2, 3], **flags
    )
    model = load(Eagle3DraftModel(config), weights, {})
    logits: list[Tensor] = []
    model.lm_head.register_forward_hook(lambda module, args, out: logits.append(out))
    model(weights["states"], weights["input_ids"], torch.zeros(1, T + 2, dtype=torch.int64), ttt_steps=3)
    return [logits[0][:, :T], logits[1][:, T - 1 : T], logits[2][:, T - 1 : T]]


def safeailab_eagle1(weights: dict[str, Tensor], bias: bool = True) -> list[Tensor]:
    from eagle.model.cnets1 import Model

    model = load(Model(safeailab_config(qkv_bias=False), bias=bias), weights, {})
    return cached_steps(model, weights, weights["states"], lambda hidden: hidden @ weights["target_lm_head.weight"].T)


def eagle1_weights() -> dict[str, Tensor]:
    shapes = layer_weights("layers.0", H) | {"fc.weight": (H, 2 * H), "fc.bias": (H,), "embed_tokens.weight": (V, H)}
    weights = draw(shapes | {"target_lm_head.weight": (V, H), "states": (1, T + 2, H)}, seed=4)
    weights["input_ids"] = torch.randint(0, V, (1, T + 2), generator=torch.Generator().manual_seed(6))
    return weights


def dflash_weights() -> dict[str, Tensor]:
    shapes = layer_weights("layers.0", H) | layer_weights("layers.1", H)
    shapes = {name: shape for name, shape in shapes.items() if "bias" not in name and "hidden_norm" not in name}
    shapes |= {"fc.weight": (H, 2 * H), "hidden_norm.weight": (H,), "norm.weight": (H,), "lm_head.weight": (VD, H)}
    shapes |= {"embed_tokens.weight": (V, H), "target_lm_head.weight": (V, H), "states": (1, T + 2, 2 * H)}
    weights = draw(shapes, seed=7)
    generator = torch.Generator().manual_seed(8)
    ids = torch.randperm(V, generator=generator)[:VD].sort().values
    weights["d2t"] = ids - torch.arange(VD)
    weights["t2d"] = torch.zeros(V, dtype=torch.bool).index_fill(0, ids, True)
    weights["input_ids"] = torch.randint(0, V - 1, (1, T + 3), generator=generator)
    return weights


def dflash_blocks(weights: dict[str, Tensor], forward: Callable[..., Tensor]) -> list[Tensor]:
    """A block behind T tokens, then, two tokens later, a block behind T + 2: every slot's logits."""
    outs, states, ids = [], weights["states"], weights["input_ids"]
    for first, last in ((0, T), (T, T + 2)):
        block = torch.full((1, BLOCK), V - 1)
        block[:, 0] = ids[:, last]
        embeds = weights["embed_tokens.weight"][block]
        outs.append(forward(states[:, first:last], embeds, torch.arange(first, last + BLOCK)[None], last))
    return [out @ weights["target_lm_head.weight"].T for out in outs]


def dflash_config(**more: object) -> Qwen3Config:
    sizes = {**BASE, "num_hidden_layers": 2, "head_dim": H // HEADS, "num_target_layers": 8, "block_size": BLOCK}
    sizes |= {"dflash_config": {"mask_token_id": V - 1, "target_layer_ids": [1, 5]}, "pad_token_id": None}
    config = Qwen3Config(**sizes, rope_parameters={"rope_type": "default", "rope_theta": 500.0}, **more)
    config._attn_implementation = "sdpa"
    return config


def zlab_dflash(weights: dict[str, Tensor]) -> list[Tensor]:
    from dflash.model import DFlashDraftModel

    model, cache = load(DFlashDraftModel(dflash_config()), weights, {}), DynamicCache()

    def forward(states: Tensor, embeds: Tensor, positions: Tensor, length: int) -> Tensor:
        out = model(positions, None, embeds, states, cache, True, is_causal=False)
        cache.crop(-BLOCK)
        return out

    return dflash_blocks(weights, forward)


def transformers_dflash(weights: dict[str, Tensor]) -> list[Tensor]:
    from transformers import MuseGlimmerAssistantConfig, MuseGlimmerAssistantModel

    sizes = {name: value for name, value in BASE.items() if name != "vocab_size"}
    sizes |= {"num_hidden_layers": 2, "head_dim": H // HEADS, "layer_types": ["full_attention"] * 2, "pad_token_id": None}
    rope = {"rope_type": "default", "rope_theta": 500.0}
    config = MuseGlimmerAssistantConfig(
        **sizes, rope_parameters=rope, target_layer_ids=[1, 5], block_size=BLOCK, mask_token_id=V - 1
    )
    renames = {"encoder.fc.": "fc.", "encoder.output_norm_enc.": "hidden_norm."}
    model = load(MuseGlimmerAssistantModel(config), weights, renames)
    seen: list[Tensor] = []

    def forward(states: Tensor, embeds: Tensor, positions: Tensor, length: int) -> Tensor:
        seen.append(states)  # without a cache: the whole context each time
        everything = torch.arange(length + BLOCK)[None]
        return model(embeds, torch.cat(seen, 1), position_ids=everything, use_cache=False).last_hidden_state

    return dflash_blocks(weights, forward)


def speculators_dflash(weights: dict[str, Tensor]) -> list[Tensor]:
    """speculators' training forward; its anchors, drawn at random there, are set to the two blocks of the other cases."""
    import speculators.models.dflash.core as core

    config = core.DFlashSpeculatorConfig(
        transformer_layer_config=dflash_config(),
        draft_vocab_size=VD,
        block_size=BLOCK,
        aux_hidden_state_layer_ids=[2, 6],
        mask_token_id=V - 1,
    )
    config.transformer_layer_config._attn_implementation = "eager"
    anchors = torch.tensor([T, T + 2])
    core.select_anchors = lambda loss_mask, max_anchors, block_size: (anchors, torch.ones(2, dtype=torch.bool))
    model = load(core.DFlashDraftModel(config), weights, {})
    length = T + 3 + BLOCK
    ids = torch.cat([weights["input_ids"], torch.zeros(1, BLOCK, dtype=torch.int64)], 1)
    states = torch.cat([weights["states"], torch.zeros(1, BLOCK + 1, 2 * H)], 1)
    _, logits, *_ = model._backbone_forward(
        states, ids, torch.ones(1, length), torch.zeros(1, length, H), torch.zeros(1, length, dtype=torch.int64), max_anchors=2
    )
    return list(logits.split(BLOCK, 1))


def write(name: str, weights: dict[str, Tensor], cases: dict[str, list[Tensor]]) -> None:
    tensors = {key: value.half() if value.is_floating_point() else value for key, value in weights.items()}
    for case, outs in cases.items():
        tensors |= {f"expected.{case}.{step}": out.detach().float().contiguous() for step, out in enumerate(outs)}
    save_file(tensors, HERE / name)


@torch.no_grad()
def main() -> None:
    weights = eagle3_weights()
    cases = {
        "safeailab": safeailab_eagle3(weights),
        "safeailab_full_vocabulary": safeailab_eagle3(weights, full=True),
        "safeailab_target_hidden_size": safeailab_eagle3(weights, wide=True),
        "specforge": specforge_eagle3(weights),
        "specforge_fc_norm": specforge_eagle3(weights, fc_norm=True),
        "specforge_llama3": specforge_eagle3(weights, LLAMA3),
        "specforge_yarn": specforge_eagle3(weights, YARN),
        "speculators": speculators_eagle3(weights),
        "speculators_norm_before_residual": speculators_eagle3(weights, norm_before_residual=True),
        "speculators_norm_before_fc": speculators_eagle3(weights, norm_before_fc=True),
        "speculators_fc_norm": speculators_eagle3(weights, fc_norm=True),
        "speculators_norm_output": speculators_eagle3(weights, norm_output=True),
        "speculators_two_layers": speculators_eagle3(weights, layer={"num_hidden_layers": 2}),
        "speculators_attention_bias": speculators_eagle3(weights, layer={"attention_bias": True}),
        "speculators_qwen3": speculators_eagle3(weights, qwen3=True),
        "speculators_qwen3_sliding": speculators_eagle3(
            weights,
            qwen3=True,
            layer={"use_sliding_window": True, "sliding_window": 4, "layer_types": ["sliding_attention"]},
        )[:1],  # its training keeps the window of the first step in the later ones
    }
    write("draft_eagle3.safetensors", weights, cases)
    weights = eagle1_weights()
    cases = {"fc_bias": safeailab_eagle1(weights), "no_fc_bias": safeailab_eagle1(weights, bias=False)}
    write("draft_eagle.safetensors", weights, cases)
    weights = dflash_weights()
    cases = {
        "zlab": zlab_dflash(weights),
        "transformers": transformers_dflash(weights),
        "speculators": speculators_dflash(weights),
    }
    write("draft_dflash.safetensors", weights, cases)


if __name__ == "__main__":
    main()
