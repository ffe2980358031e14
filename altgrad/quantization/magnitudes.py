"""Statistics of |x| that a scale is made of: the largest, and order statistics."""

import math

import torch
from torch import Tensor

from ops_registry import cpu
from ops_registry.arithmetic import compute_dtype


def amax(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """The largest |x| along dims, which keep the size 1, in the compute dtype; NaN if one is NaN, 0 of nothing."""
    dtype = compute_dtype(x.dtype)
    if x.numel() == 0:
        return x.new_zeros([1 if dim in dims else size for dim, size in enumerate(x.shape)], dtype=dtype)
    if x.is_cuda or torch.compiler.is_compiling():
        return torch.linalg.vector_norm(x, math.inf, dims, keepdim=True).to(dtype)
    # On a CPU, where the norm's loop is slow, and writing |x| is too.
    first = x.ndim  # of the last dimensions that are all among dims
    while first - 1 in dims:
        first -= 1
    if 0 < first < x.ndim and cpu.reads(x):
        rows = cpu.amax_of_rows(x.flatten(first))
        others = tuple(dim for dim in dims if dim < first)
        rows = rows.amax(others, keepdim=True) if others else rows
        return rows.reshape(*rows.shape, *[1] * (x.ndim - first)).to(dtype)
    if len(dims) == x.ndim:
        least, most = (end.reshape([1] * x.ndim) for end in torch.aminmax(x))
    else:
        least, most = x.amin(dims, keepdim=True), x.amax(dims, keepdim=True)
    return torch.maximum(most, -least).abs().to(dtype)  # abs: of -0


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
