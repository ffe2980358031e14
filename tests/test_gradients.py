"""The straight-through gradient is the incoming gradient itself; scales get None."""

import processes
import pytest
import torch
from conftest import FORMATS, assert_same_bits

from altgrad.quantization import E4M3, E5M2, decode, dequantize, encode, quantize

ag = torch.ops.altgrad
ONE = torch.tensor(1.0)


def variants(f, *backends):
    torch._dynamo.reset()
    return [f, *(torch.compile(f, fullgraph=True, backend=backend) for backend in backends or ["aot_eager"])]


@pytest.mark.parametrize("f", FORMATS, ids=lambda f: f.name)
def test_incoming_gradient_in_every_bit(f, device):
    """NaN, infinities, -0 and subnormals of the gradient included, for inputs that clip, vanish or are NaN."""
    x = torch.tensor([1e30, -1e30, 1e-30, float("nan"), float("inf"), -0.0], device=device, requires_grad=True)
    g = torch.tensor([1.0, float("nan"), -0.0, 1e-45, float("inf"), -2.0], device=device)
    for saturation in ("propagate", "finite", "none"):
        (got,) = torch.autograd.grad(ag.quantize(x, ONE, f.name, saturation), x, g)
        assert_same_bits(got, g)


def test_it_is_an_alias():
    x = torch.randn(4, requires_grad=True)
    y = quantize(x, E5M2)
    assert y.grad_fn.saved_tensors == ()
    g = torch.randn(4)
    (got,) = torch.autograd.grad(y, x, g)
    assert got.data_ptr() == g.data_ptr()


@pytest.mark.compiles
def test_second_use_of_x():
    x = torch.randn(8, requires_grad=True)
    for f in variants(lambda x: quantize(x, E5M2, 0.5) * 3 + x, "aot_eager", "inductor"):
        (got,) = torch.autograd.grad(f(x).sum(), x)
        assert_same_bits(got, torch.full((8,), 4.0))


def test_stochastic_is_straight_through_too():
    x, random = torch.randn(8, requires_grad=True), torch.randint(256, (8,), dtype=torch.uint8)
    for f in variants(lambda x: quantize(x, E5M2, rounding="stochastic", random_bits=random) * 3):
        (got,) = torch.autograd.grad(f(x).sum(), x)
        assert_same_bits(got, torch.full((8,), 3.0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_dequantize_gradient(dtype):
    x = torch.randn(4, 3, dtype=dtype, requires_grad=True)
    scale, g = torch.rand(3) + 0.1, torch.randn(4, 3, dtype=dtype)
    for f in variants(lambda x: dequantize(x, scale)):
        (got,) = torch.autograd.grad(f(x), x, g)
        assert_same_bits(got, ag.dequantize(g, scale))


def test_scale_that_requires_grad_gets_none():
    for x_requires_grad in (True, False):
        x = torch.randn(4, requires_grad=x_requires_grad)
        for f in (
            lambda x, s: quantize(x, E5M2, s),
            lambda x, s: dequantize(x, s),
            lambda x, s: decode(encode(x, E5M2, s), E5M2, s),
        ):
            for g in variants(f):
                scale = torch.tensor(0.5, requires_grad=True)
                y = g(x, scale)
                assert y.requires_grad or g is not f  # eager; compiled, where a gradient can flow
                if y.requires_grad:
                    y.sum().backward()
                assert scale.grad is None


def test_double_backward():
    x = torch.tensor([0.3, 1.1], requires_grad=True)
    y = quantize(x, E5M2)
    (first,) = torch.autograd.grad((y**3).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    assert_same_bits(second, 6 * y)
    (first,) = torch.autograd.grad((dequantize(x, 0.5) ** 3).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    assert_same_bits(second, 6 * dequantize(x, 0.5) * 0.25)


def test_codes_carry_no_gradient():
    x = torch.randn(4, requires_grad=True)
    codes = encode(x, E4M3)
    assert not codes.requires_grad
    assert not decode(codes, E4M3).requires_grad


FALLBACK = """
import torch._functorch.autograd_function, torch._functorch.utils
del torch._functorch.utils.enable_single_level_autograd_function
import ops_registry.autograd
from torch.autograd import forward_ad
from altgrad.quantization import E5M2, quantize, dequantize
assert not ops_registry.autograd.SERVES_TRANSFORMS
x = torch.randn(3, requires_grad=True)
(quantize(x, E5M2, 0.5) + dequantize(x, 0.5)).sum().backward()
assert x.grad.tolist() == [1.5] * 3
x = x.detach()
assert torch.equal(torch.func.jacfwd(lambda x: quantize(x, E5M2, 0.5))(x), torch.eye(3))
assert torch.equal(torch.func.jacrev(lambda x: dequantize(x, 0.5))(x), torch.eye(3) / 2)
assert torch.equal(torch.vmap(torch.func.grad(lambda x: quantize(x, E5M2, rounding="stochastic").sum()),
                              randomness="different")(x[:, None]), torch.ones(3, 1))
torch.library.opcheck(torch.ops.altgrad.quantize.default, (x.requires_grad_(), torch.tensor(1.0), "E5M2"))
print("served")
"""


@pytest.mark.compiles
def test_register_autograd_serves_where_the_private_names_are_missing():
    done = processes.run(FALLBACK)
    assert done.stdout == "served\n", done.stderr[-2000:]
