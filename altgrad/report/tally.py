"""What a candidate does to a matrix, counted part by part in a processor's cache and added up.

The numbers are those of :func:`altgrad.quantization.quantization_stats` and ``sqnr`` of the whole matrix: counts to the
last one, sums of squares in float64 in another order.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor

from ops_registry.arithmetic import divide

from ..quantization.formats import FP8Format
from ..quantization.ops import encode, quantize
from ..quantization.scaling import scaler
from .candidates import Candidate
from .results import Score

PART = 1 << 18  # elements of a part
_CANNOT_CLIP = (None, "ceil", "rceil")
ScaleFunction = Callable[[Tensor, tuple[int, ...]], Tensor]
# dtype -> an integer dtype of its width, the bits of its mantissa, the bias of its exponent
_FIELDS = {
    torch.float16: (torch.int16, 10, 15),
    torch.bfloat16: (torch.int16, 7, 127),
    torch.float32: (torch.int32, 23, 127),
    torch.float64: (torch.int64, 52, 1023),
}


def matrix(x: Tensor) -> Tensor:
    """x as a product sees it, [rows, contraction]: a convolution's weight by output channels, a vector as one row."""
    x = x.detach()
    return x.flatten(1) if x.ndim > 1 else x.reshape(1, -1)


@dataclass
class Signal:
    """What is counted of a matrix itself; exponents counts the values of each octave, from 2^-bias on."""

    count: int = 0
    zeros: int = 0
    nan: int = 0
    infinite: int = 0
    energy: float = 0.0
    exponents: Tensor | None = None
    bias: int = 0

    def add(self, x: Tensor) -> None:
        """Counts a part of the matrix."""
        self.count += x.numel()
        self.zeros += x.numel() - int(x.count_nonzero())
        energy = _energy(x.double())
        self.energy += energy
        if not math.isfinite(energy):
            self.nan += int(x.isnan().sum())
            self.infinite += int(x.isinf().sum())
        integer, mantissa_bits, self.bias = _FIELDS[x.dtype]
        fields = (x.contiguous().view(integer) >> mantissa_bits) & (2 * self.bias + 1)
        counts = fields.flatten().bincount(minlength=2 * self.bias + 2)
        self.exponents = counts if self.exponents is None else self.exponents + counts

    def __add__(self, other: "Signal") -> "Signal":
        assert self.exponents is not None and other.exponents is not None
        return Signal(
            self.count + other.count,
            self.zeros + other.zeros,
            self.nan + other.nan,
            self.infinite + other.infinite,
            self.energy + other.energy,
            self.exponents + other.exponents,
            self.bias,
        )

    def octaves(self) -> dict[int, int]:
        """How many values lie in [2^k, 2^(k + 1)), by k; subnormals of the dtype in the octave below its normals."""
        if self.exponents is None:
            return {}
        counts = self.exponents[:-1].clone()  # the last are infinities and NaN
        counts[0] -= self.zeros
        return {int(k) - self.bias: int(counts[k]) for k in counts.nonzero().flatten()}


@dataclass
class Tally:
    """What is counted of a candidate on a matrix."""

    codes: Tensor
    clipped: int = 0
    error: float = 0.0
    sensitivity: float | None = None
    smallest: float = math.inf
    largest: float = 0.0
    zero_codes: list[int] = field(default_factory=list)

    def __add__(self, other: "Tally") -> "Tally":
        return Tally(
            self.codes + other.codes,
            self.clipped + other.clipped,
            self.error + other.error,
            self.sensitivity,
            min(self.smallest, other.smallest),
            max(self.largest, other.largest),
            self.zero_codes,
        )

    def score(self, signal: Signal, bits: float) -> Score:
        n = signal.count
        used = int(self.codes.count_nonzero())
        return Score(
            sqnr=_decibels(signal.energy, self.error),
            clipped=self.clipped / n,
            flushed=(int(self.codes[self.zero_codes].sum()) - signal.zeros) / n,
            used_bits=math.log2(used),
            scale_spread=math.log2(self.largest / self.smallest) if self.smallest <= self.largest else math.nan,
            bits=bits,
            sensitivity=self.sensitivity,
        )


def empty_tally(candidate: Candidate) -> Tally:
    f = candidate.format
    return Tally(torch.zeros(1 << f.bits, dtype=torch.int64), zero_codes=_zero_codes(f))


@lru_cache
def _zero_codes(f: FP8Format) -> list[int]:
    return [code for code in range(1 << f.bits) if f.to_real(code) == 0]


def scale_function(x: Tensor, candidate: Candidate) -> ScaleFunction:
    """The function (blocks, dims) -> scale for parts of a matrix x; what all of x decides is found here."""
    scale_of = scaler(x, candidate.format, **candidate.keywords)
    if candidate.rule.per != "tensor":
        return scale_of
    scale = candidate.granularity.apply(scale_of, x).reshape(()) if x.numel() else x.new_ones(())
    return lambda blocks, dims: scale


def parts(x: Tensor, candidates: list[Candidate]) -> Iterator[Tensor]:
    """Whole rows of a matrix, about PART elements at a time; blocks that span rows stay whole."""
    heights = [c.rule.block[0] for c in candidates if not isinstance(c.rule.per, str)]
    step = math.lcm(*heights) if heights else 1
    rows = max(PART // max(x.shape[1], 1) // step, 1) * step
    for start in range(0, x.shape[0], rows):
        yield x[start : start + rows].contiguous()


def add(tally: Tally, x: Tensor, candidate: Candidate, scale_of: ScaleFunction, weight: Tensor | None = None) -> None:
    """Counts a part of a matrix; weight, of x's shape, adds ``sum(weight * error^2)`` to the sensitivity."""
    f = candidate.format

    def visit(blocks: Tensor, dims: tuple[int, ...]) -> Tensor:
        scale = scale_of(blocks, dims)
        codes = encode(blocks, f, scale)
        tally.codes += codes.flatten().bincount(minlength=len(tally.codes))
        if candidate.rule.power_of_two not in _CANNOT_CLIP or candidate.rule.scale_format is not None:
            tally.clipped += _clipped(blocks, f, scale)
        least, most = (float(end) for end in torch.aminmax(scale))
        tally.smallest = min(tally.smallest, least)
        tally.largest = max(tally.largest, most)
        return quantize(blocks, f, scale)

    error = x.double() - candidate.granularity.apply(visit, x)
    tally.error += _energy(error)
    if weight is not None:
        tally.sensitivity = (tally.sensitivity or 0.0) + float((error.square_() * weight).sum())


def _clipped(x: Tensor, f: FP8Format, scale: Tensor) -> int:
    """How many |x / scale| round to more than the largest value; as in quantization_stats, a tie to the even code."""
    limit = (f.max_representable_value + f.overflow_value) / 2
    q = divide(x, scale).abs_()
    return int(((q >= limit) if f.max_code % 2 else (q > limit)).count_nonzero())


def _energy(x: Tensor) -> float:
    flat = x.flatten()
    return float(flat.dot(flat))


def _decibels(signal: float, error: float) -> float:
    if error == 0:
        return math.inf if signal > 0 else math.nan
    ratio = signal / error
    return -math.inf if ratio == 0 else 10 * math.log10(ratio) if ratio > 0 else math.nan
