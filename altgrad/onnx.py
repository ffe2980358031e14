"""Export of quantize with the types that ONNX has; optional, needs onnxscript, and nothing else imports it.

Without this module ``torch.onnx.export(dynamo=True)`` writes every operator out in arithmetic that gives altgrad's bits
for every format. Runtimes with hardware for a type look for nodes of that type instead.
"""

from typing import Any

import torch
from onnxscript import ir, opset19

from ops_registry.formats import resolve

op: Any = opset19  # its annotations are for the bodies of ONNX functions

ONNX_TYPES = {
    "e4m3b7fn": ir.DataType.FLOAT8E4M3FN,
    "e5m2b15": ir.DataType.FLOAT8E5M2,
    "e4m3b8fnuz": ir.DataType.FLOAT8E4M3FNUZ,
    "e5m2b16fnuz": ir.DataType.FLOAT8E5M2FNUZ,
    "e2m1b1f": ir.DataType.FLOAT4E2M1,
}
"""The ONNX type of a format, by the format's spelling."""


def _quantize(
    x: Any, scale: Any, format: str, saturation: str = "propagate", rounding: str = "nearest_ties_to_even"
) -> Any:
    f = resolve(format)
    if f.spelling not in ONNX_TYPES:
        names = ", ".join(ONNX_TYPES)
        raise ValueError(f"ONNX has no type for {f.name}, only for {names}; export without the translation table")
    # onnxruntime 1.31 misplaces the overflow of casts that do not saturate, so "none" is refused as well.
    if rounding != "nearest_ties_to_even" or saturation == "none" or x.dtype == ir.DataType.DOUBLE:
        raise ValueError(
            "ONNX's types round float32 by nearest_ties_to_even and saturate, "
            f"got {x.dtype}, {rounding!r} and saturation {saturation!r}; export without the translation table"
        )
    type_ = ONNX_TYPES[f.spelling]
    x32, scale32 = (op.Cast(tensor, to=ir.DataType.FLOAT) for tensor in (x, scale))
    if len(scale.shape) == 0:
        zero = op.Cast(op.Constant(value_float=0.0), to=type_)
        y = op.DequantizeLinear(op.QuantizeLinear(x32, scale32, zero), scale32, zero)
    else:  # QuantizeLinear takes one axis or blocks, not every shape that broadcasts
        y = op.Mul(op.Cast(op.Cast(op.Div(x32, scale32), to=type_), to=ir.DataType.FLOAT), scale32)
    return op.Cast(y, to=x.dtype)


TRANSLATION_TABLE = {torch.ops.altgrad.quantize.default: _quantize}
"""For ``torch.onnx.export(..., dynamo=True, custom_translation_table=TRANSLATION_TABLE)``.

``quantize`` becomes ``QuantizeLinear`` and ``DequantizeLinear`` where the scale is 0-d, ``Div``, ``Cast``, ``Cast`` and
``Mul`` for every other scale. Formats: E4M3, E5M2, E4M3FNUZ, E5M2FNUZ and, with ``opset_version=23``, E2M1; any other
format or rounding, saturation ``"none"``, and float64 raise torch's ``ConversionError`` during the export, with the
reason. Stochastic rounding stays arithmetic.

The bits are altgrad's but for two cases. ONNX saturates infinities as finite values, so E5M2 with saturation
``"propagate"`` gives the largest value for them. E2M1 has no NaN, and ONNX leaves open what NaN becomes.

Example:
    >>> import torch, altgrad
    >>> from altgrad.onnx import TRANSLATION_TABLE
    >>> class Model(torch.nn.Module):
    ...     def forward(self, x):
    ...         return altgrad.quantization.quantize(x, "E4M3", 0.5)
    >>> program = torch.onnx.export(
    ...     Model().eval(), (torch.ones(2),), dynamo=True, verbose=False, custom_translation_table=TRANSLATION_TABLE
    ... )
    >>> [node.op_type for node in program.model.graph]
    ['QuantizeLinear', 'DequantizeLinear']
"""
