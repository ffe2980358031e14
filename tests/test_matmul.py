"""Products with the accumulator of a tensor core: what an H100 gave, and the rule in exact rationals."""

from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import assert_same_bits
from products_of import KINDS, make
from torch.func import grad, jvp, vmap

from altgrad.accumulators import matmul
from altgrad.quantization import quantize, resolve
from ops_registry import aten, cpu
from ops_registry.accumulators import ACCUMULATORS, NAMED_ACCUMULATORS, resolve_accumulator

ag = torch.ops.altgrad
BACKENDS = {"operator": ag.matmul, "formula": aten.FORMULAS["matmul"]}
DTYPES = {"E4M3": torch.float8_e4m3fn, "E5M2": torch.float8_e5m2, "BF16": torch.bfloat16, "FP16": torch.float16}
RECORDED = np.load(Path(__file__).with_name("products_of_h100.npz"))
UNSCALED = [name for name, rule in NAMED_ACCUMULATORS.items() if resolve_accumulator(name).scaled is None]
# Chains, few bits, nearest, promotion at the end and before it, groups larger than K.
SPELLED = ["e5m10n", "e8m23n", "e4m3z", "e8m7z", "g4f3e5m4n", "g8f7e8m10zp16", "g3f20e8m23np9", "g64f11e6m6z"]


def recorded(accumulator):
    """(kind, K, a, b, y) of every product that was recorded for the accumulator."""
    rule = resolve_accumulator(accumulator)
    names = [f.name for f in rule.formats]
    for key in RECORDED.files:
        name, kind, k, last = key.split("|")
        if last == "y" and name == accumulator:
            of = f"{names[0]} x {names[1]}|{kind}|{k}"
            a, b = (
                torch.from_numpy(RECORDED[f"{of}|{side}"]).view(DTYPES[format])
                for side, format in zip("ab", names, strict=True)
            )
            a, b = (x.float() if x.dtype.itemsize == 1 else x for x in (a, b))
            yield kind, k, a, b.t(), torch.from_numpy(RECORDED[key]).view(torch.float32)


@pytest.mark.parametrize("accumulator", sorted({key.split("|")[0] for key in RECORDED.files if key[-1] == "y"}))
@pytest.mark.parametrize("backend", [*BACKENDS, pytest.param("gpu", marks=pytest.mark.gpu)])
def test_every_bit_of_an_h100(accumulator, backend):
    kinds = set()
    for kind, _, a, b, y in recorded(accumulator):
        kinds.add(kind)
        if backend == "gpu":
            got = ag.matmul(a.cuda(), b.cuda(), accumulator).cpu()
        else:
            got = BACKENDS[backend](a, b, accumulator)
        assert_same_bits(got, y)
        nan = got.view(torch.int32)[got.isnan()]
        assert (nan == 0x7FFFFFFF).all()  # the very NaN
    assert kinds == set(KINDS)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_every_bit_of_this_tensor_core(kind):
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("accumulators are verified on Hopper")
    one = torch.ones((), device="cuda")
    for m, k, n in ((16, 32, 16), (64, 528, 48), (256, 1024, 128)):
        for ta, tb in (("E4M3", "E4M3"), ("E4M3", "E5M2"), ("E5M2", "E4M3")):
            a, b = make(kind, m, k, DTYPES[ta], 0).cuda(), make(kind, n, k, DTYPES[tb], 1).cuda().t()
            for fast, name in ((True, "HOPPER_FP8_FAST"), (False, "HOPPER_FP8")):
                got = ag.matmul(a.float(), b.float(), f"{name}({ta},{tb})")
                for dtype in (torch.float32, torch.bfloat16):
                    want = torch._scaled_mm(a, b, one, one, out_dtype=dtype, use_fast_accum=fast)
                    assert_same_bits(got.to(dtype), want)
        for name in ("BF16", "FP16"):
            a, b = make(kind, m, k, DTYPES[name], 0).cuda(), make(kind, n, k, DTYPES[name], 1).cuda().t()
            want = torch.mm(a, b, out_dtype=torch.float32)
            assert_same_bits(ag.matmul(a, b, f"HOPPER_{name}"), want)


def exponent(x, least):
    """floor(log2 |x|) of a rational number, at least that."""
    e = (
        x.numerator.bit_length() - x.denominator.bit_length()
        if x > 0
        else (-x.numerator).bit_length() - x.denominator.bit_length()
    )
    while abs(x) >= Fraction(2) ** (e + 1):
        e += 1
    while abs(x) < Fraction(2) ** e:
        e -= 1
    return max(e, least)


def truncated(x, quantum):
    return int(x / quantum) * quantum  # int() truncates toward zero


def rounded(x, quantum):
    return round(x / quantum) * quantum  # round() of a Fraction: ties to even


def kept(x, rule):
    if x == 0 or not isinstance(x, Fraction):
        return x
    quantum = Fraction(2) ** (exponent(x, rule.min_exponent) - rule.mantissa_bits)
    x = (truncated if rule.is_truncated else rounded)(x, quantum)
    return x if abs(x) < Fraction(2) ** 2 ** (rule.exponent_bits - 1) else float("inf" if x > 0 else "-inf")


def dot(a, b, rule, of_a=None, of_b=None):
    """One dot product of finite numbers by the rule, in exact rationals, as the float32 that it is."""
    least = [-126 if f is None else f.min_exponent for f in rule.formats]
    total, sum_ = np.float32(0), Fraction(0)
    for start in range(0, len(a), rule.group):
        terms = []
        for i in range(start, min(start + rule.group, len(a))):
            p, e = Fraction(a[i]) * Fraction(b[i]), None
            if p:
                e = exponent(Fraction(a[i]), least[0]) + exponent(Fraction(b[i]), least[1])
            if of_a is not None:
                scales = [Fraction(of_a[i // rule.scaled]), Fraction(of_b[i // rule.scaled])]
                p *= scales[0] * scales[1]
                of_scales = sum(exponent(s, rule.scale_format.min_exponent) for s in scales if s)
                e = None if e is None or not p else of_scales + (0 if rule.sums_block else e)
            if rule.sums_block and i % rule.scaled:
                terms[-1] = (terms[-1][0] + p, terms[-1][1] if e is None else e)
            else:
                terms.append((p, e))
        if isinstance(sum_, float):  # infinite
            pass
        elif rule.fraction_bits is None:
            sum_ = kept(sum_ + terms[0][0], rule)
        else:
            terms = [(p, e) for p, e in terms if p] + ([(sum_, exponent(sum_, rule.min_exponent))] if sum_ else [])
            largest = max([e for _, e in terms], default=-133)
            quantum = Fraction(2) ** (max(largest, -133) - rule.fraction_bits)
            sum_ = kept(sum((truncated(p, quantum) for p, _ in terms), Fraction(0)), rule)
        if rule.promotion and (start + rule.group) % rule.promotion == 0:
            total, sum_ = total + np.float32(float(sum_)), Fraction(0)
    return total + np.float32(float(sum_)) if rule.promotion else np.float32(float(sum_))


def matrices(rule, rows, k, columns, generator):
    """Operands on the grid of the rule's formats, with zeros, far exponents and exact cancellations."""
    pair = []
    for f, shape in zip(rule.formats, ((rows, k), (k, columns)), strict=True):
        x = torch.randn(shape, generator=generator)
        x = x * torch.exp2(torch.randint(-12, 5, shape, generator=generator).float())
        x = torch.where(torch.rand(shape, generator=generator) < 0.1, 0, x)
        pair.append(x if f is None else quantize(x, f, saturation="finite"))
    half = k // 2
    pair[0][:, half : 2 * half] = -pair[0][:, :half]
    pair[1][half : 2 * half] = torch.where(torch.rand(half, columns, generator=generator) < 0.5, 1, 0) * pair[1][:half]
    return pair


@pytest.mark.parametrize("accumulator", [*UNSCALED, *SPELLED])
def test_the_rule_in_exact_rationals(accumulator, device):
    rule, generator = resolve_accumulator(accumulator), torch.Generator().manual_seed(0)
    for k in (1, 5, 40):
        a, b = matrices(rule, 4, k, 5, generator)
        want = torch.tensor([[dot(row.tolist(), column.tolist(), rule) for column in b.T] for row in a])
        for name, backend in BACKENDS.items():
            got = backend(a.to(device), b.to(device), accumulator).cpu()
            if rule.fraction_bits is None:
                got = got + 0.0  # rationals have no -0
            assert_same_bits(got, want), name


@pytest.mark.parametrize("accumulator", ["BLACKWELL_MXFP8", "BLACKWELL_NVFP4", "g8f9e8m12zs32(E4M3,E5M2)"])
def test_scales_of_blocks_in_exact_rationals(accumulator, device):
    rule, generator = resolve_accumulator(accumulator), torch.Generator().manual_seed(1)
    for k in (rule.scaled, 3 * rule.group, rule.group + 2 * rule.scaled - 3):
        a, b = matrices(rule, 3, k, 4, generator)
        blocks = -(-k // rule.scaled)
        scales = torch.exp2(torch.randn(3 + 4, blocks, generator=generator) * 3)
        scales = quantize(scales, rule.scale_format, saturation="finite")
        of_a, of_b = scales[:3], scales[3:].T
        want = [
            [dot(a[i].tolist(), b[:, j].tolist(), rule, of_a[i].tolist(), of_b[:, j].tolist()) for j in range(4)]
            for i in range(3)
        ]
        for backend in BACKENDS.values():
            arguments = a.to(device), b.to(device), accumulator, of_a.to(device), of_b.to(device)
            assert_same_bits(backend(*arguments), torch.tensor(want))


@pytest.mark.parametrize("accumulator", ["HOPPER_FP8", "HOPPER_FP8_FAST", "HOPPER_BF16", "e5m10n", "g8f9e8m12zs32"])
@pytest.mark.parametrize("target", ["avx512", "avx2", "baseline"])
def test_targets(accumulator, target):
    """Every instruction set gives the bits of the formula, for tiles that are not full and for batches."""
    if cpu.backend() == "aten" or not cpu.select(cpu._native, target):
        pytest.skip(f"{target} is not in this machine or not built")
    try:
        rule = resolve_accumulator(accumulator)
        for shape in ((1, 1, 1), (33, 70, 17), (40, 129, 50), (3, 0, 2)):
            rows, k, columns = shape
            a, b = matrices(rule, 2 * rows, k, columns, torch.Generator().manual_seed(2))
            a, b = a.view(2, rows, k), torch.stack([b, b.flip(0)])
            scales = ()
            if rule.scaled:
                blocks = -(-k // rule.scaled)
                scales = torch.full((2, rows, blocks), 0.5), torch.full((2, blocks, columns), 4.0)
            assert_same_bits(ag.matmul(a, b, accumulator, *scales), aten.KERNELS["matmul"](a, b, accumulator, *scales))
    finally:
        cpu.select(cpu._native, None)


def test_wide_accumulators_are_exact():
    """With room for all bits the result is the exact sum, rounded once."""
    a, b = (make("normal", 8, 64, torch.float8_e4m3fn, side).float() for side in (0, 1))
    exact = (a.double() @ b.double().T).float()
    assert_same_bits(ag.matmul(a, b.T, "g64f40e8m23n"), exact)
    assert not torch.equal(ag.matmul(a, b.T, "HOPPER_FP8_FAST"), exact)


@pytest.mark.parametrize("accumulator", UNSCALED)
def test_invariances(accumulator):
    """Products of a group come in any order, and a transposed product is the product transposed."""
    rule = resolve_accumulator(accumulator)
    a, b = matrices(rule, 6, 4 * rule.group, 7, torch.Generator().manual_seed(3))
    y = ag.matmul(a, b, accumulator)
    order = torch.cat([torch.randperm(rule.group) + i * rule.group for i in range(4)])
    assert_same_bits(ag.matmul(a[:, order], b[order], accumulator), y)
    assert_same_bits(ag.matmul(b.T, a.T, accumulator), y.T)
    assert_same_bits(ag.matmul(a.T.contiguous().T, b[:, ::2], accumulator), y[:, ::2])  # any strides


def test_chains_round_once():
    """(1 + 2^-10) + (2^-11 - 2^-57): float64 makes it a tie, which float16 would round to even, up."""
    a, b = torch.tensor([[1 + 2.0**-10, (1 + 2.0**-23) * 2.0**-11]]), torch.tensor([[1.0], [1 - 2.0**-23]])
    for backend in BACKENDS.values():
        assert_same_bits(backend(a, b, "e5m10n"), torch.tensor([[1 + 2.0**-10]]))


@pytest.mark.parametrize(
    ("accumulator", "a", "b", "want"),
    [
        ("e4m1n", 448.0, 448.0, torch.inf),
        ("g3f13e8m1z(E5M2,E5M2)", torch.inf, 1.0, torch.inf),
        ("g3f13e8m1z(E5M2,E5M2)", -torch.inf, 1.0, -torch.inf),
        ("g3f13e8m1z(e5m2b31f,e5m2b31f)", 2.0**-32, 2.0**-32, 1.5 * 2.0**-63),
    ],
)
def test_ends_of_the_range_with_one_mantissa_bit(accumulator, a, b, want, device):
    """What is kept has no quantum above its largest value's, and one below that of the least product."""
    for backend in BACKENDS.values():
        got = backend(torch.full((1, 3), a, device=device), torch.full((3, 1), b, device=device), accumulator)
        assert_same_bits(got.cpu(), torch.tensor([[want]]))


def test_fields_are_those_of_the_name():
    fast = ACCUMULATORS["HOPPER_FP8_FAST"]
    assert replace(fast, name="g32f13e8m13z(E4M3,E4M3)").promotion is None
    with pytest.raises(ValueError, match="fields of accumulator 'HOPPER_FP8_FAST' must be those of its name"):
        replace(fast, promotion=128)


def test_gradients_are_products_by_the_same_accumulator():
    a, b = quantize(torch.randn(5, 70), "E5M2").requires_grad_(), quantize(torch.randn(70, 6), "E4M3").requires_grad_()
    accumulator = "HOPPER_FP8_FAST(E5M2,E4M3)"
    y = ag.matmul(a, b, accumulator)
    g = torch.randn_like(y)
    y.backward(g)
    assert_same_bits(a.grad, ag.matmul(g, b.detach().T, "HOPPER_FP8_FAST(any,E4M3)"))
    assert_same_bits(b.grad, ag.matmul(a.detach().T, g, "HOPPER_FP8_FAST(E5M2,any)"))
    half = a.detach().bfloat16().requires_grad_()
    ag.matmul(half, b.detach().bfloat16(), accumulator).backward(g)
    assert_same_bits(half.grad, a.grad.bfloat16())


def test_gradients_with_scales_of_blocks():
    a, b = quantize(torch.randn(3, 64), "E4M3").requires_grad_(), quantize(torch.randn(64, 4), "E4M3")
    of_a, of_b = torch.tensor([[1.0, 2.0]] * 3), torch.tensor([[4.0] * 4, [0.5] * 4])
    ag.matmul(a, b, "BLACKWELL_MXFP8", of_a, of_b).backward(torch.ones(3, 4))
    want = ag.matmul(torch.ones(3, 4), (b * of_b.repeat_interleave(32, 0)).T, "BLACKWELL_FP8(any,any)")
    assert_same_bits(a.grad, want * of_a.repeat_interleave(32, 1))
    product = ag.matmul(a.detach(), b, "BLACKWELL_MXFP8", of_a, of_b.requires_grad_())
    product.sum().backward()
    assert product.requires_grad and of_b.grad is None, "as every scale that requires a gradient"


def test_transforms():
    a, b = quantize(torch.randn(3, 4, 40), "E4M3"), quantize(torch.randn(40, 5), "E4M3")

    def f(a, b):
        return ag.matmul(a, b, "HOPPER_FP8")

    want = torch.stack([f(x, b) for x in a])
    assert_same_bits(vmap(f, (0, None))(a, b), want)
    assert_same_bits(vmap(f, (None, 0))(a[0], torch.stack([b, b])), torch.stack([want[0]] * 2))
    assert_same_bits(vmap(f, (1, None))(a.movedim(0, 1), b), want)
    loss = lambda a, b: f(a, b).sum()  # noqa: E731
    expected = torch.stack([grad(loss)(x, b) for x in a])
    assert_same_bits(vmap(grad(loss), (0, None))(a, b), expected)
    tangent = torch.randn_like(b)
    assert_same_bits(jvp(lambda b: f(a[0], b), (b,), (tangent,))[1], ag.matmul(a[0], tangent, "HOPPER_FP8(E4M3,any)"))


@pytest.mark.compiles
def test_one_node_in_compiled_and_exported_code():
    a, b = quantize(torch.randn(4, 40), "E4M3").requires_grad_(), quantize(torch.randn(40, 5), "E4M3")

    def f(a, b):
        return ag.matmul(a, b, "HOPPER_FP8_FAST") * 2

    want = f(a, b)
    of_a = torch.autograd.grad(want.sum(), a)
    got = torch.compile(f, fullgraph=True)(a, b)
    assert_same_bits(got, want)
    assert_same_bits(torch.autograd.grad(got.sum(), a)[0], of_a[0])

    class Product(torch.nn.Module):
        def forward(self, a, b):
            return f(a, b)

    rows = torch.export.Dim("rows")
    program = torch.export.export(Product(), (a.detach(), b), dynamic_shapes=({0: rows}, None))
    assert any(node.target is ag.matmul.default for node in program.graph.nodes)
    assert_same_bits(program.module()(a.detach()[:3], b), want[:3])
    with pytest.raises(ValueError, match="a must hold values of E4M3"):
        torch.compile(f, fullgraph=True)(a.detach() + 0.001, b)


BAD = [
    (ValueError, "unknown accumulator 'HOPPER'", (4, 8), (8, 4), "HOPPER"),
    (ValueError, "unknown accumulator 'g8e8m23z'", (4, 8), (8, 4), "g8e8m23z"),
    (ValueError, "mantissa bits of accumulator 'e8m24n' must be 1 to 23, got 24", (4, 8), (8, 4), "e8m24n"),
    (ValueError, "fraction bits of accumulator .* must be 1 to 42, got 45", (4, 8), (8, 4), "g32f45e8m23z"),
    (ValueError, "promotion of accumulator .* must be a multiple of 32, got 100", (4, 8), (8, 4), "g32f13e8m13zp100"),
    (
        ValueError,
        "16 products .* to 53 bits or less, got FP16 and FP16, which take 92",
        (4, 8),
        (8, 4),
        "g64f35e8m23zx16(FP16,FP16)",
    ),
    (ValueError, "unknown format 'E9M9'", (4, 8), (8, 4), "HOPPER_FP8(E9M9,E4M3)"),
    (ValueError, r"a and b must have the shapes \[.., M, K\] and \[.., K, N\]", (4, 8), (7, 4), "HOPPER_BF16"),
    (ValueError, r"a and b must have the shapes \[.., M, K\] and \[.., K, N\]", (8,), (8, 4), "HOPPER_BF16"),
    (ValueError, r"a and b must have the shapes \[.., M, K\] and \[.., K, N\]", (2, 4, 8), (3, 8, 4), "e5m10n"),
    (
        ValueError,
        "'BLACKWELL_MXFP8' needs a scale for each 32 products, got a_scale=None",
        (4, 8),
        (8, 4),
        "BLACKWELL_MXFP8",
    ),
]


@pytest.mark.parametrize(("error", "message", "a", "b", "accumulator"), BAD)
def test_bad_arguments(error, message, a, b, accumulator):
    for device in ("cpu", "meta"):
        with pytest.raises(error, match=message):
            ag.matmul(torch.ones(a, device=device), torch.ones(b, device=device), accumulator)


def test_bad_tensors():
    a, b = torch.ones(4, 32), torch.ones(32, 4)
    with pytest.raises(TypeError, match=r"a must have a dtype of float16, bfloat16, float32, got torch\.int32"):
        ag.matmul(a.int(), b, "HOPPER_FP8")
    with pytest.raises(TypeError, match=r"b must have a dtype of float16, bfloat16, float32, got torch\.float64"):
        ag.matmul(a, b.double(), "HOPPER_FP8")
    with pytest.raises(ValueError, match=r"b must hold values of E4M3 for accumulator 'HOPPER_FP8', got 1.0625"):
        ag.matmul(a, b * 1.0625, "HOPPER_FP8")
    with pytest.raises(ValueError, match=r"a must hold values of E4M3 for accumulator 'HOPPER_FP8', got 512.0"):
        ag.matmul(a * 512, b, "HOPPER_FP8")
    with pytest.raises(ValueError, match=r"a_scale must have the shape \(4, 1\), got \(1, 4\)"):
        ag.matmul(a, b, "BLACKWELL_MXFP8", torch.ones(1, 4), torch.ones(1, 4))
    with pytest.raises(ValueError, match=r"b_scale must hold values of E8M0 .* got 3.0$"):
        ag.matmul(a, b, "BLACKWELL_MXFP8", torch.ones(4, 1), torch.full((1, 4), 3.0))
    with pytest.raises(ValueError, match="'HOPPER_FP8' takes no scales, got a_scale=a tensor"):
        ag.matmul(a, b, "HOPPER_FP8", torch.ones(4, 1), torch.ones(1, 4))
    with pytest.raises(TypeError, match="b must be a tensor, got list"):
        matmul(a, [1.0], "HOPPER_FP8")
    with pytest.raises(TypeError, match="accumulator must be a string, got 3"):
        resolve_accumulator(3)


def test_names_and_spellings():
    """A name is its spelling; formats behind it replace its own; letters may be of either case."""
    for name, spelling in NAMED_ACCUMULATORS.items():
        rule, spelled = resolve_accumulator(name), resolve_accumulator(spelling)
        assert (rule.group, rule.fraction_bits, rule.promotion) == (
            spelled.group,
            spelled.fraction_bits,
            spelled.promotion,
        )
        assert rule.formats == spelled.formats
    rule = resolve_accumulator("hopper_fp8(e5m2,any)")
    assert (rule.promotion, rule.formats) == (128, (resolve("E5M2"), None))
    assert resolve_accumulator("HOPPER_FP8").with_formats("E5M2", None).formats == rule.formats


def test_any_format_in_either_case_of_letters():
    assert resolve_accumulator("hopper_fp8(ANY,Any)").formats == (None, None)
