"""Which elements of a tensor share a scale: all of them, those of an axis, or those of a block."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ops_registry.sharding import with_whole_blocks

# (view of x, dims, *views of others) -> result: the elements of the view along dims share a scale, and the result
# broadcasts to it. Each of the others has x's shape, or one element for all that share a scale.
GroupFunction = Callable[..., Tensor]


def check_granularity(granularity: Any) -> None:
    if not isinstance(granularity, Granularity):
        raise TypeError(f"granularity must be a PerTensor(), PerAxis or PerBlock, got {granularity!r}")


def is_integer(number: Any) -> bool:
    return isinstance(number, int) and not isinstance(number, bool)


@dataclass(frozen=True)
class PerTensor:
    """One scale for the whole tensor."""

    def apply(self, f: GroupFunction, x: Tensor, *others: Tensor, compact: bool = False) -> Tensor:
        return _apply(f, x, others, tuple(range(x.ndim)))


@dataclass(frozen=True)
class PerAxis:
    """One scale for every index along axes, shared along all others: ``PerAxis(0)`` is one scale a row.

    Args:
        axes: one axis or several, negative ones from the end.
    """

    axes: int | tuple[int, ...]

    def __post_init__(self) -> None:
        axes = self.axes if isinstance(self.axes, tuple) else (self.axes,)
        if not all(map(is_integer, axes)):
            raise TypeError(f"axes must be an integer or a tuple of them, got {self.axes!r}")

    def block(self, x: Tensor) -> list[int]:
        """The size of a block of x in each dimension, -1 for all of it."""
        axes = (self.axes,) if isinstance(self.axes, int) else self.axes
        if not all(-x.ndim <= axis < x.ndim for axis in axes):
            raise ValueError(f"axes must be within the {x.ndim} dimensions of x, got {self.axes}")
        kept = [axis % x.ndim for axis in axes]
        return [1 if dim in kept else -1 for dim in range(x.ndim)]

    def apply(self, f: GroupFunction, x: Tensor, *others: Tensor, compact: bool = False) -> Tensor:
        return _apply(f, x, others, tuple(dim for dim, size in enumerate(self.block(x)) if size == -1))


@dataclass(frozen=True, repr=False)
class PerBlock:
    """One scale for every block of consecutive elements.

    ``PerBlock(32)`` is a block of a row, ``PerBlock((128, 128))`` one of a matrix, ``PerBlock({0: 32})`` one of a
    column. Blocks start at index 0; where a size does not divide the dimension, the last block is smaller.

    Args:
        sizes: the sizes of a block in the last dimensions, or a mapping of dimensions (negative ones from the end) to
            sizes; 1 in all others. It is kept as pairs of both.

    Example:
        >>> from altgrad.quantization import PerBlock
        >>> PerBlock({0: 32}), PerBlock({-1: 32}) == PerBlock(32)
        (PerBlock({0: 32}), True)
    """

    sizes: Any  # int | tuple[int, ...] | Mapping[int, int] to make one; then tuple[tuple[int, int], ...]

    def __post_init__(self) -> None:
        sizes = (self.sizes,) if isinstance(self.sizes, int) else self.sizes
        if not isinstance(sizes, Mapping | tuple | list):
            raise TypeError(f"sizes must be an integer, a tuple of them or a mapping to them, got {self.sizes!r}")
        pairs = tuple(sizes.items()) if isinstance(sizes, Mapping) else tuple(enumerate(sizes, -len(sizes)))
        if pairs and isinstance(pairs[0][1], tuple):  # of another PerBlock
            pairs = tuple(sizes)
        if not pairs or not all(is_integer(dim) and is_integer(size) and size > 0 for dim, size in pairs):
            raise ValueError(f"sizes must be positive integers, of dimensions that are integers, got {self.sizes}")
        object.__setattr__(self, "sizes", pairs)

    def __repr__(self) -> str:
        sizes = tuple(size for _, size in self.sizes)
        if [dim for dim, _ in self.sizes] != list(range(-len(sizes), 0)):
            return f"PerBlock({dict(self.sizes)})"
        return f"PerBlock({sizes if len(sizes) > 1 else sizes[0]})"

    def by_dim(self, ndim: int) -> list[tuple[int, int]]:
        """The dimensions, counted from 0 and in order, each with its size."""
        dims = [dim for dim, _ in self.sizes]
        if not all(-ndim <= dim < ndim for dim in dims) or len({dim % ndim for dim in dims}) < len(dims):
            raise ValueError(
                f"blocks along the dimensions {dims} need a tensor with each of them once, got {ndim} dimensions"
            )
        sizes = {dim % ndim: size for dim, size in self.sizes}
        return [(dim, sizes[dim]) for dim in range(ndim) if dim in sizes]

    def block(self, x: Tensor) -> list[int]:
        """The size of a block of x in each dimension."""
        sizes = dict(self.by_dim(x.ndim))
        return [sizes.get(dim, 1) for dim in range(x.ndim)]

    def apply(self, f: GroupFunction, x: Tensor, *others: Tensor, compact: bool = False) -> Tensor:
        """f on x and others seen as blocks, in x's shape; compact: with one element a block.

        Without a copy if the sizes divide x's and f's result is dense.
        """
        block = self.block(x)
        x, *views = (with_whole_blocks(t, block) if t.shape == x.shape else t for t in (x, *others))
        view, others = x, tuple(views)
        dims: list[int] = []
        for dim, size in self.by_dim(x.ndim):
            rest = x.shape[dim] % size
            if rest not in (0, x.shape[dim]):
                cut = x.shape[dim] - rest
                ends = [cut if t.shape[dim] == x.shape[dim] else cut // size for t in (x, *others)]
                heads = [t.narrow(dim, 0, end) for t, end in zip((x, *others), ends)]
                tails = [t.narrow(dim, end, t.shape[dim] - end) for t, end in zip((x, *others), ends)]
                return torch.cat([self.apply(f, *part, compact=compact) for part in (heads, tails)], dim)
            position = dim + len(dims)  # each dimension before it was split in two
            blocks = (1, rest) if rest else (-1, size)
            views = [
                t.unflatten(position, blocks) if t.shape[position] == x.shape[dim] else t.unsqueeze(position + 1)
                for t in views
            ]
            view = view.unflatten(position, blocks)
            dims.append(position + 1)
        result = f(view, tuple(dims), *views)
        if compact:
            return result.reshape([size for dim, size in enumerate(result.shape) if dim not in dims])
        return result.expand(view.shape).reshape(x.shape)


Granularity = PerTensor | PerAxis | PerBlock


def has_whole_blocks(granularity: Granularity, x: Tensor) -> bool:
    """Whether apply sees x at once, as a view in which its elements have the same row-major order."""
    return not isinstance(granularity, PerBlock) or all(
        x.shape[dim] % size in (0, x.shape[dim]) for dim, size in granularity.by_dim(x.ndim)
    )


def _apply(f: GroupFunction, x: Tensor, others: tuple[Tensor, ...], dims: tuple[int, ...]) -> Tensor:
    if not dims:  # to torch's reductions no dimensions mean all
        return f(x.unsqueeze(-1), (x.ndim,), *[t.unsqueeze(-1) for t in others]).squeeze(-1)
    return f(x, dims, *others)
