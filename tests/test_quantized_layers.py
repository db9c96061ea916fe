"""Quantised models of other packages: the same text or an error with a remedy; the packages themselves where they are there."""

from __future__ import annotations

import types
from pathlib import Path

import pytest
import torch
from tiny import left_padded, tiny_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, CompressedTensorsConfig, PreTrainedModel

from spec_compile import spec_compile
from spec_compile.errors import ConfigError, DraftError

OPTIONS = {"draft": "ngram", "min_ngram": 1, "num_steps": 3, "compile": "none", "adaptive": False, "progress": False}
CALL = {"max_new_tokens": 16, "do_sample": False}


def small() -> PreTrainedModel:
    return tiny_model("llama", num_hidden_layers=1, hidden_size=64, intermediate_size=128)


def assert_rounds(model: PreTrainedModel) -> None:
    for seed in range(3):
        inputs = left_padded(2, 11, seed=seed)
        ours = model.generate(**inputs, **CALL)
        assert model.spec.stats().mode == "rounds", model.spec.stats().plain_because
        with model.spec.disable():
            assert torch.equal(model.generate(**inputs, **CALL), ours)


def swap(model: PreTrainedModel, kind: type[nn.Linear]) -> nn.Linear:
    """Put a layer of ``kind`` with the same weights in the place of one linear layer."""
    mlp = model.model.layers[0].mlp
    layer = kind(mlp.up_proj.in_features, mlp.up_proj.out_features, bias=False)
    layer.weight = mlp.up_proj.weight
    mlp.up_proj = layer
    return layer


# ----------------------------------------------------------------------------------------------------------------------
# Stand-ins


class Linear8bitLt(nn.Linear):
    """As far as it is asked: known by name and module, and what it does with outliers by its state."""

    __module__ = "bitsandbytes.nn.modules"
    state = types.SimpleNamespace(threshold=6.0)


class LaysOutLater(nn.Linear):
    """As 4-bit layers of bitsandbytes on a CPU: the first forward puts the weights elsewhere, in another layout."""

    laid_out = False

    def forward(self, x: Tensor) -> Tensor:
        if not self.laid_out:
            self.weight.data, self.weight.laid_out = self.weight.data.t().contiguous(), True
            self.laid_out = True
        return x @ self.weight


def test_layers_that_look_over_all_tokens_are_refused_by_name():
    model = small()
    layer = swap(model, Linear8bitLt)
    with pytest.raises(
        ConfigError, match=r"mlp\.up_proj is an 8-bit layer .*llm_int8_threshold=6\.0: .*llm_int8_threshold=0\.0"
    ):
        spec_compile(model, **OPTIONS)
    layer.state = types.SimpleNamespace(threshold=0.0)
    assert_rounds(spec_compile(model, **OPTIONS))


def test_a_drafts_layers_may_look_over_all_tokens():
    """What a draft says is its guess, whatever made it."""
    draft = small()
    swap(draft, Linear8bitLt)
    assert_rounds(spec_compile(small(), **(OPTIONS | {"draft": draft})))


def test_weights_that_a_first_forward_lays_out_are_captured_as_they_stay():
    model = small()
    layer = swap(model, LaysOutLater)
    model.hf_quantizer = types.SimpleNamespace(is_compileable=False)
    assert_rounds(spec_compile(model, **OPTIONS))
    assert layer.laid_out


def _quantized_forward(layer: nn.Linear) -> None:
    scope = {"__name__": "compressed_tensors.quantization.lifecycle.forward"}
    exec("def quantized_forward(self, input):\n    return self.__class__.forward(self, input)", scope)
    layer.forward = types.MethodType(scope["quantized_forward"], layer)


def test_forwards_that_swap_weights_are_refused_with_the_remedy():
    model = small()
    _quantized_forward(model.model.layers[0].mlp.up_proj)
    told = r"mlp\.up_proj: its forward is compressed-tensors'.*CompressedTensorsConfig\(dequantize=True\)"
    with pytest.raises(ConfigError, match=rf"^the model's .*{told}"):
        spec_compile(model, **OPTIONS)
    with pytest.raises(DraftError, match=rf"^the draft's .*{told}"):
        spec_compile(small(), draft=model, compile="none")


# ----------------------------------------------------------------------------------------------------------------------
# The packages


def _bitsandbytes(folder: Path, **settings: object) -> PreTrainedModel:
    pytest.importorskip("bitsandbytes")
    model = small()
    with torch.no_grad():
        model.model.layers[0].input_layernorm.weight[3] = 40.0  # outliers in some tokens
    model.save_pretrained(folder)
    config = BitsAndBytesConfig(**settings)
    loaded = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, device_map={"": "cpu"}).eval()
    loaded.generation_config.eos_token_id = None
    return loaded


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_bitsandbytes(tmp_path: Path):
    with pytest.raises(ConfigError, match="8-bit layer of bitsandbytes"):
        spec_compile(_bitsandbytes(tmp_path, load_in_8bit=True), **OPTIONS)
    for settings in ({"load_in_8bit": True, "llm_int8_threshold": 0.0}, {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}):
        assert_rounds(spec_compile(_bitsandbytes(tmp_path, **settings), **OPTIONS))


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("preset", ["W8A8", "FP8_DYNAMIC"])
def test_compressed_tensors(preset: str, tmp_path: Path):
    compressed_tensors = pytest.importorskip("compressed_tensors")
    from compressed_tensors import quantization
    from compressed_tensors.quantization.utils import calculate_qparams

    model = small()
    config = quantization.QuantizationConfig(
        config_groups={"all": quantization.preset_name_to_scheme(preset, ["Linear"])}, ignore=["lm_head"]
    )
    config.quantization_status = quantization.QuantizationStatus.FROZEN
    quantization.apply_quantization_config(model, config)
    for module in model.modules():
        if hasattr(module, "weight_scale"):
            low, high = module.weight.data.amin(1, keepdim=True), module.weight.data.amax(1, keepdim=True)
            module.weight_scale.data.copy_(calculate_qparams(low, high, module.quantization_scheme.weights)[0])
    compressor = compressed_tensors.ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(tmp_path)
    compressor.update_config(str(tmp_path))
    inputs = left_padded(2, 11)
    for begun in (False, True):  # its first forward decompresses it
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
        if begun:
            loaded.generate(**inputs, **CALL)
        with pytest.raises(ConfigError, match="its forward is compressed-tensors'"):
            spec_compile(loaded, **OPTIONS)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=CompressedTensorsConfig(dequantize=True)).eval()
    loaded.generation_config.eos_token_id = None
    assert_rounds(spec_compile(loaded, **OPTIONS))
