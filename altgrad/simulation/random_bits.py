"""Random bits from a counter: bit i follows from (seed, i) alone."""

import torch
from torch import Tensor

from ops_registry.modes import RANDOM_BITS

_MASK = (1 << 32) - 1


def random_bits(seed: Tensor | None, shape: torch.Size, device: torch.device) -> Tensor:
    """int32 bits for stochastic rounding; seed is a 0-d int64 tensor."""
    assert seed is not None
    # The mask makes a value of the index: a product of it Inductor would take for an index, of 32 bits in Triton.
    h = torch.arange(shape.numel(), device=device).view(shape) & _MASK
    h = (h * 0x9E3779B1 + (seed & _MASK)) & _MASK
    for word in (seed >> 32, seed):
        h = ((h ^ (h >> 16)) * 0x45D9F3B) & _MASK
        h = ((h ^ (h >> 15)) * 0x119DE1F3) & _MASK
        h = (h ^ (h >> 16) ^ word) & _MASK
    return (h >> (32 - RANDOM_BITS[torch.int32])).to(torch.int32)
