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
from ..quantization.granularity import Granularity, PerTensor
from ..quantization.magnitudes import amax
from ..quantization.ops import encode, quantize
from ..quantization.scaling import levels_of, rounded_scale
from .candidates import Candidate
from .results import Score

PART = 1 << 18  # elements of a part
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


@dataclass(frozen=True)
class Energy:
    """A sum of squares, as a number times 4^exponent: squares of float64 have not its range."""

    number: float = 0.0
    exponent: int = -1000

    def __add__(self, other: "Energy") -> "Energy":
        exponent = max(self.exponent, other.exponent)
        return Energy(sum(math.ldexp(e.number, 2 * (e.exponent - exponent)) for e in (self, other)), exponent)


@dataclass
class Signal:
    """What is counted of a matrix itself; exponents counts the values of each octave, from 2^-bias on."""

    count: int = 0
    zeros: int = 0
    nan: int = 0
    infinite: int = 0
    energy: Energy = Energy()
    exponents: Tensor | None = None
    bias: int = 0

    def add(self, x: Tensor, counts: Tensor | None = None) -> None:
        """Counts a part of the matrix, or values and how often each is there."""
        zeros, energy = _total(x == 0, counts), _energy(x.double(), x.dtype, counts)
        self.count += x.numel() if counts is None else int(counts.sum())
        self.zeros += zeros
        self.energy += energy
        if not math.isfinite(energy.number):
            self.nan += _total(x.isnan(), counts)
            self.infinite += _total(x.isinf(), counts)
        integer, mantissa_bits, self.bias = _FIELDS[x.dtype]
        fields = (x.contiguous().view(integer) >> mantissa_bits) & (2 * self.bias + 1)
        found = _histogram(fields, 2 * self.bias + 2, counts)
        self.exponents = found if self.exponents is None else self.exponents + found

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
    """What is counted of a candidate on a matrix.

    flushed: where no code is zero, else the codes say it, but for zeros whose scale is NaN. smallest: of the scales, 0
    where one is NaN.
    """

    codes: Tensor
    clipped: int = 0
    flushed: int = 0
    error: Energy = Energy()
    sensitivity: float | None = None
    smallest: float = math.inf
    largest: float = 0.0
    zero_codes: list[int] = field(default_factory=list)

    def __add__(self, other: "Tally") -> "Tally":
        return Tally(
            self.codes + other.codes,
            self.clipped + other.clipped,
            self.flushed + other.flushed,
            self.error + other.error,
            self.sensitivity,
            min(self.smallest, other.smallest),
            max(self.largest, other.largest),
            self.zero_codes,
        )

    def score(self, signal: Signal, bits: float) -> Score:
        n = signal.count
        used = int(self.codes.count_nonzero())
        flushed = self.flushed + (int(self.codes[self.zero_codes].sum()) - signal.zeros if self.zero_codes else 0)
        return Score(
            sqnr=_decibels(signal.energy, self.error),
            clipped=self.clipped / n,
            flushed=flushed / n,
            used_bits=math.log2(used),
            scale_spread=math.log2(self.largest / self.smallest) if self.smallest else math.nan,
            bits=bits,
            sensitivity=self.sensitivity,
        )


def empty_tally(candidate: Candidate) -> Tally:
    f = candidate.format
    return Tally(torch.zeros(1 << f.bits, dtype=torch.int64), zero_codes=_zero_codes(f))


@lru_cache
def _zero_codes(f: FP8Format) -> list[int]:
    return [code for code in (0, f.sign_code)[: 1 + f.is_signed] if f.to_real(code) == 0]


def largest_of(x: Tensor) -> Tensor:
    """The largest magnitude of x, all that the scales of a part take from the rest of x; with x's dimensions."""
    return PerTensor().apply(amax, x)


def scale_function(largest: Tensor, candidate: Candidate) -> ScaleFunction:
    """The function (blocks, dims) -> scale for parts of a matrix whose largest magnitude is given."""
    if candidate.rule.per == "tensor":
        return one_scale(largest, candidate)
    to_scale = _to_scale(largest, candidate)
    return lambda blocks, dims: to_scale(amax(blocks, dims))


def one_scale(largest: Tensor, candidate: Candidate) -> ScaleFunction:
    """The function that gives the scale of a group with this largest magnitude, whatever it is given."""
    scale = _to_scale(largest, candidate)(largest).reshape(())
    return lambda blocks, dims: scale


def _to_scale(largest: Tensor, candidate: Candidate) -> Callable[[Tensor], Tensor]:
    f, options = candidate.format, candidate.keywords
    return rounded_scale(largest, f, options["power_of_two"], levels_of(f, options))


def parts(x: Tensor, candidates: list[Candidate], size: int = PART) -> Iterator[Tensor]:
    """Whole rows of a matrix, about size elements at a time; blocks that span rows stay whole."""
    heights = [c.rule.block[0] for c in candidates if not isinstance(c.rule.per, str)]
    step = math.lcm(*heights) if heights else 1
    rows = max(size // max(x.shape[1], 1) // step, 1) * step
    for start in range(0, x.shape[0], rows):
        yield x[start : start + rows].contiguous()


def value_counts(x: Tensor, granularity: Granularity) -> dict[float, Tensor]:
    """How often each of all values of float16 or bfloat16 is there, in the order of their bits.

    For blocks and rows apart by the power of two at or below their largest magnitude, which is 0 for a block of zeros:
    all that the rule "floor" takes from them.
    """
    if isinstance(granularity, PerTensor):
        return {math.nan: _histogram(_bits(x), 1 << 16)}

    def exponents(blocks: Tensor, dims: tuple[int, ...]) -> Tensor:  # in float64 subnormals of float32 have one too
        return amax(blocks, dims).double().view(torch.int64) >> 52

    fields = granularity.apply(exponents, x, compact=True)
    found, index = fields.unique(return_inverse=True)
    keys = granularity.apply(lambda blocks, dims, i: (i << 16) | _bits(blocks), x, index.int())
    counts = _histogram(keys, len(found) << 16).view(-1, 1 << 16)
    return dict(zip((found << 52).view(torch.float64).tolist(), counts))


def _bits(x: Tensor) -> Tensor:
    return x.view(torch.int16).int() & 0xFFFF


def patterns(dtype: torch.dtype) -> Tensor:
    """All values of float16 or bfloat16 by their bits, as one row."""
    return torch.arange(1 << 16).to(torch.int16).view(dtype).unsqueeze(0)


def add(
    tally: Tally,
    x: Tensor,
    wide: Tensor,
    candidate: Candidate,
    scale_of: ScaleFunction,
    gradient: Tensor | None = None,
    counts: Tensor | None = None,
) -> None:
    """Counts a part of a matrix; wide is x in float64, made once for all candidates.

    gradient, of x's shape, adds ``sum((gradient * error)^2)`` to the sensitivity. With counts x has values, each once,
    and counts how often they are there; then one scale serves all of them.
    """
    f, granularity = candidate.format, candidate.granularity if counts is None else PerTensor()

    def visit(blocks: Tensor, dims: tuple[int, ...]) -> Tensor:
        scale = scale_of(blocks, dims)
        codes = encode(blocks, f, scale)  # torch counts no uint16
        tally.codes += _histogram(codes if f.bits <= 8 else codes.int(), len(tally.codes), counts).cpu()
        tally.clipped += _clipped(blocks, dims, f, scale, counts)
        least, most = (float(end) for end in torch.aminmax(scale.nan_to_num(0.0)))
        tally.smallest = min(tally.smallest, least)
        tally.largest = max(tally.largest, most)
        y = quantize(blocks, f, scale)
        if not f.has_zero:  # the smallest value times the scale may be
            tally.flushed += _total((y == 0) & (blocks != 0), counts)
        elif least == 0:
            tally.flushed += _total((y != 0) & (blocks == 0), counts)
        return y

    error = granularity.apply(visit, x).double().sub_(wide)
    tally.error += _energy(error, x.dtype, counts)
    if gradient is not None:
        tally.sensitivity = (tally.sensitivity or 0.0) + float(error.mul_(gradient).square_().sum())


def _clipped(x: Tensor, dims: tuple[int, ...], f: FP8Format, scale: Tensor, counts: Tensor | None) -> int:
    """How many x / scale round to more than the largest value, as in quantization_stats; a tie to the even code."""
    limit = (f.max_representable_value + f.overflow_value) / 2
    has_one = divide(amax(x, dims), scale) >= limit
    if not has_one.any():
        return 0
    if dims == (x.ndim - 1,) and scale.ndim == x.ndim:  # rows, of which few have an element to clip
        rows = has_one.squeeze(-1)
        x, scale = x[rows], scale[rows]
    q = divide(x, scale)
    q = q.abs_() if f.is_signed else q
    return _total((q >= limit) if f.max_code % 2 else (q > limit), counts)


def _total(condition: Tensor, counts: Tensor | None) -> int:
    return int(condition.count_nonzero() if counts is None else counts[condition].sum())


def _histogram(x: Tensor, size: int, counts: Tensor | None = None) -> Tensor:
    """How often 0 to size - 1 are in x; exact with counts too, below 2^53."""
    if counts is None:
        return x.flatten().bincount(minlength=size)
    return x.flatten().bincount(counts.flatten().double(), minlength=size).long()


def _energy(x: Tensor, dtype: torch.dtype, counts: Tensor | None) -> Energy:
    """The sum of squares of x, which is float64, made of values of a dtype."""
    flat, exponent = x.flatten(), 0
    if dtype == torch.float64:
        largest = float(largest_of(x))
        exponent = min(max(math.frexp(largest)[1], -1000), 1000) if largest else -1000
        flat = flat * 2.0**-exponent
    return Energy(float(flat.dot(flat if counts is None else flat * counts.flatten())), exponent)


def _decibels(signal: Energy, error: Energy) -> float:
    if error.number == 0:
        return math.inf if signal.number > 0 else math.nan
    ratio = signal.number / error.number
    if not ratio > 0:
        return -math.inf if ratio == 0 else math.nan
    return 10 * (math.log10(ratio) + 2 * math.log10(2) * (signal.exponent - error.exponent))
