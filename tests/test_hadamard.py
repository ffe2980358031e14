"""The Hadamard transform inside operators: the bits of its definition, then those of the operator without it.

Tests named ``interpreted`` run the Triton kernels on the CPU, in the process of test_interpreter.py.
"""

import numpy as np
import pytest
import torch
from conftest import DTYPES, assert_same_bits
from interpreter import interpreted

from ops_registry import aten, blocks, cpu, cuda
from ops_registry.arithmetic import compute_dtype
from ops_registry.hadamard import transformed

SIGNS = np.float32([1, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1])
NEAREST = "propagate", "nearest_ties_to_even"
# shape, block, whether the columns lie side by side: down columns, along rows, in the middle, by another path
CASES = [
    ((24, 64), [1, 16], True),
    ((24, 64), [1, 16], False),
    ((70, 48), [1, 16], True),
    ((3, 80), [1, 32], False),
    ((5, 96), [1, 32], True),
    ((4, 64), [1, -1], False),
    ((2, 24, 64), [1, 1, 16], True),
    ((2, 24, 64), [1, 1, 16], False),
    ((1, 32), [1, 16], True),
    ((64, 32), [16, 16], True),
    ((64, 32), [16, 16], False),
    ((6, 32), [1, 8], False),
    ((32,), [16], False),
    ((0, 32), [1, 16], False),
    ((40, 144), [1, 16], False),
    ((40, 144), [1, 16], True),
]
cases = pytest.mark.parametrize(("shape", "block", "is_turned"), CASES, ids=str)


def by_steps(x):
    """The definition: signs, then for 1, 2, 4 and 8 the sum and the difference of elements so far apart, then a 4th."""
    y = x.to(compute_dtype(x.dtype)).numpy().reshape(-1, 16) * SIGNS
    with np.errstate(over="ignore", invalid="ignore"):
        for apart in (1, 2, 4, 8):
            y = np.stack(
                [y[:, i - apart] - y[:, i] if i & apart else y[:, i] + y[:, i + apart] for i in range(16)], axis=1
            )
    return torch.from_numpy(y / y.dtype.type(4)).view(x.shape)


def sample(shape, is_turned, dtype=torch.bfloat16):
    """Magnitudes so far apart that sums are rounded; a row with an infinity and one with NaN."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator) * 2.0 ** torch.randint(-12, 12, shape, generator=generator)
    if x.ndim > 1 and x.shape[-2] > 4:
        x[..., 3, 0], x[..., 4, 5] = torch.inf, torch.nan
    x = x.to(dtype)
    return x.mT.contiguous().mT if is_turned else x


def check_operands(op, stochastic, shape, block, is_turned, device):
    x = sample(shape, is_turned)
    y = by_steps(x)
    for scale, options in (
        (None, ("rceil", None, 1.0)),
        (torch.tensor(0.37), (None, "E4M3", 1.0625)),
    ):
        for dtype in (None, torch.float32):
            want = blocks.quantize_operand(*(y, scale, "E2M1", *NEAREST, block, *options), dtype or torch.bfloat16)
            on = None if scale is None else scale.to(device)
            got = op(x.to(device), on, "E2M1", *NEAREST, block, *options, dtype, True)
            assert_same_bits(got, want, y)
            assert got.stride() == torch.empty_like(x).stride()
        seed = torch.tensor(5)
        want = blocks.quantize_operand(
            *(y, scale, "E2M1", "propagate", "stochastic", block, *options, torch.bfloat16), random_bits=seed
        )
        got = stochastic(
            *(x.to(device), on, seed.to(device), "E2M1", "propagate", block, *options, torch.bfloat16, True)
        )
        assert_same_bits(got, want, y)


def check_amax(op, shape, is_turned, device):
    x = sample(shape, is_turned)
    for part in (x, x[..., -1:, :]) if x.ndim > 1 else (x,):  # of all, NaN and none
        dims = list(range(part.ndim))
        assert_same_bits(op(part.to(device), dims, True), aten.amax(by_steps(part), dims))
        assert_same_bits(op(part.to(device), dims), aten.amax(part, dims))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("is_turned", [False, True])
def test_definition(dtype, is_turned):
    x = sample((7, 64), is_turned, dtype)
    got = transformed(x)
    assert_same_bits(got, by_steps(x), x)
    assert got.stride() == x.stride()


@pytest.mark.skipif(cpu.backend() == "aten", reason="needs the C kernels")
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@cases
def test_c_kernel(shape, block, is_turned, dtype):
    x = sample(shape, is_turned, dtype)
    for target in ("avx512", "avx2", "baseline"):
        if cpu.select(cpu._native, target) is not None:
            try:
                got = cpu.transform(x)
            finally:
                cpu.select(cpu._native, cpu.backend())
            assert_same_bits(got, by_steps(x), x)
            assert got.stride() == torch.empty_like(x).stride()


@pytest.mark.skipif(cpu.backend() == "aten", reason="needs the C kernels")
@pytest.mark.parametrize("is_turned", [False, True])
def test_threads_of_the_c_kernel(is_turned):
    x, threads = sample((200, 1040), is_turned), torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert_same_bits(cpu.transform(x), by_steps(x), x)
    finally:
        torch.set_num_threads(threads)


@pytest.fixture(params=["formula", "cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def implementation(request):
    if request.param == "formula":
        return aten.KERNELS, "cpu"
    return {name: getattr(torch.ops.altgrad, name) for name in aten.KERNELS}, request.param


@cases
def test_operands(shape, block, is_turned, implementation):
    ops, device = implementation
    check_operands(ops["quantize_operand"], ops["quantize_operand_stochastic"], shape, block, is_turned, device)


@cases
def test_amax(shape, block, is_turned, implementation):
    ops, device = implementation
    check_amax(ops["amax"], shape, is_turned, device)


def test_amax_of_rows():
    x = sample((8, 32), False)
    assert_same_bits(torch.ops.altgrad.amax(x, [1], True), aten.amax(by_steps(x), [1]))


@interpreted
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@cases
def test_interpreted(shape, block, is_turned):
    kernels = cuda.KERNELS
    check_operands(kernels["quantize_operand"], kernels["quantize_operand_stochastic"], shape, block, is_turned, "cpu")
    check_amax(kernels["amax"], shape, is_turned, "cpu")


@pytest.mark.parametrize("shape", [(), (4, 15)], ids=str)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_bad_sizes(shape, device):
    x, message = torch.ones(shape, device=device), "x must have a multiple of 16 as its last size to be transformed"
    with pytest.raises(ValueError, match=message):
        torch.ops.altgrad.quantize_operand(
            x, None, "E4M3", *NEAREST, [1] * len(shape), "rceil", None, 1.0, torch.bfloat16, True
        )
    with pytest.raises(ValueError, match=message):
        torch.ops.altgrad.amax(x, [0], True)


@pytest.mark.compiles
def test_opcheck_and_compiled():
    x = sample((4, 32), True)  # no NaN: opcheck takes it for a difference
    args = x, None, "E2M1", *NEAREST, [1, 16], "rceil", None, 1.0, torch.bfloat16, True
    for op, arguments in ((torch.ops.altgrad.quantize_operand, args), (torch.ops.altgrad.amax, (x[:3], [0, 1], True))):
        torch.library.opcheck(op.default, arguments)
        assert_same_bits(torch.compile(op, fullgraph=True)(*arguments), op(*arguments))


def test_vmap():
    x = torch.randn(3, 8, 32)
    for f in (
        lambda x: torch.ops.altgrad.amax(x, [0, 1], True),
        lambda x: torch.ops.altgrad.quantize_operand(
            x, None, "E2M1", *NEAREST, [1, 16], "rceil", None, 1.0, torch.float32, True
        ),
    ):
        assert_same_bits(torch.vmap(f)(x), torch.stack([f(example) for example in x]))
