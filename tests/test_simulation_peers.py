"""The recipes beside the projects that they come from, on the same tensors, bit by bit.

torchao runs here. TransformerEngine and microxcaling need CUDA: their published rules are written down from their
sources, TransformerEngine's reference quantizer (custom_recipes/quantization_ref_nvfp4.py) and microxcaling's
quantize_mx (mx/mx_ops.py, mx/elemwise_ops.py). docs/simulation.md says where results differ, and why.
"""

import math
from dataclasses import replace

import pytest
import torch
from conftest import assert_same_bits

from altgrad.simulation import RECIPES, SimulationState, advance, linear
from altgrad.simulation.operands import State, quantize_operand
from ops_registry.hadamard import transformed


@pytest.fixture(scope="module")
def torchao():
    return pytest.importorskip("torchao", reason="torchao is not installed")


def matrix(rows=96, columns=160, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return (torch.randn(rows, columns) * torch.randn(rows, 1).exp()).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "recipe, element, mode",
    [
        ("mxfp8", torch.float8_e4m3fn, "RCEIL"),
        ("mxfp4", torch.float4_e2m1fn_x2, "FLOOR"),
        ("mxfp6_e2m3", "fp6_e2m3", "FLOOR"),
        ("mxfp6_e3m2", "fp6_e3m2", "FLOOR"),
    ],
)
def test_mx_operands_are_torchaos(torchao, recipe, element, mode, dtype):
    mx = pytest.importorskip("torchao.prototype.mx_formats.mx_tensor")
    if isinstance(element, str):
        element = getattr(torch, element, element)
    x = matrix(dtype=dtype)
    for operand in (x, x.t().contiguous()):  # along either dimension
        theirs = mx.MXTensor.to_mx(operand, element, 32, mx.ScaleCalculationMode[mode]).dequantize(torch.float32)
        ours = quantize_operand(operand, RECIPES[recipe].forward.left, 0, State())
        assert ours.scale is None
        assert_same_bits(ours.values.float(), theirs, operand)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rowwise_operands_are_torchaos(torchao, dtype):
    utils = pytest.importorskip("torchao.float8.float8_utils")
    x = matrix(dtype=dtype)
    granularity = utils.ScalingGranularity.AXISWISE
    scale = utils.tensor_to_scale(
        x, torch.float8_e4m3fn, scaling_granularity=granularity, axiswise_dim=1, round_scales_to_power_of_2=True
    )
    theirs = utils.to_fp8_saturated(x.float() * scale, torch.float8_e4m3fn).float() / scale
    assert_same_bits(quantize_operand(x, RECIPES["fp8_rowwise"].forward.left, 0, State()).values.float(), theirs, x)


TIES = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])


def compare_nvfp4(x, levels, values):
    """Both levels of scales, and values of E2M1 wherever the quotient is not within rounding errors of a tie."""
    rule = RECIPES["nvfp4"].forward.left
    ours = quantize_operand(x, rule, 0, State())
    blocks, amax = x.float().unflatten(-1, (-1, 16)), x.float().abs().amax()
    assert torch.allclose(ours.scale, amax / (448 * 6), rtol=1e-6)
    theirs = values * levels.unsqueeze(-1)
    differ = (ours.values.float().unflatten(-1, (-1, 16)) != theirs).nonzero()
    quotients = (blocks / (levels.unsqueeze(-1) * ours.scale)).abs()
    for index in differ:
        q = quotients[tuple(index)]
        assert ((q - TIES).abs() <= 4 * 2.0**-24 * q).any(), (index.tolist(), q.item())
    return len(differ)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nvfp4_operands_are_torchaos(torchao, dtype):
    nvfp4 = pytest.importorskip("torchao.prototype.mx_formats.nvfp4_tensor")
    kernels = pytest.importorskip("torchao.prototype.mx_formats.kernels")
    x = matrix(512, 512, dtype)
    scale = nvfp4.per_tensor_amax_to_scale(x.abs().amax())
    levels, codes = nvfp4.nvfp4_quantize(x, 16, scale)
    values = kernels.f4_unpacked_to_f32(kernels.unpack_uint4(codes)).view(512, 32, 16)
    assert compare_nvfp4(x, levels.float(), values) <= 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nvfp4_operands_are_transformer_engines(dtype):
    """Their scales multiply by rounded reciprocals; the levels agree, and so do all values that are not at a tie."""
    x = matrix(512, 512, dtype)
    blocks = x.float().unflatten(-1, (-1, 16))
    encode = torch.tensor(448.0) * 6 / x.float().abs().amax()
    multiplier = encode * torch.reciprocal(torch.tensor(6.0))
    levels = (blocks.abs().amax(-1) * multiplier).clamp(-448, 448).to(torch.float8_e4m3fn).float()
    scaled = (blocks * (1 / (levels * (1 / encode))).unsqueeze(-1)).clamp(-6, 6)
    grid = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    below, at = (torch.bucketize(scaled.abs(), TIES, right=right) for right in (False, True))
    values = torch.copysign(grid[torch.where(at % 2 == 0, at, below)], scaled)  # ties to the even code
    assert compare_nvfp4(x, levels, values) <= x.numel() / 1000


def test_two_dimensional_blocks_are_transformer_engines():
    """16 x 16 blocks of a weight: one level for each, by its largest element; the transposed weight rounds alike."""
    w = matrix(64, 96)
    rule = RECIPES["nvfp4"].forward.right
    ours = quantize_operand(w, rule, 0, State())
    assert_same_bits(quantize_operand(w.t(), rule, 0, State()).values.t(), ours.values)
    blocks = w.unflatten(0, (-1, 16)).unflatten(-1, (-1, 16))
    levels = (blocks.abs().amax((1, 3), keepdim=True) / 6 / ours.scale).to(torch.float8_e4m3fn).float()
    values = (ours.values.unflatten(0, (-1, 16)).unflatten(-1, (-1, 16)) / levels).abs()
    assert set(values.unique().tolist()) == {0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0}


def test_hadamard_is_transformer_engines():
    """``x_block @ (diag(signs) @ H / 4)``, with the signs of get_wgrad_sign_vector."""
    signs = torch.tensor([1.0, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1])
    h = torch.ones(1, 1)
    while len(h) < 16:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    transform = torch.diag(signs) @ h / 4
    x = (matrix(64, 48) * 1000).round()  # so that no sum is rounded
    assert_same_bits(transformed(x), (x.reshape(-1, 16) @ transform).view(64, 48))
    x = matrix(64, 48)
    assert torch.allclose(transform @ transform.t(), torch.eye(16), atol=1e-6)
    y = matrix(32, 48, seed=1)
    assert torch.allclose(transformed(x) @ transformed(y).t(), x @ y.t(), rtol=1e-4, atol=1e-3)


def microxcaling(x):
    """quantize_mx along the last dimension: E4M3, blocks of 32, scale_bits 8, round "nearest" (ties away)."""
    blocks = x.unflatten(-1, (-1, 32))
    shared = blocks.abs().amax(-1, keepdim=True).log2().floor() - 8  # emax of E4M3
    a = blocks / 2.0**shared
    private = torch.where(a == 0, 0.0, a.abs().log2().floor()).clamp(min=-6)
    a = a / 2.0**private * 2.0**3
    a = a.sign() * (a.abs() + 0.5).floor() / 2.0**3 * 2.0**private
    return (a.clamp(-448, 448) * 2.0**shared).flatten(-2)


def test_mx_ocp_is_microxcaling_forward_and_backward():
    """mx/linear.py: the operands of each product along its own contraction, then torch's product."""
    x, w = matrix(64, 96).requires_grad_(), matrix(32, 96, seed=1).requires_grad_()
    y = linear(x, w, None, "mx_ocp")
    dy = matrix(64, 32, seed=2)
    dx, dw = torch.autograd.grad(y, (x, w), dy)
    with torch.no_grad():
        assert_same_bits(y, microxcaling(x) @ microxcaling(w).t())
        assert_same_bits(dx, microxcaling(dy) @ microxcaling(w.t()).t())
        assert_same_bits(dw, microxcaling(dy.t()) @ microxcaling(x.t()).t())


def test_values_of_the_literature():
    """NVFP4 of a standard normal sample, as Quartet II's authors give it: mean squared errors, and what averages gain.

    Stochastic rounding is unbiased, so that four times the draws give one bit more, if scales that E4M3 rounded down
    leave room: 17/16.
    """
    torch.manual_seed(0)
    x = torch.randn(512, 1024)
    recipe = RECIPES["nvfp4"]
    state = SimulationState(recipe)

    def draw(rule):
        advance([state])
        values, scale, _ = quantize_operand(x, rule, 0, state.of().of(2))
        return values * scale

    def error(y):
        return (y - x).square().mean().item()

    def bits_gained(rule):
        draws = [draw(rule) for _ in range(64)]
        return math.log2(error(draws[0]) / error(torch.stack(draws).mean(0))) / 2

    biased = recipe.grad_input.left
    unbiased = replace(biased, headroom=17 / 16)
    assert error(draw(recipe.forward.left)) == pytest.approx(9.0e-3, abs=1e-4)
    assert error(draw(recipe.forward.right)) == pytest.approx(12.4e-3, abs=1e-4)
    assert error(draw(unbiased)) == pytest.approx(23.5e-3, abs=2e-4)
    assert bits_gained(unbiased) == pytest.approx(3.0, abs=0.01)
    assert bits_gained(biased) < 2.85
