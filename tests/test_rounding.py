"""Rounding modes beyond the default: stochastic rounding in law and in draws, gradient formats, every path for each.

The deterministic modes and stochastic rounding with given bits are compared with the definition in test_numerics.py.
"""

import math
from fractions import Fraction
from functools import partial

import pytest
import reference
import torch
from conftest import FORMATS, NAMED, assert_same_bits, near_ties, reference_quantize
from torch.utils.checkpoint import checkpoint

from altgrad.quantization import (
    E4M3,
    E5M2,
    PerBlock,
    compute_scale,
    decode,
    dequantize,
    encode,
    encode_blocks,
    quantize,
    quantize_blocks,
    quantize_gradient,
    resolve,
)
from ops_registry.modes import DETERMINISTIC_ROUNDINGS, ROUNDINGS

ag = torch.ops.altgrad
ONE = torch.tensor(1.0)


@pytest.mark.parametrize("f", FORMATS, ids=lambda f: f.name)
def test_round_ups_of_all_random_values(f):
    """With all 2^8 values of R, StochasticA rounds up floor(nu * 2^8) times."""
    values, _ = reference.grid(f)
    below, above = torch.tensor(values[:-2]), torch.tensor(values[1:-1])
    for nu in (0.0, 2**-9, 2**-8, 0.25, 0.3, 0.5, 1 - 2**-8, 1 - 2**-9):
        x = below + nu * (above - below)
        random = torch.arange(256, dtype=torch.uint8)[:, None].expand(-1, len(x))
        y = ag.quantize_stochastic(x.expand(256, -1), ONE, random, f.name)
        assert torch.equal((y == above).sum(0), torch.full((len(x),), math.floor(nu * 256)))
        assert ((y == above) | (y == below)).all()


@pytest.mark.parametrize("f", [E4M3, E5M2, resolve("E7M0"), resolve("E0M7")], ids=lambda f: f.name)
def test_drawn_bits_are_unbiased(f, device):
    """Hoeffding: the share of round-ups of n draws leaves p +- sqrt(ln(2 / d) / 2n) with a probability below d."""
    n, d = 1 << 18, 1e-9
    bound = math.sqrt(math.log(2 / d) / (2 * n))
    below, above = f.to_real(f.max_code // 2), f.to_real(f.max_code // 2 + 1)
    torch.manual_seed(0)
    for p in (0.001, 0.25, 0.7):
        x = torch.full((n,), below + p * (above - below), device=device)
        share = (quantize(x, f, rounding="stochastic") == above).double().mean().item()
        assert abs(share - p) < bound + 2.0**-24


def test_a_float32_normal_is_rounded_without_bias():
    """24 random bits reach the last bit of a float32: 2^-23 above 1 is 2^-21 steps of E5M2, so 8 of 2^24 go up."""
    random = torch.tensor([0, (1 << 24) - 9, (1 << 24) - 8, (1 << 24) - 1], dtype=torch.int32)
    y = ag.quantize_stochastic(torch.full((4,), 1 + 2.0**-23), ONE, random, "E5M2")
    assert y.tolist() == [1.0, 1.0, 1.25, 1.25]


@pytest.mark.parametrize("function", [quantize, encode])
def test_draws_are_reproducible(function, device):
    x = torch.randn(1000, device=device)
    draw = lambda **kwargs: function(x, E5M2, 0.5, rounding="stochastic", **kwargs)  # noqa: E731
    torch.manual_seed(5)
    first, second = draw(), draw()
    torch.manual_seed(5)
    assert_same_bits(draw(), first)
    assert not torch.equal(first, second)
    generator = torch.Generator(device).manual_seed(5)
    state = torch.get_rng_state()
    third = draw(generator=generator)
    assert torch.equal(torch.get_rng_state(), state)
    assert_same_bits(draw(generator=generator.manual_seed(5)), third)


def test_what_is_refused_draws_nothing():
    x, state, stochastic = torch.ones(2, 4), torch.get_rng_state(), {"rounding": "stochastic"}
    for call in (
        lambda: quantize(x.int(), E5M2, **stochastic),
        lambda: quantize(x, "E9M9", **stochastic),
        lambda: encode(x, E5M2, torch.ones(3), **stochastic),
        lambda: quantize(x, E5M2, saturation="all", **stochastic),
        lambda: quantize_gradient(x, "E9M9", lambda grad: grad.abs().amax(), **stochastic),
        lambda: quantize_blocks(x, E5M2, granularity=PerBlock((2, 2, 2)), **stochastic),
        lambda: quantize_blocks(x, E5M2, granularity=PerBlock(2), saturation="all", **stochastic),
        lambda: encode_blocks(x, E5M2, granularity=PerBlock(2), saturation="all", **stochastic),
    ):
        with pytest.raises((TypeError, ValueError)):
            call()
        assert torch.equal(torch.get_rng_state(), state)


def test_a_fraction_as_scale():
    assert_same_bits(quantize(torch.tensor(1.1), E5M2, Fraction(1, 2)), quantize(torch.tensor(1.1), E5M2, 0.5))


@pytest.mark.compiles
def test_compiled_draws_are_eager_ones_on_request():
    """Inductor draws from its own generator; with fallback_random it takes eager's."""
    torch._dynamo.reset()
    x = torch.randn(1000)
    f = lambda x: quantize(x, E5M2, rounding="stochastic")  # noqa: E731
    with torch._inductor.config.patch(fallback_random=True):
        compiled = torch.compile(f, fullgraph=True)
        compiled(x)
        torch.manual_seed(0)
        got = compiled(x)
    torch.manual_seed(0)
    assert_same_bits(got, f(x), x)


def test_checkpointing_draws_the_same_bits_again():
    x = torch.randn(1000, requires_grad=True)
    f = lambda x: (quantize(x, E5M2, rounding="stochastic") ** 2).sum()  # noqa: E731
    torch.manual_seed(0)
    checkpoint(f, x, use_reentrant=False).backward()
    torch.manual_seed(0)
    assert_same_bits(x.grad, 2 * quantize(x, E5M2, rounding="stochastic"))


@pytest.mark.compiles
@pytest.mark.parametrize(
    ("rounding", "compiled"), [*((mode, False) for mode in ROUNDINGS), (ROUNDINGS[0], True), ("stochastic", True)]
)
def test_gradient_format(rounding, compiled, device):
    if compiled:
        torch._dynamo.reset()
    x = torch.randn(4, 3, device=device, requires_grad=True)
    scale = torch.tensor([0.5, 0.37, 2.0], device=device)
    bits = torch.randint(256, (4, 3), dtype=torch.uint8, device=device) if rounding == "stochastic" else None
    f = lambda x: quantize_gradient(x, E5M2, scale, rounding=rounding, random_bits=bits)  # noqa: E731
    y = (torch.compile(f, fullgraph=True) if compiled else f)(x)
    assert_same_bits(y, x)
    g = torch.randn(4, 3, device=device)
    (got,) = torch.autograd.grad(y, x, g)
    assert_same_bits(got, quantize(g, E5M2, scale, rounding=rounding, random_bits=bits))


def test_gradient_format_draws_once_in_the_forward_pass():
    x = torch.randn(1000, requires_grad=True)
    y = quantize_gradient(x, E5M2, rounding="stochastic")
    g = torch.randn(1000)
    first = torch.autograd.grad(y, x, g, retain_graph=True)[0]
    assert_same_bits(torch.autograd.grad(y, x, g)[0], first)


def test_gradient_format_composes():
    """E4M3 forward, E5M2 backward; second order, forward mode, per-sample gradients, export."""
    x = torch.randn(6)
    f = lambda x: quantize_gradient(quantize(x, E4M3, 0.5), E5M2, 0.25)  # noqa: E731
    w = torch.randn(6)
    assert_same_bits(torch.func.grad(lambda x: (f(x) * w).sum())(x), quantize(w, E5M2, 0.25))
    assert_same_bits(torch.func.jvp(f, (x,), (w,))[1], w)
    samples = torch.randn(3, 6)
    per_sample = torch.vmap(torch.func.grad(lambda x: (f(x) * w).sum()))(samples)
    assert_same_bits(per_sample, quantize(w, E5M2, 0.25).expand(3, 6))
    leaf = x.clone().requires_grad_()
    (first,) = torch.autograd.grad((quantize_gradient(leaf, E5M2) ** 3).sum(), leaf, create_graph=True)
    assert_same_bits(first, quantize(3 * x**2, E5M2))
    (second,) = torch.autograd.grad(first.sum(), leaf)
    assert second.isfinite().all()

    class Module(torch.nn.Module):
        def forward(self, x):
            return f(x)

    program = torch.export.export(Module(), (x,))
    assert [str(n.target) for n in program.graph.nodes if "altgrad" in str(n.target)] == [
        "altgrad.quantize.default",
        "altgrad.quantize_gradient.default",
    ]
    leaf = x.clone().requires_grad_()
    (program.module()(leaf) * w).sum().backward()
    assert_same_bits(leaf.grad, quantize(w, E5M2, 0.25))


class EveryMode(torch.nn.Module):
    def forward(self, x, bits):
        results = [quantize(x, E5M2, 0.37, saturation="none", rounding=mode) for mode in DETERMINISTIC_ROUNDINGS]
        results += [quantize(x, E5M2, 0.37, saturation="none", rounding="stochastic", random_bits=bits)]
        codes = encode(x, E4M3, 0.37, rounding="stochastic", random_bits=bits)
        return [*results, codes, dequantize(decode(codes, E4M3), 0.37)]


@pytest.mark.compiles
def test_aotinductor_package_of_every_mode(tmp_path, each_value_is_traced_once):
    x = near_ties(E5M2) * 0.37
    bits = torch.randint(1 << 24, x.shape, dtype=torch.int32)
    program = torch.export.export(EveryMode(), (x, bits))
    path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "modes.pt2"))
    for got, want in zip(torch._inductor.aoti_load_package(path)(x, bits), EveryMode()(x, bits)):
        assert_same_bits(got, want, x)


@pytest.mark.parametrize("f", NAMED, ids=lambda f: f.name)
def test_directed_modes_bracket_the_value(f):
    x = near_ties(f)
    x = x[x.isfinite() & (x.abs() <= f.max_representable_value)]
    down, up = (ag.quantize(x, ONE, f.name, "finite", mode) for mode in ("toward_negative", "toward_positive"))
    assert ((down <= x) & (x <= up)).all()
    assert_same_bits(down, reference_quantize(f, x, ONE, "finite", "toward_negative"), x)
    assert_same_bits(ag.quantize(-x, ONE, f.name, "finite", "toward_positive").abs(), down.abs(), x)


def test_the_scale_of_a_gradient_is_made_of_the_gradient():
    """Gradients of 1e-30, which at scale 1 are zero in E5M2; eager, compiled and per sample, with bits and without."""
    scale_of = partial(compute_scale, format=E5M2)
    x, grad = torch.randn(5, 8), torch.randn(5, 8) * 1e-30
    bits = torch.randint(1 << 24, x.shape, dtype=torch.int32)
    for modes in ({}, {"rounding": "stochastic", "random_bits": bits}, {"saturation": "none", "rounding": "to_odd"}):
        f = lambda x: quantize_gradient(x, E5M2, scale_of, **modes)  # noqa: B023, E731
        want = quantize(grad, E5M2, compute_scale(grad, E5M2), **modes)
        assert want.count_nonzero() > 30
        for function in (f, torch.compile(f, fullgraph=True, backend="aot_eager")):
            leaf = x.clone().requires_grad_()
            y = function(leaf)
            y.backward(grad)
            assert_same_bits(y, x)
            assert_same_bits(leaf.grad, want)
    (first,) = torch.autograd.grad((quantize_gradient(leaf, E5M2, scale_of) ** 2).sum(), leaf, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), leaf)
    assert_same_bits(second, torch.full((5, 8), 2.0))  # 1 is a value of E5M2 at the scale of ones
    each = torch.func.vmap(torch.func.grad(lambda x, g: (quantize_gradient(x, E5M2, scale_of) * g).sum()))(x, grad)
    assert_same_bits(each, torch.stack([quantize(g, E5M2, compute_scale(g, E5M2)) for g in grad]))
    with pytest.raises(NotImplementedError, match="jvp"):
        torch.func.jvp(lambda x: quantize_gradient(x, E5M2, scale_of), (x,), (grad,))
    with pytest.raises(TypeError, match="scale must be a tensor or a number"):
        quantize_gradient(x, E5M2, "amax")
