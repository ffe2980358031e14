"""The modes of a projection: how it saturates, how it rounds, with how many random bits, and how scales are rounded."""

import torch

SATURATIONS = ("propagate", "finite", "none")
DETERMINISTIC_ROUNDINGS = (
    "nearest_ties_to_even",
    "nearest_ties_to_away",
    "toward_zero",
    "toward_positive",
    "toward_negative",
    "to_odd",
)
ROUNDINGS = (*DETERMINISTIC_ROUNDINGS, "stochastic")
POWER_OF_TWO_RULES = ("floor", "ceil", "even", "rceil")
# dtype of random_bits -> N, how many of its low bits are the random number. 24 bits reach every distance between two
# values of a format that a float32 normal can have, so stochastic rounding of those is unbiased. One int64 number is a
# seed, from which the bits of every element follow (philox.py).
SEED = torch.int64
RANDOM_BITS = {torch.int32: 24, torch.uint8: 8, SEED: 24}
