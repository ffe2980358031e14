"""Operands that break an accumulator: distributions of every kind, in the dtypes that tensor cores take."""

import torch

E4, E5 = torch.float8_e4m3fn, torch.float8_e5m2


def from_bits(bits, dtype):
    return bits.to(torch.uint8).view(dtype) if dtype.itemsize == 1 else bits.to(torch.int16).view(dtype)


def where(share, value, x, shape):
    return torch.where(torch.rand(shape) < share, value, x.float())


def _bits(shape, dtype, side):
    x = from_bits(torch.randint(0, 1 << 8 * dtype.itemsize, shape), dtype).float()
    return torch.where(x.isfinite(), x, 0.0)


def _specials(shape, dtype, side):
    x = where(0.05, 0.0, torch.randn(shape), shape)
    if dtype != E4:
        x = where(0.15 / shape[1], torch.inf, where(0.15 / shape[1], -torch.inf, x, shape), shape)
    return where(0.1 / shape[1], torch.nan, x, shape)


def _subnormals(shape, dtype, side):
    if dtype == torch.bfloat16 and side:
        return torch.randn(shape) * 2.0**20
    count = {E4: 8, E5: 4, torch.bfloat16: 128, torch.float16: 1024}[dtype]
    sign = (torch.rand(shape) < 0.5) * (1 << 8 * dtype.itemsize - 1)
    return from_bits(torch.randint(0, count, shape) + sign, dtype)


def _range(shape, dtype, side):
    span = {E4: 6, E5: 12, torch.bfloat16: 50, torch.float16: 12}[dtype]
    return torch.randn(shape) * torch.exp2(torch.randint(-span, span, shape).float())


def _cancel(shape, dtype, side):
    x, half = (torch.randn(shape) * 8).to(dtype).float(), shape[1] // 2
    x[:, half : 2 * half] = x[:, :half].flip(1) * (1 if side else -1)
    return torch.where(torch.rand(shape) < 0.1, x * 0.01, x)


def _zeros_beside_huge(shape, dtype, side):
    small, huge = {
        E4: (2.0**-6, 448.0),
        E5: (2.0**-14, 57344.0),
        torch.bfloat16: (2.0**-20, 2.0**120),
        torch.float16: (2.0**-10, 60000.0),
    }[dtype]
    x = torch.randn(shape) * small
    x[:, ::5] = huge if side else 0.0
    return x


def _times(e4, e5, bfloat16, float16):
    factors = {E4: e4, E5: e5, torch.bfloat16: bfloat16, torch.float16: float16}
    return lambda shape, dtype, side: torch.randn(shape) * factors[dtype]


_KINDS = {
    "normal": lambda shape, dtype, side: torch.randn(shape),
    "positive": lambda shape, dtype, side: torch.randn(shape).abs(),
    "all bits": _bits,
    "infinities and NaN": _specials,
    "subnormals": _subnormals,
    "zeros": lambda shape, dtype, side: where(0.5, 0.0, torch.randn(shape), shape),
    "wide range": _range,
    "cancellation": _cancel,
    "small integers": lambda shape, dtype, side: torch.randint(-8, 9, shape),
    "zeros beside huge": _zeros_beside_huge,
    "overflow": _times(200.0, 20000.0, 2.0**62, 2.0**14),
    "tiny": _times(2.0**-8, 2.0**-15, 2.0**-66, 2.0**-20),
    "tinier": _times(2.0**-9, 2.0**-16, 2.0**-72, 2.0**-22),
    "negative zeros": lambda shape, dtype, side: where(0.9, -0.0, torch.randint(0, 2, shape) / 4 - 0.125, shape),
}
KINDS = list(_KINDS)


def make(kind, rows, columns, dtype, side):
    """An operand [rows, columns] of a kind; side 1 is the second one of a product."""
    return _KINDS[kind]((rows, columns), dtype, side).to(dtype)
