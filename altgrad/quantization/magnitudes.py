"""Statistics of |x| that a scale is made of: the largest, and order statistics."""

import math

import torch
from torch import Tensor

from ops_registry.arithmetic import compute_dtype


def amax(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """The largest |x| along dims, which keep the size 1, in the compute dtype; NaN if one is NaN, 0 of nothing."""
    return torch.ops.altgrad.amax(x, dims)


def percentile(x: Tensor, dims: tuple[int, ...], fraction: float) -> Tensor:
    """|x| at fraction of its order along dims, which keep the size 1, in the compute dtype; NaN if one is NaN.

    Between two order statistics it interpolates in float64, as numpy's ``quantile`` of a float64 array does.
    """
    kept = [dim for dim in range(x.ndim) if dim not in dims]
    if x.numel() == 0:
        return amax(x, dims)
    rows = x.permute(*kept, *dims).flatten(len(kept))
    position = (rows.shape[-1] - 1) * fraction
    below = math.floor(position)
    weight = position - below
    count = rows.shape[-1] - below
    top = largest(rows, count)
    low = top.topk(min(2, count), largest=False).values.double()
    lower, upper = low[..., 0], low[..., -1]
    if weight == 0:
        result = lower
    elif weight < 0.5:
        result = lower + (upper - lower) * weight
    else:
        result = upper - (upper - lower) * (1 - weight)
    result = result.masked_fill(top.amax(-1).isnan(), math.nan)
    return result.to(compute_dtype(x.dtype)).reshape([1 if d in dims else s for d, s in enumerate(x.shape)])


def largest(x: Tensor, count: int) -> Tensor:
    """The count largest |x| of the last dimension, in any order, NaN being larger than all.

    With m = count, the m groups of the largest maxima hold the m largest elements: each of them has an element of at
    least the m-th largest maximum, and no element of another group is larger than that. So the search is among m groups
    instead of all n elements, and sqrt(n / m) elements a group balance the search for the groups with that within them.
    """
    n = x.shape[-1]
    size = int(math.sqrt(n / count))
    if size > 1:
        whole = n // size * size
        groups = x[..., :whole].unflatten(-1, (-1, size))
        chosen = amax(groups, (groups.ndim - 1,)).topk(count, dim=-2, sorted=False).indices
        x = torch.cat([groups.take_along_dim(chosen, -2).flatten(-2), x[..., whole:]], -1)
    return x.abs().topk(count, sorted=False).values
