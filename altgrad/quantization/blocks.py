"""Tensors that are stored in a block format: codes packed to their width, and a scale for each group of them."""

from typing import Any, NamedTuple, Unpack

import torch
from torch import Tensor

from ops_registry.arithmetic import compute_dtype
from ops_registry.checks import check_modes, check_tensor

from .formats import E8M0, FP8Format, resolve
from .granularity import Granularity, check_granularity
from .ops import decode, drawn_bits, encode, pack, unpack
from .scaling import ScaleOptions, compute_scale, in_one_pass, levels_of, scaler
from .two_levels import multiplied


class Blocks(NamedTuple):
    """A tensor in a block format, as :func:`encode_blocks` makes it and :func:`decode_blocks` takes it.

    A named tuple, so a pytree whose leaves are not all tensors; picklable (``torch.load`` takes it with
    ``weights_only=False``), and moved by :meth:`to`. Where the bytes are those of a dtype of torch, a view is one:
    ``codes.view(torch.float8_e4m3fn)``, ``codes.view(torch.float4_e2m1fn_x2)``, ``scales.view(torch.float8_e8m0fnu)``.

    Args:
        codes: uint8, [..., ceil(n * bits / 8)], packed as :func:`pack` does.
        scales: one element a group: codes of the scale format, or float32 (float64 of float64 x) without one.
        tensor_scale: 0-d, what all scales are multiplied by; None where there is no such level.
        format: the name of the elements' format.
        scale_format: that of the scales, ``"E8M0"`` for powers of two, or None.
        granularity: who shares a scale.
        n: the size of the last dimension.
        dtype: of the tensor that was encoded.
    """

    codes: Tensor
    scales: Tensor
    tensor_scale: Tensor | None
    format: str
    scale_format: str | None
    granularity: Granularity
    n: int
    dtype: torch.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the tensor that was encoded."""
        return (*self.codes.shape[:-1], self.n)

    @property
    def nbytes(self) -> int:
        """The bytes of all tensors."""
        return sum(field.nbytes for field in self if isinstance(field, Tensor))

    def to(self, device: torch.device | str) -> "Blocks":
        """The same on another device."""
        if isinstance(device, torch.dtype):
            raise TypeError(f"device must be a device, got {device}: decode_blocks takes a dtype")
        return Blocks(*(field.to(device) if isinstance(field, Tensor) else field for field in self))  # type: ignore[arg-type]

    def float_scales(self) -> Tensor:
        """What codes are multiplied by, one element a group, in the dtype of the arithmetic."""
        compute = compute_dtype(self.dtype)
        if self.scale_format is None:
            return self.scales
        tensor_scale = 1.0 if self.tensor_scale is None else self.tensor_scale
        return decode(self.scales, self.scale_format, tensor_scale, dtype=compute)


def encode_blocks(
    x: Tensor,
    format: FP8Format | str,
    *,
    granularity: Granularity,
    saturation: str = "propagate",
    rounding: str = "nearest_ties_to_even",
    random_bits: Tensor | None = None,
    generator: torch.Generator | None = None,
    **options: Unpack[ScaleOptions],
) -> Blocks:
    """x in a block format, with nothing stored but packed codes and a scale a block: ``encode_blocks(x, **MXFP4)``.

    MXFP4 takes 4.25 bits an element, NVFP4 4.5 and one float32 for the tensor.

    Args:
        x: at least one dimension; codes are packed along the last.
        others: as in :func:`altgrad.quantization.quantize_blocks`.

    Raises:
        TypeError, ValueError, RuntimeError: as in :func:`altgrad.quantization.quantize_blocks`; x without a dimension.

    Example:
        >>> import torch
        >>> from altgrad.quantization import MXFP4, decode_blocks, encode_blocks
        >>> blocks = encode_blocks(torch.tensor([[0.1, 0.25, 6.0, -100.0]]), **MXFP4)
        >>> blocks.codes.tolist(), blocks.scales.tolist(), decode_blocks(blocks)
        ([[0, 241]], [[131]], tensor([[  0.,   0.,   8., -96.]]))
    """
    f = resolve(format)
    if f.bits > 8:
        raise ValueError(f"format must have codes of at most 8 bits to be packed, got {f.name} of {f.bits}")
    scaler(x, f, **options)  # checks them
    check_granularity(granularity)
    check_modes(saturation, rounding)
    operands = in_one_pass(x, f, granularity, options)
    bits = drawn_bits(x, rounding, random_bits, generator)
    if operands is not None:
        tensor_scale, *others = operands
        if bits is None:
            codes, scale = torch.ops.altgrad.encode_blocks(x, tensor_scale, f.name, saturation, rounding, *others)
        else:
            codes, scale = torch.ops.altgrad.encode_blocks_stochastic(
                x, tensor_scale, bits, f.name, saturation, *others
            )
        _, rule, scale_format, _ = others
        scale_format = E8M0.name if rule is not None else scale_format
        return Blocks(codes, scale, tensor_scale, f.name, scale_format, granularity, x.shape[-1], x.dtype)
    scale = compute_scale(x, f, granularity=granularity, compact=True, **options)
    modes: dict[str, Any] = {"saturation": saturation, "rounding": rounding, "random_bits": bits}
    if options.get("arithmetic") == "transformer_engine":
        codes = encode(granularity.apply(lambda blocks, dims, scale: multiplied(blocks, scale), x, scale), f, **modes)
    else:
        codes = encode(x, f, scale, granularity=granularity, **modes)
    tensor_scale, scale_format = None, None
    if options.get("power_of_two") is not None:
        scale, scale_format = encode(scale, E8M0), E8M0.name
    elif (levels := levels_of(f, options)) is not None:
        tensor_scale, scale_format = levels.tensor_scale(x), levels.scale_format.name
        # scale is a value times tensor_scale, rounded: nearest to that value
        scale = encode(scale, levels.scale_format, 1.0 if tensor_scale is None else tensor_scale)
    return Blocks(pack(codes, f.bits), scale, tensor_scale, f.name, scale_format, granularity, x.shape[-1], x.dtype)


def decode_blocks(blocks: Blocks, *, dtype: torch.dtype | None = None) -> Tensor:
    """The tensor of :func:`encode_blocks`: bit for bit that of :func:`altgrad.quantization.quantize_blocks`.

    Args:
        blocks: what :func:`encode_blocks` gave.
        dtype: of the result; None: that of the tensor that was encoded.

    Raises:
        TypeError, ValueError: fields that do not fit each other.

    Example:
        >>> import torch
        >>> from altgrad.quantization import NVFP4, decode_blocks, encode_blocks, quantize_blocks
        >>> x = torch.randn(4, 40)
        >>> decode_blocks(encode_blocks(x, **NVFP4)).equal(quantize_blocks(x, **NVFP4))
        True
    """
    if not isinstance(blocks, Blocks):
        raise TypeError(f"blocks must be what encode_blocks gives, got {type(blocks).__name__} {blocks!r:.80}")
    if blocks.tensor_scale is not None:
        check_tensor("tensor_scale", blocks.tensor_scale)
        if blocks.tensor_scale.ndim:
            raise ValueError(f"tensor_scale must be 0-d, got the shape {tuple(blocks.tensor_scale.shape)}")
    codes = unpack(blocks.codes, resolve(blocks.format).bits, blocks.n)
    scale, dtype = blocks.float_scales(), dtype or blocks.dtype
    return decode(codes, blocks.format, scale, granularity=blocks.granularity, dtype=dtype)
