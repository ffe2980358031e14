"""project: the value of x / scale in a format, unscaled, in another dtype; by the definition, on every path."""

import pytest
import reference
import torch
from conftest import FORMATS, assert_same_bits, near_ties

from ops_registry import aten
from ops_registry.modes import DETERMINISTIC_ROUNDINGS, SATURATIONS

ag = torch.ops.altgrad
MODES = [(s, r) for s in SATURATIONS for r in DETERMINISTIC_ROUNDINGS]


def defined(f, x, scale, dtype, *args, **kwargs):
    quotient = (x.cpu().float() / scale.cpu()).numpy()
    return torch.from_numpy(reference.quantize(f, quotient, quotient.dtype.type(1), *args, **kwargs)).to(dtype)


@pytest.mark.parametrize("f", FORMATS, ids=lambda f: f.name)
def test_the_definition(f, device):
    points = near_ties(f)
    for value in (1.0, 0.37):
        x, scale = (points * value).to(device), torch.tensor(value, device=device)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            assert_same_bits(
                ag.project(x, scale, f.name, "propagate", "nearest_ties_to_even", dtype), defined(f, x, scale, dtype), x
            )
    half = points.bfloat16().to(device)
    assert_same_bits(ag.project(half, scale, f.name), defined(f, half, scale, torch.bfloat16), half)


@pytest.mark.parametrize("name", ["E4M3", "E5M2", "E2M1", "E7M0", "E4M3FNUZ"])
def test_every_mode(name, device):
    f = next(f for f in FORMATS if f.name == name)
    x, scale = (near_ties(f) * 0.37).to(device), torch.tensor(0.37, device=device)
    for saturation, rounding in MODES:
        want = defined(f, x, scale, torch.float32, saturation, rounding)
        assert_same_bits(ag.project(x, scale, name, saturation, rounding), want, x)
        assert_same_bits(aten.project_to(x, scale, name, saturation, rounding), want, x)
    bits = torch.randint(1 << 24, x.shape, dtype=torch.int32)
    want = defined(f, x, scale, torch.bfloat16, "finite", "stochastic", bits.numpy(), 24)
    assert_same_bits(ag.project_stochastic(x, scale, bits.to(device), name, "finite", torch.bfloat16), want, x)


def test_scales_of_any_shape_and_long_tensors(device):
    """Chunks, runs of one scale, tails."""
    torch.manual_seed(0)
    for shape in ((5, 3000), (3000, 5), (2, 130, 33)):
        x = torch.randn(shape, device=device)
        for sizes in ((), shape, (*shape[:-1], 1), shape[-1:]):
            scale = torch.rand(sizes, device=device) + 0.5
            for y in (x, x.transpose(0, -1)):
                s = scale if y is x else scale.expand(shape).transpose(0, -1)
                want = ag.quantize(y / s, torch.ones((), device=device), "E4M3")
                assert_same_bits(ag.project(y, s, "E4M3"), want, y)


def test_compiled_and_exported():
    def f(x, scale):
        return ag.project(x, scale, "E2M1", "propagate", "nearest_ties_to_even", torch.bfloat16) * 2

    x, scale = torch.randn(64), torch.tensor(0.3)
    for backend in ("aot_eager", "eager"):
        assert_same_bits(torch.compile(f, fullgraph=True, backend=backend)(x, scale), f(x, scale))

    class Module(torch.nn.Module):
        def forward(self, x, scale):
            return f(x, scale)

    program = torch.export.export(Module(), (x, scale))
    assert [node.target for node in program.graph.nodes].count(ag.project.default) == 1
    assert_same_bits(program.module()(x, scale), f(x, scale))


def test_gradients_pass_through_the_division():
    x, scale = torch.randn(8, requires_grad=True), torch.tensor(0.25)
    y = ag.project(x, scale, "E4M3", "propagate", "nearest_ties_to_even", torch.bfloat16)
    (gradient,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert_same_bits(gradient, torch.full((8,), 4.0))
    tangent = torch.func.jvp(lambda x: ag.project(x, scale, "E4M3"), (x.detach(),), (torch.ones(8),))[1]
    assert_same_bits(tangent, torch.full((8,), 4.0))
    bits = torch.zeros(8, dtype=torch.int32)
    y = ag.project_stochastic(x, scale, bits, "E4M3")
    assert_same_bits(torch.autograd.grad(y.sum(), x)[0], torch.full((8,), 4.0))


@pytest.mark.parametrize(
    "x, dtype", [(torch.ones(2), torch.float64), (torch.ones(2).double(), torch.float32), (torch.ones(2), torch.uint8)]
)
def test_bad_dtypes(x, dtype):
    with pytest.raises(TypeError, match="dtype must be float64 for float64 x, else"):
        ag.project(x, torch.tensor(1.0), "E4M3", "propagate", "nearest_ties_to_even", dtype)
