"""Statistics of |x| that a scale is made of: the largest, and order statistics."""

import math

import torch
from torch import Tensor

from ops_registry.arithmetic import compute_dtype, constant
from ops_registry.sharding import with_whole_blocks


def amax(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """The largest |x| along dims, which keep the size 1, in the compute dtype; NaN if one is NaN, 0 of nothing."""
    return torch.ops.altgrad.amax(x, dims)


def percentile(x: Tensor, dims: tuple[int, ...], fraction: float) -> Tensor:
    """|x| at fraction of its order along dims, which keep the size 1, in the compute dtype; NaN if one is NaN.

    Between two order statistics it interpolates in float64, as numpy's ``quantile`` of a float64 array does. Between a
    number and infinity it is infinity, where numpy has infinity or NaN by the fraction.
    """
    kept = [dim for dim in range(x.ndim) if dim not in dims]
    x = with_whole_blocks(x, [size if dim in dims else 1 for dim, size in enumerate(x.shape)])
    rows = x.permute(*kept, *dims).flatten(len(kept)).unsqueeze(0)  # numbers of one row are not 0-d
    if is_static(rows.shape[-1]) and rows.shape[-1] == 0:
        return amax(x, dims)
    lower, upper, weight, most = order_statistics(rows, fraction)
    result = torch.where(weight < 0.5, lower + (upper - lower) * weight, upper - (upper - lower) * (1 - weight))
    result = torch.where(upper == math.inf, upper, result)  # whose difference or its product may be NaN
    result = torch.where(weight == 0, lower, result)
    # onnxruntime's TopK and ReduceMax lose NaN.
    has_nan = rows.isnan().any(-1) if torch.onnx.is_in_onnx_export() else most.isnan()
    result = torch.where(has_nan, math.nan, result)
    return result.to(compute_dtype(x.dtype)).reshape([1 if d in dims else s for d, s in enumerate(x.shape)])


def order_statistics(rows: Tensor, fraction: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The |x| of the last dimension around fraction of their order, the upper one's weight, and the largest."""
    n = rows.shape[-1]
    if not is_static(n):  # then all of the arithmetic is on tensors
        places = (torch.full((), n, dtype=torch.float64, device=rows.device) - 1) * fraction
        below = places.long()
        ordered = rows.abs().sort(-1).values.double()
        around = ordered.index_select(-1, torch.stack([below, torch.clamp(below + 1, max=n - 1)]))
        return around[..., 0], around[..., 1], places - below, ordered[..., -1]
    position = (n - 1) * fraction
    count = n - math.floor(position)
    top = largest(rows, count)
    low = top.topk(min(2, count), largest=False).values.double()
    weight = position - math.floor(position)
    # What is filled comes to ONNX by way of float32.
    filled = torch.tensor(weight, dtype=low.dtype) if torch.onnx.is_in_onnx_export() else constant(weight, low)
    return low[..., 0], low[..., -1], filled, top.amax(-1)


def is_static(size: int) -> bool:
    """Whether a size is a number, not a symbol of a compiler for any number."""
    return not torch.compiler.is_compiling() or torch.fx.experimental.symbolic_shapes.has_static_value(size)


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
        x = torch.cat([groups.gather(-2, chosen.expand(*chosen.shape[:-1], size)).flatten(-2), x[..., whole:]], -1)
    return x.abs().topk(count, sorted=False).values
