"""Random bits from a counter: bit i follows from (seed, i) alone, by Philox-4x32-10 (Salmon et al., SC 2011).

Element i of a tensor, counted in row-major order whatever its layout, takes word i mod 4 of the block with the counter
i div 4 under the key seed. The same in csrc/philox.h and in cuda_kernels.py.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_WEYL = 0x9E3779B9, 0xBB67AE85  # added to the key between rounds
_ROUNDS = 10
_LOW = (1 << 32) - 1


def philox(counter: Sequence[Tensor], key: Sequence[Tensor]) -> list[Tensor]:
    """The four words of the blocks with these counters of four words, under a key of two; int64, 0 to 2^32 - 1.

    Only what is multiplied is cut to 32 bits; the rest carries bits above them, which no sum or xor brings down.
    """
    x0, x1, x2, x3 = counter
    for i in range(_ROUNDS):
        (high0, low0), (high1, low1) = (_product(x, m) for x, m in zip((x0, x2), _MULTIPLIERS, strict=True))
        k0, k1 = (k + i * weyl for k, weyl in zip(key, _WEYL, strict=True))
        x0, x1, x2, x3 = (k0 ^ x1 ^ high1) & _LOW, low1, (k1 ^ x3 ^ high0) & _LOW, low0
    return [x0, x1 & _LOW, x2, x3 & _LOW]


def _product(x: Tensor, multiplier: int) -> tuple[Tensor, Tensor]:
    """The high word of x * multiplier for x of 32 bits, and a number whose low 32 bits are the low word.

    int64 has no room for that, but for x * (multiplier - 2^32), which is x * 2^32 less; the shift rounds down.
    """
    product = x * (multiplier - (1 << 32))
    return (product >> 32) + x, product


def random_words(seed: Tensor, index: Tensor) -> Tensor:
    """The words of 32 bits of the elements with these indices, as int64; a seed of any shape broadcasts."""
    block, word, zero = index >> 2, index & 3, index & 0
    x0, x1, x2, x3 = philox([block & _LOW, block >> 32, zero, zero], [seed & _LOW, (seed >> 32) & _LOW])
    is_odd = (word & 1) == 1
    return torch.where(word < 2, torch.where(is_odd, x1, x0), torch.where(is_odd, x3, x2))


def random_bits(seed: Tensor, shape: Sequence[int]) -> Tensor:
    """The int32 random bits of a tensor of this shape."""
    index = torch.arange(math.prod(shape), device=seed.device).view(shape)
    return random_words(seed, index).to(torch.int32)
