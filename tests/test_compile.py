"""torch.compile: eager's bits forward and backward, one graph for many sizes, one fused kernel and no opaque call."""

import re

import pytest
import torch
from conftest import FORMATS, assert_same_bits, near_ties, random_bit_patterns
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor.utils import run_and_get_code

from altgrad.quantization import (
    E4M3,
    E5M2,
    MXFP4,
    NVFP4,
    QuantizeFunc,
    compute_scale,
    decode,
    dequantize,
    encode,
    quantize,
    quantize_blocks,
)
from ops_registry.formats import resolve
from ops_registry.modes import DETERMINISTIC_ROUNDINGS, SATURATIONS

pytestmark = pytest.mark.compiles

ag = torch.ops.altgrad
USUAL = [resolve(name) for name in ("E0M7", "E3M4", "E4M3", "E5M2", "E7M0", "E4M3FNUZ", "e3m4b3", "e2m2b100f")]
EDGES = [pytest.param(f, marks=() if f in USUAL else pytest.mark.slow) for f in FORMATS]


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()


@pytest.mark.compiles
@pytest.mark.parametrize("requires_grad", [False, True])
def test_dynamo_refuses_the_function(requires_grad):
    """As its docstring says; quantize is compiled."""
    x, scale = torch.randn(5, requires_grad=requires_grad), torch.tensor(0.5)
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(QuantizeFunc.apply, fullgraph=True, backend="eager")(x, E5M2, scale)
    assert_same_bits(torch.compile(quantize, fullgraph=True, backend="eager")(x, E5M2, scale), quantize(x, E5M2, scale))


@pytest.mark.parametrize("f", EDGES, ids=lambda f: f.name)
def test_same_bits_as_eager(f, device):
    def every_operator(x, scale):
        y, codes = ag.quantize(x, scale, f.name), ag.encode(x, scale, f.name)
        return y, codes, ag.decode(codes, scale, f.name), ag.dequantize(y, scale)

    points = torch.cat([near_ties(f), random_bit_patterns(5000)])
    compiled = torch.compile(every_operator, fullgraph=True)
    for scale in (1.0, 0.37, 2.0**-9):
        x, scale = (points * scale).to(device), torch.tensor(scale, device=device)
        for got, want in zip(compiled(x, scale), every_operator(x, scale)):
            assert_same_bits(got, want, x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_other_dtypes(dtype, device):
    def both(x, scale):
        return ag.quantize(x, scale, "E4M3"), ag.decode(ag.encode(x, scale, "E4M3"), scale, "E4M3", dtype)

    x = near_ties(E4M3).to(dtype).to(device)
    for scale in (1.0, 0.37):
        for got, want in zip(torch.compile(both, fullgraph=True)(x, torch.tensor(scale)), both(x, torch.tensor(scale))):
            assert_same_bits(got, want, x)


@pytest.mark.parametrize("f", [resolve("E5M2"), resolve("E7M0"), resolve("E4M3FNUZ")], ids=lambda f: f.name)
def test_every_saturation_and_rounding(f, device, each_value_is_traced_once):
    def every_mode(x, scale, random):
        results = [ag.quantize(x, scale, f.name, "none", rounding) for rounding in DETERMINISTIC_ROUNDINGS]
        results += [ag.quantize(x, scale, f.name, saturation) for saturation in SATURATIONS if saturation != "none"]
        results += [ag.encode(x, scale, f.name, "none", "to_odd")]
        results += [ag.quantize_stochastic(x, scale, random, f.name)]
        return [*results, ag.encode_stochastic(x, scale, random, f.name, "none")]

    x, scale = (near_ties(f) * 0.37).to(device), torch.tensor(0.37, device=device)
    random = torch.randint(1 << 24, x.shape, dtype=torch.int32, device=device)
    for got, want in zip(torch.compile(every_mode, fullgraph=True)(x, scale, random), every_mode(x, scale, random)):
        assert_same_bits(got, want, x)


@pytest.mark.parametrize("shape", [(), (3,), (4, 1), (4, 3)], ids=str)
def test_scale_shapes_forward_and_backward(shape, device):
    weight = torch.arange(3.0, device=device)

    def loss(x, scale):
        return (quantize(x, E5M2, scale) * weight).sum() + (dequantize(x, scale) * weight).sum()

    x, scale = torch.randn(4, 3, device=device), torch.rand(shape, device=device) + 0.1
    results = []
    for f in (loss, torch.compile(loss, fullgraph=True)):
        leaf = x.clone().requires_grad_()
        f(leaf, scale).backward()
        results.append(leaf.grad)
    assert_same_bits(results[1], results[0], x)


@pytest.mark.parametrize("dynamic", [None, True])
def test_one_graph_for_many_sizes(dynamic):
    counter = CompileCounterWithBackend("inductor")
    f = torch.compile(lambda x, s: quantize(x, E5M2, s).relu(), fullgraph=True, dynamic=dynamic, backend=counter)
    scale = torch.rand(3) + 0.1
    for n in (8, 16, 33, 70, 129):
        x = torch.randn(n, 3)
        assert_same_bits(f(x, scale), quantize(x, E5M2, scale).relu(), x)
    assert counter.frame_count == (1 if dynamic else 2)  # by default torch learns at the second size


def test_number_as_scale_and_format_as_argument():
    f = torch.compile(lambda x, format, scale: quantize(x, format, scale), fullgraph=True)
    x = torch.randn(100)
    for format in (E5M2, "E5M2", E4M3):
        assert_same_bits(f(x, format, 0.5), quantize(x, format, 0.5), x)


def fused_kernels(code):
    """The calls of generated kernels in a piece of Inductor's output."""
    return re.findall(r"^ +(cpp_fused\w*|triton_poi_fused\w*)(?:\.run)?\(", code, re.MULTILINE)


def test_relu_of_quantized_matmul_is_one_kernel(device):
    def f(x, w):
        return torch.relu(quantize(x @ w, E5M2, 0.5))

    x, w = torch.randn(16, 32, device=device), torch.randn(32, 8, device=device, requires_grad=True)
    out, (code,) = run_and_get_code(torch.compile(f, fullgraph=True), x, w.detach())
    assert_same_bits(out, f(x, w), None)
    assert len(fused_kernels(code)) == 1, code
    assert "ops.altgrad" not in code, "an opaque call is left in the compiled code"


def test_backward_is_fused_and_has_no_opaque_call(device):
    x, w = torch.randn(16, 32, device=device), torch.randn(32, 8, device=device, requires_grad=True)
    f = torch.compile(lambda: torch.relu(quantize(x @ w, E5M2, 0.5)), fullgraph=True)
    _, codes = run_and_get_code(lambda: f().sum().backward())
    assert len(codes) == 2  # forward and backward
    assert all("torch.ops.altgrad" not in code for code in codes)
    assert all(len(fused_kernels(code)) == 1 for code in codes)


def test_inlined_for_every_aot_backend():
    """No kernel of the package runs inside a compiled graph, also without Inductor."""
    x = torch.randn(10)
    f = torch.compile(lambda x: quantize(x, E5M2, 0.5) + 1, fullgraph=True, backend="aot_eager")
    want = quantize(x, E5M2, 0.5) + 1
    f(x)
    with torch.profiler.profile() as profile:
        got = f(x)
    assert_same_bits(got, want, x)
    assert not [event.name for event in profile.events() if event.name.startswith("altgrad::")]


def test_contraction_to_fma_is_harmless():
    """The CPU stand-in for Triton, which contracts by default: every product before a sum or difference is exact."""
    x = torch.cat([near_ties(E5M2), random_bit_patterns(200_000)])
    f = lambda x: ag.quantize(x, torch.tensor(1.0), "E5M2")  # noqa: E731
    want = f(x)
    with torch._inductor.config.patch(
        {"cpp.enable_floating_point_contract_flag": "fast", "force_disable_caches": True}
    ):
        assert_same_bits(torch.compile(f, fullgraph=True)(x), want, x)


@pytest.mark.skipif(torch.__version__ < "2.13", reason="torch 2.11 does not heed the switch on a CPU")
def test_low_precision_arithmetic_around_it_needs_a_switch():
    """Inductor keeps x * 1.5 in float32 where eager rounds it to bfloat16; the operator itself rounds alike."""
    x = torch.randn(10_000).bfloat16()
    f = lambda x: quantize(x * 1.5, E4M3)  # noqa: E731
    with torch._inductor.config.patch(emulate_precision_casts=True):
        assert_same_bits(torch.compile(f, fullgraph=True)(x), f(x), x)


def test_reduce_overhead():
    class Module(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(8, 8)

        def forward(self, x):
            return self.linear(quantize(x, E4M3, 0.25)).relu()

    module, x = Module(), torch.randn(4, 8)
    compiled = torch.compile(module, mode="reduce-overhead")
    for _ in range(3):
        assert_same_bits(compiled(x), module(x), x)


def test_code_of_values_that_are_traced_once(device, request):
    """It is the code of Inductor as it is, which the tests with that fixture are about."""

    def every_kind(x, scale):
        return ag.quantize(x, scale, "E7M0", "none", "to_odd"), ag.decode(ag.encode(x, scale, "E5M2"), scale, "E5M2")

    def code(x):
        torch._dynamo.reset()
        with torch._inductor.config.patch(fx_graph_cache=False):
            _, (code,) = run_and_get_code(torch.compile(every_kind, fullgraph=True), x, x.amax())
        return code.split("\n", 1)[1]  # after the number of the graph

    x = torch.randn(1000, device=device)
    want = code(x)
    request.getfixturevalue("each_value_is_traced_once")
    assert code(x) == want


def test_unbacked_sizes():
    def f(x, mask):
        rows = x[mask]
        return (
            quantize(rows, E5M2, torch.full((3,), 0.5)),
            encode(rows.t(), "E4M3").t(),
            decode(encode(rows, E4M3), E4M3),
        )

    x, mask = torch.randn(8, 3), torch.arange(8) % 3 == 0
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        for got, want in zip(torch.compile(f, fullgraph=True)(x, mask), f(x, mask)):
            assert_same_bits(got, want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_stochastic_draws_fuse(dtype):
    """Compiled, the random bits never become a tensor in memory; compiled draws are reproducible under manual_seed."""
    f = torch.compile(lambda x: quantize(x, E4M3, rounding="stochastic"), fullgraph=True)
    x = torch.randn(1000).to(dtype)
    draws = []
    for _ in range(2):
        torch.manual_seed(0)
        draws.append(f(x))
    assert_same_bits(draws[1], draws[0], x)
    _, (code,) = run_and_get_code(f, x)
    assert len(fused_kernels(code)) == 1 and "torch.ops" not in code.split("def call")[1]


def test_numbers_as_scales_compile_twice_at_most():
    """Once for the first number, once for any other."""
    torch._dynamo.reset()
    compilations = []

    def backend(graph, inputs):
        compilations.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    f = torch.compile(lambda x, scale: quantize(x, E5M2, scale), fullgraph=True, backend=backend)
    x = torch.randn(64)
    for scale in (0.5, 0.37, 1.0, 3.25, 2.0**-20, 7.7, 0.1, 0.2, 0.3, 0.4):
        assert_same_bits(f(x, scale), quantize(x, E5M2, scale), x)
    assert len(compilations) <= 2


def beside_its_transpose(f, x):
    """The outputs of f on x and on x.T, from one compiled function; held to eager's bits."""
    torch._dynamo.reset()
    both = lambda x: (f(x), f(x.T))  # noqa: E731
    for got, want in zip(torch.compile(both, fullgraph=True)(x), both(x)):
        assert_same_bits(got, want)


@pytest.mark.parametrize("blocks", [MXFP4, NVFP4], ids=["MXFP4", "NVFP4"])
def test_a_tensor_beside_its_transpose(blocks, device):
    x = torch.randn(64, 96, device=device)
    beside_its_transpose(lambda x: quantize(x, "E2M1", compute_scale(x, **blocks)), x)
    beside_its_transpose(lambda x: quantize_blocks(x, **blocks), x)


def test_what_inductor_fails_on_and_the_switch():
    """Blocks of a matrix and of its transpose, without altgrad; where Inductor's failure ends, so should the docs."""

    def of_torch(x):
        blocks = x.unflatten(-1, (-1, 32))
        return (blocks - blocks.amax(-1, keepdim=True)).flatten(-2) + 1

    seed = torch.tensor(7)
    cases = [
        of_torch,
        lambda x: quantize_blocks(x, **MXFP4) * 2,
        lambda x: quantize(x, "E2M1", compute_scale(x, **MXFP4), rounding="stochastic", random_bits=seed),
    ]
    for f in cases:
        with pytest.raises(Exception, match="AssertionError"):
            beside_its_transpose(f, torch.randn(64, 96))
    with torch._inductor.config.patch({"cpp.max_horizontal_fusion_size": 1}):
        beside_its_transpose(cases[1], torch.randn(64, 96))


def test_a_format_beside_its_name():
    """Dynamo took the constant of the name and the global for one object with two sources, and failed."""
    x = torch.randn(8, 4)
    f = lambda x: (compute_scale(x, "E4M3"), compute_scale(x, E4M3), quantize(x, "E4M3"), quantize(x, E4M3))  # noqa: E731
    for got, want in zip(torch.compile(f, fullgraph=True, backend="aot_eager")(x), f(x)):
        assert_same_bits(got, want, x)
