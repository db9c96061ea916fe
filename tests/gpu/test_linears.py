"""On a GPU: the kernel of few tokens against float64 at the sizes of real models, and inside a compiled one."""

from __future__ import annotations

import pytest
import torch
from near_ties import assert_equal_up_to_near_ties
from tiny import left_padded, tiny_model

from spec_compile import spec_compile
from spec_compile.runtime import skinny_linears

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("shape", [(4096, 4096), (6144, 4096), (4096, 14336), (128256, 4096), (4096, 12288)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_against_float64(shape: tuple[int, int], dtype: torch.dtype) -> None:
    from spec_compile.ops.skinny_tiles import fitting_tiles

    weight = torch.randn(shape, dtype=dtype, device="cuda") * 0.02
    tiles = fitting_tiles(*shape, 2, 224 * 1024)
    assert len(tiles) == 3
    for tokens in (1, 6, 8, 13, 16):
        room = torch.full((16, shape[1] + 8), float("nan"), dtype=dtype, device="cuda")  # behind the tokens, nobody may read
        x = room[:tokens, : shape[1]].normal_()
        expected = (x[:, None].double() * weight[:512].double()).sum(-1)
        for chosen in tiles:
            out = torch.ops.spec_compile.skinny_linear(x, weight, *chosen)
            torch.testing.assert_close(out[:, :512].double(), expected, rtol=1e-2, atol=1e-2)
            torch.testing.assert_close(out, torch.nn.functional.linear(x, weight), rtol=2e-2, atol=2e-2)
            assert torch.equal(out, torch.ops.spec_compile.skinny_linear(x, weight, *chosen)), "the same sum every time"


def wide_model() -> torch.nn.Module:
    """Wider layers need smaller weights, or their attention hangs on the last bit of a product."""
    sizes = {"hidden_size": 2048, "num_attention_heads": 16, "num_key_value_heads": 16, "head_dim": 128, "num_hidden_layers": 3}
    model = tiny_model("llama", device="cuda", **sizes)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 1 / 6 if parameter.dim() >= 2 else 1
    return model.bfloat16()


def test_a_compiled_model_uses_it_where_it_was_measured_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(skinny_linears, "_LEAST_GAIN", float("inf"))  # the faster or not: inside compiled segments
    reference = wide_model()
    model = spec_compile(wide_model(), min_ngram=1, num_steps=3, adaptive=False)
    inputs = {name: value.cuda() for name, value in left_padded(2, 21).items()}
    plain = reference.generate(**inputs, max_new_tokens=32, do_sample=False)
    ours = model.generate(**inputs, max_new_tokens=32, do_sample=False)
    assert_equal_up_to_near_ties(reference, inputs, plain, ours)
    measured = model.spec._engine.compiler.linears
    tried = {key[:3]: choice for key, choice in measured.items() if choice is not None}
    assert (8, 2048, 2048) in tried and (8, 6144, 2048) in tried, "windows of four tokens of two rows"
    assert all(choice.library_us > 1 and choice.kernel_us > 1 for choice in tried.values())
    assert all(choice.tiles is not None for choice in tried.values()), "no tiles were found wrong"
    assert "linear of 8 tokens, 2048 to 6144:" in model.spec.explain()


def test_inputs_that_are_still_being_made_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Segments are compiled while a round is warmed up, in the stream of graph captures: nothing may be read in another."""
    weight = torch.randn(4096, 4096, dtype=torch.bfloat16, device="cuda")
    assert skinny_linears.measured(8, weight) is not None  # from here on everything is compiled
    said: list[str] = []
    monkeypatch.setattr(skinny_linears.log, "warning", lambda text, *args: said.append(text % args))
    with torch.cuda.stream(torch.cuda.Stream()):
        for shape in ((8, 4096), (4096, 4096)):  # what stood in the memory that is handed out next
            torch.full(shape, float("nan"), dtype=torch.bfloat16, device="cuda")
        torch.cuda.synchronize()
        torch.cuda._sleep(500_000_000)  # a quarter of a second
        assert skinny_linears.measured(8, weight) is not None
    assert said == [], "no tiles were found wrong"
