"""Simulated products with the accumulator of a tensor core, forward and backward; on an H100 beside the tensor core."""

from dataclasses import replace

import pytest
import torch
from conftest import assert_same_bits
from torch import nn

from altgrad.quantization import E4M3, E5M2, PerBlock, compute_scale, encode, encode_blocks
from altgrad.simulation import RECIPES, Product, ProductState, Recipe, Rule, coverage, linear, simulate

ag = torch.ops.altgrad
HOPPER = ("HOPPER_FP8_FAST", "HOPPER_FP8", "HOPPER_FP8")  # what TransformerEngine runs
CURRENT = replace(RECIPES["fp8_current"], accumulator=HOPPER)
SUITED = {
    "fp8_current": HOPPER,
    "fp8_rowwise": "HOPPER_FP8",
    "unit_scaled_fp8": "ADA_FP8",
    "mxfp8": "BLACKWELL_MXFP8",
    "mxfp6_e3m2": "BLACKWELL_MXFP8",
    "nvfp4": "BLACKWELL_NVFP4",
}


def layer(dtype=torch.float32, rows=48, k=160, columns=96, device="cpu"):
    """x, w, bias and dy, with outliers."""
    generator = torch.Generator().manual_seed(0)
    shapes = (rows, k), (columns, k), (columns,), (rows, columns)
    x, w, bias, dy = (torch.randn(shape, generator=generator) for shape in shapes)
    x[3] *= 30
    tensors = [t.to(device, dtype).requires_grad_() for t in (x, w, bias, dy * 1e-3)]
    return (*tensors[:3], tensors[3].detach())


def run(x, w, bias, dy, recipe, state=None, f=linear):
    y = f(x, w, bias, recipe, state=state)
    return y, *torch.autograd.grad(y, (x, w), dy)


def values(x, f):
    """The values of the format, and the scale of the tensor."""
    scale = compute_scale(x, f)
    return ag.project(x, scale, f.name, "propagate", "nearest_ties_to_even", torch.float32), scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_three_products(dtype):
    x, w, bias, dy = layer(dtype)
    with torch.no_grad():
        (a, of_a), (b, of_b), (g, of_g) = values(x, E4M3), values(w, E4M3), values(dy, E5M2)
        y = ag.matmul(a, b.T, "HOPPER_FP8_FAST(E4M3,E4M3)") * (of_a * of_b) + bias
        dx = ag.matmul(g, b, "HOPPER_FP8(E5M2,E4M3)") * (of_g * of_b)
        dw = ag.matmul(g.T, a, "HOPPER_FP8(E5M2,E4M3)") * (of_g * of_a)
    for got, want in zip(run(x, w, bias, dy, CURRENT), (y, dx, dw), strict=True):
        assert_same_bits(got, want.to(dtype))


def test_scales_of_blocks_are_inside_the_sum():
    x, w, _, _ = layer()
    recipe = replace(RECIPES["mxfp8"], accumulator="BLACKWELL_MXFP8")
    blocks = [encode_blocks(t.detach(), E4M3, granularity=PerBlock((1, 32)), power_of_two="rceil") for t in (x, w)]
    a, b = (t.codes.view(torch.float8_e4m3fn).float() for t in blocks)
    of_a, of_b = (t.scales.view(torch.float8_e8m0fnu).float() for t in blocks)
    want = ag.matmul(a, b.T, "BLACKWELL_MXFP8", of_a, of_b.T)
    assert_same_bits(linear(x, w, None, recipe), want)


@pytest.mark.parametrize("name", SUITED)
def test_wide_accumulators_give_the_product_of_torch(name):
    """With room for all bits a product is the exact one: in bfloat16 torch's, but for what float32 sums round."""
    exact = "g32f40e8m23n"
    if name in ("mxfp8", "mxfp6_e3m2"):
        exact += "s32"
    recipe = replace(RECIPES[name], accumulator=SUITED[name] if name == "nvfp4" else exact)
    state = ProductState(torch.arange(6))
    x, w, bias, dy = layer(torch.bfloat16, 50, 150, 90)  # blocks that are not full
    for got, want in zip(run(x, w, bias, dy, recipe, state), run(x, w, bias, dy, RECIPES[name], state), strict=True):
        assert (got == want).float().mean() > 0.99
        assert torch.allclose(got, want, rtol=2**-7, atol=1e-6)


@pytest.mark.parametrize("name", SUITED)
def test_narrow_accumulators_do_not(name):
    recipe = replace(RECIPES[name], accumulator={**SUITED, "mxfp8": "g32f9e8m9zs32"}.get(name))
    if name in ("nvfp4", "mxfp6_e3m2"):
        recipe = replace(recipe, accumulator="g16f9e8m9z" + ("x16(E2M1,E2M1)" if name == "nvfp4" else "s32"))
    state = ProductState(torch.arange(6))
    x, w, bias, dy = layer()
    for got, want in zip(run(x, w, bias, dy, recipe, state), run(x, w, bias, dy, RECIPES[name], state), strict=True):
        error = ((got - want).norm() / want.norm()).item()
        assert 1e-5 < error < 0.05


@pytest.mark.compiles
@pytest.mark.parametrize("name", ["fp8_current", "fp8_rowwise"])
def test_compiled(name):
    recipe, state = replace(RECIPES[name], accumulator=SUITED[name]), ProductState(torch.arange(6))
    x, w, bias, dy = layer(torch.bfloat16)
    f = torch.compile(linear, fullgraph=True)
    for got, want in zip(run(x, w, bias, dy, recipe, state, f), run(x, w, bias, dy, recipe, state), strict=True):
        assert_same_bits(got, want)


def test_a_model_is_trained_and_covered():
    model = nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 16))
    simulate(model, CURRENT)
    x = torch.randn(8, 32, requires_grad=True)
    found = coverage(model, x)
    assert (found.simulated, found.total) == (6, 6)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    losses = []
    for _ in range(20):
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2


def test_high_precision_products_by_a_tensor_core():
    """Without rules operands are the layer's own, which the accumulator has to take."""
    x, w, _, _ = layer(torch.bfloat16)
    recipe = Recipe("bfloat16 of an H100", accumulator="HOPPER_BF16")
    assert_same_bits(linear(x, w, None, recipe), ag.matmul(x, w.T, "HOPPER_BF16").bfloat16())
    with pytest.raises(ValueError, match="a must hold values of BF16 for accumulator 'HOPPER_BF16"):
        linear(x.float() + 1e-6, w.float(), None, recipe)
    with pytest.raises(TypeError, match=r"must be float16, bfloat16 or float32, got torch\.float64"):
        linear(x.double(), w.double(), None, recipe)


def test_recipes_as_data():
    assert Recipe.from_json(CURRENT.to_json()) == CURRENT
    backward = "HOPPER_FP8(E5M2,E4M3)"
    assert CURRENT.accumulators == ("HOPPER_FP8_FAST(E4M3,E4M3)", backward, backward)
    assert CURRENT.forward_only().accumulators == ("HOPPER_FP8_FAST(E4M3,E4M3)", None, None)
    assert "accumulator" not in RECIPES["fp8_current"].to_json()


BAD = [
    ("mxfp8", "HOPPER_FP8", "needs scales that are constant along the contraction"),
    ("fp8_block", "HOPPER_FP8", "needs scales that are constant along the contraction"),
    ("fp8_current", "BLACKWELL_MXFP8", "needs blocks of 32 along the contraction with scales of powers of two"),
    ("nvfp4", "BLACKWELL_MXFP8", "needs blocks of 32 along the contraction with scales of powers of two"),
    ("mxfp4", "BLACKWELL_NVFP4", "needs blocks of 16 along the contraction with scale_format='E4M3'"),
    ("fp8_current", "HOPPER_FP9", "unknown accumulator 'HOPPER_FP9'"),
    ("fp8_current", ("HOPPER_FP8", "HOPPER_FP8"), "accumulator must be one or three"),
]


@pytest.mark.parametrize(("name", "accumulator", "message"), BAD)
def test_what_does_not_suit(name, accumulator, message):
    with pytest.raises(ValueError, match=message):
        replace(RECIPES[name], accumulator=accumulator)


def test_the_forward_operand_again():
    again = Rule(None, source="forward")
    with pytest.raises(ValueError, match="source='forward' needs scales per tensor"):
        Recipe(
            "r",
            Product(Rule("E4M3", per="row"), Rule("E4M3", per="row")),
            Product(Rule("E5M2"), again),
            accumulator="e8m23n",
        )


def codes(x, f, scale):
    dtype = {"E4M3": torch.float8_e4m3fn, "E5M2": torch.float8_e5m2}[f.name]
    return encode(x, f, scale).view(dtype)


def column_major(t):
    return t.t().contiguous().t()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(48, 160, 96), (512, 768, 1024)])
def test_the_bits_of_scaled_mm(dtype, shape):
    """A layer by fp8_current with Hopper's accumulators, beside the same layer on the tensor core."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("accumulators are verified on Hopper")
    x, w, _, dy = layer(dtype, *shape, device="cuda")
    of_x, of_w, of_dy = compute_scale(x, E4M3), compute_scale(w, E4M3), compute_scale(dy, E5M2)
    with torch.no_grad():
        x8, w8, dy8 = codes(x, E4M3, of_x), codes(w, E4M3, of_w), codes(dy, E5M2, of_dy)
        y = torch._scaled_mm(x8, w8.t(), of_x, of_w, out_dtype=dtype, use_fast_accum=True)
        dx = torch._scaled_mm(dy8, column_major(w8), of_dy, of_w, out_dtype=dtype)
        dw = torch._scaled_mm(dy8.t().contiguous(), column_major(x8), of_dy, of_x, out_dtype=dtype)
    for got, want in zip(run(x, w, None, dy, CURRENT), (y, dx, dw), strict=True):
        assert_same_bits(got, want)


def test_the_format_of_scales_goes_by_any_of_its_names():
    rules = [(Rule("E2M1", per=16, scale_format=name),) * 2 for name in ("E4M3", "e4m3b7fn", "float8_e4m3fn")]
    recipes = [Recipe("f", forward=rule, accumulator="BLACKWELL_NVFP4") for rule in rules]
    x, w = torch.randn(4, 64), torch.randn(8, 64)
    for recipe in recipes[1:]:
        assert torch.equal(linear(x, w, None, recipe), linear(x, w, None, recipes[0]))
