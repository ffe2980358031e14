"""The block formats of OCP MX and NVIDIA as keywords of compute_scale and quantize_blocks.

MX: blocks of 32 with a scale that is a power of two, by the standard's rule ("floor"; ``MXFP4 | {"power_of_two":
"rceil"}`` takes another). NVFP4: blocks of 16 with E4M3 scales under a float32 scale of the tensor.
"""

from typing import Required

from .formats import E2M1, E2M3, E3M2, E4M3, E5M2, FP8Format
from .granularity import Granularity, PerBlock
from .scaling import ScaleOptions


class BlockFormat(ScaleOptions, total=False):
    """The keywords of a call of :func:`quantize_blocks` or :func:`compute_scale`, x apart."""

    format: Required[FP8Format | str]
    granularity: Required[Granularity]


def _mx(format: FP8Format) -> BlockFormat:
    return BlockFormat(format=format, granularity=PerBlock(32), power_of_two="floor")


MXFP8_E4M3 = _mx(E4M3)
MXFP8_E5M2 = _mx(E5M2)
MXFP6_E2M3 = _mx(E2M3)
MXFP6_E3M2 = _mx(E3M2)
MXFP4 = _mx(E2M1)
NVFP4 = BlockFormat(format=E2M1, granularity=PerBlock(16), scale_format=E4M3)

__all__ = ["MXFP4", "MXFP6_E2M3", "MXFP6_E3M2", "MXFP8_E4M3", "MXFP8_E5M2", "NVFP4", "BlockFormat"]
