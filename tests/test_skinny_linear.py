"""``skinny_linear``: a few tokens through a wide linear layer, and where it takes a linear's place."""

from __future__ import annotations

import threading

import pytest
import torch
import torch.nn.functional as F
from test_triton_kernels import interpreter, run_interpreted  # noqa: F401 (a fixture)
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from spec_compile.ops.skinny_linear import skinny_linear
from spec_compile.ops.skinny_tiles import MAX_TOKENS
from spec_compile.runtime import skinny_linears
from spec_compile.runtime.skinny_linears import LinearChoice, use_skinny_linears

pytestmark = pytest.mark.usefixtures("fresh_seed")
TILES = (64, 128, 6, 4)
WIDE = (4096, 1024)  # 8 MiB in bfloat16, the least that is tried

INTERPRETED = """
import torch
from spec_compile.ops.kernels.skinny_linear import skinny_linear
from spec_compile.ops.skinny_tiles import fitting_tiles
torch.manual_seed({seed})
for n, k in ((64, 256), (128, 512)):
    weight = torch.randn(n, k, dtype=torch.float16)
    for tokens in (1, 5, 8, 16):
        room = torch.full((2, 16, k + 8), float("nan"), dtype=torch.float16)  # rows and columns that nobody may read
        x = room[:1, :tokens, :k]
        x.normal_()
        expected = x[0].double() @ weight.double().T
        tried = fitting_tiles(n, k, 2, 224 * 1024)
        assert (128, 128, 4, 8) in tried if n == 128 else (128, 128, 4, 8) not in tried
        for tiles in tried:
            out = skinny_linear(x, weight, *tiles)
            assert out.shape == (1, tokens, n) and out.is_contiguous()
            torch.testing.assert_close(out[0].double(), expected, rtol=2e-3, atol=2e-2)
assert fitting_tiles(96, 128, 2, 224 * 1024) == fitting_tiles(64, 64, 2, 224 * 1024) == fitting_tiles(64, 128, 2, 8192) == []
"""


@pytest.mark.usefixtures("interpreter")
def test_the_kernel_against_float64():
    result = run_interpreted(INTERPRETED.format(seed=torch.seed() % 2**31))
    assert result.returncode == 0, result.stderr[-3000:]


def test_opcheck():
    x, weight = torch.randn(2, 3, 128, dtype=torch.bfloat16), torch.randn(64, 128, dtype=torch.bfloat16)
    torch.library.opcheck(skinny_linear, (x, weight, *TILES), test_utils=("test_schema", "test_faketensor"))
    assert torch.equal(skinny_linear(x, weight, *TILES), F.linear(x, weight))


@pytest.mark.parametrize(
    ("x", "weight"),
    [
        (torch.zeros(MAX_TOKENS + 1, 128), torch.zeros(64, 128)),
        (torch.zeros(1, 128), torch.zeros(65, 128)),
        (torch.zeros(1, 64), torch.zeros(64, 64)),
        (torch.zeros(1, 128), torch.zeros(128, 64).T),
    ],
)
def test_shapes_that_the_kernel_does_not_know_are_refused(x: Tensor, weight: Tensor):
    kernel = pytest.importorskip("spec_compile.ops.kernels.skinny_linear", reason="needs Triton")
    with pytest.raises(ValueError, match="at most 16 tokens and a contiguous weight"):
        kernel.skinny_linear(x, weight, *TILES)
    with pytest.raises(ValueError, match="one dtype"):
        kernel.skinny_linear(torch.zeros(1, 128), torch.zeros(64, 128).half(), *TILES)


# ----------------------------------------------------------------------------------------------------------------------
# In a segment


def segment(fn, *args: Tensor) -> fx.GraphModule:
    """``fn`` traced, with the fakes that captured segments carry."""
    gm, mode = fx.symbolic_trace(fn), FakeTensorMode(allow_non_fake_inputs=True)
    for node, arg in zip([n for n in gm.graph.nodes if n.op == "placeholder"], args, strict=True):
        node.meta["example_value"] = mode.from_tensor(arg)
    for node in gm.graph.nodes:
        if node.op == "call_function":
            node.meta["example_value"] = node.target(*fx.map_arg(node.args, lambda n: n.meta["example_value"]))
    return gm


def targets(gm: fx.GraphModule) -> list[str]:
    return [node.target.__name__ for node in gm.graph.nodes if node.op == "call_function"]


@pytest.fixture
def measurements(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """What was measured; on this made-up device our kernel wins with fewer than 8 tokens."""
    asked = []

    def measured(tokens: int, weight: Tensor) -> LinearChoice:
        asked.append((tokens, *weight.shape))
        return LinearChoice(TILES if tokens < 8 else None, 12.6, 11.1)

    monkeypatch.setattr(skinny_linears, "measured", measured)
    return asked


def test_linears_of_a_few_tokens_are_replaced_where_the_kernel_is_faster(measurements: list[tuple]):
    known, weight = {}, nn.Parameter(torch.randn(WIDE, dtype=torch.bfloat16))
    for tokens, replaced in ((6, 1), (6, 1), (8, 0), (17, 0)):
        x = torch.randn(1, tokens, WIDE[1], dtype=torch.bfloat16)
        gm = segment(lambda x, w: F.linear(x, w) * 2, x, weight.detach())
        assert use_skinny_linears(gm, (x, weight), known) == replaced
        assert targets(gm) == ["skinny_linear.default" if replaced else "linear", "mul"]
        torch.testing.assert_close(gm(x, weight), F.linear(x, weight) * 2)
    assert measurements == [(6, *WIDE), (8, *WIDE)], "each shape once, and never one of more tokens than the kernel takes"


class Stored(Tensor):
    """A weight that is stored in a way of its own, as quantised ones are."""


@pytest.mark.parametrize("what", ["bias", "float32", "small", "transposed", "computed", "stored"])
def test_other_linears_stay(what: str, measurements: list[tuple]):
    dtype = torch.float32 if what == "float32" else torch.bfloat16
    n, k = (WIDE[0] // 2, WIDE[1]) if what == "small" else WIDE
    weight = torch.randn(k, n, dtype=dtype).T if what == "transposed" else torch.randn(n, k, dtype=dtype)
    x, bias = torch.randn(1, 4, k, dtype=dtype), torch.randn(n, dtype=dtype)
    forward = {
        "bias": lambda x, w, b: F.linear(x, w, b),
        "computed": lambda x, w, b: F.linear(x, w * 2) + b,
    }.get(what, lambda x, w, b: F.linear(x, w) + b)
    gm = segment(forward, x, weight, bias)
    weight = weight.as_subclass(Stored) if what == "stored" else weight
    assert use_skinny_linears(gm, (x, weight, bias), {}) == 0
    assert "linear" in targets(gm) and measurements == []


# ----------------------------------------------------------------------------------------------------------------------
# Which tiles are measured at all


def test_tiles_that_fail_are_named_and_left_out(monkeypatch: pytest.MonkeyPatch):
    """Nobody loses a model because a kernel that nobody asked for cannot be built, or was compiled wrong."""

    def run(x: Tensor, weight: Tensor, tiles: tuple[int, ...]) -> Tensor:
        if tiles == (64, 256, 4, 4):
            raise RuntimeError("out of resource: shared memory\nand much more")
        return F.linear(x, weight) * (1.05 if tiles == (128, 128, 4, 8) else 1.0)

    said: list[str] = []
    monkeypatch.setattr(skinny_linears, "_run", run)
    monkeypatch.setattr(skinny_linears.log, "warning", lambda text, *args: said.append(text % args))
    x, weight = torch.randn(4, 128, dtype=torch.bfloat16), torch.randn(128, 128, dtype=torch.bfloat16)
    assert skinny_linears._usable(x, weight, [TILES, (64, 256, 4, 4), (128, 128, 4, 8)]) == [TILES]
    built, wrong = said
    assert "(64, 256, 4, 4) cannot be built" in built and built.endswith("out of resource: shared memory")
    assert "(128, 128, 4, 8) gives wrong results" in wrong


def test_what_other_threads_computed_is_not_compared(monkeypatch: pytest.MonkeyPatch):
    """On a GPU they launch in streams of their own, which wait neither for the inputs nor for who reads the results."""
    mine = threading.get_ident()

    def run(x: Tensor, weight: Tensor, tiles: tuple[int, ...]) -> Tensor:
        return F.linear(x, weight) if threading.get_ident() == mine else torch.full((len(x), len(weight)), float("nan"))

    monkeypatch.setattr(skinny_linears, "_run", run)
    x, weight = torch.randn(4, 128, dtype=torch.bfloat16), torch.randn(128, 128, dtype=torch.bfloat16)
    assert skinny_linears._usable(x, weight, [TILES]) == [TILES]
