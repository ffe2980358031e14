"""Quantization to small formats: the operators as functions, and the formats."""

from .block_formats import MXFP4, MXFP6_E2M3, MXFP6_E3M2, MXFP8_E4M3, MXFP8_E5M2, NVFP4, BlockFormat
from .formats import (
    E0M7,
    E1M6,
    E2M1,
    E2M3,
    E2M5,
    E3M2,
    E3M4,
    E4M3,
    E4M3FNUZ,
    E5M2,
    E5M2FNUZ,
    E6M1,
    E7M0,
    FORMAT_REGISTRY,
    FP8Format,
    resolve,
)
from .granularity import PerAxis, PerBlock, PerTensor
from .history import AmaxHistory
from .ops import DequantizeFunc, QuantizeFunc, decode, dequantize, encode, quantize, quantize_gradient
from .scaling import compute_scale, quantize_blocks
from .stats import QuantizationStats, bit_stall, quantization_stats, sqnr

__all__ = [
    "E0M7",
    "E1M6",
    "E2M1",
    "E2M3",
    "E2M5",
    "E3M2",
    "E3M4",
    "E4M3",
    "E4M3FNUZ",
    "E5M2",
    "E5M2FNUZ",
    "E6M1",
    "E7M0",
    "FORMAT_REGISTRY",
    "MXFP4",
    "MXFP6_E2M3",
    "MXFP6_E3M2",
    "MXFP8_E4M3",
    "MXFP8_E5M2",
    "NVFP4",
    "AmaxHistory",
    "BlockFormat",
    "DequantizeFunc",
    "FP8Format",
    "PerAxis",
    "PerBlock",
    "PerTensor",
    "QuantizationStats",
    "QuantizeFunc",
    "bit_stall",
    "compute_scale",
    "decode",
    "dequantize",
    "encode",
    "quantization_stats",
    "quantize",
    "quantize_blocks",
    "quantize_gradient",
    "resolve",
    "sqnr",
]
