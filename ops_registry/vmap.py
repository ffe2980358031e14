"""Batching: one call on the stacked tensor, for any placement of the batch dimension in x and in scale."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .checks import check_pack, check_unpack, in_two_calls
from .modes import SEED
from .operators import IN_BLOCKS, OPERATORS, library
from .philox import random_bits as bits_of


def _stack(info: Any, tensor: Tensor, dim: int | None) -> Tensor:
    return tensor.expand(info.batch_size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)


def _example(info: Any, tensor: Tensor, dim: int) -> Tensor:
    """The first example, or of an empty batch what an example would be, without values."""
    return tensor.select(dim, 0) if info.batch_size else tensor.new_empty(tensor.movedim(dim, 0).shape[1:])


def _stack_bits(info: Any, random_bits: Tensor, dim: int | None, x: Tensor) -> Tensor:
    if random_bits.dtype != SEED:
        return _stack(info, random_bits, dim)
    # One an example, or one for all: each example counts its own elements.
    return bits_of(random_bits.view(-1, *[1] * (x.ndim - 1)), x.shape[1:]).expand(x.shape)


def _batched(name: str, tensors: int) -> Callable[..., tuple[Tensor, int]]:
    op = getattr(torch.ops.altgrad, name).default

    def rule(info: Any, in_dims: tuple[int | None, ...], x: Tensor, scale: Tensor, *args: Any) -> tuple[Tensor, int]:
        x = _stack(info, x, in_dims[0])
        if in_dims[1] is not None:
            # Behind the batch dimension scale broadcasts from the right, as it did without it.
            scale = scale.movedim(in_dims[1], 0)
            scale = scale.reshape(scale.shape[0], *[1] * (x.ndim - scale.ndim), *scale.shape[1:])
        others = [_stack_bits(info, t, dim, x) for t, dim in zip(args[: tensors - 2], in_dims[2:], strict=False)]
        return op(x, scale, *others, *args[tensors - 2 :]), 0

    return rule


def _in_blocks(name: str) -> Callable[..., tuple[Any, Any]]:
    op = getattr(torch.ops.altgrad, name).default

    def rule(
        info: Any, in_dims: tuple[int | None, ...], x: Tensor, tensor_scale: Tensor | None, *args: Any
    ) -> tuple[Any, Any]:
        x, (first, *modes), block, others = _stack(info, x, in_dims[0]), args[:3], args[3], args[4:]
        if isinstance(first, Tensor):
            first = _stack_bits(info, first, in_dims[2], x)
        if name.startswith("encode") and x.ndim == 1:
            raise ValueError("x must have a dimension, along which codes are packed, got a 0-d tensor")
        if tensor_scale is None or in_dims[1] is None or not info.batch_size:
            if tensor_scale is not None and in_dims[1] is not None:
                tensor_scale = _example(info, tensor_scale, in_dims[1])
            return _leading(op(x, tensor_scale, first, *modes, [1, *block], *others))
        firsts = first.unbind() if isinstance(first, Tensor) else [first] * info.batch_size
        examples = zip(x.unbind(), tensor_scale.unbind(in_dims[1]), firsts, strict=True)
        results = [op(x, s, first, *modes, block, *others) for x, s, first in examples]
        is_one = isinstance(results[0], Tensor)
        return _leading(torch.stack(results) if is_one else tuple(map(torch.stack, zip(*results, strict=True))))

    return rule


def _operands(info: Any, in_dims: tuple[int | None, ...], x: Tensor, *args: Any) -> tuple[Any, Any]:
    """The two calls of the formula, each by its rule."""
    rule, calls = _in_blocks("quantize_operand"), in_two_calls(_stack(info, x, in_dims[0]), *args)
    outputs = [rule(info, (0, dim), *call)[0] for call, dim in zip(calls, in_dims[1:3], strict=True)]
    return _leading(tuple(outputs))


def _leading(outputs: Any) -> tuple[Any, Any]:
    """An output, or several, with the batch dimension in front."""
    return outputs, 0 if isinstance(outputs, Tensor) else (0,) * len(outputs)


def _amax(info: Any, in_dims: tuple[Any, ...], x: Tensor, dims: list[int], *args: Any) -> tuple[Tensor, int]:
    return torch.ops.altgrad.amax(x.movedim(in_dims[0], 0), [dim + 1 for dim in dims], *args), 0


def _as_scale(info: Any, in_dims: tuple[int, None], amax: Tensor, max_value: float) -> tuple[Tensor, int]:
    return torch.ops.altgrad.as_scale(amax, max_value), in_dims[0]


def _pack(info: Any, in_dims: tuple[int, None], codes: Tensor, bits: int) -> tuple[Tensor, int]:
    check_pack(_example(info, codes, in_dims[0]), bits)
    return torch.ops.altgrad.pack(codes.movedim(in_dims[0], 0), bits), 0


def _unpack(info: Any, in_dims: tuple[int, None, None], packed: Tensor, bits: int, n: int) -> tuple[Tensor, int]:
    check_unpack(_example(info, packed, in_dims[0]), bits, n)
    return torch.ops.altgrad.unpack(packed.movedim(in_dims[0], 0), bits, n), 0


def _matmul(info: Any, in_dims: tuple[int | None, ...], a: Tensor, b: Tensor, *args: Any) -> tuple[Tensor, int]:
    arguments = zip((a, b, *args), in_dims, strict=True)
    stacked = [_stack(info, x, dim) if isinstance(x, Tensor) else x for x, dim in arguments]
    return torch.ops.altgrad.matmul(*stacked), 0


for _name in IN_BLOCKS:
    _batching = _operands if _name == "quantize_operands" else _in_blocks(_name)
    torch.library.register_vmap(f"altgrad::{_name}", _batching, lib=library)
torch.library.register_vmap("altgrad::matmul", _matmul, lib=library)
torch.library.register_vmap("altgrad::pack", _pack, lib=library)
torch.library.register_vmap("altgrad::unpack", _unpack, lib=library)
torch.library.register_vmap("altgrad::amax", _amax, lib=library)
torch.library.register_vmap("altgrad::as_scale", _as_scale, lib=library)
for _name, _operator in OPERATORS.items():
    if _operator.is_pointwise:
        torch.library.register_vmap(f"altgrad::{_name}", _batched(_name, _operator.tensors), lib=library)
