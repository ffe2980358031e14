"""Batching: one call on the stacked tensor, for any placement of the batch dimension in x and in scale."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .checks import check_pack, check_unpack
from .modes import SEED
from .operators import OPERATORS, library
from .philox import random_bits as bits_of


def _batched(name: str, tensors: int) -> Callable[..., tuple[Tensor, int]]:
    op = getattr(torch.ops.altgrad, name).default

    def rule(info: Any, in_dims: tuple[int | None, ...], x: Tensor, scale: Tensor, *args: Any) -> tuple[Tensor, int]:
        def stack(tensor: Tensor, dim: int | None) -> Tensor:
            return tensor.expand(info.batch_size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)

        x = stack(x, in_dims[0])
        if in_dims[1] is not None:
            # Behind the batch dimension scale broadcasts from the right, as it did without it.
            scale = scale.movedim(in_dims[1], 0)
            scale = scale.reshape(scale.shape[0], *[1] * (x.ndim - scale.ndim), *scale.shape[1:])
        others = []
        for tensor, dim in zip(args[: tensors - 2], in_dims[2:], strict=False):
            if tensor.dtype == SEED:  # one an example, or one for all: each example counts its own elements
                tensor = bits_of(tensor.view(-1, *[1] * (x.ndim - 1)), x.shape[1:]).expand(x.shape)
                dim = 0
            others.append(stack(tensor, dim))
        return op(x, scale, *others, *args[tensors - 2 :]), 0

    return rule


def _amax(info: Any, in_dims: tuple[int, None], x: Tensor, dims: list[int]) -> tuple[Tensor, int]:
    return torch.ops.altgrad.amax(x.movedim(in_dims[0], 0), [dim + 1 for dim in dims]), 0


def _pack(info: Any, in_dims: tuple[int, None], codes: Tensor, bits: int) -> tuple[Tensor, int]:
    check_pack(codes.select(in_dims[0], 0), bits)
    return torch.ops.altgrad.pack(codes.movedim(in_dims[0], 0), bits), 0


def _unpack(info: Any, in_dims: tuple[int, None, None], packed: Tensor, bits: int, n: int) -> tuple[Tensor, int]:
    check_unpack(packed.select(in_dims[0], 0), bits, n)
    return torch.ops.altgrad.unpack(packed.movedim(in_dims[0], 0), bits, n), 0


torch.library.register_vmap("altgrad::pack", _pack, lib=library)
torch.library.register_vmap("altgrad::unpack", _unpack, lib=library)
torch.library.register_vmap("altgrad::amax", _amax, lib=library)
for _name, _operator in OPERATORS.items():
    if _operator.is_pointwise:
        torch.library.register_vmap(f"altgrad::{_name}", _batched(_name, _operator.tensors), lib=library)
