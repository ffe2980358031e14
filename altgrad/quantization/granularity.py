"""Which elements of a tensor share a scale: all of them, those of an axis, or those of a block."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# (view, dims) -> result: the elements of the view along dims share a scale; the result broadcasts to the view.
GroupFunction = Callable[[Tensor, tuple[int, ...]], Tensor]


@dataclass(frozen=True)
class PerTensor:
    """One scale for the whole tensor."""

    def apply(self, f: GroupFunction, x: Tensor) -> Tensor:
        return _apply(f, x, tuple(range(x.ndim)))


@dataclass(frozen=True)
class PerAxis:
    """One scale for every index along axes, shared along all others: ``PerAxis(0)`` is one scale a row.

    Args:
        axes: one axis or several, negative ones from the end.
    """

    axes: int | tuple[int, ...]

    def apply(self, f: GroupFunction, x: Tensor) -> Tensor:
        axes = (self.axes,) if isinstance(self.axes, int) else self.axes
        if not all(-x.ndim <= axis < x.ndim for axis in axes):
            raise ValueError(f"axes must be within the {x.ndim} dimensions of x, got {self.axes}")
        kept = [axis % x.ndim for axis in axes]
        return _apply(f, x, tuple(dim for dim in range(x.ndim) if dim not in kept))


@dataclass(frozen=True)
class PerBlock:
    """One scale for every block of consecutive elements in the last dimensions.

    ``PerBlock(32)`` is a block of a row, ``PerBlock((128, 128))`` one of a matrix. Blocks start at index 0; where a
    size does not divide the dimension, the last block is smaller.

    Args:
        sizes: the sizes of a block in the last dimensions; 1 in all before them.
    """

    sizes: int | tuple[int, ...]

    def __post_init__(self) -> None:
        if not self._sizes or not all(type(size) is int and size > 0 for size in self._sizes):
            raise ValueError(f"sizes must be positive integers, got {self.sizes}")

    @property
    def _sizes(self) -> tuple[int, ...]:
        return (self.sizes,) if isinstance(self.sizes, int) else self.sizes

    def apply(self, f: GroupFunction, x: Tensor) -> Tensor:
        """f on x seen as blocks, in x's shape: without a copy if the sizes divide x's and f's result is dense."""
        sizes = self._sizes
        if x.ndim < len(sizes):
            raise ValueError(f"blocks of {len(sizes)} dimensions need as many in x, got {tuple(x.shape)}")
        view = x
        dims: list[int] = []
        for dim, size in enumerate(sizes, x.ndim - len(sizes)):
            rest = x.shape[dim] % size
            if rest not in (0, x.shape[dim]):
                parts = x.split([x.shape[dim] - rest, rest], dim)
                return torch.cat([self.apply(f, part) for part in parts], dim)
            position = dim + len(dims)  # each dimension before it was split in two
            view = view.unflatten(position, (1, rest) if rest else (-1, size))
            dims.append(position + 1)
        result = f(view, tuple(dims))
        return result.expand(view.shape).reshape(x.shape)


def _apply(f: GroupFunction, x: Tensor, dims: tuple[int, ...]) -> Tensor:
    if not dims:  # to torch's reductions no dimensions mean all
        return f(x.unsqueeze(-1), (x.ndim,)).squeeze(-1)
    return f(x, dims)
